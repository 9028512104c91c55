"The frozen probe bench: head, exams, two intervals, refusals."
import numpy as np
import pandas as pd
import pytest
import torch

from medvl.core.errors import DataError
from medvl.data.phantom.populations import new_phantom
from medvl.evaluate.protocols.exam_probabilities import bench_metrics, exam_table, write_exam_csv
from medvl.evaluate.protocols.probe_bench import bench_target, judged_exams, named_backbone, probe_bench, probe_of
from medvl.evaluate.protocols.probe_head import ProbeHead, ProbeHeadConfig, cancer_options, macro_auroc, train_head


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    home = tmp_path_factory.mktemp('bench')
    return {n: new_phantom('breast', home/n, c, (48, 32), seed=s) for s, (n, c) in enumerate((('a', 40), ('b', 16)))}


def test_the_benchmark_s_numbers_are_the_defaults():
    c, rare = ProbeHeadConfig(), cancer_options()
    assert (c.epochs, c.patience, c.batch, c.lr, c.weight_decay, c.warmup, c.clip, c.alpha, c.seed) == (20, 8, 128, 1e-3, 0, .05, 1.0, 0, 42)
    assert (rare.epochs, rare.patience, rare.alpha) == (15, 7, .3)
    head = ProbeHead(5, 2)
    assert head.norm.eps == 1e-6 and not head.norm.affine


def test_head_stops_and_keeps_the_best_epoch():
    r = np.random.default_rng(0)
    x, y = r.normal(size=(60, 4)).astype(np.float32), r.integers(0, 2, 60)
    head, history = train_head(x, y, (x[:20], y[:20]), 2, ProbeHeadConfig(epochs=40, patience=2, lr=.05))
    best = max(h['valid_auroc'] for h in history)
    assert len(history) <= 40 and macro_auroc(y[:20], head.probabilities(x[:20])) == pytest.approx(best)
    state = torch.get_rng_state()
    train_head(x, y, (x[:20], y[:20]), 2, ProbeHeadConfig(epochs=1))
    assert torch.equal(state, torch.get_rng_state())


def test_rare_classes_are_drawn_more_often():
    from medvl.evaluate.protocols.probe_head import _order
    y = np.array([0]*90 + [1]*10)
    shares = [np.mean(y[_order(y, cancer_options(seed=s), 0)]) for s in range(20)]
    weight = 10**.7/(10**.7 + 90**.7)
    assert abs(np.mean(shares) - weight) < .03 and sorted(_order(y, ProbeHeadConfig(), 3)) == list(range(100))


def test_exam_score_is_the_largest_made_to_sum_to_one(tmp_path):
    p = np.array([[.6, .4], [.1, .9], [.8, .2]])
    t = exam_table(p, [0, 1, 0], ['e1', 'e1', 'e2'], ['p', 'p', 'q'])
    assert t[['prob_0', 'prob_1']].to_numpy() == pytest.approx(np.array([[.4, .6], [.8, .2]]))
    assert t.label.tolist() == [1, 0] and t.patient_id.tolist() == ['p', 'q']
    assert pd.read_csv(write_exam_csv(t, tmp_path/'x.csv')).columns.tolist() == ['exam_id', 'num_images', 'prob_0', 'prob_1', 'label']


def test_patients_widen_the_interval():
    r = np.random.default_rng(1)
    ill = r.random(25) < .4
    score = np.clip(.5 + .1*ill + .2*r.normal(size=25), .01, .99)
    p = np.repeat(np.stack([1 - score, score], 1), 8, 0)
    t = exam_table(p, np.repeat(ill, 8), np.arange(200).astype(str), np.repeat(np.arange(25), 8).astype(str))
    m = bench_metrics(t, n_boot=300).set_index('metric').loc['macro_auroc']
    assert m.high - m.low > 1.8*(m.row_high - m.row_low) and m.exams == 200 and m.patients == 25
    one = exam_table(p[::8], ill, np.arange(25).astype(str))
    same = bench_metrics(one, n_boot=400).set_index('metric').loc['macro_auroc']
    assert abs((same.high - same.low)/(same.row_high - same.row_low) - 1) < .35


def test_bench_learns_what_is_in_the_features_and_says_what_it_cannot(sets, tmp_path):
    "A backbone that sees the label is found out, across sets too; shared patients and absent labels are refused in words."
    class Seeing(type(named_backbone('random:resnet-tiny'))):
        def image_features(self, images): return torch.cat([images.float().mean((1, 2, 3))[:, None]]*2, 1)/255
    seeing = named_backbone('random:resnet-tiny')
    seeing.__class__ = Seeing
    bright, limit = {}, np.median([sets['a'].image(i).mean() for i in range(len(sets['a']))])
    for n, s in sets.items():
        s = s.subset(np.arange(len(s)))
        s.manifest = s.manifest.assign(label_bright=[float(s.image(i).mean() > limit) for i in range(len(s))], label_never=0.0)
        bright[n] = s
    result = probe_bench({'seeing': seeing}, bright, ('bright', 'never'), config=ProbeHeadConfig(lr=.05), n_boot=50, control='none', folder=tmp_path)
    t = result.table[result.table.metric == 'macro_auroc'].set_index(['train', 'test']).value
    assert t['a', 'b'] > .9 and t['a', 'a'] > .9
    refused = result.table[result.table.label == 'never']
    assert refused.value.isna().all() and refused.note.str.contains('one class only').all()
    assert len(result.write(tmp_path/'csv')) == len(result.exams) >= 2


def test_no_number_where_provenance_tells(sets, tmp_path):
    method = named_backbone('random:resnet-tiny')
    marked = sets['a'].subset(np.arange(len(sets['a'])))
    drawn = np.random.default_rng(0).random(marked.manifest.patient_id.nunique()) < .5
    ill = marked.manifest.patient_id.map(dict(zip(marked.manifest.patient_id.unique(), drawn))).to_numpy()
    m = marked.manifest.assign(label_ill=ill.astype(float), orig_width=np.where(ill, 100, 90)) # another copy, another width
    marked.manifest = m
    refused = probe_bench({'r': method}, {'marked': marked}, ('ill',), config=ProbeHeadConfig(epochs=1), n_boot=100, folder=tmp_path)
    assert refused.table.value.isna().all() and 'FIRES for ill' in refused.table.note[0]
    shown = probe_bench({'r': method}, {'marked': marked}, ('ill',), config=ProbeHeadConfig(epochs=1), n_boot=100, control='mark', folder=tmp_path)
    assert shown.table.value.notna().all() and shown.table.note.str.contains('FIRES').all()


def test_bad_input(sets):
    method = named_backbone('random:resnet-tiny')
    with pytest.raises(ValueError, match='mass'): bench_target(sets, 'mss')
    target = bench_target(sets, 'mass')
    empty = sets['a'].subset(np.arange(len(sets['a'])))
    empty.manifest = empty.manifest.assign(label_mass=0.0)
    with pytest.raises(DataError, match='one class only'): probe_of(np.zeros((len(empty), 3)), empty, target, ProbeHeadConfig())
    with pytest.raises(DataError, match='one class only'): judged_exams(ProbeHead(3, 2), np.zeros((len(empty), 3)), empty, target)
    with pytest.raises(ValueError, match='across'): probe_bench({'r': method}, sets, ('mass',), across='x')
    assert named_backbone('nowhere') is None
