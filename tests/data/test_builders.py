"""Builders, on tables of the releases' exact form and size."""
import json

import numpy as np
import pandas as pd
import pytest
import releases
from golden import golden, sample

from medvl.core.errors import DataError
from medvl.data.cells import birads_category, density_letter
from medvl.data.releases.folder import read_folder
from medvl.data.phantom.breast_prepared import split_source
from medvl.data.releases.report_table import BREAST_COLUMNS, breast_table, read_breast_table, read_report_table
from medvl.data.releases.rsna_breast import read_rsna
from medvl.data.schema import read_list, validate
from medvl.data.releases.vindr import FINDINGS, fold_table, label_name, read_vindr


@pytest.fixture(scope='module')
def vindr(tmp_path_factory):
    folder = tmp_path_factory.mktemp('vindr')
    breast, finding = releases.vindr()
    breast.to_csv(folder/'breast-level_annotations.csv', index=False)
    finding.to_csv(folder/'finding_annotations.csv', index=False)
    return folder, breast, finding


def test_vindr_has_the_release_numbers(vindr):
    "The made table is what the release is, so that the test below means something."
    _, breast, finding = vindr
    assert len(breast) == 20000 and len(finding) == 20486 and finding.image_id.duplicated().sum() == 486
    assert finding.xmin.notna()[:2254].all() and finding.xmin.isna()[2254:].all() and (finding.split[:2254] == 'training').sum() == 1802
    assert (finding.split == 'training').sum() == 16391


def test_vindr_gets_a_validation_part(vindr):
    "The official test patients stay; a fifth of the others validates."
    source = read_vindr(vindr[0])
    r = split_source(source).records
    assert ((r.split == 'test') == (source.records.split == 'test')).all() and set(r.split) == {'train', 'valid', 'test'} and r.groupby('patient_id').split.nunique().max() == 1
    assert abs(r[r.split == 'valid'].patient_id.nunique() - 800) <= 5 # of 4000; the rare findings decide about the last few


def test_vindr_images(vindr):
    folder, breast, finding = vindr
    source = read_vindr(folder)
    r, counts = source.records, source.report.issues.kind.value_counts()
    assert len(r) == 20000 and r.image_id.tolist() == breast.image_id.tolist() and source.report.counts['duplicate_rows'] == 486
    assert counts['conflict: mass'] == 195 and counts['conflict: suspicious_calcification'] == 156
    for name in FINDINGS: # a plain loop in another form: text search in the finding rows
        quoted = finding[finding.finding_categories.str.contains(f"'{name}'", regex=False)].image_id
        assert set(r.image_id[r[f'label_{label_name(name)}'] == 1]) == set(quoted)
    assert (r.label_no_finding == 1).sum() == 18232 and not r.filter(like='label_').isna().any().any()
    assert len(source.boxes) == sum(len(read_list(c)) for c in finding.finding_categories[:2254])
    assert r.split.value_counts().to_dict() == {'train': 16000, 'test': 4000} and set(r.density) == set('ABCD') and set(r.birads) == set('12345')
    assert r.patient_id.nunique() == 5000 and r.image_path[0] == f'images/{breast.study_id[0]}/{breast.image_id[0]}.dicom'
    validate(r, 'records')
    validate(source.boxes, 'boxes')


def test_vindr_rules(vindr):
    folder, _, finding = vindr
    any_, unstated, rows = (read_vindr(folder, rule) for rule in ('any_positive', 'unstated', 'finding_rows'))
    assert unstated.records.label_mass.isna().sum() == 195
    assert any_.records.label_mass.sum() - (unstated.records.label_mass == 1).sum() == 195
    assert len(rows.records) == 20486 and rows.records.image_id.is_unique and rows.records.label_mass.sum() == finding.finding_categories.str.contains("'Mass'").sum()
    per_image = rows.records.groupby('image_path').label_mass.agg(['min', 'max'])
    assert (per_image['min'] != per_image['max']).sum() == 195
    assert set(rows.boxes.image_id) <= set(rows.records.image_id) and len(rows.boxes) == len(any_.boxes)
    majority = read_vindr(folder, 'majority').records
    assert majority.label_mass.tolist() == any_.records.label_mass.tolist() # ties of two rows are positive
    with pytest.raises(ValueError, match='any_positive'): read_vindr(folder, 'any_positiv')


def test_vindr_fold_table(vindr):
    folder, _, finding = vindr
    table = fold_table(folder)
    assert len(table) == 20486 and table.image_id.str.endswith('.png').all() and sorted(table.fold.unique()) == [0, 1, 2, 3]
    assert table.groupby('patient_id').fold.nunique().max() == 1
    assert {f.replace(' ', '_') for f in FINDINGS} | {'No_Finding', 'density', 'resized_xmin', 'resized_ymax', 'view'} <= set(table)
    assert table.Mass.sum() == finding.finding_categories.str.contains("'Mass'").sum() and table.density.isin([0, 1, 2, 3]).all()


def test_vindr_trouble(vindr, tmp_path):
    "Every kind of trouble is reported with its row, and the rest is read."
    _, breast, finding = vindr
    b, f = breast.head(400).copy(), finding[finding.image_id.isin(breast.image_id[:399])].reset_index(drop=True)
    few = f.index[f.xmin.notna()][:4].tolist()
    f = f.astype({c: object for c in ('xmin', 'xmax', 'ymax', 'finding_categories', 'breast_density')})
    f.loc[few[0], 'xmax'] = f.xmin[few[0]]
    f.loc[few[1], 'ymax'] = np.nan
    f.loc[few[2], 'xmax'] = 99999
    f.loc[few[3], 'finding_categories'] = "['Mas']"
    none = f.index[f.xmin.isna()][:3]
    f.loc[none[0], 'finding_categories'] = '__import__("os").getcwd()'
    f.loc[none[1], 'breast_density'] = 'DENSITY D' if f.breast_density[none[1]] != 'DENSITY D' else 'DENSITY A'
    f = pd.concat([f, f.tail(1).assign(image_id='stranger')], ignore_index=True)
    b = pd.concat([b, b.head(1)], ignore_index=True)
    b.to_csv(tmp_path/'breast-level_annotations.csv', index=False)
    f.to_csv(tmp_path/'finding_annotations.csv', index=False)
    source = read_vindr(tmp_path)
    issues = source.report.issues.drop_duplicates('kind').set_index('kind')
    for kind, row in (('box without area', few[0]), ('incomplete box', few[1]), ('box over the edge', few[2]), ('unknown finding', few[3]), ('unreadable finding', none[0])):
        assert issues.row[kind] == row, kind
    assert {'no finding row', 'not in the breast-level table', 'tables disagree: breast_density', 'image listed twice', 'box without finding'} <= set(issues.index)
    assert len(source.records) == 400
    f.rename(columns={'finding_categories': 'finding_category'}).to_csv(tmp_path/'finding_annotations.csv', index=False)
    with pytest.raises(DataError, match="Is it 'finding_category'"): read_vindr(tmp_path)
    with pytest.raises(DataError, match='does not exist'): read_vindr(tmp_path/'none')


@pytest.mark.parametrize('form', ['train_folds', 'train', 'as_floats'])
def test_rsna(tmp_path, form):
    df = releases.rsna()
    assert len(df) == 54706 and df.patient_id.nunique() == 11913
    text = df.copy()
    if form == 'train': text = text.drop(columns='fold')
    if form == 'as_floats': text = text.astype({'cancer': float, 'site_id': float, 'patient_id': float})
    path = tmp_path/('train.csv' if form == 'train' else 'train_folds.csv')
    text.to_csv(path, index=form == 'as_floats')
    source = read_rsna(tmp_path)
    r, counts = source.records, source.report.counts
    assert len(r) == 54706 and counts['patients'] == 11913 and counts['patients_with_cancer'] == 486 and counts['images_with_cancer'] == df.cancer.sum()
    assert r.label_cancer.tolist() == df.cancer.tolist() and r.patient_id.tolist() == df.patient_id.astype(str).tolist()
    assert sum(counts.get(f'view_{v}', 0) for v in ('AT', 'LM', 'ML', 'LMO')) == 38 and counts['age_missing'] == df.age.isna().sum()
    assert set(r.birads) == {'', '0', '1', '2'} and set(r.density) == {'', 'A', 'B', 'C', 'D'} and (r.density == '').sum() == (df.site_id == 2).sum()
    assert r.image_path[5] == f'train_images/{df.patient_id[5]}/{df.image_id[5]}.dcm' and r.label_difficult_negative_case.sum() == df.difficult_negative_case.sum()
    if form != 'train': assert r.fold.tolist() == df.fold.tolist()
    assert not len(source.report.issues) and 'fold' in r or form == 'train'
    validate(r, 'records')


def test_rsna_trouble(tmp_path):
    df = releases.rsna().head(3000).astype({'cancer': object, 'view': object})
    sick = df.index[df.cancer == 1]
    df.loc[sick[0], 'cancer'] = 0
    df.loc[sick[-1], 'biopsy'] = 0
    df.loc[10, 'cancer'] = 'perhaps'
    df.loc[11, 'fold'] = 3 if df.fold[11] != 3 else 0
    df.loc[12, 'image_id'] = df.image_id[13]
    df.to_csv(tmp_path/'train_folds.csv', index=False)
    source = read_rsna(tmp_path/'train_folds.csv')
    kinds = source.report.issues.drop_duplicates('kind').set_index('kind')
    assert {'views of a breast disagree', 'cancer without biopsy', 'patient in several folds', 'image listed twice'} <= set(kinds.index)
    assert kinds.row['not a flag'] == 10 and len(source.records) == 2999
    assert source.records.set_index('image_id').label_cancer[str(df.image_id[sick[0]])] == 1
    assert read_rsna(tmp_path, 'as_given').records.set_index('image_id').label_cancer[str(df.image_id[sick[0]])] == 0


def test_report_table_golden():
    "The original's own output on the golden rows."
    text = json.loads(golden('mammoclip/text.json').read_text())
    ours = breast_table(pd.DataFrame(text['process_in']), k=0)
    want = text['process_out_rows_view_CC_MLO_sorted']
    assert list(ours)[:9] == text['process_out_columns'] and len(ours) == len(want)
    for (_, a), b in zip(ours.iterrows(), want):
        for c in ('patient_id', 'laterality', 'image', 'text'): assert a[c] == b[c], c
        for c in ('view', 'CC', 'MLO'): assert sorted(read_list(a[c])) == b[c], c
        for c in ('findings', 'impressions'): assert a[c] == (b[c] or ''), c


def test_report_table_of_our_own():
    rows = [dict(patient_id=p, laterality='L', view=v, image_id=f'{p}{v}.png', FINDINGS=f, IMPRESSION=i)
            for p, f, i in (('1', 'A new mass is seen. Stable.', 'BI-RADS 4: biopsy.'), ('2', None, '')) for v in ('MLO', 'CC')]
    out = breast_table(pd.DataFrame(rows), k=2)
    assert list(out) == BREAST_COLUMNS and out.image[0] == "['1MLO.png', '1CC.png']" and out.view[0] == "['CC', 'MLO']" and sorted(out.fold) == [0, 1]
    assert read_list(out.text[0]) == ['a new mass is seen', 'birads 4 : biopsy'] and read_list(out.text[1]) == ['']


def test_real_report_tables():
    "The published samples: no patient is in both, so the second's form and text rules are checked, not its rows."
    raw = sample('tables/mammo/img_text_dicom_consolidated_final_folds_BIRADS_num_1_report.csv')
    made = sample('tables/mammo/clip_pretrain_100.csv')
    source = read_report_table(raw)
    assert len(source.records) == 13 and source.report.issues.kind.value_counts().to_dict() == {'file name without dot': 2, 'image listed twice': 2}
    theirs, ours = pd.read_csv(made, dtype=str, keep_default_na=False), breast_table(pd.read_csv(raw, dtype=str, keep_default_na=False))
    assert list(ours) == list(theirs) and len(ours) == 7 and not set(ours.patient_id) & set(theirs.patient_id)
    back = pd.DataFrame([dict(patient_id=r.patient_id, laterality=r.laterality, view=v, image_id=i, FINDINGS=r.findings.capitalize() + '.', IMPRESSION=r.impressions)
                         for r in theirs.itertuples() for i in read_list(r.image) for v in ('CC', 'MLO') if i in read_list(getattr(r, v))])
    again = breast_table(back)
    for c in ('patient_id', 'laterality', 'image', 'view', 'CC', 'MLO', 'text', 'findings', 'impressions'): # their rows, taken apart and put together again
        same = again[c] == theirs[c] if c not in ('CC', 'MLO') else again[c].map(lambda t: sorted(read_list(t))) == theirs[c].map(lambda t: sorted(read_list(t)))
        assert same.all(), c
    source = read_breast_table(made)
    assert source.records.patient_id.nunique() == 23 and len(source.records) == 100 and source.records.image_id.is_unique
    validate(source.records, 'records')


@pytest.mark.parametrize('text,letter', [('A', 'A'), ('b', 'B'), ('ACR C', 'C'), ('DENSITY D', 'D'), ('Density: c', 'C'), ('2', 'B'), ('extremely dense', 'D'), ('F', ''),
                                         ('dense-glandular', ''), ('fatty', ''), ('5', ''), ('AB', '')])
def test_density(text, letter): assert density_letter(text) == letter


@pytest.mark.parametrize('text,category', [('4$3', '4'), ('3$2', '3'), ('0$2', '0'), ('0$4', '4'), ('4b', '4B'), ('BIRADS 4a', '4A'), ('', ''), ('n/a', ''), ('6', '6'), ('2.0', '2')])
def test_birads(text, category): assert birads_category(text) == category


def test_folder_twice_the_same_id(tmp_path):
    (tmp_path/'index.csv').write_text('image_path,patient_id,laterality,view,image_id\na.png,1,L,CC,x\nb.png,1,L,MLO,x\nc.png,1,R,CC,y\n')
    source = read_folder(tmp_path)
    assert source.records.image_id.tolist() == ['y'] and (source.report.issues.kind == 'row set aside').sum() == 2
    (tmp_path/'index.csv').write_text('image_path,patient_id,laterality,view\n')
    with pytest.raises(DataError, match='no rows'): read_folder(tmp_path)
    (tmp_path/'index.csv').unlink()
    with pytest.raises(DataError, match='no index.csv'): read_folder(tmp_path)


@pytest.mark.parametrize('rows, row, column, value', [
    (['a.png,1,L,CC,x,,', 'b.png,2,L,CC,x,,'], 0, 'image_id', "'x'"), (['a.png,,L,CC,x,,'], 0, 'patient_id', "''"), (['a.png,NaN,L,CC,x,,', 'b.png,NaN,L,CC,y,,'], 0, 'patient_id', "''"),
    (['a.png,1,L,CC,x,999,'], 0, 'age', '999'), (['a.png,1,L,CC,x,,yes'], 0, 'label_mass', "'yes'"), (['a.png,1,L,CC,x,,0.5'], 0, 'label_mass', '0.5')])
def test_folder_without_a_good_row(tmp_path, rows, row, column, value):
    (tmp_path/'index.csv').write_text('\n'.join(['image_path,patient_id,laterality,view,image_id,age,label_mass', *rows]))
    with pytest.raises(DataError, match=f'all {len(rows)} rows are set aside') as e: read_folder(tmp_path)
    assert (e.value.row, e.value.column, e.value.file) == (row, column, str(tmp_path/'index.csv')) and value in e.value.message


def test_the_example_is_valid():
    "data_csv/ is what it says: no row is set aside, every box and sentence has its image."
    from pathlib import Path
    folder = Path(__file__).resolve().parents[2]/'data_csv'
    source = read_folder(folder)
    assert not len(source.report.issues) and len(source.records) == 84 and len(source.boxes) == 278 and len(source.sentences) == 687
    readme = (folder/'README.md').read_text()
    from medvl.data.schema import BOXES, RECORDS, SENTENCES
    for name in (*RECORDS, *BOXES, *SENTENCES): assert f'`{name}`' in readme, name
