"Every release's reader, prepared and put together as exams; A2I2's own tables, DMID and CSAW-CC."
import numpy as np
import pandas as pd
import pytest
from golden import sample
from releases import VINDR, usable

from medvl.core.errors import DataError
from medvl.data.dicom.write import write_dicom
from medvl.data.phantom.disk import png_bytes
from medvl.data.prepare.run import prepare
from medvl.data.releases.cbis_ddsm import read_cbis_ddsm
from medvl.data.releases.cdd_cesm import read_cdd_cesm
from medvl.data.releases.cmmd import read_cmmd
from medvl.data.releases.csaw_cc import csaw_labels, read_csaw_cc
from medvl.data.releases.dmid import read_dmid
from medvl.data.releases.emory_embed import read_embed
from medvl.data.releases.exam_table import airlight_of, read_exam_table, read_image_table
from medvl.data.releases.folder import read_folder
from medvl.data.releases.inbreast import read_inbreast
from medvl.data.releases.vindr import read_vindr
from medvl.data.samples.exam import ExamConfig, ExamDataset
from test_releases_mammo import breast, lesion, put_cmmd, put_film, write_cbis, write_cesm, write_embed, write_inbreast

FOUR = [('L', 'CC'), ('L', 'MLO'), ('R', 'CC'), ('R', 'MLO')]


def inbreast(root):
    write_inbreast(root)
    return read_inbreast(root)


def cmmd(root):
    for n, (side, view) in enumerate(FOUR, 1): put_cmmd(root, 'D2-0004', n, side, view)
    put_cmmd(root, 'D1-0001', 1, 'R', 'CC')
    (root/'CMMD_clinicaldata_revision.csv').write_text('ID1,LeftRight,Age,number,abnormality,classification,subtype\nD1-0001,R,44,2,mass,Benign,\nD2-0004,L,61,2,both,Malignant,Luminal B\n')
    return read_cmmd(root)


def cbis(root):
    rows = [lesion('P_00001', side, view, pathology='MALIGNANT') for side in ('LEFT', 'RIGHT') for view in ('CC', 'MLO')]
    write_cbis(root, pd.DataFrame(rows))
    for side in ('LEFT', 'RIGHT'):
        for view in ('CC', 'MLO'): put_film(root, f'Mass-Training_P_00001_{side}_{view}')
    return read_cbis_ddsm(root)


def cesm(root):
    names = [f'P1_{side}_DM_{view}' for side, view in FOUR[:3]]
    write_cesm(root, [(n, 1, n.split('_')[1], 'DM', 46, 'C', 4, 'Mass', n.split('_')[3], 'x', 1, 'Malignant') for n in names], names)
    return read_cdd_cesm(root)


def embed(root):
    write_embed(root)
    where = root/'images'/'cohort_1'/'1'/'10'
    where.mkdir(parents=True)
    for name, side in (('a', 'L'), ('b', 'R')): write_dicom(where/f'{name}.dcm', breast(side), ImageLaterality=side, ViewPosition='CC')
    return read_embed(root)


def dmid(root):
    root.mkdir(parents=True, exist_ok=True)
    for k, side in (('001', 'L'), ('002', 'R')): write_dicom(root/f'IMG{k}.dcm', breast(side), ImageLaterality=side)
    pd.DataFrame({'IMG_REF': ['IMG001', 'IMG002'], 'VIEW': ['MLOLT', 'CCRT'], 'CLASS': ['M', ''], 'ABNORMALITY': ['CIRC', 'NORM'], 'X': [20, ''], 'Y': [20, ''], 'RADIUS': [5, '']}).to_csv(root/'Metadata.csv', index=False)
    (root/'Img001.txt').write_text('BIRADS: 4\n\nFindings:\nmass in the left breast')
    return read_dmid(root)


def csaw(root):
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for side, view in FOUR:
        write_dicom(root/f'a_{side}_{view}.dcm', breast(side), ImageLaterality=side, ViewPosition=view)
        rows.append(dict(anon_patientid='a', exam_year=2014, anon_filename=f'a_{side}_{view}.dcm', imagelaterality={'L': 'Left', 'R': 'Right'}[side], viewposition=view, x_case=1, x_cancer_laterality='Left', rad_timing=1, rad_recall=1))
    pd.DataFrame(rows).to_csv(root/'CSAW-CC_breast_cancer_screening_data.csv', index=False)
    return read_csaw_cc(root)


def vindr(root):
    root.mkdir(parents=True, exist_ok=True)
    rows = [dict(study_id='s', series_id='q', image_id=f'i{k}', laterality=side, view_position=view, height=64, width=48, breast_birads='BI-RADS 1', breast_density='DENSITY C', split='training')
            for k, (side, view) in enumerate(FOUR)]
    table = pd.DataFrame(rows)
    table.to_csv(root/'breast-level_annotations.csv', index=False)
    table.assign(finding_categories="['No Finding']", finding_birads='', xmin='', ymin='', xmax='', ymax='')[VINDR].to_csv(root/'finding_annotations.csv', index=False)
    (root/'images'/'s').mkdir(parents=True)
    for r in rows: write_dicom(root/'images'/'s'/f'{r["image_id"]}.dicom', breast(r['laterality']), ImageLaterality=r['laterality'], ViewPosition=r['view_position'])
    return read_vindr(root)


BUILT = {'inbreast': (inbreast, 5), 'cmmd': (cmmd, 5), 'cbis': (cbis, 4), 'cesm': (cesm, 3), 'embed': (embed, 2), 'dmid': (dmid, 2), 'csaw': (csaw, 4), 'vindr': (vindr, 4)}


@pytest.mark.parametrize('name', BUILT)
def test_exams_of_every_release(name, tmp_path):
    build, images = BUILT[name]
    source = build(tmp_path/'r')
    (tmp_path/'salt.txt').write_text('a salt for tests\n')
    data = prepare(source, tmp_path/'r', tmp_path/'out', size=(32, 24), jobs=1, backend='sequential', salt=tmp_path/'salt.txt')
    assert len(data) == images
    exams = ExamDataset(data, config=ExamConfig(text='none', keywords='none', labels=None), train=False)
    assert len(exams) == data.manifest.exam_id.nunique()
    batch = exams.collate([exams[i] for i in range(len(exams))])
    assert int(batch['present'].sum()) == images and batch['images'].shape[1] == 4
    for i, (present, side, view) in enumerate(zip(batch['present'], batch['laterality'], batch['view'])):
        m = data.manifest[data.manifest.exam_id == batch['study_id'][i]]
        assert {(s, v) for s, v, p in zip(side, view, present) if p} == set(zip(m.laterality, m['view']))


# A2I2's own tables

def views(root, exam, names=('L_CC', 'L_MLO', 'R_CC', 'R_MLO'), mask=False):
    for n in names:
        (root/f'{exam}_{n}.png').write_bytes(png_bytes((breast(n[0])/breast(n[0]).max()*250).astype(np.uint8)))
        if mask: (root/f'{exam}_{n}_mask.png').write_bytes(png_bytes(np.full((64, 48), 255, np.uint8)))


def test_a_table_of_exams(tmp_path):
    root = tmp_path/'png'
    root.mkdir()
    views(root, 'a', mask=True); views(root, 'b', ('L_CC', 'R_CC'))
    table = tmp_path/'t.csv'
    pd.DataFrame({'File_path': ['a', 'b', 'gone'], 'split': ['train', 'val', 'strange'], 'conclusie': ['1. Massa. BI-RADS 5.', '', 'x'], 'pathology': ['1', '0.0', 'maybe'],
                  'ato': ['0.1 0.2 0.3', 'dark', ''], 'keyword': ['mass left', '', '']}).to_csv(table, index=False)
    source = usable(read_exam_table(table, root, masks='_mask'))
    r = source.records.set_index('image_id')
    assert r.split.tolist() == ['train']*4 + ['valid']*2 and r.label_malignant.tolist() == [1.]*4 + [0.]*2
    assert r.airlight['a_L_CC'] == pytest.approx(.2) and np.isnan(r.airlight['b_L_CC']) and r.keywords['a_L_CC'] == 'mass left'
    assert r.mask_path['a_L_CC'] == 'a_L_CC_mask.png' and r.mask_path['b_L_CC'] == ''
    kinds = source.report.issues.kind.value_counts().to_dict()
    assert kinds == {'view is absent': 6, 'airlight of three values': 1, 'airlight is no number': 1, 'exam without a view': 1, 'unknown split': 1, 'pathology not understood': 1}
    (tmp_path/'salt.txt').write_text('a salt for tests\n')
    data = prepare(source, root, tmp_path/'out', profile='a2i2_v1', size=(32, 32), jobs=1, backend='sequential', salt=tmp_path/'salt.txt')
    s = ExamDataset(data, config=ExamConfig(text='none', masks=True), train=False)
    one = next(s[i] for i in range(2) if s[i]['present'].all())
    assert one['keywords'] == ['mass', 'left'] and one['airlight'] == np.float32(.2) and all(m.max() == 1 for m in one['masks'])
    other = next(s[i] for i in range(2) if not s[i]['present'].all())
    assert other['masks'] == [None]*4 and np.isnan(other['airlight'])


def test_tables_that_cannot_be_read(tmp_path):
    table = tmp_path/'t.csv'
    pd.DataFrame({'File_path': ['a', 'a']}).to_csv(table, index=False)
    with pytest.raises(DataError, match='stands twice'): read_exam_table(table, tmp_path)
    pd.DataFrame({'File_path': ['a']}).to_csv(table, index=False)
    with pytest.raises(DataError, match='no view of 1 exams'): read_exam_table(table, tmp_path)
    pd.DataFrame({'path': ['a']}).to_csv(table, index=False)
    with pytest.raises(DataError, match='File_path'): read_exam_table(table, tmp_path)
    with pytest.raises(ValueError): airlight_of('dark')


def test_a_table_of_images(tmp_path):
    views(tmp_path, 'P1', ('L_CC', 'R_MLO'))
    (tmp_path/'masks').mkdir()
    (tmp_path/'masks'/'P1_L_CC.png').write_bytes(png_bytes(np.full((64, 48), 255, np.uint8)))
    pd.DataFrame({'filename': ['P1_L_CC', 'P1_R_MLO', 'P9_L_CC'], 'split': 'train', 'pathology': ['MALIGNANT', 'BENIGN', '']}).to_csv(tmp_path/'t.csv', index=False)
    source = read_image_table(tmp_path/'t.csv', tmp_path, tmp_path/'masks')
    assert source.records.mask_path.tolist() == ['masks/P1_L_CC.png', ''] and source.records.patient_id.tolist() == ['P1', 'P1']
    assert source.report.issues.kind.tolist() == ['image is absent']


# DMID, CSAW-CC

def test_dmid_real_reports(tmp_path):
    "The categories of the real reports are those of the gathered table."
    table = pd.read_csv(sample('reports/dmid_reports.csv'), keep_default_na=False)
    from medvl.data.cells import birads_category
    from medvl.data.text.reports import birads_of
    read = [birads_category(' and '.join(birads_of(t))) if birads_of(t) else '' for t in table.report_text]
    want = [birads_category(b) for b in table.birads]
    assert np.mean([a == b for a, b in zip(read, want)]) > .9


def test_dmid_is_not_certain_of_patients(tmp_path):
    source = dmid(tmp_path/'r')
    assert any('not safe' in r for r in source.report.remarks) and source.report.counts['patients_named'] == 0
    for k, side in (('001', 'L'), ('002', 'R')): write_dicom(tmp_path/'r'/f'IMG{k}.dcm', breast(side), ImageLaterality=side, PatientID=f'p{k}')
    named = read_dmid(tmp_path/'r')
    assert named.report.counts['patients_named'] == 1 and named.records.patient_id.tolist() == ['dmid_p001', 'dmid_p002']


def test_csaw_labels_where_cancer_can_be_seen():
    rows = pd.DataFrame({'x_case': ['1', '1', '1', '0', ''], 'x_cancer_laterality': ['Left', 'Left', '', '', ''], 'rad_timing': ['1', '2', '1', '', ''], 'imagelaterality': ['Right', 'Left', 'Left', 'Left', 'Left']})
    assert csaw_labels(rows).label_cancer.fillna(-1).tolist() == [0, -1, -1, 0, -1]


# real exams

def test_real_exams_of_cdd_cesm(tmp_path):
    root = sample('mammo/index.csv').parent
    source = read_folder(root)
    r = source.records
    r = r[(r.source == 'CDD-CESM') & r.patient_id.isin(sorted(r.patient_id[r.source == 'CDD-CESM'].unique())[:4])].reset_index(drop=True)
    (tmp_path/'salt.txt').write_text('a salt for tests\n')
    data = prepare(r, root, tmp_path/'out', profile='a2i2_v1', size=(64, 64), jobs=1, backend='sequential', salt=tmp_path/'salt.txt')
    from medvl.data.text.tokens import build_wordpiece
    exams = ExamDataset(data, build_wordpiece(list(data.manifest.report), size=300), ExamConfig(labels=('malignant',)), train=False)
    assert len(exams) and all(s['keywords'] and s['text'][0] for s in (exams[i] for i in range(len(exams))))
