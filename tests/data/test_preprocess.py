"""Profiles: the paper's to the bit, the standard's by pydicom, boxes and masks where they belong."""
import warnings

import cv2
import numpy as np
import pytest
from golden import golden, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from medvl.core.errors import DataError
from medvl.data.pixels.crop import apply_table, breast_crop, chest_side, kept_runs, minmax_table, paper_crop, run_lengths, take_runs
from medvl.data.dicom.read import StoredImage, read_dicom
from medvl.data.pixels.file import read_image
from medvl.data.pixels.profiles import PROFILES, Placement, Profile, get_profile, preprocess


# the spec's procedure in plain words ------------------------------------------------------------------------------------------------------------
def plain_lengths(on):
    "Distance to the nearest off position (or end) on either side, minus one, for every on position; -1 for the others."
    n, out = len(on), []
    for i in range(n):
        if not on[i]: out.append(-1); continue
        left, right = i, i
        while left > 0 and on[left]: left -= 1
        while right < n - 1 and on[right]: right += 1
        out.append(right - left - 1)
    return np.array(out)


def plain(pixels, mono1=False, border=5):
    "Steps 2 to 5 in float64, with full-resolution standard deviations; gives the uint8 crop and the kept positions."
    x = pixels[border:-border or None, border:-border or None].astype(np.float64)
    if mono1: x = x.max() - x
    x = x - x.min()
    grey = (x/x.max()*255).astype(np.uint8)
    work = np.where(grey <= 40, 0, grey)
    h = work.shape[0]
    lengths = plain_lengths(work[h//2 - int(h*0.4):h//2 + int(h*0.4)].std(0) != 0)
    columns = np.flatnonzero(lengths == lengths.max())
    work = work[:, columns]
    w = work.shape[1]
    lengths = plain_lengths(work[:, w//2 - int(w*0.4):w//2 + int(w*0.4)].std(1) != 0)
    rows = np.flatnonzero(lengths == lengths.max())
    return grey[rows][:, columns], rows, columns


def positions(runs): return np.concatenate([np.arange(a, b) for a, b in runs])


def fuzzed(rng):
    "Breast-like pictures with markers, constant bright bars, stripes, noise, ties and full frames."
    h, w = (int(v) for v in rng.integers(14, 120, 2))
    y, x = np.mgrid[:h, :w]
    top = int(rng.choice([1, 3, 255, 1023, 4095, 65535]))
    kind = rng.integers(0, 6)
    picture = np.zeros((h, w))
    if kind in (0, 1, 2): picture = np.where(np.hypot((y - h*rng.random())/h/0.4, (x - w*rng.choice([0, 1]))/w/0.6) < 1, rng.random((h, w)) if kind else 0.8, 0.02)
    if kind == 3:
        for _ in range(int(rng.integers(1, 5))): a = int(rng.integers(0, w)); picture[:, a:a + int(rng.integers(1, 9))] = rng.random()
    if kind == 4: picture = (rng.random((h, w)) < 0.02)*1.0
    if kind == 5: picture = rng.random((h, w))
    for _ in range(int(rng.integers(0, 3))):
        a, b = int(rng.integers(0, h)), int(rng.integers(0, w))
        picture[a:a + int(rng.integers(1, 20)), b:b + int(rng.integers(1, 20))] = rng.choice([0.158, 0.16, 1.0, rng.random()])
    picture[int(rng.integers(5, h - 5)), int(rng.integers(5, w - 5))] = 1.0
    dtype = np.uint8 if top <= 255 else np.uint16
    pixels = (picture*top).astype(dtype)
    return pixels.astype(np.int16) - np.int16(1000) if top == 4095 and rng.random() < 0.5 else pixels


@pytest.mark.parametrize('seed', range(20))
def test_crop_is_the_plain_procedures(seed):
    rng, cases = np.random.default_rng(seed), 0
    for _ in range(100):
        pixels, mono1, border = fuzzed(rng), bool(rng.random() < 0.4), int(rng.choice([0, 5]))
        part = pixels[border:-border or None, border:-border or None]
        if part.min() == part.max(): continue
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); crop, rows, columns = plain(pixels, mono1, border)   # std of nothing
        table = minmax_table(int(part.min()), int(part.max()), part.dtype, mono1)
        r, c = paper_crop(part, table)
        assert np.array_equal(positions(r), rows) and np.array_equal(positions(c), columns)
        assert np.array_equal(apply_table(take_runs(part, r, c), table), crop)
        cases += 1
    assert cases > 80


def test_fuzz_meets_the_quirks():
    "The fuzzer above would prove little if ties and whole frames never came up."
    rng, ties, whole = np.random.default_rng(0), 0, 0
    for _ in range(600):
        pixels = fuzzed(rng)
        if pixels.min() == pixels.max(): continue
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); _, rows, columns = plain(pixels, border=0)
        ties += (np.diff(columns) > 1).any() or (np.diff(rows) > 1).any()
        whole += len(columns) == pixels.shape[1]
    assert ties >= 5 and whole >= 20


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_run_lengths(on):
    assert np.array_equal(run_lengths(on), plain_lengths(on))
    kept = plain_lengths(on)
    assert np.array_equal(positions(kept_runs(np.array(on))), np.flatnonzero(kept == kept.max()))


# goldens ----------------------------------------------------------------------------------------------------------------------------------------
def test_golden_run_lengths():
    g = np.load(golden('mammoclip/preprocessing.npz'))
    for i in range(4): assert np.array_equal(run_lengths(g[f'ones_in{i}']), g[f'ones_out{i}'])


@pytest.mark.parametrize('i', range(3))
def test_golden_images_to_the_bit(i):
    g = np.load(golden('mammoclip/preprocessing.npz'))
    image = StoredImage(g[f'img{i}_pixels'], 'MONOCHROME1' if g[f'img{i}_mono1'] else 'MONOCHROME2', 16)
    out = preprocess(image, 'mammo_clip_v1', (95, 57))
    assert np.array_equal(out.pixels, g[f'img{i}_resized_57x95'])
    h, w = g[f'img{i}_crop'].shape
    assert np.array_equal(preprocess(image, 'mammo_clip_v1', (h, w)).pixels, g[f'img{i}_crop'])
    place = preprocess(image, 'mammo_clip_v1', (1520, 912)).placement
    assert np.allclose(place.boxes([[30, 60, 70, 110]], beyond=True)[0], g[f'img{i}_bbox_in_30_60_70_110_out_912x1520'], rtol=1e-12)


def test_own_fixture_of_the_paper_profile():
    "Parity without ../shared: a picture from a formula against the plain procedure above and OpenCV's resize."
    y, x = np.mgrid[:150, :100]
    pixels = (np.where(np.hypot((y - 70)/60, x/70) < 1, 900 + 500*np.cos(y/7)*np.cos(x/9), 20)).astype(np.uint16)
    for mono1 in (False, True):
        crop, rows, columns = plain(pixels, mono1)
        out = preprocess(StoredImage(pixels, 'MONOCHROME1' if mono1 else 'MONOCHROME2'), 'mammo_clip_v1', (64, 40))
        assert np.array_equal(out.pixels, cv2.resize(crop, (40, 64), interpolation=cv2.INTER_AREA))
        assert out.window == (rows[0] + 5, columns[0] + 5, rows[-1] + 6, columns[-1] + 6)


# boxes and masks --------------------------------------------------------------------------------------------------------------------------------
def breast(h=400, w=260, right=False):
    y, x = np.mgrid[:h, :w]
    picture = np.where(np.hypot((y - h/2)/(0.42*h), x/(0.7*w)) < 1, 1500 + 300*np.cos(y/11)*np.cos(x/13), 30).astype(np.uint16)
    return np.ascontiguousarray(picture[:, ::-1]) if right else picture


@settings(max_examples=80, deadline=None)
@given(st.integers(20, 330), st.integers(10, 120), st.integers(8, 60), st.integers(8, 60), st.booleans(), st.sampled_from(list(PROFILES)),
       st.tuples(st.integers(40, 500), st.integers(40, 400)), st.booleans())
def test_a_bright_rectangle_goes_where_its_box_goes(y0, x0, h, w, right, name, size, mono1):
    picture = breast(right=right)
    x0 = 260 - x0 - w if right else x0
    y1, x1 = min(y0 + h, 400), min(max(x0, 0) + w, 260)
    x0 = max(x0, 0)
    picture[y0:y1, x0:x1] = 4000
    mask = np.zeros(picture.shape, np.uint8)
    mask[y0:y1, x0:x1] = 1
    if name in ('resize_v1', 'letterbox_v1'): picture = (picture >> 4).astype(np.uint8)
    stored = picture.max() - picture if mono1 else picture
    out = preprocess(StoredImage(stored, 'MONOCHROME1' if mono1 else 'MONOCHROME2'), name, size, [[x0, y0, x1, y1]], mask)
    bx0, by0, bx1, by1 = out.boxes[0]
    bright = out.pixels > 0.8*np.iinfo(out.pixels.dtype).max
    exact = 0.51 if max(out.placement.scale) <= 1 else 1.01     # OpenCV interpolates bilinearly where a side grows
    seen = ((bright, 1.01),) if 'equalise' not in PROFILES[name].grey else () # equal shares of grey: the tissue is bright, too, and only the mask tells
    for found, tolerance in (*seen, (out.mask > 0, exact)):
        if (bx1 - bx0) < 2 or (by1 - by0) < 2: continue
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        assert np.abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - out.boxes[0]).max() <= tolerance
    if out.box_fraction[0] > 0.9999: assert np.allclose(out.placement.boxes_back(out.boxes), [[x0, y0, x1, y1]], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.floats(0.2, 3), st.data())
def test_placement_there_and_back_through_gaps(steps, scale, data):
    edges = np.cumsum(steps)[:len(steps)//2*2]
    runs = tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2]))
    place = Placement(runs, runs, (scale, scale), (3, 4), (500, 500))
    starts, ends = [v for a, b in runs for v in (a, (a + b)/2)], [v for a, b in runs for v in ((a + b)/2, b)]
    x0 = data.draw(st.sampled_from(starts))
    x1 = data.draw(st.sampled_from([v for v in ends if v > x0] or [runs[-1][1]]))
    assert np.allclose(place.boxes_back(place.boxes([[x0, x0, x1, x1]])), [[x0, x0, x1, x1]])


def test_boxes_outside_are_clipped_or_refused_and_counted():
    picture = breast()
    boxes = [[100, 150, 140, 190], [-20, 150, 20, 190], [300, 10, 340, 50], [0, 0, 260, 400]]
    out = preprocess(picture, 'resize_v1', (200, 130), boxes)
    assert np.allclose(out.box_fraction, [1, 0.5, 0, 1]) and out.box_kept.tolist() == [True, True, False, True]
    assert out.boxes.min() >= 0 and out.boxes[:, [0, 2]].max() <= 130 and out.boxes[:, [1, 3]].max() <= 200
    with pytest.raises(DataError, match=r'row 1.*outside the image of 260 × 400'): preprocess(picture, 'resize_v1', (200, 130), boxes, outside='error')
    for bad in ([[5, 5, 5, 9]], [[9, 5, 5, 9]], [[0, 0, float('nan'), 3]]):
        with pytest.raises(DataError, match='no area'): preprocess(picture, 'resize_v1', (200, 130), bad)
    assert preprocess(picture, 'resize_v1', (20, 13)).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match='outside must'): preprocess(picture, 'resize_v1', (20, 13), boxes, outside='drop')


def test_masks_keep_small_findings_and_labels():
    picture, mask = breast(), np.zeros((400, 260), np.uint8)
    mask[200, 60] = 255
    out = preprocess(picture, 'mammo_clip_v1', (60, 40), mask=mask).mask
    assert set(np.unique(out)) == {0, 255} and (out > 0).sum() <= 2
    mask[100:180, 20:90], mask[200:300, 20:90] = 3, 7
    mask[200, 60] = 7
    assert set(np.unique(preprocess(picture, 'mammo_clip_v1', (60, 40), mask=mask).mask)) == {0, 3, 7}
    with pytest.raises(DataError, match='mask'): preprocess(picture, mask=mask[:-1])


# profiles ---------------------------------------------------------------------------------------------------------------------------------------
def test_standard_profile_keeps_aspect_spacing_and_side():
    for right in (False, True):
        picture = breast(right=right)
        picture[5:25, 100:150] = 4000        # a marker outside the breast
        out = preprocess(StoredImage(picture, spacing=(0.1, 0.1)), 'dicom_voi_v1', (300, 400))
        assert out.side == ('right' if right else 'left') and out.window[0] > 25
        assert np.isclose(out.spacing[0], out.spacing[1], rtol=0.02) and np.isclose(out.spacing[0], 0.1*(out.window[2] - out.window[0])/300)
        padding = out.pixels[:, :50] if right else out.pixels[:, -50:]
        assert padding.max() == 0 and (out.pixels[:, -1] if right else out.pixels[:, 0]).max() > 0


def test_standard_profile_shows_what_pydicom_shows():
    ds = read_dicom(sample('dicom/wg04_RG3_RLE.dcm'))
    full = Profile('test', crop='none', grey='voi', dtype='uint16', size=ds.shape)
    import pydicom
    from pydicom.pixels import apply_voi_lut
    raw = pydicom.dcmread(sample('dicom/wg04_RG3_RLE.dcm'))
    shown = np.clip(apply_voi_lut(raw.pixel_array, raw)/1023, 0, 1)
    assert np.abs(preprocess(ds, full).pixels/65535 - (1 - shown)).max() < 1e-4       # MONOCHROME1


def test_profiles_are_named():
    with pytest.raises(ValueError, match="Did you mean 'mammo_clip_v1'"): get_profile('mammoclip_v1')
    with pytest.raises(ValueError, match='profile crop'): preprocess(breast(), Profile('x', crop='brest'))
    assert all(name == p.name and name.endswith(f'_v{p.version}') for name, p in PROFILES.items())


@pytest.mark.parametrize('name', PROFILES)
def test_images_without_content_are_refused(name):
    for pixels in (np.full((60, 50), 9, np.uint16), np.zeros((60, 50), np.uint8)):
        with pytest.raises(DataError, match='constant'): preprocess(pixels, name, (20, 20))
    with pytest.raises(TypeError, match='float'): preprocess(np.ones((60, 50)), name)
    with pytest.raises(DataError, match='constant'):
        preprocess(StoredImage(breast(), windows=((60000, 10),)), 'dicom_voi_v1', (20, 20))


def test_constant_inside_the_border_is_refused():
    picture = np.full((40, 40), 3, np.uint8)
    picture[0] = 200
    with pytest.raises(DataError, match='constant'): preprocess(picture, 'mammo_clip_v1', (20, 20))
    with pytest.raises(DataError, match='too small'): preprocess(picture[:11], 'mammo_clip_v1', (20, 20))


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint16, np.int16])
def test_tables_of_every_type(dtype):
    info = np.iinfo(dtype)
    pixels = np.random.default_rng(0).integers(info.min, info.max + 1, (37, 23)).astype(dtype)
    table = np.random.default_rng(1).integers(0, 256, info.max - info.min + 1).astype(np.uint8)
    assert np.array_equal(apply_table(pixels, table), table[pixels.astype(int) - info.min])
    assert np.array_equal(apply_table(pixels[::2, 3:9], table), table[pixels[::2, 3:9].astype(int) - info.min])


def test_robust_crop_on_real_mammograms():
    "The largest bright region holds every annotated lesion and is smaller than the image."
    import csv
    boxes = {}
    for row in csv.DictReader(sample('mammo/boxes.csv').open()):
        boxes.setdefault(row['image_id'], []).append([float(row[k]) for k in ('x0', 'y0', 'x1', 'y1')])
    rows = [r for r in csv.DictReader(sample('mammo/index.csv').open()) if r['image_id'] in boxes and r['dataset'] in ('mini-MIAS', 'CBIS-DDSM', 'DMID')][::3]
    kept, shares = [], []
    for r in rows:
        image = read_image(sample('mammo/index.csv').parent/r['image_path'])
        out = preprocess(image, 'dicom_voi_v1', (380, 228), boxes[r['image_id']])
        kept += out.box_fraction.tolist()
        shares.append((out.window[2] - out.window[0])*(out.window[3] - out.window[1])/image.pixels.size)
    assert len(kept) >= 25 and min(kept) > 0.9 and np.median(shares) < 0.8


def test_chest_side_of_a_symmetric_mask_is_unknown():
    assert chest_side(np.ones((10, 10), bool)) == '' and chest_side(np.zeros((4, 4), bool)) == ''
    assert breast_crop(np.full((50, 50), 3, np.uint8) + np.eye(50, dtype=np.uint8), np.arange(256, dtype=np.uint8))[0] == ((0, 50),)
