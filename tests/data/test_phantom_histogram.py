"The breast phantom's grey values know nothing of its lesions; its look-alikes are true, recorded, and as bright."
import numpy as np
import pandas as pd
import pytest

from medvl.data.phantom import breast_exam as phantom
from medvl.data.phantom.breast_exam import phantom_exam, phantom_truth
from medvl.data.phantom.breast_anatomy import SIDES, PhantomConfig
from medvl.data.phantom.breast_dataset import LOCAL, box_rows, histogram_rows, lesion_mask, write_phantom
from medvl.data.phantom.breast_lesions import LESIONS
from medvl.data.phantom.breast_prepared import histogram_report, prepared_phantom

SMALL = (96, 64)


@pytest.mark.parametrize('level', ['easy', 'medium', 'hard'])
def test_lesions_leave_the_grey_values_as_they_were(level):
    ill, well = (phantom_exam(4, 1, size=SMALL, difficulty=level, p_mass=p, p_calcification=p) for p in (1.0, 0.0))
    for key, view in ill.views.items():
        assert any(f.label == 'mass' for f in view.findings) and not any(f.label in LESIONS for f in well.views[key].findings)
        a, b = (np.sort(e.views[key].pixels.astype(int).ravel()) for e in (ill, well))
        assert np.abs(a - b).max() <= 4 and np.abs(a - b).mean() < 0.1  # pixels at the skin line alone, which are half air
        assert (view.pixels != well.views[key].pixels).mean() > 0.01


@pytest.mark.parametrize('level', ['easy', 'medium', 'hard'])
def test_the_histogram_tells_no_local_finding(tmp_path, level):
    report = histogram_report(prepared_phantom(tmp_path, 40, SMALL, 6, level))
    assert report.ok.all() and set(report.normalise) == {'none', 'minmax', 'equalise'} and {'mass', 'suspicious_calcification', 'abnormal'} <= set(report.label)


def test_the_check_finds_masses_without_counterweight(tmp_path, monkeypatch):
    truth = phantom.breast_truth
    def bare(*args):
        t = truth(*args)
        lesions = tuple(f for f in t.findings if f.label in LESIONS)
        return phantom.BreastTruth(t.anatomy, lesions, (), (), t.labels, t.birads, t.pathology, t.sentences, t.report)
    monkeypatch.setattr(phantom, 'breast_truth', bare)
    monkeypatch.setattr(phantom, 'same_greys', lambda grey, wanted, inside, shown=None: grey if shown is None else shown)
    rows = histogram_rows(write_phantom(tmp_path/'old', 40, SMALL, 6, 'easy', progress=False)).set_index('label')
    assert rows.auroc['mass'] > 0.75 and not rows.ok['mass']


def test_every_breast_holds_as_many_things_whatever_is_wrong_with_it():
    def counts(p): return [[(len(b.findings) + len(b.look_alikes), b.blind) for b in phantom_truth(1, i, PhantomConfig(p_mass=p, p_calcification=p)).breasts.values()] for i in range(30)]
    assert counts(0.0) == counts(1.0) and {n for exam in counts(0.5) for n, _ in exam} <= {3, 4, 5}


def test_brightness_points_at_things_not_at_masses():
    at_mass, at_any = [], []
    for i in range(40):
        for v in phantom_exam(2, i, size=SMALL, difficulty='easy').views.values():
            boxes = [(f.label, b) for fs, bs in ((v.findings, v.boxes), (v.look_alikes, v.look_alike_boxes)) for f, b in zip(fs, bs)]
            if not any(label == 'mass' for label, _ in boxes): continue
            y, x = np.unravel_index(v.pixels.argmax(), v.pixels.shape)
            hit = {label for label, (x0, y0, x1, y1) in boxes if x0 <= x < x1 and y0 <= y < y1}
            at_mass.append('mass' in hit); at_any.append(bool(hit))
    assert np.mean(at_any) > 0.7 and 0.2 < np.mean(at_mass) < 0.65, (np.mean(at_any), np.mean(at_mass))


def test_look_alikes_are_recorded_and_nobodys_lesion():
    told = silent = 0
    for i in range(12):
        exam = phantom_exam(3, i, size=SMALL)
        boxes = pd.DataFrame(box_rows(exam))
        for (side, _), v in exam.views.items():
            rows, b = boxes[boxes.image_id == v.image_id], exam.truth.breasts[side]
            assert len(rows) == len(b.findings) + len(b.look_alikes) and rows.label.tolist() == [f.label for f in (*b.findings, *b.look_alikes)]
            assert not rows[rows.told == 0].label.isin(LESIONS).any() and (rows.finding[rows.told == 0] == -1).all()
            assert (rows.label == 'mass').any() == bool(b.labels['mass']) and b.pathology in ('normal',) or any(f.label in LESIONS for f in b.findings)
            assert lesion_mask(v).any() == any(f.label in LESIONS for f in b.findings)
            for f in b.look_alikes: assert f.birads == 2 and not f.malignant
            told, silent = told + (rows.told[~rows.label.isin(LESIONS)] == 1).sum(), silent + (rows.told == 0).sum()
    assert 0 < told < silent


def test_a_look_alike_in_the_report_is_called_by_its_name():
    names = {'lymph_node': 'lymph node', 'oil_cyst': 'oil cyst', 'tissue_band': 'band', 'benign_calcification': 'calcification'}
    seen = set()
    for i in range(40):
        for side in SIDES:
            b = phantom_truth(9, i, PhantomConfig(p_benign=1.0)).breasts[side]
            for k, f in enumerate(b.findings):
                if f.label in LESIONS: continue
                text = next(s.text.lower() for s in b.sentences if s.finding == k)
                assert names[f.label] in text and 'mass' not in text and 'suspicious' not in text
                assert 'benign' in text or 'harmless' in text
                seen.add(f.label)
    assert seen == set(names) and set(LOCAL) >= set(LESIONS)
