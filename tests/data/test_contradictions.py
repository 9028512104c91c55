"""DICOM files that contradict themselves, raw images, special views, pictures with nothing to see: each is read as the pixels show, or set aside with its reason."""
import warnings

import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
from medvl.core.errors import DataError
from medvl.data.dicom.bits import looks_signed, settle_bits
from medvl.data.releases.cmmd import read_images
from medvl.data.dicom.read import StoredImage, attenuation, brightness, read_dicom
from medvl.data.dicom.write import write_dicom
from medvl.data.dicom.header import header_fields, open_dicom, spacing_of, view_modifier_of, view_of
from medvl.data.pixels.file import read_image
from medvl.data.pixels.picture import picture_trouble
from medvl.data.prepare.run import prepare
from medvl.data.pixels.profiles import PROFILES, preprocess, set_aside
from medvl.data.schema import Report
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

NAME = 'ZZQNAME^ALFA'


def breast(shape=(120, 80), top=3738):
    y, x = np.mgrid[:shape[0], :shape[1]]
    picture = np.where(np.hypot((y - 60)/52, x/66) < 1, .55 + .35*np.cos(y/9)*np.cos(x/7), 0.)
    return ((picture + np.random.default_rng(0).normal(0, .01, shape)*(picture > 0)).clip(0, 1)*top).astype(np.uint16)


def changed(path, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
        for name, value in fields.items():
            if isinstance(value, tuple): ds.add_new(name, *value)
            else: setattr(ds, name, value)
        ds.save_as(path)


def written(path, pixels=None, bits=12, **fields):
    write_dicom(path, breast() if pixels is None else pixels, bits_stored=bits, ViewPosition='CC', ImageLaterality='L')
    changed(path, **fields)
    return read_dicom(path)


def table(bits, values, first=0, vr='US'):
    item = Dataset()
    item.add_new('LUTDescriptor', vr, [len(values), first, bits])
    item.add_new('LUTData', 'US', [int(v) for v in values])
    return [item]


def shown(image, profile='dicom_voi_v1'): return preprocess(image, profile, (60, 40)).pixels.astype(int)


@pytest.fixture
def plain(tmp_path): return shown(written(tmp_path/'plain.dcm', WindowCenter=2048, WindowWidth=4096))


# display tables and windows --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bits,top', [(16, 4095), (16, 255), (8, 4095), (12, 4095), (8, 255), (14, 1023), (10, 1023)])
def test_display_table_of_another_depth(tmp_path, plain, bits, top):
    image = written(tmp_path/'a.dcm', VOILUTSequence=table(bits, np.arange(4096)*(top + 1)//4096))
    assert np.abs(shown(image) - plain).max() <= 1
    assert bool(image.notes) == (top >= 1 << bits or top < 1 << bits - 1)


def test_display_table_of_bytes_packed_in_words(tmp_path, plain):
    image = written(tmp_path/'a.dcm', VOILUTSequence=table(8, np.arange(4096)//16))
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.add_new('LUTData', 'US', (np.arange(4096)//16).astype('u1').view('<u2').tolist())
    packed = written(tmp_path/'b.dcm', VOILUTSequence=[item])
    assert np.array_equal(shown(packed), shown(image)) and np.abs(shown(image) - plain).max() <= 1


def test_empty_display_item_and_half_a_table(tmp_path, plain):
    image = written(tmp_path/'a.dcm', VOILUTSequence=[Dataset()], WindowCenter=2048, WindowWidth=4096)
    assert image.voi_lut is None and np.array_equal(shown(image), plain)
    half = Dataset()
    half.LUTDescriptor = [4096, 0, 12]
    with pytest.raises(DataError, match='no complete table'): written(tmp_path/'b.dcm', VOILUTSequence=[half])


def test_first_input_of_a_table_with_the_other_sign(tmp_path):
    "Signed pixels, a table that starts at -2048; its first input is written unsigned, or the pixels' sign is not known to it."
    pixels = (breast().astype(np.int32) - 2048).astype(np.int16)
    ramp = np.arange(4096)*16
    right = shown(written(tmp_path/'a.dcm', pixels, 16, VOILUTSequence=table(16, ramp, -2048 & 0xFFFF)))
    assert right.max() > 200 and right.min() == 0
    image = written(tmp_path/'b.dcm', breast(), 12, RescaleIntercept='-2048', RescaleSlope='1', VOILUTSequence=table(16, ramp, -2048 & 0xFFFF))
    assert np.abs(shown(image) - right).max() <= 1
    far = written(tmp_path/'c.dcm', breast(), 12, VOILUTSequence=table(16, ramp, -100 & 0xFFFF)) # beside all values, unless it means -100
    assert far.voi_lut.first == -100 and far.notes == ('first input of the display table has the other sign',) and np.abs(shown(far) - right).max() <= 10


@pytest.mark.parametrize('centre,width,used', [('2048', '4096', True), ('0', '0', False), ('nan', '100', False)])
def test_several_windows(tmp_path, plain, centre, width, used):
    "The first that can be used is used."
    image = written(tmp_path/'a.dcm', WindowCenter=[centre, '2048'] if centre != 'nan' else ['0', '2048'], WindowWidth=[width if centre != 'nan' else '0', '4096'])
    assert np.array_equal(shown(image), plain) and bool(image.notes) != used


def test_window_left_over_from_another_depth(tmp_path):
    eight = (breast() >> 4).astype(np.uint8)
    image = written(tmp_path/'a.dcm', eight, 8, WindowCenter=2048, WindowWidth=4096)
    assert image.windows == () and '4096' in image.notes[0] and shown(image).max() >= 250 and 80 < shown(image).mean() < 130
    assert written(tmp_path/'b.dcm', WindowCenter=2048, WindowWidth=8192).windows # twice the range is odd, not impossible
    with pytest.raises(DataError, match='constant'): shown(written(tmp_path/'c.dcm', WindowCenter=60000, WindowWidth=100)) # beside the values: refused, not guessed
    dark = written(tmp_path/'d.dcm', WindowCenter=2048*4, WindowWidth=4096*2.9)
    with pytest.raises(DataError, match='nearly black'): set_aside(dark, preprocess(dark, 'dicom_voi_v1', (60, 40)))
    bright = written(tmp_path/'e.dcm', WindowCenter=128, WindowWidth=256)
    with pytest.raises(DataError, match='nearly saturated'): set_aside(bright, preprocess(bright, 'dicom_voi_v1', (60, 40)))
    low = written(tmp_path/'f.dcm', breast()//400*400, WindowCenter=2048, WindowWidth=4096)
    with pytest.raises(DataError, match='posterised'): set_aside(low, preprocess(low, 'dicom_voi_v1', (60, 40)))


@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID', NAME, ''])
def test_voi_functions(tmp_path, function):
    image = written(tmp_path/'a.dcm', WindowCenter=2048, WindowWidth=4096, VOILUTFunction=function)
    assert image.voi_function == (function if function in ('LINEAR', 'LINEAR_EXACT', 'SIGMOID') else 'LINEAR') and shown(image).max() > 150


@pytest.mark.parametrize('slope', ['0', '2', '-1'])
def test_rescale_slopes(tmp_path, slope):
    image = written(tmp_path/'a.dcm', RescaleSlope=slope, RescaleIntercept='0')
    y, first = brightness(image)
    assert (y[3000] > y[100]) == (slope != '-1') and image.slope == (float(slope) or 1.)


# bits and signs --------------------------------------------------------------------------------------------------------------------------------
CASES = { # name: (pixels as written, bits stored, further fields, what is read, whether it is noted)
    'declared left-aligned': (breast(), 12, dict(HighBit=15), breast(), True),
    'truly left-aligned': (breast() << 4, 12, dict(HighBit=15), breast(), False),
    'left-aligned, said right-aligned': (breast() << 4, 12, {}, breast(), True),
    'left-aligned with rubbish below': (breast() << 4 | 5, 12, dict(HighBit=15), breast(), False),
    'ten bits declared': (breast(), 10, {}, breast(), True),
    'rubbish in the spare bits': (breast() | 0xA000, 12, {}, breast(), False),
    'overlay in a spare bit': (breast() | (np.indices((120, 80)).sum(0) % 11 == 0).astype(np.uint16)*4096, 12, {}, breast(), False),
    'signed declared': (breast(top=4000), 12, dict(PixelRepresentation=1), breast(top=4000), True),
    'truly signed': ((breast().astype(np.int32) - 2000).astype(np.int16), 16, {}, breast().astype(int) - 2000, False),
    'truly signed, 12 bits, not extended': (((breast().astype(np.int32) - 2000) & 0xFFF).astype(np.uint16), 12, dict(PixelRepresentation=1), breast().astype(int) - 2000, False),
    'signed, said unsigned': ((breast().astype(np.int32)//4 - 300 + np.random.default_rng(1).integers(-9, 9, (120, 80))).astype(np.int16).view(np.uint16), 16, {}, None, True),
}


@pytest.mark.parametrize('name', CASES)
def test_bits_and_signs(tmp_path, name):
    pixels, bits, fields, want, noted = CASES[name]
    image = written(tmp_path/'a.dcm', pixels, bits, **fields)
    want = pixels.view(np.int16) if want is None else want
    assert np.array_equal(image.pixels, want) and bool(image.notes) == noted, image.notes


def test_labels_and_hard_edges_are_no_sign():
    "A white label on black jumps by the whole range, and is white."
    label = np.zeros((200, 150), np.uint16)
    label[20:180, :90] = breast((160, 90))
    label[10:18, 100:140:3] = 65535
    assert settle_bits(label, 16, 16, 15, False) == (16, 16, 15, False, []) and not looks_signed(label, 16)
    noise = np.random.default_rng(0).integers(0, 65536, (60, 60)).astype(np.uint16)
    for bits, signed in ((16, False), (16, True), (12, False), (12, True)): assert settle_bits(noise >> 16 - bits, bits, 16, bits - 1, signed)[3] == signed


def compressed(path, frame, pixels, syntax, **fields):
    write_dicom(path, pixels, syntax, bits_stored=12, ViewPosition='CC', ImageLaterality='L')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([frame])
        ds['PixelData'].is_undefined_length = True
        for name, value in fields.items(): setattr(ds, name, value)
        ds.save_as(path)
    return read_dicom(path)


def test_header_against_codestream(tmp_path):
    path, picture = tmp_path/'a.dcm', breast()
    signed = imagecodecs.jpeg2k_encode((picture.astype(np.int32) - 2048).astype(np.int16), codecformat='J2K', reversible=True, level=0, bitspersample=12)
    image = compressed(path, signed, picture, 'jpeg2000')
    assert image.pixels.min() < 0 and np.array_equal(image.pixels, picture.astype(int) - 2048) and image.notes == ('header says unsigned, stream signed',)
    whole = imagecodecs.jpeg2k_encode(picture, codecformat='J2K', reversible=True, level=0, bitspersample=16)
    assert np.array_equal(compressed(path, whole, picture, 'jpeg2000').pixels, picture) and compressed(path, whole, picture, 'jpeg2000').notes == ()
    other = compressed(path, whole, picture, 'jpeg2000', PixelRepresentation=1) # values to 3738 are no 12-bit two's complement
    assert np.array_equal(other.pixels, picture) and other.notes == ('header says signed, the values are unsigned',)
    low = picture//4
    unsigned = imagecodecs.jpeg2k_encode(((low.astype(np.int32) - 500) & 0xFFF).astype(np.uint16), codecformat='J2K', reversible=True, level=0, bitspersample=12)
    assert np.array_equal(compressed(path, unsigned, low, 'jpeg2000', PixelRepresentation=1).pixels, low.astype(int) - 500)


def test_eight_bit_stream_in_a_twelve_bit_header(tmp_path):
    eight = (breast() >> 4).astype(np.uint8)
    image = compressed(tmp_path/'a.dcm', imagecodecs.jpeg8_encode(eight, level=95), breast(), 'jpeg_extended', WindowCenter=2048, WindowWidth=4096)
    assert image.bits_stored == 8 and image.windows == () and len(image.notes) == 2 and shown(image).max() >= 250
    deep = compressed(tmp_path/'b.dcm', imagecodecs.jpeg8_encode(breast(), lossless=True, predictor=1, bitspersample=12), breast(), 'jpeg_lossless', BitsAllocated=8, BitsStored=8, HighBit=7)
    assert np.array_equal(deep.pixels, breast()) and deep.notes # and not its lowest eight bits


# raw images ------------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('profile', PROFILES)
def test_raw_images_are_refused_or_converted_never_inverted(tmp_path, profile):
    beam = np.round(4095*np.exp(breast()/-1500.)).astype(np.uint16)
    image = written(tmp_path/'a.dcm', beam, PresentationIntentType='FOR PROCESSING', PixelIntensityRelationship='LIN', PixelIntensityRelationshipSign=1)
    with pytest.raises(DataError, match='raw image'): preprocess(image, profile, (60, 40))
    out = preprocess(image, profile, (60, 40), accept=('raw',))
    assert 'raw image converted by the rule attenuation' in out.notes
    whole = preprocess(image, 'resize_v1', (120, 80), accept=('raw',)).pixels.astype(int)
    assert np.corrcoef(whole.ravel(), breast().ravel())[0, 1] > .99


def test_how_values_and_beam_are_related(tmp_path):
    beam = np.round(4095*np.exp(breast()/-1500.)).astype(np.uint16)
    fields = dict(intent='FOR PROCESSING', bits_stored=12)
    for pixels, relationship, sign in ((beam, 'LIN', 1), (4095 - beam, 'LIN', -1), (4000 - breast(), 'LOG', 1), (breast(), 'LOG', -1)):
        made = attenuation(StoredImage(pixels.astype(np.uint16), relationship=relationship, relationship_sign=sign, **fields))
        assert np.corrcoef(made.pixels.ravel(), breast().ravel())[0, 1] > .99 and made.pixels.max() == 65535, (relationship, sign)
    for relationship, sign in (('LIN', 0), ('', 1), ('DISP', 1)):
        with pytest.raises(DataError, match='does not say'): attenuation(StoredImage(beam, relationship=relationship, relationship_sign=sign, **fields))
    assert written(tmp_path/'a.dcm', SOPClassUID='1.2.840.10008.5.1.4.1.1.1.2.1').raw # told by its class where the type is missing
    assert not written(tmp_path/'b.dcm', PresentationIntentType='FOR PRESENTATION').raw


# views -----------------------------------------------------------------------------------------------------------------------------------------
def coded(*codes, nested=True, view='399162004'):
    ds, item = Dataset(), Dataset()
    item.CodeValue = view
    (item if nested else ds).ViewModifierCodeSequence = [Dataset() for _ in codes]
    for d, (value, meaning) in zip((item if nested else ds).ViewModifierCodeSequence, codes): d.CodeValue, d.CodeMeaning = value, meaning
    ds.ViewCodeSequence, ds.Modality = [item], 'MG'
    return ds


@pytest.mark.parametrize('nested', [True, False])
@pytest.mark.parametrize('code,name', [('399163009', 'magnification'), ('R-102D6', 'magnification'), ('399055006', 'spot compression'), ('R-102D7', 'spot compression'), ('399209000', 'implant displaced'),
                                       ('399197002', 'rolled lateral'), ('399226006', 'rolled medial'), ('415670009', 'rolled superior'), ('414493004', 'rolled inferior'), ('399110001', 'tangential'),
                                       ('399011000', 'axillary tail'), ('399161006', 'cleavage'), ('442581004', 'nipple in profile'), ('P2-00161', 'anterior compression'), ('4711', 'unknown modifier')])
def test_modifier_codes(code, name, nested):
    ds = coded((code, 'something'), nested=nested)
    assert view_modifier_of(ds) == name and view_of(ds)[1] == 'CC'


def test_modifier_codes_are_the_standards():
    from medvl.data.dicom.header import MODIFIERS
    from pydicom.sr._cid_dict import cid_concepts
    from pydicom.sr._concepts_dict import concepts
    codes = {next(iter(concepts['SCT'][n])) for n in cid_concepts[4015]['SCT']}
    assert codes == {c[0] for c in MODIFIERS.values() if c[0]}


@pytest.mark.parametrize('text,view,modifiers', [('R CC', 'CC', ''), ('L MLO', 'MLO', ''), ('RMCC', 'CC', 'magnification'), ('LMLOID', 'MLO', 'implant displaced'), ('R CC ID', 'CC', 'implant displaced'),
                                                 ('R CC SPOT MAG', 'CC', 'magnification, spot compression'), ('LCCRL', 'CC', 'rolled lateral'), ('L ML', 'ML', ''), ('R LM', 'LM', ''), ('MAMMO L CC', 'CC', ''),
                                                 ('Magnified CC', 'CC', 'magnification'), ('LXCCL', 'XCCL', ''), ('L MLO Image Diagnostic', 'MLO', '')])
def test_modifiers_in_descriptions(text, view, modifiers):
    ds = Dataset()
    ds.Modality, ds.SeriesDescription = 'MG', text
    assert (view_of(ds)[1], view_modifier_of(ds)) == (view, modifiers)


def test_magnification_and_spacing():
    ds = Dataset()
    ds.Modality, ds.ImagerPixelSpacing = 'MG', [.1, .1]
    for fields, spacing, source, modifier in (({}, .1, 'imager', ''), (dict(EstimatedRadiographicMagnificationFactor='1.05'), .1/1.05, 'imager/magnification', ''),
                                              (dict(EstimatedRadiographicMagnificationFactor='1.8'), .1/1.8, 'imager/magnification', 'magnification'),
                                              (dict(EstimatedRadiographicMagnificationFactor=None, DistanceSourceToDetector='660', DistanceSourceToPatient='330'), .05, 'imager/magnification', 'magnification'),
                                              (dict(PixelSpacing=[.1, .1]), .05, 'imager/magnification', 'magnification'), # a copy of the imager's is no calibration
                                              (dict(PixelSpacing=[.06, .06], PixelSpacingCalibrationType='GEOMETRY'), .06, 'calibrated (geometry)', 'magnification'),
                                              (dict(PixelSpacingCalibrationType=NAME), .06, 'calibrated', 'magnification')):
        for name, value in fields.items(): setattr(ds, name, value)
        got, where = spacing_of(ds)
        assert np.allclose(got, spacing) and where == source and view_modifier_of(ds) == modifier, (fields, got, where)


# a whole preparation --------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    root = tmp_path/'s'
    root.mkdir()
    beam = np.round(4095*np.exp(breast()/-1500.)).astype(np.uint16)
    for name, pixels, fields in (('plain', breast(), {}), ('spot', breast() + 1, {}), ('raw', beam, dict(PresentationIntentType='FOR PROCESSING', PixelIntensityRelationship='LIN', PixelIntensityRelationshipSign=1)),
                                 ('dark', breast() + 2, dict(WindowCenter=2048*4, WindowWidth=4096*2.9)), ('noted', breast() + 3, dict(HighBit=15))):
        written(root/f'{name}.dcm', pixels, **fields)
    changed(root/'spot.dcm', **{k: v for k, v in (('ViewModifierCodeSequence', coded(('399163009', '')).ViewCodeSequence[0].ViewModifierCodeSequence),)})
    records = pd.DataFrame([dict(image_path=f'{n}.dcm', image_id=n, patient_id=n, laterality='L', view='CC') for n in ('plain', 'spot', 'raw', 'dark', 'noted')])
    return lambda out, **options: prepare(records, root, tmp_path/out, size=(60, 40), profile='dicom_voi_v1', backend='sequential', salt=tmp_path/'salt', **options)


def test_a_preparation_sets_aside_and_tells(folder):
    data = folder('one')
    aside = pd.read_csv(data.folder/'rejects.csv').set_index('image_id').reason
    assert sorted(data.manifest.image_id) == ['noted', 'plain'] and set(aside.index) == {'spot', 'raw', 'dark'}
    assert 'special view: its header says magnification' in aside.spot and 'raw image' in aside.raw and 'nearly black' in aside.dark
    assert data.manifest.set_index('image_id').notes.to_dict() == {'plain': '', 'noted': 'HighBit is 15, the values are right-aligned'}


def test_a_preparation_keeps_what_it_is_told_to(folder):
    data = folder('two', accept=('raw', 'special_views', 'odd_pictures'))
    m = data.manifest.set_index('image_id')
    assert len(m) == 5 and m.view_modifier.to_dict() == dict(plain='', spot='magnification', raw='', dark='', noted='') and 'nearly black' in m.notes.dark and 'attenuation' in m.notes.raw
    raw = data.image(list(data.manifest.image_id).index('raw'))
    assert raw[25:35, :10].mean() > 2*raw[:2, -4:].mean() # the breast is bright, the air dark
    with pytest.raises(ValueError, match="Did you mean 'raw'"): folder('three', accept=('row',))


def test_readers_by_headers_tell_special_views(tmp_path):
    root = tmp_path/'D1-0001'
    root.mkdir()
    for name, fields in (('1-1', {}), ('1-2', dict(EstimatedRadiographicMagnificationFactor='1.8', SeriesDescription='L CC SPOT'))): written(root/f'{name}.dcm', **fields)
    report = Report('CMMD')
    images = read_images(tmp_path, report)
    assert images.image_id.tolist() == ['D1-0001_L_CC', 'D1-0001_L_CC_magnification_spot-compression'] and (report.issues.kind == 'special view').sum() == 1


def test_phantoms_raise_no_alarm(tmp_path):
    from medvl.data.phantom.chest_film import chest_exam
    from medvl.data.phantom.breast_dataset import write_phantom
    root = write_phantom(tmp_path/'p', 2, (128, 80), progress=False)
    images = [read_image(f) for f in sorted((root/'images').iterdir())]
    images += [StoredImage(chest_exam(0, i, size=(128, 128)).pixels) for i in range(4)]
    assert len(images) >= 12 and not [t for i in images for p in PROFILES if (t := preprocess(i, p, (64, 48)).trouble)]


def test_pictures_by_the_strip():
    whole = (breast()//16).astype(np.uint8)
    marked = whole//14
    marked[:3, -9:] = 255 # a label does not make it a picture
    assert picture_trouble(whole) == '' and 'nearly black' in picture_trouble(marked) and 'posterised' in picture_trouble(whole//40*40)
    assert 'saturated' in picture_trouble(np.where(whole > 20, 255, whole).astype(np.uint8)) and picture_trouble(np.full((9, 9), 3, np.uint8)) == ''
    assert [bool(picture_trouble(p)) for p in (breast()*16, breast()//2, breast()//1000*1000*16)] == [False, True, True] # 16 bits


# nothing of the file is quoted ------------------------------------------------------------------------------------------------------------------
def quoted(reason): return any(part.lower() in reason.lower() for part in ('ZZQ', 'ALFA', 'NAME^'))


@pytest.mark.parametrize('field,value', [('PhotometricInterpretation', NAME), ('VOILUTFunction', NAME), ('PresentationIntentType', NAME), ('PixelIntensityRelationship', NAME), ('Rows', ('LO', NAME)),
                                         ('BitsStored', ('LO', NAME)), ('NumberOfFrames', ('LO', NAME)), ('PixelRepresentation', ('LO', NAME)), ('WindowCenter', ('LO', NAME)), ('RescaleSlope', ('LO', NAME)),
                                         ('PixelSpacing', ('LO', NAME)), ('PixelPaddingValue', ('LO', NAME)), ('SamplesPerPixel', ('LO', NAME)), ('ViewPosition', NAME), ('PatientSex', NAME)])
def test_no_reason_quotes_a_header(tmp_path, field, value):
    try:
        image = written(tmp_path/'a.dcm', **{field: value})
        assert field == 'ViewPosition' or not quoted(str(image.header)), image.header
        said = ' '.join(image.notes)
    except DataError as e: said = f'{e.message} {e.fix}'
    assert not quoted(said), said


@pytest.mark.parametrize('data', [b'Miller, Ann: born 1950', 'Müller, Änne, geb. 1950 in Köln'.encode(), 'Müller, Änne'.encode('latin-1'), 'Miller, Ann'.encode('utf-16'), b'\0Miller\0'*9, b'GIF89aMiller',
                                  b'P2 2 2 9 Miller Ann 1 2', b'%PDF-1.4 Miller', b'\x89PNG\r\n\x1a\n\0\0\0\6MillAnn123456789012345'])
def test_no_reason_quotes_a_file(tmp_path, data):
    (tmp_path/'a').write_bytes(data)
    with pytest.raises(DataError) as e: read_image(tmp_path/'a')
    assert not any(w in e.value.message for w in ('Mill', 'Ann', 'ller', '1950', "b'", '\\x')), e.value.message


def test_fields_hold_what_they_are_for(tmp_path):
    written(tmp_path/'a.dcm', KVP=('LO', NAME), PatientSex='M', WindowCenter=2048, WindowWidth=4096)
    with open_dicom(tmp_path/'a.dcm').stream: fields = header_fields(open_dicom(tmp_path/'a.dcm').ds)
    assert 'KVP' not in fields and fields['PatientSex'] == 'M' and fields['WindowCenter'] == 2048
