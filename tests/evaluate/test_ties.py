"""Equal scores: no ranking metric depends on the order of rows, boxes or images; the originals' order-dependent rules are named options."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.attribute.localisation import map_scores
from medvl.evaluate.stats.bootstrap import delong, estimates
from medvl.evaluate.metrics.coco import BOX, arrange_boxes, coco_map
from medvl.evaluate.metrics.froc import detection_table, froc_curve, froc_table, reference_map
from medvl.evaluate.localized.detection import arrange_localized, froc_value, localized_map, localized_table, marks_of
from medvl.evaluate.metrics.curves import METRICS, Evaluator
from medvl.evaluate.metrics.recall import retrieval_ranks
from medvl.evaluate.stats.scored import Scored
from medvl.evaluate.stats.selection import choose_threshold
from medvl.show.curves import pr_points, roc_points


def scene(seed, levels=3, images=9, classes=('c0', 'c1')):
    "Overlapping boxes with few distinct scores: every kind of tie, within and across images; whole numbers, so that overlaps tie too."
    rng = np.random.default_rng(seed)
    def some(n):
        corner = rng.integers(0, 30, (n, 2))
        side = rng.choice([8, 10, 12], (n, 2))
        return pd.DataFrame(np.concatenate([corner, corner + side], 1).astype(float), columns=BOX).assign(image_id=[f'i{k}' for k in rng.integers(0, images, n)], label=rng.choice(classes, n))
    truth = some(14)
    near = truth.sample(30, replace=True, random_state=seed).reset_index(drop=True)
    near[BOX] += np.tile(rng.integers(-3, 4, (30, 2)), 2)
    found = pd.concat([near, some(15)], ignore_index=True)
    return truth, found.assign(score=rng.integers(1, levels + 1, len(found)) / levels), pd.DataFrame({'image_id': [f'i{k}' for k in range(images)], 'patient_id': [f'p{k // 2}' for k in range(images)]})


def shuffled(tables, seed):
    "The same three tables, rows in another order."
    return tuple(t.sample(frac=1, random_state=seed + k).reset_index(drop=True) for k, t in enumerate(tables))


NUMBERS = {
    'coco_map': lambda *t: coco_map(*t).to_numpy(float),
    'max_detections': lambda *t: coco_map(*t, max_detections=(1, 2)).to_numpy(float),
    'detection_table': lambda *t: detection_table(*t, n_boot=0).set_index(['task', 'metric']).value.sort_index().to_numpy(),
    'froc_table': lambda *t: froc_table(*t, n_boot=0, rates=(.1, .5, 1.)).set_index(['task', 'metric']).value.sort_index().to_numpy(),
    'froc_curve': lambda *t: froc_curve(*t).sort_values(['task', 'threshold'])[['false_marks', 'sensitivity']].to_numpy(),
    'reference_map': lambda *t: reference_map(*t, top=4).to_numpy(float),
    'localized_map': lambda *t: localized_map(*t).to_numpy(float),
    'localized_table': lambda *t: localized_table(*t, n_boot=0).set_index(['task', 'metric']).value.sort_index().to_numpy(),
}


@pytest.mark.parametrize('name', NUMBERS)
def test_no_detection_metric_depends_on_the_order_of_rows_or_images(name):
    for seed in range(3):
        tables = scene(seed, levels=1 + seed % 3)
        wanted = NUMBERS[name](*tables)
        for other in range(2): np.testing.assert_allclose(NUMBERS[name](*shuffled(tables, 10 * other)), wanted, atol=1e-12, err_msg=f'scene {seed}')


def test_listed_is_what_pycocotools_does_and_does_depend():
    "Two images, one score: the false alarm is listed first or last. Together it is precision 1/2 either way."
    truth = pd.DataFrame([('a', 'x', 0., 0, 10, 10)], columns=['image_id', 'label', *BOX])
    found = pd.DataFrame([('a', 'x', .5, 0., 0, 10, 10), ('b', 'x', .5, 0., 0, 10, 10)], columns=['image_id', 'label', 'score', *BOX])
    for make in (lambda i, t: coco_map(truth, found, i, ties=t).AP50['x'], lambda i, t: reference_map(truth, found, i, ties=t)['x'], lambda i, t: localized_map(truth, found, i, ties=t)['mAP'],
                 lambda i, t: detection_table(truth, found, i, n_boot=0, ties=t).value.iloc[0]):
        assert (make(['a', 'b'], 'listed'), make(['b', 'a'], 'listed')) == pytest.approx((1, .5))
        assert make(['a', 'b'], 'together') == make(['b', 'a'], 'together') == pytest.approx(.5)
    with pytest.raises(ValueError, match='together'): arrange_boxes(truth, found, ['a', 'b'], ties='first')


def test_rules_agree_where_no_scores_are_equal():
    for seed in range(4):
        truth, found, images = scene(seed)
        found = found.assign(score=np.random.default_rng(seed).permutation(len(found)) / 50)
        for f in (coco_map, localized_map, reference_map):
            a, b = (f(truth, found, images, ties=t).to_numpy(float) for t in ('together', 'listed'))
            np.testing.assert_allclose(a, b, atol=1e-12)
        a, b = (localized_table(truth, found, images, n_boot=30, ties=t)[['value', 'low', 'high']].to_numpy(float) for t in ('together', 'listed'))
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_together_is_no_better_than_the_luckiest_order():
    "One joint point cannot beat the order that lists the hits first."
    for seed in range(2):
        truth, found, images = scene(seed, levels=1, classes=('x',))
        found = found.groupby('image_id').head(1) # one mark an image: nothing but the order of images can matter
        values = [coco_map(truth, found, images.sample(frac=1, random_state=k), ties='listed').AP50['x'] for k in range(15)]
        assert coco_map(truth, found, images).AP50['x'] <= max(values) + 1e-12


def test_froc_of_equal_scores_is_the_lowest_of_all_orders():
    rng = np.random.default_rng(0)
    for _ in range(40):
        d, n = int(rng.integers(2, 12)), 9
        false = rng.random(d) < .5
        gain = np.where(false, 0, rng.integers(0, 3, d))
        boxes = int(gain.sum()) + 2
        pessimist = np.lexsort((gain, ~false))
        value = froc_value(gain[pessimist], false[pessimist], boxes, n)
        assert all(value <= froc_value(gain[o], false[o], boxes, n) + 1e-12 for o in (rng.permutation(d) for _ in range(20)))
    truth, found, images = scene(1, levels=1)
    gain, false, _ = marks_of(arrange_localized(truth, found, images, plus_one=False))
    assert (np.diff(false.astype(int)) <= 0).all() and (np.diff(gain[~false]) >= 0).all()


def test_bootstrap_of_equal_scores_is_that_of_copied_patients():
    "Weighted sums at the ends of ties are what a table with every drawn patient copied gives."
    from medvl.evaluate.stats.bootstrap import patient_counts
    truth, found, images = scene(2, classes=('x',))
    names, codes = np.unique(images.patient_id, return_inverse=True)
    counts = patient_counts(len(names), 0, 0, 8).astype(int)
    import medvl.evaluate.metrics.froc as froc
    s = arrange_boxes(truth, found, images)
    hit = froc.match(s, froc.candidate_pairs(s, .5), [.5])[:, 0] >= 0
    ranked, patient, boxes_of, here = froc.ranking_of(s, 0, hit)
    draws = froc._weighted(ranked[0], patient, boxes_of, 8, 0, ends=froc.score_ends(s.score[here]))
    for b in range(8):
        again = pd.DataFrame([(i, f'{i}.{c}') for i, p in zip(images.image_id, codes) for c in range(counts[p, b])], columns=['image_id', 'copy'])
        swap = lambda t, again=again: t.merge(again).drop(columns='image_id').rename(columns={'copy': 'image_id'})
        if not len(swap(truth)): assert np.isnan(draws[b]); continue
        assert draws[b] == pytest.approx(coco_map(swap(truth), swap(found), list(again['copy'])).AP50['x'], abs=1e-12)


def test_reference_map_counts_a_class_without_truth_as_the_original():
    truth = pd.DataFrame([('a', 'x', 0., 0, 10, 10)], columns=['image_id', 'label', *BOX])
    found = pd.DataFrame([('a', 'x', .9, 0., 0, 10, 10), ('a', 'y', .8, 0., 0, 9, 9)], columns=['image_id', 'label', 'score', *BOX])
    got = reference_map(truth, found, ['a'], ['x', 'y'])
    assert (got['x'], got['y'], got['mean']) == (1, 0, .5)
    assert np.isnan(coco_map(truth, found, ['a'], ['x', 'y']).AP['y']) # COCO leaves such a class out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 4)), min_size=4, max_size=25), st.integers(0, 99))
def test_classification_metrics_and_thresholds_ignore_the_order(rows, seed):
    y, s, p = (np.array(c, float) for c in zip(*rows))
    s /= 3
    order = np.random.default_rng(seed).permutation(len(y))
    binary = [m for m in METRICS.values() if m.kind != 'classes']
    a, b = (Evaluator(y[o], s[o], binary)()[:, 0] for o in (np.arange(len(y)), order))
    np.testing.assert_allclose(a, b, atol=1e-12)
    one, two = (estimates({'t': (y[o], s[o])}, p[o], [m.name for m in binary], n_boot=8) for o in (np.arange(len(y)), order))
    for key in one: np.testing.assert_allclose([one[key].low, one[key].high], [two[key].low, two[key].high], atol=1e-6)
    if len(set(y)) < 2: return
    for points in (roc_points, pr_points): np.testing.assert_allclose(points(y, s), points(y[order], s[order]))
    for rule, target in (('youden', None), ('f1', None), ('specificity', .7), ('sensitivity', .7)):
        chosen = [choose_threshold(Scored('t', 'valid', y[o], s[o], pd.DataFrame({'patient_id': p[o]})), rule, target).value for o in (np.arange(len(y)), order)]
        assert chosen[0] == chosen[1]


def test_a_collapsed_model_finds_nothing():
    "All embeddings equal: every candidate ties, and a tie counts against the model, wherever its own text stands and however sums are rounded."
    rng = np.random.default_rng(0)
    one = rng.normal(size=129).astype(np.float32)
    queries, texts = np.tile(one, (40, 1)), np.tile(one, (37, 1))
    texts[5] = one * 3 # the same direction
    ranks = retrieval_ranks(queries, texts, np.arange(40) % 37, np.arange(37), chunk=7)
    assert (ranks == 37).all()
    order = rng.permutation(37)
    x, t = rng.normal(size=(40, 8)).round(), rng.normal(size=(37, 8)).round()
    plain = retrieval_ranks(x, t, np.arange(40) % 37, np.arange(37))
    assert (retrieval_ranks(x, t[order], np.arange(40) % 37, order) == plain).all()


def test_pointing_shares_equal_peaks():
    heat = np.zeros((4, 8))
    heat[1, 1] = heat[2, 6] = 1
    assert map_scores(heat, [[0, 0, 4, 4]])['pointing'] == map_scores(heat[:, ::-1], [[4, 0, 8, 4]])['pointing'] == .5
    flat = map_scores(np.ones((4, 8)), [[0, 0, 4, 4]])
    assert flat['pointing'] == flat['chance'] == .5


def test_delong_of_equal_scores():
    y, s = np.array([0, 1, 0, 1, 1, 0.]), np.array([1, 1, 0, 2, 1, 1.])
    order = np.array([5, 2, 4, 0, 3, 1])
    assert delong(y, s)[0] == pytest.approx(delong(y[order], s[order])[0])
