"""Captions: sentences, order, hidden words and their keys; versions for a teacher and a student."""
import numpy as np
import pytest
import torch

from medvl.core.errors import DataError
from medvl.data.augment.crops import Crops, CropsConfig
from medvl.data.augment.makers import new_augment
from medvl.data.batch import check_batch, join, slice_batch
from medvl.data.phantom.populations import new_phantom
from medvl.data.samples.builders import Parts, new_samples
from medvl.data.samples.captioned import CaptionConfig, CaptionDataset, CaptionTokens, read_caption
from medvl.data.text.captions import caption_sentences, pre_caption
from medvl.data.text.tokens import build_wordpiece


@pytest.fixture(scope='module')
def chest(tmp_path_factory): return new_phantom('chest', tmp_path_factory.mktemp('chest'), 24, (64, 64))


@pytest.fixture(scope='module')
def tokenizer(chest): return build_wordpiece(list(chest.manifest.report), 500)


def data(chest, tokenizer, train=True, **changes): return CaptionDataset(chest, tokenizer, CaptionConfig(**changes), train)


def test_full_stops_cut_as_the_original_does():
    typed = ['1. Heart normal.', 'Nodule of 1.5 cm in the left lung!']
    assert read_caption(typed, 'full_stops') == caption_sentences(pre_caption(' '.join(typed)))
    assert read_caption(typed) == ['1. heart normal', 'nodule of 1.5 cm in the left lung']
    assert sum(len(s.split()) for s in read_caption(['one two three four.'] * 9, max_words=10)) <= 10
    assert read_caption(['?', '..']) == []


def test_numbers_of_sentences_mark_their_tokens_alone(tokenizer):
    words = ['the heart is large', 'no effusion']
    one = CaptionTokens(tokenizer)(words)
    for i, s in enumerate(words, 1):
        assert one['input_ids'][one['sentence'] == i].tolist() == tokenizer(s, add_special_tokens=False).input_ids
    assert one['input_ids'][one['sentence'] == 0].tolist() == [tokenizer.cls_token_id, *tokenizer('. .', add_special_tokens=False).input_ids, tokenizer.sep_token_id]


def test_keys_decide_everything(chest, tokenizer):
    a, b = data(chest, tokenizer), data(chest, tokenizer)
    same = lambda x, y: x['text'] == y['text'] and np.array_equal(x['masked'][0], y['masked'][0])
    assert same(a[3, 2], b[3, 2]) and not same(a[3, 2], a[4, 2]) and not same(a[3, 2], data(chest, tokenizer, seed=1)[3, 2])
    assert a.digest == b.digest != data(chest, tokenizer, seed=1).digest
    fixed = data(chest, tokenizer, train=False)
    assert same(fixed[0, 2], fixed[7, 2]) and fixed[0, 2]['sentences'] == fixed.caption(fixed.rows[2], False)


def test_hidden_words_are_those_of_the_labels(chest, tokenizer):
    hidden = total = 0
    for i in range(20):
        s = data(chest, tokenizer, mask_probability=.3)[0, i]
        ids, read, labels = s['tokens'][0]['input_ids'], s['masked'][0], s['word_labels'][0]
        assert np.array_equal(labels[labels != -100], ids[labels != -100]) and np.array_equal(read[labels == -100], ids[labels == -100]) and labels[0] == -100
        hidden, total = hidden + (labels != -100).sum(), total + len(ids) - 1
    assert .24 < hidden / total < .36
    often = data(chest, tokenizer, mask_probability=.16, listed=('effusion', 'pneumothorax'))
    flagged = [(s['word_labels'][0] != -100)[np.isin(s['tokens'][0]['input_ids'], tokenizer.convert_tokens_to_ids(['effusion', 'pneumothorax']))] for s in (often[0, i] for i in range(20))]
    assert np.concatenate(flagged).mean() > .8


def test_mirrored_images_have_mirrored_words(chest, tokenizer):
    plain, turned = data(chest, tokenizer, order='report'), data(chest, tokenizer, order='report', flip_horizontal=1.)
    sided = next(i for i in range(20) if ' left ' in plain[0, i]['text'][0] or ' right ' in plain[0, i]['text'][0])
    swap = lambda t: t.replace('left', 'LEFT').replace('right', 'left').replace('LEFT', 'right')
    assert turned[0, sided]['text'][0] == swap(plain[0, sided]['text'][0]) and turned[0, sided]['flip'][0, 0]
    assert not data(chest, tokenizer, flip_horizontal=1., laterality='no_flip')[0, sided]['flip'].any()


def test_batches_join_and_are_declared(chest, tokenizer):
    d = new_samples('captions', Parts({'train': chest}), 'train', tokenizer, dict(most=3))
    batch = new_augment('crops', dict(hide=.3, local_size=32), 3)(d.collate([d[0, i] for i in range(5)]), 0, 0)
    check_batch(batch)
    again = join([slice_batch(batch, 0, 2), slice_batch(batch, 2, 5)])
    assert torch.equal(again['word_labels'], batch['word_labels']) and all(map(torch.equal, again['hidden'], batch['hidden']))
    assert [tuple(v.shape) for v in again['augmented']] == [(5, 1, 1, 64, 64)] * 2 + [(5, 1, 1, 32, 32)]
    assert max(len(s) for s in batch['sentences']) <= 3


def test_what_is_not_drawn_for_others_stays(chest, tokenizer):
    "A sample's versions and hidden patches are its own, whoever shares the batch; nothing is hidden before its epoch."
    d = data(chest, tokenizer)
    make = lambda rows, epoch=2: Crops(CropsConfig(hide=.4, hide_from=2), 2)(d.collate([d[epoch, i] for i in rows]), 7, epoch)
    many, alone = make([4, 1, 3]), make([1])
    assert torch.equal(many['augmented'][1][1], alone['augmented'][1][0]) and torch.equal(many['hidden'][1][1], alone['hidden'][1][0])
    assert many['hidden'][1].any() and not many['hidden'][0].any() and not make([1], 1)['hidden'][1].any()
    assert torch.equal(many['augmented'][0], many['images'].float())


def test_bad_input(chest, tokenizer):
    import copy
    bare = copy.copy(chest)
    bare.manifest = chest.manifest.assign(report='')
    with pytest.raises(DataError, match='no study has an image and a caption'): data(bare, tokenizer)
    for changes, match in ((dict(cut='words'), 'cut'), (dict(most=-1), 'most'), (dict(mask_probability=2), 'mask_probability')):
        with pytest.raises(ValueError, match=match): data(chest, tokenizer, **changes)
    no_mask = copy.copy(tokenizer)
    no_mask.mask_token = None
    with pytest.raises(ValueError, match='MASK'): data(chest, no_mask)
