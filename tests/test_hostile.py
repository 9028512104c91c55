"""Bad input, all at once: one folder with every accident in it goes through to a trained model and a score; what must stop, stops and loses nothing."""
import contextlib
import multiprocessing
import os
import pickle
import re
import resource
import signal
import warnings
import zlib

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

import medvl.api as api
from medvl.core.errors import DataError
from medvl.core.paths import read_jsonl
from medvl.core.run import Run, run_state
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
from medvl.data.dicom.write import write_dicom
from medvl.data.releases.folder import read_folder
from medvl.data.dicom.header import Limits
from medvl.data.pixels.file import read_image
from medvl.data.phantom.breast_dataset import write_phantom
from medvl.data.prepare.run import prepare
from medvl.data.prepared import open_prepared
from medvl.data.pixels.profiles import preprocess
from medvl.evaluate.protocols.embeddings import embed
from medvl.evaluate.protocols.zero_shot import zero_shot
from medvl.methods.recipes import new_method, recipe
from medvl.models.checkpoints import read_checkpoint
from medvl.train.checkpoint import checkpoints
from medvl.train.loop import train
from medvl.train.settings import TrainConfig
from test_image import png_of

SIZE, fork = (96, 64), multiprocessing.get_context('fork')
LONG = 'FINDINGS: ' + ' '.join(f'word{i % 700} in the left breast.' for i in range(2000)) + ' IMPRESSION: BI-RADS 2.'


def breast(dtype=np.uint8, shape=(120, 80)):
    yy, xx = np.mgrid[:shape[0], :shape[1]]
    inside = (xx/60)**2 + ((yy - 60)/50)**2 < 1
    return (inside*(0.5 + 0.3*np.sin(xx/6)*np.cos(yy/9))*(255 if dtype == np.uint8 else 4095)).astype(dtype)


# one folder ------------------------------------------------------------------------------------------------------------------------------------
def picture(path, pixels): cv2.imwrite(str(path), pixels)


def dicom(path, pixels=None, syntax='explicit', side='L', **fields):
    write_dicom(path, breast(np.uint16) if pixels is None else pixels, syntax, bits_stored=12, ImageLaterality=side, ViewPosition='CC', PatientName='SECRET^NAME', PatientID='SECRET1')
    if not fields: return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
        for name, value in fields.items(): setattr(ds, name, value)
        ds.save_as(path)


def cut(path, share): path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])


BAD = { # name: how to write it, what the reason must say, and what it must advise
    'truncated.png': (lambda p: (picture(p, breast()), cut(p, .6)), 'truncated', 'again'),
    'truncated.dcm': (lambda p: (dicom(p), cut(p, .6)), 'truncated', 'again'),
    'truncated_rle.dcm': (lambda p: (dicom(p, syntax='rle'), cut(p, .7)), 'truncated|run lengths', 'again'),
    'truncated_j2k.dcm': (lambda p: (dicom(p, syntax='jpeg2000'), cut(p, .8)), 'truncated', 'again'),
    'truncated.jpg': (lambda p: p.write_bytes(imagecodecs.jpeg8_encode(breast(), level=90)[:900]), 'truncated', 'again'),
    'text.png': (lambda p: p.write_text('Dear colleague, enclosed please find'), 'starts with text', 'unpack'),
    'text.dcm': (lambda p: p.write_text('Dear colleague, enclosed please find. '*20), 'starts with text', 'unpack'),
    'encrypted.png': (lambda p: p.write_bytes(np.random.default_rng(0).bytes(9000)), 'not an image', 'encrypted'),
    'encrypted.dcm': (lambda p: p.write_bytes(bytes(128) + b'DICM' + np.random.default_rng(1).bytes(9000)), 'Rows is missing', 'encrypted'),
    'nobytes.png': (lambda p: p.write_bytes(b''), '0 bytes', 'again'),
    'nobytes.dcm': (lambda p: p.write_bytes(b''), '0 bytes', 'again'),
    'nopixels.png': (lambda p: p.write_bytes(png_of(0, 50)), 'empty', 'leave it out'),
    'nopixels.dcm': (lambda p: dicom(p, Rows=0), 'empty', 'leave it out'),
    'constant.png': (lambda p: picture(p, np.full((120, 80), 7, np.uint8)), 'constant', 'leave it out'),
    'constant.dcm': (lambda p: dicom(p, np.full((120, 80), 7, np.uint16)), 'constant', 'leave it out'),
    'huge.png': (lambda p: p.write_bytes(png_of(60000, 60000, zlib.compress(bytes(9000)))), '60000 × 60000', 'Limits'),
    'huge.dcm': (lambda p: dicom(p, Rows=60000, Columns=60000), '60000 × 60000', 'Limits'),
    'tiny.png': (lambda p: picture(p, np.eye(9, dtype=np.uint8)*255), 'too small', 'leave it out'),
    'colour.png': (lambda p: picture(p, np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)), 'colour', 'luma'),
    'frames.dcm': (lambda p: dicom(p, NumberOfFrames=40), '40 frames', 'Export'),
    'other_side.dcm': (lambda p: dicom(p, side='R'), 'laterality L, the file says R', 'correct the table'),
    'folder.png': (lambda p: p.mkdir(), 'absent', 'image_path'),
    'absent.png': (lambda p: None, 'absent', 'image_path'),
    '../outside.png': (lambda p: picture(p, breast()), 'out of the folder', 'relative path'),
    '/etc/hostname': (lambda p: None, 'out of the folder', 'relative path'),
}
GOOD = ('explicit', 'deflated', 'rle', 'jpeg_lossless', 'jpegls', 'jpeg2000')


def add_files(root, index):
    "Write the bad files, a few good DICOM ones, and their rows."
    rows = []
    for k, (name, (write, _, _)) in enumerate(BAD.items()):
        write(root/name)
        rows.append(dict(image_path=name, image_id=f'bad{k}', patient_id='bad', laterality='L', view='CC', report_text='FINDINGS: None.'))
    for k, syntax in enumerate(GOOD):
        dicom(root/f'{syntax}.dcm', breast(np.uint16)//(k + 2)*2, syntax)
        rows.append(dict(image_path=f'{syntax}.dcm', image_id=syntax, patient_id=f'dicom{k}', laterality='L', view='CC', report_text='FINDINGS: No mass. IMPRESSION: BI-RADS 1.'))
    return pd.concat([index, pd.DataFrame(rows)], ignore_index=True).fillna('')


def spoil_rows(root, index):
    "Duplicate ids, a missing view, impossible cells, strange reports, masks that do not belong; returns the ids meant."
    exams = index.exam_id.unique()
    of = lambda e, side: index.index[(index.exam_id == exams[e]) & (index.laterality == side)]
    ids = dict(missing=index.image_id[of(0, 'R')[1]], nan=index.image_id[of(1, 'L')].tolist(), empty=index.image_id[of(1, 'R')].tolist(), long=index.image_id[of(2, 'L')].tolist(),
               twice=index.image_id[of(3, 'L')[0]], side=index.image_id[of(3, 'R')[0]], view=index.image_id[of(3, 'R')[1]], label=index.image_id[of(4, 'L')[0]],
               mask_out=index.image_id[of(4, 'R')[0]], mask_size=index.image_id[of(4, 'R')[1]], age=index.image_id[of(4, 'L')[1]])
    at = index.set_index('image_id', drop=False)
    at.loc[ids['nan'], 'report_text'], at.loc[ids['empty'], 'report_text'], at.loc[ids['long'], 'report_text'] = 'NaN', '  ', LONG
    at.loc[ids['side'], 'laterality'], at.loc[ids['view'], 'view'], at.loc[ids['label'], 'label_mass'], at.loc[ids['age'], 'age'] = 'Q', '', '7', 'old'
    at.loc[ids['mask_out'], 'mask_path'], at.loc[ids['mask_size'], 'mask_path'] = '../../etc/passwd', 'small.png'
    picture(root/'small.png', np.zeros((5, 5), np.uint8))
    return pd.concat([at.drop(ids['missing']), at.loc[[ids['twice']]]], ignore_index=True), ids


def spoil_boxes(root, ids):
    "Boxes outside, half outside, without area, of an unknown image, and one that is no number."
    boxes = pd.read_csv(root/'boxes.csv', dtype=str, keep_default_na=False)
    bad = [(ids['mask_size'], 500, 500, 600, 600), (ids['mask_size'], -30, 20, 40, 50), (ids['mask_size'], 9, 9, 9, 20), ('nobody', 1, 1, 5, 5), (ids['mask_size'], 'left', 2, 9, 9)]
    extra = pd.DataFrame([dict(image_id=i, label='drawn', x0=a, y0=b, x1=c, y1=d) for i, a, b, c, d in bad])
    pd.concat([boxes[boxes.image_id != ids['mask_size']], extra], ignore_index=True).fillna('').to_csv(root/'boxes.csv', index=False)


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    "(source folder, its records, prepared data, what was meant)"
    place = tmp_path_factory.mktemp('hostile')
    root = write_phantom(place/'source', 6, SIZE, progress=False)
    index = add_files(root, pd.read_csv(root/'index.csv', dtype=str, keep_default_na=False))
    index, ids = spoil_rows(root, index)
    index.to_csv(root/'index.csv', index=False)
    spoil_boxes(root, ids)
    source = read_folder(root)
    return root, source, prepare(source, root, place/'prepared', size=SIZE, jobs=1, salt=place/'salt'), ids


def rejected(data): return pd.read_csv(data.folder/'rejects.csv', keep_default_na=False)


def test_every_good_image_got_through(hostile):
    root, source, data, ids = hostile
    index = pd.read_csv(root/'index.csv', dtype=str, keep_default_na=False)
    spoilt = {ids[k] for k in ('twice', 'side', 'view', 'label', 'age')}
    want = [i for i in index.image_id if not i.startswith('bad') and i not in spoilt]
    assert data.manifest.image_id.tolist() == want and len(want) == 24 - 1 - 5 + len(GOOD) and data.verify() == len(want)
    assert data.info['counts']['records'] == len(want) + len(BAD) and data.info['counts']['images'] == len(want)
    path = index.set_index('image_id').image_path
    for i, name in enumerate(want): np.testing.assert_array_equal(data.image(i), preprocess(read_image(root/path[name]), 'mammo_clip_v1', SIZE).pixels)


@pytest.mark.parametrize('name', BAD)
def test_every_bad_file_has_its_reason(hostile, name):
    root, source, data, _ = hostile
    mine = rejected(data).query('file == @name')
    assert len(mine) == 1 and mine.image_id.iloc[0] == f'bad{list(BAD).index(name)}'
    reason = mine.reason.iloc[0]
    assert re.search(BAD[name][1], reason) and re.search(BAD[name][2], reason), reason
    assert 10 < len(reason) < 250 and reason[-1] == '.' and str(root) not in reason and 'Error' not in reason and 'SECRET' not in reason, reason


def test_every_bad_row_is_in_the_report(hostile):
    root, source, data, ids = hostile
    issues = source.report.issues
    lines = pd.read_csv(root/'index.csv', dtype=str, keep_default_na=False)
    said = lambda name, column: [d for r, i, d in zip(issues.row, issues['item'], issues.detail) if i == column and r is not None and r < len(lines) and lines.image_id[r] == name]
    for name, column, words in ((ids['twice'], 'image_id', 'there twice'), (ids['side'], 'laterality', "'Q': not one of L, R"), (ids['view'], 'view', 'empty'),
                                (ids['label'], 'label_mass', 'a label is 1, 0 or empty'), (ids['age'], 'age', "'old': not a number")):
        assert said(name, column) and all(words in d for d in said(name, column)), (name, column, said(name, column))
    assert len(said(ids['twice'], 'image_id')) == 2 and source.report.counts['exams_without_four_views'] >= 1
    boxes = issues[issues.kind.str.startswith('box')]
    assert set(boxes.kind) == {'box set aside', 'box of an unknown image'} and 'nobody' in set(boxes['item'])
    assert boxes.detail.str.contains('no area').sum() == 1 and boxes.detail.str.contains("'left': not a number").sum() == 1
    assert {'bad22', 'bad23'} & set(issues[issues.kind == 'file is absent']['item'])


def test_boxes_and_masks_outside(hostile):
    root, source, data, ids = hostile
    aside = rejected(data)
    mine = data.boxes[data.boxes.image_id == ids['mask_size']]
    assert len(mine) == 1 and mine.x0.iloc[0] == 0 and 0 < mine.x1.iloc[0] < SIZE[1] # the half that is inside
    assert aside[(aside.image_id == ids['mask_size']) & (aside.stage == 'box')].reason.str.contains('outside').sum() == 1
    masks = aside[aside.stage == 'mask'].set_index('image_id')
    assert set(masks.index) == {ids['mask_out'], ids['mask_size']} and 'out of the folder' in masks.reason[ids['mask_out']] and '5 × 5' in masks.reason[ids['mask_size']]
    m = data.manifest.set_index('image_id')
    assert m.mask_row[ids['mask_out']] == m.mask_row[ids['mask_size']] == -1 and (m.mask_row >= 0).any()
    assert (data.boxes[['x0', 'y0']] >= 0).all(axis=None) and data.boxes.x1.max() <= SIZE[1] and data.boxes.y1.max() <= SIZE[0]


def test_reports_and_views(hostile):
    _, _, data, ids = hostile
    m = data.manifest.set_index('image_id')
    assert (m.report[ids['nan'] + ids['empty']] == '').all() and (m.report[ids['long']] == LONG).all() and len(LONG.split()) > 10000
    assert ids['missing'] not in m.index and data.info['counts']['breasts_without_cc_and_mlo'] >= 1 + len(GOOD)


def test_nothing_partial_and_nobody_named(hostile):
    _, _, data, _ = hostile
    names = {str(p.relative_to(data.folder)) for p in data.folder.rglob('*') if p.is_file()}
    assert names == {'images/pixels.bin', 'images/checksums.bin', 'images/store.json', 'masks/pixels.bin', 'masks/checksums.bin', 'masks/store.json', 'manifest.parquet', 'boxes.parquet',
                     'sentences.parquet', 'rejects.csv', 'dataset.json', 'provenance.json', 'plan.json', 'journal.jsonl', '.lock'}
    assert not any(b'SECRET' in (data.folder/n).read_bytes() for n in names)


def smoke(data):
    "The smallest real system and its data, from prepared images."
    method = new_method('mammoclip', 'smoke', data.manifest.report[data.manifest.report != ''])
    with pytest.warns(UserWarning, match='left out') if (data.manifest.report == '').any() else contextlib.nullcontext():
        return method, BreastTextDataset(data, method.tokenizer, BreastTextConfig(**recipe('mammoclip', 'smoke').sample_options))


STEPS = dict(epochs=2, max_steps=2, batch_size=4, lr=1e-3, warmup=0, trackers=(), cpu=True)


def test_from_hostile_folder_to_score(hostile, tmp_path):
    "Two steps of the real system, embeddings of every image, a zero-shot table."
    _, _, data, ids = hostile
    method, pairs = smoke(open_prepared(data.folder))
    breasts = data.manifest[data.manifest.report != ''].groupby(['patient_id', 'laterality']).ngroups
    assert len(pairs) == breasts and pairs.skipped == {'no report': 2}
    lone = next(i for i, r in enumerate(pairs.rows) if len(r['images']) == 1)
    assert len(pairs[lone]['images']) == 2 # the missing view is stood in for
    result = train(method, pairs, TrainConfig(**STEPS), tmp_path/'run')
    losses = [r['loss'] for r in read_jsonl(tmp_path/'run'/'metrics.jsonl') if 'loss' in r]
    assert result.step == 2 and len(losses) == 2 and np.isfinite(losses).all()
    vectors = embed(method, data, tmp_path/'embeddings')
    assert vectors.ids.tolist() == data.manifest.image_id.tolist() and np.isfinite(vectors.arrays['image']).all()
    table = zero_shot(method, data, split=None, embeddings=vectors, n_boot=20).table
    auroc = table[table.metric == 'auroc'].set_index('task').value
    assert {'mass', 'suspicious_calcification'} <= set(auroc.dropna().index) and auroc.dropna().between(0, 1).all()


def test_same_bytes_in_one_process_and_in_many(hostile, tmp_path):
    root, source, data, _ = hostile
    for name, options in (('here', dict(backend='sequential')), ('two', dict(jobs=2))):
        prepare(source, root, tmp_path/name, size=SIZE, salt=data.folder.parent/'salt', **options)
        for file in ('images/pixels.bin', 'manifest.parquet', 'boxes.parquet', 'rejects.csv', 'dataset.json'): assert (tmp_path/name/file).read_bytes() == (data.folder/file).read_bytes(), (name, file)


def test_folders_named_after_patients(tmp_path):
    "One folder a patient, as in many releases: rejects.csv names the files, but nobody."
    rows = []
    for k, name in enumerate(('Meadow_Ivy', '7', 'Q.9')):
        (tmp_path/'s'/name).mkdir(parents=True)
        picture(tmp_path/'s'/name/'a.png', breast())
        (tmp_path/'s'/name/'b.png').write_text('Meadow, Ivy: no image')
        rows += [dict(image_path=f'{name}/{f}.png', image_id=f'{f}{k}', patient_id=name, exam_id=f'{name}x', laterality='L', view='CC', mask_path=m) for f, m in (('a', f'{name}/m.png'), ('b', ''), ('c', ''))]
    data = prepare(pd.DataFrame(rows), tmp_path/'s', tmp_path/'out', size=SIZE, jobs=1, salt=tmp_path/'salt')
    table = rejected(data)
    hashes = dict(zip(data.manifest.image_id.str[1], data.manifest.patient_id))
    assert sorted(zip(table.image_id, table.file)) == sorted((f'{f}{k}', f'{h}/{"m" if f == "a" else f}.png') for k, h in hashes.items() for f in 'abc')
    for path in data.folder.rglob('*'):
        if path.is_file(): assert b'Meadow' not in path.read_bytes(), path.name


# a small clean folder --------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    place = tmp_path_factory.mktemp('clean')
    root = write_phantom(place/'source', 3, SIZE, progress=False)
    return root, prepare(read_folder(root), root, place/'prepared', size=SIZE, backend='sequential', salt=place/'salt')


@pytest.fixture
def copied(clean, tmp_path):
    "A source folder and a prepared one that a test may spoil."
    import shutil
    root, data = clean
    shutil.copytree(root, tmp_path/'source')
    shutil.copytree(data.folder, tmp_path/'prepared')
    shutil.copy(data.folder.parent/'salt', tmp_path/'salt')
    return tmp_path/'source', tmp_path/'prepared', tmp_path/'salt'


def again(source, out, salt, **options): return prepare(read_folder(source), source, out, size=SIZE, salt=salt, **{'backend': 'sequential', **options})


# tables that must stop ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('table,old,new', [('index', 'patient_id', 'patient'), ('index', 'patient_id', 'pateint_id'), ('index', 'image_path', 'image-path'), ('index', 'laterality', 'Laterallity'),
                                           ('index', 'view', 'views'), ('index', 'report_text', 'report_txt'), ('index', 'density', 'densitiy'), ('boxes', 'x0', 'xmin'), ('boxes', 'image_id', 'imageid'),
                                           ('boxes', 'label', 'lable'), ('sentences', 'sentence', 'sentense'), ('sentences', 'exam_id', 'exam-id')])
def test_misspelt_columns_stop(copied, tmp_path, table, old, new):
    source, _, salt = copied
    frame = pd.read_csv(source/f'{table}.csv', dtype=str, keep_default_na=False).rename(columns={old: new})
    frame.to_csv(source/f'{table}.csv', index=False)
    if (old, new) == ('patient_id', 'patient'): return again(source, tmp_path/'out', salt) and None # a known other name
    with pytest.raises(DataError) as e: again(source, tmp_path/'out', salt)
    says = str(e.value)
    assert f'{table}.csv' in says and f"'{old}'" in says and (new in says), says
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('table,column', [('index', 'image_path'), ('index', 'patient_id'), ('index', 'laterality'), ('index', 'view'), ('boxes', 'image_id'), ('boxes', 'y1'), ('sentences', 'box')])
def test_missing_columns_stop(copied, tmp_path, table, column):
    source, _, salt = copied
    pd.read_csv(source/f'{table}.csv', dtype=str, keep_default_na=False).drop(columns=column).to_csv(source/f'{table}.csv', index=False)
    with pytest.raises(DataError, match=f"column '{column}' is missing.*The table has: ") as e: again(source, tmp_path/'out', salt)
    assert f'{table}.csv' in str(e.value) and not (tmp_path/'out').exists()


def test_extra_columns_are_named_and_left_out(copied, tmp_path):
    source, _, salt = copied
    pd.read_csv(source/'index.csv', dtype=str, keep_default_na=False).assign(hair_colour='blond').to_csv(source/'index.csv', index=False)
    report = read_folder(source).report
    assert 'hair_colour' in report.issues[report.issues.kind == 'columns not used']['item'].iloc[0]
    assert 'hair_colour' not in again(source, tmp_path/'out', salt).manifest


@pytest.mark.parametrize('name,data,says', [('no rows', b'image_path,patient_id,laterality,view\n', 'no rows'), ('nothing', b'', 'empty'), ('latin', 'image_path,patient_id,laterality,view\na,M\xfcller,L,CC\n'.encode('latin-1'), 'UTF-8'),
                                            ('ragged', b'image_path,patient_id,laterality,view\na,1,L,CC,extra,cells\n', 'not a table'), ('semicolons', b'image_path;patient_id;laterality;view\na;1;L;CC\n', 'semicolons'),
                                            ('picture', b'\x89PNG\r\n\x1a\n' + bytes(range(256)), 'UTF-8'), ('twice', b'image_path,patient_id,laterality,view,view\na,1,L,CC,CC\n', 'twice')])
def test_tables_that_are_none(tmp_path, name, data, says):
    (tmp_path/'index.csv').write_bytes(data)
    with pytest.raises(DataError, match=says) as e: read_folder(tmp_path)
    assert 'index.csv' in str(e.value)


# what was prepared, damaged later ------------------------------------------------------------------------------------------------------------------
def test_corrupted_row_is_named(copied):
    _, folder, _ = copied
    data = open_prepared(folder)
    with open(folder/'images'/'pixels.bin', 'r+b') as f:
        f.seek(5*SIZE[0]*SIZE[1] + 100)
        f.write(b'\xff\x00\xff')
    with pytest.raises(DataError, match='prepare this data set again') as e: open_prepared(folder).verify()
    assert e.value.row == 5 and 'pixels.bin' in str(e.value)
    assert data.images.verify([*range(5), *range(6, len(data))]) == len(data) - 1 # the others are whole


@pytest.mark.parametrize('file,says', [('images/pixels.bin', 'cut or exchanged'), ('images/checksums.bin', 'bytes'), ('manifest.parquet', 'Parquet'), ('boxes.parquet', 'Parquet'),
                                       ('dataset.json', 'dataset.json'), ('images/store.json', 'store.json')])
def test_torn_parts_are_named(copied, file, says):
    _, folder, _ = copied
    cut(folder/file, .7)
    with pytest.raises(ValueError, match=says) as e: open_prepared(folder).verify()
    assert file.split('/')[-1] in str(e.value)


def test_changed_sources_are_noticed(copied):
    "A finished folder refuses files with other bytes; a new time stamp alone is no change."
    source, folder, salt = copied
    images = sorted((source/'images').glob('*.png'))
    digest = open_prepared(folder).digest
    os.utime(images[0], (1, 1))
    assert again(source, folder, salt).digest == digest
    picture(images[3], breast())
    with pytest.raises(DataError, match=f'1 source files changed.*{images[3].name}.*overwrite=True'): again(source, folder, salt)
    assert open_prepared(folder).digest == digest # it is still there
    assert again(source, folder, salt, overwrite=True).digest != digest


def test_source_changed_between_two_calls(copied, tmp_path):
    "Interrupted, a file replaced, taken up again: the end is as if it had been so from the beginning."
    source, _, salt = copied
    paths = [source/p for p in pd.read_csv(source/'index.csv').image_path]
    out, limit = tmp_path/'out', 7*SIZE[0]*SIZE[1] + 50
    assert 'the disk is full' in in_small_space(limit, again, source, out, salt)
    assert len(read_jsonl(out/'journal.jsonl')) == 7
    picture(paths[2], breast())
    paths[4].write_text('no longer an image')
    data = again(source, out, salt)
    whole = again(source, tmp_path/'whole', salt)
    assert data.digest == whole.digest and (out/'rejects.csv').read_bytes() == (tmp_path/'whole'/'rejects.csv').read_bytes()
    assert [e['number'] for e in read_jsonl(out/'journal.jsonl')] == [*range(7), *range(2, 12)] # only from the changed one on


@pytest.mark.parametrize('options', [dict(jobs=1, backend='loky'), dict(jobs=2, backend='threading')])
def test_limits_hold_with_one_worker_and_with_threads(tmp_path, options):
    "Time and memory are enforced by force, wherever a file is decoded."
    (tmp_path/'s').mkdir()
    picture(tmp_path/'s'/'small.png', breast())
    picture(tmp_path/'s'/'large.png', np.tile(breast(), (60, 90)))
    records = pd.DataFrame(dict(image_path=['small.png', 'large.png'], image_id=['small', 'large'], patient_id=['1', '2'], laterality='L', view='CC'))
    data = prepare(records, tmp_path/'s', tmp_path/'memory', size=SIZE, salt=tmp_path/'salt', limits=Limits(memory_bytes=24 << 20), **options)
    assert data.manifest.image_id.tolist() == ['small'] and 'memory' in rejected(data).reason[0] and rejected(data).image_id[0] == 'large'
    with pytest.raises(DataError, match='longer than 0.0001 s'):
        prepare(records[1:], tmp_path/'s', tmp_path/'time', size=SIZE, salt=tmp_path/'salt', limits=Limits(seconds=1e-4), **options) # large: not done at once


# a full disk -------------------------------------------------------------------------------------------------------------------------------------
def in_small_space(limit, do, *args):
    "Call in a process whose files may not grow beyond a limit; the message of its error."
    def body(queue):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        cv2.setNumThreads(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: queue.put(f'no error: {do(*args)}')
        except Exception as e: queue.put(f'{type(e).__name__}: {e}')
    queue = fork.Queue()
    child = fork.Process(target=body, args=(queue,))
    child.start()
    says = queue.get(timeout=120)
    child.join()
    return says


def partial(folder):
    "Files that are only half there, under any name that looks final."
    return [p for p in folder.rglob('*') if p.is_file() and (p.suffix in ('.tmp', '.part') or p.name.startswith('.') and p.name != '.lock')]


def test_disk_full_while_training(clean, tmp_path):
    "The second checkpoint does not fit: said so, the first is whole, and the same call ends as an undisturbed one does."
    _, data = clean
    settings = TrainConfig(**{**STEPS, 'save_every': 1, 'keep_last': 3})
    method, pairs = smoke(data)
    train(method, pairs, settings, tmp_path/'whole')

    def limited():
        import medvl.train.loop as loop
        real = loop.save_checkpoint
        def save(root, step, tensors, state):
            if step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            return real(root, step, tensors, state)
        loop.save_checkpoint = save
        torch.set_num_threads(1)
        return train(smoke(data)[0], pairs, settings, tmp_path/'run')
    says = in_small_space(resource.RLIM_INFINITY, limited)
    assert 'the disk is full' in says and 'step 2' in says and 'intact' in says, says
    assert [p.name for p in checkpoints(tmp_path/'run'/'checkpoints')] == ['step-00000001'] and not partial(tmp_path/'run')
    method = smoke(data)[0]
    assert train(method, pairs, settings, tmp_path/'run').step == 2
    weights = [(f/'last'/'model.safetensors').read_bytes() for f in (tmp_path/'run', tmp_path/'whole')]
    assert weights[0] == weights[1]


def test_disk_full_in_the_middle_of_the_metrics(clean, tmp_path):
    "Not a checkpoint but a line of metrics finds no room: the run is taken up again and every step has its line."
    _, data = clean
    settings = TrainConfig(**{**STEPS, 'save_every': 1})
    method, pairs = smoke(data)

    def limited():
        import medvl.train.result as result
        real, lines = result.Journal.write, []
        def write(self, row):
            lines.append(row)
            size = os.stat(self.path).st_size
            if len(lines) > 1: resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
            return real(self, row)
        result.Journal.write = write
        torch.set_num_threads(1)
        return train(smoke(data)[0], pairs, settings, tmp_path)
    says = in_small_space(resource.RLIM_INFINITY, limited)
    assert 'the disk is full' in says and 'checkpoints are intact' in says and 'metrics.jsonl' in says, says
    assert (tmp_path/'metrics.jsonl').read_bytes().count(b'\n') == 1 # and a torn line
    assert train(method, pairs, settings, tmp_path).step == 2
    assert [r['step'] for r in read_jsonl(tmp_path/'metrics.jsonl') if r['kind'] == 'train'] == [1, 2]


def test_disk_full_in_a_run_folder(tmp_path):
    "What the run had written stays readable, nothing is torn, and the next attempt goes on."
    run = Run.create('try', {'x': 1}, tmp_path)
    run.begin('test'); run.metric('first', 1.5); run.end('killed', 'for this test')
    room = (run.folder/'journal.jsonl').stat().st_size + 300

    def crowded():
        mine = Run(run.folder)
        mine.begin('test')
        mine.table('large', pd.DataFrame({'x': range(9999)}))
    says = in_small_space(room, crowded)
    assert 'the disk is full' in says and 'nothing was changed' in says and 'large.csv' in says, says
    assert run_state(run.folder) == 'killed' and Run(run.folder).metrics['first']['value'] == 1.5
    assert not (run.folder/'tables'/'large.csv').exists() and not partial(run.folder)
    new = Run(run.folder)
    new.begin('test'); new.table('large', pd.DataFrame({'x': range(9999)})); new.write('finished'); new.end('done')
    assert run_state(run.folder) == 'done' and new.attempt == 3


def test_disk_full_while_embedding(clean, tmp_path):
    _, data = clean
    method = smoke(data)[0]
    says = in_small_space(3000, embed, method, data, tmp_path/'e')
    assert 'disk is full' in says and '.npy' in says, says
    assert not list(tmp_path.rglob('embeddings.json'))
    assert len(embed(method, data, tmp_path/'e')) == len(data)


# checkpoints --------------------------------------------------------------------------------------------------------------------------------------
class Evil:
    "What a malicious pickle does: run a command when it is read."
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.system, (f'touch {self.target}',)


@pytest.fixture(scope='module')
def saved(clean, tmp_path_factory):
    method = smoke(clean[1])[0]
    return api.Model(method, size=SIZE).save_pretrained(tmp_path_factory.mktemp('model')/'m')


@pytest.fixture
def model(saved, tmp_path):
    import shutil
    return shutil.copytree(saved, tmp_path/'m')


@pytest.mark.parametrize('share', [0, .01, .5, .999])
def test_truncated_model_is_refused(model, share):
    cut(model/'model.safetensors', share)
    with pytest.raises(DataError, match='model.safetensors'): api.load(model)


def test_malicious_model_is_refused(model, tmp_path):
    target = tmp_path/'executed'
    for payload in (pickle.dumps(Evil(target)), pickle.dumps({'model': Evil(target)})):
        (model/'model.safetensors').write_bytes(payload)
        with pytest.raises(DataError, match='model.safetensors'): api.load(model)
        (tmp_path/'b2.tar').write_bytes(payload)
        with pytest.raises(DataError, match='b2.tar'): read_checkpoint(tmp_path/'b2.tar')
    torch.save({'model': {'a': torch.zeros(2)}, 'config': Evil(target)}, tmp_path/'b2.tar')
    with pytest.raises(DataError, match='b2.tar'): read_checkpoint(tmp_path/'b2.tar')
    assert not target.exists()
    os.system(Evil(target).__reduce__()[1][0])
    assert target.exists() # the command would have worked


@pytest.mark.parametrize('file,content,says', [('config.json', b'{"method": "mamm', 'config.json'), ('config.json', b'{"method": "os.system", "config": {}}', 'os.system'),
                                               ('preprocess.json', b'{"profile": ', 'preprocess.json'), ('model.safetensors', None, 'model.safetensors'), ('config.json', None, 'config.json')])
def test_incomplete_model_is_refused(model, file, content, says):
    if content is None: (model/file).unlink()
    else: (model/file).write_bytes(content)
    with pytest.raises((DataError, ValueError), match=says): api.load(model)


def test_torn_and_malicious_checkpoint_of_a_run(clean, tmp_path):
    "The newest checkpoint is torn, then replaced by a pickle: training takes the one before and ends as if nothing had been."
    _, data = clean
    settings = TrainConfig(**{**STEPS, 'save_every': 1, 'keep_last': 3})
    method, pairs = smoke(data)
    train(method, pairs, settings, tmp_path/'run')
    whole = (tmp_path/'run'/'last'/'model.safetensors').read_bytes()
    for spoil in (lambda p: cut(p, .5), lambda p: p.write_bytes(pickle.dumps(Evil(tmp_path/'executed')))):
        newest = checkpoints(tmp_path/'run'/'checkpoints')[0]
        spoil(newest/'model.safetensors')
        (tmp_path/'run'/'last'/'model.safetensors').unlink()
        assert train(smoke(data)[0], pairs, settings, tmp_path/'run').step == 2
        assert (tmp_path/'run'/'last'/'model.safetensors').read_bytes() == whole
    assert not (tmp_path/'executed').exists()
