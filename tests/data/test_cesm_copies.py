"The two staged copies of CDD-CESM become exams: outlines lie on the squashed pixels, and nobody stands in two parts."
import numpy as np
import pandas as pd
import pytest
from golden import sample

from medvl.data.pixels.file import read_image
from medvl.data.releases.cesm_copies import part_boxes, squashed, write_cesm_exams
from medvl.data.releases.folder import read_folder
from medvl.core.errors import DataError


def overlap(a, b):
    w, h = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    return w*h/((a[2] - a[0])*(a[3] - a[1]) + (b[2] - b[0])*(b[3] - b[1]) - w*h)


def test_outlines_of_one_copy_meet_boxes_of_the_other():
    "210 boxes of masses came with the squashed copy, from another source than the masks."
    mammo, cesm = sample('mammo'), sample('cdd_cesm')
    boxes, index = pd.read_csv(mammo/'boxes.csv'), pd.read_csv(cesm/'index.csv').drop_duplicates('image_id').set_index('image_id')
    boxes = boxes[boxes.image_id.isin(index.index)]
    best, parts = [], {}
    for b in boxes.itertuples():
        if b.image_id not in parts:
            r = index.loc[b.image_id]
            parts[b.image_id] = part_boxes(squashed(read_image(cesm/r.mask_path).pixels, r.content_x0, r.content_x1))
        best.append(max((overlap((b.x0, b.y0, b.x1, b.y1), p) for p in parts[b.image_id]), default=0))
    assert len(best) == 210 and np.median(best) > .85


def test_whole_exams(tmp_path):
    source = read_folder(write_cesm_exams(sample('mammo'), sample('cdd_cesm'), tmp_path/'out'))
    r = source.records
    assert (r.groupby('exam_id').size() == 4).all() and r.exam_id.nunique() == 73 and (r.groupby('patient_id').split.nunique() == 1).all()
    assert r.groupby('split').patient_id.nunique().to_dict() == {'train': 49, 'valid': 9, 'test': 15}
    assert (r.mask_path != '').sum() == 115 and set(r.pathology[r.mask_path != '']) == {'malignant'} and len(source.boxes) >= 115
    for path, name in zip(r.mask_path[r.mask_path != ''][:4], r.image_path[r.mask_path != ''][:4]):
        assert read_image(tmp_path/'out'/path).pixels.shape == read_image(tmp_path/'out'/name).pixels.shape
    again = read_folder(write_cesm_exams(sample('mammo'), sample('cdd_cesm'), tmp_path/'more', whole=False)).records
    assert again.exam_id.nunique() == 103 and set(again.patient_id[again.split != 'train']) == set(r.patient_id[r.split != 'train'])


def test_what_cannot_be(tmp_path):
    (tmp_path/'in').mkdir()
    pd.DataFrame({'image_path': ['a.png'], 'dataset': ['CDD-CESM']}).to_csv(tmp_path/'in'/'index.csv', index=False)
    with pytest.raises(DataError, match='patient_id'): write_cesm_exams(tmp_path/'in', tmp_path/'in', tmp_path/'out')
    with pytest.raises(ValueError, match='columns 4 to 2'): squashed(np.zeros((8, 8)), 4, 2)
