"""Medical X-VL's data: every reader on files in the exact layout, the original's numbers, bad input, and real images and lists where they are at hand."""
import importlib
import importlib.util
import json
import random
import sys
import types

import cv2
import numpy as np
import pandas as pd
import pytest
from golden import golden, sample

from medvl.core.errors import DataError
from medvl.data.dicom.read import StoredImage
from medvl.data.pixels.file import read_image
from medvl.data.pixels.profiles import PROFILES, Profile, equalised_last, get_profile, pad_resize, preprocess
from medvl.data.pixels.shapes import Derived
from medvl.data.prepare.run import prepare
from medvl.data.releases.array_images import ArrayImages, same_length, write_rows
from medvl.data.releases.chexpert_labels import CHEXPERT_FINDINGS, label_of
from medvl.data.releases.chexpert_test import CHEXPERT_TEST, read_chexpert_test
from medvl.data.releases.covid_severity import (
    BRIXIA, FORMS, ZONES, brixia_zones, form_zones, read_severity, severity, severity_map, two_lungs, zone_masks, zone_maxima,
)
from medvl.data.releases.finding_pairs import finding_pairs, finding_words, read_pairs
from medvl.data.releases.mimic_array import MIMIC_ARRAY, read_mimic_array
from medvl.data.releases.openi_lists import OPENI_LISTS, read_openi_impressions, read_openi_selected
from medvl.data.releases.path_target import COVIDX, match_files, read_covidx, read_path_target
from medvl.data.releases.questions import QUESTION_COLUMNS, SLAKE, VQA_RAD, read_slake, read_vqa_rad
from medvl.data.releases.release import check_release
from medvl.data.releases.report_lines import MEDVILL, draw_caption, named_findings, read_lines, read_medvill
from medvl.data.releases.retrieval_sets import CHEXPERT_8X200, FINDINGS_5, FINDINGS_8, read_chexpert_8x200, read_ids, select_ids
from medvl.data.schema import Report, sort_out
from medvl.data.text.captions import caption_sentences, pre_caption, shuffle_sentences

RELEASES = (MIMIC_ARRAY, MEDVILL, OPENI_LISTS, CHEXPERT_8X200, CHEXPERT_TEST, COVIDX, BRIXIA, VQA_RAD, SLAKE)


def balanced(report):
    assert report.read == report.kept + report.passed + sum(report.merged.values()) + sum(report.aside.values())
    return report


def usable(source, root=None):
    "The table passes the schema, the books are kept, and with a root every file is there."
    _, problems = sort_out(source.records, 'records')
    assert not len(problems), problems.head()
    assert source.records.image_id.is_unique and balanced(source.report).kept == len(source.records)
    if root is not None: assert all((root/p).is_file() for p in source.records.image_path)
    return source


def kinds(source): return source.report.issues.kind.value_counts().to_dict()


def film(i=0, h=48, w=48): # a picture with many greys
    y, x = np.mgrid[:h, :w]
    return (np.hypot(y - h/2, x - 3*i - 8)*200/h + 20*np.cos(y/5 + i)).clip(0, 255).astype(np.float32)


def put(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), film(i).astype(np.uint8))


@pytest.mark.parametrize('release', RELEASES, ids=lambda r: r.name)
def test_descriptions_are_whole(release, tmp_path):
    module, _, name = release.reader.rpartition('.')
    assert callable(getattr(importlib.import_module(module), name))
    assert all((release.url, release.access, release.licence, release.citation)) and release.table.index.is_unique
    assert set(check_release(tmp_path, release).state) <= {'missing', 'not there'}


# ---------------------------------------------------------------- pixels, against the original's

@pytest.mark.parametrize('name', ['tall', 'wide', 'square', 'float_tall'])
def test_pad_and_resize_is_the_originals(name):
    z = np.load(golden('xvl/image_preprocess.npz'))
    np.testing.assert_array_equal(pad_resize(z[name], 48), z[f'{name}_to_48'])
    if z[name].dtype == np.uint8:
        np.testing.assert_array_equal(preprocess(z[name], 'xvl_v1', (48, 48)).pixels, z[f'{name}_to_48'])


def test_equalised_last_is_the_originals():
    z = np.load(golden('xvl/image_preprocess.npz'))
    out = preprocess(z['dcm2jpg_in'], 'chexzero_equalised_v1')
    np.testing.assert_array_equal(out.pixels, z['dcm2jpg_out'])
    assert out.pixels.shape == PROFILES['chexzero_equalised_v1'].size and not out.trouble


def plain_resize(img, size):
    "The original's function in plain words: the longer side is filled, the other rounded down, black around."
    h, w = img.shape
    new = (size, int(float(w)*(size/float(h)))) if h >= w else (int(float(h)*(size/float(w))), size)
    small = cv2.resize(img, new[::-1], interpolation=cv2.INTER_AREA)
    spare = [size - n for n in new]
    return np.pad(small, [(s//2, s - s//2) for s in spare])


def test_pad_and_resize_at_many_sizes():
    rng = np.random.default_rng(0)
    for _ in range(60):
        h, w, size = rng.integers(20, 130, 3)
        img = rng.integers(0, 256, (h, w)).astype(np.uint8)
        np.testing.assert_array_equal(preprocess(img, 'xvl_v1', (int(size), int(size))).pixels, plain_resize(img, int(size)))


def test_published_profiles_stay():
    "A published profile is never changed: their fields as they stood when they were published."
    fields = ('border', 'crop', 'grey', 'aspect', 'side', 'dtype', 'size')
    told = {n: tuple(getattr(p, f) for f in fields) for n, p in PROFILES.items()}
    assert told['lovt_equalised_v1'] == (0, 'none', 'equalise', 'pad', 'centre', 'uint8', (224, 224))
    assert told['mammo_clip_v1'] == (5, 'paper', 'minmax', 'stretch', 'chest', 'uint8', (1520, 912))
    assert told['xvl_v1'] == (0, 'none', 'keep', 'pad_floor', 'centre', 'uint8', (512, 512))
    assert told['chexzero_equalised_v1'] == (0, 'none', 'equalise_last', 'stretch', 'chest', 'uint8', (320, 320))


def test_equalised_last_keeps_depth_and_direction():
    deep = (film().astype(np.float64)*16).astype(np.uint16)
    stored = StoredImage(deep, bits_stored=12)
    out = equalised_last(stored, (64, 64))
    small = cv2.resize(deep, (64, 64), interpolation=cv2.INTER_LINEAR).astype(float)
    plain = ((small - small.min())/(small.max() - small.min())*255).astype(np.uint8) # min-max at the file's own depth, then 8 bits
    np.testing.assert_array_equal(out, cv2.equalizeHist(plain))
    inverted = equalised_last(StoredImage(deep, bits_stored=12, photometric='MONOCHROME1'), (64, 64))
    assert np.corrcoef(out.ravel(), inverted.ravel())[0, 1] < -.99
    box = preprocess(deep, 'chexzero_equalised_v1', (96, 24), [[10, 10, 20, 20]]).boxes
    np.testing.assert_allclose(box, [[5, 20, 10, 40]])


def test_pixels_that_are_none():
    for profile in ('xvl_v1', 'chexzero_equalised_v1'):
        with pytest.raises(DataError, match='constant'): preprocess(np.full((40, 40), 9, np.uint8), profile, (32, 32))
        assert 'posterised' in preprocess((film()//60*60).astype(np.uint8), profile, (48, 48)).trouble
    assert 'nearly black' in preprocess((film()/40).astype(np.uint8), 'xvl_v1', (48, 48)).trouble
    dot = np.zeros((640, 640), np.uint8); dot[5, 5] = 200 # lost when it is made smaller: nothing is left to be seen
    with pytest.raises(DataError, match='constant'): preprocess(dot, 'chexzero_equalised_v1', (32, 32))
    with pytest.raises(DataError, match='no numbers'): pad_resize(np.full((9, 9), np.nan, np.float32))
    with pytest.raises(TypeError, match='float64'): pad_resize(np.eye(9))
    with pytest.raises(ValueError, match='256 greys'): get_profile(Profile('x', grey='equalise_last', dtype='uint16'))


def test_real_radiographs_through_both_profiles():
    index = pd.read_csv(sample('openi_images/index.csv'))
    for path in index.image_path[::150]:
        image = read_image(sample(f'openi_images/{path}'), colour='luma')
        for profile, size in (('xvl_v1', (512, 512)), ('chexzero_equalised_v1', (320, 320))):
            out = preprocess(image, profile)
            assert out.pixels.shape == size and not out.trouble
        counts = np.bincount(out.pixels.ravel(), minlength=256)
        share = np.cumsum(counts)/out.pixels.size
        assert np.abs(share[counts > 0] - np.flatnonzero(counts)/255).max() < .25 # greys are about equally frequent


# ---------------------------------------------------------------- an array beside a table

@pytest.fixture
def stand_in(monkeypatch):
    "h5py where it is not installed: a module that opens an .npz under another name."
    if importlib.util.find_spec('h5py'): return
    class File(dict):
        def __init__(self, path, mode): super().__init__(np.load(path)); self.closed = False
        def close(self): self.closed = True
    module = types.ModuleType('h5py'); module.File = File
    module.__spec__ = importlib.util.spec_from_loader('h5py', None)
    monkeypatch.setitem(sys.modules, 'h5py', module)


def write_h5(path, **arrays):
    try: import h5py
    except ImportError: h5py = None
    if h5py is None or not hasattr(h5py, '__version__'):
        with open(path, 'wb') as f: np.savez(f, **arrays)
        return
    with h5py.File(path, 'w') as f:
        for k, v in arrays.items(): f[k] = v


def mimic_lines(n):
    name = lambda i: f'files/p10/p{10000000 + i//2}/s{50000000 + i}/d{i}.jpg'
    return pd.DataFrame([dict(split=('train', 'train', 'validate', 'test')[i % 4], findings='', impression=f'Finding number {i}.', views='PA',
                              dicom_id=f'd{i}', filename=name(i)) for i in range(n)])


def write_mimic(root, table, n=None, name='cxr.npy'):
    root.mkdir(exist_ok=True)
    table.to_csv(root/'mimic_impressions_final.csv', index=False)
    cube = np.stack([film(i) for i in range(len(table) if n is None else n)])
    np.save(root/name, cube) if name.endswith('.npy') else write_h5(root/name, cxr=cube)
    return cube


@pytest.mark.parametrize('name', ['cxr.npy', 'cxr.h5'])
def test_mimic_array(tmp_path, name, stand_in):
    table = mimic_lines(8)
    table.loc[1, 'impression'], table.loc[2, 'impression'], table.loc[3, 'views'], table.loc[4, 'filename'], table.loc[5, 'split'] = 'NONE', np.nan, 'LATERAL', 'd4.jpg', 'x'
    table.loc[6, 'dicom_id'] = 'd0'
    cube = write_mimic(tmp_path/'m', table, name=name)
    source = usable(read_mimic_array(tmp_path/'m', tmp_path/'files'), tmp_path/'files')
    assert source.records.image_id.tolist() == ['d0', 'd7'] and source.records.patient_id.tolist() == ['p10000000', 'p10000003']
    assert source.records.split.tolist() == ['train', 'test'] and source.records.exam_id[0] == 's50000000'
    assert kinds(source) == {'image without a report': 2, 'other view': 1, 'row without a patient': 1, 'unknown split': 1, 'image listed twice': 1}
    assert (source.report.read, source.report.passed) == (8, 1)
    stored = cv2.imread(str(tmp_path/'files'/source.records.image_path[1]), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored, np.rint(cube[7]).astype(np.uint8)) # row 7, not the second one that was kept
    usable(read_mimic_array(tmp_path/'m', text='optional'))


@pytest.mark.parametrize('rows, images', [(5, 4), (4, 5)])
def test_array_and_table_of_different_length(tmp_path, rows, images, stand_in):
    for name in ('cxr.npy', 'cxr.h5'):
        write_mimic(tmp_path/'m', mimic_lines(rows), images, name)
        with pytest.raises(DataError, match=f'the table has {rows} rows, {name} has {images} images.*filtered or sorted'): read_mimic_array(tmp_path/'m')
        (tmp_path/'m'/name).unlink()


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    (tmp_path/'cxr.h5').write_bytes(b'x')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, package=None: None)
    with pytest.raises(DataError, match=r'h5py is not installed.*medvl\[hdf5\]'): ArrayImages(tmp_path/'cxr.h5')


def test_real_hdf5(tmp_path):
    h5py = pytest.importorskip('h5py', reason='h5py, an extra, is not installed')
    if not hasattr(h5py, '__version__'): pytest.skip('h5py, an extra, is not installed')
    write_h5(tmp_path/'cxr.h5', cxr=np.stack([film(0), film(1)]), other=np.zeros(3))
    with ArrayImages(tmp_path/'cxr.h5') as images:
        np.testing.assert_array_equal(images.exact(1), film(1))
        assert len(images) == 2
    with pytest.raises(DataError, match="no data set 'images'.*cxr, other"): ArrayImages(tmp_path/'cxr.h5', 'images')
    (tmp_path/'cxr.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(50))
    with pytest.raises(DataError, match='no array can be read'): ArrayImages(tmp_path/'cxr.h5')


def test_rows_that_are_no_pictures(tmp_path):
    cube = np.stack([film(i) for i in range(5)])
    cube[1], cube[2, 0, 0], cube[3, 0, 0] = 7, np.inf, 300
    (tmp_path/'r').mkdir()
    np.save(tmp_path/'r'/'cxr.npy', cube)
    report = Report('x')
    with ArrayImages(tmp_path/'r'/'cxr.npy') as images:
        out = write_rows(images, range(5), list('abcde'), Derived(tmp_path/'r', tmp_path/'d'), report)
        with pytest.raises(DataError): same_length(images, pd.DataFrame({'a': range(4)}), 't.csv')
    assert list(out) == ['a', 'e'] and report.issues.row.tolist() == [1, 2, 3] and all(report.issues.resolution == 'left out')


def test_chexpert_test_set(tmp_path, stand_in):
    (tmp_path/'t').mkdir()
    table = pd.DataFrame({'Study': [f'CheXpert-v1.0/test/patient{64740 + i}/study1' for i in range(4)], **{f: [0, 1, 0, 1] for f in CHEXPERT_FINDINGS}})
    table.to_csv(tmp_path/'t'/'groundtruth.csv', index=False)
    write_h5(tmp_path/'t'/'chexpert_test.h5', cxr=np.stack([film(i) for i in range(4)]))
    source = usable(read_chexpert_test(tmp_path/'t', tmp_path/'files'), tmp_path/'files')
    assert set(source.records.split) == {'test'} and source.records.patient_id[1] == 'patient64741'
    assert [source.records[label_of(f)].tolist() for f in CHEXPERT_FINDINGS] == [[0, 1, 0, 1]]*14
    table.drop(columns='Study').to_csv(tmp_path/'t'/'groundtruth.csv', index=False) # some copies have labels only
    assert read_chexpert_test(tmp_path/'t').records.patient_id.nunique() == 4
    table.assign(Edema=3).to_csv(tmp_path/'t'/'groundtruth.csv', index=False)
    with pytest.raises(DataError, match="row 0, column Edema"): read_chexpert_test(tmp_path/'t')


# ---------------------------------------------------------------- lines, lists, pairs

def test_lines_are_read_by_key(tmp_path):
    rows = [dict(id=str(50000000 + i), split='train', label="'Edema', 'Pneumonia'", text=f'Report {i}. It is long.', img=f'x/p10/p{10000000 + i}/s1/a{i}.jpg') for i in range(3)]
    for i in range(3): put(tmp_path/'img'/f'a{i}.jpg', i)
    one = tmp_path/'Train.jsonl'
    one.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    first = usable(read_medvill(tmp_path), tmp_path)
    one.write_text(''.join(json.dumps(dict(sorted(r.items(), reverse=True))) + '\n' for r in rows))
    again = read_medvill(tmp_path)
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.records.label_edema.tolist() == [1, 1, 1] and first.records.label_fracture.tolist() == [0, 0, 0]
    assert read_medvill(tmp_path, rule='stated').records.label_fracture.isna().all()
    assert first.records.patient_id.tolist() == [f'p{10000000 + i}' for i in range(3)] and not first.report.remarks
    one.write_text(json.dumps({**rows[0], 'text': None}) + '\n' + json.dumps(rows[1]) + '\n' + json.dumps(rows[1]) + '\n' + json.dumps({**rows[2], 'img': 'q.jpg'}))
    assert kinds(usable(read_medvill(tmp_path))) == {'image without a report': 1, 'image listed twice': 1, 'image is absent': 1}
    one.write_text(json.dumps(rows[0])[:-9])
    with pytest.raises(DataError, match='row 0.*no JSON'): read_medvill(tmp_path)
    one.write_bytes(b'\xff\xfe')
    with pytest.raises(DataError, match='UTF-8'): read_lines(one)


def test_caption_draw():
    text = ' '.join(f'Finding {i}, on the left.' for i in range(15))
    drawn = {draw_caption(text, 0, s) for s in range(10)}
    assert len(drawn) > 8 and draw_caption(text, 0, 3) == draw_caption(text, 0, 3) != draw_caption(text, 1, 3)
    for caption in drawn:
        parts = caption_sentences(caption)
        assert len(parts) == 10 == len(set(parts)) and set(parts) <= {f'finding {i} on the left' for i in range(15)} and caption.endswith('left.')
    plain, rng = text.split('.'), random.Random(5) # the original's: from the global generator, fragments of less than three letters dropped
    parts = [p.removeprefix(' ') for p in plain if len(p) >= 3]
    assert draw_caption(text, rng=random.Random(5)) == pre_caption('. '.join(rng.sample(parts, 10))) + '.'


@pytest.mark.parametrize('text', ['', None, float('nan'), '1. 2.', '..'])
def test_empty_reports(text):
    assert draw_caption(text, 0, 1) == '' and caption_sentences(pre_caption(text)) == [] and named_findings('') == []


def test_reports_longer_than_the_positions():
    "A caption ends after its words; the tokens end at the positions, with their last special token."
    from medvl.data.text.tokens import build_wordpiece, tokenise
    text = ' '.join(f'Sentence {i} says that the lungs are clear.' for i in range(90))
    assert len(pre_caption(text).split(' ')) == 120 and len(shuffle_sentences(pre_caption(text), 1).split(' ')) <= 120
    tokenizer = build_wordpiece([text], 200)
    ids = [int(i) for i in np.asarray(tokenise(tokenizer, [pre_caption(text)], 32)[0]) if int(i) != tokenizer.pad_token_id]
    assert len(ids) == 32 and (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    with pytest.raises(DataError, match='has no token. Leave out samples without a report'): tokenise(tokenizer, [''], 32)


def test_openi_selected_and_impressions(tmp_path):
    for n in ('CXR1_IM-0001-3001', 'CXR1_IM-0001-4001', 'CXR2_IM-0002-1001', 'CXR4_IM-0004-1001'): put(tmp_path/'NLMCXR_png'/f'{n}.png')
    line = lambda i, label, text, img: json.dumps(dict(id=str(i), label=label, text=text, img=img)) + '\n'
    (tmp_path/'Test_selected.jsonl').write_text(line(1, "'Cardiomegaly', 'Edema'", 'Large heart.', '/8TB/1_IM-0001-4001.dcm.png') + line(2, "'No Finding'", '', '/8TB/2_IM-0002-1001.dcm.png')
                                                + line(3, "'No Finding'", 'Clear.', '/8TB/3.png') + line(4, "'Odd Thing'", 'Clear.', '/8TB/4.png'))
    source = usable(read_openi_selected(tmp_path), tmp_path)
    assert source.records.image_id.tolist() == ['CXR1_IM-0001-4001', 'CXR4_IM-0004-1001'] and set(source.records.split) == {'test'}
    assert {'image without a report': 1, 'image is absent': 1, 'unknown finding': 1}.items() <= kinds(source).items()
    (tmp_path/'openi_impressions.csv').write_text('filename,impression\n/x/1_IM-0001-3001.dcm.png,Large heart.\n/x/1_IM-0001-4001.dcm.png,Large heart.\n'
                                                  '/x/2_IM-0002-1001.dcm.png,\n/x/2_IM-0002-1001.dcm.png,\n/x/4_IM-0004-1001.dcm.png,XXXX normal.\n')
    source = usable(read_openi_impressions(tmp_path), tmp_path)
    assert source.records.patient_id.tolist() == ['CXR1', 'CXR4'] and (source.report.read, source.report.passed) == (5, 1) and source.report.merged
    with pytest.raises(DataError, match='none of 5'): read_openi_impressions(tmp_path, guess='none')
    with pytest.raises(DataError, match='Test_selected'): read_openi_selected(tmp_path/'NLMCXR_png')


def test_openi_lists_of_the_real_studies(tmp_path):
    "The list as Medical X-VL ships it, made again from the studies that are here: 226 of its 287."
    studies = pd.read_csv(sample('openi_images/studies.csv'))
    index = pd.read_csv(sample('openi_images/index.csv'))
    reports = pd.read_csv(sample('reports/openi_reports.csv')).set_index('uid').fillna('')
    chosen = studies[studies.in_test_selected == 1]
    (tmp_path/'images').symlink_to(sample('openi_images/images'))
    (tmp_path/'indiana_projections.csv').write_text('uid,filename,projection\n' + ''.join(f'{u},{i}.dcm.png,{p}\n' for u, i, p in zip(index.uid, index.image_id, index.projection)))
    (tmp_path/'Test_selected.jsonl').write_text(''.join(json.dumps(dict(
        id=str(u), label=label, text=reports.findings[u] or reports.impression[u], img=f'/8TB_hdd/openi/{u}.dcm.png')) + '\n' for u, label in zip(chosen.uid, chosen.test_selected_label)))
    source = usable(read_openi_selected(tmp_path), tmp_path)
    assert len(source.records) == 226 == len(chosen) and set(index.set_index('image_id').projection[source.records.image_id]) == {'Frontal'}
    assert source.records.label_no_finding.sum() == chosen.test_selected_label.str.contains('No Finding').sum() > 90
    assert source.records.label_cardiomegaly.sum() == chosen.test_selected_label.str.contains("'Cardiomegaly'").sum()
    frontal = index[index.projection == 'Frontal']
    pd.DataFrame({'filename': '/8TB_hdd/openi/images/images_normalized/' + index.image_id + '.dcm.png', 'impression': index.impression}).to_csv(tmp_path/'openi_impressions.csv', index=False)
    source = usable(read_openi_impressions(tmp_path), tmp_path)
    assert source.report.read == len(index) and source.report.passed == (index.projection == 'Lateral').sum()
    assert len(source.records) + sum(source.report.aside.values()) == len(frontal) and len(source.records) > 800


def test_findings_of_impressions(tmp_path):
    stored = json.loads(golden('xvl/error_generator_mimic_synthetic.json').read_text())['pair']
    (tmp_path/'entire_pair_final.json').write_text(json.dumps(stored))
    assert read_pairs(tmp_path/'entire_pair_final.json') == stored
    state = dict(positive='1.0', probable='-1.0', negative='0.0')
    rows = [{'study_id': str(i), **{w.partition('_')[2]: state[w.partition('_')[0]] for w in words}} for i, words in enumerate(stored.values())]
    said = pd.DataFrame({'study_id': [f's{i}' for i in range(len(stored))], 'impression': list(stored)})
    made, report = finding_pairs(said, pd.DataFrame(rows).fillna(''))
    assert {t: set(w) for t, w in made.items()} == {t: set(w) for t, w in stored.items()} and balanced(report).kept == len(stored)
    assert finding_words(pd.Series({f: -1 for f in CHEXPERT_FINDINGS})) == [f'probable_{f}' for f in CHEXPERT_FINDINGS]
    (tmp_path/'x.json').write_text('["a"]')
    with pytest.raises(DataError, match='no dictionary'): read_pairs(tmp_path/'x.json')


# ---------------------------------------------------------------- retrieval, targets, severity

def test_retrieval_sets(tmp_path):
    def row(i, finding): return {'Path': f'CheXpert-v1.0-small/train/patient{i:05d}/study1/view1_frontal.jpg', 'Sex': 'Male', 'Age': 60, 'Frontal/Lateral': 'Frontal',
                                 'AP/PA': 'AP', **{f: float(f == finding) for f in CHEXPERT_FINDINGS}}
    table = pd.DataFrame([row(i, FINDINGS_8[i % 8]) for i in range(16)])
    for i in range(15): put(tmp_path/table.Path[i], i)
    table.loc[1, 'Edema'], table.loc[1, 'Cardiomegaly'] = 1., 1.
    (tmp_path/'text-retrieval').mkdir()
    table.to_csv(tmp_path/'text-retrieval'/'candidate.csv', index=False)
    (tmp_path/'text-retrieval'/'query.csv').write_text('Variable,Text\n' + ''.join(f'{f},Signs of {f}.\n' for f in FINDINGS_8))
    source, queries = read_chexpert_8x200(tmp_path)
    usable(source, tmp_path)
    assert len(source.records) == 14 and kinds(source) == {'not exactly one finding': 1, 'image is absent': 1}
    assert queries.finding.tolist() == list(FINDINGS_8) and (source.records.filter(like='label_').sum(axis=1) == 1).all() and set(source.records['view']) == {'AP'}
    ids = tmp_path/'mimic_5x200.csv'
    pd.DataFrame({'dicom_id': ['d0', 'd2', 'd0', 'q'], **{f: [int(f == g) for g in ('Edema', 'Edema', 'Edema', 'Cardiomegaly')] for f in FINDINGS_5}}).to_csv(ids, index=False)
    write_mimic(tmp_path/'m', mimic_lines(4))
    listed, report = read_ids(ids)
    balanced(report)
    chosen = select_ids(read_mimic_array(tmp_path/'m'), listed, report)
    assert chosen.records.image_id.tolist() == ['d0', 'd2'] and chosen.records.impression.str.len().min() > 0 and chosen.records.target_finding.tolist() == ['Edema']*2
    assert set(report.issues.kind) == {'image listed twice', 'image is absent'}


def test_path_and_target(tmp_path):
    for i, n in enumerate(('a/1.png', 'b/1.png', 'c/3.png')): put(tmp_path/'img'/n, i)
    (tmp_path/'t.csv').write_text('Path,Target\n/x/img/a/1.png,1\n/x/img/b/1.png,0\n/y/c/3.png,\n1.png,1\n')
    source = usable(read_path_target(tmp_path, 't.csv', 'pneumothorax', r'/([abc])/'), tmp_path)
    assert source.records.patient_id.tolist() == ['a', 'b', 'c'] and kinds(source) == {'image is absent': 1} # two files are called 1.png
    assert source.records.label_pneumothorax.tolist()[:2] == [1, 0] and np.isnan(source.records.label_pneumothorax[2])
    (tmp_path/'v.csv').write_text('Path,Target\nb/1.png,0.5\n')
    with pytest.raises(DataError, match='row 0, column Target'): read_path_target(tmp_path, {'valid': 'v.csv'}, 'x')
    (tmp_path/'v.csv').write_text('Path,Label\nb/1.png,1\n')
    with pytest.raises(DataError, match="'Target' is missing"): read_path_target(tmp_path, {'valid': 'v.csv'}, 'x')
    assert match_files(pd.Series(['C:\\data\\a\\1.png', '']), ['img/a/1.png', 'img/b/1.png']).tolist() == ['img/a/1.png', '']


def test_path_and_target_on_real_images(tmp_path):
    index = pd.read_csv(sample('nih_cxr/index.csv'))
    (tmp_path/'images').symlink_to(sample('nih_cxr/images'))
    pd.DataFrame({'Path': index.image_path, 'Target': index.cardiomegaly.astype(int)}).to_csv(tmp_path/'all.csv', index=False)
    source = usable(read_path_target(tmp_path, 'all.csv', 'cardiomegaly', r'(\d{8})_\d{3}'), tmp_path)
    assert len(source.records) == len(index) and source.records.patient_id.nunique() == index.patient_id.nunique()
    assert source.records.label_cardiomegaly.sum() == index.cardiomegaly.sum()


def test_covidx(tmp_path):
    for i, n in enumerate(('a b.png', 'c.png', 'd.jpg')): put(tmp_path/'data'/n, i)
    (tmp_path/'train_COVIDx8A.txt').write_text('1 a b.png COVID-19 cohen\n2 c.png normal rsna\n2 c.png normal rsna\n9 z.png normal rsna\n')
    (tmp_path/'test_COVIDx8A.txt').write_text('1 d.jpg pneumonia cohen\n')
    source = usable(read_covidx(tmp_path), tmp_path)
    assert source.records.set_index('image_id').label_covid.to_dict() == {'d': 0, 'a b': 1, 'c': 0} and source.records.patient_id.nunique() == 2
    assert kinds(source) == {'image listed twice': 1, 'image is absent': 1, 'patient in several splits': 1}


def test_severity_is_the_originals():
    z = np.load(golden('xvl/covid_severity.npz'))
    for name, score in zip('abc', z['brixia_scores']): np.testing.assert_array_equal(brixia_zones(score) > 0, z[f'brixia_{name}'])
    for name, cell in (('156', '156'), ('0', 0), ('missing', None)): np.testing.assert_array_equal(form_zones(cell), z[f'loc_{name}'])
    left, right = two_lungs(z['mask'])
    np.testing.assert_array_equal(left, z['left']); np.testing.assert_array_equal(right, z['right'])
    np.testing.assert_array_equal(severity_map(z['sev_arr'], z['mask'], reference=True), z['sev_map'])
    np.testing.assert_array_equal(zone_maxima(z['prob_map'][0, 0], z['mask'], reference=True), z['arr_from_map_max'][0])


def test_zones_go_with_the_lungs():
    "Ours moves with the lungs and covers them; the original's does neither."
    mask = np.load(golden('xvl/covid_severity.npz'))['mask']
    ours, shifted = zone_masks(mask), zone_masks(np.roll(mask, -8, 0))
    np.testing.assert_array_equal(np.roll(ours, -8, axis=2), shifted)
    assert (ours.sum(axis=(0, 1)) == (mask > 0)).all()
    theirs = zone_masks(mask, reference=True)
    assert not (np.roll(theirs, -8, axis=2) == zone_masks(np.roll(mask, -8, 0), reference=True)).all() and theirs.sum() < (mask > 0).sum()
    share = ours.sum(axis=(2, 3))/ours.sum(axis=(1, 2, 3), keepdims=False).reshape(-1, 1)
    rng = np.random.default_rng(0)
    for _ in range(10):
        ill = rng.integers(0, 2, (3, 2))
        np.testing.assert_array_equal(zone_maxima(severity_map(ill, mask), mask), ill)
        assert severity(ill) == ill.sum() and share.shape == (3, 2)
    assert np.isnan(severity_map(form_zones(None), mask)[mask > 0]).all() and (severity_map(form_zones(None), mask)[mask == 0] == 0).all()


def test_zones_of_real_lungs():
    "Every zone of a segmented pair of lungs has pixels, and a mask without lungs is told."
    index = pd.read_csv(sample('cxr/index.csv'))
    for path in index.mask_lung_vae.dropna()[::5]:
        mask = cv2.imread(str(sample(f'cxr/{path}')), cv2.IMREAD_GRAYSCALE)
        assert zone_masks(mask).any(axis=(2, 3)).all() and zone_masks(mask)[:, 0].any(axis=(0, 2)).sum() >= 6
    empty = [p for p in index.mask_lung_v7.dropna() if not cv2.imread(str(sample(f'cxr/{p}')), cv2.IMREAD_GRAYSCALE).any()]
    for path in empty[:2]:
        with pytest.raises(DataError, match='0 pieces, not two lungs'): zone_masks(cv2.imread(str(sample(f'cxr/{path}')), cv2.IMREAD_GRAYSCALE))


def test_severity_tables(tmp_path):
    for n in 'abc': put(tmp_path/f'{n}.png', ord(n))
    zones = {f'{k}{z}': ['2', '0', ''] for k in ('Mode', 'Mean', 'S-', 'J-') for z in 'ABCDEF'}
    pd.DataFrame({'Filename': ['a.dcm', 'b.dcm', 'c.dcm'], **zones}).to_csv(tmp_path/'t.csv', index=False)
    for form in ('mode', 'mean', 'senior', 'junior', ''):
        source = usable(read_severity(tmp_path, 't.csv', form), tmp_path)
        assert source.records.severity.tolist() == [6, 0] and kinds(source) == {'severity not stated': 1}
        assert (source.records[[f'label_{z}' for z in ZONES]].sum(axis=1) == source.records.severity).all()
    with pytest.raises(DataError, match="'BrixiaScore' is missing"): read_severity(tmp_path, 't.csv', 'score')
    (tmp_path/'fold2').mkdir(); (tmp_path/'c.png').rename(tmp_path/'fold2'/'c.png')
    (tmp_path/'f.csv').write_text('file_name,CXR_location\na.png,156\nc.png,0\n')
    assert usable(read_severity(tmp_path, 'f.csv'), tmp_path).records.fold.tolist() == [-1, 2]
    (tmp_path/'u.csv').write_text('Filename,BrixiaScore\na.png,4\n')
    with pytest.raises(DataError, match='row 0, column BrixiaScore.*not six digits'): read_severity(tmp_path, 'u.csv')
    assert set(FORMS) == {'score', 'mode', 'mean', 'senior', 'junior', 'report_form'}


# ---------------------------------------------------------------- questions

def test_real_questions():
    rad, slake = read_vqa_rad(sample('vqa_rad')), read_slake(sample('slake'), files='listed')
    for found in (rad, slake):
        assert list(found.table) == list(QUESTION_COLUMNS) and found.table.question_id.is_unique and (found.table.question != '').all() and (found.table.answer != '').all()
        assert balanced(found.report).kept == len(found.table)
    assert rad.table.split.value_counts().to_dict() == {'train': 2520, 'test': 371} and set(rad.table.organ) == {'chest', 'abd', 'head'}
    assert rad.table.closed.sum() > 1700 and rad.table.patient_id.str.startswith('case_').all()
    apart = read_vqa_rad(sample('vqa_rad'), by='image')
    assert not set(apart.table.patient_id[apart.table.split == 'test']) & set(apart.table.patient_id[apart.table.split == 'train'])
    assert (apart.table.split == 'test').sum() == 371 and len(apart.table) < len(rad.table) == apart.report.read
    chest = read_vqa_rad(sample('vqa_rad'), organs=('chest',))
    assert set(chest.table.organ) == {'chest'} and chest.report.passed == len(rad.table) - len(chest.table)
    assert kinds(slake) == {'no question, answer or image': 1}


def test_own_file_of_vqa_rad(tmp_path):
    rows = json.loads(sample('vqa_rad/VQA_RAD_Dataset_Public.json').read_text())
    (tmp_path/'VQA_RAD_Dataset_Public.json').write_text(json.dumps(rows[:300]))
    found = read_vqa_rad(tmp_path, files='listed')
    assert len(found.table) == 300 and set(found.table.phrase) <= {'freeform', 'para', 'frame'} and (found.table.split == 'test').any()
    rows[4]['answer_type'] = 'MAYBE'
    (tmp_path/'VQA_RAD_Dataset_Public.json').write_text(json.dumps(rows[:9]))
    with pytest.raises(DataError, match='row 4, column answer_type'): read_vqa_rad(tmp_path, files='listed')


# ---------------------------------------------------------------- the whole way

def test_from_array_to_batch(tmp_path):
    "Array and table, files, prepared folder, samples: the report of a row meets the picture of the same row; an empty report is told, a long one shortened."
    from medvl.data.samples.chest import ChestReportConfig, ChestReportDataset
    from medvl.data.text.tokens import build_wordpiece
    table = mimic_lines(6)
    table.loc[2, 'impression'] = ' '.join(f'Finding number {i} on the left.' for i in range(60))
    table.loc[3, 'impression'] = ''
    cube = write_mimic(tmp_path/'m', table)
    source = usable(read_mimic_array(tmp_path/'m', tmp_path/'files', text='optional'), tmp_path/'files')
    (tmp_path/'salt.txt').write_text('a salt for tests\n')
    prepared = prepare(source, tmp_path/'files', tmp_path/'prepared', profile='xvl_v1', size=(48, 48), salt=tmp_path/'salt.txt', jobs=1, backend='sequential')
    assert len(prepared.manifest) == 6
    tokenizer = build_wordpiece(table.impression.tolist(), 120)
    with pytest.warns(UserWarning):
        data = ChestReportDataset(prepared, tokenizer, ChestReportConfig(max_length=24), train=False)
    assert len(data) == 5 and len(data.shortened) == 1
    for k in range(5):
        one = data[0, k]
        number = int(next(w for w in ' '.join(one['sentences']).replace('.', '').split() if w.isdigit()))
        row = 2 if one['sample_id'] == data.shortened[0] else number
        np.testing.assert_allclose(np.asarray(one['images']).reshape(48, 48), np.rint(cube[row]), atol=1e-3)
