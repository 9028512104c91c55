"""Intervals cover what they promise, tests reject as often as they promise, and clusters are clusters."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medvl.evaluate.stats.bootstrap import (
    BLOCK, Estimate, compare, delong, estimate, estimates, interval, jackknife, patient_counts, resample,
)
from medvl.evaluate.stats.calibration import ece, fit_scaling, reliability
from medvl.evaluate.metrics.curves import Evaluator, at_threshold, auroc
from medvl.evaluate.metrics.rank import NotComputable
from medvl.evaluate.stats.scored import LeakError, Scored
from medvl.evaluate.stats.subgroups import age_band, subgroups


def clustered(seed, patients=60, images=4, shared=1., signal=1., prevalence=.4):
    "Images of one patient share an effect and the label."
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), images)
    y = np.repeat((rng.random(patients) < prevalence).astype(float), images)
    y[:images], y[-images:] = 1, 0
    return y, signal * y + np.repeat(shared * rng.normal(size=patients), images) + rng.normal(size=patients * images), codes


def test_counts_are_draws_with_replacement():
    counts = np.concatenate([patient_counts(50, b) for b in range(40)], axis=1)
    assert (counts.sum(0) == 50).all()
    assert abs(counts.mean() - 1) < 1e-12 and abs(counts.var() - (1 - 1 / 50)) < .03
    assert len({c.tobytes() for c in counts.T}) == counts.shape[1]


def test_same_key_same_draws_whatever_is_asked():
    y, s, codes = clustered(0)
    ev = Evaluator(y, s, ['auroc'], codes)
    short, long = resample([ev], 100)[0], resample([ev, Evaluator(y, -s, ['auroc'], codes)], 300)[0]
    np.testing.assert_array_equal(short, long[:, :100])
    assert not np.array_equal(short, resample([ev], 100, seed=1)[0])


def test_equal_to_the_plain_loop():
    y, s, codes = clustered(1)
    many = resample([Evaluator(y, s, ['auroc', 'average_precision'], codes, dtype=np.float32)], 70)[0]
    counts = np.concatenate([patient_counts(60, 0), patient_counts(60, 1)], axis=1)
    for j in (0, 5, BLOCK, 69):
        rows = np.repeat(np.arange(len(y)), counts[codes, j].astype(int))
        assert abs(many[0, j] - roc_auc_score(y[rows], s[rows])) < 1e-12


@pytest.mark.parametrize('method', ['percentile', 'bca'])
def test_interval_covers(method):
    "200 simulated studies of 60 patients: the 95 % interval holds the truth in 95 % of them (binomial tolerance)."
    truth = stats.norm.cdf(1 / np.sqrt(2 * (1 + 1)))
    hits = 0
    for seed in range(200):
        y, s, codes = clustered(seed + 1000)
        e = estimate('auroc', y, s, codes, n_boot=384, method=method, seed=seed)
        hits += e.low <= truth <= e.high
    assert .90 <= hits / 200 <= .99


def test_images_instead_of_patients_do_not_cover():
    "The check above can fail: forgetting the clusters makes intervals that hold the truth far less often."
    truth, hits = stats.norm.cdf(.5), 0
    for seed in range(100):
        y, s, _ = clustered(seed + 1000)
        e = estimate('auroc', y, s, None, n_boot=192)
        hits += e.low <= truth <= e.high
    assert hits / 100 < .85


def test_bca_agrees_with_scipy():
    rng = np.random.default_rng(0)
    x = rng.exponential(size=80)
    ours = estimate('mean', np.zeros(80), x, n_boot=9984, method='bca')
    ref = stats.bootstrap((x,), np.mean, n_resamples=9999, method='BCa', rng=0).confidence_interval
    plain = estimate('mean', np.zeros(80), x, n_boot=9984)
    assert abs(ours.low - ref.low) < .01 and abs(ours.high - ref.high) < .01
    assert ours.high > plain.high                        # the correction for skewness goes the right way


def test_jackknife_leaves_one_patient_out():
    y, s, codes = clustered(2)
    left = jackknife(Evaluator(y, s, ['auroc'], codes, dtype=np.float32))[0]
    for k in (0, 31, 59): assert abs(left[k] - roc_auc_score(y[codes != k], s[codes != k])) < 1e-12


def test_estimate_counts_what_counts():
    y, s, codes = clustered(3)
    y[codes < 10] = np.nan
    e = estimate('auroc', y, s, codes, n_boot=64, unit='breast')
    assert (e.n, e.n_dropped, e.n_clusters, e.n_positive, e.n_boot, e.unit) == (200, 40, 50, int(np.nansum(y)), 64, 'breast')
    assert 'breasts' in str(e) and '50 patients' in str(e) and float(e) == auroc(y, s)
    assert e.row()['patients'] == 50


def test_what_cannot_be_said_is_said():
    s = np.arange(8.)
    assert 'not computable' in str(estimate('auroc', np.ones(8), s, n_boot=64))
    assert estimate('auroc', np.ones(8), s, n_boot=64).row()['note'].startswith('not computable: auroc needs both classes')
    one = estimate('auroc', [0, 1] * 4, s, np.zeros(8), n_boot=64)
    assert np.isnan(one.low) and 'one patient' in one.note
    rare = estimate('auroc', [1] + [0] * 7, s, n_boot=256)
    assert rare.n_failed > 0 and 'one class only' in rare.note
    perfect = estimate('auroc', [0] * 20 + [1] * 20, np.arange(40.), n_boot=64)
    assert perfect.low == pytest.approx(.025 ** (1 / 20)) and perfect.high == 1 and perfect.method == 'exact' and '20 patients agree' in perfect.note
    with pytest.raises(ValueError, match='unknown interval'): estimate('auroc', [0, 1], [0, 1], method='magic')
    with pytest.raises(ValueError, match='8 rows with patients'): estimates({'a': ([0, 1], [0, 1])}, np.arange(8))
    assert interval(.5, np.full(10, np.nan)) == (pytest.approx(np.nan, nan_ok=True),) * 2
    assert isinstance(rare, Estimate)


def brute_delong(y, a, b):
    "Structural components by all pairs (DeLong 1988)."
    v = [np.array([[(p > q) + .5 * (p == q) for q in s[y == 0]] for p in s[y == 1]]) for s in (a, b)]
    m, n = v[0].shape
    s10, s01 = np.cov([x.mean(1) for x in v]), np.cov([x.mean(0) for x in v])
    return np.array([x.mean() for x in v]), s10 / m + s01 / n


def test_delong_without_clusters_is_the_textbook():
    rng = np.random.default_rng(0)
    y = (rng.random(50) < .4).astype(float)
    a, b = np.round(y + rng.normal(size=50), 1), np.round(y + rng.normal(size=50), 1)
    auc, cov = delong(y, np.stack([a, b], 1))
    ref_auc, ref_cov = brute_delong(y, a, b)
    np.testing.assert_allclose(auc, ref_auc, atol=1e-12); np.testing.assert_allclose(cov, ref_cov, atol=1e-12)
    with pytest.raises(ValueError, match='two patients of each class'): delong([1, 0, 0], [1., 2, 3])


def test_delong_with_clusters_agrees_with_the_bootstrap():
    y, s, codes = clustered(5, patients=300)
    assert delong(y, s)[1][0, 0]**.5 < .8 * delong(y, s, codes)[1][0, 0]**.5 # forgetting the clusters
    y[::5] = 1 - y[::5]                                  # patients with both kinds of images
    se = delong(y, s, codes)[1][0, 0]**.5
    drawn = resample([Evaluator(y, s, ['auroc'], codes)], 2000)[0][0].std()
    assert abs(se / drawn - 1) < .08


@pytest.mark.parametrize('test', ['bootstrap', 'delong', 'permutation'])
def test_equal_models_are_rejected_as_often_as_promised(test):
    rejected = 0
    for seed in range(120):
        y, s, codes = clustered(seed, patients=80, images=2)
        rng = np.random.default_rng(seed + 10**6)
        a, b = s + rng.normal(size=len(s)), s + rng.normal(size=len(s))
        rejected += compare(y, a, b, codes, test=test, n_boot=256, seed=seed).p_value < .05
    assert rejected <= 14                                 # 5 % of 120 is 6; 14 or more has probability < 0.3 %


@pytest.mark.parametrize('test', ['bootstrap', 'delong', 'permutation'])
def test_a_better_model_is_found(test):
    y, s, codes = clustered(7, patients=200)
    worse = s + 2 * np.random.default_rng(0).normal(size=len(s))
    c = compare(y, s, worse, codes, test=test, n_boot=512)
    assert c.p_value < .01 and c.difference.low > 0 and abs(c.difference.value - (auroc(y, s) - auroc(y, worse))) < 1e-12
    back = compare(y, worse, s, codes, test=test, n_boot=512)
    assert abs(back.difference.value + c.difference.value) < 1e-12


def test_comparison_other_metrics_and_refusals():
    y, s, codes = clustered(8)
    p = 1 / (1 + np.exp(-s))
    assert compare(y, p, 1 - p, codes, metric='brier', test='permutation', n_boot=256).p_value < .05
    assert compare(y, s, s, codes, metric='average_precision', n_boot=64).p_value == 1
    with pytest.raises(ValueError, match='DeLong is for auroc'): compare(y, s, s, codes, metric='brier', test='delong')
    with pytest.raises(ValueError, match='unknown test'): compare(y, s, s, codes, test='t')
    with pytest.raises(NotComputable): compare(np.ones(4), s[:4], s[:4])


def test_threshold_metrics_resample():
    y, s, codes = clustered(9)
    e = estimate(at_threshold('sensitivity', .5), y, s, codes, n_boot=200)
    assert e.value == np.mean(s[y == 1] >= .5) and e.low < e.value < e.high


def scored(seed=0, split='test', patients=120):
    y, s, codes = clustered(seed, patients=patients)
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(dict(patient_id=codes, view=np.tile(['CC', 'MLO'], len(y) // 2), density=np.repeat(rng.choice(['A', 'B', 'C', ''], patients), 4),
                              age=np.repeat(rng.uniform(30, 80, patients), 4), source='one'))
    return Scored('mass', split, y, 1 / (1 + np.exp(-s)), frame)


def test_subgroups_are_the_metric_of_their_rows():
    s = scored()
    table = subgroups(s, metrics=('auroc', 'average_precision'), n_boot=128)
    assert set(table['by']) == {'density', 'age', 'view'}             # one source only says nothing
    assert set(table.query("by == 'density'").group) == {'A', 'B', 'C', 'not stated'}
    for r in table.query("metric == 'auroc'").itertuples():
        inside = (age_band(s.frame.age) == r.group) if r.by == 'age' else (s.frame[r.by].replace('', 'not stated') == r.group).to_numpy()
        assert abs(r.value - auroc(s.labels[inside], s.scores[inside])) < 1e-12 and r.n == inside.sum()
        assert abs(r.difference - (r.value - auroc(s.labels[~inside], s.scores[~inside]))) < 1e-12
        assert r.difference_low <= r.difference <= r.difference_high
    with pytest.raises(ValueError, match="'density'"): subgroups(s, by='densiti')


def test_small_and_empty_subgroups_are_flagged():
    s = scored()
    s.frame.loc[:7, 'density'] = 'D'
    s.labels[:8] = 1
    row = subgroups(s, by='density', n_boot=64).query("group == 'D'").iloc[0]
    assert row.small and np.isnan(row.value) and 'both classes' in row.note and 'small group' in row.note


def test_calibration_pieces():
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    y = (rng.random(20000) < p).astype(float)
    assert ece(y, p) < .02 and ece(y, np.clip(p * .5, 0, 1)) > .2
    table = reliability(y, p, bins=10)
    assert table.n.sum() == 20000 and ((table.low <= table.observed) & (table.observed <= table.high)).all()
    widths = np.histogram(p, bins=15, range=(0, 1))[1]
    k = np.clip(np.digitize(p, widths[1:-1]), 0, 14)
    by_hand = sum(abs(p[k == b].mean() - y[k == b].mean()) * (k == b).mean() for b in range(15))
    assert abs(ece(y, p, binning='width') - by_hand) < 1e-12
    with pytest.raises(ValueError, match='0..1'): ece([0, 1], [.5, 1.5])


def test_scaling_is_fitted_on_validation_and_finds_the_optimum():
    valid = scored(1, 'valid', 300)
    t, platt = fit_scaling(valid), fit_scaling(valid, 'platt')
    loss = lambda m: -np.mean(np.where(valid.labels == 1, np.log(m(valid.scores)), np.log1p(-m(valid.scores))))
    assert all(loss(t) <= loss(type(t)('x', t.slope * f, 0., '', 0)) for f in (.9, .99, 1.01, 1.1))
    assert loss(platt) <= loss(t) + 1e-3
    from sklearn.linear_model import LogisticRegression
    x = np.log(valid.scores / (1 - valid.scores))
    ref = LogisticRegression(C=np.inf, tol=1e-10).fit(x[:, None], valid.labels)
    assert abs(platt.slope - ref.coef_[0, 0]) < .02 and abs(platt.shift - ref.intercept_[0]) < .02
    for split in ('test', 'train'):
        with pytest.raises(LeakError, match='may only use valid data'): fit_scaling(scored(1, split))
    bad = Scored('mass', 'valid', valid.labels, 1 - valid.scores, valid.frame)
    with pytest.raises(NotComputable, match='Platt slope'): fit_scaling(bad, 'platt')
    separable = Scored('mass', 'valid', np.array([0., 0, 1, 1]), np.array([.1, .2, .8, .9]), pd.DataFrame(dict(patient_id=range(4))))
    assert np.isfinite(fit_scaling(separable, 'platt').slope)
