"""Chest X-ray releases: each reader on files in the release's exact layout, LoVT's numbers, and the real tables and images where they are at hand."""
import gzip
import importlib
import json
import os
import re

import cv2
import numpy as np
import pandas as pd
import pytest
from golden import golden, sample
from releases import usable
from releases_cxr import (
    chest,
    write_chexpert,
    write_covid_rural,
    write_lovt_tables,
    write_mimic_cxr,
    write_nih_cxr,
    write_object_cxr,
    write_openi,
    write_rsna_pneumonia,
    write_siim,
)

from medvl.core.errors import DataError
from medvl.data.releases.chexpert import CHEXPERT, read_chexpert
from medvl.data.releases.covid_rural import COVID_RURAL, grey_mean, read_covid_rural
from medvl.data.pixels.file import read_image
from medvl.data.releases.lovt_splits import LOVT_SETS, apply_split, leak_free, lovt_verdicts, read_lovt_split, shared_patients
from medvl.data.releases.mimic_cxr import MIMIC_CXR, dropped_studies, read_mimic_cxr
from medvl.data.text.mimic_sections import find_sections, lovt_sections, section_name
from medvl.data.releases.nih_cxr import NIH_CLASSES, NIH_CXR, read_nih_cxr
from medvl.data.releases.object_cxr import OBJECT_CXR, read_annotation, read_object_cxr, shape_boxes, shape_mask
from medvl.data.releases.openi import OPENI, image_name, read_openi
from medvl.data.prepare.run import prepare
from medvl.data.pixels.profiles import PROFILES, equal_table, preprocess
from medvl.data.releases.release import check_release
from medvl.data.releases.rsna_pneumonia import RSNA_PNEUMONIA, read_rsna_pneumonia
from medvl.data.schema import Source
from medvl.data.pixels.shapes import Derived, box_mask, ellipse_mask, mask_rle, polygon_mask, rle_mask
from medvl.data.releases.siim import SIIM, read_siim
from medvl.data.releases.localized import TASK_SETS, prepare_task, read_task_dataset

RELEASES = (RSNA_PNEUMONIA, COVID_RURAL, SIIM, OBJECT_CXR, NIH_CXR, MIMIC_CXR, OPENI, CHEXPERT)
HERE = dict(jobs=1, backend='sequential')


@pytest.fixture
def salt(tmp_path):
    path = tmp_path/'salt.txt'
    path.write_text('a salt for tests\n')
    return path


def kinds(source): return source.report.issues.kind.value_counts().to_dict()


def disc(h=96, w=96, y=40, x=30, r=14): return (((np.mgrid[:h, :w][0] - y)**2 + (np.mgrid[:h, :w][1] - x)**2) < r*r).astype(np.uint8)


def mask_of(root, source, image): return cv2.imread(str(root/source.records.set_index('image_id').mask_path[image]), 0)


# ---------------------------------------------------------------- descriptions

@pytest.mark.parametrize('release', RELEASES, ids=lambda r: r.name)
def test_descriptions_are_whole(release, tmp_path):
    module, _, name = release.reader.rpartition('.')
    assert callable(getattr(importlib.import_module(module), name))
    assert all((release.url, release.access, release.licence, release.citation)) and any(p.needed for p in release.parts) and release.table.index.is_unique
    assert set(check_release(tmp_path, release).state) <= {'missing', 'not there'}


# ---------------------------------------------------------------- drawing, against LoVT's numbers

@pytest.mark.parametrize('case', ['box_and_ellipse', 'polygon', 'none'])
def test_object_annotations_like_lovt(case):
    notes, arrays = json.loads(golden('lovt/preprocess.json').read_text())[f'object_cxr/{case}'], np.load(golden('lovt/preprocess.npz'))
    shapes = read_annotation(notes['annotation'])
    boxes = shape_boxes(shapes, legacy=True)
    assert np.c_[boxes[:, :2], boxes[:, 2:] - boxes[:, :2]].tolist() == notes['boxes_as_written_x_y_then'] and len(boxes) == len(notes['labels'])
    np.testing.assert_array_equal(shape_mask(shapes, (notes['height'], notes['width']), legacy=True), arrays[f'object_cxr_mask/{case}'])
    if case == 'polygon': # ours is the mirror image at the diagonal, but for how a slanted line falls on pixels
        assert (shape_mask(shapes, (notes['height'], notes['width']))[:, :80] != arrays[f'object_cxr_mask/{case}'][:80, :80].T).sum() <= 1


@pytest.mark.parametrize('case', ['single', 'two_annotations', 'empty'])
def test_run_lengths_like_lovt(case):
    notes, arrays = json.loads(golden('lovt/preprocess.json').read_text())[f'siim/{case}'], np.load(golden('lovt/preprocess.npz'))
    mask = np.zeros((32, 32), np.uint8)
    for text in notes['rle']: mask |= rle_mask(text, (32, 32))
    np.testing.assert_array_equal(mask, arrays[f'siim_mask32/{case}'])
    assert mask.mean() == notes['positive_fraction']


def test_box_mask_and_equalisation_like_lovt():
    notes, arrays = json.loads(golden('lovt/preprocess.json').read_text())['box_mask'], np.load(golden('lovt/preprocess.npz'))
    b = np.array(notes['boxes_xywh'])
    np.testing.assert_array_equal(box_mask(np.c_[b[:, :2], b[:, :2] + b[:, 2:]], tuple(notes['height_width'])), arrays['box_mask'])
    image = arrays['hist_eq/input_uint8']
    np.testing.assert_array_equal(equal_table(image)[image], arrays['hist_eq/written_uint8'])
    np.testing.assert_array_equal(preprocess(image, 'lovt_equalised_v1', image.shape).pixels, arrays['hist_eq/written_uint8'])


def test_drawing_without_golden_numbers():
    assert box_mask([[1, 1, 3, 4]], (5, 5)).sum() == 6 and box_mask([[1.2, 1.2, 1.4, 1.4]], (5, 5)).sum() == 1 and box_mask([], (5, 5)).sum() == 0
    assert box_mask([[-3, -3, 2, 2]], (5, 5)).sum() == 4 and box_mask([[4, 4, 9, 9]], (5, 5)).sum() == 1 and box_mask([[-9, -9, -5, -5]], (5, 5)).sum() == 0
    rng = np.random.default_rng(0)
    for _ in range(20): # a triangle against the definition, pixel by pixel, where no line is near
        p = rng.integers(0, 20, (3, 2)).astype(float)
        mask = polygon_mask(p, (20, 20))
        for y, x in rng.integers(0, 20, (40, 2)):
            side = [((b - a)[0]*(y - a[1]) - (b - a)[1]*(x - a[0]))/max(np.hypot(*(b - a)), 1e-9) for a, b in zip(p, np.roll(p, -1, 0))]
            if min(abs(d) for d in side) > 1: assert mask[y, x] == (len({d > 0 for d in side}) == 1), (p.tolist(), x, y)
    y, x = np.mgrid[:30, :40]
    np.testing.assert_array_equal(ellipse_mask((5, 5, 35, 25), (30, 40)), ((x + .5 - 20)/15)**2 + ((y + .5 - 15)/10)**2 <= 1)
    for _ in range(10):
        m = (rng.random((7, 9)) < .4).astype(np.uint8)
        np.testing.assert_array_equal(rle_mask(mask_rle(m), m.shape), m)


def test_equalisation():
    rng = np.random.default_rng(1)
    for dtype, top in ((np.uint8, 255), (np.uint16, 255), (np.int16, 255), (np.uint16, 65535)):
        image = (rng.normal(size=(50, 60))*30 + 100).clip(0, 250).astype(dtype)
        if dtype == np.int16: image -= 120
        table = equal_table(image, top=top)
        share = np.array([(image <= v).mean() for v in image.ravel()[:200]])
        assert np.abs(table[image.ravel()[:200].astype(int) - np.iinfo(dtype).min]/top - share).max() < .015 # but for the bins
    flat = preprocess(chest(), 'lovt_equalised_v1', (96, 96)).pixels
    assert abs(float(flat.mean()) - 128) < 4 and np.abs(np.bincount(flat.ravel() // 32, minlength=8)/flat.size - 1/8).max() < .03 # all greys about equally frequent
    assert preprocess(chest(), 'lovt_v1', (96, 96)).pixels.tolist() == chest().tolist() and PROFILES['lovt_v1'].size == (224, 224)
    with pytest.raises(DataError, match='constant'): preprocess(np.full((9, 9), 7, np.uint8), 'lovt_equalised_v1')


def test_derived_folder(tmp_path):
    (tmp_path/'release').mkdir(); (tmp_path/'other').mkdir()
    derived, drawn = Derived(tmp_path/'release', tmp_path/'derived'), []
    draw = lambda: drawn.append(1) or 255*disc()
    a, b, c = derived.write('x/../y', [1], draw), derived.write('x/../y', [1], draw), derived.write('x/../y', [2], draw)
    assert a == b != c and len(drawn) == 2 and (tmp_path/'derived'/a).parent == tmp_path/'derived'/'masks'
    assert Derived(tmp_path/'other', tmp_path/'derived').base == tmp_path/'derived' and (tmp_path/'derived'/'release').resolve() == tmp_path/'other'
    with pytest.raises(ZeroDivisionError): derived.write('z', [], lambda: 1/0)
    assert len(os.listdir(tmp_path/'derived'/'masks')) == 2 # nothing half written
    with pytest.raises(DataError, match='inside the release'): Derived(tmp_path/'release', tmp_path/'release'/'derived')
    with pytest.raises(DataError, match='does not exist'): Derived(tmp_path/'none')


# ---------------------------------------------------------------- RSNA Pneumonia

def rsna_samples(n=10): return [dict(id=f'00aa{k:02d}-ff', pixels=chest(shift=k), boxes=[(20, 30, 50, 70), (44, 60, 80, 90)][:k % 3], view='AP' if k % 2 else 'PA', normal=k % 2 == 0) for k in range(n)]


def test_rsna(tmp_path, salt):
    root = write_rsna_pneumonia(tmp_path/'rsna', rsna_samples())
    source = usable(read_rsna_pneumonia(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts == dict(images=10, patients=10, boxes=9, with_opacity=6, left_out=0) and not len(source.report.issues)
    assert source.records['view'].tolist() == ['PA', 'AP']*5 and source.records.label_normal.tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    union = box_mask([(20, 30, 50, 70), (44, 60, 80, 90)], (96, 96))
    np.testing.assert_array_equal(mask_of(tmp_path/'derived', source, '00aa02-ff') > 0, union > 0) # overlapping boxes are one area
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_v1', size=(48, 48), salt=salt, **HERE)
    assert len(data) == 10 and len(data.boxes) == 9 and (data.manifest.mask_row >= 0).all()
    assert data.mask(2).sum() == cv2.resize(union, (48, 48), interpolation=cv2.INTER_AREA).sum() == union.sum()/4
    plain = read_rsna_pneumonia(root)
    assert (plain.records.mask_path == '').all() and plain.records.image_path[0] == 'stage_2_train_images/00aa00-ff.dcm' and not (tmp_path/'rsna'/'masks').exists()
    assert (read_rsna_pneumonia(root, headers=False).records['view'] == 'FRONTAL').all()
    assert check_release(root, RSNA_PNEUMONIA).state['stage_2_train_images/*.dcm'] in ('incomplete', 'wrong')


def test_rsna_bad_rows(tmp_path):
    root = write_rsna_pneumonia(tmp_path/'rsna', rsna_samples())
    table = root/'stage_2_train_labels.csv'
    lines = table.read_text().splitlines()
    lines += ['00aa00-ff,5,5,9,9,1', '00aa03-ff,,,,,1', '00aa06-ff,1,1,,4,0', 'absent,,,,,0', '00aa04-ff,5,5,9,9,2']
    lines = [line.replace('20.0,30.0,30.0,40.0,1', '50.0,70.0,-30.0,-40.0,1') if line.startswith('00aa01') else line for line in lines]
    table.write_text('\n'.join(lines) + '\n')
    (root/'stage_2_train_images'/'00aa09-ff.dcm').write_bytes(b'not a DICOM file')
    source = usable(read_rsna_pneumonia(root))
    assert source.records.image_id.tolist() == [f'00aa{k:02d}-ff' for k in (2, 5, 7, 8)]
    assert kinds(source) == {'row contradicts itself': 3, 'rows contradict each other': 1, 'image is absent': 1, 'image with a wrong box': 1, 'header cannot be read': 1}
    assert 'inside out' in source.report.issues.set_index('kind').detail['image with a wrong box']
    table.write_text(table.read_text().replace('Target', 'Traget'))
    with pytest.raises(DataError, match="column 'Target' is missing.*Is it 'Traget'"): read_rsna_pneumonia(root)
    with pytest.raises(DataError, match='there is no stage_2_train_labels.csv'): read_rsna_pneumonia(root/'stage_2_train_images')
    write_rsna_pneumonia(tmp_path/'b', rsna_samples(2))
    for f in (tmp_path/'b'/'stage_2_train_images').iterdir(): f.unlink()
    with pytest.raises(DataError, match='none of the 2 images of the table is here'): read_rsna_pneumonia(tmp_path/'b')


def test_rsna_overlapping_and_repeated_boxes(tmp_path):
    root = write_rsna_pneumonia(tmp_path/'rsna', [dict(id='a', pixels=chest(), boxes=[(10, 10, 40, 40), (20, 20, 60, 60), (10, 10, 40, 40), (80, 80, 120, 90)])])
    source = usable(read_rsna_pneumonia(root))
    assert len(source.boxes) == 3 and kinds(source) == {'box listed twice': 1, 'box reaches over the edge': 1} and source.boxes.x1.max() == 96


def test_rsna_real_dicom(tmp_path, salt):
    file, other = sample('dicom/rsna_cxr_jpegbaseline.dcm'), sample('dicom/rsna_cxr_mono1_edited.dcm')
    root = write_rsna_pneumonia(tmp_path/'rsna', [dict(id=n, pixels=chest(1024, 1024), boxes=[(100, 200, 400, 700)] if n == 'a' else ()) for n in 'ab'])
    for n, f in (('a', file), ('b', other)): (root/'stage_2_train_images'/f'{n}.dcm').write_bytes(f.read_bytes())
    source = usable(read_rsna_pneumonia(root, tmp_path/'derived'), tmp_path/'derived')
    assert set(source.records['view']) <= {'PA', 'AP'} and read_image(root/'stage_2_train_images'/'a.dcm').shape == (1024, 1024)
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_v1', size=(224, 224), salt=salt, **HERE)
    assert data.mask(0)[44:153, 22:87].all() and data.mask(0).sum() < 110*67 and data.mask(1).sum() == 0
    assert np.corrcoef(data.image(0).ravel(), data.image(1).ravel())[0, 1] < -.99 # its values were left, its tag says MONOCHROME1: it is turned


# ---------------------------------------------------------------- COVID Rural

def covid_samples(): return [dict(id=f'COVID-19-AR-1640648{p}_0{d}-08-2012-XR', pixels=chest(90, 110, shift=3*p + d), mask=disc(90, 110) if d == 1 else 0*disc(90, 110)) for p in range(4) for d in (1, 2)]


def test_covid(tmp_path, salt):
    samples = covid_samples()
    samples[0]['pixels'] = np.stack([chest(90, 110), chest(90, 110)//2, chest(90, 110)//4 + 90], -1)
    root = write_covid_rural(tmp_path/'covid_rural_annot', samples)
    source = usable(read_covid_rural(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts == dict(images=8, patients=4, with_opacity=4, left_out=0) and source.records.patient_id[0] == 'COVID-19-AR-16406480'
    grey = read_image(tmp_path/'derived'/source.records.image_path[0]).pixels # not colour any more
    colour = cv2.imread(str(root/'jpgs'/f'{samples[0]["id"]}.jpg'))
    assert np.abs(grey - colour.mean(2)).max() <= .5 and np.array_equal(grey, grey_mean(root/'jpgs'/f'{samples[0]["id"]}.jpg'))
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_equalised_v1', size=(64, 64), salt=salt, **HERE)
    assert len(data) == 8 and [int(data.mask(i).any()) for i in range(8)] == [1, 0]*4 and data.image(0)[:5].max() == 0 # padded after equalising
    plain = read_covid_rural(root)
    with pytest.raises(DataError, match='none of 8|none'): prepare(Source(plain.records[:1], plain.boxes, plain.sentences, plain.report), root, tmp_path/'p2', profile='lovt_v1', size=(64, 64), salt=salt, **HERE)
    assert len(prepare(plain, root, tmp_path/'p3', profile='lovt_v1', size=(64, 64), salt=salt, colour='luma', **HERE)) == 8


def test_covid_bad_masks(tmp_path):
    samples = covid_samples()
    samples[1]['mask'], samples[2]['mask'], samples[3]['mask'] = None, disc(45, 55, 20, 15, 7), 50*disc(90, 110) + 3
    samples[4]['id'] = 'radiograph_1'
    root = write_covid_rural(tmp_path/'c', samples)
    (root/'pngs_masks'/f'{samples[5]["id"]}.png').write_bytes(b'\x89PNG broken')
    cv2.imwrite(str(root/'pngs_masks'/'stray.png'), disc())
    source = usable(read_covid_rural(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.records.image_id.tolist() == sorted(samples[k]['id'] for k in (0, 6, 7))
    assert kinds(source) == {'mask cannot be used': 3, 'image without a mask': 1, 'name without a patient': 1, 'mask without an image': 1}
    assert source.report.issues.detail.str.contains('45 × 55 pixels, the image 90 × 110').any()
    resized = read_covid_rural(root, tmp_path/'derived', resize_masks=True)
    assert len(resized.records) == 4 and mask_of(tmp_path/'derived', resized, samples[2]['id']).shape == (90, 110)
    (tmp_path/'empty'/'jpgs').mkdir(parents=True)
    with pytest.raises(DataError, match='names no image'): read_covid_rural(tmp_path/'empty')
    for f in (root/'pngs_masks').iterdir(): f.unlink()
    with pytest.raises(DataError, match='none of 8 images can be used'): read_covid_rural(root)


# ---------------------------------------------------------------- SIIM

def siim_samples(): return [dict(id=f'1.2.276.0.7230010.3.1.4.8323329.{k}.1517875', patient=f'p{k//2}', pixels=chest(64, 64, shift=k), masks=[disc(64, 64, 20, 20, 9), disc(64, 64, 50, 45, 6)][:k % 3]) for k in range(6)]


@pytest.mark.parametrize('stage', [1, 2])
def test_siim(tmp_path, salt, stage):
    samples = siim_samples()
    root = write_siim(tmp_path/'siim', samples, stage)
    source = usable(read_siim(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts == dict(images=6, patients=3, with_pneumothorax=4, outlines=6) and source.records.label_pneumothorax.tolist() == [0, 1, 1]*2
    for s in samples: np.testing.assert_array_equal(mask_of(tmp_path/'derived', source, s['id']), 255*np.max([0*disc(64, 64), *s['masks']], 0))
    assert source.records.mask_path[0] == source.records.mask_path[3] # the shared empty mask
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_equalised_v1', size=(64, 64), salt=salt, **HERE)
    assert [int(data.mask(i).sum()) for i in range(3)] == [0, int(samples[1]['masks'][0].sum()), int(sum(m.sum() for m in samples[2]['masks']))]


def test_siim_bad_rows(tmp_path):
    samples = siim_samples()
    samples[0]['masks'], samples[1]['masks'], samples[2]['masks'], samples[3]['masks'] = ['4000 97'], ['5 x'], ['12'], [samples[4]['masks'][0], '-1']
    root = write_siim(tmp_path/'siim', samples)
    table = root/'train-rle.csv'
    table.write_text(table.read_text() + 'absent, -1\n')
    stray = next(root.rglob('*.5.1517875.dcm'))
    (stray.parent/'stray.dcm').write_bytes(stray.read_bytes())
    source = usable(read_siim(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.records.image_id.tolist() == [s['id'] for s in samples[3:]] and source.records.label_pneumothorax.tolist() == [1, 1, 1]
    assert kinds(source) == {'mask cannot be drawn': 3, 'rows contradict each other': 1, 'image is absent': 1, 'image without a row': 1}
    first = source.report.issues[source.report.issues.kind == 'mask cannot be drawn'].iloc[0]
    assert first.row == 0 and 'end at pixel 4097, the image of 64 × 64 has 4096' in first.detail
    table.write_text(table.read_text().replace('EncodedPixels', 'rle'))
    with pytest.raises(DataError, match="column 'EncodedPixels' is missing"): read_siim(root)
    table.write_text('ImageId, EncodedPixels\n' + samples[0]['id'] + ', 4000 97\n')
    with pytest.raises(DataError, match='none of 1 images can be used.*runs end at pixel'): read_siim(root)


# ---------------------------------------------------------------- Object-CXR

SHAPES = [('box', [(10, 20), (50, 40)]), ('ellipse', [(60, 10), (90, 70)]), ('polygon', [(10, 45), (40, 47), (35, 65), (12, 63)])]


def object_samples(): return [dict(id=f'{k:05d}', pixels=chest(80, 100, shift=k), shapes=SHAPES[:k % 4]) for k in range(1, 9)], [dict(id=f'{k}', pixels=chest(80, 100, shift=k), shapes=SHAPES[2:] if k % 2 else ()) for k in range(8001, 8005)]


def test_object(tmp_path, salt):
    root = write_object_cxr(tmp_path/'object', *object_samples())
    source = usable(read_object_cxr(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts == dict(images=12, with_objects=8, boxes=14, train=8, test=4) and (source.records.split == 'test').sum() == 4
    one = source.boxes[source.boxes.image_id == '00003'][['x0', 'y0', 'x1', 'y1']].to_numpy()
    assert one.tolist() == [[10, 20, 50, 40], [60, 10, 90, 70], [10, 45, 40, 65]]
    mask = mask_of(tmp_path/'derived', source, '00003') > 0
    assert mask[20:40, 10:50].all() and not mask[11, 61] and mask[40, 75] and mask[46, 12] and not mask[75:].any()
    legacy = read_object_cxr(root, tmp_path/'derived', legacy=True)
    assert legacy.boxes[legacy.boxes.image_id == '00003'].iloc[0][['x0', 'y0', 'x1', 'y1']].tolist() == [10, 20, 30, 60]
    wrong = mask_of(tmp_path/'derived', legacy, '00003') > 0
    assert wrong[11, 61] and wrong[12, 46] and not np.array_equal(mask, wrong)
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_equalised_v1', size=(100, 100), salt=salt, **HERE)
    assert len(data.boxes) == 14 and data.boxes.y0.min() == 10 + 10 # padded above: 80 rows in a square of 100


def test_object_bad_annotations(tmp_path):
    train, dev = object_samples()
    root = write_object_cxr(tmp_path/'object', train, dev)
    table = root/'train.csv'
    text = table.read_text().replace('00004.jpg,', '00004.jpg,3 1 2 3 4').replace('00008.jpg,', '00008.jpg,0 1 2 3')
    text = re.sub('00001.jpg,.*', '00001.jpg,0 50 40 10 20', text) + '00009.jpg,\n00002.jpg,\n'
    table.write_text(text)
    source = usable(read_object_cxr(root, tmp_path/'derived'), tmp_path/'derived')
    assert sorted(set(f'{k:05d}' for k in range(1, 10)) - set(source.records.image_id)) == ['00001', '00004', '00008', '00009']
    assert kinds(source) == {'outline not understood': 2, 'image with a wrong box': 1, 'image is absent': 1, 'image listed twice': 1}
    (root/'dev.csv').unlink()
    assert 'dev.csv is absent' in kinds(read_object_cxr(root)) and (read_object_cxr(root).records.split == 'train').all()
    table.unlink()
    with pytest.raises(DataError, match='there is no train.csv'): read_object_cxr(root)


# ---------------------------------------------------------------- NIH

def nih_samples(side=128):
    box = lambda k: [('Cardiomegaly', 300., 400., 700.5, 800.25), ('Infiltrate', 350., 500., 500., 600.)][:1 + k % 2]
    boxed = [dict(id=f'{k:08d}_{k % 3:03d}', pixels=chest(side, side, shift=k), boxes=box(k), labels=('Cardiomegaly', 'Infiltration')[:1 + k % 2], test=k > 4, age='058Y' if k == 1 else 50) for k in range(1, 7)]
    return boxed + [dict(id=f'{k:08d}_000', pixels=chest(side, side, shift=k), test=k % 2 == 0, view='AP') for k in range(10, 16)]


def test_nih(tmp_path, salt):
    root = write_nih_cxr(tmp_path/'nih', nih_samples(), folder='images_001/images')
    source = usable(read_nih_cxr(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts == dict(images=9, patients=9, boxes=9, boxed=6, without_box=3) and kinds(source) == {'copies of another size': 1}
    assert source.records.split.tolist() == ['train']*4 + ['test']*5 and source.records.age[0] == 58
    first = source.boxes.iloc[0]
    assert first.label == 'cardiomegaly' and np.allclose(first[['x0', 'y0', 'x1', 'y1']].astype(float), np.array([300, 400, 700.5, 800.25])/8)
    assert set(source.boxes.label) == {'cardiomegaly', 'infiltrate'} <= set(NIH_CLASSES) and source.records.label_infiltrate[0] == 1
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_equalised_v1', size=(64, 64), salt=salt, **HERE)
    assert len(data) == 9 and data.mask(8).sum() == 0 and data.mask(0).sum() > 0
    assert len(read_nih_cxr(root, normals=1).records) == 7 and read_nih_cxr(root, normals=2).records.image_id.tolist() == read_nih_cxr(root, normals=2).records.image_id.tolist()
    assert set(read_nih_cxr(root, normals=1).records.image_id) <= set(read_nih_cxr(root, normals=2).records.image_id)
    assert len(read_nih_cxr(root, images='all').records) == 12


def test_nih_bad_tables(tmp_path):
    root = write_nih_cxr(tmp_path/'nih', nih_samples())
    table = root/'BBox_List_2017.csv'
    table.write_text(table.read_text() + '00000001_001.png,Wound,1,1,9,9,,,\n00000002_002.png,Mass,10,10,-5,4,,,\n00000003_000.png,Mass,a,10,5,4,,,\n00000004_001.png,Mass,2000,10,5,4,,,\n99999999_000.png,Mass,1,1,5,5,,,\n')
    (root/'Data_Entry_2017.csv').write_text((root/'Data_Entry_2017.csv').read_text().replace(',0,10,50,F', ',0,10,414,F'))
    source = usable(read_nih_cxr(root, tmp_path/'derived'), tmp_path/'derived')
    assert kinds(source) == {'image with a wrong box': 3, 'unknown finding': 1, 'impossible age': 1, 'image is absent': 1, 'copies of another size': 1} and len(source.records) == 6
    for name, words in (('test_list.txt', 'no images without a finding'), ('Data_Entry_2017.csv', 'labels are absent')):
        (root/name).unlink()
        assert words in kinds(read_nih_cxr(root))
    assert read_nih_cxr(root).records.patient_id[0] == '00000001' and read_nih_cxr(root).records.label_mass.isna().all()
    table.write_text('Image Index,Finding Label\na.png,Mass\n')
    with pytest.raises(DataError, match='should begin with Image Index'): read_nih_cxr(root)
    table.unlink()
    with pytest.raises(DataError, match='there is no BBox_List_2017.csv'): read_nih_cxr(root)


def test_nih_real_images(tmp_path, salt):
    "Real images and boxes, in the release's layout again: the boxes fall where the staged table has them."
    staged = pd.read_csv(sample('cxr/boxes.csv'))
    staged = staged[staged.dataset == 'NIH ChestX-ray14']
    index = pd.read_csv(sample('cxr/index.csv'), dtype=str, keep_default_na=False).set_index('image_id')
    root = tmp_path/'nih'
    (root/'images').mkdir(parents=True)
    lines, entries, listed = ['Image Index,Finding Label,Bbox [x,y,w,h],,,'], ['Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],'], []
    for b in staged.itertuples():
        x, y, w, h = map(float, re.findall(r'[xywh]=([\d.]+)', b.source))
        lines.append(f'{b.image_id}.png,{b.label},{x},{y},{w},{h},,,')
    normal = index[(index.no_finding == '1.0') & index.image_path.str.startswith('images/nih/')].index[:5]
    for n in [*staged.image_id.unique(), *normal]:
        (root/'images'/f'{n}.png').symlink_to(sample('cxr')/index.image_path[n]) # some are JPEG inside: read by content
        entries.append(f'{n}.png,{index.finding_labels[n]},0,{int(n[:8])},{index.age[n]},{index.sex[n]},{index.view[n]},2500,2048,0.1,0.1,')
        listed.append(f'{n}.png')
    for file, rows in (('BBox_List_2017.csv', lines), ('Data_Entry_2017.csv', entries), ('test_list.txt', listed)): (root/file).write_text('\n'.join(rows) + '\n')
    source = usable(read_nih_cxr(root, tmp_path/'derived'), tmp_path/'derived')
    assert source.report.counts['boxes'] == len(staged) and source.report.counts['without_box'] == 5
    mine, theirs = source.boxes.sort_values(['image_id', 'x0']), staged.sort_values(['image_id', 'x0'])
    np.testing.assert_allclose(mine[['x0', 'y0', 'x1', 'y1']].to_numpy(float), theirs[['x0', 'y0', 'x1', 'y1']].to_numpy(float), atol=.35) # rounded twice in the staged table
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='lovt_equalised_v1', size=(224, 224), salt=salt, **HERE)
    assert len(data) == len(source.records) and (data.manifest.mask_row >= 0).all()
    means = [float(data.image(i).mean()) for i in range(len(data))]
    assert 120 < np.mean(means) < 135 # LoVT's mean of its NIH images: 0.504


# ---------------------------------------------------------------- LoVT's splits

SPEC_COUNTS = { # spec, section 2.5: images; images with boxes; boxes
    'rsna': ((16010, 5337, 5337), (3584, 1210, 1218), (5707, 1901, 1947)), 'covid_rural': ((133, 44, 44), None, None), 'siim': ((7229, 2409, 2409), None, None),
    'object_cxr': ((6400, 1600, 1000), (3190, 810, 500), (6506, 1717, 1015)), 'nih': ((588, 196, 196), (528, 176, 176), (584, 196, 204))}


@pytest.mark.parametrize('name', list(LOVT_SETS))
def test_real_tables_have_the_numbers_of_the_spec(name):
    split = read_lovt_split(name, sample('tables/cxr'))
    images, positives, boxes = SPEC_COUNTS[name]
    part = split.images.set_index('image_id').split
    assert split.sizes == images == LOVT_SETS[name].counts and split.images.image_id.is_unique
    if boxes:
        of = split.boxes.image_id.map(part)
        assert tuple(int((of == s).sum()) for s in ('train', 'valid', 'test')) == boxes
        assert tuple(split.boxes.image_id[of == s].nunique() for s in ('train', 'valid', 'test')) == positives


def test_real_tables_leaks():
    tables = sample('tables/cxr')
    v = lovt_verdicts(tables)
    assert v.loc['nih', ['train-valid', 'train-test', 'valid-test']].tolist() == [12, 13, 5] and v.verdict['nih'] == 'leaks 30 patients'
    assert v.loc['rsna', ['train-valid', 'train-test', 'valid-test']].tolist() == [0]*3 == v.loc['covid_rural', ['train-valid', 'train-test', 'valid-test']].tolist()
    assert v.loc['covid_rural', ['patients_train', 'patients_valid', 'patients_test']].tolist() == [63, 23, 18]
    assert v.loc[['siim', 'object_cxr'], 'verdict'].str.startswith('not known').all() and v.loc[['siim', 'object_cxr'], 'train-test'].isna().all()
    nih = read_lovt_split('nih', tables)
    fixed, moves = leak_free(nih.images)
    assert not sum(map(len, shared_patients(fixed).values())) and moves.patient_id.nunique() == 30 and v.verdict['nih, leak-free'].startswith(f'{len(moves)} images of 30')
    assert (fixed.split != nih.images.split).sum() == len(moves) and len(fixed) == len(nih.images)


def test_real_tables_first_rows_and_swapped_sides():
    tables = sample('tables/cxr')
    rsna = read_lovt_split('rsna', tables)
    pos = set(rsna.boxes.image_id)
    train, valid = (rsna.images.image_id[rsna.images.split == s] for s in ('train', 'valid'))
    assert [int(train[:n].isin(pos).sum()) for n in (160, 1601)] == [36, 360] and int(valid[:534].isin(pos).sum()) == 132
    right, swapped = (read_lovt_split('object_cxr', tables, legacy).boxes for legacy in (False, True))
    assert (right.x1.max(), swapped.x1.max()) == (4020, 5295) # spec, section 6, point 7
    a, b = right[['x0', 'y0', 'x1', 'y1']].to_numpy(), swapped[['x0', 'y0', 'x1', 'y1']].to_numpy()
    inter = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(1)
    iou = inter/(2*(a[:, 2:] - a[:, :2]).prod(1) - inter)
    assert abs(iou.mean() - .61) < .01 and abs((iou < .5).mean() - 1/3) < .02
    # classes in the order of NIH's alphabet: the numbers of boxes of BBox_List_2017
    assert read_lovt_split('nih', tables).boxes.label.value_counts().reindex(NIH_CLASSES).tolist() == [180, 146, 153, 123, 85, 79, 120, 98]


def test_bad_tables(tmp_path):
    write = lambda **parts: write_lovt_tables(tmp_path, 'nih', {'train': [('00000001_000', [(1, 10, 20, 30, 40)])], 'valid': [('00000002_000', [])], 'test': [('00000003_000', [])]} | parts)
    assert read_lovt_split('nih', write()).boxes.iloc[0].tolist() == ['00000001_000', 'cardiomegaly', 10, 20, 40, 60]
    file = tmp_path/LOVT_SETS['nih'].folder/'validation.csv'
    for text, words in (('00000001_000,,', 'row 0, column ID: the image 00000001_000 is listed twice'), ('a,1;2;3;4,9', "column classes: the class '9' is not known"), ('a,1;2;3,1', "column boxes: '1;2;3' is no box"),
                        ('a,1;2;3;4|1;1;1;1,1', '2 boxes and 1 classes'), ('a,1;2;-3;4,1', 'has no area'), ('b,,\n,,', 'row 1, column ID: an image without a name')):
        file.write_text(f'ID,boxes,classes\n{text}\n')
        with pytest.raises(DataError, match=re.escape(words)): read_lovt_split('nih', tmp_path)
    file.write_text('ID,box,classes\na,,\n')
    with pytest.raises(DataError, match="column 'boxes' is missing.*Is it 'box'"): read_lovt_split('nih', tmp_path)
    file.unlink()
    with pytest.raises(DataError, match='tables of nih are not there'): read_lovt_split('nih', tmp_path)


def test_split_naming_absent_images(tmp_path):
    root = write_rsna_pneumonia(tmp_path/'rsna', rsna_samples(6))
    names = [s['id'] for s in rsna_samples(8)]
    tables = write_lovt_tables(tmp_path/'tables', 'rsna', dict(train=[(n, []) for n in names[3:7]], valid=[(names[0], [])], test=[(names[7], []), (names[1], [(1, 20, 30, 30, 40)])]))
    split = read_lovt_split('rsna', tables)
    with pytest.raises(DataError, match=r'train.csv, row 3, column ID: the split names 00aa06-ff, which is not there \(2 of 7') as e: apply_split(read_rsna_pneumonia(root), split.images)
    assert "missing='report'" in str(e.value)
    used = apply_split(read_rsna_pneumonia(root), split.images, 'report')
    assert used.records.image_id.tolist() == [names[k] for k in (3, 4, 5, 0, 1)] and kinds(used) == {'image of the split is absent': 2, 'images that the split does not name': 1}
    with pytest.raises(DataError, match='none of the 7 images'): apply_split(Source(used.records.assign(image_id='x'), used.boxes, used.sentences, used.report), split.images)
    with pytest.raises(ValueError, match="Did you mean 'report'"): apply_split(used, split.images, 'reprot')


# ---------------------------------------------------------------- the five data sets by one call

def write_all(base):
    "All five releases and LoVT's tables for them; NIH's leak one patient."
    rsna, covid, siim, (train, dev), nih = rsna_samples(), covid_samples(), siim_samples(), object_samples(), nih_samples()
    nih[1]['id'], nih[4]['id'] = '00000001_007', '00000001_009' # the patient of the first image
    roots = dict(rsna=write_rsna_pneumonia(base/'rsna', rsna), covid_rural=write_covid_rural(base/'covid', covid), siim=write_siim(base/'siim', siim), object_cxr=write_object_cxr(base/'object', train, dev), nih=write_nih_cxr(base/'nih', nih))
    xywh = lambda b: (b[0], b[1], b[2] - b[0], b[3] - b[1])
    def swapped(s): return [(1, *xywh(b)[:2], *xywh(b)[:1:-1]) for b in shape_boxes([(k, np.array(p, float)) for k, p in s['shapes']])]
    cut = lambda rows, a, b: dict(train=rows[:a], valid=rows[a:b], test=rows[b:])
    names = [c.lower() for c in NIH_CLASSES]
    write_lovt_tables(base/'tables', 'rsna', cut([(s['id'], [(1, *xywh(b)) for b in s['boxes']]) for s in rsna[::-1]], 6, 8))
    write_lovt_tables(base/'tables', 'covid_rural', cut([(s['id'], []) for s in covid], 4, 6))
    write_lovt_tables(base/'tables', 'siim', cut([(s['id'], []) for s in siim], 3, 4))
    write_lovt_tables(base/'tables', 'object_cxr', cut([(s['id'], swapped(s)) for s in train + dev], 6, 8))
    write_lovt_tables(base/'tables', 'nih', cut([(s['id'], [(names.index(f.lower()), *xywh(b)) for f, *b in s.get('boxes', ())]) for s in nih if s.get('test') or 'boxes' in s], 4, 6))
    return roots


@pytest.fixture(scope='module')
def releases(tmp_path_factory):
    base = tmp_path_factory.mktemp('five')
    return base, write_all(base)


@pytest.mark.parametrize('name', list(TASK_SETS))
def test_task_datasets(name, releases, tmp_path, salt):
    base, roots = releases
    task = read_task_dataset(name, roots[name], tmp_path/'derived', tables=base/'tables')
    usable(task.source, task.root)
    split = read_lovt_split(name, base/'tables')
    assert task.source.records.image_id.tolist() == split.images.image_id.tolist() and task.source.records.split.tolist() == split.images.split.tolist()
    assert 'boxes of release and tables differ' not in kinds(task.source) or name == 'nih' # NIH's test images are smaller copies
    assert [f'label_{c}' in task.source.records for c in task.classes] == [True]*len(task.classes) and set(task.source.boxes.label) <= set(task.classes)
    data = prepare_task(task, tmp_path/'prepared', size=(64, 64), salt=salt, **HERE)
    assert data.manifest.image_id.tolist() == split.images.image_id.tolist() and (data.manifest.mask_row >= 0).all() and data.info['profile'] == task.profile
    label = data.manifest[f'label_{task.classes[0]}'] if name != 'nih' else data.manifest.image_id.isin(data.boxes.image_id).astype(float)
    assert [float(data.mask(i).any()) for i in range(len(data))] == label.tolist()
    own = read_task_dataset(name, roots[name], None, 'patients')
    parts = own.source.records.groupby('patient_id').split.nunique()
    assert (parts == 1).all() and own.source.records.split.isin(('train', 'valid', 'test')).all() and own.root == roots[name]
    assert read_task_dataset(name, roots[name], None, 'none').source.records.split.eq('').all()


def test_task_leaks_and_leak_free(releases):
    base, roots = releases
    leaky = read_task_dataset('nih', roots['nih'], None, tables=base/'tables')
    assert leaky.verdict['verdict'] == 'leaks 1 patients' and leaky.verdict['train-valid'] == 1
    fixed = read_task_dataset('nih', roots['nih'], None, 'leak_free', base/'tables')
    assert fixed.verdict['verdict'] == 'no patient on two sides' and fixed.moves.image_id.tolist() == ['00000001_009'] and fixed.moves.after.tolist() == ['train']
    # SIIM: the names tell nothing, the DICOM headers do
    siim = read_task_dataset('siim', roots['siim'], None, tables=base/'tables')
    assert siim.verdict['verdict'] == 'leaks 1 patients' and siim.verdict['train-valid'] == 1
    fixed = read_task_dataset('siim', roots['siim'], None, 'leak_free', base/'tables')
    assert fixed.verdict['verdict'] == 'no patient on two sides' and len(fixed.moves) == 1 and 'patient moved' in kinds(fixed.source)
    assert read_task_dataset('object_cxr', roots['object_cxr'], None, tables=base/'tables').verdict['verdict'].startswith('not known')


def test_task_object_boxes(releases):
    base, roots = releases
    right = read_task_dataset('object_cxr', roots['object_cxr'], None, tables=base/'tables')
    legacy = read_task_dataset('object_cxr', roots['object_cxr'], None, tables=base/'tables', legacy=True)
    assert 'boxes of release and tables differ' not in kinds(right.source) # un-swapped tables agree with the release
    assert right.source.boxes.x1.tolist() != legacy.source.boxes.x1.tolist()
    release = read_task_dataset('object_cxr', roots['object_cxr'], None, 'release')
    assert release.source.records.split.value_counts()['test'] == 4 and set(release.source.records.split) == {'train', 'valid', 'test'}


def test_task_statistics_are_the_published():
    from medvl.data.releases.localized import read_statistics
    tables = sample('tables/cxr')
    found = {n: read_statistics(n, tables) for n in TASK_SETS}
    assert {n: (round(v['mean'], 4), round(v['std'], 4)) for n, v in found.items()} == {'rsna': (.4899, .2482), 'covid_rural': (.5081, .2906), 'siim': (.5043, .2880), 'object_cxr': (.5053, .2899), 'nih': (.5041, .2880)}


# ---------------------------------------------------------------- MIMIC-CXR

def report_text(findings=None, impression=None, extra=''):
    part = lambda n, t: '' if t is None else f' {n}: \n \n {t}\n \n'
    return '                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n' + extra + part('FINDINGS', findings) + part('IMPRESSION', impression)


def mimic_studies():
    image = lambda n, view='AP': (f'{n}-0000-dicom', view, chest(60, 50, shift=len(n)))
    study = lambda subject, number, images, report, **k: dict(subject=subject, study=number, images=images, report=report) | k
    return [study(10000032, 50414267, [image('a', 'PA'), image('b', 'LATERAL'), image('c', 'PA')], report_text('Lungs are clear. No effusion.', 'No acute process.'), chexpert={'No Finding': 1, 'Edema': 0}),
            study(10000032, 53189527, [image('d')], report_text(None, 'Mild edema is new.'), chexpert={'Edema': 1, 'Cardiomegaly': -1}),
            study(11000033, 53911762, [image('e')], report_text('Normal.'), split='validate'), # two tokens
            study(11000033, 56699142, [image('f')], None, split='validate'), # image-only
            study(11000034, 57375967, [image('g')], report_text('Heart is large. Left effusion.'), split='validate', chexpert={'Cardiomegaly': 1}),
            study(19000099, 50771383, [image('h')], 'Tubes in place. No change.', split='test'), # no heading
            study(19000099, 50913680, [image('i')], report_text('Corrected by hand in the tool. Clear.'), split='test'),
            study(19000100, 54205396, [image('j', 'LL')], report_text('Lateral only. Nothing else.'), split='test'),
            study(19000100, 55555555, [image('k', 'PA')], report_text('Stable chest. No edema seen.'), split='test', chexpert={'Edema': 0})]


@pytest.mark.parametrize('gzipped, zipped', [(True, False), (False, True)])
def test_mimic(tmp_path, salt, gzipped, zipped):
    root = write_mimic_cxr(tmp_path/'mimic', mimic_studies(), gzipped, zipped)
    source = usable(read_mimic_cxr(root), root)
    assert source.report.counts == dict(images=5, studies=4, patients=3, train=2, valid=1, test=1, dropped=5)
    r = source.records.set_index('image_id')
    assert r.exam_id.value_counts()['s50414267'] == 2 and r.split.to_dict()['g-0000-dicom'] == 'valid' and r.impression['a-0000-dicom'] == 'No acute process.' and r.findings['d-0000-dicom'] == ''
    assert dropped_studies(source.report).set_index('study').reason.to_dict() == {'s54205396': 'no image of the views PA, AP', 's53911762': '2 tokens, fewer than 3', 's56699142': 'no report',
        's50771383': 'neither findings nor impression', 's50913680': 'its report is corrected by hand in the section tool'}
    assert r.label_cardiomegaly.tolist() == [0, 0, 1, 1, 0] and r.label_no_finding.tolist() == [1, 1, 0, 0, 0]
    stated = read_mimic_cxr(root, rule='stated').records.set_index('image_id')
    assert stated.label_cardiomegaly.isna().tolist() == [True, True, True, False, True] and stated.label_edema.dropna().to_dict() == {'a-0000-dicom': 0, 'c-0000-dicom': 0, 'd-0000-dicom': 1, 'k-0000-dicom': 0}
    data = prepare(source, root, tmp_path/'prepared', profile='lovt_v1', size=(48, 48), salt=salt, **HERE)
    assert len(data) == 5 and data.manifest.exam_id.nunique() == 4 and data.manifest.report[0] == 'FINDINGS: Lungs are clear. No effusion.\nIMPRESSION: No acute process.'


def test_mimic_options(tmp_path):
    root = write_mimic_cxr(tmp_path/'mimic', mimic_studies())
    assert len(read_mimic_cxr(root, text='none').records) == 9 and len(read_mimic_cxr(root, text='optional').records) == 9
    optional = read_mimic_cxr(root, text='optional')
    assert kinds(optional)['study without text'] == 4 and (optional.records.findings + optional.records.impression == '').sum() == 4
    assert len(read_mimic_cxr(root, special='keep').records) == 6 and len(read_mimic_cxr(root, min_tokens=2).records) == 6 and len(read_mimic_cxr(root, views=('PA', 'AP', 'LL', 'LATERAL')).records) == 7
    assert 'label_edema' not in read_mimic_cxr(root, labels='none').records and read_mimic_cxr(root, labels='negbio').records.label_edema.notna().all()
    for wrong in (dict(text='no'), dict(special='x'), dict(labels='chexbert'), dict(views=('XX',)), dict(rule='u_one')):
        with pytest.raises(ValueError, match='Unknown'): read_mimic_cxr(root, **wrong)


def test_mimic_bad_files(tmp_path):
    studies = mimic_studies()
    root = write_mimic_cxr(tmp_path/'mimic', studies, gzipped=False)
    next(root.rglob('a-0000-dicom.jpg')).unlink(); next(root.rglob('d-0000-dicom.jpg')).unlink()
    split = root/'mimic-cxr-2.0.0-split.csv'
    split.write_text(split.read_text().replace(',11000034,validate', ',11000034,train2'))
    source = usable(read_mimic_cxr(root), root)
    assert source.records.image_id.tolist() == ['c-0000-dicom', 'k-0000-dicom'] and {'image is absent', 'unknown split', 'study dropped', 'other view'} <= set(kinds(source))
    assert dropped_studies(source.report).set_index('study').reason['s53189527'] == 'no image on disk'
    labels = root/'mimic-cxr-2.0.0-chexpert.csv'
    labels.write_text(labels.read_text().replace('-1.0', '-2'))
    with pytest.raises(DataError, match="chexpert.csv, row 1, column Cardiomegaly: '-2' is no label"): read_mimic_cxr(root)
    labels.unlink()
    assert 'labels are absent' in kinds(read_mimic_cxr(root))
    split.write_text(split.read_text().replace('dicom_id', 'dicom'))
    with pytest.raises(DataError, match="column 'dicom_id' is missing"): read_mimic_cxr(root)
    split.unlink()
    with pytest.raises(DataError, match='there is no mimic-cxr-2.0.0-split.csv'): read_mimic_cxr(root)
    whole = write_mimic_cxr(tmp_path/'b', studies)
    for path in list(whole.rglob('s*.txt')): path.unlink()
    with pytest.raises(DataError, match='no report is there'): read_mimic_cxr(whole)
    (whole/'mimic-cxr-reports.zip').write_bytes(b'PK broken')
    with pytest.raises(DataError, match='reports cannot be unpacked'): read_mimic_cxr(whole)
    packed = (whole/'mimic-cxr-2.0.0-metadata.csv.gz').read_bytes()
    (whole/'mimic-cxr-2.0.0-metadata.csv.gz').write_bytes(packed[:len(packed)//2])
    with pytest.raises(DataError, match='cannot be unpacked.*Download it again'): read_mimic_cxr(whole, text='none')
    (whole/'mimic-cxr-2.0.0-metadata.csv.gz').write_bytes(gzip.compress(b'dicom_id,subject_id,study_id,ViewPosition\nx,1,abc,AP\n'))
    with pytest.raises(DataError, match='none of'): read_mimic_cxr(whole, text='none')


def test_sections_like_the_golden():
    d = json.loads(golden('lovt/preprocess.json').read_text())
    cases = {k: v for k, v in d.items() if k.startswith('sections/')}
    assert len(cases) == 5
    for name, case in cases.items():
        found = find_sections(case['text'], official=True)
        assert [s[0] for s in found] == case['section_names'] and [s[1] for s in found] == case['section_texts'] and [s[2] for s in found] == case['start_indices'], name
        assert lovt_sections(case['text'], official=True) == lovt_sections(case['text']) == (case['lovt_sections'] or {}), name
    assert {k: section_name(k, official=True) for k in d['section_name_map']} == d['section_name_map']
    assert {k for k, v in d['section_name_map'].items() if section_name(k) != v} == {'ndication'} # the tool's mistake


def test_sections_without_golden():
    assert lovt_sections(' X\n FINDINGS:  One.\n \n IMPRESSION:  Two.\n \n IMPRESSION:  Three.\n') == {'findings': ' One.\n ', 'impression': ' Three.\n'} # the last one
    assert [s[0] for s in find_sections(' X\n FINDINGS: \n \n IMPRESSION: \n \n')] == ['preamble']
    assert lovt_sections('') == {} and lovt_sections(None) == {} and find_sections('a') == [('full report', 'a', 0)]
    assert find_sections('Portable.\n \n Tubes.\n \n Clear.') == [('full report', 'Portable.', 0), ('last_paragraph', ' Tubes.\n \n Clear.', 9)] # also without a heading
    text = report_text('Clear.', 'Normal.', ' HISTORY:  Cough.\n \n')
    for _, body, start in find_sections(text): assert text[start:start + len(body)] == body


# ---------------------------------------------------------------- Open-I

def openi_studies():
    pair = lambda n: [(f'CXR{n}_IM-{n:04d}-1001', 'Frontal', chest(60, 50, shift=n)), (f'CXR{n}_IM-{n:04d}-2001', 'Lateral', chest(60, 50, shift=n + 1))]
    study = lambda n, findings, impression, *mesh, images=None: dict(uid=n, images=pair(n) if images is None else images, findings=findings, impression=impression, indication='Cough', comparison='None.', mesh=mesh)
    return [study(1, 'Heart size is large & round. Lungs are clear.', 'Cardiomegaly.', 'Cardiomegaly/mild'), study(2, '', 'Normal chest x-XXXX.', 'normal'), study(3, '', '', 'No Indexing'), study(4, 'XXXX.', None, 'normal'),
            study(10, 'Left effusion. No pneumothorax.', 'Effusion.', 'Pleural Effusion/left', images=pair(10)[::-1])]


@pytest.mark.parametrize('tables', [False, True])
def test_openi(tmp_path, salt, tables):
    root = write_openi(tmp_path/'openi', openi_studies(), tables)
    source = usable(read_openi(root), root)
    assert source.records.patient_id.tolist() == ['CXR1', 'CXR2', 'CXR10'] and source.report.counts['dropped'] == 2
    last = source.records.set_index('patient_id').image_id['CXR10']
    assert last.endswith('1001' if tables else '2001') and ('views guessed' in kinds(source)) == (not tables) # only the table knows that its lateral comes first
    assert source.records.findings[0] == 'Heart size is large & round. Lungs are clear.' and source.records.label_cardiomegaly.tolist() == [1, 0, 0] and source.records.label_pleural_effusion.tolist() == [0, 0, 1]
    data = prepare(source, root, tmp_path/'prepared', profile='letterbox_v1', size=(48, 48), salt=salt, **HERE)
    assert len(data) == 3 and data.manifest.report[1] == 'IMPRESSION: Normal chest x-XXXX.'
    if tables: # the same from the tables alone
        for f in (root/'ecgen-radiology').iterdir(): f.unlink()
        again = read_openi(root)
        assert again.records.sort_values('image_id').image_id.tolist() == source.records.sort_values('image_id').image_id.tolist() and again.records.label_cardiomegaly.sum() == 1


def test_openi_bad_files(tmp_path):
    root = write_openi(tmp_path/'openi', openi_studies())
    (root/'ecgen-radiology'/'2.xml').write_text('<eCitation><uId id="CXR2"/>')
    (root/'ecgen-radiology'/'4.xml').write_text('<!DOCTYPE x [<!ENTITY a "aaaa">]><eCitation>&a;</eCitation>')
    (root/'NLMCXR_png'/'CXR10_IM-0010-2001.png').unlink()
    source = usable(read_openi(root), root)
    assert source.records.patient_id.tolist() == ['CXR1'] and kinds(source)['report cannot be read'] == 2 and kinds(source)['image is absent'] == 1
    assert len(read_openi(root, text='optional').records) == 2 and read_openi(root, text='optional').records.label_cardiomegaly.isna().sum() == 1
    assert len(read_openi(root, files='listed').records) == 2
    with pytest.raises(DataError, match='no image of the views FRONTAL'): read_openi(root, guess='none')
    assert image_name('1_IM-0001-3001.dcm.png') == image_name('CXR1_IM-0001-3001.png') == 'CXR1_IM-0001-3001'


def test_openi_real_reports(tmp_path):
    table = pd.read_csv(sample('reports/openi_reports.csv'), dtype=str, keep_default_na=False)
    (tmp_path/'openi_reports.csv').symlink_to(sample('reports/openi_reports.csv'))
    source = usable(read_openi(tmp_path, files='listed'))
    assert 2850 < len(source.records) <= (table.image_ids != '').sum() and source.report.counts['images_on_disk'] == 0
    r, t = source.records.set_index('patient_id'), table.set_index('report_id')
    assert (r.label_cardiomegaly.dropna() == t.cardiomegaly.reindex(r.label_cardiomegaly.dropna().index).astype(float)).all() # labels derived elsewhere, by other code
    assert (r.label_normal.dropna() == t.normal.reindex(r.label_normal.dropna().index).astype(float)).all()
    with pytest.raises(DataError, match="pass files='listed'"): read_openi(tmp_path)


# ---------------------------------------------------------------- CheXpert

def test_chexpert(tmp_path, salt):
    samples = [dict(part='train', patient=1, pixels=chest(60, 50), view='AP', labels={'Cardiomegaly': -1, 'Edema': 1}, age=0), dict(part='train', patient=1, image=2, pixels=chest(60, 50, 2), frontal=False, labels={'Edema': 1}),
               dict(part='train', patient=2, study=3, pixels=chest(60, 50, 3), view='PA', labels={'No Finding': 1}, age=400), dict(part='valid', patient=64541, pixels=chest(60, 50, 4), labels={'Cardiomegaly': 0})]
    root = write_chexpert(tmp_path/'CheXpert-v1.0-small', samples)
    source = usable(read_chexpert(root), root)
    assert source.report.counts == dict(images=3, studies=3, patients=3, train=2, valid=1) and source.records['view'].tolist() == ['AP', 'PA', 'AP'] and source.records.age.isna().tolist() == [False, True, False]
    assert source.records.label_cardiomegaly.tolist() == [1, 0, 0] and read_chexpert(root, rule='u_zeros').records.label_cardiomegaly.tolist() == [0, 0, 0]
    assert len(prepare(source, root, tmp_path/'prepared', profile='letterbox_v1', size=(48, 48), salt=salt, **HERE)) == 3
    (root/'train'/'patient00001'/'study1'/'view1_frontal.jpg').unlink()
    table = root/'train.csv'
    table.write_text(table.read_text() + 'somewhere.jpg,Male,50,Frontal,AP' + ','*14 + '\n')
    again = usable(read_chexpert(root), root)
    assert len(again.records) == 2 and kinds(again) == {'path not understood': 1, 'other view': 1, 'image is absent': 1}
    table.write_text(table.read_text().replace('-1.0', '3'))
    with pytest.raises(DataError, match="train.csv, row 0, column Cardiomegaly: '3' is no label"): read_chexpert(root)
