"Exams as samples: any views, one report, keywords; the originals' numbers; what is missing or stands twice."
import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.data.batch import check_batch, collate, join, slice_batch
from medvl.data.phantom.populations import new_phantom
from medvl.data.pixels.profiles import PROFILES, pad_resize, preprocess
from medvl.data.samples.builders import Parts, new_samples
from medvl.data.samples.exam import FOUR_VIEWS, ExamConfig, ExamDataset, exam_report, exams
from medvl.data.text.conclusions import class_prompts, conclusion_sentences, joined_text
from medvl.data.text.keywords import keyword_numbers, keyword_rules, report_keywords, shared_keywords
from medvl.data.text.tokens import build_wordpiece


@pytest.fixture(scope='module')
def phantom(tmp_path_factory): return new_phantom('breast', tmp_path_factory.mktemp('exams'), 8, (96, 64))


@pytest.fixture(scope='module')
def tokenizer(phantom): return build_wordpiece(list(phantom.manifest.report), size=300)


def changed(prepared, **columns):
    "The same data set with other columns."
    out = prepared.subset(np.arange(len(prepared)))
    out.manifest = out.manifest.assign(**columns)
    return out


# the originals' numbers

def test_golden_text_processing():
    g = json.loads(golden('a2i2/text_processing.json').read_text())
    for r in g['reports']:
        for most in (200, 7): assert conclusion_sentences(r['conclusie'], 'reference', most) == g[f'path2sent_max{most}'][r['File_path']]
    words = g['class_prompt_vocab']['pathology']
    assert class_prompts(words, 3, 6) == g['class_prompts_seed6_n3']['pathology']
    assert [joined_text(p['input'], 'reference') for p in g['process_text']] == [p['normalised'] for p in g['process_text']]


def test_ours_keeps_what_the_original_deletes():
    g = json.loads(golden('a2i2/text_processing.json').read_text())
    ours = {r['File_path']: ' '.join(conclusion_sentences(r['conclusie'])) for r in g['reports']}
    assert 'bi rads 5' in ours['e1'] and 'bi rads 1' in ours['e2'] and '3.5 cm' in ours['e3']
    assert not re.search(r'(^| )[12]( |$)', ours['e1'].replace('bi rads 5', ''))


def test_golden_resize():
    g = np.load(golden('a2i2/resize.npz'))
    for name in ('tall', 'wide'):
        np.testing.assert_array_equal(pad_resize(g[name], 48), g[f'{name}_to_48'])
        assert PROFILES['a2i2_v1'].size == (512, 512)
        if g[name].dtype == np.uint8: np.testing.assert_array_equal(preprocess(g[name], 'a2i2_v1', (48, 48)).pixels, g[f'{name}_to_48'])


def test_golden_view_order():
    "Views of one place come together; an exam's rows are b*v + place."
    g = np.load(golden('a2i2/view_order.npz'))
    by_view = np.stack([g[f'tags_{v}'] for v in ('lcc', 'lmlo', 'rcc', 'rmlo')]) # (4, exams)
    ours = torch.from_numpy(by_view).T.reshape(-1)
    for name, scale in (('local_order', 1), ('global_order', 1), ('x_order', 1), ('e1_order_x10', 10), ('e2_order_x100', 100), ('e3_order_x1000', 1000)):
        np.testing.assert_allclose(g[name], ours*scale)
    samples = [dict(images=[np.full((2, 2), t, np.uint8) for t in by_view[:, e].astype(int)], present=np.ones(4, bool), sample_id=str(e), view=[s.split()[1] for s in FOUR_VIEWS])
               for e in range(by_view.shape[1])]
    np.testing.assert_allclose(collate(samples)['images'].flatten(0, 1)[:, 0, 0, 0], g['local_order'])


def test_golden_collate():
    "The original repeats texts four times and sorts by length; ours holds each once."
    g = json.loads(golden('a2i2/collate.json').read_text())
    lengths, labels, air = (5, 9, 7), (0, 1, 1), (0., .1, .2)
    samples = [dict(images=[np.full((2, 2), 10*e + v, np.uint8) for v in range(4)], present=np.ones(4, bool), view=[s.split()[1] for s in FOUR_VIEWS], sample_id=f'e{e}',
                    tokens=[np.full(lengths[e], e + 1)], labels=np.float32([labels[e]]), airlight=np.float32(air[e]), keywords=[f'kw{e}'], keyword_ids=keyword_numbers([f'kw{e}']))
               for e in range(3)]
    batch = check_batch(collate(sorted(samples, key=lambda s: -len(s['tokens'][0]))))
    four = lambda t: torch.as_tensor(t).repeat_interleave(4, 0)
    assert batch['images'].flatten(0, 1)[:, 0, 0, 0].tolist() == g['imgs_tag_per_image']
    assert four(batch['tokens']['attention_mask'].sum(-1)[:, 0]).tolist() == g['cap_lens']
    assert (four(batch['tokens']['input_ids'][:, 0, 0]) - 1).tolist() == [row[0] for row in g['caption_ids']]
    assert four(batch['labels'][:, 0]).tolist() == g['label']
    np.testing.assert_allclose(four(batch['airlight']), np.array(g['ato'])[:, 0, 0, 0], atol=1e-6)
    assert [k for k, in batch['keywords']] == g['keyword']
    for v, name in enumerate(('lcc', 'lmlo', 'rcc', 'rmlo')):
        np.testing.assert_allclose(batch['images'][:, v, 0].float(), np.array(g[f'imgs{name}'])[:, 0])
    assert g['shapes']['imgs'][0] == batch['images'].flatten(0, 1).shape[0]


# sentences and keywords

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('mass cyst massa knobbel'.split()), st.decimals(0, 9, places=1), st.sampled_from(['0', '1', '2', '3', '4', '4a', '4B', '5', '6'])), min_size=1, max_size=5),
       st.sampled_from(['{i}. ', '{i}) ', '\n{i}. ', '']), st.sampled_from([' ', '\n']), st.sampled_from(['BI-RADS {c}.', 'BI-RADS: {c}.', 'BIRADS {c}.', 'BI-RADS categorie {c}.', 'BI-RADS\n{c}.']))
def test_no_category_and_no_decimal_is_lost(items, number, between, category):
    text = between.join(f'{number.format(i=i)}{w.capitalize()} {d} cm. {category.format(c=c)}' for i, (w, d, c) in enumerate(items, 1))
    words = ' '.join(conclusion_sentences(text)).split()
    for w, d, c in items: assert {w, str(d), c.lower()} <= set(words), (text, words)
    categories = [w for before, w in zip(words, words[1:]) if before in ('rads', 'birads', 'categorie') and w != 'categorie']
    assert categories == [c.lower() for _, _, c in items]


def test_keywords_know_negation_language_and_side():
    nl = keyword_rules('nl')
    assert report_keywords('Geen massa, geen verkalkingen. BI-RADS 1.', nl) == ['normal', 'birads1']
    assert {'mass', 'right', 'birads4a'} <= set(report_keywords('Massa rechts. BI-RADS 4a.', nl))
    assert 'left' in report_keywords('Links: verkalkingen. Rechts: geen afwijkingen.', nl) and 'right' not in report_keywords('Links: verkalkingen. Rechts: geen afwijkingen.', nl)
    assert 'malignant' not in report_keywords('No evidence of malignancy.') and report_keywords(None) == []
    a, b = report_keywords('Mass in the left breast. BI-RADS 5.'), report_keywords('Left mass. BI-RADS 2.')
    assert shared_keywords(a, b) == shared_keywords(b, a) == 2


def test_exam_report_takes_a_shared_text_once():
    assert exam_report({'L': ['One text.'], 'R': ['One text.']}) == 'One text.'
    assert exam_report({'L': ['Mass. BI-RADS 4.'], 'R': ['']}) == 'Left breast: Mass. BI-RADS 4.'
    assert exam_report({'L': ['Both are dense.', 'Mass.'], 'R': ['Both are dense.']}).splitlines() == ['Both are dense.', 'Left breast: Mass.']


# samples

def test_any_subset_of_views(phantom, tokenizer):
    rng, first = np.random.default_rng(0), phantom.manifest.exam_id.iloc[0]
    for _ in range(4):
        keep = rng.random(len(phantom)) < .5
        keep[np.flatnonzero(phantom.manifest.exam_id == first)[0]] = True
        part = phantom.subset(keep)
        data = ExamDataset(part, tokenizer, train=False)
        assert len(data) == part.manifest.exam_id.nunique()
        batch = check_batch(data.collate([data[i] for i in range(len(data))]))
        assert int(batch['present'].sum()) == keep.sum() and not batch['images'][~batch['present']].any()
        again = join([slice_batch(batch, 0, 1), slice_batch(batch, 1, len(data))]) if len(data) > 1 else batch
        assert torch.equal(again['rows'], batch['rows']) and again['keywords'] == batch['keywords']
        assert torch.equal(again['keyword_ids'], batch['keyword_ids'])


def test_further_projections_and_single_breasts(phantom, tokenizer):
    views = phantom.manifest['view'].to_numpy(copy=True)
    views[0] = 'ML'
    other = changed(phantom, view=views)
    data = ExamDataset(other, tokenizer, ExamConfig(slots=(*FOUR_VIEWS, 'L ML', 'R ML')), train=False)
    present = np.stack([s['present'] for s in (data[i] for i in range(len(data)))])
    assert present.shape == (8, 6) and present[:, 4:].sum() == 1 and present.sum() == len(other)
    breast = ExamDataset(phantom, tokenizer, ExamConfig(unit='breast'), train=False)
    assert len(breast) == 16 and breast[0]['view'] == ['CC', 'MLO'] and breast[0]['laterality'][0] == breast[0]['laterality'][1]


def test_labels_of_an_exam_and_of_its_views(phantom):
    values = np.full(len(phantom), np.nan, np.float32)
    exam = phantom.manifest.exam_id.to_numpy()
    first, second = pd.unique(exam)[:2]
    values[exam == first] = 0
    values[np.flatnonzero(exam == second)[0]] = 1
    data = ExamDataset(changed(phantom, label_mass=values), config=ExamConfig(text='none', keywords='none', labels=('mass',)), train=False)
    by = {s['study_id']: s for s in (data[i] for i in range(len(data)))}
    assert by[first]['labels'] == 0 and by[second]['labels'] == 1 and (by[second]['view_labels'] == 1).sum() == 1
    assert sum(np.isnan(s['labels'][0]) for s in by.values()) == 6


def test_mirrored_exams_change_sides(phantom, tokenizer):
    plain = ExamDataset(phantom, tokenizer, ExamConfig(masks=True, boxes=True), train=False)
    turned = ExamDataset(phantom, tokenizer, ExamConfig(masks=True, boxes=True, flip_horizontal=1.0))
    for i in range(3):
        a, b = plain[i], turned[5, i]
        for k, other in enumerate((2, 3, 0, 1)):
            np.testing.assert_array_equal(b['images'][k], a['images'][other])
            np.testing.assert_array_equal(b['boxes'][k], a['boxes'][other])
        count = lambda s, w: ' '.join(s['text']).split().count(w)
        assert (count(a, 'left'), count(a, 'right')) == (count(b, 'right'), count(b, 'left'))
        assert b['laterality'] == a['laterality'] == ['L', 'L', 'R', 'R'] and b['flip'][:, 0].all()
    no = ExamDataset(phantom, tokenizer, ExamConfig(flip_horizontal=1.0, laterality='no_flip'))
    assert not any(no[0, i]['flip'].any() for i in range(len(no)) if 'left' in no[0, i]['text'][0])


def test_draws_belong_to_seed_epoch_and_sample(phantom, tokenizer):
    data = ExamDataset(phantom, tokenizer, ExamConfig(text='sentence', flip_horizontal=.5, laterality='ignore'))
    same = lambda a, b: a['text'] == b['text'] and (a['flip'] == b['flip']).all()
    assert same(data[3, 2], data[3, 2]) and not all(same(data[0, i], data[1, i]) for i in range(len(data)))
    assert data.digest == ExamDataset(phantom, tokenizer, ExamConfig(text='sentence', flip_horizontal=.5, laterality='ignore')).digest
    assert data.digest != ExamDataset(phantom, tokenizer, ExamConfig(text='sentence', flip_horizontal=.5, laterality='ignore', twice='last')).digest


def test_a_recipe_can_name_exams(phantom, tokenizer):
    data = new_samples('exams', Parts({'train': phantom}, labels=('mass',)), 'train', tokenizer, {'slots': ('L CC', 'L MLO')})
    assert data[0]['images'] and data[0]['labels'].shape == (1,) and len(data[0]['present']) == 2


def test_keywords_of_the_data_set_come_first(phantom, tokenizer):
    given_ = changed(phantom, keywords='mass left birads5', airlight=.25)
    sample = ExamDataset(given_, tokenizer, train=False)[0]
    assert sample['keywords'] == ['mass', 'left', 'birads5'] and sample['airlight'] == np.float32(.25)
    read = ExamDataset(given_, tokenizer, ExamConfig(keywords='report'), train=False)[0]
    assert read['keywords'] != sample['keywords'] and np.isnan(ExamDataset(phantom, tokenizer, train=False)[0]['airlight'])


# bad input

def test_exam_without_a_view_of_the_wanted_ones_is_counted(phantom, tokenizer):
    views = phantom.manifest['view'].to_numpy(copy=True)
    views[phantom.manifest.exam_id == phantom.manifest.exam_id.iloc[0]] = 'XCCL'
    with pytest.warns(UserWarning, match='1 exams are left out, 7 stay: 1 with no view of the wanted ones'):
        data = ExamDataset(changed(phantom, view=views), tokenizer)
    assert len(data) == 7 and sum(data.skipped.values()) == 1
    with pytest.raises(DataError, match='no exam can be used'): ExamDataset(changed(phantom, view='XCCL'), tokenizer)


def test_view_that_stands_twice_is_chosen_by_a_named_rule(phantom, tokenizer):
    views = phantom.manifest['view'].to_numpy(copy=True)
    a, b = np.flatnonzero((phantom.manifest.exam_id == phantom.manifest.exam_id.iloc[0]) & (phantom.manifest.laterality == 'L'))
    views[b] = views[a]
    twice = changed(phantom, view=views)
    ids = sorted(twice.manifest.image_id.iloc[[a, b]])
    where = lambda c: {i: ExamDataset(twice, tokenizer, ExamConfig(twice=c), train=True) for i in ('x',)}['x']
    for rule, expected in (('first', ids[0]), ('last', ids[1])):
        with pytest.warns(UserWarning, match=f'1 views stand more than once .*the {rule} by name'): data = where(rule)
        row = next(k for k, r in enumerate(data.rows) if max(map(len, r['images'])) == 2)
        slot = next(k for k, i in enumerate(data.rows[row]['images']) if len(i) == 2)
        image = twice.manifest.set_index('image_id').row[expected]
        np.testing.assert_array_equal(data[0, row]['images'][slot], twice.images[int(image)])
    with pytest.warns(UserWarning, match='one is drawn'): data = where('random')
    drawn = {data[e, row]['images'][slot].tobytes() for e in range(12)}
    assert len(drawn) == 2
    with pytest.raises(DataError, match='stands 2 times'): where('refuse')


def test_views_of_different_sizes_name_the_sample():
    one = lambda n, sizes: dict(images=[np.zeros(s, np.uint8) for s in sizes], present=np.ones(len(sizes), bool), sample_id=n, view=['CC', 'MLO'])
    with pytest.raises(ValueError, match='images of sample odd have another shape'): collate([one('good', [(4, 4), (4, 4)]), one('odd', [(4, 4), (5, 4)])])
    with pytest.raises(ValueError, match='at least one view'): collate([dict(one('none', [(4, 4)]*2), present=np.zeros(2, bool))])


def test_mask_of_another_size_is_refused():
    with pytest.raises(DataError, match='the mask has'): preprocess(np.arange(64*48, dtype=np.uint16).reshape(64, 48), 'a2i2_v1', (32, 32), mask=np.zeros((64, 40)))


def test_no_keywords_anywhere_is_said(phantom, tokenizer):
    plain = changed(phantom, report='Comparison was made.')
    with pytest.warns(UserWarning, match='no exam has a keyword'): data = ExamDataset(plain, tokenizer)
    batch = data.collate([data[0], data[1]])
    assert batch['keywords'] == [[], []] and batch['keyword_ids'].shape == (2, 0)


def test_report_without_words(phantom, tokenizer):
    reports = phantom.manifest.report.to_numpy(copy=True)
    reports[phantom.manifest.exam_id == phantom.manifest.exam_id.iloc[0]] = '...'
    reports[phantom.manifest.exam_id == phantom.manifest.exam_id.iloc[-1]] = 'N/A'
    bare = changed(phantom, report=reports)
    with pytest.warns(UserWarning, match='2 exams are left out'): data = ExamDataset(bare, tokenizer)
    assert data.skipped == {'no report': 2}
    numbers = changed(bare, report=[r if r not in ('...', 'N/A') else '5.' for r in reports])
    with pytest.warns(UserWarning, match='with no words in the report'): ExamDataset(numbers, tokenizer, ExamConfig(enumerator='reference'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        kept = ExamDataset(bare, tokenizer, ExamConfig(empty='keep'))
    assert len(kept) == 8 and kept.allows_empty_text
    assert sorted(len(kept[0, i]['tokens'][0]) for i in range(8))[:2] == [2, 2]
    assert exams(bare, ExamConfig(text='none'))[1] == {}
