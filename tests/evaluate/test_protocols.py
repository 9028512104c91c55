"""Protocols: what may be chosen where, embeddings once, zero-shot and linear probe against the originals and scikit-learn."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import Grey, made, made_embeddings
from sklearn.linear_model import LogisticRegression

from golden import golden
from medvl.core.errors import DataError
from medvl.core.paths import read_json
from medvl.evaluate.protocols.embeddings import embed, open_embeddings, weights_digest
from medvl.methods.base import evaluating
from medvl.evaluate.protocols.linear_probe import CS, fit_candidates, linear_probe, targets_of
from medvl.evaluate.protocols.logistic import fit_binary, fit_softmax, minimise
from medvl.evaluate.metrics.curves import auroc, balanced_accuracy, class_accuracy
from medvl.evaluate.metrics.rank import NotComputable
from medvl.evaluate.stats.scored import LeakError, Scored, aggregate, scored_at
from medvl.evaluate.stats.selection import Threshold, assert_apart, at_chosen, choose, choose_threshold, splits_of
from medvl.evaluate.stats.tables import compare_scored, evaluate_scored
from medvl.evaluate.protocols.zero_shot import TASKS, Task, class_probabilities, class_vectors, tasks_of, zero_shot


@pytest.fixture(scope='module')
def data(tmp_path_factory): return made(tmp_path_factory.mktemp('made') / 'data')


def simple(split, n=300, seed=0, task='mass'):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < .3).astype(float)
    return Scored(task, split, y, y + rng.normal(size=n), pd.DataFrame(dict(patient_id=[f'{split}{i // 3}' for i in range(n)])))


# ------------------------------------------------------------------------------------------------ units

def test_golden_aggregation():
    d = np.load(golden('mammoclip/metrics.npz'))
    m = pd.DataFrame(dict(patient_id=d['agg_input_patient'], laterality=d['agg_input_lat'], image_id=np.arange(len(d['agg_input_lat'])))).sort_values(['patient_id', 'laterality'], kind='stable')
    s, y, frame = aggregate(d['agg_input_pred'][m.index], d['agg_input_cancer'][m.index], m, 'breast', label_how='mean')
    np.testing.assert_allclose(s, d['agg_pred'], atol=1e-12); np.testing.assert_allclose(y, d['agg_cancer'], atol=1e-12)
    assert auroc(y, s) == float(d['agg_auroc'])


def test_aggregation_rules(data):
    m = data.manifest
    rng = np.random.default_rng(0)
    s, y = rng.random((len(m), 2)), np.stack([m.label_mass, np.full(len(m), np.nan)], 1)
    for unit, keys in dict(breast=['patient_id', 'laterality'], exam=['patient_id'], patient=['patient_id']).items():
        us, uy, frame = aggregate(s, y, m, unit, 'max')
        ref = m.assign(s=s[:, 0], y=y[:, 0]).groupby(keys, sort=False).agg(s=('s', 'max'), y=('y', 'max'))
        np.testing.assert_array_equal(us[:, 0], ref.s); np.testing.assert_array_equal(uy[:, 0], ref.y)
        assert np.isnan(uy[:, 1]).all() and len(frame) == len(ref)
        assert list(frame.patient_id) == list(ref.reset_index().patient_id) and frame.view.isna().all() and frame.density.notna().all()
    with pytest.raises(ValueError, match="'breast'"): aggregate(s, y, m, 'brest')
    with pytest.raises(ValueError, match='score NaN at row 3'): aggregate(np.where(np.arange(len(m)) == 3, np.nan, .5), y[:, 0], m)
    with pytest.raises(ValueError, match='must be aligned'): aggregate(s[:5], y[:5], m)


# ------------------------------------------------------------------------------------------------ selection

def test_only_validation_may_choose():
    valid, test, train = simple('valid'), simple('test'), simple('train')
    for wrong in (test, train):
        with pytest.raises(LeakError, match='may only use valid data'): choose_threshold(wrong)
        with pytest.raises(LeakError, match='may only use valid data'): choose({'a': valid, 'b': wrong})
        with pytest.raises(LeakError): evaluate_scored({'mass': test}, {'mass': wrong}, n_boot=8)
    with pytest.raises(TypeError, match='knows its split'): choose_threshold((valid.labels, valid.scores))
    with pytest.raises(LeakError): Threshold('mass', .5, 'youden', None, 'image', 10, 5, split='test')
    with pytest.raises(LeakError, match="tagged"): Scored('mass', 'valid', test.labels, test.scores, test.frame.assign(split='test'))
    with pytest.raises(DataError, match='patient_id'): Scored('mass', 'valid', test.labels, test.scores, pd.DataFrame(dict(x=range(300))))


@pytest.mark.parametrize('rule, target', [('youden', None), ('f1', None), ('specificity', .8), ('sensitivity', .9)])
def test_thresholds_are_optimal(rule, target):
    from sklearn.metrics import f1_score
    v = simple('valid', seed=3)
    t = choose_threshold(v, rule, target).value
    y, s = v.labels == 1, v.scores
    sens, spec = lambda t: (s[y] >= t).mean(), lambda t: (s[~y] < t).mean()
    every = [*s, np.inf]
    if rule == 'youden': assert sens(t) + spec(t) == pytest.approx(max(sens(u) + spec(u) for u in every))
    if rule == 'f1': assert f1_score(y, s >= t) == pytest.approx(max(f1_score(y, s >= u) for u in s))
    if rule == 'specificity': assert spec(t) >= .8 and sens(t) == max(sens(u) for u in every if spec(u) >= .8)
    if rule == 'sensitivity': assert sens(t) >= .9 and spec(t) == max(spec(u) for u in every if sens(u) >= .9)


def test_threshold_corner_cases():
    frame = pd.DataFrame(dict(patient_id=range(4)))
    worst = Scored('m', 'valid', np.array([1., 1, 0, 0]), np.array([.1, .2, .8, .9]), frame)
    t = choose_threshold(worst, 'specificity', 1.)
    assert t.value > .9                                              # nothing is called positive rather than a broken promise
    with pytest.raises(NotComputable): choose_threshold(Scored('m', 'valid', np.ones(4), worst.scores, frame))
    with pytest.raises(ValueError, match='0..1'): choose_threshold(worst, 'specificity', 90)
    with pytest.raises(ValueError, match='unknown rule'): choose_threshold(worst, 'best')
    test = simple('test')
    table = at_chosen(choose_threshold(simple('valid')), test, n_boot=64)
    assert table.set_index('metric').value['balanced_accuracy'] == pytest.approx(balanced_accuracy(test.labels, test.scores, table.threshold[0]))
    with pytest.raises(ValueError, match='chosen for mass per image'): at_chosen(choose_threshold(simple('valid')), simple('test', task='other'))


def test_splits_must_be_there_and_apart(data, tmp_path):
    parts = splits_of(data, ('train', 'valid', 'test'))
    assert sum(map(len, parts.values())) == len(data) and 'No leak' in assert_apart(parts)
    with pytest.raises(DataError, match="no images in the split 'valid'"): splits_of({'train': data}, ('valid',))
    leaky = data.subset(np.arange(len(data)))
    leaky.manifest.loc[0, 'patient_id'] = leaky.manifest.patient_id.iloc[-1]
    with pytest.raises(DataError, match='patient'): assert_apart(splits_of(leaky))
    external = made(tmp_path / 'x', patients=4, seed=99, split=('test',), name='x')
    assert 'several folders' in assert_apart({'train': parts['train'], 'test': external})
    copy = made(tmp_path / 'y', patients=60, seed=0, split=('test',), name='y')      # the same pixels under other names
    with pytest.raises(DataError, match='the splits leak: image'): assert_apart({'train': parts['train'], 'test': copy})
    for call in (lambda: zero_shot(Grey(), leaky), lambda: linear_probe(None, leaky, embeddings=made_embeddings(leaky))):
        with pytest.raises(DataError, match='the split leaks'): call()


# ------------------------------------------------------------------------------------------------ embeddings

def test_embeddings_are_the_methods_and_cached(data, tmp_path):
    method = Grey()
    method.drop.train(); method.anchor.requires_grad_(False)
    e = embed(method, data, tmp_path, batch_size=7)
    assert method.drop.training and e.arrays['feature'].shape == (len(data), 6)
    with evaluating(method): direct = method.image_features(torch.from_numpy(data.images.read(np.arange(len(data)))).unsqueeze(1)).numpy()
    np.testing.assert_allclose(e.arrays['feature'], direct, atol=1e-5)
    calls = method.calls
    embed(method, data, tmp_path)
    relabelled = data.subset(np.arange(len(data)))
    relabelled.manifest['label_mass'] = 1.
    embed(method, relabelled, tmp_path)                              # labels do not matter
    assert method.calls == calls
    np.testing.assert_array_equal(e.of(data.subset([5, 2]), 'feature'), e.arrays['feature'][[5, 2]])


def test_another_models_cache_is_refused(data, tmp_path):
    a, b = Grey(), Grey(seed=1)
    embed(a, data, tmp_path)
    home = next(p for p in tmp_path.iterdir())
    with pytest.raises(DataError, match='other weights'): open_embeddings(home, method=b)
    with pytest.raises(DataError, match='other images'): open_embeddings(home, prepared=data.subset(np.arange(8)))
    a.anchor.data += 1                                               # one changed weight
    with pytest.raises(DataError, match='other weights'): open_embeddings(home, method=a)
    assert weights_digest(Grey()) == weights_digest(Grey()) != weights_digest(b)
    embed(b, data, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('die', [6, 200])
def test_killed_embedding_continues_to_the_same_bits(data, tmp_path, die):
    script = [sys.executable, str(Path(__file__).parents[1]/'evaluation.py'), str(data.folder), str(tmp_path / 'k'), str(die)]
    assert subprocess.run(script, capture_output=True).returncode == -9
    home = next((tmp_path / 'k').iterdir())
    assert not (home / 'embeddings.json').exists()
    method = Grey()
    again = embed(method, data, tmp_path / 'k', batch_size=4, what='feature')
    if die > 70: assert method.calls <= len(data) - 64 + 1           # what had been saved was not computed again
    whole = embed(Grey(), data, tmp_path / 'w', batch_size=4, what='feature')
    np.testing.assert_array_equal(again.arrays['feature'], whole.arrays['feature'])


def test_damaged_caches_and_bad_vectors(data, tmp_path):
    with pytest.raises(DataError, match="image 'pi9' is not finite"): embed(Grey(nan_at=10), data, tmp_path / 'n', batch_size=4, what='feature')
    embed(Grey(), data, tmp_path / 'c', what='feature')
    home = next((tmp_path / 'c').iterdir())
    (home / 'feature.npy').write_bytes((home / 'feature.npy').read_bytes()[:200])
    with pytest.raises(DataError, match='feature.npy'): embed(Grey(), data, tmp_path / 'c', what='feature')
    with pytest.raises(TypeError, match='embed needs encode_image, image_features'): embed(torch.nn.Linear(2, 2), data, tmp_path)
    with pytest.raises(ValueError, match='cannot embed'): embed(Grey(), data, tmp_path, what='text')
    with pytest.raises(DataError, match='no images'): embed(Grey(), data.subset([]), tmp_path)
    with pytest.raises(DataError, match='unfinished'): open_embeddings(tmp_path / 'nothing')


# ------------------------------------------------------------------------------------------------ zero-shot

def test_golden_zero_shot():
    d = np.load(golden('mammoclip/metrics.npz'))
    image, raw = d['zs_image_emb'], lambda n: d[f'zs_text_raw_{n}']
    for task, names, labels in (('mass', ('no_mass', 'mass'), 'zs_mass'), ('malignancy', ('no_malignancy', 'malignancy'), 'zs_cancer'),
                                ('suspicious_calcification', ('no_suspicious_calcification', 'suspicious_calcification'), 'zs_calc')):
        p = class_probabilities(image, np.stack([raw(n) for n in names]))
        assert abs(auroc(d[labels], p[:, 1]) - d[f'zs_result_{task}']) < 1e-9, task
        if task == 'mass': np.testing.assert_allclose(p, d['zs_mass_softmax'], atol=1e-6)
    p = class_probabilities(image, np.stack([raw(n) for n in 'abcd']))
    assert abs(class_accuracy(d['zs_density'], p) - d['zs_result_density']) < 1e-12


def test_prompts_are_averaged_before_normalisation():
    task = Task('mass', (('no mass', 'fatty breast'), ('mass',)))
    v = class_vectors(Grey(), task)
    expected = np.array([-2., 2]) + np.array([1., 1])
    np.testing.assert_allclose(v[0], expected / np.linalg.norm(expected), atol=1e-7)


def test_zero_shot_protocol(data, tmp_path):
    r = zero_shot(Grey(), data, folder=tmp_path, n_boot=64)
    t = r.table
    assert list(t.columns[:7]) == ['task', 'metric', 'value', 'low', 'high', 'unit', 'n'] and {'patients', 'split', 'note'} <= set(t.columns)
    assert set(t.task) == {'mass', 'suspicious_calcification', 'malignancy', 'density'} and set(t.split) == {'test'}
    m = data.manifest[data.manifest.split == 'test']
    grey = data.images.read(m.row.to_numpy()).reshape(len(m), -1).mean(1)
    assert t.query("task == 'mass' and metric == 'auroc'").value.item() == pytest.approx(auroc(m.label_mass, grey), abs=.005)
    row = t.query("task == 'malignancy' and metric == 'auroc'").iloc[0]
    assert row.n == (m.pathology != '').sum() and row.n_dropped == (m.pathology == '').sum()
    assert set(r.scores.split) == {'valid', 'test'} and list(r.scores.query("split == 'test'").image_id) == list(m.image_id)
    assert set(r.evaluation.calibration.scaling) == {'none', 'temperature', 'platt'}
    valid = r.scored['valid']['mass']
    assert r.evaluation.thresholds['mass', 'youden'] == choose_threshold(valid)


def test_zero_shot_units_sets_and_reasons(data, tmp_path):
    breast = zero_shot(Grey(), data, 'mammo_ensemble', unit='breast', folder=tmp_path, n_boot=32)
    assert set(breast.table.unit) == {'breast'} and breast.table.query("metric == 'auroc' and task == 'mass'").n.item() <= 24
    own = zero_shot(Grey(), data, {'implant': ('no implant', 'implant')}, folder=tmp_path, n_boot=32)
    assert own.table.note.item().startswith("not computable: the task 'implant' finds no truth")
    with pytest.raises(ValueError, match="'mammo'"): zero_shot(Grey(), data, 'mamo')
    with pytest.raises(ValueError, match="'test'"): zero_shot(Grey(), data, split='tset')
    with pytest.raises(TypeError, match='zero_shot needs encode_image'): zero_shot(torch.nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match='same name'): tasks_of(['mammo', Task('mass', (('a',), ('b',)))])


def test_external_set_has_no_splits(tmp_path):
    outside = made(tmp_path / 'd', patients=12, seed=5, split=('',))
    r = zero_shot(Grey(), outside, {'mass': ('no mass', 'mass')}, split=None, folder=tmp_path / 'c', n_boot=32)
    assert r.table.query("metric == 'auroc'").n.item() == outside.manifest.label_mass.notna().sum() and not r.evaluation.thresholds
    with pytest.raises(DataError, match="no images in the split 'test'"): zero_shot(Grey(), outside)


def test_prompt_sets_are_complete():
    for name in TASKS:
        for t in tasks_of(name): assert len(t.prompts) in (2, 4, 5) and all(p == p.strip().lower() for c in t.prompts for p in c)
    assert [p for t in TASKS['mammo'] for c in t.prompts for p in c][:4] == ['no mass', 'mass', 'no suspicious calcification', 'suspicious calcification']


# ------------------------------------------------------------------------------------------------ linear probe

@pytest.mark.parametrize('class_weight', [None, 'balanced'])
def test_logistic_equals_sklearn(class_weight):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(250, 30))
    y = (x @ rng.normal(size=(30, 4)) + 3 * rng.logistic(size=(250, 4)) > 3).astype(float)
    y[:50, 2] = np.nan
    y[:, 3] = 0
    Cs = (1e-4, .01, 1.)
    w, b, solution = fit_binary(x, y, Cs, class_weight)
    assert solution.converged.all() and np.isnan(w[3]).all()
    for j in range(3):
        rows = ~np.isnan(y[:, j])
        weights = np.where(y[rows, j] == 1, (y[rows, j] == 0).sum() / y[rows, j].sum(), 1) if class_weight else None
        for i, C in enumerate(Cs):
            ref = LogisticRegression(C=C, tol=1e-12, max_iter=10000, solver='newton-cholesky').fit(x[rows], y[rows, j], weights)
            assert np.abs(w[j, i] - ref.coef_[0]).max() < 1e-6 and abs(b[j, i] - ref.intercept_[0]) < 1e-6


def test_softmax_equals_sklearn_and_skips_absent_classes():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 8)), rng.integers(0, 3, 200).astype(float)
    x[:, 0] += y
    y[y == 1] = 3
    y[:20] = np.nan
    w, b, _ = fit_softmax(x, y, 4, (.01, 1.))
    ref = LogisticRegression(C=1., tol=1e-12, max_iter=10000).fit(x[20:], y[20:])
    np.testing.assert_allclose(w[1][[0, 2, 3]], ref.coef_, atol=1e-6)
    np.testing.assert_allclose(b[1][[0, 2, 3]] - b[1][0], ref.intercept_ - ref.intercept_[0], atol=1e-6)
    assert (w[:, 1] == 0).all() and (b[:, 1] < -20).all()
    with pytest.raises(ValueError, match='needs two classes'): fit_softmax(x, np.zeros(200), 4)


def test_minimise_says_when_it_did_not_converge():
    rosenbrock = lambda x, which: ((1 - x[:, 0])**2 + 100 * (x[:, 1] - x[:, 0]**2)**2,
                                   torch.stack([-2 * (1 - x[:, 0]) - 400 * x[:, 0] * (x[:, 1] - x[:, 0]**2), 200 * (x[:, 1] - x[:, 0]**2)], 1))
    start = torch.tensor([[-1.2, 1], [0, 0], [1, 1]]).double()
    assert minimise(rosenbrock, start, max_steps=3).converged.tolist() == [False, False, True]
    np.testing.assert_allclose(minimise(rosenbrock, start).x, 1, atol=1e-6)


def test_linear_probe_equals_doing_it_by_hand(data):
    e = made_embeddings(data)
    r = linear_probe(None, data, 'mass', embeddings=e, n_boot=64)
    m, x = data.manifest, e.arrays['feature'].astype(float)
    rows = {s: ((m.split == s) & m.label_mass.notna()).to_numpy() for s in ('train', 'valid', 'test')}
    train = (m.split == 'train').to_numpy()
    z = (x - x[train].mean(0)) / x[train].std(0)                      # TRAIN statistics
    fits = {C: LogisticRegression(C=C, tol=1e-10, max_iter=10000).fit(z[rows['train']], m.label_mass[rows['train']]) for C in CS}
    on = lambda C, s: auroc(m.label_mass[rows[s]], fits[C].decision_function(z[rows[s]]))
    best = max(CS, key=lambda C: on(C, 'valid'))
    row = r.table.query("metric == 'auroc'").iloc[0]
    assert row.C == best and row.value == pytest.approx(on(best, 'test'), abs=1e-9)
    test = r.predictions.query("split == 'test'")
    np.testing.assert_allclose(test.score_mass, fits[best].predict_proba(z[(m.split == 'test').to_numpy()])[:, 1], atol=1e-5)
    assert row.train_patients == m[train].patient_id.nunique() and set(r.table.split) == {'test'}


def test_test_rows_decide_nothing(data):
    "Destroying the test labels and vectors changes no chosen strength, threshold, map or coefficient."
    e, broken = made_embeddings(data), data.subset(np.arange(len(data)))
    test = (data.manifest.split == 'test').to_numpy()
    broken.manifest.loc[test, 'label_mass'] = 1 - broken.manifest.label_mass[test]
    arrays = {k: np.where(test[:, None], v[::-1] * 7, v) for k, v in e.arrays.items()}
    a = linear_probe(None, data, ['mass', 'density'], embeddings=e, n_boot=16)
    b = linear_probe(None, broken, ['mass', 'density'], embeddings=type(e)(e.ids, arrays, {}), n_boot=16)
    assert a.evaluation.thresholds == b.evaluation.thresholds and a.evaluation.scalings == b.evaluation.scalings
    for t in ('mass', 'density'): np.testing.assert_array_equal(a.probes[1., 0][t].weight, b.probes[1., 0][t].weight)
    assert not np.allclose(a.table.value.iloc[0], b.table.value.iloc[0])


def test_fractions_are_nested_patients(data, monkeypatch):
    import medvl.evaluate.protocols.linear_probe as module
    seen = {}
    real = module.fit_candidates
    def spy(features, manifest, *args):
        seen.setdefault('fits', []).append(set(manifest.image_id))
        return real(features, manifest, *args)
    monkeypatch.setattr(module, 'fit_candidates', spy)
    r = linear_probe(None, data, ['mass'], embeddings=made_embeddings(data), fractions=(.25, .5, 1), seeds=(0, 1), n_boot=16)
    full, half0, half1, quarter0, quarter1 = seen['fits']
    assert quarter0 < half0 < full and quarter1 < half1 < full and half0 != half1
    patients = data.manifest.set_index('image_id').patient_id
    for part in seen['fits']: assert all(set(patients.index[patients == p]) <= part for p in set(patients[list(part)]))
    assert list(r.probes) == [(1., 0), (.5, 0), (.5, 1), (.25, 0), (.25, 1)]
    assert r.over_seeds().query("metric == 'auroc' and fraction == .5").seeds.item() == 2


def test_linear_probe_reasons_and_refusals(data):
    e, odd = made_embeddings(data), data.subset(np.arange(len(data)))
    odd.manifest['label_never'] = np.float32(0)
    odd.manifest['label_train_only'] = (odd.manifest.split == 'train') & (odd.manifest.laterality == 'L')
    odd.manifest['label_train_only'] = odd.manifest['label_train_only'].astype('float32')
    r = linear_probe(None, odd, ['mass', 'never', 'train_only'], embeddings=e, n_boot=16, unit='breast', class_weight='balanced')
    notes = r.main.groupby('task').note.first()
    assert 'one class only among' in notes['never'] and 'nothing can be chosen' in notes['train_only'] and notes['mass'] == ''
    with pytest.raises(ValueError, match="'mass'"): linear_probe(None, data, 'mas', embeddings=e)
    with pytest.raises(TypeError, match='linear_probe needs image_features'): linear_probe(torch.nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match='must lie in'): linear_probe(None, data, embeddings=e, fractions=(0,))
    with pytest.raises(DataError, match='has no embedding'): linear_probe(None, data, embeddings=made_embeddings(data.subset(np.arange(100))))
    with pytest.raises(ValueError, match='unknown class_weight'): linear_probe(None, data, 'mass', embeddings=e, class_weight='auto')
    assert [t.name for t in targets_of(data.manifest)] == ['calcification', 'mass', 'density']
    constant = fit_candidates(np.ones((8, 3)), data.manifest[:8].assign(label_mass=[0, 1] * 4), targets_of(data.manifest, 'mass'))
    assert np.isfinite(constant['mass'][0](np.ones((2, 3)))).all()


def test_two_models_are_compared_on_the_same_rows(data):
    good, weak = (linear_probe(None, data, ['mass', 'density'], embeddings=made_embeddings(data), what=w, n_boot=16, Cs=(1e-2,)) for w in ('feature', 'image'))
    noise = {t: Scored(t, 'test', s.labels, np.random.default_rng(0).random(s.scores.shape), s.frame) for t, s in weak.scored['test'].items()}
    table = compare_scored(good.scored['test'], noise, n_boot=256).set_index('task')
    assert table.difference['mass'] > 0 and table.p_value['mass'] < .05 and table.metric['density'] == 'class_accuracy'
    with pytest.raises(ValueError, match='not judged on the same rows'): compare_scored(good.scored['test'], good.scored['valid'])
    fine = scored_at('mass', 'test', [0, 1], [.1, .9], pd.DataFrame(dict(image_id=['a', 'b'], patient_id=['p', 'q'])))
    with pytest.raises(ValueError, match='no task in common'): compare_scored({'mass': fine}, {'other': fine})


# ------------------------------------------------------------------------------------------------ the real way, in small

def test_phantom_to_tables(tmp_path):
    from training import tiny_mammoclip

    from medvl.data.releases.folder import read_folder
    from medvl.data.phantom.breast_dataset import write_phantom
    from medvl.data.prepare.run import prepare
    from medvl.data.splits import split_patients
    from medvl.data.text.tokens import build_wordpiece
    source = write_phantom(tmp_path / 'phantom', 16, size=(64, 40), progress=False)
    data = prepare(read_folder(source), source, tmp_path / 'prepared', size=(64, 40), jobs=1, salt=tmp_path / 'salt.txt')
    data.manifest['split'] = split_patients(data.manifest, (.5, .25, .25), stratify=['label_mass'] if 'label_mass' in data.manifest else ())
    method = tiny_mammoclip(vocab_size=None)
    method = type(method)(method.config, build_wordpiece([*data.manifest.report, *(p for t in TASKS['mammo'] for c in t.prompts for p in c)]))
    zs = zero_shot(method, data, folder=tmp_path / 'cache', n_boot=32, check=False)
    lp = linear_probe(method, data, folder=tmp_path / 'cache', n_boot=32, check=False, unit='breast')
    for table in (zs.table, lp.table):
        fine = table[table.value.notna()]
        assert len(fine) > 4 and fine.value.between(-1, 1).all() and table[table.value.isna()].note.str.startswith('not computable').all()
    assert len(list((tmp_path / 'cache').iterdir())) == 2
    assert {read_json(p / 'embeddings.json')['method'] for p in (tmp_path / 'cache').iterdir()} == {method.name}


def test_vectors_of_older_code_are_not_reused():
    "The cache's key holds the source of the method's classes: a changed projection is another key."
    import torch
    from medvl.evaluate.protocols.embeddings import code_digest

    def made(body):
        import linecache
        text = f'import torch\nclass Changing(torch.nn.Module):\n    def encode_image(self, x): return {body}\n'
        name = f'/changing-{body}.py'
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        module = type(torch)('changing'); module.__file__ = name
        import sys
        sys.modules['changing'] = module
        exec(compile(text, name, 'exec'), module.__dict__)
        return module.Changing()
    first = code_digest(made('x'))
    assert first == code_digest(made('x')) != code_digest(made('x + 1'))
