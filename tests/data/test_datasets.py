"""Samplers, batches and datasets: pure functions of their keys; words agree with pixels; nothing is lost silently."""
import json
import pickle
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from golden import golden, sample
from medvl.core.errors import DataError
from medvl.data.augment.breast_versions import Augment
from medvl.data.batch import batch_size, collate, slice_batch, to_device
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset, ImageDataset, breasts, choose_views, draw_texts, paper_options, report_texts
from medvl.data.text.reports import normalise
from medvl.data.sampler import EpochBatches, epoch_order
from medvl.data.text.sides import swap_sides
from medvl.data.text.tokens import TokenCache, build_wordpiece, load_tokenizer

quick = settings(max_examples=80, deadline=None)
LEFT = "FINDINGS: Mass in the left breast, upper outer quadrant, 2 o'clock. Stable.\nIMPRESSION: BI-RADS 4A. Biopsy of the left breast."


def fake(rows, labels=None, **columns):
    "A prepared data set in memory: rows of (patient, side, view, report); image i is filled with i."
    m = pd.DataFrame([dict(row=i, image_id=f'i{i:03d}', patient_id=p, exam_id=f'e{p}', laterality=s, view=v, report=t, mask_row=-1) for i, (p, s, v, t) in enumerate(rows)])
    for name, values in {**(labels or {}), **columns}.items(): m[f'label_{name}' if labels and name in labels else name] = values
    images = np.broadcast_to(np.arange(len(rows), dtype=np.uint8)[:, None, None], (len(rows), 6, 4))
    boxes = pd.DataFrame(dict(image_id=['i000'], label=['mass'], x0=[0.], y0=[1.], x1=[2.], y1=[4.]))
    return SimpleNamespace(manifest=m, images=images, masks=None, boxes=boxes, labels=list(labels or {}), digest=str(len(rows)))


@pytest.fixture(scope='module')
def tokenizer(): return build_wordpiece([LEFT, 'no mass right lower inner abcdefghijklmnopqrstuvwxyz 0123456789 , : - . ( )'], 200)


def many(n=12): return fake([(f'p{i//2}', 'LR'[i % 2], v, f'{LEFT} Case {i}.') for i in range(n) for v in ('CC', 'MLO')])


# the sampler
@quick
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans(), st.booleans())
def test_cover_and_ranks(n, size, world, epoch, shuffle, drop, bucket):
    lengths = np.random.default_rng(n).integers(1, 50, n) if bucket else None
    kw = dict(seed=7, epoch=epoch, shuffle=shuffle, drop_last=drop, lengths=lengths)
    if drop and n < size*world:
        with pytest.raises(ValueError, match='do not fill'): EpochBatches(n, size, world=world, **kw)
        return
    one = list(EpochBatches(n, size*world, **kw))
    parts = [list(EpochBatches(n, size, rank=r, world=world, **kw)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1 == len({len(one), len(parts[0]), len(EpochBatches(n, size, world=world, **kw))})
    for k, batch in enumerate(one):
        together = sum((p[k] for p in parts), [])
        if len(batch) >= world: assert together == batch # rank order gives the very batch of one process
        else: assert set(together) == set(batch)
    flat = [i for b in one for _, i in b]
    assert len(set(flat)) == len(flat) == (n//(size*world)*size*world if drop else n) and all(e == epoch for b in one for e, _ in b)


@quick
@given(st.integers(8, 60), st.integers(1, 4), st.integers(0, 9))
def test_resume_at_any_step(n, size, start):
    whole = list(EpochBatches(n, size, seed=1, epoch=2))
    rest = EpochBatches(n, size, seed=1, epoch=2, start_step=start)
    assert list(rest) == whole[start:] and len(rest) == len(whole[start:])
    rest.set_epoch(3)
    assert len(rest) == len(whole) and list(rest) != whole or n < 3


def test_order_depends_on_seed_and_epoch_alone():
    orders = {(s, e): epoch_order(500, 8, s, e).tolist() for s in (0, 1) for e in (0, 1)}
    assert len({str(o) for o in orders.values()}) == 4 and all(sorted(o) == list(range(500)) for o in orders.values())
    first = np.array([epoch_order(40, 4, 0, e)[0] for e in range(400)])
    assert len(set(first)) > 35 # every sample comes first at some time
    assert epoch_order(5, 2, 0, 0, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_buckets():
    lengths = np.random.default_rng(0).integers(8, 256, 1600)
    order = epoch_order(1600, 8, 0, 3, lengths=lengths)
    spread = np.ptp(lengths[order].reshape(-1, 8), axis=1).mean()
    assert spread < 12 and np.ptp(lengths[epoch_order(1600, 8, 0, 3)].reshape(-1, 8), axis=1).mean() > 150
    means = lengths[order].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < .2 # the step does not tell the length
    with pytest.raises(ValueError, match='one number for each'): epoch_order(10, 2, 0, 0, lengths=[1, 2])


@pytest.mark.parametrize('kw', [dict(n=0, batch_size=2), dict(n=4, batch_size=0), dict(n=8, batch_size=2, rank=2, world=2)])
def test_impossible_batches(kw):
    with pytest.raises(ValueError): EpochBatches(**kw)


# views
@quick
@given(st.dictionaries(st.sampled_from(['CC', 'MLO', 'ML', 'XCCL']), st.integers(1, 3), min_size=1), st.integers(1, 6), st.integers(0, 99))
def test_views(counts, count, seed):
    images = {v: [(v, k) for k in range(n)] for v, n in counts.items()}
    total = sum(counts.values())
    for rng in (np.random.default_rng(seed), None):
        chosen = choose_views(images, count, rng)
        assert len(chosen) == count and len(set(chosen)) == min(count, total) # no image twice before all were used
        assert len({v for v, _ in chosen}) == min(count, len(counts)) # as many different views as there are
    assert choose_views(images, count) == choose_views(dict(reversed(images.items())), count)


def test_views_of_the_paper():
    pair = {'CC': [0], 'MLO': [1]}
    orders = [tuple(choose_views(pair, 2, np.random.default_rng(i))) for i in range(200)]
    assert set(orders) == {(0, 1), (1, 0)} and 70 < orders.count((0, 1)) < 130
    assert choose_views({'CC': [5]}, 2, np.random.default_rng(0)) == [5, 5]
    assert choose_views({'MLO': [1], 'CC': [0], 'AT': [2]}, 2) == [0, 1]


# texts
def test_texts_of_the_paper_golden():
    g = json.loads(golden('mammoclip/text.json').read_text())
    want = {(r['patient_id'], r['laterality']): json.loads(r['text'].replace("'", '"')) for r in g['process_out_rows_view_CC_MLO_sorted']}
    for key in want:
        rows = [r for r in g['process_in'] if (r['patient_id'], r['laterality']) == key]
        reports = list(dict.fromkeys(f"FINDINGS: {r['FINDINGS'] or ''}\nIMPRESSION: {r['IMPRESSION'] or ''}" for r in rows))
        data = BreastTextDataset.__new__(BreastTextDataset)
        data.config, data._known = paper_options(), {}
        assert [data.text(*t) for t in report_texts(reports, paper_options())] == want[key]


def test_sections_and_fallback():
    assert report_texts([LEFT], BreastTextConfig())[1] == ('impression', 'BI-RADS 4A. Biopsy of the left breast.')
    assert report_texts(['TECHNIQUE: two views'], BreastTextConfig()) == [('technique', 'two views')] # no wanted section: the whole report
    assert report_texts(['FINDINGS: a mass\nTECHNIQUE: two views'], BreastTextConfig()) == [('findings', 'a mass')]
    (name, whole), = report_texts([LEFT], BreastTextConfig(slot='report'))
    assert 'Stable.' in whole and 'Biopsy' in whole
    assert report_texts(['FINDINGS: a mass', 'FINDINGS: a  mass'], BreastTextConfig()) == [('findings', 'a mass')]


def test_drawn_with_replacement_and_from_the_translation():
    row = dict(texts=[('findings', 'a'), ('impression', 'b')], other={'findings': ('augmented', 'A')})
    drawn = [tuple(t for _, t in draw_texts(BreastTextConfig(), row, np.random.default_rng(i))) for i in range(2000)]
    share = lambda pair: drawn.count(pair)/2000
    assert share(('b', 'b')) == pytest.approx(.25, abs=.04) and share(('A', 'A')) == pytest.approx(1/16, abs=.03) and share(('a', 'b')) == pytest.approx(1/8, abs=.03)
    one = dict(texts=[('findings', 'a')], other={'findings': ('augmented', 'A')})
    assert {tuple(t for _, t in draw_texts(BreastTextConfig(), one, np.random.default_rng(i))) for i in range(50)} == {('a', 'A'), ('A', 'a')}
    assert {tuple(t for _, t in draw_texts(BreastTextConfig(augmented=0), row, np.random.default_rng(i))) for i in range(50)} <= {(x, y) for x in 'ab' for y in 'ab'}
    assert [t for _, t in draw_texts(BreastTextConfig(texts=3), row, None)] == ['a', 'b', 'a']


def test_augmented_column(tokenizer):
    data = BreastTextDataset(fake([('p', 'L', 'CC', 'FINDINGS: no mass')], report_augmented='FINDINGS: there is no mass'), tokenizer)
    assert {tuple(data[e, 0]['text']) for e in range(20)} == {('no mass.', 'there is no mass.'), ('there is no mass.', 'no mass.')}
    data = BreastTextDataset(fake([('p', 'L', 'CC', 'FINDINGS: No mass.\nIMPRESSION: Nothing bad is here.')], report_augmented='FINDINGS: There is no mass.'), tokenizer, paper_options())
    texts = {t for e in range(60) for t in data[e, 0]['text']}
    assert texts == {'', 'nothing bad is here', 'there is no mass.'} # "No mass." is too short for the paper's cleaner; the translation is only lower-cased


# words and pixels
@pytest.mark.parametrize('mode', ['swap', 'no_flip', 'ignore'])
def test_words_agree_with_pixels(tokenizer, mode):
    "An image whose left half is bright: after each flip the words must name the half that is bright."
    data = BreastTextDataset(fake([('p', 'L', v, LEFT) for v in ('CC', 'MLO')] + [('q', 'R', 'CC', 'No mass.')]), tokenizer, BreastTextConfig(laterality=mode))
    half = np.zeros((3, 6, 4), np.uint8); half[:, :, :2] = 200; half[:, :3] += 50
    data.prepared.images = half
    sides, flips = set(), set()
    for epoch in range(40):
        batch = Augment(affine=0, elastic=0)(data.collate([data[epoch, 0]]), 0)
        for j in range(2):
            image, (h, v) = batch['images'][0, j, 0], batch['flip'][0, j].tolist()
            flips.add((h, v))
            left_bright, top_bright = bool(image[0, 0] > image[0, -1]), bool(image[0, 0] > image[-1, 0])
            assert (left_bright, top_bright) == (not h, not v)
            for text in batch['text'][0]:
                if mode != 'ignore':
                    assert ('left' in text) == left_bright and ('right' in text) != left_bright
                    if 'quadrant' in text: assert ('upper outer' in text) == top_bright and ('lower inner' in text) != top_bright
                    if 'clock' in text: assert {(0, 0): "2 o'clock", (1, 0): "10 o'clock", (0, 1): "8 o'clock", (1, 1): "4 o'clock"}[int(h), int(v)] in text
                sides.add('left' in text)
        assert batch['flip'][0, 0].equal(batch['flip'][0, 1]) # one decision for the whole sample
    assert flips == ({(False, False)} if mode == 'no_flip' else {(a, b) for a in (False, True) for b in (False, True)})
    assert sides == ({True, False} if mode == 'swap' else {True})
    if mode == 'no_flip': assert any(data[e, 1]['flip'].any() for e in range(20)) # a report without sides is flipped


@pytest.mark.parametrize('mode', ['swap', 'ignore'])
def test_group_follows_the_words(tokenizer, mode):
    "Equal groups have equal reports as they are read: a flip that changes the words changes the group, one that does not, does not."
    left, right, none = 'FINDINGS: Mass in the left breast.', 'FINDINGS: Mass in the right breast.', 'FINDINGS: There is no mass.'
    data = BreastTextDataset(fake([('p', 'L', 'CC', left), ('q', 'R', 'CC', right), ('r', 'L', 'CC', none)]), tokenizer, BreastTextConfig(laterality=mode))
    samples = [data[e, i] for e in range(20) for i in range(3)]
    seen = {(s['text_group'][0], s['text'][0]) for s in samples}
    assert len(seen) == 3 == len({g for g, _ in seen}) == len({t for _, t in seen}) # one to one
    changed = {s['text_group'][0] != data.rows[s['index']]['group'] for s in samples if s['flip'][0, 0] and s['index'] < 2}
    assert changed == {mode == 'swap'} and all(s['text_group'] == [data.rows[s['index']]['group']]*2 for s in samples if not s['flip'][0, 0] or s['index'] == 2)


def test_tokens_are_those_of_the_text(tokenizer):
    data = BreastTextDataset(many(), tokenizer)
    batch = data.collate([data[4, i] for i in range(6)])
    ids, mask = batch['tokens']['input_ids'], batch['tokens']['attention_mask']
    assert ids.shape == mask.shape and ids.shape[:2] == (6, 2) and ids.shape[2] % 8 == 0
    for i in range(6):
        for k in range(2):
            want = tokenizer(batch['text'][i][k]).input_ids
            assert ids[i, k, :mask[i, k].sum()].tolist() == want and (ids[i, k, mask[i, k].sum():] == tokenizer.pad_token_id).all()


# purity
def test_same_for_any_number_of_workers(tokenizer):
    data = BreastTextDataset(many(), tokenizer)
    runs = []
    for workers in (0, 2):
        loader = DataLoader(data, batch_sampler=EpochBatches(len(data), 4, seed=1, epoch=3), collate_fn=data.collate, num_workers=workers)
        runs.append(list(loader))
    for a, b in zip(*runs):
        assert a['text'] == b['text'] and a['images'].equal(b['images']) and a['flip'].equal(b['flip']) and a['tokens']['input_ids'].equal(b['tokens']['input_ids'])
    copy = pickle.loads(pickle.dumps(data)) # noqa: S301 (what a spawned worker gets)
    assert copy[3, 5]['text'] == data[3, 5]['text'] and copy[3, 5]['view'] == data[3, 5]['view']


def test_keys(tokenizer):
    data = BreastTextDataset(many(), tokenizer)
    assert data[7]['text'] == data[0, 7]['text'] == data[0, -5]['text'] and data[0, -5]['index'] == 7
    seen = [str((data[e, 0]['text'], data[e, 0]['view'], data[e, 0]['flip'].tolist())) for e in range(12)]
    assert len(set(seen)) > 6
    other = BreastTextDataset(many(), tokenizer, BreastTextConfig(seed=1))
    assert any(other[e, 0]['flip'].tolist() != data[e, 0]['flip'].tolist() for e in range(12)) and other.digest != data.digest
    for wrong in (12, -13, (0, 12)):
        with pytest.raises(IndexError, match='among 12'): data[wrong]


def test_validation_is_deterministic(tokenizer):
    data = BreastTextDataset(many(), tokenizer, train=False)
    a, b = data[0, 3], data[9, 3]
    assert a['text'] == b['text'] and a['view'] == ['CC', 'MLO'] and not a['flip'].any()
    assert a['text'][0].startswith('mass in the left') and a['text'][1].startswith('bi-rads 4a')


@pytest.mark.parametrize('views, texts', [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_any_number_of_views_and_texts(tokenizer, views, texts):
    data = BreastTextDataset(many(), tokenizer, BreastTextConfig(views=views, texts=texts, bucket=True))
    batch = data.collate([data[0, i] for i in range(3)])
    assert batch['images'].shape == (3, views, 1, 6, 4) and batch['tokens']['input_ids'].shape[:2] == (3, texts) and batch['text_group'].shape == (3, texts)
    out = Augment(affine=1)(batch)
    assert out['transforms'].shape == (3, views, 3, 3) and len(data.lengths) == len(data)
    if views > 2: assert not out['transforms'][0, 0].equal(out['transforms'][0, 2]) # the same image, augmented again


# what is left out, and said
def test_empty_reports_are_counted(tokenizer):
    rows = [('a', 'L', 'CC', LEFT), ('b', 'L', 'CC', ''), ('c', 'L', 'CC', float('nan')), ('d', 'L', 'CC', '...'), ('e', 'L', 'ML', LEFT)]
    with pytest.warns(UserWarning, match='4 breasts are left out, 1 stay') as said:
        data = BreastTextDataset(fake(rows), tokenizer, BreastTextConfig(view_names=('CC', 'MLO')))
    assert data.skipped == {'no image of the wanted views': 1, 'no report': 2, 'no text in the report': 1} and '2 with no report' in str(said[0].message)
    html = data._repr_html_()
    assert '1 with no text in the report' in html and 'findings 1, impression 1' in html and 'CC 1' in html
    for rows in ([('a', 'L', 'CC', '')], [('a', 'L', 'CC', None)]):
        with pytest.raises(DataError, match='no breast has images and a report'): BreastTextDataset(fake(rows), tokenizer)


def test_one_report_over_views_and_ten_thousand_words(tokenizer):
    rows = [('a', 'L', 'CC', 'mass ' * 10_000), ('a', 'L', 'MLO', ''), ('b', 'R', 'CC', 'No Mass.'), ('c', 'R', 'CC', 'no  mass.')]
    data = BreastTextDataset(fake(rows), tokenizer)
    batch = data.collate([data[0, i] for i in range(3)])
    assert set(data[0, 0]['view']) == {'CC', 'MLO'} # the report of one view is the breast's
    assert batch['tokens']['input_ids'].shape[-1] == 256 and (batch['tokens']['input_ids'][0, :, 255] == tokenizer.sep_token_id).all()
    groups = batch['text_group'][:, 0].tolist()
    assert groups[1] == groups[2] != groups[0] and min(groups) >= 0


def test_text_without_token_names_the_sample(tokenizer):
    data = fake([('patient9', 'L', 'CC', '\u0300\u0301')]) # only combining marks: text, but nothing for the tokeniser
    with pytest.raises(DataError, match='patient9|no breast'): BreastTextDataset(data, tokenizer)


def test_paper_keeps_empty_texts(tokenizer):
    data = BreastTextDataset(fake([('a', 'L', 'CC', 'FINDINGS: there is no mass in here')]), tokenizer, paper_options())
    texts = {t for e in range(20) for t in data[e, 0]['text']}
    assert texts == {'', 'there is no mass in here'}
    batch = data.collate([data[e, 0] for e in range(20)])
    assert batch['tokens']['attention_mask'].sum(-1).min() == 2


def test_paper_flips_views_apart(tokenizer):
    data = BreastTextDataset(many(), tokenizer, paper_options())
    flips = torch.cat([data.collate([data[e, i] for i in range(12)])['flip'] for e in range(6)])
    assert (flips[:, 0] != flips[:, 1]).any() and all('right' not in t for e in range(6) for t in data[e, 0]['text'])


@pytest.mark.parametrize('change, message', [(dict(slot='sections'), "'section'"), (dict(laterality='swop'), "'swap'"), (dict(views=0), 'at least 1'), (dict(augmented=2), 'probability'),
                                             (dict(flip_scope='view'), 'flipped apart'), (dict(normalisation='papper'), "'paper'"), (dict(empty='dropp'), "'drop'")])
def test_wrong_options(tokenizer, change, message):
    with pytest.raises(ValueError, match=message): BreastTextDataset(many(), tokenizer, BreastTextConfig(**change))


def test_sentences(tokenizer):
    data = BreastTextDataset(many(), tokenizer, BreastTextConfig(slot='sentence', flip_horizontal=0, flip_vertical=0))
    assert {'stable.', 'bi-rads 4a.', 'biopsy of the left breast.'} <= {t for e in range(40) for t in data[e, 0]['text']}


# images
def test_image_dataset():
    prepared = fake([('a', 'L', 'CC', ''), ('b', 'R', 'MLO', ''), ('c', 'R', 'CC', '')], labels=dict(mass=[1., 0., np.nan], calc=[0., 0., 1.]))
    data = ImageDataset(prepared, boxes=True, masks=True)
    batch = collate([data[i] for i in range(3)])
    assert batch['images'].shape == (3, 1, 1, 6, 4) and batch['images'].dtype == torch.uint8 and batch['images'][:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(batch['labels'].numpy(), np.array([[1, 0], [0, 0], [np.nan, 1]], np.float32))
    assert batch['boxes'][0][0].tolist() == [[0, 1, 2, 4]] and batch['boxes'][1][0].shape == (0, 4) and batch['masks'] == [[None]]*3 and not batch['flip'].any()
    assert collate([ImageDataset(prepared, ('calc',))[2]])['labels'].tolist() == [[1]]
    flips = collate([ImageDataset(prepared, train=True)[e, 0] for e in range(60)])['flip']
    assert set(map(tuple, flips[:, 0].tolist())) == {(a, b) for a in (False, True) for b in (False, True)}
    with pytest.raises(ValueError, match="'mass'"): ImageDataset(prepared, ('masss',))
    with pytest.raises(IndexError): data[3]
    empty = fake([('a', 'L', 'CC', '')]); empty.manifest = empty.manifest[:0]
    with pytest.raises(DataError, match='no images'): ImageDataset(empty)


def test_changed_pixels_stop_the_training(tokenizer, tmp_path):
    "A row of the store that was damaged is named by whatever dataset reads it first; the others are read."
    from medvl.data.store import ImageStore, StoreWriter
    with StoreWriter(tmp_path/'s', 3, 6, 4) as writer:
        for i in range(3): writer.write(i, np.full((6, 4), i, np.uint8))
    with open(tmp_path/'s'/'pixels.bin', 'r+b') as f: f.seek(2*24); f.write(b'\7')
    prepared = fake([('p', 'L', 'CC', LEFT), ('p', 'L', 'MLO', LEFT), ('q', 'L', 'CC', LEFT)], labels={'mass': [1, 0, 1]})
    prepared.images = ImageStore.open(tmp_path/'s')
    for data in (BreastTextDataset(prepared, tokenizer), ImageDataset(prepared)):
        assert data[0]['images'][0].max() < 2
        with pytest.raises(DataError, match='pixels changed') as e: data[len(data) - 1]
        assert e.value.row == 2 and e.value.file == str(tmp_path/'s'/'pixels.bin')


def test_sixteen_bits_keep_their_depth():
    prepared = fake([('a', 'L', 'CC', '')], labels=dict(mass=[1.]))
    prepared.images = np.array([[[0, 1], [257, 65535]]], dtype=np.uint16)
    images = collate([ImageDataset(prepared)[0]])['images']
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[0, 0, 0].numpy(), [[0, 1/257], [1, 255]], rtol=1e-6)
    assert Augment(mode='none')(collate([ImageDataset(prepared)[0]]))['images'].equal(images)


# batches
def test_slices_put_together_are_the_batch(tokenizer):
    data = BreastTextDataset(many(), tokenizer)
    batch = data.collate([data[1, i] for i in range(7)])
    parts = [slice_batch(batch, i, min(i + 3, 7)) for i in range(0, 7, 3)]
    assert [batch_size(p) for p in parts] == [3, 3, 1] and sum((p['sample_id'] for p in parts), []) == batch['sample_id']
    assert torch.cat([p['tokens']['input_ids'] for p in parts]).equal(batch['tokens']['input_ids']) and parts[1]['epoch'] == 1
    whole = Augment()(batch, seed=2)['images']
    assert torch.cat([Augment()(p, seed=2)['images'] for p in parts]).equal(whole)
    assert to_device(batch, 'meta')['tokens']['input_ids'].device.type == 'meta'
    for wrong in ((0, 8), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match='no slice'): slice_batch(batch, *wrong)
    with pytest.raises(ValueError, match='at least one'): collate([])


def test_odd_shapes_are_named(tokenizer):
    data = BreastTextDataset(many(), tokenizer)
    good, odd = data[0], data[1]
    with pytest.raises(ValueError, match=re.escape(odd['sample_id'])): collate([good, {**odd, 'images': [np.zeros((5, 4), np.uint8)]*2}])
    with pytest.raises(ValueError, match='numbers of texts'): collate([good, {**odd, 'tokens': odd['tokens'][:1]}])


# real reports
def test_real_reports_end_to_end():
    d = pd.read_csv(sample('reports/cdd_cesm_reports.csv'), dtype=str, keep_default_na=False)
    d = d[d.type == 'DM'].head(400)
    side = lambda s: 'L' if s.upper().startswith('L') else 'R'
    rows = [(p, side(s), v, f'FINDINGS: {t}\nIMPRESSION: {o}') for p, s, v, t, o in zip(d.patient_id, d.laterality, d['view'], d.report_text, d.opinion_text)]
    prepared = fake(rows)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data = BreastTextDataset(prepared, load_tokenizer(sample('tokenizer/bert-base-cased-vocab.txt')))
    assert len(data) > 150 and all(set(r['images']) <= {'CC', 'MLO'} for r in data.rows)
    for k, row in enumerate(data.rows[:60]):
        s = data[1, k]
        possible = {data.text(n, t, *s['flip'][0]) for n, t in row['texts']}
        assert set(s['text']) <= possible and all(normalise(swap_sides(swap_sides(t))) == normalise(t) for t in s['text'])
    distinct = len({r['group'] for r in data.rows})
    assert distinct < len(data) # shared reports are recognised


def test_token_cache_on_disk_is_used(tokenizer, tmp_path, monkeypatch):
    BreastTextDataset(many(), tokenizer, cache=tmp_path)
    monkeypatch.setattr('medvl.data.text.tokens.tokenise', lambda *a: pytest.fail('cut again'))
    data = BreastTextDataset(many(), tokenizer, BreastTextConfig(flip_horizontal=0, flip_vertical=0), cache=tmp_path)
    assert len(data[3, 3]['tokens']) == 2 and isinstance(data.cache, TokenCache)


def test_rows_are_sorted_whatever_the_manifest_order(tokenizer):
    a = fake([('a', 'L', 'CC', 'x mass'), ('b', 'L', 'CC', 'y mass')])
    b = fake([('b', 'L', 'CC', 'y mass'), ('a', 'L', 'CC', 'x mass')])
    assert [r['sample_id'] for r in breasts(a, BreastTextConfig())[0]] == [r['sample_id'] for r in breasts(b, BreastTextConfig())[0]]
