"""The cardiomegaly question's data: NIH's ages and sexes, the original's CSVs, its pixels and masks at golden parity, real-valued targets, splits, the cohort table."""
import gzip
import json

import cv2
import numpy as np
import pandas as pd
import pytest
from golden import golden, sample
from scipy import stats

from medvl.core.errors import DataError
from medvl.core.seed import numpy_rng
from medvl.data.batch import check_batch, collate
from medvl.data.cells import sex_letter
from medvl.data.cohort import cohort_table
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.pixels.equalised import equalised, loss_mask, original_pixels
from medvl.data.pixels.profiles import Profile, get_profile, preprocess
from medvl.data.releases.cardiomegaly import cohort_rows, read_original_table, rows_to_valid, patients_on_both_sides, write_original_table
from medvl.data.releases.nih_cxr import read_entries, read_nih_cxr
from medvl.data.releases.release import read_table
from medvl.data.samples.builders import Parts, new_samples
from medvl.data.samples.targets import real_values
from medvl.data.schema import Report
from medvl.data.splits import split_patients
from medvl.evaluate.stats.selection import splits_of

NAMES = ('gradient', 'noise', 'blobs', 'near_constant')


def pipeline(): return np.load(golden('cardiomegaly/image_pipeline.npz')), json.loads(golden('cardiomegaly/image_pipeline.json').read_text())


# ------------------------------------------------------------------------------------------------ pixels, against the original

@pytest.mark.parametrize('name', NAMES)
def test_pixels_are_the_originals(name):
    z, _ = pipeline()
    raw = z[f'{name}/raw']
    np.testing.assert_array_equal(equalised(raw), z[f'{name}/equalised_u8'])
    for side in (160, 224):
        for how, p, profile in (('eq', 1., 'cardiomegaly_v1'), ('noeq', 0., 'cardiomegaly_plain_v1')):
            want, got = z[f'{name}/{how}_resized{side}_u8'], original_pixels(raw, (side, side), p)
            far = np.abs(want.astype(int) - got)
            assert far.max() <= 1 and (far == 0).mean() > .85, (side, how, far.max(), (far == 0).mean())
            np.testing.assert_array_equal(preprocess(raw, profile, (side, side)).pixels, got)
    for how, p in (('eq', 1.), ('noeq', 0.)):
        x = original_pixels(raw, p=p) / 255
        np.testing.assert_allclose([x.mean(), x.std()], z[f'{name}/{how}_160_mean_std'], atol=2e-3)


@pytest.mark.parametrize('name', NAMES)
def test_masks_are_the_originals(name):
    z, _ = pipeline()
    np.testing.assert_array_equal(loss_mask(z[f'{name}/raw']) > 0, z[f'{name}/mask_native'])
    mask = loss_mask(z[f'{name}/raw'], size=(160, 160))
    assert mask.dtype == np.float64
    np.testing.assert_allclose(mask, z[f'{name}/mask_resized160'], atol=1e-6)


def test_equalising_half_of_the_images_is_their_mistake_and_an_option():
    _, told = pipeline()
    z, n = np.load(golden('cardiomegaly/image_pipeline.npz')), told['trial']['N']
    raw = z['blobs/raw']
    half = sum(np.array_equal(original_pixels(raw, p=told['equalise_probability_default'], rng=numpy_rng(0, i)), original_pixels(raw)) for i in range(n))
    assert abs(half - told['trial']['equalised']) < 60 and all(np.array_equal(original_pixels(raw), original_pixels(raw)) for _ in range(3))


def test_the_ages_target_is_a_share_of_89():
    _, told = pipeline()
    for years, target, kind in told['age_target'].values():
        assert kind == 'torch.float32' and np.float32(years / np.float32(89)) == pytest.approx(target, abs=1e-7)
        assert real_values(pd.DataFrame({'age': [years]}), 'age')[0, 0] == years


def test_foregrounds():
    from medvl.data.phantom.chest_film import chest_exam
    e = chest_exam(1, 2, size=(128, 128))
    lung, body = e.lungs['R'] | e.lungs['L'], loss_mask(e.pixels, 'foreground') > 0
    assert (loss_mask(e.pixels)[lung] == 1).mean() > .99 # the original's mask hides no lung
    assert body[lung].mean() > .95 and (loss_mask(e.pixels, 'tissue') > 0)[lung].mean() < .5
    speck = e.pixels.copy(); speck[:, :] = 0; speck[10:60, 10:60], speck[100:104, 100:104], speck[20:30, 20:30] = 200, 220, 0
    found = loss_mask(speck, 'foreground') > 0
    assert found[10:60, 10:60].all() and found.sum() == 2500 # the largest piece, its hole filled


def test_profiles_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match='stretch'): get_profile(Profile('x', grey='clahe', aspect='pad'))
    with pytest.raises(DataError, match='constant'): preprocess(np.full((40, 40), 9, np.uint8), 'cardiomegaly_v1')
    with pytest.raises(TypeError, match='uint8'): equalised(np.zeros((4, 4), np.uint16))
    deep = (np.arange(64*64, dtype=np.uint16).reshape(64, 64) * 7)
    assert preprocess(deep, 'cardiomegaly_v1').pixels.dtype == np.uint8
    box = preprocess(np.arange(100, dtype=np.uint8).repeat(100).reshape(100, 100), 'cardiomegaly_clahe_v1', boxes=[[10, 20, 50, 60]]).boxes
    np.testing.assert_allclose(box, [[16, 32, 80, 96]])


# ------------------------------------------------------------------------------------------------ tables

def entry_table(folder, rows, name='Data_Entry_2017.csv'):
    head = 'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],'
    text = '\n'.join([head, *(f'{i:08d}_000.png,{told},0,{i},{age},{sex},PA,1024,1024,.1,.1,' for i, (told, age, sex) in enumerate(rows))]) + '\n'
    path = folder/name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith('.gz') else text.encode())
    return path


def test_ages_of_nih(tmp_path):
    ages = ['058Y', '011M', '020D', '0', '000D', '121', '414Y', '', 'old', '095Y']
    path, report = entry_table(tmp_path, [('No Finding', a, 'M') for a in ages]), Report('x')
    found = read_entries(path, report).age.to_numpy()
    np.testing.assert_allclose(found, [58, 11/12, 20/365.25, 0, 0, np.nan, np.nan, np.nan, np.nan, 95], rtol=1e-6)
    zero = read_entries(path, Report('x'), 'zero').age.to_numpy()
    np.testing.assert_allclose(zero, [58, 0, 0, 0, 0, np.nan, np.nan, np.nan, np.nan, 95])
    odd = report.issues[report.issues.kind == 'impossible age']
    assert odd.item.tolist() == ['00000005_000.png', '00000006_000.png'] # outliers are named
    with pytest.raises(ValueError, match='young'): read_entries(path, Report('x'), 'nought')


def test_packed_tables(tmp_path):
    path = entry_table(tmp_path, [('Cardiomegaly', '058Y', 'F')], 'Data_Entry_2017_v2020.csv.gz')
    assert read_entries(path, Report('x')).label_cardiomegaly.tolist() == [1]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match='torn'): read_table(path)


def test_nih_sample_is_read():
    sample('nih_cxr/index.csv')
    root = sample('nih_cxr/index.csv').parent
    s = read_nih_cxr(root, images='all')
    index = pd.read_csv(root/'index.csv', dtype={'image_id': str}).set_index('image_id')
    r = s.records.set_index('image_id')
    assert len(r) == 724 and int(r.label_cardiomegaly.sum()) == 133 and int(r.label_no_finding.sum()) == 27
    assert (r.sex == index.sex[r.index]).all() and (r.age == index.age[r.index]).all() and (r['view'] == index['view'][r.index]).all()
    assert cohort_rows(s.records, 'others').sum() == 724 - 27 and cohort_rows(s.records).sum() == 133 + 27


def test_the_originals_tables(tmp_path):
    rows = pd.DataFrame({'label_cardiomegaly': [1, 0, 0], 'age': [46.7, 0., np.nan], 'sex': ['M', 'F', 'M']}, index=['00000001_000', '00000002_000', '00000003_000'])
    table = write_original_table(rows, tmp_path/'train.csv')
    assert list(table) == ['FileName', 'Cardiomegaly', 'PatAge', 'PatGender'] and table.to_numpy().tolist() == [['00000001_000.png', 1, 46, 1], ['00000002_000.png', 0, 0, 0]]
    for n in table.FileName: cv2.imwrite(str(tmp_path/n), np.eye(8, dtype=np.uint8) * 200)
    got = read_original_table(tmp_path/'train.csv', tmp_path, 'train').records
    assert got[['age', 'sex', 'label_cardiomegaly', 'patient_id', 'split']].to_numpy().tolist() == [[46, 'M', 1, '00000001', 'train'], [0, 'F', 0, '00000002', 'train']]
    assert read_original_table(tmp_path/'train.csv', tmp_path, male=0).records.sex.tolist() == ['F', 'M']
    for column, wrong in (('Cardiomegaly', 2), ('PatGender', 'M')):
        table.assign(**{column: wrong}).to_csv(tmp_path/'bad.csv', index=False)
        with pytest.raises(DataError, match='neither 0 nor 1'): read_original_table(tmp_path/'bad.csv', tmp_path)
    table.drop(columns='PatAge').to_csv(tmp_path/'bad.csv', index=False)
    with pytest.raises(DataError, match='PatAge'): read_original_table(tmp_path/'bad.csv', tmp_path)
    table.assign(PatAge=[130, 5]).to_csv(tmp_path/'old.csv', index=False)
    s = read_original_table(tmp_path/'old.csv', tmp_path)
    assert np.isnan(s.records.age[0]) and s.report.issues.kind.tolist() == ['impossible age']


def test_a_division_by_rows_leaks_and_by_patients_does_not():
    sample('nih_cxr/index.csv')
    index = pd.read_csv(sample('nih_cxr/index.csv')).assign(cardio=lambda f: f.cardiomegaly)
    rows = [patients_on_both_sides(index.patient_id, rows_to_valid(index.patient_id, .1, s))['share'] for s in range(5)]
    assert min(rows) > .2, rows # real follow-ups
    assert patients_on_both_sides(index.patient_id, split_patients(index, (.7, .1, .2)))['leaking'] == 0
    with pytest.raises(DataError, match='no image'): patients_on_both_sides(['a'], ['train'])


# ------------------------------------------------------------------------------------------------ real-valued targets

def test_sex_is_a_letter():
    assert [sex_letter(t) for t in ('Female', ' m ', 'X', 'unknown', '', None, '0')] == ['F', 'M', 'O', '', '', '', '']


def test_targets_reach_the_batch(tmp_path):
    parts = splits_of(prepared_chest_phantom(tmp_path, 24, (64, 64)))
    m = parts['train'].manifest
    assert set(m.sex) == {'F', 'M'} and m.age.notna().all()
    data = new_samples('chest_images', Parts(parts, {}, ()), 'train', None, {'targets': ('age', 'sex'), 'labels': ()})
    batch = check_batch(collate([data[0, i] for i in range(5)]))
    assert batch['targets'].tolist() == [[a, float(s == 'M')] for a, s in zip(m.age[:5], m.sex[:5])] and 'labels' not in batch
    plain = new_samples('chest_images', Parts(parts, {}, ()), 'train', None, {'labels': ()})
    assert 'targets' not in plain[0, 0] and plain.digest != data.digest
    with pytest.raises(DataError, match='weight'): new_samples('chest_images', Parts(parts, {}, ()), 'train', None, {'targets': ('weight',)})


@pytest.mark.parametrize('value, fits', [(0, True), (120, True), (120.5, False), (-1, False), (np.inf, False), (np.nan, True), ('', True), ('old', False)])
def test_ages_as_targets(value, fits):
    table = pd.DataFrame({'age': pd.Series([50, value], dtype=object)})
    if not fits:
        with pytest.raises(DataError, match='row 1'): real_values(table, 'age')
    else:
        got = real_values(table, 'age')[1, 0]
        assert got == value if isinstance(value, (int, float)) and value == value else np.isnan(got)


# ------------------------------------------------------------------------------------------------ the cohort table

def test_cohort_table_is_scipys():
    rng = np.random.default_rng(0)
    make = lambda n, a, p: pd.DataFrame({'patient_id': np.arange(n).astype(str), 'age': rng.normal(a, 12, n), 'sex': rng.choice(['F', 'M'], n, p=[p, 1 - p]), 'view': 'PA',
                                         'label_cardiomegaly': (rng.random(n) < p).astype(float)})
    a, b, c = make(150, 46, .5), make(90, 55, .2), make(50, 50, .4)
    two, three = cohort_table({'a': a, 'b': b}), cohort_table({'a': a, 'b': b, 'c': c})
    assert two.p['age, median [quartiles]'] == stats.mannwhitneyu(a.age, b.age).pvalue and two['compared by']['age, median [quartiles]'] == 'Mann-Whitney'
    assert three.p['age, median [quartiles]'] == stats.kruskal(a.age, b.age, c.age).pvalue
    table = np.array([[(f.sex == 'M').sum(), (f.sex != 'M').sum()] for f in (a, b)])
    assert two.p['male'] == stats.chi2_contingency(table, correction=False).pvalue and two.a['male'] == f'{table[0, 0]} ({table[0, 0]/150:.1%})'
    assert two['compared by']['PA view'] == 'one value only' and two['p normal']['age, median [quartiles]'] == min(stats.normaltest(x.age).pvalue for x in (a, b))
    assert two.a['age, median [quartiles]'] == '{:.0f} [{:.0f}, {:.0f}]'.format(*np.percentile(a.age, [50, 25, 75]))


def test_cohort_table_counts_a_patient_once():
    a = pd.DataFrame({'patient_id': list('112'), 'age': [1., 1., 9.], 'sex': list('MMF'), 'view': 'PA', 'label_cardiomegaly': [1., 1., 0.]})
    assert cohort_table({'a': a}).a['patients'] == '2' and cohort_table({'a': a}, unit='').a['male'] == '2 (66.7%)'
    with pytest.raises(DataError, match='at least one'): cohort_table({})
    both = cohort_table({'train': a, 'test': a}) # groups that are called as splits are
    assert both.test['patients'] == both.train['patients'] == '2' and both.test['male'] == both.train['male']
    with pytest.raises(ValueError, match='called'): cohort_table({'p': a})
