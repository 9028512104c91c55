"""Metrics against scikit-learn, against brute force, and against the original's numbers."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as skm

from golden import golden
from medvl.evaluate.metrics.curves import (
    METRICS, Evaluator, accuracy, at_threshold, auroc, average_precision, balanced_accuracy, class_accuracy, macro_f1,
    metric_of, pfbeta, pfbeta_binarized, pr_auc, score, sensitivity_at_specificity,
)
from medvl.evaluate.metrics.rank import NotComputable, stated
from medvl.evaluate.metrics.recall import retrieval, retrieval_ranks


def cases(n=60):
    return st.integers(0, 2**32 - 1).map(lambda seed: make(seed, n))


def make(seed, n, levels=None):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < rng.uniform(.05, .9)).astype(float)
    y[:2] = 0, 1
    s = rng.normal(size=n) + y * rng.uniform(-1, 3)
    if rng.random() < .5: s = np.round(s * rng.integers(1, 4)) / 4      # ties
    return y, s, rng.random(n) + .01


@settings(max_examples=60, deadline=None)
@given(cases())
def test_equal_to_sklearn(case):
    y, s, w = case
    for weights in (None, w):
        precision, recall, _ = skm.precision_recall_curve(y, s, sample_weight=weights)
        assert abs(auroc(y, s, weights) - skm.roc_auc_score(y, s, sample_weight=weights)) < 1e-12
        assert abs(average_precision(y, s, weights) - skm.average_precision_score(y, s, sample_weight=weights)) < 1e-12
        assert abs(pr_auc(y, s, weights) - skm.auc(recall, precision)) < 1e-12
        for t in (0., .3):
            assert abs(accuracy(y, s, t, weights) - skm.accuracy_score(y, s >= t, sample_weight=weights)) < 1e-12
            assert abs(balanced_accuracy(y, s, t, weights) - skm.balanced_accuracy_score(y, s >= t, sample_weight=weights)) < 1e-12
            assert abs(macro_f1(y, s, t, weights) - skm.f1_score(y, s >= t, average='macro', labels=[0, 1], sample_weight=weights, zero_division=0)) < 1e-12


@settings(max_examples=30, deadline=None)
@given(cases(25))
def test_equal_to_brute_force(case):
    y, s, _ = case
    pos, neg = s[y == 1], s[y == 0]
    pairs = np.mean([(p > q) + .5 * (p == q) for p in pos for q in neg])
    assert abs(auroc(y, s) - pairs) < 1e-12
    p = np.clip(s, 0, 1)
    for beta in (1., .5):
        ctp, cfp = p[y == 1].sum(), p[y == 0].sum()
        precision, recall = (ctp / (ctp + cfp) if ctp + cfp else 0), ctp / len(pos)
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if precision > 0 and recall > 0 else 0
        assert abs(pfbeta(y, s, beta) - expected) < 1e-12
    assert abs(pfbeta_binarized(y, s) - max(skm.f1_score(y, s >= t) for t in pos)) < 1e-12
    for target in (.5, .9, 1.):
        allowed = [np.mean(pos >= t) for t in [*s, np.inf] if np.mean(neg < t) >= target]
        assert abs(sensitivity_at_specificity(y, s, target) - max(allowed)) < 1e-12


@settings(max_examples=20, deadline=None)
@given(cases(40))
def test_weights_are_copies(case):
    y, s, w = case
    counts = np.floor(w * 4).astype(int)
    counts[:2] = 1
    rows = np.repeat(np.arange(len(y)), counts)
    for name in ('auroc', 'average_precision', 'pr_auc', 'pf1', 'pf1_binarized', 'brier', 'sensitivity_at_90_specificity', 'specificity_at_90_sensitivity'):
        assert abs(score(name, y, s, counts) - score(name, y[rows], s[rows])) < 1e-12, name


@settings(max_examples=20, deadline=None)
@given(cases(50))
def test_ranks_alone_matter(case):
    y, s, _ = case
    for name in ('auroc', 'average_precision', 'pr_auc', 'pf1_binarized'):
        assert score(name, y, s) == score(name, y, 3 * s + 7)
    assert abs(auroc(y, s) + auroc(y, -s) - 1) < 1e-12
    assert abs(auroc(y, s) - auroc(1 - y, -s)) < 1e-12


@pytest.mark.parametrize('i', [0, 1, 2])
def test_golden_scores(i):
    d = np.load(golden('mammoclip/metrics.npz'))
    y, p = d[f'c{i}_gt'], d[f'c{i}_pred']
    ours = dict(pfbeta1=pfbeta(y, p), pfbeta05=pfbeta(y, p, .5), pfbeta_binarized=pfbeta_binarized(y, p), pr_auc=pr_auc(y, p), auprc=average_precision(y, p), auroc=auroc(y, p))
    for name, value in ours.items(): assert abs(value - d[f'c{i}_{name}']) < 1e-12, name
    assert abs(accuracy(y, p, .5) - d[f'c{i}_acc_np_at_0.5']) < 1e-12
    np.testing.assert_allclose([auroc(y, p), average_precision(y, p)], d[f'c{i}_compute_AUC'], rtol=0, atol=1e-12)


def test_golden_pfbeta_without_true_positive():
    assert pfbeta([1, 0, 0], [0., .5, .2]) == float(np.load(golden('mammoclip/metrics.npz'))['pfbeta_no_tp'])


def test_golden_retrieval():
    d = np.load(golden('mammoclip/metrics.npz'))
    distinct, first = np.unique(d['ret_texts'], return_index=True)
    ours = retrieval(d['ret_image'], d['ret_text'][first], d['ret_texts'], distinct)
    for name in ('Recall@1', 'Recall@5', 'Recall@10', 'Recall@15', 'MeanRank'): assert abs(ours[name] - d[f'ret_{name}']) < 1e-12, name


def test_retrieval_both_ways_and_chunks():
    rng = np.random.default_rng(0)
    images, texts, group = rng.normal(size=(37, 6)), rng.normal(size=(10, 6)), np.arange(37) % 10
    a = retrieval_ranks(images, texts, group, np.arange(10))
    np.testing.assert_array_equal(a, retrieval_ranks(images, texts, group, np.arange(10), chunk=5))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    sim = unit(images) @ unit(texts).T
    np.testing.assert_array_equal(a, [1 + sum(sim[i] > sim[i, g]) for i, g in enumerate(group)])
    back = retrieval_ranks(texts, images, np.arange(10), group)
    np.testing.assert_array_equal(back, [1 + sum(sim[group != t, t] > sim[group == t, t].max()) for t in range(10)])
    with pytest.raises(ValueError, match='no matching candidate'): retrieval_ranks(images, texts, group + 1, np.arange(10))


def test_not_stated_leaves_and_is_counted():
    y, s, _ = make(0, 80)
    y[5:25] = np.nan
    ev = Evaluator(y, s, ['auroc'])
    assert (ev.n, ev.n_dropped, ev.n_positive) == (60, 20, int(np.nansum(y)))
    assert auroc(y, s) == auroc(y[~np.isnan(y)], s[~np.isnan(y)])
    s[10] = np.nan                                       # a score on a row that does not count
    assert np.isfinite(auroc(y, s))
    s[0] = np.nan
    with pytest.raises(ValueError, match='score NaN at row 0'): auroc(y, s)


@pytest.mark.parametrize('labels', [[1, 1, 1], [0, 0, 0], [np.nan] * 3, []])
@pytest.mark.parametrize('name', ['auroc', 'sensitivity_at_90_specificity', 'specificity_at_90_sensitivity'])
def test_one_class_is_said(labels, name):
    with pytest.raises(NotComputable, match='needs both classes'): score(name, labels, [.1, .2, .3][:len(labels)])


def test_no_positive_has_no_precision_recall():
    for name in ('average_precision', 'pr_auc', 'pf1', 'pf1_binarized'):
        with pytest.raises(NotComputable, match='0 positive and 3 negative'): score(name, [0, 0, 0], [.1, .2, .3])
    assert average_precision([1, 1], [.1, .2]) == 1


@pytest.mark.parametrize('bad, message', [(([1, 2], [.1, .2]), 'label 2.0 at row 1'), (([1, 0, 1], [.1, .2]), 'one length'), (([[1, 0]], [[.1, .2]]), 'two vectors')])
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message): stated(*bad)


def test_unknown_metric_names_the_known():
    with pytest.raises(ValueError, match='unknown metric'): metric_of('auc')
    with pytest.raises(ValueError, match='choose one of'): at_threshold('dice', .5)
    with pytest.raises(ValueError, match='cannot be mixed'): Evaluator([0, 1], [[.1, .9]] * 2, ['auroc', 'class_accuracy'])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_classes_equal_to_sklearn(seed):
    rng = np.random.default_rng(seed)
    y, s, w = rng.integers(0, 4, 40).astype(float), rng.random((40, 4)), rng.random(40)
    y[0] = np.nan
    g = s.argmax(1)[1:]
    for name, ref in dict(class_accuracy=skm.accuracy_score, class_balanced_accuracy=skm.balanced_accuracy_score).items():
        assert abs(score(name, y, s, w) - ref(y[1:], g, sample_weight=w[1:])) < 1e-12
    assert abs(score('class_macro_f1', y, s) - skm.f1_score(y[1:], g, average='macro')) < 1e-12
    assert score('majority', y, s) == max(np.mean(y[1:] == k) for k in range(4))


def test_class_outside_is_named():
    with pytest.raises(ValueError, match='class 4.0 at row 1'): class_accuracy([0, 4], np.eye(4)[:2])
    with pytest.raises(ValueError, match='score NaN at row 1'): class_accuracy([0, 1], [[1., 0], [np.nan, 1]])


@pytest.mark.parametrize('name', [n for n, m in METRICS.items() if m.kind != 'classes'])
def test_many_resamples_equal_one_by_one(name):
    y, s, _ = make(3, 90)
    s = 1 / (1 + np.exp(-s))
    groups, rng = np.arange(90) // 3, np.random.default_rng(0)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=20).T
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-12)):
        many = Evaluator(y, s, [name], groups, dtype=dtype)(counts.astype(dtype))[0]
        for j in range(20):
            w = counts[groups, j]
            if np.isnan(many[j]): continue
            assert abs(many[j] - score(name, np.repeat(y, w), np.repeat(s, w))) < tolerance
