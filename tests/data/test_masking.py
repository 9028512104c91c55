"""Hidden words and hidden patches: the originals' draws, shares, and keys."""
import random

import numpy as np
import pytest
import torch
from golden import golden

from medvl.data.augment.patch_masks import block_mask, draw_ratio, patch_mask, patch_masks
from medvl.data.text.masking import flag_words, mask_words, masking_probability, reference_masks


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items() if v.dtype.kind not in 'US'}


def test_the_originals_masked_words():
    z = arrays('mlm_mask.npz')
    generator = torch.Generator().manual_seed(z['seed'].item())
    read, labels = reference_masks(z['input_ids'], generator, z['vocab'].item(), probability=z['probability'].item())
    assert torch.equal(read, z['masked_ids']) and torch.equal(labels, z['labels'])


def test_the_originals_probabilities_of_listed_words():
    z = arrays('v2022_pretrain_forward.npz')
    p = masking_probability(z['text_input_ids'].numpy(), .1, z['mesh_flags'].numpy().astype(bool), never=())
    np.testing.assert_allclose(p, z['probability_matrix'].numpy(), rtol=1e-6)
    asked = z['labels'] != -100
    assert torch.equal(z['labels'][asked], z['text_input_ids'][asked]) and torch.equal(z['input_ids'][~asked], z['text_input_ids'][~asked])


OPTIONS = dict(vocab_size=97, mask_id=4)


def test_words_are_keyed_by_seed_epoch_and_sample():
    ids = np.array([2, *range(10, 40), 3, 0, 0])
    first = mask_words(ids, (0, 0, 'a'), **OPTIONS)
    for key, same in (((0, 0, 'a'), True), ((1, 0, 'a'), False), ((0, 1, 'a'), False), ((0, 0, 'b'), False)):
        again = mask_words(ids, key, **OPTIONS)
        assert all(np.array_equal(x, y) for x, y in zip(first, again)) == same
    read, labels = first
    assert read.dtype == labels.dtype == np.int64 and (ids[labels != -100] == labels[labels != -100]).all()


def test_shares_of_words():
    ids = np.array([2, 10, 11, 3, 0])
    flags = np.zeros(97, bool)
    flags[11] = True
    drawn = [mask_words(ids, (0, e, 0), flags=flags, **OPTIONS) for e in range(4000)]
    asked = np.mean([l != -100 for _, l in drawn], 0)
    np.testing.assert_allclose(asked, [0, .15, .9, .15, 0], atol=.03)
    fate = [(r[2] == 4, r[2] == 11) for r, l in drawn if l[2] != -100]
    np.testing.assert_allclose(np.mean(fate, 0), [.8, .1], atol=.03) # hidden, left; the rest swapped


def test_probabilities_that_are_none():
    with pytest.raises(ValueError, match='0..1'): masking_probability(np.array([1]), -.1)
    assert masking_probability(np.array([11]), .5, np.ones(12, bool)) == 1.0 # never above 1
    assert masking_probability(np.zeros((0,), int)).shape == (0,)


def test_flagged_words_are_whole_pieces():
    from medvl.data.text.tokens import build_wordpiece
    tokenizer = build_wordpiece(['pleural effusion', 'effuse'], 64)
    flags = flag_words(tokenizer, ['Effusion', 'absent'])
    assert [t for t, i in tokenizer.get_vocab().items() if flags[i]] == ['effusion']


# -- patches ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def masks(): return {k: v.numpy().astype(bool) for k, v in arrays('masks.npz').items()}


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_beits_blocks(masks, seed):
    for name, mask in ((f'beit_14_75_min16_seed{seed}', block_mask(random.Random(seed), (14, 14), 75, 16)),
                       (f'beit_8x10_20_max9_seed{seed}', block_mask(random.Random(seed), (8, 10), 20, 4, 9))):
        if name in masks: assert np.array_equal(mask, masks[name]), name


@pytest.mark.parametrize('shape', ['block', 'rand'])
@pytest.mark.parametrize('share, ratio, variation', [('fix03', .3, 0.), ('mix', [0., .3], [0., .2])])
def test_the_originals_patches(masks, shape, share, ratio, variation):
    if f'{shape}_{share}_crop0' not in masks: pytest.skip('a case that is not handed over')
    draws, shuffle = random.Random(9), np.random.RandomState(9)
    for i, grid in enumerate([(14, 14), (14, 14), (6, 6)]):
        mask = np.zeros(grid, bool) if i == 0 else patch_mask((0, 0, 0, i), grid, ratio, variation, shape, draws, shuffle)
        assert np.array_equal(mask, masks[f'{shape}_{share}_crop{i}']), i
    early = patch_masks((0, 0, 0), [(14, 14), (14, 14)], ratio=ratio, variation=variation, shape=shape, start=1)
    assert np.array_equal(early[1], masks[f'{shape}_{share}_epoch0_crop1'])


def test_patches_are_keyed_by_seed_epoch_sample_and_version():
    first = patch_mask((0, 0, 'a', 1), (14, 14))
    for key, same in (((0, 0, 'a', 1), True), ((1, 0, 'a', 1), False), ((0, 1, 'a', 1), False), ((0, 0, 'b', 1), False), ((0, 0, 'a', 2), False)):
        assert np.array_equal(first, patch_mask(key, (14, 14))) == same
    random.seed(5)
    state = random.getstate()
    patch_masks((0, 0, 0), [(6, 6)] * 3, shape='rand')
    assert random.getstate() == state # no draw of the global generator


@pytest.mark.parametrize('grid', [(1, 1), (2, 3), (5, 17), (14, 14)])
def test_any_grid_and_never_more_than_asked(grid):
    for epoch in range(30):
        for ratio in (0, .3, .9):
            assert patch_mask((0, epoch, 0, 0), grid, ratio).sum() <= ratio * grid[0] * grid[1]
            assert patch_mask((0, epoch, 0, 0), grid, ratio, shape='rand').sum() == int(ratio * grid[0] * grid[1])


def test_shares_of_patches():
    with pytest.raises(ValueError, match='negative'): draw_ratio(random.Random(0), [.1, .3], .2)
    with pytest.raises(ValueError): draw_ratio(random.Random(0), [.1, .3], [.1])
    assert draw_ratio(random.Random(0), .3) == .3
    assert {draw_ratio(random.Random(i), [.1, .3]) for i in range(20)} == {.1, .3}
