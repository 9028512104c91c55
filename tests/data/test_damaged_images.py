"""Damage inside files: a deterministic fuzz over every coding. `MEDVL_FUZZ=2000 pytest tests/test_damaged_images.py -k fuzz -s` runs more variants and prints the table."""
import collections
import os
import struct
import time
import warnings

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
from medvl.core.errors import DataError
from medvl.data.dicom.damage import jpeg2000_damage, jpeg_damage, scans_of
from medvl.data.dicom.write import dicom_dataset, encode_frame, write_dicom
from medvl.data.dicom.header import Limits
from medvl.data.pixels.file import read_image
from pydicom.encaps import encapsulate

VARIANTS = int(os.environ.get('MEDVL_FUZZ', 100))
COMPRESSED = ('jpeg', 'jpeg_extended', 'jpeg_lossless', 'jpegls', 'jpeg2000', 'jpeg2000_lossy', 'rle')


def breast(shape=(180, 130), bits=12, seed=0):
    y, x = np.mgrid[:shape[0], :shape[1]]
    picture = np.where(np.hypot((y - shape[0]/2)/(shape[0]*.45), x/(shape[1]*.8)) < 1, .45 + .3*np.cos(y/13)*np.cos(x/11), .02)
    return ((picture + np.random.default_rng(seed).normal(0, .006, shape)).clip(0, 1)*((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def frame_of(syntax): return encode_frame(breast(bits=8 if syntax == 'jpeg' else 12), syntax, 8 if syntax == 'jpeg' else 12)


def wrap(path, frame, syntax):
    "A DICOM file around a compressed stream."
    bits = 8 if syntax == 'jpeg' else 12
    write_dicom(path, breast(bits=bits), syntax, bits_stored=bits)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([frame])
        ds['PixelData'].is_undefined_length = True
        ds.save_as(path)


def ended(frame, share, syntax):
    "A stream cut short and given its end marker."
    return frame[:int(share*len(frame))] + (b'' if syntax == 'rle' else b'\xff\xd9')


def zeroed(data, at, n): return data[:at] + bytes(min(n, len(data) - at)) + data[at + n:]


@pytest.mark.parametrize('share', [.1, .5, .9, .99])
@pytest.mark.parametrize('syntax', COMPRESSED)
def test_cut_streams_with_an_end_marker_are_damage(tmp_path, syntax, share):
    wrap(tmp_path/'a.dcm', ended(frame_of(syntax), share, syntax), syntax)
    with pytest.raises(DataError, match='damaged|truncated|run lengths|no start'): read_image(tmp_path/'a.dcm')


@pytest.mark.parametrize('at', [.3, .5, .8])
@pytest.mark.parametrize('syntax', COMPRESSED)
def test_zeroed_stretches_are_damage(tmp_path, syntax, at):
    frame = frame_of(syntax)
    wrap(tmp_path/'a.dcm', zeroed(frame, int(at*len(frame)), 512), syntax)
    with pytest.raises(DataError, match='damaged|truncated|run lengths'): read_image(tmp_path/'a.dcm')


@pytest.mark.parametrize('colour', [False, True])
@pytest.mark.parametrize('options', [{}, {cv2.IMWRITE_JPEG_PROGRESSIVE: 1}, {cv2.IMWRITE_JPEG_RST_INTERVAL: 7}, {cv2.IMWRITE_JPEG_OPTIMIZE: 1}])
def test_plain_jpegs_of_every_build(tmp_path, options, colour):
    "Whole: read. Cut and ended, zeroed: damage. Progressive and with restart markers, too."
    grey = breast(bits=8)
    data = cv2.imencode('.jpg', cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR) if colour else grey, [v for pair in options.items() for v in pair])[1].tobytes()
    (tmp_path/'a.jpg').write_bytes(data)
    assert np.abs(read_image(tmp_path/'a.jpg').pixels.astype(int) - grey).mean() < 3
    for share in (.4, .8, .97):
        (tmp_path/'b.jpg').write_bytes(data[:int(share*len(data))] + b'\xff\xd9')
        with pytest.raises(DataError, match='damaged'): read_image(tmp_path/'b.jpg')


def test_black_and_flat_pictures_are_no_damage():
    "In a black corner a code is a bit or two, and a change of it may not show."
    for pixels in (np.zeros((300, 200), np.uint8), breast(bits=8), np.pad(breast(bits=8), 90), np.full((64, 64), 255, np.uint8), np.eye(3, dtype=np.uint8)*255):
        for level in (30, 75, 95):
            frame = imagecodecs.jpeg8_encode(pixels, level=level)
            assert jpeg_damage(frame, imagecodecs.jpeg8_decode(frame), imagecodecs.jpeg8_decode) == ''
        frame = imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=1)
        assert jpeg_damage(frame, imagecodecs.jpeg8_decode(frame), imagecodecs.jpeg8_decode) == ''
        for options in (dict(reversible=True, level=0), dict(reversible=False, level=40)): assert jpeg2000_damage(imagecodecs.jpeg2k_encode(pixels, codecformat='J2K', **options)) == ''


def test_jpeg2000_tiles():
    frame = imagecodecs.jpeg2k_encode(breast(), codecformat='J2K', reversible=True, level=0)
    assert jpeg2000_damage(frame) == '' and jpeg2000_damage(frame[:-40] + b'\xff\xd9') == 'a tile does not end where it should'
    assert jpeg2000_damage(b'\xff\x4f\xff\x51') == 'no tile is found'


def test_scan_bombs_are_refused_before_they_are_decoded(tmp_path):
    data = cv2.imencode('.jpg', breast(bits=8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    scans = scans_of(data)
    assert 2 < len(scans) < 20
    start = data.rindex(b'\xff\xda')
    (tmp_path/'a.jpg').write_bytes(data[:start] + data[start:-2]*(Limits.scans + 1) + data[-2:])
    with pytest.raises(DataError, match='more than 200 scans'): read_image(tmp_path/'a.jpg')


# containers -----------------------------------------------------------------------------------------------------------------------------------
def test_fragments_and_offset_tables(tmp_path):
    "One frame in many fragments, with a table of one offset, with an extended table: the same picture. Two frames: refused."
    frame, path = frame_of('jpeg2000'), tmp_path/'a.dcm'
    for kind in ('fragments', 'offset', 'extended'):
        wrap(path, frame, 'jpeg2000')
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([frame], fragments_per_frame=5 if kind == 'fragments' else 1, has_bot=kind == 'offset')
        if kind == 'extended': ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = struct.pack('<Q', 0), struct.pack('<Q', len(frame))
        ds['PixelData'].is_undefined_length = True
        ds.save_as(path)
        assert np.array_equal(read_image(path).pixels, breast()), kind
    ds.PixelData = encapsulate([frame, frame], has_bot=True)
    ds.save_as(path)
    with pytest.raises(DataError, match='offset table lists 2 frames'): read_image(path)


def test_rle_segments_of_another_length(tmp_path):
    frame = frame_of('rle')
    for bad in (frame[:-200], frame[:64] + frame[400:], zeroed(frame, 64, 300)):
        wrap(tmp_path/'a.dcm', bad, 'rle')
        with pytest.raises(DataError, match='run lengths'): read_image(tmp_path/'a.dcm')


@pytest.mark.parametrize('syntax', ['explicit', 'implicit', 'big', 'deflated'])
def test_length_lies_say_truncated(tmp_path, syntax):
    path = tmp_path/'a.dcm'
    write_dicom(path, breast(), syntax, bits_stored=12, PatientComments='x'*3000)
    whole = path.read_bytes()
    if syntax == 'deflated':
        path.write_bytes(whole[:len(whole)//2])
        with pytest.raises(DataError, match='truncated'): read_image(path)
        return
    for cut in (.3*len(whole), whole.index(b'x'*3000) + 1000):
        path.write_bytes(whole[:int(cut)])
        with pytest.raises(DataError, match='truncated'): read_image(path)
    at = whole.index(b'x'*3000)
    length = struct.pack('>H' if syntax == 'big' else '<L' if syntax == 'implicit' else '<H', 3000)
    lie = struct.pack('<L', 900_000) if syntax == 'implicit' else b'\xff\xfe'
    path.write_bytes(whole[:at - len(length)] + lie + whole[at:at + 4000])
    with pytest.raises(DataError, match='truncated'): read_image(path)


# bombs ----------------------------------------------------------------------------------------------------------------------------------------
def bomb(path, inside, syntax='deflated'):
    import zlib
    write_dicom(path, breast(), 'explicit', bits_stored=12)
    data = path.read_bytes()
    start = 132 + 12 + struct.unpack('<L', data[140:144])[0]
    body = inside + data[start:]
    if syntax == 'deflated': body = zlib.compress(body, 9, wbits=-15)
    path.write_bytes(data[:start].replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2.1\0') + body)
    if syntax == 'deflated':
        ds = dicom_dataset(breast(), 12)
        head = pydicom.dataset.FileMetaDataset()
        head.MediaStorageSOPClassUID, head.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
        head.TransferSyntaxUID, head.ImplementationClassUID = '1.2.840.10008.1.2.1.99', '2.25.7310'
        with open(path, 'wb') as f:
            f.write(b'\0'*128 + b'DICM')
            pydicom.filewriter.write_file_meta_info(f, head, enforce_standard=True)
            f.write(body)


ITEM = struct.pack('<HHL', 0xFFFE, 0xE000, 0)
BOMBS = {'items of one sequence': struct.pack('<HH2sHL', 0x0008, 0x1140, b'SQ', 0, 0xFFFFFFFF) + ITEM*400_000 + struct.pack('<HHL', 0xFFFE, 0xE0DD, 0),
         'items of a sequence with a length': struct.pack('<HH2sHL', 0x0028, 0x3010, b'SQ', 0, len(ITEM)*400_000) + ITEM*400_000,
         'elements': struct.pack('<HH2sH', 0x0008, 0x0008, b'CS', 0)*400_000,
         'elements behind a strange type': struct.pack('<HH2sH', 0x0008, 0x0008, b'QQ', 2) + b'  ' + struct.pack('<HH2sH', 0x0008, 0x0008, b'CS', 0)*400_000,
         'one long element': struct.pack('<HH2sHL', 0x0009, 0x1001, b'OB', 0, 70 << 20) + bytes(70 << 20)}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_refused_at_once_by_a_single_read(tmp_path, name):
    bomb(tmp_path/'a.dcm', BOMBS[name])
    started = time.monotonic()
    with pytest.raises(DataError, match='more than|longer than|truncated|pixels'): read_image(tmp_path/'a.dcm')
    assert time.monotonic() - started < 10 # it is a second on a quiet machine


def test_text_pgm_of_many_blanks(tmp_path):
    (tmp_path/'a').write_bytes(b'P2 3 2 9 ' + b' '*3_000_000 + b'1 2 3 4 5 6')
    with pytest.raises(DataError, match='truncated'): read_image(tmp_path/'a')


# fuzz -----------------------------------------------------------------------------------------------------------------------------------------
def bases(folder):
    "name -> (bytes of the file, where its pixels start)"
    out = {}
    for syntax in ('explicit', 'implicit', 'big', 'deflated', *COMPRESSED):
        bits = 8 if syntax == 'jpeg' else 12
        write_dicom(folder/'base', breast(bits=bits), syntax, bits_stored=bits, WindowCenter=2048, WindowWidth=4096)
        data = (folder/'base').read_bytes()
        out[syntax] = data, 0 if syntax == 'deflated' else data.index(b'\x7f\xe0\0\x10' if syntax == 'big' else b'\xe0\x7f\x10\0')
    grey = breast(bits=8)
    out['png'] = imagecodecs.png_encode(breast()), 60
    out['jpg progressive'] = cv2.imencode('.jpg', grey, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(), 300
    out['pgm'] = b'P5 130 180 255\n' + grey.tobytes(), 15
    return out


def spoil(data, start, kind, rng):
    if kind == 'flips':
        out = bytearray(data)
        for _ in range(int(rng.integers(1, 9))): out[int(rng.integers(0, len(out)))] ^= 1 << int(rng.integers(0, 8))
        return bytes(out)
    if kind == 'cut': return data[:int(rng.integers(0, len(data)))]
    n = int(rng.integers(128, 1025))
    return zeroed(data, int(rng.integers(start + 60, max(start + 61, len(data) - n))), n)


def outcome(path, expected):
    "What a reader makes of a damaged file."
    started = time.monotonic()
    try: got = read_image(path, Limits(pixels=10**6, side=3000))
    except DataError: word = 'refused'
    except Exception as e: word = f'CRASH {type(e).__name__}'
    else: word = 'same' if np.array_equal(got.pixels, expected) else 'other picture'
    return 'HANG' if time.monotonic() - started > 20 else word


def test_fuzz(tmp_path):
    "No crash, no hang; every truncated file is refused; zeroed stretches of a JPEG of any kind are."
    files, rows = bases(tmp_path), collections.Counter()
    (tmp_path/'file').write_bytes(b'')
    expected = {}
    for name, (data, _) in files.items():
        (tmp_path/'file').write_bytes(data)
        expected[name] = read_image(tmp_path/'file').pixels
    for i in range(VARIANTS):
        rng = np.random.default_rng([5, i])
        name, kind = list(files)[i % len(files)], ('flips', 'cut', 'zeroed')[i//len(files) % 3]
        (tmp_path/'file').write_bytes(spoil(*files[name], kind, rng))
        rows[name, kind, outcome(tmp_path/'file', expected[name])] += 1
    table = pd.Series(rows).rename_axis(['coding', 'damage', 'outcome']).unstack('outcome', fill_value=0)
    if VARIANTS > 100: print('\n' + table.to_string())
    assert not [c for c in table if c.startswith(('CRASH', 'HANG'))], table.to_string()
    wrong = table.get('other picture', pd.Series(0, table.index))
    assert wrong.xs('cut', level='damage').sum() == 0, table.to_string()
    zero = wrong.xs('zeroed', level='damage')
    assert zero.reindex(['jpeg', 'jpeg_extended', 'jpeg_lossless', 'jpegls', 'jpeg2000', 'jpeg2000_lossy', 'rle', 'png'], fill_value=0).sum() <= VARIANTS//200, table.to_string()


def test_a_large_image_has_limits_of_time_and_memory(tmp_path):
    "Up to 16 million pixels are read here; more go through a worker that time and memory end."
    from medvl.data.dicom.header import Limits
    from medvl.data.dicom.write import write_dicom
    from medvl.data.pixels.file import LITTLE, decode_image, read_image
    pixels = np.tile(np.arange(4100, dtype=np.uint16), (4000, 1))
    assert pixels.size > LITTLE
    write_dicom(tmp_path/'large.dcm', pixels, 'rle')
    (tmp_path/'large.png').write_bytes(imagecodecs.png_encode(pixels))
    for name in ('large.dcm', 'large.png'):
        path = tmp_path/name
        assert (read_image(path).pixels == decode_image(path).pixels).all()
        for limit, said in ((Limits(seconds=.001), 'took longer than 0.001 s'), (Limits(memory_bytes=1 << 20), 'needs more'), (Limits(pixels=LITTLE), 'more than 16,000,000')):
            with pytest.raises(DataError, match=said): read_image(path, limit)
        assert read_image(path).shape == pixels.shape # a worker that ended is replaced


def test_limits_that_were_asked_for_hold_for_a_small_image_too(tmp_path):
    from medvl.data.dicom.header import Limits
    from medvl.data.pixels.file import decode_image, read_image
    path = tmp_path/'small.png'
    path.write_bytes(imagecodecs.png_encode(np.arange(256*256, dtype=np.uint16).reshape(256, 256)))
    assert (read_image(path, Limits(seconds=30)).pixels == decode_image(path).pixels).all()
    with pytest.raises(DataError, match='took longer than 1e-06 s'): read_image(path, Limits(seconds=1e-6))
    with pytest.raises(DataError, match='declares 256'): read_image(path, Limits(pixels=1000))
