"""Figures: right side up, right numbers, small files."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from medvl.core.paths import append_jsonl
from medvl.core.seed import numpy_rng
from medvl.show.curves import plot_curves, plot_forest, plot_reliability, plot_roc, plot_precision_recall, pr_points, read_curves, reliability_table, roc_points
from medvl.show.embedding import pca, plot_embedding
from medvl.show.exam import chest_wall, exam_widget, hang, mirror_boxes, show_exam, show_prepared, windowed
from medvl.show.style import colours, png, save


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def breast(laterality, h=60, w=40):
    y, x = np.mgrid[:h, :w]
    image = ((((y - h / 2) / (h * 0.4))**2 + (x / (w * 0.8))**2) < 1) * 150.0
    return image[:, ::-1] if laterality == 'R' else image


def test_right_breast_hangs_left_and_chest_walls_meet():
    fig = show_exam({f'{s} {v}': breast(s) for s in 'LR' for v in ('MLO', 'CC')})
    place = {ax.texts[-1].get_text(): ax.get_position() for ax in fig.axes}
    assert place['R CC'].x1 <= place['L CC'].x0 and place['L CC'].x0 - place['R CC'].x1 < 0.02
    assert place['R CC'].y0 > place['R MLO'].y0 and abs(place['R CC'].y0 - place['L CC'].y0) < 1e-9
    for ax in fig.axes: assert chest_wall(ax.images[0].get_array()) == ('right' if ax.texts[-1].get_text()[0] == 'R' else 'left')


def test_mirrored_images_are_turned_back_with_boxes_masks_and_maps():
    mask = np.zeros((60, 40)); mask[20:30, 5:10] = 1
    heat = np.zeros((6, 4)); heat[2, 0] = 1
    true = show_exam({'L CC': dict(image=breast('L'), boxes=[(5, 20, 10, 30, 'mass')], mask=mask, heat=heat)}).axes[0]
    turned = show_exam({'L CC': dict(image=breast('L')[:, ::-1], boxes=mirror_boxes([(5, 20, 10, 30, 'mass')], 40), mask=mask[:, ::-1], heat=heat[:, ::-1])}).axes[0]
    assert 'mirrored' in turned.texts[-1].get_text() and 'mirrored' not in true.texts[-1].get_text()
    for a, b in zip(true.images, turned.images): np.testing.assert_array_equal(a.get_array(), b.get_array())
    assert true.patches[0].get_bbox().bounds == turned.patches[0].get_bbox().bounds == (4.5, 19.5, 5, 10)


@given(st.lists(st.tuples(*[st.integers(0, 99)] * 4), max_size=5), st.integers(100, 300))
def test_mirroring_twice_changes_nothing(boxes, width):
    boxes = [(*b, 'x') for b in boxes]
    assert mirror_boxes(mirror_boxes(boxes, width), width) == boxes


@given(st.lists(st.tuples(st.sampled_from('LR'), st.sampled_from(['CC', 'MLO', 'ML', 'odd'])), min_size=1, max_size=9))
def test_every_view_hangs_exactly_once_on_its_side(keys):
    rows = hang([dict(laterality=s, view=v, n=k) for k, (s, v) in enumerate(keys)])
    shown = [(side, e) for row in rows for side, e in zip('RL', row) if e]
    assert sorted(e['n'] for _, e in shown) == list(range(len(keys))) and all(side == e['laterality'] for side, e in shown)


@pytest.mark.parametrize('views, says', [({}, 'no views'), ({'X CC': np.ones((4, 4))}, '"L" or "R"'), ({'L CC': np.ones((3, 4, 4))}, 'array \\(h,w\\)'),
                                         ([dict(laterality='L', view='CC')], 'has no image')])
def test_what_cannot_hang_is_named(views, says):
    with pytest.raises(ValueError, match=says): show_exam(views)


def test_different_sizes_share_a_scale_and_constant_images_do_not_fail():
    fig = show_exam({'R CC': np.zeros((60, 40)), 'L CC': breast('L', 30, 20)}, title='x')
    a, b = (ax.get_position() for ax in fig.axes)
    assert a.width == pytest.approx(2 * b.width) and len(png(fig)) < 100_000


def test_phantom_exam_is_shown_unturned(tmp_path):
    phantom = pytest.importorskip('medvl.data.phantom.breast_prepared')
    data = phantom.prepared_phantom(tmp_path, 3, (64, 40), seed=1)
    exam = data.boxes.merge(data.manifest, on='image_id').exam_id.iloc[0]
    fig = show_prepared(data, exam)
    titles = [ax.texts[-1].get_text() for ax in fig.axes]
    assert sorted(titles) == ['L CC', 'L MLO', 'R CC', 'R MLO']
    assert sum(len(ax.patches) for ax in fig.axes) == data.boxes.image_id.isin(data.manifest[data.manifest.exam_id == exam].image_id).sum() > 0
    with pytest.raises(ValueError, match='Unknown exam'): show_prepared(data, 'nobody')


def test_widget_and_window():
    np.testing.assert_allclose(windowed(np.array([[0, 25, 50, 100]]), 0.25, 0.5), [[0, 0.5, 1, 1]])
    box = exam_widget({'L CC': breast('L')}, width=2)
    assert [w.description for w in box.children[0].children] == ['level', 'window', 'overlays']


def test_pictures_are_small_even_of_noise(tmp_path):
    noise = numpy_rng('noise').normal(size=(500, 300))
    fig = show_exam({'R CC': noise, 'L CC': noise}, heat={'L CC': np.eye(5)}, width=6)
    assert save(fig, tmp_path/'x.png').stat().st_size <= 100_000
    with pytest.raises(ValueError, match='does not fit'): png(fig, 500)
    assert colours(['b', 'a']) == colours(['a', 'b', 'a'])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=4, max_size=40))
@settings(max_examples=60)
def test_curve_points_agree_with_scikit_learn(rows):
    y, score, weight = (np.array(c, dtype=float) for c in zip(*rows))
    if not 0 < weight @ y < weight.sum(): return
    a, b = roc_points(y, score, weight)
    assert np.trapezoid(b, a) == pytest.approx(roc_auc_score(y, score, sample_weight=weight))
    r, p = pr_points(y, score, weight)
    assert np.sum(np.diff(np.append(0, r)) * p) == pytest.approx(average_precision_score(y, score, sample_weight=weight))


def test_band_is_wider_for_few_patients_than_for_many_rows():
    rng = numpy_rng('band')
    truth = np.repeat(rng.permutation(np.arange(20) % 2), 10).astype(float)
    score = truth * 0.8 + np.repeat(rng.normal(size=20), 10)
    width = lambda groups: np.ptp(plot_roc(truth, score, groups, n_boot=200).axes[0].collections[0].get_paths()[0].vertices[:, 1][50:150])
    texts = [plot_roc(truth, score, g, n_boot=200).axes[0].get_legend().get_texts()[0].get_text() for g in (None, np.repeat(np.arange(20), 10))]
    spans = [float(t.split(' to ')[1][:-1]) - float(t.split('(')[1].split(' to ')[0]) for t in texts]
    assert spans[1] > 2 * spans[0] and width(None) > 0
    assert len(png(plot_precision_recall(truth, {'a': score, 'b': -score}))) < 100_000


def test_not_stated_labels_are_left_out_and_bad_input_is_named():
    y, s = np.array([0, 1, np.nan, 1, 0]), np.array([0.1, 0.9, np.nan, 0.8, 0.3])
    assert '2 of 4 positive' in plot_roc(y, s, n_boot=20).axes[0].get_legend().get_title().get_text()
    with pytest.raises(ValueError, match='equally many'): plot_roc([0, 1], [0.1])
    with pytest.raises(ValueError, match='from 0 to 1'): reliability_table([0, 1], [0.2, 1.4])
    assert reliability_table(np.ones(5), np.full(5, 0.5)).n.sum() == 5
    plot_reliability([0, 1, 1, np.nan], [0.1, 0.5, 0.5, 0.9])


def test_curves_after_a_resume_and_empty_logs(tmp_path):
    for step, loss in ((0, 3.0), (1, 2.0), (2, 1.5), (1, 2.5), (2, 1.0)): append_jsonl(tmp_path/'a'/'metrics.jsonl', dict(step=step, loss=loss, valid_loss=loss, note='x', ok=True))
    with open(tmp_path/'a'/'metrics.jsonl', 'a') as f: f.write('{"step": 3, "lo')
    t = read_curves(tmp_path)
    assert t[t.name == 'loss'].value.tolist() == [3.0, 2.5, 1.0] and set(t.name) == {'loss', 'valid_loss'}
    assert len(plot_curves(t).axes) == 1
    with pytest.raises(FileNotFoundError): read_curves(tmp_path/'b')
    with pytest.raises(ValueError, match='nothing to plot'): plot_curves(t, names=['accuracy'])


def test_forest_and_map_of_awkward_tables():
    table = pd.DataFrame(dict(task=['a', 'b'], value=[0.5, np.nan], low=[0.4, np.nan], high=[0.6, np.nan]))
    assert [t.get_text() for t in plot_forest(table).axes[0].texts] == ['not computable']
    x = numpy_rng('map').normal(size=(30, 4))
    labels = pd.DataFrame(dict(a=[1, 0, np.nan] * 10, b=[f'site {k}' for k in range(30)], c=np.arange(30.0)))
    assert '24 others' in ' '.join(t.get_text() for t in plot_embedding(x, labels).axes[1].get_legend().get_texts())
    with pytest.raises(ValueError, match='pca'): plot_embedding(x, labels, method='umap')
    assert pca(np.ones((5, 3)))[1].sum() == 0
