"""Preparation: bad files, dead workers, kills, full disks; and the same bytes whoever does the work."""
import ctypes
import dataclasses
import os
import resource
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import cv2
import numpy as np
import pandas as pd
import pytest
from golden import sample

import medvl.data.prepare.job as worker
from medvl.core.errors import DataError
from medvl.core.paths import read_jsonl
from medvl.data.dicom.write import write_dicom
from medvl.data.releases.folder import read_folder
from medvl.data.dicom.header import Limits
from medvl.data.pixels.file import read_image
from medvl.data.pixels.profiles import Profile, get_profile, preprocess
from medvl.data.prepare.run import fingerprint, prepare, project_salt
from medvl.data.prepared import open_prepared
from medvl.data.prepare.job import Job, run_jobs, work

SIZE = (76, 48)


def picture(i, shape=(150, 100), dtype=np.uint8):
    yy, xx = np.mgrid[:shape[0], :shape[1]]
    inside = (xx/(60 + i % 30))**2 + ((yy - shape[0]/2)/(50 + i % 20))**2 < 1
    top = np.iinfo(dtype).max
    return (inside*(0.4 + 0.25*np.sin(xx/(5 + i % 7) + i)*np.cos(yy/9))*top).astype(dtype)


def make_source(root, n=12, extra=()):
    "n images of n/4 patients, with boxes, masks, reports; then `extra` lines of the index."
    root.mkdir(parents=True, exist_ok=True)
    lines = ['image_path,patient_id,exam_id,laterality,view,report_text,age,density,birads,mask_path,split,label_mass,image_id']
    rows = ['image_id,label,x0,y0,x1,y1']
    for i in range(n):
        cv2.imwrite(str(root/f'i{i}.png'), picture(i))
        mask = ''
        if i % 3 == 0:
            mask = f'm{i}.png'
            cv2.imwrite(str(root/mask), np.uint8(picture(i) > 120)*255)
        lines.append(f'i{i}.png,P{i//4},E{i//4},{"LR"[i//2 % 2]},{["CC", "MLO"][i % 2]},text {i//4},{40 + i},B,2,{mask},train,{[1, 0, ""][i % 3]},i{i}')
        rows.append(f'i{i},mass,{10 + i % 5},{60},{30 + i % 5},{90}')
    (root/'index.csv').write_text('\n'.join([*lines, *(f'{row},{Path(row.split(",")[0]).stem}' for row in extra)]))
    (root/'boxes.csv').write_text('\n'.join(rows))
    return root


@pytest.fixture
def salt(tmp_path): return tmp_path/'salt'


def run(source, out, salt, **options):
    options = dict(size=SIZE, backend='sequential') | options
    return prepare(read_folder(source), source, out, salt=salt, **options)


def files(folder):
    "Bytes of everything that must be the same."
    names = ['images/pixels.bin', 'images/checksums.bin', 'images/store.json', 'masks/pixels.bin', 'manifest.parquet', 'boxes.parquet', 'sentences.parquet', 'rejects.csv', 'dataset.json']
    return {n: (folder/n).read_bytes() for n in names if (folder/n).exists()}


def test_what_comes_out(tmp_path, salt):
    data = run(make_source(tmp_path/'src'), tmp_path/'out', salt)
    m = data.manifest
    assert len(data) == 12 and data.images.shape == (12, *SIZE) and data.images.dtype == np.uint8 and data.labels == ['mass']
    for i in range(12):
        want = preprocess(read_image(tmp_path/'src'/f'i{i}.png'), 'mammo_clip_v1', SIZE, [[10 + i % 5, 60, 30 + i % 5, 90]])
        np.testing.assert_array_equal(data.image(i), want.pixels)
        np.testing.assert_allclose(data.boxes[data.boxes.image_id == m.image_id[i]][['x0', 'y0', 'x1', 'y1']].to_numpy(), want.boxes, rtol=1e-6)
        assert (m.crop_y0[i], m.crop_x0[i], m.crop_y1[i], m.crop_x1[i]) == tuple(want.window)
    np.testing.assert_array_equal(m.label_mass, [1, 0, np.nan]*4)
    assert (m.mask_row >= 0).tolist() == [i % 3 == 0 for i in range(12)] and set(np.unique(data.mask(0))) == {0, 1}
    assert m.patient_id.nunique() == 3 and m.exam_id.nunique() == 3 and m.report[5] == 'text 1' and m.age[3] == 43 and (m.split == 'train').all()
    assert data.verify() == 12 and not any(p.name.endswith('.part') for p in (tmp_path/'out').rglob('*'))


def test_no_identifier_is_left(tmp_path, salt):
    make_source(tmp_path/'src')
    text = (tmp_path/'src'/'index.csv').read_text().replace('P0', 'SecretName').replace('E0', 'SecretExam')
    (tmp_path/'src'/'index.csv').write_text(text)
    run(tmp_path/'src', tmp_path/'out', salt)
    for path in (tmp_path/'out').rglob('*'):
        if path.is_file(): assert b'Secret' not in path.read_bytes(), path.name
    secret = salt.read_text().strip().encode()
    assert not any(secret in p.read_bytes() for p in (tmp_path/'out').rglob('*') if p.is_file())


def test_salt(tmp_path, monkeypatch):
    path = tmp_path/'deep'/'salt'
    first = project_salt(path)
    assert project_salt(path) == first and len(first) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert fingerprint(first) != fingerprint(project_salt(tmp_path/'other')) and first[:12] != fingerprint(first)
    monkeypatch.setenv('MEDVL_SALT', str(path))
    assert project_salt() == first
    path.write_text('abc')
    with pytest.raises(DataError, match='3 characters'): project_salt(path)


@pytest.mark.parametrize('backend,jobs', [('loky', 2), ('threading', 2), ('dask', 2)])
def test_whoever_does_the_work(tmp_path, salt, backend, jobs):
    extra = ['bad.png,P9,E9,L,CC,,50,B,2,,train,1', 'none.png,P9,E9,L,CC,,50,B,2,,train,1']
    source = make_source(tmp_path/'src', extra=extra)
    (source/'bad.png').write_bytes(b'\x89PNG\r\n\x1a\nnothing')
    plain = run(source, tmp_path/'plain', salt)
    if backend == 'dask':
        distributed = pytest.importorskip('distributed')
        with pytest.raises(ValueError, match='open client'): run(source, tmp_path/'no', salt, backend='dask')
        with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster):
            data = run(source, tmp_path/'out', salt, backend='dask', jobs=jobs)
    else: data = run(source, tmp_path/'out', salt, backend=backend, jobs=jobs)
    assert files(tmp_path/'out') == files(tmp_path/'plain') and data.digest == plain.digest and len(data) == 12


HOSTILE = {
    'truncated': (lambda p: cv2.imwrite(str(p), picture(0)) and p.write_bytes(p.read_bytes()[:300]), 'truncated'),
    'text': (lambda p: p.write_text('Dear colleague, please find enclosed'), 'not an image'),
    'encrypted': (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), 'not an image'),
    'empty': (lambda p: p.write_bytes(b''), 'empty'),
    'constant': (lambda p: cv2.imwrite(str(p), np.full((80, 80), 7, np.uint8)), 'constant'),
    'huge': (lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n' + b'\0\0\0\rIHDR' + (60000).to_bytes(4, 'big')*2 + b'\x08\0\0\0\0' + bytes(100)), 'limit'),
    'tiny': (lambda p: cv2.imwrite(str(p), np.eye(9, dtype=np.uint8)*255), 'small'),
    'colour': (lambda p: cv2.imwrite(str(p), np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)), 'colour'),
}


def test_bad_files_are_set_aside(tmp_path, salt):
    extra = [f'{name}.png,Q,Q,L,CC,,50,B,2,,,1' for name in HOSTILE]
    source = make_source(tmp_path/'src', n=4, extra=extra + ['absent.png,Q,Q,L,CC,,50,B,2,,,1'])
    for name, (write, _) in HOSTILE.items(): write(source/f'{name}.png')
    data = run(source, tmp_path/'out', salt)
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv').set_index('image_id')
    assert len(data) == 4 and data.info['counts']['records'] == 13 and sorted(rejects.index) == sorted([*HOSTILE, 'absent'])
    for name, (_, word) in HOSTILE.items(): assert word in rejects.reason[name].lower(), (name, rejects.reason[name])
    assert rejects.stage['absent'] == 'file' and not rejects.reason.str.contains(str(tmp_path)).any()


def test_rows_that_break_rules(tmp_path, salt):
    extra = ['i0.png,P7,E7,Q,CC,,50,B,2,,,1', 'i1.png,P7,E7,L,,,50,B,2,,,1', 'i2.png,,E7,L,CC,,50,B,2,,,1']
    source = make_source(tmp_path/'src', n=4)
    records = read_folder(source).records
    more = pd.DataFrame([dict(zip(records.columns, [f'i{i}.png', p, 'E7', s, v])) for i, p, s, v in ((0, 'P7', 'Q', 'CC'), (1, 'P7', 'L', ''), (2, '', 'L', 'CC'))])
    more['image_id'] = ['x', 'y', 'z']
    both = pd.concat([records, more, records.iloc[[3]]], ignore_index=True)
    data = prepare(both, source, tmp_path/'out', size=SIZE, salt=salt, backend='sequential')
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv')
    assert data.manifest.image_id.tolist() == ['i0', 'i1', 'i2']
    assert rejects.image_id.tolist() == ['i3', 'x', 'y', 'z', 'i3'] and set(rejects.stage) == {'table'}
    assert rejects.reason.str.contains('laterality')[1] and rejects.reason.str.contains('view')[2] and rejects.reason.str.contains('twice')[[0, 4]].all()
    with pytest.raises(DataError, match="'view' is missing"): prepare(records.drop(columns='view'), source, tmp_path/'o2', salt=salt)
    with pytest.raises(DataError, match='no record can be prepared'): prepare(more, source, tmp_path/'o3', salt=salt)
    assert extra


def test_one_table_tells_all(tmp_path, salt):
    "What the reader set aside is in rejects.csv as well, each thing once, and without the patient's name."
    extra = ['SecretName/i1.png,SecretName,E,L,CC,,50,B,2,,,1', 'i2.png,P8,E,Q,CC,,999,B,2,,,1', 'i3.png,P8,E,L,CC,,50,B,2,,dev,1', 'absent.png,P8,E,L,CC,,50,B,2,,,1']
    source = make_source(tmp_path/'src', n=2, extra=extra)
    (source/'boxes.csv').write_text('image_id,label,x0,y0,x1,y1\ni0,mass,10,60,30,90\ni0,mass,10,10,5,20\nstray,mass,1,2,3,4\n')
    (source/'sentences.csv').write_text('exam_id,laterality,sentence,label,image_id,box\nE0,X,SecretName has a mass.,mass,i0,0\n')
    data = run(source, tmp_path/'out', salt)
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv', keep_default_na=False)
    row = rejects.reason.str.extract(r'row (\d+)')[0].fillna(-1).astype(int)
    assert sorted(zip(rejects.stage, rejects.image_id, row)) == [('box', 'i0', 1), ('box', 'stray', 2), ('file', 'absent', -1), ('sentence', 'i0', 0),
                                                                ('table', 'i1', 1), ('table', 'i1', 2), ('table', 'i2', 3), ('table', 'i3', 4)]
    reason = rejects.reason[rejects.image_id == 'i2'].item()
    assert "laterality 'Q'" in reason and 'age 999' in reason and "split 'dev'" in rejects.reason[rejects.image_id == 'i3'].item()
    assert 'there twice' in rejects.reason[rejects.image_id == 'i1'].iloc[0] and data.manifest.image_id.tolist() == ['i0'] and len(data.boxes) == 1
    assert data.info['counts']['rejects'] == dict(box=2, file=1, sentence=1, table=4)
    assert not any(b'Secret' in p.read_bytes() for p in (tmp_path/'out').rglob('*') if p.is_file())
    assert run(source, tmp_path/'out', salt).digest == data.digest


def test_boxes_and_sentences(tmp_path, salt):
    "Lost boxes are reported; numbers in sentences follow those that are left."
    source = make_source(tmp_path/'src', n=4)
    (source/'boxes.csv').write_text('image_id,label,x0,y0,x1,y1\ni0,mass,5,5,5,9\ni0,mass,300,300,400,400\ni0,calc,20,60,40,90\ni1,mass,30,70,200,90\nzz,mass,1,1,2,2\n')
    (source/'sentences.csv').write_text('exam_id,laterality,sentence,label,image_id,box\nE0,L,a mass.,mass,i0,0\nE0,L,calcifications.,calc,i0,2\nE0,L,gone.,mass,i0,1\nE0,L,no place.,,,-1\n')
    data = run(source, tmp_path/'out', salt)
    assert data.boxes[['image_id', 'label']].to_numpy().tolist() == [['i0', 'calc'], ['i1', 'mass']]
    assert data.boxes.x1.max() <= SIZE[1]
    assert data.sentences.box.tolist() == [-1, 0, -1, -1] and data.sentences.image_id.tolist() == ['i0', 'i0', 'i0', '']
    assert set(data.sentences.exam_id) == set(data.manifest.exam_id)
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv')
    assert rejects.stage.tolist() == ['box']*3 and 'no area' in rejects.reason[0] and 'unknown image (row 4)' in rejects.reason[1] and 'outside' in rejects.reason[2]
    assert {'box set aside', 'box of an unknown image'} <= set(read_folder(source).report.issues.kind)


def test_dicom_facts(tmp_path, salt):
    "Spacing follows the resize, age comes from the header, a contradicting side is set aside."
    source = tmp_path/'src'
    source.mkdir()
    pixels = picture(3, (200, 120), np.uint16) >> 4
    for name, side in (('a', 'L'), ('b', 'R')):
        write_dicom(source/f'{name}.dcm', pixels, ImageLaterality=side, ViewPosition='CC', ImagerPixelSpacing=[0.1, 0.1], PatientAge='061Y')
    records = pd.DataFrame({'image_path': ['a.dcm', 'b.dcm'], 'image_id': ['a', 'b'], 'patient_id': ['1', '2'], 'laterality': 'L', 'view': 'CC'})
    data = prepare(records, source, tmp_path/'out', size=SIZE, salt=salt, backend='sequential')
    m = data.manifest.iloc[0]
    assert len(data) == 1 and m.age == 61
    np.testing.assert_allclose([m.spacing_y, m.spacing_x], [0.1*(m.crop_y1 - m.crop_y0)/SIZE[0], 0.1*(m.crop_x1 - m.crop_x0)/SIZE[1]])
    reject = pd.read_csv(tmp_path/'out'/'rejects.csv').iloc[0]
    assert reject.image_id == 'b' and 'laterality L, the file says R' in reject.reason
    assert len(prepare(records, source, tmp_path/'o2', size=SIZE, salt=salt, backend='sequential', check_side=False)) == 2


def test_profiles_and_types(tmp_path, salt):
    source = make_source(tmp_path/'src', n=4)
    data = run(source, tmp_path/'out', salt, profile='dicom_voi_v1', dtype='uint16')
    assert data.images.dtype == np.uint16 and data.info['dtype'] == 'uint16' and data.image(0).max() > 255
    with pytest.raises(ValueError, match='mammo_clip_v1'): run(source, tmp_path/'o2', salt, profile='mamo_clip_v1')
    with pytest.raises(DataError, match='another preparation'): run(source, tmp_path/'out', salt)
    assert run(source, tmp_path/'out', salt, overwrite=True).images.dtype == np.uint8
    (tmp_path/'o3').mkdir()
    (tmp_path/'o3'/'thesis.txt').write_text('x')
    with pytest.raises(DataError, match='something else'): run(source, tmp_path/'o3', salt)
    assert (tmp_path/'o3'/'thesis.txt').exists()


def child(source, out, salt, pause=0.0, limit=None):
    "Prepare in a forked process, slowly, perhaps with a limit on the size of files; returns its id."
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        cv2.setNumThreads(0)
        plain = worker.work
        worker.work = lambda job: time.sleep(pause) or plain(job)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: run(source, out, salt)
        except DataError as e: os.write(os.open(out.parent/'error', os.O_WRONLY | os.O_CREAT), str(e).encode())
        else: status = 0
    finally: os._exit(status)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait_for_lines(path, n, pid):
    end = time.time() + 60
    while not (path.exists() and path.read_bytes().count(b'\n') >= n):
        assert time.time() < end and os.waitpid(pid, os.WNOHANG) == (0, 0), 'it ended before its time, or was too slow'
        time.sleep(0.005)


def test_killed_and_resumed(tmp_path, salt):
    "SIGKILL, twice; finished rows are not redone, and the end is the same to the byte."
    source, out = make_source(tmp_path/'src', n=24), tmp_path/'out'
    whole = run(source, tmp_path/'whole', salt)
    kept = b''
    for lines in (5, 14):
        pid = child(source, out, salt, pause=0.05)
        wait_for_lines(out/'journal.jsonl', lines, pid)
        kill(pid)
        assert not (out/'dataset.json').exists()
        with pytest.raises(DataError, match='unfinished'): open_prepared(out)
        assert (out/'journal.jsonl').read_bytes().startswith(kept)
        kept = (out/'journal.jsonl').read_bytes().rsplit(b'\n', 1)[0]
    done = []
    plain = worker.work
    worker.work = lambda job: done.append(job.number) or plain(job)
    try: data = run(source, out, salt)
    finally: worker.work = plain
    assert (out/'journal.jsonl').read_bytes().startswith(kept)
    assert done == list(range(24 - len(done), 24)) and len(done) <= 10
    assert files(out) == files(tmp_path/'whole') and data.digest == whole.digest


@pytest.mark.parametrize('damage', ['pixels', 'journal', 'both'])
def test_torn_work_is_redone(tmp_path, salt, damage):
    "What a power cut leaves: a lost row, a torn line; only what follows is redone."
    source, out = make_source(tmp_path/'src', n=12), tmp_path/'out'
    run(source, tmp_path/'whole', salt)
    pid = child(source, out, salt, pause=0.05)
    wait_for_lines(out/'journal.jsonl', 8, pid)
    kill(pid)
    if damage in ('pixels', 'both'):
        with open(out/'images'/'pixels.part', 'r+b') as f:
            f.seek(4*SIZE[0]*SIZE[1] + 9)
            f.write(b'\xab'*50)
    if damage in ('journal', 'both'):
        text = (out/'journal.jsonl').read_bytes()
        (out/'journal.jsonl').write_bytes(text[:-20])
    run(source, out, salt)
    assert files(out) == files(tmp_path/'whole')
    numbers = [e['number'] for e in read_jsonl(out/'journal.jsonl')]
    assert numbers[-1] == 11 and set(numbers) == set(range(12)) and (4 in numbers[numbers.index(5):] or damage == 'journal')


def test_disk_full(tmp_path, salt):
    "The kernel lets no file grow beyond six rows: a clear error, nothing lost, and the same end."
    source, out = make_source(tmp_path/'src', n=12), tmp_path/'out'
    limit = SIZE[0]*SIZE[1]*6 + 50
    _, status = os.waitpid(child(source, out, salt, limit=limit), 0)
    err = (tmp_path/'error').read_text()
    assert status and 'the disk is full' in err and 'start again with the same arguments' in err
    assert len(read_jsonl(out/'journal.jsonl')) == 6 and not (out/'dataset.json').exists()
    run(source, out, salt)
    run(source, tmp_path/'whole', salt)
    assert files(out) == files(tmp_path/'whole')


def test_one_at_a_time(tmp_path, salt):
    source, out = make_source(tmp_path/'src', n=12), tmp_path/'out'
    pid = child(source, out, salt, pause=0.2)
    wait_for_lines(out/'journal.jsonl', 1, pid)
    with pytest.raises(DataError, match='another process'): run(source, out, salt)
    kill(pid)
    assert len(run(source, out, salt)) == 12


class Deadly(Profile):
    "A profile that misbehaves inside the worker, as a decoder might."
    def __getattribute__(self, name):
        if name == 'border': misbehave(object.__getattribute__(self, 'name'))
        return super().__getattribute__(name)


def misbehave(how):
    if how == 'crash': os.kill(os.getpid(), signal.SIGSEGV)
    if how == 'hang': ctypes.PyDLL(None).sleep(60) # holds the interpreter's lock, as C code can
    if how == 'bomb': np.ones(1 << 36, np.uint8)


def test_deadly_files(tmp_path):
    "Crash, hang and memory bomb: each gives one answer, the others are not harmed, order is kept."
    cv2.imwrite(str(tmp_path/'a.png'), picture(0))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    limits = Limits(seconds=3, memory_bytes=1 << 30)
    good = get_profile('mammo_clip_v1')
    bad = lambda how: Deadly(**(dataclasses.asdict(good) | {'name': how}))
    profiles = [good, bad('crash'), good, bad('bomb'), bad('hang'), good]
    jobs = [Job(n, str(tmp_path/'a.png'), p, SIZE, limits=limits) for n, p in enumerate(profiles)]
    start = time.time()
    answers = list(run_jobs(jobs, 2, 'loky'))
    assert [a.number for a in answers] == list(range(6)) and [bool(a.stage) for a in answers] == [False, True, False, True, True, False]
    assert 'crashed' in answers[1].reason and 'memory' in answers[3].reason and 'longer than 3 s' in answers[4].reason
    np.testing.assert_array_equal(answers[5].pixels, work(jobs[0]).pixels)
    assert time.time() - start < 45


def test_same_file_under_two_names(tmp_path, salt):
    source = make_source(tmp_path/'src', n=4, extra=['copy.png,P9,E9,R,CC,,50,B,2,,test,1'])
    (source/'copy.png').write_bytes((source/'i1.png').read_bytes())
    data = run(source, tmp_path/'out', salt)
    assert data.info['same_file'] == [['i1', 'copy']]
    from medvl.data.leaks import assert_no_leak
    with pytest.raises(DataError, match='i1 .*copy|copy .*i1'): assert_no_leak(data)


def test_real_mammograms(tmp_path, salt):
    root = sample('mammo/index.csv').parent
    source = read_folder(root)
    some = source.records.groupby('source').head(3)
    data = prepare(source._replace(records=some), root, tmp_path/'out', size=(152, 96), salt=salt, jobs=2)
    assert len(data) == len(some) and data.verify() == len(some)
    assert data.manifest.source.value_counts().to_dict() == some.source.value_counts().to_dict()
    assert (data.boxes.x1 > data.boxes.x0).all() and data.boxes.x1.max() <= 96 and data.boxes.y1.max() <= 152
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv')
    assert set(rejects[rejects.stage == 'mask'].image_id) == {'nyu_0_R-CC', 'nyu_0_R-MLO'} # masks of another frame
    assert Path(tmp_path/'out'/'masks').exists()
