"The histogram control and baseline: exact numbers, patients apart, small sets said, the real set's published figure, the phantom's check."
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.core.paths import read_json
from medvl.data.phantom.chest_anatomy import GLOBAL_FINDINGS, LOCAL_FINDINGS
from medvl.data.phantom.chest_film import chest_exam, chest_truth, write_chest_phantom
from medvl.data.phantom.chest_prepared import CHEST_WAYS, chest_histograms, prepared_chest_phantom
from medvl.data.histogram import (QUANTILES, fit_histogram, held_out, histogram_control, histogram_features, histogram_line, histogram_table,
                                  judge_histogram)

sys.path.insert(0, str(Path(__file__).parents[1]))


def plainly(x):
    "The control's definition, written down once more."
    x = x.astype(float); low, high = x.min(), x.max()
    z = (x - low)/max(high - low, 1); t = z[z > .05]
    return [x.mean(), x.std(), *np.quantile(x, QUANTILES), t.mean() if len(t) else 0, np.median(t) if len(t) else 0, (z > .05).mean()]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.sampled_from([np.uint8, np.uint16]), st.integers(1, 65535))
def test_numbers_are_exact(seed, h, w, dtype, top):
    x = np.random.default_rng(seed).integers(0, min(top, np.iinfo(dtype).max) + 1, (h, w)).astype(dtype)
    np.testing.assert_allclose(histogram_features(x), plainly(x), atol=1e-9)
    if dtype is np.uint8: np.testing.assert_allclose(histogram_table(x[None])[0], plainly(x), atol=1e-9)
    if x.max() > x.min():
        stretched = (x.astype(float) - x.min())*(255/(x.max() - x.min()))
        np.testing.assert_allclose(histogram_features(x, 'minmax'), plainly(stretched), atol=1e-6)
        np.testing.assert_allclose(histogram_features(x, lambda v: v.astype(float)*3 + 1)[:9], (np.array(plainly(x))*3 + [1, 0, *[1]*7, 0, 0, 0])[:9], atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match='minmax'): histogram_table(np.zeros((1, 4, 4), np.uint8), 'min max')
    with pytest.raises(TypeError, match='uint8'): histogram_table(np.zeros((1, 4, 4)))
    with pytest.raises(DataError, match='no label'): histogram_control((np.zeros((2, 12)), pd.DataFrame({'patient_id': [1, 2]})))
    with pytest.raises(ValueError, match='mass'): histogram_control((np.zeros((2, 12)), pd.DataFrame({'patient_id': [1, 2], 'label_mass': 1.})), labels=['maas'])


def made(n=400, effect=0.0, seed=0):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(n//4), 4)
    y = np.repeat(rng.random(n//4) < .4, 4).astype(float)
    numbers = rng.normal(size=(n, 12)) + effect*y[:, None] + np.repeat(rng.normal(size=(n//4, 12)), 4, 0)
    return numbers, pd.DataFrame({'patient_id': who, 'label_mass': np.where(rng.random(n) < .1, np.nan, y)})


def test_patients_are_apart_and_labels_nan_are_left_out():
    "Numbers that name the patient exactly, and say nothing else, must tell nothing."
    numbers, frame = made(seed=3)
    for parts in (held_out(frame), held_out(frame, 5)):
        for p in parts: assert not set(frame.patient_id[p]) & set(frame.patient_id[~p])
    null = [histogram_control(made(seed=s), folds=5, n_boot=0).auroc.item() for s in range(12)]
    assert abs(np.mean(null) - .5) < .04 and max(null) < .66
    row = histogram_control(made(effect=1.0), folds=5).iloc[0]
    assert row.low > .75 and row.low < row.auroc < row.high and row.n == made(effect=1.0)[1].label_mass.notna().sum()
    assert 'tells' in row.verdict and 'mass' in histogram_line(histogram_control(made(effect=1.0)))


def test_the_folders_own_test_split_is_used():
    numbers, frame = made(effect=1.0)
    frame['split'] = np.where(frame.patient_id < 30, 'test', np.where(frame.patient_id < 50, 'valid', 'train'))
    row = histogram_control((numbers, frame)).iloc[0]
    assert row.patients == 30 and row.n == frame.label_mass[frame.split == 'test'].notna().sum()
    few = histogram_control((numbers, frame.assign(label_mass=np.where(np.arange(400) < 3, 1., 0.)))).iloc[0]
    assert few.verdict.startswith('too few') and np.isnan(few.auroc)
    assert 'too few' in histogram_line(pd.DataFrame([few]))


def test_the_check_has_a_margin():
    "Clean sets pass (of many, at most a few fail), a set that gives itself away fails."
    assert sum(not judge_histogram(*made(seed=s), ('mass',), n_boot=100).ok.all() for s in range(12)) <= 1
    assert not judge_histogram(*made(effect=1.0), ('mass',)).ok.all()
    assert judge_histogram(*made(effect=1.0), ()).ok.all() # not local: shown, not judged


def test_classes():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 12)), rng.integers(0, 3, 200)
    x[:, 0] += 3*y
    p = fit_histogram(x, y, classes=4)(x)
    assert p.shape == (200, 4) and np.allclose(p.sum(1), 1) and (p[:, 3] == 0).all() and (p.argmax(1) == y).mean() > .7


def test_speed():
    images = np.random.default_rng(0).integers(0, 256, (100, 256, 256), dtype=np.uint8)
    histogram_table(images[:2])
    start = time.process_time(); histogram_table(images)
    assert (time.process_time() - start)/100 < 2e-3 # about 0.3 ms on a quiet core


# --- the chest phantom ---------------------------------------------------------------------------------------------------------------

def test_chest_findings_are_not_in_the_histogram(tmp_path):
    told = chest_histograms(write_chest_phantom(tmp_path/'c', 200, (64, 64), seed=12, difficulty='easy'),
                            (*CHEST_WAYS[1:], ('xvl_v1', 'none'), ('chexzero_equalised_v1', 'none')), n_boot=100)
    assert told.ok.all(), told[~told.ok]
    assert set(told.label[told.local]) == set(LOCAL_FINDINGS) and set(told.label[~told.local]) == set(GLOBAL_FINDINGS)


def test_the_check_sees_a_phantom_that_gives_its_findings_away(tmp_path):
    told = chest_histograms(write_chest_phantom(tmp_path/'c', 200, (64, 64), seed=12, difficulty='easy', compensate=False), CHEST_WAYS[:1], n_boot=100)
    assert not told.set_index('label').ok['device']


def test_a_finding_changes_no_grey_value_but_its_places():
    "The same chest with and without a finding has the same histogram, to the noise, and brightness does not point perfectly."
    for label in (*LOCAL_FINDINGS, *GLOBAL_FINDINGS):
        off = {f'p_{f}': 0.0 for f in (*LOCAL_FINDINGS, *GLOBAL_FINDINGS)}
        ill, well = (chest_exam(2, 5, size=(96, 96), difficulty='easy', **{**off, f'p_{label}': p}) for p in (1.0, 0.0))
        away = chest_exam(2, 5, size=(96, 96), difficulty='easy', compensate=False, **{**off, f'p_{label}': 1.0})
        gap = np.abs(np.quantile(ill.pixels, QUANTILES) - np.quantile(well.pixels, QUANTILES)).max()
        assert gap <= 2.5, (label, gap)
        assert (ill.pixels != well.pixels).any() and (ill.masks == away.masks).all()


def test_the_rim_under_the_skin_knows_nothing_of_a_pneumothorax():
    "Pixels that are mixed with air when the picture is made smaller are those of the healthy chest; equalised and made smaller, the ill one is as bright."
    off, shifts = {f'p_{f}': 0.0 for f in (*LOCAL_FINDINGS, *GLOBAL_FINDINGS)} | {'noise': 0.0, 'markers': False}, []
    for i in range(6):
        ill, well = (chest_exam(4, i, size=(128, 128), difficulty='easy', **{**off, 'p_pneumothorax': p}).pixels for p in (1.0, 0.0))
        body = (well > 5).astype(np.uint8)
        depth = cv2.distanceTransform(body, cv2.DIST_L2, 5)
        rim = (depth > 0) & (depth < 1.5)
        assert np.abs(ill[rim].astype(int) - well[rim]).max() <= 1 and np.abs(ill.astype(int) - well).max() > 20
        shifts.append(float(ill[rim].astype(float).mean() - well[rim].mean()))
    assert abs(np.mean(shifts)) < 0.3


def test_mimics_are_independent_and_named():
    words = {'nipples': 'nipple', 'fold': 'skin fold', 'fat': 'fat pad', 'cartilage': 'cartilage', 'bowel': 'diaphragm'}
    truths = [chest_truth(5, i) for i in range(300)]
    rows = pd.DataFrame([{**t.labels, **{k: k in [m.kind for m in t.mimics] for k in words}} for t in truths]).astype(float)
    assert np.abs(rows.corr().loc[list(words), [*LOCAL_FINDINGS, *GLOBAL_FINDINGS]].to_numpy()).max() < .2 and (abs(rows[list(words)].mean() - .4) < .1).all()
    for t in truths[:80]:
        for m in t.mimics:
            said = [s for s in t.sentences if words[m.kind] in s.text.lower() and s.label == '']
            assert said and (m.side == '' or any({'R': 'right', 'L': 'left'}[m.side] in s.text.lower() for s in said)), (m.kind, t.report)
        assert not any(m.label for m in t.mimics)


# --- preparation and a real set --------------------------------------------------------------------------------------------------------

def test_preparation_reports_it(tmp_path):
    data = prepared_chest_phantom(tmp_path/'p', 48, (64, 64))
    told = {r['label']: r for r in read_json(data.folder/'dataset.json')['histogram']}
    assert set(told) == {*LOCAL_FINDINGS, *GLOBAL_FINDINGS}
    ours = histogram_control(data, n_boot=200).set_index('label')
    for name, row in told.items():
        assert (row['auroc'] is None and np.isnan(ours.auroc[name])) or row['auroc'] == pytest.approx(ours.auroc[name], abs=1e-4)


def test_the_real_figure(tmp_path):
    "CDD-CESM, prepared as README does: twelve numbers reach .78 for malignant on its 94 test images of 26 patients, by our way and by the plain one."
    root = Path(__file__).resolve().parents[3]/'shared'/'data'/'mammo'
    if not root.exists(): pytest.skip('sample data absent: ../shared/data/mammo')
    from medvl.data.releases.folder import read_folder
    from medvl.data.phantom.breast_prepared import public_salt, split_source
    from medvl.data.prepare.run import prepare
    table = read_folder(root)
    records = table.records[table.records.source == 'CDD-CESM'].reset_index(drop=True)
    here = lambda part: part[part.image_id.isin(records.image_id)].reset_index(drop=True)
    table = table._replace(records=records, boxes=here(table.boxes), sentences=here(table.sentences))
    data = prepare(split_source(table, seed=0), root, tmp_path/'out', size=(384, 256), jobs=2, salt=public_salt(tmp_path))
    row = histogram_control(data, labels=['malignant'], n_boot=200).iloc[0]
    assert (row.n, row.patients) == (94, 26) and row.auroc == pytest.approx(.78, abs=.015), row
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler
    x, y, t = np.array([plainly(data.image(i)) for i in range(len(data))]), data.manifest.label_malignant.to_numpy(), (data.manifest.split == 'test').to_numpy()
    scale = StandardScaler().fit(x[~t])
    rule = LogisticRegression(C=.3, max_iter=3000).fit(scale.transform(x[~t & (y == y)]), y[~t & (y == y)])
    assert row.auroc == pytest.approx(roc_auc_score(y[t], rule.decision_function(scale.transform(x[t]))), abs=.003)
