"""The image store: what is written is read, whatever happens in between."""
import multiprocessing
import os
import pickle
import resource
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.data.store import ImageStore, StoreWriter

N, H, W = 40, 64, 48


def image(i, dtype='uint8', shape=(H, W)):
    return np.random.default_rng(i).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def fill(folder, n=N, dtype='uint8'):
    with StoreWriter(folder, n, H, W, dtype) as writer:
        for i in range(n): writer.write(i, image(i, dtype))
    return ImageStore.open(folder)


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(range(6))), st.sampled_from(['uint8', 'uint16']), st.integers(1, 9), st.integers(1, 7), st.integers(0, 6))
def test_any_order_any_size(tmp_path_factory, order, dtype, h, w, broken):
    "Rows written in any order, over two sessions, are read back."
    folder = tmp_path_factory.mktemp('s')/'store'
    writer = StoreWriter(folder, 6, h, w, dtype)
    for i in order[:broken]: writer.write(i, image(i, dtype, (h, w)))
    writer.abandon()
    with pytest.raises(DataError, match='unfinished'): ImageStore.open(folder)
    with StoreWriter(folder, 6, h, w, dtype) as writer:
        assert sorted(np.flatnonzero(writer.written)) == sorted(order[:broken])
        for i in order[broken:]: writer.write(i, image(i, dtype, (h, w)))
    store = ImageStore.open(folder)
    assert store.verify() == 6 and store.dtype == dtype and store.shape == (6, h, w)
    for i in range(6): np.testing.assert_array_equal(store[i], image(i, dtype, (h, w)))


def test_read_and_views(tmp_path):
    store = fill(tmp_path/'s')
    rows = [3, 3, 0, N - 1, -1]
    np.testing.assert_array_equal(store.read(rows), np.stack([image(i % N) for i in rows]))
    out = np.empty((2, H, W), np.uint8)
    assert store.read([1, 2], out) is out and (out[1] == image(2)).all()
    view = store[5]
    assert type(view) is np.ndarray and not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, store.pixels)
    for bad in (N, -N - 1):
        with pytest.raises(IndexError): store[bad]
        with pytest.raises(IndexError): store.read([bad])
    with pytest.raises(TypeError): store[1:3]
    with pytest.raises(ValueError, match='out'): store.read([1], out)
    assert store.read([]).shape == (0, H, W)


def test_wrong_images_are_refused(tmp_path):
    writer = StoreWriter(tmp_path/'s', 2, H, W)
    for bad in (image(0, 'uint16'), image(0, shape=(H, W + 1)), np.zeros((H, W), np.float32)):
        with pytest.raises(DataError, match='does not fit'): writer.write(0, bad)
    with pytest.raises(IndexError): writer.write(2, image(0))
    with pytest.raises(DataError, match='2 of 2 rows'): writer.close()
    writer.abandon()
    with pytest.raises(ValueError): StoreWriter(tmp_path/'t', 2, H, W, 'float32')
    with pytest.raises(ValueError): StoreWriter(tmp_path/'t', 0, H, W)
    with pytest.raises(DataError, match='another shape'): StoreWriter(tmp_path/'s', 3, H, W)


def test_finish_with_fewer_rows(tmp_path):
    writer = StoreWriter(tmp_path/'s', 10, H, W)
    for i in range(4): writer.write(i, image(i))
    writer.close(4)
    store = ImageStore.open(tmp_path/'s')
    assert len(store) == 4 and store.verify() == 4 and (tmp_path/'s'/'pixels.bin').stat().st_size == 4*H*W
    with pytest.raises(DataError, match='complete store'): StoreWriter(tmp_path/'s', 10, H, W)
    assert fill(tmp_path/'t', 4).digest == store.digest


def test_corruption_is_named(tmp_path):
    fill(tmp_path/'s')
    path = tmp_path/'s'/'pixels.bin'
    data = bytearray(path.read_bytes())
    data[7*H*W + 11] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError) as e: ImageStore.open(tmp_path/'s').verify()
    assert e.value.row == 7 and str(path) in str(e.value)
    assert ImageStore.open(tmp_path/'s').verify([0, 1, 39]) == 3
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match='cut or exchanged'): ImageStore.open(tmp_path/'s')
    other = fill(tmp_path/'t')
    sums = bytearray((tmp_path/'t'/'checksums.bin').read_bytes())
    sums[0] ^= 1
    (tmp_path/'t'/'checksums.bin').write_bytes(sums)
    with pytest.raises(DataError, match='do not belong'): other.verify()
    with pytest.raises(DataError, match='no store'): ImageStore.open(tmp_path)


@pytest.mark.parametrize('read', [lambda s, i: s[i], lambda s, i: s.read([0, i]), lambda s, i: s[i - N], lambda s, i: s.read([i - N])])
def test_a_changed_row_cannot_be_read(tmp_path, read):
    "Whoever reads it is told, the first time and again; other rows stay readable, a checked row is hashed once."
    fill(tmp_path/'s')
    with open(tmp_path/'s'/'pixels.bin', 'r+b') as f:
        f.seek(7*H*W + 5); value = f.read(1)[0]; f.seek(7*H*W + 5); f.write(bytes([value ^ 128]))
    store = ImageStore.open(tmp_path/'s')
    for _ in range(2):
        with pytest.raises(DataError, match='changed after') as e: read(store, 7)
        assert e.value.row == 7 and e.value.file == str(tmp_path/'s'/'pixels.bin')
    read(store, 8)
    assert store._seen[8] and not store._seen[7]
    assert pickle.loads(pickle.dumps(ImageStore.open(tmp_path/'s', checked=False)))[7].shape == (H, W) # noqa: S301 (our own)
    sums = bytearray((tmp_path/'s'/'checksums.bin').read_bytes()); sums[32*3] ^= 1
    (tmp_path/'s'/'checksums.bin').write_bytes(sums)
    with pytest.raises(DataError, match='do not belong'): ImageStore.open(tmp_path/'s')[0]


def test_embedding_stops_at_a_changed_row(tmp_path):
    from evaluation import Grey, made

    from medvl.evaluate.protocols.embeddings import embed
    data = made(tmp_path/'d', patients=3)
    with open(tmp_path/'d'/'images'/'pixels.bin', 'r+b') as f: f.seek(5*16*12); value = f.read(1)[0]; f.seek(5*16*12); f.write(bytes([value ^ 1]))
    with pytest.raises(DataError, match='pixels changed') as e: embed(Grey(), data, tmp_path/'e', batch_size=4, what='feature')
    assert e.value.row == 5


def _child(store, queue): queue.put((int(store[3].sum()), store.verify([3])))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_travels_to_processes(tmp_path, method):
    store = fill(tmp_path/'s')
    assert store[0].sum() and len(pickle.dumps(store)) < 1000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(store, queue))
    child.start()
    assert queue.get(timeout=60) == (int(image(3).sum()), 1)
    child.join()


def write_slowly(folder, pause=0.0, limit=None):
    "Write the store in a forked process; returns its id."
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        writer = StoreWriter(folder, N, H, W)
        try:
            for i in range(N):
                writer.write(i, image(i))
                time.sleep(pause)
        except DataError as e: os.write(os.open(folder.parent/'error', os.O_WRONLY | os.O_CREAT), str(e).encode())
        else: status = 0
    finally: os._exit(status)


def test_killed_and_resumed(tmp_path):
    "SIGKILL in the middle: finished rows are kept, the end is bit-identical."
    folder = tmp_path/'s'
    pid = write_slowly(folder, pause=0.02)
    while not ((folder/'checksums.part').exists() and (folder/'checksums.part').stat().st_size >= 12*32): time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (folder/'store.json').exists() and not (folder/'pixels.bin').exists()
    with pytest.raises(DataError, match='unfinished'): ImageStore.open(folder)
    writer = StoreWriter(folder, N, H, W)
    done = int(writer.written.sum())
    assert 12 <= done < N
    before = os.stat(folder/'pixels.part').st_mtime_ns
    for i in np.flatnonzero(~writer.written): writer.write(i, image(i))
    writer.close()
    assert os.stat(folder/'pixels.bin').st_mtime_ns > before
    assert (folder/'pixels.bin').read_bytes() == b''.join(image(i).tobytes() for i in range(N))
    assert ImageStore.open(folder).digest == fill(tmp_path/'t').digest


def test_disk_full_keeps_what_was_written(tmp_path):
    "The kernel refuses to let the file grow; afterwards the same call goes on."
    folder = tmp_path/'s'
    _, status = os.waitpid(write_slowly(folder, limit=15*H*W + 100), 0)
    error = (tmp_path/'error').read_text()
    assert status and 'the disk is full' in error and 'kept' in error and 'row 15' in error
    with pytest.raises(DataError, match='unfinished'): ImageStore.open(folder)
    with StoreWriter(folder, N, H, W) as writer:
        assert np.flatnonzero(writer.written).tolist() == list(range(15))
        for i in range(15, N): writer.write(i, image(i))
    assert ImageStore.open(folder).verify() == N


def test_no_room_is_said_first(tmp_path):
    with pytest.raises(DataError, match='GB are needed'): StoreWriter(tmp_path/'s', 10**9, 1520, 912)
    assert not (tmp_path/'s'/'pixels.part').exists()


def test_torn_row_is_forgotten(tmp_path):
    writer = StoreWriter(tmp_path/'s', 3, H, W)
    for i in range(3): writer.write(i, image(i))
    writer.abandon()
    with open(tmp_path/'s'/'pixels.part', 'r+b') as f: f.truncate(2*H*W + 5)
    writer = StoreWriter(tmp_path/'s', 3, H, W)
    assert writer.written.tolist() == [True, True, False]
    writer.abandon()


def test_reading_is_faster_than_decoding(tmp_path):
    "Not a benchmark: only that reading a row does not decode or copy more than it should."
    import cv2
    store = fill(tmp_path/'s')
    path = str(tmp_path/'a.png')
    cv2.imwrite(path, np.tile(image(0), (10, 10)))
    t0 = time.perf_counter()
    for _ in range(50): store.read([1, 2, 3])
    t1 = time.perf_counter()
    for _ in range(50): cv2.imread(path, 0)
    assert t1 - t0 < time.perf_counter() - t1
