"""The store in shards: equal rows and digests however it is cut, killed and taken up, copied and torn; and what a preparation of many images needs besides."""
import errno
import inspect
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from test_prepare import SIZE, child, files, kill, make_source, run, wait_for_lines

import medvl.data.prepare.job as worker
import medvl.data.prepare.run as preparation
from medvl.core.errors import DataError
from medvl.core.run import process_identity
from medvl.data.prepare.estimate import estimate
from medvl.data.prepare.run import locked, whole_patients
from medvl.data.prepared import open_prepared
from medvl.data.releases.folder import read_folder
from medvl.data.store import ImageStore, StoreWriter, unfinish_store

ROW = SIZE[0]*SIZE[1]
PLAIN = ['images/checksums.bin', 'manifest.parquet', 'boxes.parquet', 'sentences.parquet', 'rejects.csv', 'dataset.json']


@pytest.fixture
def salt(tmp_path): return tmp_path/'salt'


def image(i, shape=(6, 5)): return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def fill(folder, n, rows=0):
    with StoreWriter(folder, n, 6, 5, **(dict(shard_bytes=30*rows) if rows else {})) as writer:
        for i in range(n): writer.write(i, image(i))
    return ImageStore.open(folder)


def pixels(folder): return b''.join(p.read_bytes() for p in sorted((folder/'images').glob('pixels*.bin')))


@pytest.mark.parametrize('rows', [1, 3, 10, 11])
def test_cut_or_whole(tmp_path, rows):
    "However it is cut: the same rows, checksums and digest; no file is larger than asked."
    whole, cut = fill(tmp_path/'w', 10), fill(tmp_path/'c', 10, rows)
    assert cut.digest == whole.digest and (cut.checksums() == whole.checksums()).all() and cut.verify() == 10
    order = [9, 0, 3, -1, 3]
    np.testing.assert_array_equal(cut.read(order), whole.read(order))
    for i in (0, 5, -1): np.testing.assert_array_equal(cut[i], whole[i])
    paths = sorted((tmp_path/'c').glob('pixels*'))
    assert [p.name for p in paths] == ([f'pixels-{k:05}.bin' for k in range(-(-10//rows))] if rows < 10 else ['pixels.bin'])
    assert max(p.stat().st_size for p in paths) <= 30*rows and b''.join(p.read_bytes() for p in paths) == (tmp_path/'w'/'pixels.bin').read_bytes()
    if rows < 10:
        with pytest.raises(DataError, match='no one array'): len(cut.pixels)


def test_any_order(tmp_path):
    writer = StoreWriter(tmp_path/'s', 11, 6, 5, shard_bytes=60)
    for i in (10, 0, 7, 3): writer.write(i, image(i))
    writer.abandon()
    with StoreWriter(tmp_path/'s', 11, 6, 5) as writer:
        assert np.flatnonzero(writer.written).tolist() == [0, 3, 7, 10] and writer.shards == 6 and len(writer._open) <= 4
        for i in range(11): writer.write(i, image(i))
    store = ImageStore.open(tmp_path/'s')
    assert store.verify() == 11 and store.digest == fill(tmp_path/'w', 11).digest


def test_only_the_open_shard_is_read_again(tmp_path, monkeypatch):
    "Sealed shards are taken by their length; the rows of the open one are hashed, a torn one is written anew."
    writer = StoreWriter(tmp_path/'s', 10, 6, 5, shard_bytes=90)
    for i in range(8): writer.write(i, image(i))
    writer.abandon()
    assert sorted(p.name for p in (tmp_path/'s').glob('pixels*')) == ['pixels-00000.bin', 'pixels-00001.bin', 'pixels-00002.part']
    with open(tmp_path/'s'/'pixels-00002.part', 'r+b') as f: f.seek(30); f.write(b'\xff\x00\xff')
    read, pread = [], os.pread
    monkeypatch.setattr(os, 'pread', lambda fd, n, at: read.append(n) or pread(fd, n, at))
    writer = StoreWriter(tmp_path/'s', 10, 6, 5)
    assert writer.written.tolist() == [True]*7 + [False]*3 and read == [320, 30, 30]
    for i in (7, 8, 9): writer.write(i, image(i))
    writer.close()
    assert ImageStore.open(tmp_path/'s').verify() == 10


def test_a_shard_that_was_cut_is_written_again(tmp_path):
    writer = StoreWriter(tmp_path/'s', 9, 6, 5, shard_bytes=90)
    for i in range(7): writer.write(i, image(i))
    writer.abandon()
    os.truncate(tmp_path/'s'/'pixels-00000.bin', 45)
    (tmp_path/'s'/'pixels-00001.bin').unlink()
    with StoreWriter(tmp_path/'s', 9, 6, 5) as writer:
        assert np.flatnonzero(writer.written).tolist() == [0, 6]
        for i in range(9): writer.write(i, image(i))
    assert ImageStore.open(tmp_path/'s').digest == fill(tmp_path/'w', 9).digest


@pytest.mark.parametrize('damage,says', [('missing', 'rows 3 to 5'), ('torn', 'cut or exchanged'), ('flipped', 'changed after')])
def test_a_bad_shard_is_named(tmp_path, damage, says):
    fill(tmp_path/'s', 8, 3)
    path = tmp_path/'s'/'pixels-00001.bin'
    if damage == 'missing': path.unlink()
    elif damage == 'torn': os.truncate(path, 31)
    else: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match=says) as e: ImageStore.open(tmp_path/'s').verify()
    assert e.value.file == str(path)
    if damage == 'flipped':
        assert e.value.row == 3 and ImageStore.open(tmp_path/'s').verify([0, 7]) == 2


def test_finished_with_fewer_rows_and_taken_up(tmp_path):
    writer = StoreWriter(tmp_path/'s', 12, 6, 5, shard_bytes=90)
    for i in range(5): writer.write(i, image(i))
    writer.close(5)
    assert ImageStore.open(tmp_path/'s').digest == fill(tmp_path/'w', 5).digest
    unfinish_store(tmp_path/'s', 12)
    with pytest.raises(DataError, match='unfinished'): ImageStore.open(tmp_path/'s')
    writer = StoreWriter(tmp_path/'s', 12, 6, 5)
    assert writer.written.sum() == 5
    writer.write(5, image(5)); writer.write(6, image(6))
    writer.close(7)
    assert ImageStore.open(tmp_path/'s').digest == fill(tmp_path/'v', 7).digest


def test_cache(tmp_path, monkeypatch):
    "Shards are copied at first use; damage there is told from damage in the store; no room costs a warning."
    fill(tmp_path/'s', 8, 3)
    store = ImageStore.open(tmp_path/'s', cache=tmp_path/'c')
    np.testing.assert_array_equal(store[4], image(4))
    place = tmp_path/'c'/store.digest[:16]
    assert sorted(p.name for p in place.glob('pixels*')) == ['pixels-00001.bin']
    assert store.stage().verify() == 8 and len(list(place.glob('pixels*'))) == 3
    (place/'pixels-00000.bin').write_bytes(bytes(90))
    with pytest.raises(DataError, match='Remove the copy'): ImageStore.open(tmp_path/'s', cache=tmp_path/'c')[0]
    monkeypatch.setenv('MEDVL_STORE_CACHE', str(tmp_path/'e'))
    assert ImageStore.open(tmp_path/'s')[7].shape == (6, 5) and (tmp_path/'e').exists()
    (tmp_path/'file').write_text('no folder')
    with pytest.warns(UserWarning, match='its own disk'): ImageStore.open(tmp_path/'s', cache=tmp_path/'file')[0]
    with pytest.raises(ValueError, match='MEDVL_STORE_CACHE'):
        monkeypatch.delenv('MEDVL_STORE_CACHE'); ImageStore.open(tmp_path/'s').stage()


def test_prepared_in_shards(tmp_path, salt):
    "Equal bytes, tables and digest, sharded or not; masks, too."
    source = make_source(tmp_path/'src')
    whole, cut = run(source, tmp_path/'w', salt), run(source, tmp_path/'c', salt, shard_bytes=5*ROW)
    assert len(cut.images.files) == 3 and cut.digest == whole.digest and cut.verify() == 12
    assert pixels(tmp_path/'c') == pixels(tmp_path/'w')
    for name in PLAIN: assert (tmp_path/'c'/name).read_bytes() == (tmp_path/'w'/name).read_bytes(), name
    assert run(source, tmp_path/'c', salt).digest == whole.digest                  # opened, whatever is asked for


def test_killed_in_a_shard(tmp_path, salt, monkeypatch):
    "SIGKILL in the third shard: the first two are not touched again, and the end is the same."
    source, out = make_source(tmp_path/'src', n=16), tmp_path/'out'
    whole = run(source, tmp_path/'w', salt)
    defaults = preparation.prepare.__defaults__
    given = list(inspect.signature(preparation.prepare).parameters.values())
    place = [p.name for p in given if p.default is not p.empty and p.kind == p.POSITIONAL_OR_KEYWORD].index('shard_bytes')
    preparation.prepare.__defaults__ = (*defaults[:place], 4*ROW, *defaults[place + 1:])                      # as a user who gives shard_bytes
    try:
        pid = child(source, out, salt, pause=.05)
        wait_for_lines(out/'journal.jsonl', 10, pid)
        kill(pid)
        sealed = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (out/'images').glob('pixels-*.bin')}
        done, plain = [], worker.work
        monkeypatch.setattr(worker, 'work', lambda job: done.append(job.number) or plain(job))
        data = run(source, out, salt)
    finally: preparation.prepare.__defaults__ = defaults
    assert len(sealed) == 2 and all((p.stat().st_ino, p.stat().st_mtime_ns) == was for p, was in sealed.items())
    assert done == list(range(16 - len(done), 16)) and len(done) <= 6
    assert data.digest == whole.digest and len(data.images.files) == 4 and pixels(out) == pixels(tmp_path/'w')


def test_killed_between_stores_and_tables(tmp_path, salt, monkeypatch):
    "Hours of decoding are not thrown away because the tables were not written yet."
    source, out = make_source(tmp_path/'src'), tmp_path/'out'
    run(source, tmp_path/'w', salt)
    with monkeypatch.context() as m:
        m.setattr(preparation, 'make_info', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): run(source, out, salt)
    assert (out/'images'/'store.json').exists() and not (out/'dataset.json').exists()
    monkeypatch.setattr(worker, 'work', lambda job: pytest.fail('decoded again'))
    run(source, out, salt)
    assert files(out) == files(tmp_path/'w')


def test_a_folder_of_before(tmp_path, salt):
    "As the versions before wrote them: one file, no word of shards; finished and unfinished ones are taken as they are."
    source = make_source(tmp_path/'src')
    data = run(source, tmp_path/'old', salt)
    info = json.loads((tmp_path/'old'/'images'/'store.json').read_text())
    assert set(info) == {'format', 'n', 'height', 'width', 'dtype', 'digest'} and info['format'] == 'medvl-store-1'
    half = tmp_path/'half'
    half.mkdir()
    shutil.copytree(tmp_path/'old'/'images', half/'images')
    shutil.copytree(tmp_path/'old'/'masks', half/'masks')
    for name in ('plan.json', 'journal.jsonl'): shutil.copy(tmp_path/'old'/name, half/name)
    lines = (half/'journal.jsonl').read_bytes().splitlines(keepends=True)
    (half/'journal.jsonl').write_bytes(b''.join(lines[:7]))
    for part in ('images', 'masks'):                                               # as one that was killed after seven
        info = json.loads((half/part/'store.json').read_text())
        info.pop('digest')
        (half/part/'writing.json').write_text(json.dumps(info))
        for name in ('pixels', 'checksums'): (half/part/f'{name}.bin').rename(half/part/f'{name}.part')
        (half/part/'store.json').unlink()
    again = run(source, half, salt, shard_bytes=2*ROW)                              # begun in one file, ended in one file
    assert again.digest == data.digest and files(half) == files(tmp_path/'old')


def test_a_disk_without_locks(tmp_path, monkeypatch):
    "ENOLCK is not `another process`: a file names the owner; a dead owner's is taken over, a live or distant one's is not."
    import fcntl
    def none(*a): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', none)
    with locked(tmp_path):
        assert json.loads((tmp_path/'.owner').read_text())['pid'] == os.getpid()
        with pytest.raises(DataError, match=f'process {os.getpid()}'), locked(tmp_path): pass
    assert not (tmp_path/'.owner').exists()
    pid = os.fork()
    if not pid: os._exit(0)
    gone = process_identity(pid)
    os.waitpid(pid, 0)
    (tmp_path/'.owner').write_text(json.dumps(gone))
    with locked(tmp_path): pass
    (tmp_path/'.owner').write_text(json.dumps(process_identity() | dict(machine='another', host='node7')))
    with pytest.raises(DataError, match='node7'), locked(tmp_path): pass


def test_patients_for_the_histogram_are_whole():
    table = pd.DataFrame({'patient_id': [f'p{i//3}' for i in range(90)], 'row': range(90)})
    some = whole_patients(table, 40)
    assert 36 <= len(some) <= 40 and (some.groupby('patient_id').size() == 3).all() and whole_patients(table, 90) is table
    pd.testing.assert_frame_equal(some, whole_patients(table, 40))


def test_open_prepared_from_a_cache(tmp_path, salt, monkeypatch):
    run(make_source(tmp_path/'src'), tmp_path/'d', salt, shard_bytes=5*ROW)
    monkeypatch.setenv('MEDVL_STORE_CACHE', str(tmp_path/'local'))
    data = open_prepared(tmp_path/'d')
    assert data.image(7).shape == SIZE and len(list((tmp_path/'local').rglob('pixels-*.bin'))) == 1


def test_what_was_estimated_is_what_comes_out(tmp_path, salt, monkeypatch):
    "Bytes and files as counted; a disk or a memory that is too small is named; nothing is written."
    import psutil
    source = make_source(tmp_path/'src')
    ask = lambda: estimate(read_folder(source), source, tmp_path/'out'/'deep', size=SIZE, jobs=1, shard_bytes=5*ROW, sample=3)
    expected = ask()
    assert not (tmp_path/'out').exists() and not expected.short
    data = run(source, tmp_path/'c', salt, shard_bytes=5*ROW)
    made = sum(p.stat().st_size for p in (tmp_path/'c'/'images').glob('*.bin'))
    assert round(expected.value('pixels')*1e9) == made and expected.value('files of pixels') == len(data.images.files) == 3
    assert expected.value('disk')*1e9 >= made and expected.value('decoding') > 0 and expected.value('leak check') == 0  # one part only
    monkeypatch.setattr(psutil, 'disk_usage', lambda p: type('U', (), dict(free=10)))
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: type('M', (), dict(available=10)))
    said = ask().short
    assert len(said) == 2 and 'disk' in said[0] and 'memory' in said[1]
