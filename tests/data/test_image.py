"""PNG, JPEG and PGM by content, within limits; text burned into pixels."""
import struct
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
from golden import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from medvl.core.errors import DataError
from medvl.data.pixels.burned_in import burned_in_text, turn_back
from medvl.data.pixels.isolate import decode_isolated
from medvl.data.dicom.header import Limits
from medvl.data.pixels.file import read_image, sniff

RAMP = np.arange(60*40, dtype=np.uint16).reshape(60, 40)*27


@pytest.mark.parametrize('name,data,expected', [
    ('png16', imagecodecs.png_encode(RAMP), RAMP), ('png8', imagecodecs.png_encode((RAMP >> 8).astype(np.uint8)), RAMP >> 8),
    ('rgb', imagecodecs.png_encode(np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, 2)), RAMP >> 8),
    ('p5', b'P5 40 60 65535\n' + RAMP.astype('>u2').tobytes(), RAMP), ('p5-8', b'P5\n#c\n40\t60\n255\n' + (RAMP >> 8).astype(np.uint8).tobytes(), RAMP >> 8),
    ('p2', b'P2 40 60 65535\n' + ' '.join(map(str, RAMP.ravel())).encode(), RAMP), ('jpegls', imagecodecs.jpegls_encode(RAMP), RAMP),
    ('jpeg_lossless', imagecodecs.jpeg8_encode(RAMP, lossless=True, predictor=1, bitspersample=16), RAMP)])
@pytest.mark.parametrize('suffix', ['.dcm', '.jpg', ''])
def test_exact_formats_whatever_the_name(tmp_path, name, data, expected, suffix):
    path = tmp_path/f'{name}{suffix}'
    path.write_bytes(data)
    got = read_image(path)
    assert np.array_equal(got.pixels, expected) and got.pixels.dtype == (np.uint16 if expected.max() > 255 else np.uint8)


@pytest.mark.parametrize('colour', [False, True])
def test_jpeg_as_opencv(tmp_path, colour):
    grey = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 48)).astype(np.uint8), (0, 0), 2)
    cv2.imwrite(str(tmp_path/'a.jpg'), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR) if colour else grey)
    assert np.abs(read_image(tmp_path/'a.jpg').pixels.astype(int) - cv2.imread(str(tmp_path/'a.jpg'), 0)).max() <= 1


def test_opencv_reads_our_pngs_alike(tmp_path):
    cv2.imwrite(str(tmp_path/'a.png'), RAMP)
    assert np.array_equal(read_image(tmp_path/'a.png').pixels, cv2.imread(str(tmp_path/'a.png'), cv2.IMREAD_UNCHANGED))


def png_of(width, height, body=b''):
    chunk = lambda kind, data: struct.pack('>L', len(data)) + kind + data + struct.pack('>L', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>LLBBBBB', width, height, 8, 0, 0, 0, 0)) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


JPEG = imagecodecs.jpeg8_encode((RAMP >> 8).astype(np.uint8), level=90)


@pytest.mark.parametrize('name,data,reason', [
    ('empty', b'', '0 bytes'), ('text', b'not an image at all', 'not an image'), ('gif', b'GIF89a' + bytes(50), 'not an image'),
    ('encrypted', np.random.default_rng(3).bytes(5000), 'not an image'), ('zip', b'PK\x03\x04' + bytes(200), 'not an image'),
    ('huge png', png_of(60000, 60000), '60000 × 60000'), ('nothing png', png_of(0, 5), 'empty'), ('hollow png', png_of(50, 50, zlib.compress(b'\0'*20)), 'damaged'),
    ('half png', imagecodecs.png_encode(RAMP)[:200], 'truncated'), ('half jpeg', JPEG[:len(JPEG)//2], 'truncated'), ('stub jpeg', JPEG[:12], 'damaged'),
    ('huge jpeg', JPEG.replace(struct.pack('>HH', 60, 40), struct.pack('>HH', 65000, 65000)), '65000 × 65000'),
    ('half pgm', b'P5 40 60 255\n' + bytes(100), 'truncated'), ('headless pgm', b'P5 forty', 'header'), ('odd pgm', b'P2 2 2 9 1 2 x 4', 'numbers'),
    ('loud pgm', b'P2 2 2 3 1 2 3 4\n', 'outside'), ('huge pgm', b'P5 60000 60000 255\n ', '60000 × 60000')])
def test_hostile_files(tmp_path, name, data, reason):
    (tmp_path/name).write_bytes(data)
    for read in (read_image, decode_isolated):
        with pytest.raises(DataError, match=reason) as e: read(tmp_path/name)
        assert name in str(e.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_every_flipped_png_byte_is_noticed(tmp_path_factory, at, change):
    data = bytearray(imagecodecs.png_encode(RAMP))
    data[8 + at % (len(data) - 8)] ^= change
    path = tmp_path_factory.getbasetemp()/'flipped'
    path.write_bytes(bytes(data))
    with pytest.raises(DataError): read_image(path, Limits(pixels=10**6))


def test_colour_and_transparency(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[2, 3] = 255, 0, 0
    (tmp_path/'a').write_bytes(imagecodecs.png_encode(red))
    with pytest.raises(DataError, match=r'pixel \(2, 3\)'): read_image(tmp_path/'a')
    assert read_image(tmp_path/'a', colour='luma').pixels[2, 3] == 76
    (tmp_path/'b').write_bytes(imagecodecs.png_encode(np.full((8, 8, 4), 100, np.uint8)))
    with pytest.raises(DataError, match='transparent'): read_image(tmp_path/'b')
    with pytest.raises(ValueError, match='colour'): read_image(tmp_path/'a', colour='any')


def test_sniffing():
    assert [sniff(h) for h in (b'', b'P6 1 1 255 ', b'\xff\xd8\xff\xe0', b'MZ' + bytes(126) + b'DICM')] == ['', '', 'jpeg', 'dicom']


@pytest.mark.parametrize('name', ['mini_mias', 'cdd_cesm', 'cbis_ddsm', 'dmid', 'nyu_gmic_sample'])
def test_real_images_as_opencv(name):
    files = sorted(sample(f'mammo/images/{name}').iterdir())[:3]
    for file in files:
        expected = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        got = read_image(file).pixels
        assert got.shape == expected.shape[:2] and np.abs(got.astype(int) - (expected if expected.ndim == 2 else expected[..., 0])).max() <= (1 if file.suffix == '.jpg' else 0)


# text in pixels -------------------------------------------------------------------------------------------------------------------------------
def phantom(seed, shape=(700, 480)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:shape[0], :shape[1]]
    texture = cv2.GaussianBlur(rng.normal(0, 1, shape), (0, 0), 3)
    breast = np.hypot((y - shape[0]/2)/(0.42*shape[0]), x/(0.75*shape[1])) < 1
    return (np.where(breast, 120 + 25*texture/texture.std(), 5) + rng.normal(0, 2, shape)).clip(0, 250).astype(np.uint8)


@pytest.mark.parametrize('quarter', [0, 1, 3])
@pytest.mark.parametrize('text', ['R MLO', 'DOE^JANE 04.07.1957', 'Portable'])
@pytest.mark.parametrize('scale', [0.5, 0.9])
def test_text_is_found_where_it_is(quarter, text, scale):
    image = np.ascontiguousarray(np.rot90(phantom(1), quarter))
    (w, h), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x, y = image.shape[1] - w - 12, h + 12
    if quarter == 0: image[:h + 30, x - 15:] = 5
    image[y - h - 4:y + 8, x - 4:x + w + 4] = 5
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
    for turns in (0, 1, 3):
        found = burned_in_text(np.ascontiguousarray(np.rot90(image, turns)))
        assert found and found.letters >= 3
        centres = [((b[0] + b[2])/2, (b[1] + b[3])/2) for b in (turn_back(r, turns, image.shape) for r in found.regions)]
        assert any(x <= cx <= x + w and y - h - 4 <= cy <= y + 8 for cx, cy in centres)


def test_phantoms_without_text_are_clean():
    assert sum(bool(burned_in_text(phantom(seed))) for seed in range(6)) == 0


def test_constant_and_tiny_images_have_no_text():
    assert not burned_in_text(np.full((50, 50), 7, np.uint8)) and not burned_in_text(np.eye(4, dtype=np.uint8))


def test_real_labels_and_no_false_alarm_on_real_mammograms():
    for name in ('1_R_CC', '1_L_CC'): assert burned_in_text(read_image(sample(f'mammo/images/nyu_bcc_sample/{name}.png')))
    files = sorted(sample('mammo/images/cdd_cesm').iterdir())[::18] + sorted(sample('mammo/images/mini_mias').iterdir())[::18]
    alarms = [f.name for f in files if burned_in_text(read_image(f))]
    assert len(files) >= 30 and len(alarms) <= 1, alarms
