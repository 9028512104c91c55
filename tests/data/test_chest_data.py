"""Sentences, chest augmentation and chest datasets: LoVT's numbers, plain per-image references, pure functions of their keys."""
import json
import pickle
import warnings
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from golden import golden, sample
from medvl.core.errors import DataError
from medvl.core.seed import numpy_rng
from medvl.data.augment.transform import map_points, warp
from medvl.data.batch import collate, slice_batch, to_device
from medvl.data.samples.chest import ChestImageDataset, ChestReportConfig, ChestReportDataset, choose_share, pixel_statistics, reference_options
from medvl.data.samples.dense import DenseDataset, planes_of_boxes, truth_table
from medvl.data.sampler import EpochBatches
from medvl.data.schema import empty
from medvl.data.text.sentences import (SentenceTokens, crop_sentences, join_sentences, pad_sentences, repeat_sentences, report_sections, report_sentences,
                                  swap_sentences)
from medvl.data.text.sides import swap_sides
from medvl.data.text.tokens import build_wordpiece, load_tokenizer
from medvl.data.augment.chest_versions import PRESETS, ChestAugment, MultiVersion, blur, draw_version, kernel_width, tone, version_config

quick = settings(max_examples=60, deadline=None)
TWO = 'FINDINGS: Small left effusion. Heart size is normal. Lungs are clear otherwise.\nIMPRESSION: Left effusion.'


# sentences
def test_joint_rows_of_the_original():
    want, reports = np.load(golden('lovt/report_sentences.npz')), json.loads(golden('lovt/report_sentences_input.json').read_text())['reports']
    rows = [join_sentences([[int(t) for t in s.split()] for s in r], 101, 102, int(want['max_length']), 'reference') for r in reports]
    got = pad_sentences(rows, 0, multiple=1)
    for name in ('input_ids', 'attention_mask'): assert np.array_equal(got[name], want[name])
    assert np.array_equal(got['sentence'] == 0, want['special_tokens_mask'] == 1)
    numbers = np.arange(1, want['sentence_mask'].shape[1] + 1)
    of_sentence = got['sentence'][:, None, :] == numbers[:, None]
    assert np.array_equal(of_sentence.any(-1), want['sentence_mask'])
    assert np.array_equal(np.sort(~of_sentence)[:, :, :want['sentence_token_mask'].shape[2]], ~want['sentence_token_mask']) # there each sentence is moved to the front
    ours = [join_sentences([[int(t) for t in s.split()] for s in r], 101, 102, int(want['max_length'])) for r in reports]
    assert ours[4]['kept'] == [0, 2] and rows[4]['kept'] == [0] # the short third sentence still fits


def test_sections_of_the_original():
    all_of = json.loads(golden('lovt/preprocess.json').read_text())
    cases = {k: v for k, v in all_of.items() if k.startswith('sections/')}
    assert len(cases) == 5
    for case in cases.values(): assert report_sections(case['text'], rules='official') == report_sections(case['text'], rules='mimic') == {k: v for k, v in (case['lovt_sections'] or {}).items() if v}


def test_sections_without_the_original():
    report = ' FINAL REPORT\n EXAMINATION:  CHEST\n \n FINDINGS: \n \n Clear lungs.\n \n IMPRESSION:  Normal.\n \n IMPRESSION:  No change.\n'
    assert report_sections(report) == {'impression': ' No change.\n', 'findings': '\n \n Clear lungs.\n '} # the last of each
    assert list(report_sections(report, ('impression', 'findings'))) == ['impression', 'findings']
    joined = 'FINDINGS: Clear.\nCOMPARISON: none.\nIMPRESSION: Normal.'
    assert report_sections(joined, rules='mimic') == {'findings': 'Clear.\nCOMPARISON: none.', 'impression': 'Normal.'} and report_sections(joined)['findings'] == 'Clear.'
    assert report_sections('FINDINGS: Clear. IMPRESSION: Normal.', rules='mimic') == {'findings': 'Clear.', 'impression': 'Normal.'}
    assert report_sections('IMPRESSION: Normal.', rules='mimic') == {'impression': 'Normal.'} and report_sections('FINDINGS: Clear.', rules='mimic') == {'findings': 'Clear.'}
    assert report_sentences('FINDINGS: A 2.5 cm mass.\nIMPRESSION: 1. Mass. 2. Effusion.') == ['A 2.5 cm mass.', '1. Mass.', '2. Effusion.']
    assert report_sentences(None) == report_sentences(float('nan')) == report_sentences('...') == report_sentences('IMPRESSION: 1.') == []
    with pytest.raises(DataError, match='must be text'): report_sentences(3)
    with pytest.raises(ValueError, match="'mimic'"): report_sections('a', rules='mimik')


@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(3, 20))
def test_join_keeps_what_fits(lengths, limit):
    rows = [np.arange(1000*(i + 1), 1000*(i + 1) + n) for i, n in enumerate(lengths)]
    if not sum(lengths):
        with pytest.raises(DataError, match='without sentences'): join_sentences(rows, max_length=limit)
        return
    ours, theirs = (join_sentences(rows, max_length=limit, overflow=o) for o in ('skip', 'reference'))
    for row in (ours, theirs):
        ids, number = row['input_ids'], row['sentence']
        assert len(ids) == len(number) <= limit and (ids[0], ids[-1]) == (101, 102) and number[0] == number[-1] == 0
        assert sorted(set(number[1:-1])) == list(range(1, len(row['kept']) + 1)) and (np.diff(number[1:-1]) >= 0).all()
        for k, i in enumerate(row['kept']): assert ids[number == k + 1].tolist() == rows[i][:limit - 2].tolist()
    assert ours['kept'][:len(theirs['kept'])] == theirs['kept'] # nothing that the original keeps is lost
    room = limit - len(ours['input_ids'])
    assert all(min(len(rows[i]), limit - 2) > room for i in range(len(rows)) if len(rows[i]) and i not in ours['kept'] and i > max(ours['kept']))


def test_too_long_names_the_sample():
    with pytest.raises(DataError, match='p1/e2.*10 tokens or more, 6 fit'): join_sentences([range(4), range(6)], max_length=8, overflow='error', name='p1/e2')
    assert join_sentences([range(4), range(2)], max_length=8, overflow='error')['kept'] == [0, 1]
    with pytest.raises(ValueError, match='no room'): join_sentences([range(4)], max_length=2)
    with pytest.raises(ValueError, match="'skip'"): join_sentences([range(4)], overflow='skipp')


@pytest.fixture(scope='module')
def tokenizer(): return build_wordpiece([TWO, 'no pneumothorax right abcdefghijklmnopqrstuvwxyz 0123456789 . ,'], 220)


def test_sentence_tokens(tokenizer, tmp_path):
    sentences = ['Small left effusion.', 'Heart size is normal.', 'Small left effusion.']
    tokens = SentenceTokens(tokenizer, tmp_path, max_length=64)
    row = tokens(sentences)
    plain = [tokenizer(s, add_special_tokens=False).input_ids for s in sentences]
    assert row['input_ids'].tolist() == [tokenizer.cls_token_id, *sum(plain, []), tokenizer.sep_token_id]
    assert row['sentence'].tolist() == [0, *np.repeat([1, 2, 3], [len(p) for p in plain]), 0]
    tokens.cache.save()
    again = SentenceTokens(tokenizer, tmp_path, max_length=64)
    assert len(again.cache) == 2 and again(sentences)['input_ids'].tolist() == row['input_ids'].tolist()
    cut = SentenceTokens(tokenizer, max_length=6)(['Heart size is normal. ' * 5])
    assert cut['input_ids'].tolist() == [tokenizer.cls_token_id, *plain[1][:4], tokenizer.sep_token_id]
    with pytest.raises(DataError, match='e7'): SentenceTokens(tokenizer, max_length=6, overflow='error')(sentences[1:2], 'e7')
    batch = tokens.batch([sentences, sentences[:1]])
    assert {v.shape for v in batch.values()} == {(2, batch['input_ids'].shape[1])} and batch['attention_mask'][1].sum() == len(plain[0]) + 2
    with pytest.raises(ValueError, match='SEP'): SentenceTokens(SimpleNamespace(cls_token_id=1, sep_token_id=None))


def test_bert_vocabulary():
    bert = load_tokenizer(sample('tokenizer/bert-base-cased-vocab.txt'))
    row = SentenceTokens(bert, max_length=32)(['No pneumothorax.', 'Heart is normal.'])
    assert bert.decode(row['input_ids'].tolist()).startswith('[CLS] No pneumothorax. Heart is normal.') and row['input_ids'][0] == 101 and row['input_ids'][-1] == 102


def test_real_reports_have_sentences():
    table = pd.read_csv(sample('reports/openi_reports.csv')).fillna('').iloc[:400]
    texts = [f'FINDINGS: {f}\nIMPRESSION: {i}' for f, i in zip(table.findings, table.impression)]
    found = [report_sentences(t) for t in texts]
    empty_ones = (table.findings.str.strip() == '') & (table.impression.str.strip() == '')
    assert [not f for f in found] == empty_ones.tolist()
    letters = lambda t: Counter(c for c in t if c.isalpha())
    lost = [t for t, f, said in zip(texts, found, table.findings + table.impression) if letters(''.join(f)) != letters(said)]
    assert all('Comparison:' in t for t in lost) and len(lost) <= 1 # no letter is lost or made, unless a heading stands within the findings


def test_swaps_repeats_crops():
    order = list(range(6))
    swapped = [swap_sentences(order, numpy_rng(i)) for i in range(2500)]
    assert all(sorted(s) == order for s in swapped)
    kept = np.mean([s == order for s in swapped])
    assert 0.38 < kept < 0.46 # no swap 0.4, and a few pairs of swaps that cancel
    twice = np.mean([swap_sentences([0, 1], numpy_rng('two', i)) == [0, 1] for i in range(2500)])
    assert abs(twice - 0.4/(1 - 0.36)) < 0.03
    assert swap_sentences(['a'], numpy_rng(0)) == ['a'] and order == list(range(6))
    for i in range(300):
        part, more = crop_sentences(order, numpy_rng(i)), repeat_sentences(order, numpy_rng(i))
        assert 4 <= len(part) <= 6 and part == list(range(part[0], part[0] + len(part)))
        assert sorted(set(more)) == order and more == sorted(more)
    added = Counter(len(repeat_sentences(order, numpy_rng('r', i))) - 6 for i in range(2500))
    assert abs(added[0]/2500 - 0.8) < 0.03 and abs(added[1]/2500 - 0.16) < 0.03
    assert crop_sentences(['a'], numpy_rng(1)) == ['a']


# augmentation
def smooth(h, w, seed=0):
    "A smooth image, 0 to 255, that interpolation of any kind reproduces well."
    noise = cv2.resize(np.random.default_rng(seed).uniform(40, 215, (7, 7)), (w, h), interpolation=cv2.INTER_CUBIC)
    return noise.clip(0, 255).astype(np.float32)


def batch_of(n=4, h=96, w=96, **more):
    images = np.stack([smooth(h, w, i).astype(np.uint8) for i in range(n)])[:, None, None]
    return dict(images=torch.from_numpy(images), index=torch.arange(n), sample_id=[f's{i}' for i in range(n)], epoch=0, **more)


def plain_version(image, config, key, size, flip=None):
    "One image, step by step as the recipe reads: crop, resize, mirror, affine, tone, blur."
    v = draw_version(config, key, image.shape, size, flip)
    (height, width), total = size, np.linalg.inv(v.affine) @ v.matrix
    if v.flip: total = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) @ total
    w, h = width/total[0, 0], height/total[1, 1]
    x, y = (-0.5 - total[0, 2])/total[0, 0] + 0.5, (-0.5 - total[1, 2])/total[1, 1] + 0.5
    assert np.allclose([x, y, w, h], np.round([x, y, w, h]), atol=1e-6) # a window of whole pixels
    x, y, w, h = (int(round(n)) for n in (x, y, w, h))
    assert 0 <= x and 0 <= y and x + w <= image.shape[1] and y + h <= image.shape[0]
    out = cv2.resize(image[y:y + h, x:x + w], (width, height), interpolation=cv2.INTER_LINEAR)
    if v.flip: out = out[:, ::-1].copy()
    out = cv2.warpAffine(out, v.affine[:2], (width, height), flags=cv2.INTER_LINEAR, borderValue=config.fill)
    bright, contrast = v.factors
    stretch = lambda a: np.clip(contrast*a + (1 - contrast)*a.mean(), 0, 255)
    brighten = lambda a: np.clip(bright*a, 0, 255)
    if v.factors != (1.0, 1.0): out = brighten(stretch(out)) if v.contrast_first else stretch(brighten(out))
    if v.sigma: out = cv2.GaussianBlur(out, (23, 23), v.sigma, borderType=cv2.BORDER_REFLECT_101)
    return out


@pytest.mark.parametrize('preset', ['lovt', 'simclr', 'pixelpro'])
def test_against_a_plain_version(preset):
    config, images = PRESETS[preset], np.stack([smooth(260, 240, i) for i in range(6)])
    batch = dict(images=torch.from_numpy(images)[:, None, None], index=torch.arange(6), epoch=2)
    got = ChestAugment(preset, size=224, **({} if preset != 'lovt' else dict(fill=30.0)))(batch, seed=5)['images'][:, 0, 0].numpy()
    if preset == 'lovt': config = version_config(config, fill=30.0)
    for i in range(6):
        want = plain_version(images[i], config, (5, 2, i, 0), (224, 224))
        error = np.abs(got[i] - want)
        assert error.mean() < 0.25 and np.quantile(error, 0.99) < 2.0, (preset, i, error.mean(), error.max()) # of 255; three interpolations against one


def test_geometry_to_a_fraction_of_a_pixel():
    ramp = np.stack(np.meshgrid(np.arange(200.), np.arange(220.)))[:, None] # x, y as images
    for i in range(12):
        v = draw_version(PRESETS['lovt'], (0, 0, i, 0), (220, 200), (160, 160))
        x, y = warp(torch.from_numpy(ramp), [v, v], size=(160, 160))[:, 0].numpy()
        ys, xs = np.mgrid[:160, :160]
        back = map_points(np.stack([xs, ys], -1), np.linalg.inv(v.matrix))
        edge = map_points(np.stack([xs, ys], -1), np.linalg.inv(v.affine))
        inner = ((edge > 1) & (edge < 158)).all(-1)
        assert inner.sum() > 5000 and np.abs(x - back[..., 0])[inner].max() < 2e-2 and np.abs(y - back[..., 1])[inner].max() < 2e-2
        outside = ((edge < -1.01) | (edge > 160.01)).any(-1)
        assert (x[outside] == 0).all() # what the affine map brings in from outside the window is black


def test_dots_land_where_transforms_say():
    dots, image = np.array([[40, 50], [120, 90], [80, 150]]), np.zeros((200, 200), np.uint8)
    for x, y in dots: image[y, x] = 255
    batch = dict(images=torch.from_numpy(np.tile(image, (16, 1, 1, 1, 1))), index=torch.arange(16))
    out = MultiVersion('pixelpro', jitter=0.0, size=150)(batch, seed=3)
    seen = 0
    for images, ts in zip(out['augmented'], out['transforms']):
        assert images.shape == (16, 1, 1, 150, 150) and ts.shape == (16, 1, 3, 3) and ts.dtype == torch.float32
        for a, t in zip(images[:, 0, 0].numpy(), ts[:, 0].numpy()):
            places = map_points(dots, t)
            for x, y in places:
                if not (14 < x < 135 and 14 < y < 135) or np.sort(np.abs(places - [x, y]).max(1))[1] < 26: continue
                x0, y0 = int(x) - 12, int(y) - 12
                part = a[y0:y0 + 26, x0:x0 + 26]
                centre = [(part*np.arange(x0, x0 + 26)).sum()/part.sum(), (part*np.arange(y0, y0 + 26)[:, None]).sum()/part.sum()]
                assert np.abs(np.array(centre) - [x, y]).max() < 0.35
                seen += 1
    assert seen > 30


def test_blur_is_a_gaussian_of_that_kernel():
    images = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (4, 1, 50, 40)).astype(np.float32))
    sigmas = [0.1, 0.0, 1.7, 3.0]
    out = blur(images, sigmas, 23)
    for i, s in enumerate(sigmas):
        want = cv2.GaussianBlur(images[i, 0].numpy(), (23, 23), s, borderType=cv2.BORDER_REFLECT_101) if s else images[i, 0].numpy()
        assert np.abs(out[i, 0].numpy() - want).max() < 2e-2
    assert [kernel_width(s) for s in (224, 512, 64, 100)] == [23, 51, 7, 11] and blur(images, sigmas, 1) is images
    assert torch.equal(tone(images, [draw_version(PRESETS['flip'], (i,), (50, 40), (50, 40)) for i in range(4)]), images)


def test_draws_follow_their_distributions():
    draws = [draw_version(PRESETS['lovt'], (0, 0, i, 0), (224, 224), (224, 224)) for i in range(1500)]
    angle = np.rad2deg([np.arctan2(v.affine[1, 0], v.affine[0, 0]) for v in draws])
    scale = np.array([np.sqrt(np.linalg.det(v.affine[:2, :2])) for v in draws])
    shift = np.array([map_points([111.5, 111.5], v.affine) - 111.5 for v in draws])/224
    uniform = lambda x, low, high: stats.kstest(x, 'uniform', (low, high - low)).pvalue > 1e-3
    assert uniform(angle, -20, 20) and uniform(scale, 0.95, 1.05) and uniform(shift[:, 0], -0.1, 0.1) and uniform(shift[:, 1], -0.1, 0.1)
    bright, contrast = np.array([v.factors for v in draws]).T
    assert uniform(bright, 0.6, 1.4) and uniform(contrast, 0.6, 1.4) and uniform([v.sigma for v in draws], 0.1, 3.0)
    assert abs(np.mean([v.flip for v in draws]) - 0.5) < 0.05 and abs(np.mean([v.contrast_first for v in draws]) - 0.5) < 0.05
    assert abs(np.corrcoef(bright, contrast)[0, 1]) < 0.1 and abs(np.corrcoef(angle, bright)[0, 1]) < 0.1
    zoom = np.array([np.linalg.inv(np.linalg.inv(v.affine) @ v.matrix) for v in draws])
    area, aspect = np.abs(zoom[:, 0, 0]*zoom[:, 1, 1]), np.abs(zoom[:, 0, 0]/zoom[:, 1, 1])
    assert 0.59 < area.min() < 0.62 and 0.97 < area.max() <= 1.0 and 0.74 < aspect.min() < 0.78 and 1.3 < aspect.max() < 1.35


def test_presets_draw_what_they_say():
    views = {p: [draw_version(PRESETS[p], (1, 0, i, 0), (512, 512), (224, 224)) for i in range(800)] for p in ('simclr', 'pixelpro', 'none')}
    area = lambda v: (224/512)**2/abs(np.linalg.det(v.matrix[:2, :2]))
    small = np.array([area(v) for v in views['simclr']])
    assert 0.079 < small.min() < 0.11 and abs(np.mean([v.factors != (1.0, 1.0) for v in views['simclr']]) - 0.8) < 0.06
    assert abs(np.mean([v.sigma > 0 for v in views['simclr']]) - 0.5) < 0.07 and max(v.sigma for v in views['simclr']) <= 2.0
    factors = np.array([v.factors for v in views['simclr'] if v.factors != (1.0, 1.0)])
    assert 0.2 <= factors.min() < 0.23 and 1.77 < factors.max() <= 1.8
    side = np.sqrt([area(v) for v in views['pixelpro']])
    assert 0.598 < side.min() and side.max() < 0.802 and stats.kstest(side, 'uniform', (0.6, 0.2)).pvalue > 1e-3
    assert abs(np.mean([v.flip for v in views['pixelpro']]) - 0.25) < 0.06
    assert all(v.sigma == 0 and v.factors == (1.0, 1.0) and not v.flip for v in views['none'])


def test_exact_copies_and_halving():
    batch = batch_of(3, 40, 50)
    assert torch.equal(ChestAugment('none')(batch)['images'], batch['images'].float())
    turned = ChestAugment('flip')({**batch, 'flip': torch.tensor([[[True, False]]]*3)})
    assert torch.equal(turned['images'], batch['images'].float().flip(-1))
    board = torch.from_numpy((np.indices((128, 128)).sum(0) % 2*200).astype(np.uint8))[None, None, None] # the finest pattern there is
    small = ChestAugment('none', size=32)(dict(images=board, index=torch.tensor([0])))['images']
    assert (small - 100).abs().max() < 1e-3 # every pixel holds the mean; without halving it would be 0 or 200, by chance
    odd = ChestAugment('none', size=20)(dict(images=torch.full((1, 1, 1, 45, 45), 77, dtype=torch.uint8), index=torch.tensor([0])))['images']
    assert (odd - 77).abs().max() < 1e-3


def test_keys_alone_decide():
    batch, state = batch_of(6), torch.get_rng_state()
    whole = MultiVersion('byol', size=64)(batch, seed=1, epoch=3)
    part = MultiVersion('byol', size=64)({**slice_batch(batch, 2, 4)}, seed=1, epoch=3)
    for k in range(2): assert torch.equal(whole['augmented'][k][2:4], part['augmented'][k]) and torch.equal(whole['transforms'][k][2:4], part['transforms'][k])
    assert not torch.equal(whole['transforms'][0], whole['transforms'][1])
    assert len({tuple(t.flatten().tolist()) for t in whole['transforms'][0]}) == 6
    for other in (dict(seed=2, epoch=3), dict(seed=1, epoch=4)): assert not torch.equal(MultiVersion('byol', size=64)(batch, **other)['transforms'][0], whole['transforms'][0])
    assert torch.equal(MultiVersion('byol', size=64)({**batch, 'epoch': 3}, seed=1)['transforms'][0], whole['transforms'][0])
    one = MultiVersion('byol', size=64, per_batch=True)(batch, seed=1)
    assert (one['transforms'][0] == one['transforms'][0][0]).all() and not torch.equal(one['transforms'][0], one['transforms'][1])
    assert torch.equal(whole['images'], batch['images']) and torch.equal(state, torch.get_rng_state()) # no global generator is touched
    three = MultiVersion(['lovt', 'simclr', 'none'])(batch)
    assert len(three['augmented']) == 3 and torch.equal(three['augmented'][2], batch['images'].float())


def test_flips_obey_the_dataset():
    batch = batch_of(8)
    augment = ChestAugment('lovt')
    assert 0 < sum(v.flip for (v,) in augment.draws(batch)) < 8 # nobody decided: drawn
    decided = {**batch, 'flip': torch.tensor([[[i % 2 == 0, False]] for i in range(8)])}
    assert [v.flip for (v,) in augment.draws(decided)] == [True, False]*4
    worded = {**batch, 'tokens': dict(input_ids=torch.zeros(8, 1, 4))}
    assert not any(v.flip for (v,) in augment.draws(worded))
    handed = augment(decided)['transforms'][:, 0, :2, :2].det()
    assert [d < 0 for d in handed.tolist()] == [True, False]*4
    with pytest.raises(ValueError, match='grey'): augment({**batch, 'images': torch.zeros(8, 1, 2, 9, 9)})
    with pytest.raises(ValueError, match="'pixelpro'"): ChestAugment('pixelprop')
    with pytest.raises(TypeError): ChestAugment('lovt', blurr=1)


def test_masks_and_boxes_follow():
    n, planes = 6, np.zeros((6, 2, 96, 96), np.uint8)
    planes[:, 0, 30:60, 20:50] = 1
    batch = batch_of(n, masks=torch.from_numpy(planes), boxes=[[np.array([[20., 30., 50., 60.], [0., 0., 3., 3.]], np.float32)] for _ in range(n)], box_labels=[[['a', 'b']] for _ in range(n)])
    out = ChestAugment('lovt', affine=0.0)(batch, seed=2)
    assert out['masks'].dtype == torch.uint8 and set(out['masks'].unique().tolist()) <= {0, 1} and out['masks'][:, 1].sum() == 0
    for mask, (box,), (names,) in zip(out['masks'][:, 0].numpy(), out['boxes'], out['box_labels']):
        assert len(box) == len(names) and names[0] == 'a'
        ys, xs = np.nonzero(mask)
        assert np.abs(box[0] - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= 1.0 # a mask has whole pixels
    lists = ChestAugment('lovt', affine=0.0)({**batch, 'masks': [[planes[i, 0]] if i else [None] for i in range(n)]}, seed=2)['masks']
    assert lists[0] == [None] and np.array_equal(lists[1][0], out['masks'][1, 0].numpy())
    assert any(len(b[0]) == 1 for b in out['boxes']) # the corner was cropped away in some


def test_versions_in_batches():
    batch = MultiVersion('simclr')(batch_of(4))
    part = slice_batch(batch, 1, 3)
    assert [tuple(x.shape) for x in part['augmented']] == [(2, 1, 1, 96, 96)]*2 and torch.equal(part['transforms'][1], batch['transforms'][1][1:3])
    assert all(x.device.type == 'meta' for x in to_device(batch, 'meta')['augmented'])
    from medvl.train.gradcache import join
    whole = join([slice_batch(batch, 0, 1), slice_batch(batch, 1, 4)])
    assert all(torch.equal(a, b) for name in ('augmented', 'transforms') for a, b in zip(whole[name], batch[name], strict=True))


# datasets
def fake(rows, labels=None, side=8, boxes=None, masks=None, **columns):
    "A prepared data set in memory: rows of (patient, exam, view, report); image i is filled with i."
    m = pd.DataFrame([dict(row=i, image_id=f'i{i:03d}', patient_id=p, exam_id=e, laterality='', view=v, report=t, mask_row=-1, split='train') for i, (p, e, v, t) in enumerate(rows)])
    for name, values in {**(labels or {}), **columns}.items(): m[f'label_{name}' if labels and name in labels else name] = values
    images = np.broadcast_to(np.arange(len(rows), dtype=np.uint8)[:, None, None], (len(rows), side, side))
    return SimpleNamespace(manifest=m, images=images, masks=masks, boxes=empty('boxes') if boxes is None else boxes, labels=list(labels or {}), digest=str(len(rows)))


def many(n=20): return fake([(f'p{i//2:02d}', f'e{i:02d}', v, f'{TWO} Case {i}.') for i in range(n) for v in ('PA', 'AP')], labels=dict(effusion=[1.0, 1.0]*n))


def test_report_samples(tokenizer):
    data = ChestReportDataset(many(), tokenizer)
    assert len(data) == 20
    seen = [data[e, 3] for e in range(60)]
    assert {s['view'][0] for s in seen} == {'PA', 'AP'} and all(s['images'][0][0, 0] in (6, 7) for s in seen)
    assert 15 < sum(bool(s['flip'][0, 0]) for s in seen) < 45
    for s in seen:
        words = swap_sides('Small left effusion.') if s['flip'][0, 0] else 'Small left effusion.'
        assert words in s['sentences'] and len(s['sentences']) == 5 and s['tokens'][0]['sentence'].max() == 5
        n = s['tokens'][0]['sentence']
        assert tokenizer.decode(s['tokens'][0]['input_ids'][n == 1].tolist()) == tokenizer.decode(tokenizer(s['sentences'][0], add_special_tokens=False).input_ids)
    groups = {(bool(s['flip'][0, 0]), s['text_group'][0]) for s in seen}
    assert len(groups) == 2 # the order of sentences does not matter, the side does
    assert 0.25 < np.mean([s['sentences'][0] in ('Small left effusion.', 'Small right effusion.') for s in seen]) < 0.95
    still = ChestReportDataset(many(), tokenizer, train=False)
    assert all(still[e, 3]['sentences'] == still[0, 3]['sentences'] and still[e, 3]['view'] == ['PA'] and not still[e, 3]['flip'].any() for e in range(9))
    wild = ChestReportDataset(many(), tokenizer, ChestReportConfig(valid_image='random'), train=False)
    assert {wild[e, 3]['view'][0] for e in range(20)} == {'PA', 'AP'}
    batch = data.collate([data[0, i] for i in range(6)])
    assert {k: v.shape[:2] for k, v in batch['tokens'].items()} == dict.fromkeys(('input_ids', 'attention_mask', 'sentence'), (6, 1))
    assert batch['images'].shape == (6, 1, 1, 8, 8) and batch['text_group'].shape == (6, 1) and batch['labels'].shape == (6, 1) and batch['flip'].shape == (6, 1, 2)
    assert ((batch['tokens']['sentence'] > 0) <= (batch['tokens']['attention_mask'] > 0)).all()


def test_one_sentence(tokenizer):
    data = ChestReportDataset(many(), tokenizer, ChestReportConfig(slot='sentence', flip_horizontal=0.0))
    seen = Counter(data[e, 0]['sentences'][0] for e in range(200))
    assert len(seen) == 5 and min(seen.values()) > 20 and all(data[e, 0]['tokens'][0]['sentence'].max() == 1 for e in range(5))
    assert ChestReportDataset(many(), tokenizer, ChestReportConfig(slot='sentence'), train=False)[7, 0]['sentences'] == ['Small left effusion.']
    same = [data[e, i] for i in (0, 1) for e in range(20)]
    assert len({s['text_group'][0] for s in same if s['sentences'] == ['Heart size is normal.']}) == 1 # equal words of two studies are one text


def test_sides_and_words(tokenizer):
    rows = [('p0', 'e0', 'PA', 'Left effusion is seen.'), ('p1', 'e1', 'PA', 'Lungs are clear.')]
    def flips(how):
        data = ChestReportDataset(fake(rows), tokenizer, ChestReportConfig(laterality=how))
        return [{(bool(s['flip'][0, 0]), s['sentences'][0]) for s in (data[e, i] for e in range(30))} for i in (0, 1)]
    assert flips('swap')[0] == {(False, 'Left effusion is seen.'), (True, 'Right effusion is seen.')}
    assert flips('no_flip')[0] == {(False, 'Left effusion is seen.')} and len(flips('no_flip')[1]) == 2
    assert flips('ignore')[0] == {(False, 'Left effusion is seen.'), (True, 'Left effusion is seen.')}


def test_left_out_and_counted(tokenizer):
    rows = [('p0', 'e0', 'PA', TWO), ('p1', 'e1', 'PA', ''), ('p2', 'e2', 'LATERAL', TWO), ('p3', 'e3', 'AP', 'INDICATION: cough'), ('p4', 'e4', 'AP', 'Normal.'), ('p5', 'e5', 'AP', 'Normal chest.')]
    with pytest.warns(UserWarning, match='4 studies are left out, 2 stay.*1 with no report.*1 with fewer than 3 words'): data = ChestReportDataset(fake(rows), tokenizer)
    assert data.skipped == {'no report': 1, 'no image of the wanted views': 1, 'no sentence in the wanted sections': 1, 'fewer than 3 words': 1}
    assert [r['sample_id'] for r in data.rows] == ['p0/e0', 'p5/e5'] and '4 distinct' not in data._repr_html_() and 'left out' in data._repr_html_()
    with pytest.raises(DataError, match='no study has an image and sentences .*ChestImageDataset'): ChestReportDataset(fake(rows[1:4]), tokenizer)
    with pytest.raises(DataError, match='manifest is empty'): ChestReportDataset(fake(rows[:1], view=['LATERAL']).__class__(**{**vars(fake(rows)), 'manifest': fake(rows).manifest.iloc[:0]}), tokenizer)
    with pytest.raises(IndexError): data[0, 2]
    whole = ChestReportDataset(fake(rows[:1]), tokenizer, splitter=lambda t: [t])
    assert len(whole.rows[0]['sentences']) == 2 and whole.digest != ChestReportDataset(fake(rows[:1]), tokenizer).digest


def test_long_reports_are_named(tokenizer):
    with pytest.warns(UserWarning, match='20 texts have more than 16 tokens.*p00/e00'): data = ChestReportDataset(many(), tokenizer, ChestReportConfig(max_length=16, bucket=True))
    s = data[0, 4]
    assert len(s['tokens'][0]['input_ids']) <= 16 and s['tokens'][0]['sentence'].max() == len(s['sentences']) < 5 and data.lengths.tolist() == [16]*20
    with pytest.raises(DataError, match='p00/e00'): ChestReportDataset(many(), tokenizer, ChestReportConfig(max_length=16, overflow='error'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(ChestReportDataset(many(), tokenizer, ChestReportConfig(max_length=16, overflow='error', slot='sentence'))) == 20 # each fits alone


def test_shares():
    patients = np.repeat([f'p{i:03d}' for i in range(100)], 3)
    shares = [set(choose_share(patients, f, seed=4)) for f in (0.1, 0.3, 0.6, 1.0)]
    assert [len(s) for s in shares] == [30, 90, 180, 300] and all(a <= b for a, b in zip(shares, shares[1:]))
    assert shares[0] != set(choose_share(patients, 0.1, seed=5)) and set(choose_share(patients, 0.1, seed=4)) == shares[0]
    assert choose_share(patients, 0.1, 'first').tolist() == list(range(30)) and len(choose_share(range(5), 0.01, 'first')) == 1
    assert [len(choose_share(range(16010), f, 'first')) for f in (0.01, 0.1)] == [160, 1601] and len(choose_share(range(5337), 0.1, 'first')) == 533
    for wrong in (0, -1, 1.5): pytest.raises(ValueError, choose_share, patients, wrong)


def test_share_of_studies(tokenizer):
    half = lambda **kw: [r['sample_id'] for r in ChestReportDataset(many(), tokenizer, ChestReportConfig(fraction=0.3, **kw)).rows]
    assert len(half()) == 6 and half(fraction_by='first') == [f'p{i//2:02d}/e{i:02d}' for i in range(6)] and half() != half(seed=1)
    assert len(ChestReportDataset(many(), tokenizer, ChestReportConfig(fraction=0.3), train=False)) == 20 # validation is whole
    assert reference_options().fraction_by == 'first' and reference_options().laterality == 'ignore' and reference_options().overflow == 'reference'


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(tokenizer, workers, tmp_path):
    data = ChestReportDataset(many(), tokenizer, cache=tmp_path)
    keys = EpochBatches(len(data), 5, seed=3, epoch=2)
    run = lambda w: list(DataLoader(data, batch_sampler=keys, num_workers=w, collate_fn=data.collate))
    for a, b in zip(run(0), run(workers)):
        assert a['sentences'] == b['sentences'] and torch.equal(a['images'], b['images']) and torch.equal(a['tokens']['sentence'], b['tokens']['sentence'])
        assert torch.equal(ChestAugment('lovt')(a, seed=1)['images'], ChestAugment('lovt')(b, seed=1)['images'])


def test_in_the_loop(tokenizer):
    from medvl.train.feed import RunBatches, data_digest, make_loader
    from medvl.train.settings import TrainConfig
    data = ChestReportDataset(many(), tokenizer, ChestReportConfig(bucket=True))
    batches = list(make_loader(data, RunBatches(data, TrainConfig(batch_size=4, epochs=1))))
    assert len(batches) == 5 and sorted(i for b in batches for i in b['index'].tolist()) == list(range(20))
    again = pickle.loads(pickle.dumps(data)) # noqa: S301 (our own bytes)
    assert again[1, 5]['sentences'] == data[1, 5]['sentences'] and data_digest(again) == data_digest(data) != data_digest(ChestReportDataset(many(), tokenizer))


@pytest.mark.parametrize('wrong', [dict(slot='x'), dict(rules='x'), dict(laterality='x'), dict(overflow='x'), dict(valid_image='x'), dict(fraction_by='x'), dict(normalisation='x'),
                                   dict(flip_horizontal=2), dict(swaps=1.0), dict(repeat=-1), dict(crop=(0.0, 1.0)), dict(fraction=0.0), dict(labels=('oedema',))])
def test_wrong_options(tokenizer, wrong):
    with pytest.raises(ValueError): ChestReportDataset(many(4), tokenizer, ChestReportConfig(**wrong))


def test_image_samples():
    rows = [(f'p{i}', f'e{i}', v, '') for i, v in enumerate(('PA', 'AP', 'LATERAL', 'FRONTAL', 'PA'))]
    data = ChestImageDataset(fake(rows, dict(edema=[1, np.nan, 1, 0, np.nan])), train=True)
    assert len(data) == 4 and data.skipped == {'another view': 1} and [data[i]['images'][0][0, 0] for i in range(4)] == [0, 1, 3, 4]
    assert np.array_equal(data.values[:, 0], [1, np.nan, 0, np.nan], equal_nan=True)
    assert ChestImageDataset(fake(rows, dict(edema=[1, np.nan, 1, 0, np.nan])), blank='absent').values[:, 0].tolist() == [1, 0, 0, 0]
    assert 30 < sum(bool(data[e, 0]['flip'][0, 0]) for e in range(100)) < 70 and 'labels' not in ChestImageDataset(fake(rows), labels=())[0]
    assert collate([data[0, i] for i in range(4)])['labels'].shape == (4, 1) and 'present' in data._repr_html_()
    assert len({ChestImageDataset(fake(rows), seed=s, **kw).digest for s in (0, 1) for kw in ({}, dict(train=True), dict(view_names=()))}) == 6
    with pytest.raises(ValueError, match='edema'): ChestImageDataset(fake(rows, dict(edema=[1]*5)), labels=('edemas',))
    with pytest.raises(DataError, match='LL'): ChestImageDataset(fake(rows), view_names=('LL',))
    with pytest.raises(ValueError, match='absent'): ChestImageDataset(fake(rows), blank='zero')


def test_pixel_statistics():
    data = fake([(f'p{i}', 'e', 'PA', '') for i in range(6)])
    data.images = np.random.default_rng(1).integers(0, 65536, (6, 9, 7)).astype(np.uint16)
    data.manifest['split'] = ['train']*4 + ['test']*2
    found, pixels = pixel_statistics(data), data.images[:4]/65535
    assert found['images'] == 4 and np.allclose([found['image_mean'], found['image_std']], [pixels.mean(), pixels.std()], rtol=1e-12)
    assert pixel_statistics(data, None)['images'] == 6
    with pytest.raises(DataError, match='test, train'): pixel_statistics(data, 'valid')


# dense truth
def dense(**kw):
    boxes = pd.DataFrame([dict(image_id='i000', label='Mass', x0=2., y0=3., x1=9., y1=12.), dict(image_id='i000', label='Nodule', x0=5.4, y0=6., x1=15., y1=10.6),
                          dict(image_id='i001', label='Mass', x0=0., y0=0., x1=3., y1=3.), dict(image_id='i001', label='Mass', x0=2., y0=2., x1=6., y1=6.)])
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[0, 2:6, 2:6], masks[0, 8:10, 8:12], masks[1, :3] = 1, 2, 1
    return fake([(f'p{i//2}', f'e{i}', 'PA', '') for i in range(4)], side=16, boxes=boxes, masks=masks, mask_row=[0, 1, -1, -1], **kw)


def test_dense_from_boxes():
    data = DenseDataset(dense(), ('Mass', 'Nodule'), truth='boxes')
    s = data[0]
    assert s['masks'].shape == (2, 16, 16) and s['masks'].dtype == np.uint8 and s['masks'].sum((1, 2)).tolist() == [63, 50] and (s['masks'].sum(0) == 2).any()
    assert s['boxes'][0].dtype == np.float32 and s['box_labels'] == [['Mass', 'Nodule']] and s['labels'].tolist() == [1, 1]
    assert data[1]['masks'][0].sum() == 9 + 16 - 1 and data[3]['masks'].sum() == 0 and data[3]['boxes'][0].shape == (0, 4) # a union; nothing there
    batch = data.collate([data[i] for i in range(4)])
    assert batch['masks'].shape == (4, 2, 16, 16) and batch['masks'].dtype == torch.uint8 and batch['labels'].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    one = DenseDataset(dense(), 'Nodule', truth='boxes')
    assert one[0]['box_labels'] == [['Nodule']] and one.classes == ('Nodule',) and truth_table(one).images.tolist() == [1]
    assert 'Nodule' in one._repr_html_() and one.digest != data.digest


def test_box_mask_of_the_original():
    case, want = json.loads(golden('lovt/preprocess.json').read_text())['box_mask'], np.load(golden('lovt/preprocess.npz'))
    x, y, w, h = np.array(case['boxes_xywh']).T
    name = next(k for k in want.files if 'box_mask' in k)
    got = planes_of_boxes(np.stack([x, y, x + w, y + h], 1), ['a']*len(x), ('a',), tuple(case['height_width']))[0]
    assert np.array_equal(got > 0, want[name] > 0)


def test_dense_from_masks():
    data = DenseDataset(dense(), ('a', 'b'), numbers=dict(a=1, b=2))
    assert data[0]['masks'].sum((1, 2)).tolist() == [16, 8] and data[1]['masks'].sum((1, 2)).tolist() == [48, 0] and data[2]['masks'].sum() == 0
    assert DenseDataset(dense(), 'a', truth='masks')[0]['masks'].sum() == 24 # one class: all above 0
    assert DenseDataset(dense(), ('b', 'a'), numbers=dict(a=1, b=2))[0]['masks'].sum((1, 2)).tolist() == [8, 16]
    assert [len(DenseDataset(dense(), 'a', fraction=f, fraction_by='first')) for f in (0.25, 0.5, 0.8)] == [1, 2, 3]
    assert {r['patient_id'] for r in DenseDataset(dense(), 'a', fraction=0.5, seed=1).table} in ({'p0'}, {'p1'})
    flips = DenseDataset(dense(), 'a', train=True, flip_horizontal=0.5)
    assert len({bool(flips[e, 0]['flip'][0, 0]) for e in range(20)}) == 2 and not DenseDataset(dense(), 'a')[0]['flip'].any()


def test_dense_from_bits():
    data = dense(); data.info = dict(settings=dict(mask_bits=['x', 'a', 'b']))
    data.masks[0, 4, 4] = 0b110
    both = DenseDataset(data, ('b', 'a'))
    assert both[0]['masks'].sum((1, 2)).tolist() == [1, 9] and both[0]['masks'][:, 4, 4].tolist() == [1, 1] # label 2 is bit 1
    assert DenseDataset(data, 'a')[1]['masks'].sum() == 0 and DenseDataset(data, 'x')[1]['masks'].sum() == 48


def test_dense_bad_input(tmp_path):
    with pytest.raises(ValueError, match="'Nodule'"): DenseDataset(dense(), 'Nodul', truth='boxes')
    with pytest.raises(ValueError, match="class of the masks"): DenseDataset(dense(), ('a', 'c'), numbers=dict(a=1, b=2))
    with pytest.raises(ValueError, match='truth'): DenseDataset(dense(), 'a', truth='polygons')
    with pytest.raises(ValueError, match='distinct'): DenseDataset(dense(), ('a', 'a'))
    turned = dense(); turned.boxes.loc[2, ['y0', 'y1']] = [3., 0.]
    with pytest.raises(DataError, match="row 2, column y1.*runs backwards.*'i001'"): DenseDataset(turned, 'Mass', truth='boxes')
    other = dense(); other.masks = np.zeros((2, 16, 15), np.uint8)
    with pytest.raises(DataError, match=r'the mask of i000 has \(16, 15\) pixels, its image \(16, 16\)'): DenseDataset(other, 'a')[0]
    with pytest.raises(DataError, match='cannot tell a, b apart'): DenseDataset(dense(), ('a', 'b'))
    bits = dense(); bits.info = dict(settings=dict(mask_bits=['a', 'b']))
    with pytest.raises(ValueError, match='class of the masks'): DenseDataset(bits, 'c')
    none = dense(); none.masks = None
    with pytest.raises(DataError, match='no masks'): DenseDataset(none, 'a')
    bare = dense(); bare.boxes = empty('boxes')
    with pytest.raises(DataError, match='no boxes'): DenseDataset(bare, 'Mass', truth='boxes')
    bare.folder = tmp_path # a part without that class, of a data set that has it
    dense().boxes.assign(severity='').to_parquet(tmp_path/'boxes.parquet')
    assert DenseDataset(bare, 'Mass', truth='boxes')[0]['masks'].sum() == 0
