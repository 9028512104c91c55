"""ChestX-Det, ChestX-Det10, MS-CXR, VinDr-CXR and CheXlocalize: the real annotation files, and made releases with images."""
import json

import cv2
import numpy as np
import pandas as pd
import pytest
from golden import sample

from medvl.core.errors import DataError
from medvl.data.dicom.write import write_dicom
from medvl.data.prepare.run import prepare
from medvl.data.releases.chestx_det import CHESTX_DET10_FINDINGS, CHESTX_DET_FINDINGS, read_chestx_det, read_det_file
from medvl.data.releases.chexlocalize import annotation_mask, read_chexlocalize, reader_masks, write_segmentations
from medvl.data.releases.ms_cxr import read_phrases
from medvl.data.releases.vindr_cxr import agreed_boxes, aside_masks, read_reader_boxes, read_vindr_cxr, set_aside_reader
from medvl.run.catalogue import release_table

GREY = np.tile(np.arange(96, dtype=np.uint8) * 2, (80, 1))


@pytest.mark.parametrize('file, images, boxes, without, findings', [
    ('chestx_det/ChestX_Det_train.json', 2443, 6377, 436, CHESTX_DET_FINDINGS), ('chestx_det/ChestX_Det_test.json', 461, 1442, 53, CHESTX_DET_FINDINGS),
    ('chestx_det10/train.json', 2421, 5509, 550, CHESTX_DET10_FINDINGS), ('chestx_det10/test.json', 451, 1231, 67, CHESTX_DET10_FINDINGS)])
def test_the_real_files_of_chestx_det(file, images, boxes, without, findings):
    table, names = read_det_file(sample(f'grounding/{file}'))
    assert (len(names), len(set(names)), len(table), len(names) - table.image_id.nunique()) == (images, images, boxes, without)
    assert set(table.label) == set(findings) and (table.x0 < table.x1).all() and (table.y0 < table.y1).all() and table[['x1', 'y1']].max().max() <= 1024
    assert (table.outline.map(len) > 2).all() == (len(findings) == 13)


def test_outlines_of_chestx_det_fill_their_boxes():
    table, _ = read_det_file(sample('grounding/chestx_det/ChestX_Det_test.json'))
    inside = []
    for r in table.head(60).itertuples():
        y, x = np.nonzero(annotation_mask([r.outline], (1024, 1024)))
        inside.append((x.min(), y.min(), x.max() + 1, y.max() + 1) == (r.x0, r.y0, r.x1, r.y1))
    assert np.mean(inside) > .9 # our exclusive ends are those of the outline


def test_chestx_det_with_images(tmp_path):
    root = tmp_path/'release'; root.mkdir()
    entries = [dict(file_name=f'{n}.png', syms=s, boxes=b, polygons=[[[x0, y0], [x1, y0], [x1, y1], [x0, y1]] for x0, y0, x1, y1 in b])
               for n, s, b in ((1, [], []), (2, ['Mass', 'Mass'], [[4, 5, 20, 30], [40, 8, 60, 20]]), (3, ['Diffuse Nodule'], [[1, 1, 9, 9]]), (4, ['Mass'], [[9, 9, 3, 3]]))]
    (root/'ChestX_Det_train.json').write_text(json.dumps(entries[:2] + entries[3:])); (root/'ChestX_Det_test.json').write_text(json.dumps(entries[2:3]))
    for n in (1, 2, 3, 4): cv2.imwrite(str(root/f'{n}.png'), GREY)
    source = read_chestx_det(root, tmp_path/'derived')
    assert source.records.image_id.tolist() == ['3', '1', '2'] or set(source.records.image_id) == {'1', '2', '3'} # the fourth's box is inside out
    assert dict(zip(source.records.image_id, source.records.split)) == {'1': 'train', '2': 'train', '3': 'test'} and len(source.boxes) == 3
    (tmp_path/'salt').write_text('for tests only')
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='resize_v1', size=(40, 48), jobs=1, backend='sequential', salt=tmp_path/'salt')
    rows = {i: k for k, i in enumerate(data.manifest.image_id)}
    assert data.mask(rows['2']).any() and not data.mask(rows['1']).any() and len(data.boxes) == 3
    for n in ('ChestX_Det_train.json', 'ChestX_Det_test.json'): (root/n).unlink()
    with pytest.raises(DataError, match='no ChestX_Det_train.json'): read_chestx_det(root)
    (root/'train.json').write_text(json.dumps([{k: v for k, v in e.items() if k != 'polygons'} for e in entries[:2]]))
    ten = read_chestx_det(root)
    assert 'label_cardiomegaly' not in ten.records and ten.records.source.unique().tolist() == ['chestx_det10']


@pytest.mark.parametrize('text, match', [('{', 'Download it again'), ('{}', 'no list of images'), ('[{"file_name": "a"}]', 'no list of images'),
                                         ('[{"file_name": "a.png", "syms": ["Oedema"], "boxes": [[1, 2, 3, 4]]}]', 'no finding of'), ('[{"file_name": "a.png", "syms": ["Mass"], "boxes": []}]', '1 findings, 0 boxes')])
def test_wrong_files_of_chestx_det(tmp_path, text, match):
    (tmp_path/'train.json').write_text(text)
    with pytest.raises(DataError, match=match): read_det_file(tmp_path/'train.json')


def test_phrases_of_json_and_table_are_one(tmp_path):
    rng, images, notes, lines = np.random.default_rng(0), [], [], []
    for k in range(6):
        path = f'files/p10/p1000000{k // 2}/s5000000{k}/d{k}.jpg'
        images.append(dict(id=k, file_name=f'd{k}.jpg', path=path, width=300, height=400))
        for _ in range(k % 3): # none, one or two regions
            x, y, w, h = [int(v) for v in (rng.integers(0, 100), rng.integers(0, 100), rng.integers(5, 90), rng.integers(5, 90))]
            notes.append(dict(image_id=k, category_id=1, label_text='a phrase', bbox=[x, y, w, h])); lines.append(f'd{k},Pneumonia,a phrase,{path},{x},{y},{w},{h},300,400,test')
        if k % 3 == 0: notes.append(dict(image_id=k, category_id=1, label_text='a phrase', bbox=[])); lines.append(f'd{k},Pneumonia,a phrase,{path},,,,,300,400,test')
    (tmp_path/'a.json').write_text(json.dumps(dict(images=images, annotations=notes, categories=[dict(id=1, name='Pneumonia')])))
    (tmp_path/'a.csv').write_text('dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split\n' + '\n'.join(lines))
    one, other = read_phrases(tmp_path/'a.json'), read_phrases(tmp_path/'a.csv')
    assert one.boxes.map(len).tolist() == [0, 1, 2, 0, 1, 2] and one.patient_id.nunique() == 3 and other.split.unique().tolist() == ['test']
    pd.testing.assert_frame_equal(one.drop(columns=['boxes', 'split']), other.drop(columns=['boxes', 'split']))
    for a, b in zip(one.boxes, other.boxes): np.testing.assert_array_equal(a, b)
    (tmp_path/'b.csv').write_text('dicom_id,category_name\nd,Pneumonia\n')
    with pytest.raises(DataError, match='label_text'): read_phrases(tmp_path/'b.csv')
    (tmp_path/'c.csv').write_text((tmp_path/'a.csv').read_text().replace(',300,400', ',wide,400', 1))
    with pytest.raises(DataError, match='is no number'): read_phrases(tmp_path/'c.csv')


def vindr(root, rows):
    (root/'train').mkdir(parents=True)
    (root/'annotations_train.csv').write_text('image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n' + '\n'.join(rows) + '\n')
    for n in sorted({r.split(',')[0] for r in rows}): write_dicom(root/'train'/f'{n}.dicom', GREY, ViewPosition='PA')
    return root


def test_three_radiologists(tmp_path):
    rows = [f'i{k},R{r},Cardiomegaly,{10 + r},20,{60 + r},70' for k in range(4) for r in range(3)] + ['i5,R0,No finding,,,,', 'i5,R1,Rib fracture,5,5,9,9', 'i5,R2,No finding,,,,']
    root = vindr(tmp_path/'release', rows)
    table, names = read_reader_boxes(root/'annotations_train.csv')
    agreed = agreed_boxes(table)
    assert len(table) == 13 and names == ['i0', 'i1', 'i2', 'i3', 'i5'] and agreed.x0.tolist() == [11.] * 4 # the lone fracture is not agreed
    out = set_aside_reader(root/'annotations_train.csv')
    assert set(out) == set(names) and out == set_aside_reader(root/'annotations_train.csv') and out != set_aside_reader(root/'annotations_train.csv', 1)
    source = read_vindr_cxr(root, tmp_path/'derived', aside=True)
    assert len(source.boxes) == 8 + (out['i5'] != 'R1')
    (tmp_path/'salt').write_text('for tests only')
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='resize_v1', size=(40, 48), jobs=1, backend='sequential', salt=tmp_path/'salt')
    human, i = aside_masks(root/'annotations_train.csv', data), data.manifest.image_id.tolist().index('i0')
    assert human(i, 'cardiomegaly').mean() == pytest.approx(50 * 50 / 80 / 96, rel=.1) and not human(i, 'edema').any()
    with pytest.raises(DataError, match='a finding without a box'): read_reader_boxes(vindr(tmp_path/'other', ['a,R1,Edema,1,2,,'])/'annotations_train.csv')


def test_chexlocalize_with_images_and_a_reader(tmp_path):
    root, name = tmp_path/'release', 'patient7_study1_view1_frontal'
    folder = root/'CheXpert-v1.0'/'valid'/'patient7'/'study1'; folder.mkdir(parents=True)
    cv2.imwrite(str(folder/'view1_frontal.jpg'), GREY)
    half, none = np.zeros((80, 96), bool), np.zeros((80, 96), bool); half[:, :48] = True
    two = none.copy(); two[2:9, 3:20], two[40:50, 60:80] = True, True
    write_segmentations({name: {'Edema': half, 'Pleural Effusion': two, 'Cardiomegaly': none}}, root/'gt_segmentations_val.json')
    source = read_chexlocalize(root, tmp_path/'derived')
    assert source.boxes.label.tolist() == ['edema', 'pleural_effusion', 'pleural_effusion'] and source.records.label_cardiomegaly.tolist() == [0.]
    (tmp_path/'salt').write_text('for tests only')
    data = prepare(source, tmp_path/'derived', tmp_path/'prepared', profile='resize_v1', size=(20, 24), jobs=1, backend='sequential', salt=tmp_path/'salt')
    reader = reader_masks(root/'gt_segmentations_val.json', data)
    assert reader(0, 'edema').mean() == .5 and not reader(0, 'cardiomegaly').any() and reader(0, 'pneumothorax') is None
    write_segmentations({name: {'Edema': half[:40]}}, tmp_path/'small.json')
    with pytest.raises(DataError, match='another size'): reader_masks(tmp_path/'small.json', data)(0, 'edema')


def test_releases_are_listed():
    assert {'CheXlocalize', 'ChestX-Det', 'ChestX-Det10', 'MS-CXR', 'VinDr-CXR 1.0.0'} <= set(release_table().release)
