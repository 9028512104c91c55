"""Where all patients agree an interval is an exact bound or none, never a point; figures show none where tables have none."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from medvl.attribute.comparison import paired_differences, paper_table
from medvl.attribute.localisation import localisation_table, mean_estimate
from medvl.evaluate.analysis.analyse import patient_intervals
from medvl.evaluate.analysis.plots import plot_shared
from medvl.evaluate.stats.bootstrap import Estimate, agreed_bound, compare, estimate, interval_or_bound
from medvl.evaluate.metrics.coco import BOX
from medvl.evaluate.metrics.froc import detection_table, froc_table, plot_froc
from medvl.evaluate.protocols.label_efficiency import plot_label_efficiency
from medvl.evaluate.localized.detection import localized_table
from medvl.evaluate.metrics.curves import at_threshold
from medvl.evaluate.localized.compare import plot_tasks, t_interval
from medvl.evaluate.protocols.retrieval import recall_table
from medvl.evaluate.stats.scored import Scored
from medvl.evaluate.metrics.segmentation import PixelCounts, segmentation_table
from medvl.evaluate.stats.selection import Threshold, at_chosen
from medvl.evaluate.stats.subgroups import plot_subgroups, subgroups
from medvl.evaluate.stats.tables import evaluate_scored, wide
from medvl.show.curves import plot_forest, plot_precision_recall, plot_roc

NONE_OF_54 = 1 - .025**(1 / 54)


@pytest.mark.parametrize('n', [2, 5, 54, 400])
def test_the_bound_is_the_exact_binomial_one(n):
    from scipy.stats import binomtest
    for k in (0, n):
        exact = binomtest(k, n).proportion_ci(method='exact')
        assert agreed_bound(k / n, n) == pytest.approx((exact.low, exact.high))
    assert agreed_bound(0, n, limits=(-1, 1)) == pytest.approx((-binomtest(0, n).proportion_ci().high, binomtest(0, n).proportion_ci().high))


def test_patients_count_not_images():
    "108 maps of 54 patients are 54 witnesses."
    e = mean_estimate(np.zeros(108), np.repeat(np.arange(54), 2), n_boot=64)
    assert (e.value, e.low, e.high, e.method) == (0, 0, pytest.approx(NONE_OF_54), 'exact') and '54 patients agree' in e.note
    assert mean_estimate(np.ones(5), np.zeros(5), n_boot=64).note == 'one patient: no interval'
    unknown = mean_estimate(np.full(6, 3.), np.arange(6), n_boot=64, limits=None)
    assert np.isnan(unknown.low) and 'agree' in unknown.note
    some = mean_estimate([0, 0, 1, 0], np.arange(4), n_boot=64)
    assert some.method == 'percentile' and some.high > some.low
    assert np.isnan(mean_estimate([0, 0], [1, 2], n_boot=0).low)
    assert 'nan' not in str(unknown) and 'no interval' in str(unknown)


def test_bound_covers_the_truth_where_the_bootstrap_does_not():
    "Of samples with no event at all, drawn from a rate of 3 %: the resamples' interval never holds it, the bound nearly always."
    rng = np.random.default_rng(0)
    none = [x for x in (rng.random((400, 40)) < .03) if not x.any()]
    ends = [interval_or_bound(0., np.zeros(8), .95, 40)[:2] for _ in none]
    assert len(none) > 50 and all(low <= .03 <= high for low, high in ends)


def maps(**scores):
    return pd.DataFrame([dict(method=m, attribute='mass', patient_id=i // 2, image_id=i, pointing=float(v), **{'hit@0.25': float(v), 'energy': .1, 'energy_gain': 1., 'chance': .04})
                         for m, v in scores.items() for i in range(20)])


def test_localisation_tables():
    scores = maps(mammo_factor=0, random=0, brightness=1)
    table = localisation_table(scores, metrics=('pointing', 'hit@0.25', 'energy_gain'), n_boot=64).set_index(['method', 'metric'])
    high = 1 - .025**(1 / 10)
    for m in ('pointing', 'hit@0.25'):
        assert table.loc[('mammo_factor', m), ['low', 'high']].tolist() == pytest.approx([0, high])
        assert table.loc[('brightness', m), ['low', 'high']].tolist() == pytest.approx([1 - high, 1])
    assert table.loc[(slice(None), 'energy_gain'), 'low'].isna().all() # no upper limit: nothing to bound it by
    assert paper_table(scores, ('hit@0.25',), n_boot=64).iloc[0, 0] == f'0.00 (0.00 to {high:.2f})'
    gap = paired_differences(scores, 'mammo_factor', ('pointing',), n_boot=64).set_index(['attribute', 'method'])
    assert gap.loc[('mass', 'random'), ['difference', 'low', 'high']].tolist() == pytest.approx([0, -high, high])


def rows(y, s, per=1): return np.array(y, float), np.array(s, float), np.arange(len(y)) // per


@pytest.mark.parametrize('metric, people', [('sensitivity', 8), ('specificity', 12), ('accuracy', 20), ('precision', 8), ('npv', 12), ('balanced_accuracy', 8), ('auroc', 8)])
def test_metrics_of_a_perfect_classifier(metric, people):
    "Each is bounded by the patients it rests on."
    y, s, p = rows([1] * 8 + [0] * 12, [.9] * 8 + [.1] * 12)
    e = estimate(metric if metric == 'auroc' else at_threshold(metric, .5), y, s, p, n_boot=64)
    assert (e.value, e.low, e.high, e.method) == (1, pytest.approx(.025**(1 / people)), 1, 'exact')


def test_metrics_that_are_no_share_get_no_interval():
    y, s, p = rows([1] * 8 + [0] * 12, [.9] * 8 + [.1] * 12)
    for metric in ('average_precision', 'pr_auc', 'pf1_binarized', at_threshold('f1', .5)):
        e = estimate(metric, y, s, p, n_boot=64)
        assert e.value == 1 and np.isnan(e.low) and 'all resamples agree' in e.note
    k = estimate('class_accuracy', [0, 1, 2, 0], np.eye(3)[[0, 1, 2, 0]], n_boot=64)
    assert (k.low, k.high) == (pytest.approx(.025**(1 / 4)), 1)
    worst = estimate('class_balanced_accuracy', [0, 1, 2, 0], np.eye(3)[[1, 2, 0, 1]], np.array([0, 1, 2, 3]), n_boot=64)
    assert (worst.low, worst.high) == (0, pytest.approx(1 - .025))


def test_comparisons_thresholds_and_subgroups():
    y, s, p = rows([1] * 8 + [0] * 12, [.9] * 8 + [.1] * 12)
    other = s + np.linspace(0, .05, 20)
    c = compare(y, s, other, p, 'auroc', n_boot=64)
    assert c.difference.low == pytest.approx(-(1 - .025**(1 / 8))) and c.difference.high == -c.difference.low
    for twin in (s, 2 * s): assert (lambda d: (d.low, d.high, d.note))(compare(y, s, twin, p, 'auroc', n_boot=64).difference) == (0, 0, 'the same scores')
    frame = pd.DataFrame({'patient_id': p, 'view': np.where(p % 2, 'CC', 'MLO')})
    table = at_chosen(Threshold('t', .5, 'youden', None, 'image', 20, 8), Scored('t', 'test', y, s, frame), ('sensitivity', 'f1'), n_boot=64).set_index('metric')
    assert table.loc['sensitivity', 'low'] == pytest.approx(.025**(1 / 8)) and np.isnan(table.loc['f1', 'low'])
    groups = subgroups(Scored('t', 'test', y, s, frame), 'view', n_boot=64)
    assert groups.low.tolist() == pytest.approx([.025**(1 / 4)] * 2) and (groups.difference_low < 0).all() and (groups.difference_high > 0).all()
    text = wide(evaluate_scored({'t': Scored('t', 'test', y, s, frame)}, by=(), n_boot=64).table).to_string()
    assert '1.000 to 1.000' not in text and 'nan to' not in text


def boxes(found_where):
    truth = pd.DataFrame([(f'i{k}', 'x', 0., 0, 10, 10) for k in range(6)], columns=['image_id', 'label', *BOX])
    found = truth.assign(score=.5, **({'x0': 50., 'x1': 60.} if found_where == 'elsewhere' else {}))
    return truth, found, pd.DataFrame({'image_id': [f'i{k}' for k in range(9)], 'patient_id': [f'p{k}' for k in range(9)]})


def test_detectors_that_find_nothing_or_all():
    high = 1 - .025**(1 / 6)
    for table in (detection_table(*boxes('elsewhere'), n_boot=64), froc_table(*boxes('elsewhere'), n_boot=64), localized_table(*boxes('elsewhere'), n_boot=64)):
        assert (table.value == 0).all() and (table.low == 0).all() and table.high.tolist() == pytest.approx([high] * len(table)) and set(table.interval) == {'exact'}
    best = froc_table(*boxes('there'), n_boot=64)
    assert (best.value == 1).all() and best.low.tolist() == pytest.approx([1 - high] * len(best))
    assert detection_table(*boxes('there'), n_boot=64).low.isna().all() # an average precision of 1 is no share: no interval


def test_retrieval_and_segmentation_and_analysis():
    ranks = np.ones(12, int)
    table = recall_table(ranks, np.ones(12), 30, np.arange(12) // 2, (1, 5), n_boot=64).set_index('metric')
    low = .025**(1 / 6)
    assert table.loc['recall@1', ['low', 'high']].tolist() == pytest.approx([low, 1]) and table.loc['mean_rank', ['low', 'high']].tolist() == pytest.approx([1, 1 + (1 - low) * 29])
    assert table.better_than_chance.all()
    counts = np.zeros((8, 1, 3), int)
    counts[:5, 0, 2] = 40 # five images show the class, and no pixel of it is found
    dice = segmentation_table(PixelCounts(counts, ('x',), pd.DataFrame({'image_id': range(8), 'patient_id': [f'p{k}' for k in range(8)]})), 64)
    assert (dice.value == 0).all() and dice[dice.task == 'x'].high.tolist() == pytest.approx([1 - .025**(1 / 5)] * 5)
    spread = patient_intervals(np.stack([np.ones(6), np.full(6, 3.), np.arange(6.)], 1), np.arange(6), 64, shares=[True, False, False])
    assert spread.low[0] == pytest.approx(.025**(1 / 6)) and np.isnan(spread.low[1]) and spread.low[2] < spread.high[2]


def test_runs_that_agree_say_nothing_about_the_next():
    assert t_interval([.4, .4, .4])[0] == pytest.approx(.4) and np.isnan(t_interval([.4, .4, .4])[1])


# ---- figures


def bars(fig): # lengths of all error bars that can be seen; a cap is seen even where its bar has no length
    out = []
    for c in (c for ax in fig.axes for c in ax.containers if hasattr(c, 'has_xerr')):
        out += [np.ptp(np.asarray(s), axis=0).max() for part in c.lines[2] for s in part.get_segments() if len(s) and np.isfinite(s).all()]
        out += [0. for cap in c.lines[1] for point in np.column_stack(cap.get_data()) if np.isfinite(np.asarray(point, float)).all()]
    plt.close(fig)
    return out


def test_figures_show_no_interval_where_the_table_has_none():
    one = pd.DataFrame({'task': ['a', 'b'], 'model': 'm', 'value': [.5, .8], 'low': np.nan, 'high': np.nan})
    assert not bars(plot_forest(one)) and not bars(plot_shared(one)) and not bars(plot_tasks(one.assign(task='a').head(1)))
    curve = pd.DataFrame({'task': 'a', 'metric': 'auroc', 'fraction': [.1, 1.], 'train_patients': [5, 50], 'mean': [.5, .8], 'least': [.5, .8], 'most': [.5, .8], 'low': np.nan, 'high': np.nan, 'fits': 1})
    assert not bars(plot_label_efficiency(curve)) and bars(plot_label_efficiency(curve.assign(low=.4, high=.9)))
    table = pd.DataFrame({'task': 't', 'by': 'view', 'group': ['CC', 'MLO'], 'metric': 'auroc', 'value': [.5, .8], 'low': np.nan, 'high': np.nan, 'n': 3, 'level': .95, 'small': False})
    ax = plot_subgroups(table)
    assert all(not np.isfinite(line.get_xdata()).all() for line in ax.lines if line.get_marker() in ('None', None))
    plt.close(ax.figure)


@pytest.mark.parametrize('plot', [plot_roc, plot_precision_recall])
def test_curves_of_one_patient_and_of_perfect_scores_have_no_band(plot):
    y, s = np.array([0, 1, 0, 1.]), np.array([.1, .9, .2, .8])
    for groups in (np.zeros(4), np.arange(4)):
        fig = plot(y, s, groups, n_boot=32)
        assert 'no interval' in fig.axes[0].get_legend().get_texts()[0].get_text()
        plt.close(fig)
    fig = plot(np.tile([0, 1.], 20), np.random.default_rng(0).normal(size=40) + np.tile([0, .5], 20), n_boot=32)
    assert ' to ' in fig.axes[0].get_legend().get_texts()[0].get_text()
    plt.close(fig)


def test_froc_figure_without_intervals():
    truth, found, images = boxes('there')
    table = froc_table(truth, found, images.assign(patient_id='one'), n_boot=8)
    assert table.low.isna().all()
    from medvl.evaluate.metrics.froc import froc_curve
    fig = plot_froc(froc_curve(truth, found, images), table)
    assert not [s for c in fig.axes[0].collections for s in c.get_segments() if len(s) and np.isfinite(np.ma.filled(s, np.nan)).all()]
    plt.close(fig)


def test_estimates_without_interval_read_well():
    assert str(Estimate(.5, np.nan, np.nan, n=3, n_clusters=1)) == '0.500 (no interval; 3 images, 1 patients)'
    assert torch.tensor(float(Estimate(.5, .4, .6))) == .5
