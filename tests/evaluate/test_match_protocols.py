"""Protocols that match images with texts: pairs, zero-shot, retrieval, hidden words; against the original's numbers and plain loops."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import made
from golden import golden
from torch import nn

from medvl.core.errors import DataError
from medvl.data.prepared import subset
from medvl.data.text.chest_prompts import CHEST_QUESTIONS, read_sentences
from medvl.data.text.labels import CHEXPERT_NAMES, label_reports
from medvl.evaluate.metrics.matched import drawn_batches, first_by, label_key, matched_ranks, precision_at, reranked, same_key
from medvl.evaluate.protocols.match_retrieval import (
    DIRECTIONS, PairScores, batchwise_hits, class_retrieval, exclusive_rows, match_retrieval, needed_pairs, positives_of, rank_pairs,
    same_side_retrieval, unit_labels)
from medvl.evaluate.protocols.match_zero_shot import answer_probabilities, match_zero_shot, scored_zones, severity_of, task_scores, zone_scores
from medvl.evaluate.protocols.pairs import join_rows, match_pairs, match_some, read_image_set, read_text_set, rows_of
from medvl.evaluate.protocols.retrieval import retrieval_protocol
from medvl.evaluate.protocols.word_probe import other_patients, probe_words, word_spans, word_table
from medvl.evaluate.protocols.xvl_published import beside_xvl, published_xvl
from medvl.evaluate.protocols.zero_shot import TASKS, Task, zero_shot
from medvl.evaluate.stats.row_bootstrap import auc_and_f1, limits_by_position, row_bootstrap
from medvl.evaluate.stats.scored import LeakError
from medvl.evaluate.stats.selection import choose_threshold
from medvl.methods.base import Method, capability_problems

torch.set_num_threads(1)
WORDS = {'mass': 0, 'calcification': 1, 'normal': 2, 'no': 3}


class Reader(Method):
    "Matches the grey level with words, both sides together; counts what it reads and matches."
    name = 'reader'

    def __init__(self, slope=1., padded=False, broken=False):
        super().__init__()
        self.slope, self.padded, self.broken = slope, padded, broken
        self.images = self.texts = self.pairs = 0
        self.anchor = nn.Parameter(torch.tensor(float(slope)))

    def read_images(self, images):
        self.images += len(images)
        grey = (images.float().mean((1, 2, 3)) - 105) / 20
        return {'grey': grey, 'grid': (2, 2)}

    def read_texts(self, texts):
        self.texts += len(texts)
        split = [t.lower().replace('.', '').split() for t in texts]
        ids = torch.full((len(texts), max(map(len, split))), -1)
        for i, words in enumerate(split): ids[i, :len(words)] = torch.tensor([WORDS.get(w, 4) for w in words])
        return {'sign': torch.tensor([-1. if 'no' in w or 'normal' in w else 1. for w in split]), 'mask': ids >= 0, 'ids': ids + 1}

    def match(self, images, texts):
        self.pairs += len(images['grey']) * len(texts['sign'])
        s = self.slope * images['grey'][:, None] * texts['sign'][None] + .01 * (texts['ids'] * texts['mask']).sum(1)[None]
        if self.padded: s = s + texts['mask'].shape[1]
        return s * float('nan') if self.broken else s

    def encode_image(self, images, present=None, views=None):
        grey = (images.float().mean((1, 2, 3)) - 105) / 20
        return nn.functional.normalize(torch.stack([grey, torch.ones_like(grey)], 1), dim=1)

    def encode_text(self, texts):
        return nn.functional.normalize(torch.tensor([[-1. if 'no' in t.lower() else 1., 1 + len(t) / 50] for t in texts]), dim=1)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Thirty patients of two breasts with two images; reports by breast, some alike."
    data = made(tmp_path_factory.mktemp('d') / 'p', patients=30, seed=3)
    m = data.manifest
    words = [['Mass.', 'No mass.', 'Normal.'][int(p[1:]) % 3] + f' Seen on {int(p[1:]) // 2}.' for p in m.patient_id]
    data.manifest['report'] = [f'{w} {s}' for w, s in zip(words, m.laterality)]
    data.manifest['label_other'] = (np.arange(len(m)) // 4 % 3 == 0).astype(float)
    return data


MASS = Task('mass', (('no mass',), ('mass', 'a mass is seen')), ('mass',))


# ------------------------------------------------------------------------------------------------ the original's numbers

def test_auroc_best_f1_bootstrap_and_limits_are_the_originals():
    z = np.load(golden('xvl/zero_shot_eval.npz'))
    names = list(dict.fromkeys(c.rsplit('_', 1)[0] for c in z['evaluate_cols']))
    found = auc_and_f1(z['y_true'], z['y_pred'], names)
    assert list(found) == list(z['evaluate_cols'])
    np.testing.assert_allclose(list(found.values()), z['evaluate'][0], rtol=1e-12)
    draws = row_bootstrap(z['y_true'], z['y_pred'], names, 50)
    np.testing.assert_allclose(draws, z['boot50'], rtol=1e-12)
    np.testing.assert_array_equal(limits_by_position(draws), z['ci_mean_lower_upper'])


def test_the_reference_rule_is_the_originals():
    z = np.load(golden('xvl/zero_shot_eval.npz'))
    for j in range(3):
        s = np.stack([z['itm_logit_neg'][:, j], z['itm_logit_pos'][:, j]], 1)
        np.testing.assert_allclose(answer_probabilities(s, 'reference')[:, 1], z['prob'][:, j], rtol=1e-12)
        p = answer_probabilities(s)[:, 1]
        np.testing.assert_allclose(np.log(p / (1 - p)), s[:, 1] - s[:, 0], rtol=1e-9)
    extreme = answer_probabilities(np.array([[-50., 50.], [50., -50.]]), 'reference')[:, 1]
    assert extreme.min() > .26 and extreme.max() < .74 # what the reference can say at most


def test_label_aware_recall_is_the_originals():
    d = json.loads(golden('xvl/retrieval_eval.json').read_text())
    keys = [label_key(l, words=True) for l in d['labels']]
    match, got = same_key(keys, keys), {}
    for side, scores in (('txt', 'scores_i2t'), ('img', 'scores_t2i')):
        r = matched_ranks(np.array(d[scores]), match)
        got |= {f'{side}_r{k}': 100 * (r <= k).mean() for k in (1, 5, 10)}
        got[f'{side}_r_mean'] = np.mean([got[f'{side}_r{k}'] for k in (1, 5, 10)])
    got['r_mean'] = (got['txt_r_mean'] + got['img_r_mean']) / 2
    assert got == pytest.approx(d['result'])


# ------------------------------------------------------------------------------------------------ pairs

def test_encoders_run_once_and_the_numbers_are_the_naive_ones():
    method, films = Reader(), torch.rand(24, 1, 4, 4) * 255
    texts = [f'{"no " * (i % 2)}mass' + ' seen' * (i % 5) for i in range(30)]
    scores = match_pairs(method, read_image_set(method, films, 7), read_text_set(method, texts, 11))
    counted = method.images, method.texts, method.pairs
    assert counted == (24, 30, 24 * 30)
    with torch.no_grad():
        naive = np.array([[float(method.match(method.read_images(x[None]), method.read_texts([t]))) for t in texts] for x in films])
    np.testing.assert_allclose(scores, naive, atol=1e-5)
    assert (method.images + method.texts - 54) / (counted[0] + counted[1]) >= 10 # readings that the naive way makes


def test_some_pairs_are_those_of_all_pairs():
    method, films = Reader(), torch.rand(9, 1, 4, 4) * 255
    images, texts = read_image_set(method, films, 4), read_text_set(method, ['mass', 'no mass', 'a mass is seen', 'normal'], 3)
    every = match_pairs(method, images, texts)
    wanted = np.random.default_rng(0).random((9, 4)) < .4
    wanted[2] = False
    before = method.pairs
    some = match_some(method, images, texts, wanted)
    assert method.pairs - before == wanted.sum() + 2 * len(texts.parts) # and the check of the padding
    np.testing.assert_allclose(some[wanted], every[wanted], atol=1e-5)
    assert np.isnan(some[~wanted]).all()
    np.testing.assert_array_equal(match_some(method, images, texts, np.ones((9, 4), bool)), every)


def test_bad_pairs_are_named():
    films = torch.rand(3, 1, 4, 4)
    method = Reader(padded=True)
    images, texts = read_image_set(method, films), read_text_set(method, ['mass', 'a mass is seen'], 1)
    with pytest.raises(ValueError, match='how far a text is padded'): match_some(method, images, texts, np.eye(3, 2))
    method = Reader(broken=True)
    with pytest.raises(DataError, match='image 0 and text 0 is not a number'): match_pairs(method, images, texts)
    with pytest.raises(DataError, match='empty'): read_text_set(method, ['mass', ''])
    with pytest.raises(DataError, match='no texts'): read_text_set(method, [])
    with pytest.raises(DataError, match='no images'): read_image_set(method, films[:0])
    with pytest.raises(TypeError, match='read_images'): read_image_set(Method(), films)
    assert not capability_problems(Reader)


@pytest.mark.parametrize('read', [torch.arange(6.).view(3, 2), {'a': torch.ones(3), 'b': [1, 2, 3], 'c': (3, 3), 'd': None}, ['x', 'y', 'z']])
def test_rows_cut_and_joined_are_the_rows(read):
    parts = [rows_of(read, [0], 3), rows_of(read, [1, 2], 3)]
    again = join_rows(parts, [1, 2])
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(same(again[k], read[k]) for k in read) if isinstance(read, dict) else same(again, read)


# ------------------------------------------------------------------------------------------------ zero-shot

def test_by_cosine_the_numbers_are_those_of_zero_shot(data, tmp_path):
    options = dict(n_boot=64, folder=tmp_path)
    for unit in ('image', 'breast'):
        a = match_zero_shot(Reader(), data, [MASS], 'cosine', unit=unit, baseline=False, **options)
        b = zero_shot(Reader(), data, [MASS], unit=unit, baseline=False, by=(), **options)
        pd.testing.assert_frame_equal(a.table, b.table)
        pd.testing.assert_frame_equal(a.scores, b.scores)


def test_by_match_a_reader_of_grey_finds_the_mass(data):
    method = Reader()
    r = match_zero_shot(method, data, [MASS], n_boot=64, untrained=Reader(slope=0.))
    used = data.manifest.split.isin(['valid', 'test']).sum()
    assert method.images == used and method.texts == 3 * 2 and method.pairs == 3 * used # once a split
    s = task_scores(method, [MASS], data)['mass']
    grey = np.array([(data.image(i).mean() - 105) / 20 for i in range(len(data))])
    np.testing.assert_allclose(s[:, 1] - s[:, 0], 2 * grey + .01 * (1 + (5 + 1 + 5 + 5)) / 2 - .01 * (4 + 1), atol=1e-5)
    auroc = r.table[r.table.metric == 'auroc'].iloc[0]
    assert auroc.value > .55 and r.untrained[r.untrained.metric == 'auroc'].value.item() == .5
    assert list(r.compact().columns) == ['match', 'untrained', 'histogram', 'chance'] and 'match' in repr(r)
    y = r.scored['test']['mass'].labels
    precision = r.chance[r.chance.metric == 'average_precision'].value.item()
    assert precision == pytest.approx(np.nanmean(y))


def test_thresholds_come_from_validation_only(data):
    first = match_zero_shot(Reader(), data, [MASS], n_boot=0, baseline=False)
    valid = first.scored['valid']['mass']
    assert first.evaluation.thresholds['mass', 'youden'].value == choose_threshold(valid).value
    turned = subset(data, np.ones(len(data), bool))
    turned.manifest['label_mass'] = data.manifest.label_mass.where(data.manifest.split != 'test', 1 - data.manifest.label_mass)
    other = match_zero_shot(Reader(), turned, [MASS], n_boot=0, baseline=False)
    assert other.evaluation.thresholds['mass', 'youden'].value == first.evaluation.thresholds['mass', 'youden'].value
    outside = match_zero_shot(Reader(), data, [MASS], n_boot=0, baseline=False, split=None)
    assert not outside.evaluation.thresholds and len(outside.scores) == len(data)


def test_checkpoints_answer_together_by_their_mean(data):
    ask = lambda methods, **o: match_zero_shot(methods, data, [MASS], n_boot=0, baseline=False, check=False, **o)
    slopes = (.2, 1., 3.)
    single = [ask(Reader(s)).scores.score_mass for s in slopes]
    opened = []
    def load():
        for s in slopes: opened.append(s); yield Reader(s)
    together = ask(load())
    assert together.members == 3 and opened == list(slopes)
    np.testing.assert_allclose(together.scores.score_mass, np.mean(single, axis=0), rtol=1e-12)
    assert not np.allclose(ask(Reader(), rule='reference').scores.score_mass, single[1])
    with pytest.raises(DataError, match='no method'): ask([])
    with pytest.raises(ValueError, match='log_odds'): ask(Reader(), rule='logodds')
    with pytest.raises(ValueError, match='kind of score'): ask(Reader(), score='itm')


def test_several_classes_and_absent_truth(data):
    density = TASKS['mammo'][3]
    r = match_zero_shot(Reader(), data, [density, MASS, Task('cyst', (('no cyst',), ('cyst',)), ('cyst',))], n_boot=0, baseline=False)
    p = r.scored['test']['density'].scores
    assert p.shape[1] == 4 and np.allclose(p.sum(1), 1)
    assert r.table[r.table.task == 'cyst'].note.str.contains('label_cyst').all() and np.isnan(r.table[r.table.task == 'cyst'].value).all()
    assert set(r.chance.task) == {'mass'}


def test_sentences_are_a_table_that_can_be_edited(tmp_path):
    assert set(CHEST_QUESTIONS) == {'chest', 'unseen', 'two_sentences'} and len(CHEST_QUESTIONS['chest']) == 8
    for findings in CHEST_QUESTIONS.values():
        for absent, present in findings.values(): assert not set(absent) & set(present)
    assert [len(t.prompts[1]) for t in TASKS['chest']] == [5] * 8 and len(TASKS['unseen'][0].prompts[1]) == 5
    for bad, why in (('a | b | c', 'no row of sentences'), ('a | b | present | ', 'no row'), ('a | b | present | x', 'for absent'), ('a|b|absent|x', 'for present')):
        (tmp_path / 't.txt').write_text(bad)
        with pytest.raises(DataError, match=why): read_sentences(tmp_path / 't.txt')
    films = pd.DataFrame({'label_covid': [1., 0.]})
    assert TASKS['unseen'][0].truth(films).tolist() == [1, 0]


def test_severity_needs_a_threshold_from_validation():
    rng = np.random.default_rng(0)
    truth = (rng.random((12, 3, 2)) < .4).astype(float)
    maps = np.maximum(np.kron(truth, np.ones((4, 4))), rng.random((12, 12, 8)) * .2)
    third = lambda m, lungs: [[m[4 * i:4 * i + 4, 4 * j:4 * j + 4].max() for j in range(2)] for i in range(3)]
    s = zone_scores(maps, np.ones_like(maps), third)
    t = choose_threshold(scored_zones(s[:6], truth[:6], list('aabbcc'), 'valid'), 'f1')
    s[11, 0] = np.nan
    grid, severity = severity_of(s, t)
    np.testing.assert_array_equal(severity[:11], truth[:11].sum((1, 2)))
    assert np.isnan(grid[11, 0]).all() and severity[11] == truth[11, 1:].sum()
    assert np.isnan(severity_of(np.full((1, 3, 2), np.nan), t)[1]).all()
    lungs = np.zeros((1, 24, 20), bool)
    lungs[0, 8:, 2:9] = lungs[0, 8:, 11:18] = True
    heat = np.zeros((1, 24, 20))
    heat[0, 9, 4], heat[0, 22, 15] = .7, .9 # top of one lung, bottom of the other
    np.testing.assert_allclose(zone_scores(heat, lungs)[0], [[.7, 0], [0, 0], [0, .9]])
    with pytest.raises(LeakError): choose_threshold(scored_zones(s, truth, ['a'] * 12, 'test'))
    with pytest.raises(ValueError, match=r'\(3, 2\)'): zone_scores(maps, np.ones_like(maps), lambda m, lungs: np.zeros((2, 3)))
    with pytest.raises(ValueError, match='must fit'): zone_scores(maps, maps[:, 1:], third)


# ------------------------------------------------------------------------------------------------ retrieval

def test_ranks_precision_and_order_by_plain_loops():
    rng = np.random.default_rng(3)
    s, match, among = rng.integers(0, 5, (20, 15)) / 4., rng.random((20, 15)) < .2, rng.random((20, 15)) < .7
    r, p = matched_ranks(s, match, among), precision_at(s, match, (1, 3, 20), among)
    for i in range(20):
        order = sorted(np.flatnonzero(among[i]), key=lambda j: (-s[i, j], match[i, j]))
        places = [k + 1 for k, j in enumerate(order) if match[i, j]]
        # the first match of a tie stands behind the others of it
        if not places: assert np.isnan(r[i])
        else: assert r[i] == sum(s[i, j] >= max(s[i, m] for m in order if match[i, m]) and not match[i, j] for j in order) + 1
        for k, got in zip((1, 3, 20), p[i]): assert got == pytest.approx(sum(match[i, j] for j in order[:k]) / k)
    better = reranked(s, -s, 4)
    for i in range(20):
        chosen = first_by(s, 4)[i]
        assert better[i][chosen].min() > better[i][~chosen].max()
        assert np.array_equal(np.argsort(better[i][~chosen], kind='stable'), np.argsort(s[i][~chosen], kind='stable'))


def test_equal_texts_by_cosine_is_the_protocol_of_before(data, tmp_path):
    for unit in ('image', 'breast'):
        o = dict(unit=unit, folder=tmp_path, n_boot=64, check=False)
        a, b = match_retrieval(Reader(), data, 'cosine', **o), retrieval_protocol(Reader(), data, **o)
        columns = ['task', 'metric', 'value', 'low', 'high', 'chance', 'n', 'candidates']
        pd.testing.assert_frame_equal(a.table[columns], b.table[columns])
        pd.testing.assert_frame_equal(a.ranks, b.ranks)


class Knows(Reader):
    "Its match knows the report of every image; its vectors know nothing but how long a text is."
    def __init__(self, owners): super().__init__(); self.owners = owners
    def read_images(self, images): return {'key': [self.owners[float(x.float().mean())] for x in images]}
    def read_texts(self, texts): return {'text': list(texts)}
    def match(self, images, texts): return torch.tensor([[float(k == t) for t in texts['text']] for k in images['key']])


@pytest.fixture(scope='module')
def knows(data):
    from medvl.evaluate.protocols.retrieval import texts_of_units
    codes, units = texts_of_units(data.manifest, 'breast')
    return Knows({float(torch.tensor(np.array(data.image(i))).float().mean()): units.text[codes[i]] for i in range(len(data))})


def test_the_match_puts_the_first_in_order_and_no_more(data, knows, tmp_path):
    o = dict(unit='breast', folder=tmp_path, n_boot=32, check=False, batch=0)
    at = lambda r, d: r.table[(r.table.task == d) & (r.table.metric == 'recall@1')].value.item()
    full = match_retrieval(knows, data, top=1000, **o)
    assert at(full, DIRECTIONS[0]) == at(full, DIRECTIONS[1]) == 1
    shares = []
    for top in (1, 3, 8):
        some = match_retrieval(knows, data, top=top, **o)
        group = some.units.group.to_numpy()
        first = {DIRECTIONS[0]: first_by(some.similarity, top)[np.arange(len(group)), group], # whoever the cosines had among the first
                 DIRECTIONS[1]: (first_by(some.pairs.cosines.T, top) & same_key(group, group)).any(1)}
        for d in DIRECTIONS:
            found = some.ranks[some.ranks.direction == d]
            rows = [np.flatnonzero((some.units.patient_id == p) & (group == g))[0] for p, g in zip(found.patient_id, found.group)]
            shares.append(first[d][rows].mean())
            np.testing.assert_array_equal(found['rank'].to_numpy() == 1, first[d][rows])
    assert any(0 < s < 1 for s in shares)
    with pytest.raises(ValueError, match='top=0'): match_retrieval(knows, data, top=0, **o)


def test_own_pair_and_labels(data, tmp_path):
    frame = pd.DataFrame(dict(group=[0, 1, 0, 2]))
    match, among = positives_of(frame, 'text', 'left out')
    assert (match & among).sum() == 2 and positives_of(frame, 'own')[0].sum() == 4
    with pytest.raises(ValueError, match='nothing counts'): positives_of(frame, 'own', 'left out')
    with pytest.raises(ValueError, match="Did you mean 'labels'"): positives_of(frame, 'label')
    with pytest.raises(ValueError, match='choice for the own pair'): positives_of(frame, own='out')
    o = dict(unit='breast', folder=tmp_path, n_boot=32, check=False, score='cosine', positives='labels', labels=('other',), batch=0)
    counted, out = match_retrieval(Reader(), data, **o), match_retrieval(Reader(), data, own='left out', **o)
    assert (out.ranks.matches.to_numpy() == counted.ranks.matches.to_numpy() - 1).all()
    assert set(out.table.candidates) == {len(out.units) - 1} and set(counted.table.candidates) == {len(out.units)}
    with pytest.raises(DataError, match="no label 'cyst'"): match_retrieval(Reader(), data, **{**o, 'labels': ('cyst',)})
    alone = {**o, 'own': 'left out', 'positives': 'text'}
    lonely = subset(data, (data.manifest.split == 'test').to_numpy())
    with pytest.raises(DataError, match='nothing|anything'): match_retrieval(Reader(), lonely, split=None, **alone)
    assert label_key(['Edema', '', ' edema']) == label_key('EDEMA') and label_key([]) == ''


def test_studies_in_which_the_labeller_finds_nothing():
    "Nothing stated is neither 1 nor 0; such studies have the same labels, none, and count as found by each other; alone, they leave where the own pair does."
    said = ['The wires are unchanged.', 'Large effusion.', 'No prior for comparison.', 'Large effusion.']
    found = label_reports(said, names=CHEXPERT_NAMES)
    assert found.iloc[[0, 2]].drop(columns=['Support Devices']).isna().all().all() and found['Pleural Effusion'].tolist()[1::2] == [1, 1]
    keys = unit_labels(found[['Pleural Effusion', 'Edema']].add_prefix('label_'), np.arange(4), np.arange(4))
    assert keys[0] == keys[2] == label_key([]) == '' and keys[1] == keys[3] != ''
    match, among = positives_of(pd.DataFrame(dict(group=range(4))), 'labels', 'left out', keys)
    assert np.argwhere(match & among).tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]


def test_batches_make_the_number_larger_and_are_drawn_by_seed():
    rng = np.random.default_rng(0)
    s = PairScores(np.eye(250) + .4 * rng.normal(size=(250, 250)))
    match, among = positives_of(pd.DataFrame(dict(group=range(250))), 'own')
    full = (rank_pairs(s, match, among, np.arange(250)) <= 1).mean()
    for to_image in (False, True):
        hits, chance = batchwise_hits(s, match, among, drawn_batches(250, 50, 5), (1,), to_image)
        assert hits.mean() > full + .1 and np.allclose(chance, 1 / 50)
    a, b = drawn_batches(250, 100, 2, seed=1), drawn_batches(250, 100, 2, seed=1)
    assert all((x == y).all() for m, n in zip(a, b) for x, y in zip(m, n)) and [len(r) for r in a] == [2, 2]
    assert not (a[0][0] == drawn_batches(250, 100, 1, seed=2)[0][0]).all()
    assert [len(b) for b in drawn_batches(30, 100)[0]] == [30]
    with pytest.raises(ValueError, match='at least 2'): drawn_batches(30, 1)
    whole, _ = batchwise_hits(s, match, among, drawn_batches(250, 1000), (1,)) # one batch of all is the full gallery
    assert whole.mean() == full


def test_only_needed_pairs_are_matched_and_they_suffice():
    rng = np.random.default_rng(1)
    cosines, truth = rng.normal(size=(60, 60)), rng.normal(size=(60, 60))
    batches = drawn_batches(60, 20, 2)
    wanted = needed_pairs(cosines, 3, batches)
    assert wanted.mean() < .35
    some, every = (PairScores(cosines, m, 3) for m in (np.where(wanted, truth, np.nan), truth))
    match, among = positives_of(pd.DataFrame(dict(group=range(60))), 'own')
    for to_image in (False, True):
        np.testing.assert_array_equal(rank_pairs(some, match, among, np.arange(60), to_image), rank_pairs(every, match, among, np.arange(60), to_image))
        for a, b in zip(*(batchwise_hits(p, match, among, batches, (1, 5), to_image) for p in (some, every))): np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match='were not matched'): PairScores(cosines, np.full((60, 60), np.nan), 3).ranked(np.arange(60), np.arange(60))


def test_classes_over_the_full_gallery(data, tmp_path):
    grey = np.array([data.image(i).mean() for i in range(len(data))])
    kinds = np.where(grey > 105, 'mass', 'normal')
    texts, of = ['mass', 'a mass is seen', 'no mass', 'normal'], ['mass', 'mass', 'normal', 'normal']
    for score, top in (('match', 0), ('match', 4), ('cosine', 0)):
        t = class_retrieval(Reader(), data, kinds, texts, of, score, top, ks=(1, 2), folder=tmp_path, n_boot=32).set_index(['task', 'metric'])
        assert t.value[DIRECTIONS[0], 'precision@2'] > (.95 if score == 'match' else .5)
        assert t.candidates[DIRECTIONS[1], 'precision@1'] == len(data) and t.chance[DIRECTIONS[0], 'precision@1'] == .5
        assert t.n[DIRECTIONS[1], 'precision@1'] == 4
    with pytest.raises(ValueError, match='one class each'): class_retrieval(Reader(), data, kinds[:2], texts, of)
    rows = exclusive_rows(data.manifest, ('mass', 'other'), 5)
    has = data.manifest[['label_mass', 'label_other']].eq(1).to_numpy()[rows.row]
    assert (has.sum(1) == 1).all() and rows.groupby('class').size().max() == 5
    pd.testing.assert_frame_equal(rows, exclusive_rows(data.manifest, ('mass', 'other'), 5))
    with pytest.raises(DataError, match='cyst'): exclusive_rows(data.manifest, ('mass', 'cyst'))


def test_one_side_alone_never_finds_itself(data, tmp_path):
    for side in ('image', 'report'):
        t = same_side_retrieval(Reader(), data, side, ('other',), split=None, unit='breast', folder=tmp_path, n_boot=32, check=False)
        assert set(t.candidates) == {58} and len(t) == 7 # 60 breasts without the own patient's two
        assert t[t.metric.str.startswith('recall')].value.between(0, 1).all()
    with pytest.raises(ValueError, match='side'): same_side_retrieval(Reader(), data, 'text')


# ------------------------------------------------------------------------------------------------ hidden words

class Fills(nn.Module):
    "Knows from the image whether the word is 'large'; from the text nothing."
    def read_images(self, images): return {'bright': images.float().mean((1, 2, 3)) > 100}

    def fill_mask(self, images, texts):
        p = [.5 if images is None else .9 if (t[a:b] == 'large') == bool(images['bright'][k]) else .1 for k, (t, (a, b)) in enumerate(texts)]
        return {'log_prob': torch.tensor(p).log(), 'guess': ['small' if images is None or not b else 'large' for b in (images['bright'] if images else texts)]}


def test_what_the_image_is_worth_to_a_hidden_word():
    films = torch.cat([torch.full((4, 1, 2, 2), 200.), torch.full((5, 1, 2, 2), 20.)])
    said = ['is large now'] * 4 + ['is small now'] * 5
    probe = probe_words(Fills(), films, said, [f'p{i}' for i in range(9)], words=lambda w: w in ('large', 'small'), batch_size=4)
    assert len(probe) == 27 and set(probe.word) == {'large', 'small'}
    gain = word_table(probe, n_boot=64).set_index(['seen', 'metric'])
    assert gain.value['own - none', 'log_prob'] == pytest.approx(np.log(.9 / .5), rel=1e-5) and gain.value['own', 'correct'] == 1
    assert gain.value['own - another', 'log_prob'] > 0 and not capability_problems(Fills)
    all_of = probe_words(Fills(), films, said, range(9), seen=('own',), limit=2, seed=3)
    assert all_of.groupby('row').size().eq(2).all()
    pd.testing.assert_frame_equal(all_of, probe_words(Fills(), films, said, range(9), seen=('own',), limit=2, seed=3))
    for bad, why in ((dict(seen=('other',)), 'kind of image'), (dict(words=lambda w: False), 'no word to hide')):
        with pytest.raises((ValueError, DataError), match=why): probe_words(Fills(), films, said, range(9), **bad)
    with pytest.raises(ValueError, match='aligned'): probe_words(Fills(), films, said[:3], range(9))
    with pytest.raises(DataError, match='one patient'): probe_words(Fills(), films, said, ['a'] * 9)
    with pytest.raises(TypeError, match='fill_mask'): probe_words(Reader(), films, said, range(9))


def test_words_and_other_patients():
    assert [w for w, *_ in word_spans('No T2-weighted 5 mm; patient’s “heart”.')] == ['No', 'T2-weighted', '5', 'mm', 'patient’s', 'heart']
    text = 'Größe: 12 mm'
    assert all(text[a:b] == w for w, a, b in word_spans(text)) and word_spans(' .;') == []
    who = np.repeat(list('abcd'), [5, 1, 1, 1])
    for seed in range(5): assert (who[other_patients(who, seed)] != who).all()


# ------------------------------------------------------------------------------------------------ published

def test_published_numbers_stand_only_beside_their_data():
    t = published_xvl()
    mean = t[t.task == 'mean of 5'].set_index(['metric', 'model']).published
    parts = t[(t.model == 'Medical X-VL') & (t.task != 'mean of 5')].groupby('metric').published.mean()
    for m in ('auroc', 'best_f1'): assert parts[m] == pytest.approx(mean[m, 'Medical X-VL'], abs=6e-4)
    assert mean['auroc', 'MedCLIP'] > mean['auroc', 'Medical X-VL'] # level, not ahead
    ours = pd.DataFrame([dict(task='edema', metric='auroc', value=.90, low=.85, high=.95), dict(task='edema', metric='pf1_binarized', value=.2, low=.1, high=.3)])
    assert beside_xvl(['chexpert', 'phantom'], ours).ours.isna().all() and beside_xvl([], ours).ours.isna().all()
    mine = beside_xvl(['chexpert_test'], ours).set_index(['task', 'metric'])
    assert mine.verdict['edema', 'auroc'].startswith('agrees') and mine.verdict['edema', 'best_f1'].startswith('differs by -0.44')
    assert mine.best_other['atelectasis', 'auroc'] == .812
