"The phantom: purity, agreement of the views, truth of boxes, words and files, absence of shortcuts, interruption."
import multiprocessing
import os
import re
import signal
import time

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.config import config_dict, config_from_dict
from medvl.core.errors import DataError
from medvl.core.paths import read_json
from medvl.core.seed import numpy_rng
from medvl.data.phantom.breast_exam import phantom_exam, phantom_truth, scale_tissue
from medvl.data.phantom.breast_anatomy import SIDES, VIEWS, PhantomConfig, outline, skin_depth
from medvl.data.phantom.breast_dataset import lesion_mask, shortcut_report, write_phantom
from medvl.data.phantom.breast_lesions import add_patch, clock, depth_third, draw_places, quadrant
from medvl.data.phantom.shortcuts import auroc

SMALL = (96, 64)


@pytest.fixture(scope='module')
def exams():
    return [phantom_exam(3, i, size=(160, 100)) for i in range(14)]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp('phantom')/'set', 150, size=(64, 48), seed=5, progress=False)


def breasts(exams):
    return [(e, side, [e.views[side, v] for v in VIEWS]) for e in exams for side in SIDES]


def test_exam_is_a_pure_function():
    alone = phantom_exam(7, 12, size=SMALL)
    for i in range(5): phantom_exam(7, i, size=SMALL)
    np.random.seed(1); cv2.setRNGSeed(4)
    again = phantom_exam(7, 12, size=SMALL)
    assert alone.truth == again.truth and alone.report == again.report
    for key, view in alone.views.items(): np.testing.assert_array_equal(view.pixels, again.views[key].pixels)
    assert phantom_exam(8, 12, size=SMALL).truth.patient_id != alone.truth.patient_id


def test_size_and_difficulty_change_the_picture_not_the_patient():
    small, large, hard = (phantom_exam(0, 4, **c) for c in (dict(size=SMALL), dict(size=(240, 160)), dict(size=SMALL, difficulty='hard')))
    assert small.truth == large.truth
    for side in SIDES:
        assert [(f.label, f.shape, f.x, f.lateral) for f in small.truth.breasts[side].findings] == [(f.label, f.shape, f.x, f.lateral) for f in hard.truth.breasts[side].findings]
        assert small.truth.breasts[side].labels == hard.truth.breasts[side].labels
    a, b = (phantom_exam(0, 4, size=s, noise=0.0).views['R', 'CC'].pixels for s in (SMALL, (240, 160)))
    assert np.corrcoef(a.ravel(), cv2.resize(b, SMALL[::-1], interpolation=cv2.INTER_AREA).ravel())[0, 1] > 0.95


def test_views_agree_on_the_distance_from_the_nipple(exams):
    seen = 0
    for _, _, (cc, mlo) in breasts(exams):
        for k, f in enumerate(cc.findings):
            far = [abs(v.boxes[k, [0, 2]].mean() - v.nipple[0])*v.spacing for v in (cc, mlo)]
            assert abs(far[0] - far[1]) < max(6.0, 0.35*f.size), (far, f)
            for v in (cc, mlo):
                up = v.nipple[1] - v.boxes[k, [1, 3]].mean()
                assert abs(up*v.spacing - f.up(v.view)) < max(6.0, 0.35*f.size), (v.view, f)
            seen += 1
    assert seen > 12


def test_boxes_are_the_bounds_of_masks_inside_the_breast(exams):
    for _, _, views in breasts(exams):
        for v in views:
            assert v.boxes.shape == (len(v.findings), 4) and np.isfinite(v.boxes).all()
            for k, (x0, y0, x1, y1) in enumerate(v.boxes.astype(int)):
                mask = v.mask(k)
                assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
                assert mask[y0:y1, x0].any() and mask[y0:y1, x1 - 1].any() and mask[y0, x0:x1].any() and mask[y1 - 1, x0:x1].any()
                assert (v.pixels[mask] > 0).all()


def test_orientation(exams):
    for _, side, (cc, mlo) in breasts(exams):
        for v in (cc, mlo):
            h, w = v.pixels.shape
            wall, air = (slice(0, 3), slice(-3, None)) if side == 'L' else (slice(-3, None), slice(0, 3))
            assert (v.pixels[h//2 - 8:h//2 + 8, wall] > 20).all() and (v.pixels[:, air] == 0).all()
            assert (v.nipple[0] > w/2) == (side == 'L')
        corner = mlo.pixels[:12, :12] if side == 'L' else mlo.pixels[:12, -12:]
        assert corner.mean() > 90 > (cc.pixels[:4]).mean()  # the muscle, at the top of MLO only


def test_words_agree_with_the_truth(exams):
    for e, side, _ in breasts(exams):
        b, other = e.truth.breasts[side], 'right' if side == 'L' else 'left'
        said = {s.finding: s for s in b.sentences if s.section == 'FINDINGS' and s.finding >= 0}
        assert sorted(said) == list(range(len(b.findings)))
        for k, f in enumerate(b.findings):
            text = said[k].text.lower()
            assert said[k].label == f.label and quadrant(f, b.anatomy) in text and ('left' if side == 'L' else 'right') in text
            if f.label == 'mass': assert f.margin in text and f.shape[:4] in text
            if f.morphology: assert f.morphology in text
            if "o'clock" in text: assert f"{clock(f, b.anatomy)} o'clock" in text
            for depth in ('anterior', 'middle', 'posterior'):
                if depth in text: assert depth == depth_third(f, b.anatomy)
        assert other not in b.report.lower()
        assert re.search(rf'BI-RADS (category )?{b.birads}\b', b.report)
        negative = {s.label for s in b.sentences}
        assert ('no_mass' in negative or 'no_finding' in negative) == (not b.labels['mass'])
        assert ' '.join(s.text for s in b.sentences if s.section == 'FINDINGS') in b.report
        assert b.report.startswith('FINDINGS: ') and b.report.count(' IMPRESSION: ') == 1 and not re.search(r'[{}\[\]|]|  ', b.report)
        assert not re.search(r'\b[Aa] [aeiou]', b.report)
        assert b.report.split(': ', 1)[1].split('. ')[0] in e.report


def test_places_do_not_know_what_will_lie_there():
    anatomy = phantom_truth(0, 0).breasts['L'].anatomy
    p = np.stack([draw_places(numpy_rng(i, 't'), anatomy) for i in range(300)])
    assert p.shape == (300, 5, 3)
    spread = p.std((0, 1))/np.sqrt(300)
    assert (np.abs(p.mean(0) - p.mean((0, 1))) < 4*spread).all()  # no slot differs from another
    for column, view in ((1, 'CC'), (2, 'MLO')): assert skin_depth(anatomy, view, p[..., 0].ravel(), p[..., column].ravel()).min() > 12


def test_labels_are_independent_and_as_frequent_as_asked():
    rows = pd.DataFrame([{'density': 'ABCD'.index(t.density), **b.labels} for t in (phantom_truth(2, i) for i in range(250)) for b in t.breasts.values()])
    assert abs(rows.mass.mean() - 0.4) < 0.07 and abs(rows.suspicious_calcification.mean() - 0.4) < 0.07
    assert abs(rows.corr().loc['mass', ['suspicious_calcification', 'density']]).max() < 0.14
    none = PhantomConfig(p_mass=0.0, p_calcification=0.0, p_benign=0.0)
    b = phantom_truth(0, 1, none).breasts['R']
    assert b.findings == () and b.pathology == 'normal' and b.birads == 1 and not any(b.labels.values())


def test_difficulty_is_difficult():
    def visibility(level):
        out = []
        for i in range(7):
            for v in phantom_exam(1, i, size=(160, 100), difficulty=level).views.values():
                for k, f in enumerate(v.findings):
                    if f.label != 'mass': continue
                    mask = v.mask(k).astype(np.uint8)
                    ring = (cv2.dilate(mask, np.ones((9, 9))) > 0) & (v.masks == 0) & (v.pixels > 20)
                    out.append((v.pixels[mask > 0].mean() - v.pixels[ring].mean())/v.pixels[ring].std())
        return np.median(out)
    easy, medium, hard = map(visibility, ('easy', 'medium', 'hard'))
    assert easy > 1.3*medium and medium > 1.3*hard > 0, (easy, medium, hard)


@settings(max_examples=8, deadline=None)
@given(st.integers(32, 130), st.integers(32, 130), st.integers(0, 2**40), st.floats(0, 1), st.sampled_from([8, 12]), st.booleans())
def test_any_size_seed_and_difficulty(h, w, seed, difficulty, bits, markers):
    e = phantom_exam(seed, 0, size=(h, w), difficulty=difficulty, bits=bits, markers=markers, p_mass=1.0, p_second=1.0, p_calcification=1.0, p_benign=1.0)
    for v in e.views.values():
        assert v.pixels.shape == v.masks.shape == (h, w) and v.pixels.dtype == (np.uint8 if bits == 8 else np.uint16) and v.pixels.max() < 2**bits
        assert len(v.findings) == 4 and v.spacing == max(200/h, 120/w)


def test_brightness_is_matched_exactly():
    rng = numpy_rng(1)
    tissue, added = rng.normal(2, 3, 4000), (rng.random(4000) < 0.05)*0.25
    k, offset = scale_tissue(tissue, added, 0.12)
    whole = k*tissue + offset + added
    assert abs(whole.mean()) < 1e-9 and abs(whole.std() - 0.12) < 1e-9


def test_patch_is_cut_at_the_border():
    image = np.zeros((5, 6), np.float32)
    add_patch(image, (-2, 4), np.ones((4, 4), np.float32))
    assert image.sum() == 4 and image[:2, 4:].all()
    add_patch(image, (50, 50), np.ones((4, 4), np.float32))
    assert image.sum() == 4


def test_outline_is_zero_outside_and_deepest_at_the_nipple():
    a = phantom_truth(0, 0).breasts['L'].anatomy
    up = np.linspace(-60, 60, 241)
    for view in VIEWS: assert abs(up[np.argmax(outline(a, view, up))]) < 3
    assert outline(a, 'CC', np.array([-99.0, 99.0])).max() == 0


# --- files ---------------------------------------------------------------------------------------------------------------------------

def test_layout(dataset):
    index, boxes, sentences = (pd.read_csv(dataset/f'{n}.csv', keep_default_na=False) for n in ('index', 'boxes', 'sentences'))
    assert len(index) == 600 and index.image_id.is_unique and (index.groupby('exam_id').size() == 4).all()
    assert index.image_id.str.fullmatch('[0-9a-f]{12}').all() and not index.image_path.str.contains('mass|CC|MLO|_L|_R').any()
    assert (index.groupby(['exam_id', 'laterality']).report_text.nunique() == 1).all()
    assert set(boxes.image_id) <= set(index.image_id) and (boxes.x1 > boxes.x0).all() and (boxes.x1 <= 48).all() and (boxes.y1 <= 64).all()
    with_mass = boxes[boxes.label == 'mass'].image_id.unique()
    assert set(index.image_id[index.label_mass == 1]) == set(with_mass)
    linked = sentences[sentences.box != '']
    per_image = boxes.groupby('image_id').label.apply(list)
    assert all(per_image[r.image_id][int(r.box)] == r.label for r in linked.itertuples())
    side = index.set_index('image_id').laterality
    assert (side[linked.image_id].to_numpy() == linked.laterality).all()
    report = index.drop_duplicates(['exam_id', 'laterality']).set_index(['exam_id', 'laterality']).report_text
    assert all(r.sentence in report[r.exam_id, r.laterality] for r in sentences.itertuples())


def test_pictures_and_masks_on_disk_are_the_exam(dataset):
    index = pd.read_csv(dataset/'index.csv', keep_default_na=False)
    exam = phantom_exam(5, 3, size=(64, 48))
    rows = index[index.exam_id == exam.truth.exam_id].set_index(['laterality', 'view'])
    for key, v in exam.views.items():
        np.testing.assert_array_equal(cv2.imread(str(dataset/rows.image_path[key]), cv2.IMREAD_UNCHANGED), v.pixels)
        if rows.mask_path[key]: np.testing.assert_array_equal(cv2.imread(str(dataset/rows.mask_path[key]), cv2.IMREAD_UNCHANGED) > 0, lesion_mask(v))
        else: assert not lesion_mask(v).any()


def test_no_shortcuts(dataset):
    report = shortcut_report(dataset)
    assert report.ok.all(), report[~report.ok]
    assert (report[report.unit == 'breast'].auroc - 0.5).abs().max() < 0.12
    assert {'brightness', 'file size', 'characters', 'words', 'image id', 'order', 'distance from nipple'} <= set(report.feature)


def test_shortcut_report_needs_data(tmp_path):
    with pytest.raises(DataError, match='at least 20 examinations'): shortcut_report(write_phantom(tmp_path/'x', 2, size=(32, 32), progress=False))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_definition(pairs):
    score, label = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    if label.all() or not label.any():
        assert np.isnan(auroc(score, label))
        return
    wins = (score[label][:, None] > score[~label]) + 0.5*(score[label][:, None] == score[~label])
    assert abs(auroc(score, label) - wins.mean()) < 1e-12


def test_dicom_reads_back_identical(tmp_path):
    folder = write_phantom(tmp_path/'d', 3, size=(100, 70), seed=9, fmt='dicom', monochrome1=0.5, progress=False)
    index, kinds = pd.read_csv(folder/'index.csv'), set()
    for i in range(3):
        exam = phantom_exam(9, i, size=(100, 70), bits=12)
        for (side, view), v in exam.views.items():
            row = index[index.image_id == v.image_id].iloc[0]
            ds = pydicom.dcmread(folder/row.image_path)
            kinds.add(ds.PhotometricInterpretation)
            stored = ds.pixel_array if ds.PhotometricInterpretation == 'MONOCHROME2' else 4095 - ds.pixel_array
            np.testing.assert_array_equal(stored, v.pixels)
            assert (ds.ImageLaterality, ds.ViewPosition, ds.Modality, ds.PatientID) == (side, view, 'MG', exam.truth.patient_id)
            assert abs(float(ds.ImagerPixelSpacing[0]) - row.spacing_y) < 1e-5 and str(ds.PatientName) and ds.PatientBirthDate
    assert kinds == {'MONOCHROME1', 'MONOCHROME2'}


def test_another_process_count_gives_the_same_files(tmp_path):
    one = write_phantom(tmp_path/'one', 20, size=(32, 32), progress=False)
    two = write_phantom(tmp_path/'two', 20, size=(32, 32), jobs=2, progress=False)
    for path in sorted(p.relative_to(one) for p in one.rglob('*') if p.is_file()): assert (one/path).read_bytes() == (two/path).read_bytes(), path


def make(folder): write_phantom(folder, 64, size=(64, 48), progress=False)


def test_killed_and_continued(tmp_path):
    process = multiprocessing.get_context('spawn').Process(target=make, args=(tmp_path/'killed',))
    process.start()
    blocks = tmp_path/'killed'/'blocks'
    for _ in range(600):
        if blocks.exists() and len(list(blocks.glob('0*.json'))) >= 2: break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not read_json(tmp_path/'killed'/'phantom.json')['complete'] and not (tmp_path/'killed'/'index.csv').exists()
    kept = {p: p.stat().st_mtime_ns for p in blocks.glob('0*.json')}
    make(tmp_path/'killed')
    make(tmp_path/'whole')
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    for name in ('index.csv', 'boxes.csv', 'sentences.csv', 'phantom.json'): assert (tmp_path/'killed'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()
    for path in pd.read_csv(tmp_path/'whole'/'index.csv').image_path: assert (tmp_path/'killed'/path).read_bytes() == (tmp_path/'whole'/path).read_bytes()


def test_truncated_file_is_made_again_and_growth_keeps_the_rest(tmp_path):
    folder = write_phantom(tmp_path/'g', 4, size=(32, 32), progress=False)
    first = pd.read_csv(folder/'index.csv')
    path = folder/first.image_path[5]
    data = path.read_bytes()
    path.write_bytes(data[:20])
    write_phantom(folder, 18, size=(32, 32), progress=False)
    assert path.read_bytes() == data
    pd.testing.assert_frame_equal(pd.read_csv(folder/'index.csv').head(16), first)


def test_refusals(tmp_path):
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'precious.txt').write_text('x')
    with pytest.raises(DataError, match='not empty'): write_phantom(tmp_path/'full', 1)
    folder = write_phantom(tmp_path/'a', 1, size=(32, 32), progress=False)
    with pytest.raises(DataError, match='seed'): write_phantom(folder, 1, size=(32, 32), seed=1)
    with pytest.raises(ValueError, match='png or dicom'): write_phantom(tmp_path/'b', 1, fmt='jpeg')
    with pytest.raises(ValueError, match='at least 1'): write_phantom(tmp_path/'b', 0)
    for bad in (dict(difficulty='meduim'), dict(difficulty=2.0), dict(size=(4, 4)), dict(p_mass=-0.1), dict(bits=10), dict(density=(1.0, 1.0, 0.0, 0.0)), dict(noise=-1.0)):
        with pytest.raises(ValueError): phantom_exam(0, 0, **bad)
    with pytest.raises(TypeError): phantom_exam(0, 0, colour='red')


def test_configuration_survives_json():
    config = PhantomConfig(size=(64, 48), difficulty=0.3, density=(1.0, 0.0, 0.0, 0.0))
    assert config_from_dict(PhantomConfig, config_dict(config)) == config
    assert config_from_dict(PhantomConfig, {'difficulty': 'hard', 'size': [96, 64]}) == PhantomConfig(difficulty='hard', size=(96, 64))
