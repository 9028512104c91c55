"""Embedding analysis: golden numbers of LoVT's code, invariances, and the maps of sentences."""
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden

from medvl.attribute.localisation import mean_estimate
from medvl.attribute.sentence_maps import evaluate_sentence_maps, score_sentences, sentence_maps, sentence_places, sentence_table
from medvl.core.errors import DataError
from medvl.core.seed import numpy_rng, torch_generator
from medvl.data.samples.chest import ChestImageDataset, ChestReportConfig, ChestReportDataset
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.evaluate.analysis.alignment import SampleNumbers, attention_statistics, global_alignment, local_alignment, modality_distance, retrieval_of
from medvl.evaluate.analysis.analyse import analyse, paired_analysis, patient_intervals, read_batch
from medvl.evaluate.analysis.plots import collect_runs, plot_alignment, plot_assignment, plot_smoothness, plot_spread, plot_weights
from medvl.evaluate.analysis.spread import REFERENCE_GLOBAL, REFERENCE_LOCAL, GlobalSpread, LocalSpread, local_spread, pair_statistics
from medvl.methods.base import evaluating
from medvl.methods.recipes import new_method
from medvl.models.heads import unit

EXACT, SHARES = 1e-9, 2e-7  # the original rounds the share of real places to float32, so masked numbers agree to 1e-7 only


def draw(*shape, name): return torch.randn(*shape, generator=torch_generator('test_analysis', name), dtype=torch.float64)


class Recorded:
    "The original's recorded batches and numbers; remembers which were compared."
    def __init__(self): self.z, self.done = dict(np.load(golden('lovt/analysis_metrics.npz'))), set()

    def __call__(self, batch, name): return torch.from_numpy(self.z[f'batch{batch}/{name}'])

    def check(self, key, value, tolerance):
        assert value == pytest.approx(float(self.z[key]), rel=tolerance, abs=1e-12), key
        self.done.add(key)


def space_of(g, i, name):
    "Vectors, mask and weights of a local space in one batch."
    if '&' in name: return torch.cat([g(i, 'zl_a'), g(i, 'zl_b')], 1), torch.cat([torch.ones(4, 9).bool(), g(i, 'mask_b')], 1), None
    return g(i, name), g(i, 'mask_b') if name.endswith('b') else None, g(i, f'weights_{name[-1]}') if name.startswith('z') else None


def check_spread(g):
    for name in ('yl_a', 'yl_b', 'zl_a', 'zl_b', 'zl_a&b'):
        local, centres, tolerance = LocalSpread(True), GlobalSpread(True), EXACT if name in ('yl_a', 'zl_a') else SHARES
        for i in range(3): centres.update(local.update(*space_of(g, i, name)))
        got = local.compute()
        for ours, theirs in REFERENCE_LOCAL.items():
            for end, key in (('', f'emb/{name}|{theirs}'), ('__sd', f'emb/{name}|{theirs}__std')):
                if key in g.z: g.check(key, got[ours + end], tolerance)
        if name in ('zl_a', 'zl_b'):
            for ours, theirs in REFERENCE_GLOBAL.items(): g.check(f'emb/{name}_avg|{theirs}', centres.compute()[ours], tolerance)
    for name in ('yg_a', 'yg_b', 'zg_a', 'zg_b'):
        whole = GlobalSpread(True)
        for i in range(3): whole.update(unit(g(i, name)))
        for ours, theirs in REFERENCE_GLOBAL.items(): g.check(f'emb/{name}|{theirs}', whole.compute()[ours], EXACT)


def recorded_pairs(g):
    n = {k: SampleNumbers(True) for k in ('zl_a_avg;zl_b_avg', 'zg_a;zg_b', 'zl_a;zl_b2a', 'zl_b;zl_a2b', 'zl_a||zl_b', 'b2a', 'a2b', 'retrieval_image', 'retrieval_report')}
    a, b = LocalSpread(True), LocalSpread(True)
    for i in range(3):
        m, wa, wb = (g(i, k) for k in ('mask_b', 'weights_a', 'weights_b'))
        n['zl_a_avg;zl_b_avg'].update(global_alignment(a.update(g(i, 'zl_a')), b.update(g(i, 'zl_b'), m)))
        n['zg_a;zg_b'].update(global_alignment(unit(g(i, 'zg_a')), unit(g(i, 'zg_b'))))
        n['zl_a;zl_b2a'].update(local_alignment(g(i, 'zl_a'), g(i, 'zl_b2a'), None, wa, True))
        n['zl_b;zl_a2b'].update(local_alignment(g(i, 'zl_b'), g(i, 'zl_a2b'), m, wb, True))
        n['zl_a||zl_b'].update(modality_distance(g(i, 'zl_a'), g(i, 'zl_b'), None, m, wa, wb, True))
        n['b2a'].update(attention_statistics(g(i, 'attention_probs_b2a'), None, m, True))
        n['a2b'].update(attention_statistics(g(i, 'attention_probs_a2b'), m, None, True))
        n['retrieval_image'].update(retrieval_of(g(i, 'zl_a'), g(i, 'zl_b2a'), None, wa, True))
        n['retrieval_report'].update(retrieval_of(g(i, 'zl_b'), g(i, 'zl_a2b'), m, wb, True))
    return {k: v.compute() for k, v in n.items()}


NAMES = {'rmse': 'sample_rmse', 'rmse__sd': 'sample_rmse__std', 'distance_min': 'sample_min_dist', 'distance_max': 'sample_max_dist', 'distance_sd': 'sample_std_dist', 'rmse_weighted': 'sample_rmse__weighted'}
BOTH = {'distance': 'dist_emb2emb', 'nearest_from_a': '1NN_emb2emb_2to1', 'nearest_from_b': '1NN_emb2emb_1to2', 'assignment_a': 'assignment_1to1', 'assignment_b': 'assignment_2to2',
        'distance_weighted': 'dist_emb2emb__weighted'}
FOUND = {'places': 'avg_local_size', 'rank': 'avg_retrieval_index', 'top1': 'top_1_acc', 'top5': 'top_5_acc', 'rank_weighted': 'weighted_avg_retrieval_index', 'top1_weighted': 'weighted_top_1_acc',
         'top5_weighted': 'weighted_top_5_acc'}


def test_every_golden_number_is_reproduced():
    g = Recorded()
    check_spread(g)
    c = recorded_pairs(g)
    for pair in ('zl_a_avg;zl_b_avg', 'zg_a;zg_b'):
        for ours, theirs in (('distance', 'dist'), ('distance__sd', 'dist__std')): g.check(f'emb/{pair}|{theirs}', c[pair][ours], EXACT if 'zg' in pair else SHARES)
        g.check(f'emb/{pair}|rmse', math.sqrt(c[pair]['distance_squared']), EXACT if 'zg' in pair else SHARES)
    for pair in ('zl_a;zl_b2a', 'zl_b;zl_a2b'):
        for ours, theirs in NAMES.items(): g.check(f'emb/{pair}|{theirs}', c[pair][ours], SHARES)
    for ours, theirs in BOTH.items(): g.check(f'emb/zl_a||zl_b|{theirs}', c['zl_a||zl_b'][ours], SHARES)
    for way, source in (('b2a', 'b'), ('a2b', 'a')):
        for ours, theirs in (('entropy', 'mean_entropy'), ('entropy_sd', 'std_entropy'), ('distance_to_mean', 'dist_to_mean')): g.check(f'att/{way}|{theirs}', c[way][ours], SHARES)
        for ours, theirs in (('entropy_of_mean', 'entropy'), ('entropy_of_mean__sd', 'entropy__std')): g.check(f'att/{source}|{theirs}', c[way][ours], SHARES)
    for side in ('retrieval_image', 'retrieval_report'):
        for ours, theirs in FOUND.items(): g.check(f'{side}/{theirs}', c[side][ours], EXACT)
    assert g.done == {k for k in g.z if not k.startswith('batch')}  # 149 numbers, none left out


def test_the_default_differs_from_the_golden_where_the_original_is_wrong():
    g = Recorded()
    a, b, m = g(0, 'zl_a'), g(0, 'zl_b'), g(0, 'mask_b')
    ours, theirs = (modality_distance(a, b, None, m, reference=r) for r in (False, True))
    padded = ~m.all(1)
    assert padded.any() and (theirs['nearest_from_a'][padded] == 0).all() and (ours['nearest_from_a'] > 0).all()
    for i in range(4):  # the slow way, sample by sample
        x, y = unit(a[i]), unit(b[i][m[i]])
        torch.testing.assert_close(ours['nearest_from_a'][i], (x[:, None] - y).norm(dim=-1).amin(1).mean())
        torch.testing.assert_close(ours['nearest_from_b'][i], (x[:, None] - y).norm(dim=-1).amin(0).mean())


def test_padding_and_batches_change_nothing():
    x, mask = draw(11, 7, 16, name='x'), torch.arange(7) < torch.tensor([7, 1, 2, 3, 7, 5, 4, 1, 6, 2, 7])[:, None]
    other, w = draw(11, 7, 16, name='o'), torch.rand(11, 7, generator=torch_generator('w')).double() * mask
    w = w / w.sum(1, keepdim=True)
    longer = lambda v: torch.cat([v, draw(11, 3, 16, name='pad')], 1)
    more, weights = torch.cat([mask, torch.zeros(11, 3).bool()], 1), torch.cat([w, torch.zeros(11, 3)], 1)
    for f in (lambda v, o, m, u: local_spread(v, m, u), local_alignment, retrieval_of, lambda v, o, m, u: modality_distance(v, o, m, m, u, u)):
        short, long = f(x, other, mask, w), f(longer(x), longer(other), more, weights)
        for k in short: torch.testing.assert_close(short[k], long[k], equal_nan=True)
    tables = []
    for size in (1, 3, 11):
        s = LocalSpread()
        for i in range(0, 11, size): s.update(x[i:i + size], mask[i:i + size])
        tables.append(s.compute())
    for t in tables[1:]: assert t == pytest.approx(tables[0], nan_ok=True)


def test_numbers_are_those_of_the_formulas():
    x = draw(5, 6, 8, name='f')
    got, u = local_spread(x), unit(x)
    s = LocalSpread(); s.update(x)
    for i in range(5):
        pairs = torch.pdist(u[i])
        assert float(got['uniformity_within'][i]) == pytest.approx(float((-2 * pairs ** 2).exp().mean().log()))
        assert float(got['distance_within'][i]) == pytest.approx(float(pairs.mean()))
        c = torch.cov(u[i].T)
        assert float(got['covariance_within'][i]) == pytest.approx(float((c - c.diagonal().diag()).square().sum() / 8))
    c = torch.stack([torch.cov(v.T) for v in u]).mean(0) + torch.cov(u.mean(1).T)
    assert s.compute()['covariance'] == pytest.approx(float((c - c.diagonal().diag()).square().sum() / 8))
    pairs = torch.pdist(u[:, 0])
    uniformity, distance = pair_statistics(u[:, 0], block=2)
    assert uniformity == pytest.approx(float((-2 * pairs ** 2).exp().mean().log())) and distance == pytest.approx(float(pairs.mean()))
    assert all(math.isnan(v) for v in pair_statistics(u[:1, 0]))


def test_assignment_is_a_half_where_nothing_tells_the_kinds_apart():
    a, b = draw(400, 20, 32, name='aa'), draw(400, 6, 32, name='bb')
    for m in (2, 4, 6):
        mask = (torch.arange(6) < m).expand(400, 6)
        ours, theirs = (modality_distance(a, b, None, mask, reference=r) for r in (False, True))
        assert abs(ours['assignment_a'].mean() - .5) < .01 and abs(ours['assignment_b'].mean() - .5) < .01
        assert theirs['assignment_b'].mean() > .53
    far = modality_distance(a + 50 * draw(32, name='there'), b - 50 * draw(32, name='there'))
    assert far['assignment_a'].min() > .99
    alone = modality_distance(a, b, None, (torch.arange(6) < 1).expand(400, 6))
    assert alone['assignment_b'].isnan().all() and alone['assignment_a'].isnan().all()


def test_a_collapsed_model_finds_nothing():
    same = torch.ones(3, 8, 4)
    ours, theirs = retrieval_of(same, same), retrieval_of(same, same, reference=True)
    assert ours['top1'].tolist() == pytest.approx([1 / 8] * 3) and ours['rank'].tolist() == pytest.approx([3.5] * 3)
    assert theirs['top1'].tolist() == [1, 1, 1]


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match='sample 1 of the batch has no real place'): local_spread(torch.ones(2, 3, 4), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match='local vectors are'): local_spread(torch.ones(2, 4))
    with pytest.raises(ValueError, match='a mask of'): local_alignment(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 2))


def test_intervals_agree_with_those_of_maps():
    rng = numpy_rng('intervals')
    values, patients = rng.normal(size=60), rng.integers(0, 20, 60)
    row, other = patient_intervals(values, patients, 500, 3).iloc[0], mean_estimate(values, patients, 500, 3)
    assert (row.value, row.low, row.high) == pytest.approx((other.value, other.low, other.high))
    assert (row.n, row.patients) == (60, 20)
    assert np.isnan(patient_intervals(values[:3], ['a', 'a', 'a'], 50).low.iloc[0])


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A phantom, and an untrained LoVT with its dataset."
    data = prepared_chest_phantom(tmp_path_factory.mktemp('phantom'), 12, (64, 64), difficulty='easy')
    lovt = new_method('lovt', 'smoke', list(data.manifest.report))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return data, lovt, ChestReportDataset(data, lovt.tokenizer, ChestReportConfig(), train=False)


@pytest.mark.parametrize('name', ['clip', 'convirt', 'byol', 'simclr', 'pixelpro', 'supervised', 'initialised'])
def test_every_method_can_be_analysed(world, name):
    data, lovt, reports = world
    method = new_method(name, 'smoke', list(data.manifest.report), **({'image_encoder': 'resnet-tiny'} if name == 'initialised' else {'labels': tuple(data.labels)} if name == 'supervised' else {}))
    text = hasattr(method, 'read_texts')
    found = analyse(method, ChestReportDataset(data, method.tokenizer, ChestReportConfig(), train=False) if text else ChestImageDataset(data, ()), n_boot=20)
    spaces = {'image_features', 'region_features'} | ({'images', 'texts', 'images;texts', 'text_features', 'sentence_features'} if text else set())
    assert set(found.table.space) == spaces and found.table.value.notna().all()
    assert found.vectors['image_features'].shape == (12, 128)
    plot_spread([found]); plot_smoothness([found])


def test_lovt_has_all_spaces_and_its_mode_is_restored(world):
    data, lovt, reports = world
    lovt.train()
    found = analyse(lovt, reports, batch_size=5, n_boot=50)
    assert lovt.training
    lovt.eval()
    assert {'regions', 'sentences', 'regions+sentences', 'regions||sentences', 'regions;attended', 'sentences;attended', 'region attention', 'sentence attention'} <= set(found.table.space)
    stated = found.table[found.table.note == '']
    agreed = stated[stated.low.isna()]
    assert (agreed.sd < 1e-9).all(), agreed # no interval of no width
    stated = stated.drop(agreed.index)
    assert ((stated.low <= stated.value) & (stated.value <= stated.high)).all()
    assert found.maps['pooling weight'].sum() == pytest.approx(1) and found.maps['image'].shape == (64, 64)
    assert found.samples.patient_id.nunique() == 12
    for plot in (plot_alignment, plot_assignment, plot_weights): plot([found])
    d = paired_analysis(found, analyse(lovt, reports, batch_size=12, n_boot=0), 50)
    assert d.difference.abs().max() < 1e-4
    with evaluating(lovt): f = read_batch(lovt, reports.collate([reports[0], reports[1]]))
    assert found.value('image_features', 'std') > 0 and f['regions'].shape[1] == 4


def test_vectors_that_are_not_finite_are_named(world):
    data, lovt, reports = world
    broken = new_method('byol', 'smoke')
    with torch.no_grad(): broken.image_encoder.conv1.weight.fill_(float('nan'))
    with pytest.raises(DataError, match='not finite'): analyse(broken, ChestImageDataset(data, ()))
    with pytest.raises(TypeError, match='analyse needs feature_maps'): analyse(torch.nn.Linear(2, 2), reports)


class Oracle:
    "Attends to nothing but the place that a sentence speaks of."
    def __init__(self, data, blur=0): self.data, self.training, self.local = data, False, True
    device = torch.device('cpu')
    def modules(self): return []
    def eval(self): return self
    def attention_maps(self, images, texts):
        i = next(k for k in range(len(self.data)) if np.array_equal(self.data.images[int(self.data.manifest.row[k])], images[0, 0].numpy()))
        places, maps = sentence_places(self.data, self.data.manifest.image_id[i]), torch.zeros(1, len(texts[0]), 64, 64)
        for k, b in enumerate(places[['x0', 'y0', 'x1', 'y1']].fillna(0).to_numpy().round().astype(int)): maps[0, k, b[1]:b[3], b[0]:b[2]] = 1
        return torch.nn.functional.avg_pool2d(maps, 4), torch.ones(1, len(texts[0]), dtype=torch.bool)


def test_sentence_maps_tell_an_oracle_from_chance(world):
    data, lovt, _ = world
    scores = evaluate_sentence_maps(Oracle(data), data)
    table = sentence_table(scores, 100).set_index(['map_of', 'metric'])
    assert table.loc[('sentence', 'pointing'), 'value'] > .9 and table.loc[('sentence', 'energy'), 'value'] > .8
    for baseline in ('another sentence', 'centre', 'random'): assert table.loc[(baseline, 'energy'), 'gain_low'] > .1
    assert (scores.share <= .5).all() and (scores.region != '').all()
    untrained = sentence_table(evaluate_sentence_maps(lovt, data), 100).set_index(['map_of', 'metric'])
    assert abs(untrained.loc[('another sentence', 'energy'), 'gain']) < .05


def test_sentence_maps_refuse_what_they_cannot_draw(world):
    data, lovt, _ = world
    image = torch.from_numpy(np.array(data.images[0]))[None]
    with pytest.raises(ValueError, match='attention'): sentence_maps(new_method('clip', 'smoke', ['no mass.']), image, ['No mass.'])
    with pytest.raises(DataError, match='sentences fit'): sentence_maps(lovt, image, ['Clear lungs without any consolidation.'] * 200)
    places = sentence_places(data, data.manifest.image_id[0])
    places = places[(places.region != '') & (places.share > 0) & (places.share <= .5)].iloc[:3].reset_index(drop=True) # sentences that are scored
    flat = pd.DataFrame(score_sentences(torch.ones(len(places), 2, 2), places, (64, 64), numpy_rng('flat')))
    mine = flat[flat['map_of'] == 'sentence']
    assert np.allclose(mine.energy, mine.chance)


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match='neither a training nor a localized evaluation'): collect_runs([tmp_path])
