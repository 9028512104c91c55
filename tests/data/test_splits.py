"""Splits and leaks: no patient on two sides, whatever the order; every planted leak is found, and named."""
import itertools
import json

import cv2
import numpy as np
import pandas as pd
import pytest
from golden import golden, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.core.paths import write_json
from medvl.data.leaks import assert_no_leak, check_leaks, near_pairs
from medvl.data.likeness import thumbnails
from medvl.data.phantom.breast_prepared import split_source
from medvl.data.prepared import open_prepared, write_table
from medvl.data.schema import empty
from medvl.data.splits import allot, deal_groups, fold_patients, fraction_patients, fraction_rows, group_folds, patient_number, split_patients
from medvl.data.store import StoreWriter


def cohort(n, seed=0, rare=.06):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 6, n)
    label = lambda p: np.repeat(np.where(rng.random(n) < .1, np.nan, rng.random(n) < p), images)
    return pd.DataFrame({'patient_id': np.repeat([f'p{i}' for i in range(n)], images), 'label_mass': label(rare), 'label_calc': label(rare/2),
                         'density': np.repeat(rng.choice(list('ABCD'), n), images)})


STRATA = ['label_mass', 'label_calc', 'density']


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 120), st.integers(0, 10**6), st.sampled_from([(), ('label_mass',), tuple(STRATA)]), st.integers(0, 5))
def test_patients_are_never_divided(n, seed, stratify, shuffle):
    m = cohort(n, seed)
    shuffled = m.sample(frac=1, random_state=shuffle)
    for divide in (lambda t: split_patients(t, stratify=stratify, seed=seed), lambda t: fold_patients(t, 3, stratify, seed), lambda t: pd.Series(fraction_patients(t, .4, stratify, seed), t.index)):
        part = divide(m)
        assert part.groupby(m.patient_id).nunique().max() == 1 and part.notna().all()
        pd.testing.assert_series_equal(divide(shuffled).sort_index(), part)
        more = m.assign(patient_id='x' + m.patient_id)
        assert (divide(more.assign(patient_id=m.patient_id)) == part).all()


def test_balance():
    m = cohort(3000)
    p = m.drop_duplicates('patient_id')
    split = split_patients(m, (.7, .1, .2), STRATA)[p.index]
    for name, share in (('train', .7), ('valid', .1), ('test', .2)):
        assert abs((split == name).mean() - share) < .002
        for label in ('label_mass', 'label_calc'): assert abs((split[p[label] == 1] == name).sum() - share*(p[label] == 1).sum()) <= 2
        for d in 'ABCD': assert abs((split[p.density == d] == name).mean() - share) < .01
    fold = fold_patients(m, 5, STRATA)[p.index]
    counts = fold[p.label_calc == 1].value_counts()
    assert counts.max() - counts.min() <= 2 and fold.value_counts().max() - fold.value_counts().min() <= 2


def test_joining_patients_change_nothing_without_strata():
    m = cohort(500)
    part = split_patients(m)
    some = m[m.patient_id.isin(m.patient_id.unique()[::3])]
    assert (split_patients(some) == part[some.index]).all() and (split_patients(m, seed=1) != part).mean() > .2
    u = patient_number([f'p{i}' for i in range(20000)])
    assert abs(u.mean() - .5) < .01 and abs(np.histogram(u, 10, (0, 1))[0] - 2000).max() < 200


def source(split, per=4):
    from medvl.data.schema import Report, Source
    n = len(split)*per
    df = pd.DataFrame(dict(patient_id=[f'P{i//per:03d}' for i in range(n)], label_mass=[float(i//per % 3 == 0) for i in range(n)], split=np.repeat(split, per)))
    return Source(df, None, None, Report('table'))


@pytest.mark.parametrize('valid, share', [(None, 0.2), (0.1, 0.1), (0, 0)])
def test_validation_is_taken_out_of_training_alone(valid, share):
    before = source(['train']*80 + ['test']*20)
    after = split_source(before, valid=valid)
    r, was = after.records, before.records.split
    assert (was != 'valid').all() and ((r.split == 'test') == (was == 'test')).all() and r.groupby('patient_id').split.nunique().max() == 1
    count = r.groupby('split').patient_id.nunique()
    assert count.get('valid', 0) == round(80*share) and r.equals(split_source(before, valid=valid).records)
    assert (after.report.issues.kind == 'no valid part').any() == (share > 0) and not after.report.rejects.size
    if share: assert not r.equals(split_source(before, seed=1, valid=valid).records) and abs(r[r.split == 'valid'].label_mass.mean() - r[r.split == 'train'].label_mass.mean()) < 0.05


def test_own_split_is_questioned():
    full = source(['train']*6 + ['valid']*2 + ['test']*2)
    assert split_source(full).records.equals(full.records) and not len(full.report.issues)
    drawn = split_source(source(['']*40))
    assert drawn.records.groupby('split').patient_id.nunique().to_dict() == dict(train=24, valid=6, test=10)
    gaps = ['train']*6 + ['']*2 + ['valid', 'test']
    with pytest.raises(DataError, match='8 of 40 rows have no part') as e: split_source(source(gaps))
    assert (e.value.row, e.value.column) == (24, 'split')
    assert (split_source(source(gaps), unassigned='leave').records.split == '').sum() == 8 and (split_source(source(gaps), unassigned='test').records.split == 'test').sum() == 12
    torn = source(['train']*6 + ['valid']*2 + ['test']*2)
    torn.records.loc[[0, 39], 'split'] = ['test', 'train']
    with pytest.raises(DataError, match=r'divides 2 patients between parts: test \(row 0\), train \(row 1\); test \(row 36\), train \(row 39\)'): split_source(torn)
    told = split_source(torn, divided='report')
    assert told.records.equals(torn.records) and set(told.report.issues.row) == {0, 36} and set(told.report.issues.kind) == {'patient in several parts'}
    half = source(['train']*3 + ['test']*3)
    half.records.loc[0, 'split'] = ''
    half.records.loc[1, 'split'] = ''
    with pytest.raises(DataError, match=r'test \(row 0\), train \(row 2\)'): split_source(half, unassigned='test') # her other rows are in train
    with pytest.raises(DataError, match="'dev' is no part"): split_source(source(['train', 'dev', 'test']))
    for bad in (dict(unassigned='tset'), dict(divided='yes')):
        with pytest.raises(ValueError, match='There are'): split_source(torn, **bad)


def test_fractions_are_nested():
    m = cohort(800)
    masks = [fraction_patients(m, f, STRATA) for f in (.01, .1, .5, 1.)]
    for small, large in zip(masks, masks[1:]): assert (large | ~small).all()
    assert [m.patient_id[k].nunique() for k in masks] == [8, 80, 400, 800] and masks[-1].all()
    p = m.drop_duplicates('patient_id').index
    half = masks[2][p]
    for label in ('label_mass', 'label_calc'): assert abs((m.label_mass[p][half] == 1).mean() - (m.label_mass[p] == 1).mean()) < .01, label
    assert fraction_rows(m, .1).sum() == round(.1*len(m)) and m.sample(frac=.1, random_state=1).index.isin(np.flatnonzero(fraction_rows(m, .1))).all()


def test_allot_by_hand():
    "Two rare patients are parted before anybody else is dealt."
    has = np.zeros((8, 1), bool)
    has[[6, 7]] = True
    part = allot(has, [.5, .5], np.arange(8))
    assert part[6] != part[7] and np.bincount(part).tolist() == [4, 4]
    assert set(allot(has, [1., 0.], np.arange(8))) == {0}


def test_wrong_requests():
    m = cohort(20)
    for bad in ((.5, .5), (.9, .2, -.1), (.5, .2, .2)):
        with pytest.raises(ValueError, match='does not divide'): split_patients(m, bad)
    with pytest.raises(DataError, match="'label_mass'"): split_patients(m, stratify=['label_mas'])
    with pytest.raises(ValueError, match='30 folds'): fold_patients(m, 30)
    with pytest.raises(ValueError, match='0,1'): fraction_patients(m, 1.5)
    with pytest.raises(DataError, match='without patient'): split_patients(m.assign(patient_id=['', *m.patient_id[1:]]))


def test_group_folds_golden():
    """GroupKFold leaves the order of equal groups to the processor's sort, so the golden folds are one of the outcomes that the rule allows:
    some order of the equals gives exactly them, and ours has the same numbers of rows in each fold."""
    text = json.loads(golden('mammoclip/text.json').read_text())
    groups, want = np.array(text['folds_patient_id']), np.array(text['folds_fold'])
    ids, sizes = np.unique(groups, return_counts=True)
    classes = [[i for i in range(len(ids)) if sizes[i] == n] for n in sorted(set(sizes), reverse=True)]
    outcomes = []
    for choice in itertools.product(*[itertools.permutations(c) for c in classes]):
        order = [i for c in choice for i in c]
        fold = np.empty(len(ids), int)
        fold[order] = deal_groups(sizes[order], 4)
        outcomes.append(tuple(fold[np.searchsorted(ids, groups)]))
    assert tuple(want) in outcomes and tuple(group_folds(groups, 4)) in outcomes and len(set(outcomes)) < len(outcomes)
    assert np.bincount(group_folds(groups, 4)).tolist() == np.bincount(want).tolist()


def test_group_folds_equals_scikit_learn_without_ties():
    from sklearn.model_selection import GroupKFold
    rng = np.random.default_rng(0)
    for k in (2, 4, 7):
        sizes = rng.permutation(np.arange(1, 40)) # all different
        groups = rng.permutation(np.repeat(np.arange(39)*7 % 39, sizes))
        theirs = np.empty(len(groups), int)
        for fold, (_, rows) in enumerate(GroupKFold(k).split(groups, groups=groups)): theirs[rows] = fold
        assert (group_folds(groups, k) == theirs).all()


def test_group_folds_own():
    "Largest groups first, each to the emptiest fold, of equals the larger id first: written out by hand."
    assert group_folds([1]*5 + [2]*4 + [3]*3 + [4]*2, 2).tolist() == [0]*5 + [1]*7 + [0]*2
    assert group_folds(list('abc'), 2).tolist() == [0, 1, 0]


def breast(i, shape=(152, 96)):
    rng = np.random.default_rng(1000 + i)
    yy, xx = np.mgrid[:shape[0], :shape[1]]
    texture = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 4)
    texture = (texture - texture.min())/np.ptp(texture)
    return ((((xx/(60 + 30*rng.random()))**2 + ((yy - 76)/(50 + 20*rng.random()))**2) < 1)*(60 + 180*texture)).astype(np.uint8)


def dataset(folder, images, patients, split, hashes=None):
    n = len(images)
    with StoreWriter(folder/'images', n, *images[0].shape) as writer: sums = [writer.write(i, image) for i, image in enumerate(images)]
    manifest = pd.DataFrame({'row': range(n), 'image_id': [f'i{i}' for i in range(n)], 'patient_id': patients, 'exam_id': 'e', 'laterality': 'L', 'view': 'CC', 'source': '',
        'orig_height': 9, 'orig_width': 9, 'crop_y0': 0., 'crop_x0': 0., 'crop_y1': 9., 'crop_x1': 9., 'spacing_y': np.nan, 'spacing_x': np.nan,
        'image_sha256': hashes or [f'h{i}' for i in range(n)], 'pixel_sha256': sums, 'burned_in_text': False, 'mask_row': -1, 'report': '', 'age': np.nan, 'density': '', 'birads': '',
        'pathology': '', 'split': split, 'fold': -1})
    write_table(manifest, 'manifest', folder)
    for kind in ('boxes', 'sentences'): write_table(empty(kind), kind, folder)
    write_json(folder/'dataset.json', {})
    return open_prepared(folder)


COPIES = {
    'same': lambda x: x, 'mirrored': lambda x: x[:, ::-1].copy(), 'gamma': lambda x: (255*(x/255)**.7).astype(np.uint8), 'noise': lambda x: np.clip(x + np.random.default_rng(0).normal(0, 5, x.shape), 0, 255).astype(np.uint8),
    'jpeg': lambda x: cv2.imdecode(cv2.imencode('.jpg', x, [1, 40])[1], 0), 'scaled': lambda x: cv2.resize(cv2.resize(x, (48, 76)), (96, 152)), 'dimmed': lambda x: (x*.7).astype(np.uint8)}


def test_planted_leaks_are_found(tmp_path):
    originals = [breast(i) for i in range(20)]
    copies = [make(originals[k]) for k, make in enumerate(COPIES.values())]
    n = len(copies)
    data = dataset(tmp_path/'d', originals + copies, [f'p{i}' for i in range(20)] + [f'q{i}' for i in range(n)], ['train']*20 + ['test']*n)
    report = check_leaks(data)
    pairs = {(p.image_a, p.image_b) if p.split_a == 'train' else (p.image_b, p.image_a) for p in report.pairs.itertuples()}
    assert pairs == {(f'i{k}', f'i{20 + k}') for k in range(n)}
    assert set(report.pairs.kind) == {'image_hash', 'near_duplicate'} and report.pairs.detail.str.contains('mirrored').sum() == 1
    with pytest.raises(DataError) as e: assert_no_leak(data)
    assert 'the split leaks' in str(e.value) and 'i20' in str(e.value) and 'and 3 more' in str(e.value)
    assert not check_leaks(data, by=('patient',)) and not check_leaks(data, ['train']*20 + ['']*n)
    assert (tmp_path/'d'/'thumbnails.npz').exists() and len(check_leaks(data).pairs) == len(report.pairs)
    half = data.subset(np.arange(len(data)) >= 5)
    assert len(check_leaks(half).pairs) == sum(int(p.split('i')[1]) >= 5 for p, _ in pairs)


def test_patient_and_file_leaks(tmp_path):
    data = dataset(tmp_path/'d', [breast(i) for i in range(6)], ['a', 'b', 'c', 'a', 'd', 'e'], ['train', 'train', 'valid', 'test', 'test', ''], hashes=['1', '2', '3', '4', '2', '1'])
    pairs = check_leaks(data).pairs
    assert pairs.kind.tolist() == ['patient', 'image_hash'] and set(pairs.loc[1, ['image_a', 'image_b']]) == {'i1', 'i4'}
    assert assert_no_leak(data, ['train', '', 'valid', '', 'test', '']).checked['images'] == {'test': 1, 'train': 1, 'valid': 1}
    with pytest.raises(ValueError, match='5 values'): check_leaks(data, ['train']*5)
    with pytest.raises(DataError, match="'split'"): check_leaks(data, 'spilt')
    with pytest.raises(ValueError, match="'near_duplicate'"): check_leaks(data, by=('near_duplicates',))


def test_strangers_are_not_accused():
    "Real mammograms: different patients of one scanner look alike, and are not called copies."
    index = pd.read_csv(sample('mammo/index.csv'))
    some = index[index.dataset == 'CDD-CESM']
    root = sample('mammo/index.csv').parent
    thumbs = thumbnails([cv2.imread(str(root/p), 0) for p in some.image_path])
    first = (some.patient_id.rank(method='dense') % 2 == 0).to_numpy()
    found = near_pairs(thumbs[first], thumbs[~first])
    assert len(found) == 0
