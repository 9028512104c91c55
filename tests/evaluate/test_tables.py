"""Cells that people wrote, rows that must not vanish, and names that must not be repeated."""
import errno
import io
import json
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.core.paths import append_jsonl, neutral_cell, read_jsonl, restored_cell, write_csv
from medvl.data.cells import BIRADS_ORDER, age_years, birads_category, density_letter, side_letter, hide_names, without_text_of
from medvl.data.dicom.write import write_dicom
from medvl.data.releases.folder import read_folder
from medvl.data.phantom.breast_prepared import split_source
from medvl.data.prepare.run import prepare, read_journal, without_names
from medvl.data.releases.release import Part, Release, check_release, find_files, read_table
from medvl.data.schema import Report, alike_ids, read_csv

SIZE = (48, 32)


# cells -------------------------------------------------------------------------------------------------------------------------------------------
CERTAIN = {'3 - probably benign, 6 month follow-up': '3', '2 (stable since 5/2019)': '2', 'BI-RADS 4a/4b': '4', '0 incomplete': '0', 'IV': '4', 'Category 3': '3', 'Kategorie 4a': '4A', 'BI-RADS-Klasse 2': '2',
           '3 wahrscheinlich gutartig, Kontrolle in 6 Monaten': '3', '3 waarschijnlijk goedaardig, controle over 6 maanden': '3', '3 probablement bénin, contrôle dans 6 mois': '3', '4$3': '4', '3 and 5': '5',
           '4.0': '4', '4,0': '4', 'BIRADS 0': '0', 'BI-RADS® 4C': '4C', 'ACR 2, BI-RADS 4': '4', 'Benign (2)': '2', 'probably benign': '3', 'BI-RADS 5th edition category 3': '3', '1 negative': '1',
           "BI-RADS: 2, mass 4 mm at 3 o'clock": '2', 'BI-RADS 3, 6 month follow-up': '3', 'left 2, right 2': '2', '6 - known cancer': '6', 'IVb': '4B', 'nan': '', '': ''}
NOT_CERTAIN = ['6 month', '5/2019', '3/4', '3-4', '3 or 4', 'BI-RADS 3 or 4', '4?', 'not 4', 'previously 4', 'upgraded from 3', 'BI-RADS 2 (previously BI-RADS 4)', '4 - probably benign', '2 masses', '2 benign masses',
               'B3', '7', '-1', '>3', '1 year', '6-12 months', '2 right, 4 left', 'see report', 'BI-RADS', '12', '4 of 6', '0-6', '3 (2)', '2, 4', 'two views', '12.03.2019', '4D', '3D']


@pytest.mark.parametrize('text', CERTAIN)
def test_certain_categories(text): assert birads_category(text) == birads_category(text.lower()) == birads_category(f' {text} ') == CERTAIN[text]


@pytest.mark.parametrize('text', NOT_CERTAIN)
def test_categories_that_are_not_certain(text): assert birads_category(text) == ''


def test_a_cell_of_both_sides_needs_the_rows_side():
    for text in ('2 right, 4 left', 'R: 2; L: 4', 'BI-RADS 2 right and BI-RADS 4 left', 'rechts 2, links 4'):
        assert [birads_category(text, s) for s in ('L', 'R', '')] == ['4', '2', ''], text
    assert birads_category('²') == birads_category('①') == '' and birads_category('4²') == birads_category('BI-RADS™ 4') == '4'
    assert birads_category('2 right', 'L') == '' and birads_category('BI-RADS 2 right breast', 'R') == '2'


words = st.sampled_from(['stable', 'follow-up', '6 month', 'in 12 months', 'since 5/2019', '4 mm', 'benign', 'suspicious', 'left', 'or', 'not', '?', '-', ',', '(', ')', '3', '5', 'IV', 'BI-RADS', 'ACR 2', '/', '4a', 'prior', '100%'])


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=7).map(' '.join) | st.text(max_size=30), st.sampled_from(['', 'L', 'R']))
def test_a_category_is_never_invented(text, side):
    "Whatever the cell: '' or a category, and one that stands in it as digit, letter or word."
    got, upper = birads_category(text, side), text.upper()
    assert got in ('', *BIRADS_ORDER)
    roman = {'1': 'I', '2': 'II', '3': 'III', '4': 'IV', '5': 'V', '6': 'VI'}
    assert not got or got[0] in ''.join(str(int(c)) if c.isdigit() and c.isdecimal() else c for c in upper) or re.search(rf'\b{roman.get(got[0], "-")}[ABC]?\b', upper) or re.search('BENIGN|NEGATIVE|SUSPICIOUS|INCOMPLETE', upper), text
    assert density_letter(text) in ('', *'ABCD') and not re.search(r'\d{4}', hide_names(text))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(['0', '1', '2', '3', '4', '4A', '4B', '4C', '5', '6']), st.sampled_from(['', 'BI-RADS ', 'Category ', 'BIRADS: ', 'Kat. ']), st.integers(1, 24),
       st.sampled_from(['month', 'months', 'mo', 'weeks', 'years', 'mm', 'Monate', 'maanden', 'mois']), st.sampled_from([' - follow-up in {}', ' ({} follow-up)', ', {}', ': mass of {}']))
def test_a_time_or_size_is_no_category(category, name, number, unit, tail):
    assert birads_category(name + category + tail.format(f'{number} {unit}')) == category
    assert birads_category(tail.format(f'{number} {unit}')) == ''


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BIRADS_ORDER), st.sampled_from(BIRADS_ORDER), st.sampled_from(['/', '-', ' or ', ' to ', ', ', ' vs ', ' bis ']), st.sampled_from(['', 'BI-RADS ']))
def test_two_categories_are_none(a, b, join, name):
    assert birads_category(f'{name}{a}{join}{b}') in (('',) if a[0] != b[0] else ('', '4', a))


def test_density_is_never_the_worst_class_by_accident():
    for text, letter in {'ACR c': 'C', 'heterogeneously': 'C', 'heterogeneously dense, which may obscure small masses': 'C', 'scattered areas of fibroglandular density': 'B', 'B - scattered fibroglandular': 'B', 'ACR Typ d': 'D', 'III': 'C', '2.0': 'B'}.items():
        assert density_letter(text) == letter, text
    for text in ('not extremely dense', 'b/c', '25-50%', 'scattered to heterogeneous', 'C or D', 'less than extremely dense', 'B (extremely dense)', 'fatty-glandular', 'dense', 'D?', '5', 'A few scattered'): assert density_letter(text) == '', text


def test_ages_and_sides():
    assert [age_years(t) for t in ('045Y', '45', '45Y', '45 years', '90+', '>89', '006M')] == [45, 45, 45, 45, 90, 90, .5] and age_years('unknown age') is None
    assert [side_letter(t) for t in ('Left', 'R', 'right breast', 'links', 'both')] == ['L', 'R', 'R', 'L', 'BOTH']


# a small folder ----------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Three small pictures, as bytes."
    yy, xx = np.mgrid[:90, :60]
    make = lambda k: np.uint8(((xx/(40 + 3*k))**2 + ((yy - 45)/35)**2 < 1)*(120 + 60*np.sin(xx/(5 + k))*np.cos(yy/9)))
    return [cv2.imencode('.png', make(k))[1].tobytes() for k in range(3)]


def write(root, rows, pictures, header='image_path,image_id,patient_id,laterality,view'):
    "An index of `rows`; files that are named there and begin with ok are pictures."
    root.mkdir(parents=True, exist_ok=True)
    (root/'index.csv').write_text('\n'.join([header, *rows]) + '\n')
    for k, row in enumerate(rows):
        path = root/row.split(',')[0]
        if not path.name.startswith('ok'): continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[k % len(pictures)])
    return root


def run(root, out, **options): return prepare(split_source(read_folder(root)) if options.pop('split', False) else read_folder(root), root, out, **dict(size=SIZE, backend='sequential', salt=out.parent/'salt') | options)


def rejected(data): return read_csv(data.folder/'rejects.csv')


def check_law(data, n):
    "Every row is prepared, or stands in rejects.csv."
    rows = data.info['rows']
    assert rows['read'] == n == rows['prepared'] + sum(rows['set_aside'].values()) + sum(rows['merged'].values()) and rows['prepared'] == len(data)


def test_the_case_of_the_months(tmp_path, pictures, capsys):
    rows = [f'ok{k}.png,i{k},P{k//2},{"LR"[k % 2]},CC,{cell}' for k, cell in enumerate(['0', '1', '2 (stable since 5/2019)', '"3 - probably benign, 6 month follow-up"', '3 or 4', 'Dr. Quillfeather'])]
    source = read_folder(write(tmp_path/'s', rows, pictures, 'image_path,image_id,patient_id,laterality,view,birads'))
    assert source.records.birads.tolist() == ['0', '1', '2', '3', '', '']
    issues = source.report.issues
    assert issues[issues.kind == 'birads not certain'][['item', 'row']].to_numpy().tolist() == [['birads', 4], ['birads', 5]] and not issues.detail.str.contains('Quill').any()
    data = prepare(source, tmp_path/'s', tmp_path/'out', size=SIZE, backend='sequential', salt=tmp_path/'salt')
    said = capsys.readouterr().out
    assert "birads: 2 cells rewritten (row 2: '2 (stable since 5/…)' is 2; row 3: " in said and 'birads: 2 cells not certain: not stated' in said and data.manifest.birads.tolist() == source.records.birads.tolist()


faults = st.sampled_from(['good', 'good', 'good', 'no patient', 'no view', 'side', 'twice', 'absent', 'long name', 'text', 'empty', 'climbs', 'age', 'label'])


@settings(max_examples=6, deadline=None)
@given(kinds=st.lists(faults, min_size=1, max_size=7))
def test_no_row_vanishes(pictures, kinds):
    "rows read = prepared + set aside + merged, and every row that is not prepared is in rejects.csv."
    rows = []
    for k, kind in enumerate(['good', *kinds]):
        cell = dict(path=f'ok{k}.png', id=f'i{k}', patient=f'P{k}', side='L', view='CC', age='50', label='1')
        cell |= {'no patient': dict(patient=''), 'no view': dict(view=''), 'side': dict(side='both'), 'twice': dict(id='same'), 'absent': dict(path=f'gone{k}.png'), 'long name': dict(path='x'*300 + f'{k}.png'),
                 'text': dict(path=f't{k}.png'), 'empty': dict(path=f'e{k}.png'), 'climbs': dict(path=f'../up{k}.png'), 'age': dict(age='999'), 'label': dict(label='7')}.get(kind, {})
        rows.append(','.join(cell.values()))
    with tempfile.TemporaryDirectory() as t, redirect_stdout(io.StringIO()) as screen:
        root = write(Path(t)/'s', rows, pictures, 'image_path,image_id,patient_id,laterality,view,age,label_mass')
        for k in range(len(rows)): (root/f't{k}.png').write_text('a letter'), (root/f'e{k}.png').touch()
        data = run(root, Path(t)/'out')
        check_law(data, len(rows))
        ids = [r.split(',')[1] for r in rows]
        left = rejected(data)
        assert sorted([*data.manifest.image_id, *left.image_id]) == sorted(ids)
        assert (f'{len(left)} set aside' in screen.getvalue()) == bool(len(left))


def test_a_lost_row_is_a_fault(tmp_path, pictures):
    source = read_folder(write(tmp_path/'s', ['ok0.png,a,P,L,CC', 'ok1.png,b,P,R,CC'], pictures))
    with pytest.raises(AssertionError, match='1 are not accounted for'): source.report.account(3, 2)
    half = source._replace(records=source.records.head(1))
    data = prepare(half, tmp_path/'s', tmp_path/'out', size=SIZE, backend='sequential', salt=tmp_path/'salt')
    assert data.info['rows'] == dict(read=2, prepared=1, merged={}, set_aside={}, not_chosen=1) # the caller's choice is named, too


@pytest.mark.parametrize('body', ['a.png,1,"open\nb.png,2,closed"\nc.png,3,x', 'a.png,1,"open\nb.png,2,"Normal."\nc.png,3,x', 'a.png,1,"open\nb.png,2,x\nc.png,3,y', 'a.png,1,"one\nb.png,2,two\nc.png,3,"\nd.png,4,x',
                                  'a.png,1,"5" mass"\nb.png,2,x', 'a.png,1,"open\nb.png,2,""\nc.png,3,"x"'])
@pytest.mark.parametrize('mark', [',', ';'])
def test_a_quote_that_swallows_rows(tmp_path, body, mark):
    path = tmp_path/'index.csv'
    path.write_text(('image_path,patient_id,report_text\n' + body + '\n').replace(',', mark))
    for read in [read_table] + [read_csv]*(mark == ','):
        with pytest.raises(DataError, match='quote') as e: read(path)
        assert e.value.row == 0 and str(path) in str(e.value) and e.value.fix


def test_cells_that_may_hold_lines(tmp_path):
    text = 'image_path,patient_id,report_text\na.png,1,"FINDINGS: no mass,\nno calcification, no distortion.\n\nIMPRESSION: 1, normal"\nb.png,2,"a ""quoted"" word, and 5"" more"\n'
    (tmp_path/'i.csv').write_text(text)
    assert len(read_csv(tmp_path/'i.csv')) == 2 and read_csv(tmp_path/'i.csv').report_text[1] == 'a "quoted" word, and 5" more'


def deny(monkeypatch, bad, code=errno.EACCES):
    "Let the system refuse every path for which `bad` is true, as it refuses a user without rights (tests may run as root)."
    import builtins
    def wrap(plain):
        def call(path, *args, **kwargs):
            if isinstance(path, (str, Path)) and bad(str(path)): raise OSError(code, os.strerror(code), str(path))
            return plain(path, *args, **kwargs)
        return call
    monkeypatch.setattr(builtins, 'open', wrap(open))
    monkeypatch.setattr(io, 'open', wrap(io.open))
    monkeypatch.setattr(os, 'scandir', wrap(os.scandir))


@pytest.mark.parametrize('code', [errno.EACCES, errno.EIO])
def test_files_that_cannot_be_read(tmp_path, pictures, monkeypatch, code):
    "An image is set aside, a mask alone is left out; a second call opens what is there."
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC,okm.png', 'ok1.png,b,P,R,CC,', 'ok2.png,c,P,L,MLO,'], pictures, 'image_path,image_id,patient_id,laterality,view,mask_path')
    (root/'okm.png').write_bytes(pictures[1])
    deny(monkeypatch, lambda p: p.endswith(('ok1.png', 'okm.png')), code)
    for _ in range(2):
        data = run(root, tmp_path/'out')
        left = rejected(data).set_index('image_id')
        assert data.manifest.image_id.tolist() == ['a', 'c'] and sorted(zip(left.index, left.stage)) == [('a', 'mask'), ('b', 'read')] and left.reason.str.contains(os.strerror(code)).all() and not left.reason.str.contains(str(tmp_path)).any()
        check_law(data, 3)


def test_folders_that_cannot_be_looked_into(tmp_path, pictures, monkeypatch):
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC', 'shut/ok1.png,b,P,R,CC'], pictures)
    plain = os.stat
    def stat(path, *args, **kwargs):
        if '/shut/' in str(path): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return plain(path, *args, **kwargs)
    monkeypatch.setattr(os, 'stat', stat)
    data = run(root, tmp_path/'out')
    assert rejected(data)[['image_id', 'stage']].to_numpy().tolist() == [['b', 'file']] and 'Permission denied' in rejected(data).reason[0]
    check_law(data, 2)


def test_folders_of_a_release_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ('a', 'b'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'x.dcm').write_bytes(b'x')
    deny(monkeypatch, lambda p: p.endswith('/b'))
    report = Report('r')
    assert find_files(tmp_path, ('*.dcm',), report) == ['a/x.dcm'] and find_files(tmp_path, ('*.dcm',), report)
    assert report.rejects.file.tolist() == ['b'] and len(report.remarks) == 1
    with pytest.raises(DataError, match='folder cannot be read'): find_files(tmp_path)
    table = check_release(tmp_path, Release('r', '', '', '', '', (Part('*.dcm', 'images', 2),), ''))
    assert table.state.tolist() == ['incomplete', 'unreadable']


def test_names_no_disk_holds(tmp_path, pictures):
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC'], pictures)
    records = pd.DataFrame([dict(image_path=p, image_id=f'i{k}', patient_id='P', laterality='L', view='CC') for k, p in enumerate(['ok0.png', 'x'*300, 'y'*5000, 'y\0.png', 'ok0.png/x', '\udcff.png', '.'])], dtype=object)
    data = prepare(records, root, tmp_path/'out', size=SIZE, backend='sequential', salt=tmp_path/'salt')
    assert rejected(data).image_id.tolist() == ['', 'i1', 'i2', 'i3', 'i4', 'i6'] and 'record 5' in rejected(data).reason[0] and rejected(data).reason.str.len().between(10, 200).all()
    check_law(data, 7)


def test_ids_that_differ_only_in_form(tmp_path, pictures, capsys):
    assert [r.split(':')[0] for r in alike_ids(pd.DataFrame({'patient_id': ['1', '1.0', 'x'], 'exam_id': ['0012', '12', 'e'], 'image_id': ['a', 'b', 'A']}))] == ['patient_id', 'exam_id', 'image_id']
    assert not alike_ids(pd.DataFrame({'patient_id': ['1', '1', '10', '01x', '100']}))
    run(write(tmp_path/'s', ['ok0.png,a,0012,L,CC', 'ok1.png,b,12,R,CC'], pictures), tmp_path/'out')
    assert 'patient_id: 2 ids differ from another only in form' in capsys.readouterr().out


def test_too_small_to_be_split_is_said(tmp_path, pictures, capsys):
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC', 'ok1.png,b,Q,R,CC'], pictures)
    data = run(root, tmp_path/'out', split=True)
    assert 'split: nobody is in ' in capsys.readouterr().out and any('2 patients' in r for r in data.info['remarks'])
    run(root, tmp_path/'whole')
    assert 'split: 2 patients cannot be divided into train, valid and test' in capsys.readouterr().out


@pytest.mark.parametrize('place', ['/dev/null/prepared', '/sys/medvl/prepared'])
def test_folders_that_nothing_can_be_written_to(tmp_path, pictures, place):
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC'], pictures)
    with pytest.raises(DataError, match='nothing can be written there') as e: prepare(read_folder(root), root, place, size=SIZE, backend='sequential', salt=tmp_path/'salt')
    assert place in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(DataError, match='nothing can be written there'): prepare(read_folder(root), root, tmp_path/'out', size=SIZE, backend='sequential', salt=f'{place}/salt')


# journals and tables -----------------------------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet=st.characters() | st.sampled_from('\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\udcff'), max_size=8), max_size=5))
def test_journals_split_at_line_feeds_alone(texts):
    with tempfile.TemporaryDirectory() as t:
        for k, text in enumerate(texts): append_jsonl(Path(t)/'j', {'k': k, 'text': text})
        assert [r['text'] for r in read_jsonl(Path(t)/'j')] == texts
        if texts: assert len((Path(t)/'j').read_text().splitlines()) == len(texts)


def test_a_journal_of_an_older_version(tmp_path):
    "Before, U+0085 stood in a line as it is."
    (tmp_path/'j').write_text(json.dumps({'reason': 'a\x85b\u2028c'}, ensure_ascii=False) + '\n', encoding='utf-8')
    assert read_jsonl(tmp_path/'j') == [{'reason': 'a\x85b\u2028c'}]


@pytest.mark.parametrize('odd', ['garbage', '5', '[]', '{"number": "x"}', '{"number": 1}', '{"number": -3, "stage": "", "reason": "", "notes": [], "sums": []}', '['*5000])
def test_an_odd_line_does_not_end_a_folder(tmp_path, pictures, odd):
    root = write(tmp_path/'s', [f'ok{k}.png,i{k},P{k},L,CC' for k in range(4)], pictures)
    whole = run(root, tmp_path/'whole')
    out = tmp_path/'out'
    run(root, out)
    lines = (out/'journal.jsonl').read_text().split('\n')
    for name in ('dataset.json', 'manifest.parquet'): (out/name).unlink()
    (out/'journal.jsonl').write_text('\n'.join([lines[0], odd, *lines[1:]]))
    for store in ('images',): # as a kill between the rows would leave it
        for part in ('pixels', 'checksums'): os.replace(out/store/f'{part}.bin', out/store/f'{part}.part')
        (out/store/'store.json').unlink()
        (out/store/'writing.json').write_text(json.dumps(dict(format='medvl-store-1', n=4, height=SIZE[0], width=SIZE[1], dtype='uint8')))
    assert len(read_journal(out/'journal.jsonl')) == 1 and run(root, out).digest == whole.digest


def test_a_control_character_in_a_header(tmp_path, pictures):
    "The file is set aside, and every later preparation of the folder works (case photometric_0x85)."
    root = write(tmp_path/'s', ['ok0.png,a,P,L,CC', 'bad.dcm,b,P,R,CC', 'ok2.png,c,P,L,MLO'], pictures)
    write_dicom(root/'bad.dcm', np.arange(80*60, dtype=np.uint16).reshape(80, 60), PhotometricInterpretation='MONOCHROME2')
    (root/'bad.dcm').write_bytes((root/'bad.dcm').read_bytes().replace(b'MONOCHROME2', b'MONO\x85\xe2\x80\xa8OME2'))
    for _ in range(2): assert run(root, tmp_path/'out').manifest.image_id.tolist() == ['a', 'c']
    assert len((tmp_path/'out'/'rejects.csv').read_text().splitlines()) == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from("=+-@'\t\r\na1 ,\""), max_size=6), min_size=1, max_size=6))
def test_no_exported_cell_is_a_formula_and_our_readers_undo_it(cells):
    for c in cells: assert restored_cell(neutral_cell(c)) == c
    with tempfile.TemporaryDirectory() as t:
        path, cells = Path(t)/'t.csv', [c.replace('\r', '') for c in cells] # a lone carriage return ends a line in CSV
        write_csv(pd.DataFrame({'n': range(len(cells)), 'cell': cells}), path)
        for raw in pd.read_csv(path, dtype=str, keep_default_na=False).cell: assert not re.match(r'[=+\-@\t]', raw) or re.fullmatch(r'[+-]?(\d+\.?\d*|\.\d+)', raw) or len(raw) == 1
        assert [c.strip() for c in read_csv(path)['cell']] == [c.strip() for c in cells]


def test_formulas_in_tables(tmp_path, pictures):
    data = run(write(tmp_path/'s', ['ok0.png,a,P,L,CC', '=cmd.png,=HYPERLINK(1),P,L,CC', '-x.png,@y,P,L,CC'], pictures), tmp_path/'out')
    raw = (data.folder/'rejects.csv').read_text()
    assert "\n'=cmd.png,'=HYPERLINK(1)," in raw and "\n'-x.png,'@y," in raw and rejected(data).image_id.tolist() == ['=HYPERLINK(1)', '@y']


# names -------------------------------------------------------------------------------------------------------------------------------------------
NAME, OTHER = 'Quillfeather', 'Zsuzsanna'


def everything(folder):
    "All that was written, as text: bytes as they are, and what Parquet packs."
    out = {}
    for path in Path(folder).rglob('*'):
        if not path.is_file(): continue
        out[str(path.relative_to(folder))] = str(path.relative_to(folder)) + path.read_bytes().decode('latin-1') + (pd.read_parquet(path).to_csv() if path.suffix == '.parquet' else '')
    return out


def plant(root, pictures, given_ids):
    "A name in every cell, header and file that is not stored by design (reports are)."
    rows = ['image_path,patient_id,exam_id,laterality,view,age,birads,density,pathology,mask_path' + (',image_id' if given_ids else '')]
    def row(path, patient=f'{NAME}_{OTHER}', exam='E', side='L', view='CC', age='50', birads='2', density='B', pathology='benign', mask=''):
        rows.append(','.join([path, patient, exam, side, view, age, birads, density, pathology, mask, *([f'i{len(rows)}'] if given_ids else [])]))
    folder = f'{NAME}_{OTHER}'.upper()
    (root/folder).mkdir(parents=True)
    for k in range(7): (root/f'ok{k}.png').write_bytes(pictures[k % 3])
    (root/folder/'okx.png').write_bytes(pictures[0])
    (root/f'{NAME.lower()}-{OTHER.lower()}.png').write_text(f'{NAME} {OTHER}, born 1955, dear colleague')
    (root/'m.png').write_text(f'Dear Dr {NAME}, this is no mask')
    row('ok0.png', birads=f'3 ({NAME})', density=f'C {NAME}', pathology=f'{NAME} benign', exam=f'{NAME} 1', mask='m.png')
    row('ok1.png', side=NAME); row('ok2.png', view=NAME); row('ok3.png', age=NAME); row('ok4.png', patient=''); row(f'{folder}/okx.png'); row(f'{folder}/gone.png'); row(f'{folder.title()}/gone2.png')
    row(f'{NAME.lower()}-{OTHER.lower()}.png'); row(f'../{NAME}.png'); row('ok5.png', patient='Q7', birads=f'4 or 5 {OTHER}')
    for k, tags in enumerate([dict(Rows=NAME), dict(PhotometricInterpretation=NAME), dict(PatientName=f'{NAME}^{OTHER}', WindowWidth='0', WindowCenter='1'), dict(PatientName=f'{NAME}^{OTHER}', PatientID=NAME)]):
        path = root/f'd{k}.dcm'
        write_dicom(path, np.arange(90*60, dtype=np.uint16).reshape(90, 60), **{k_: v for k_, v in tags.items() if k_ not in ('Rows', 'PhotometricInterpretation')})
        data = path.read_bytes()
        if 'Rows' in tags: data = data.replace(b'\x28\x00\x10\x00US\x02\x00\x5a\x00', b'\x28\x00\x10\x00LO' + len(NAME).to_bytes(2, 'little') + NAME.encode())
        if 'PhotometricInterpretation' in tags: data = data.replace(b'MONOCHROME2', NAME.upper().encode()[:11])
        path.write_bytes(data)
        row(path.name, patient=f'P{k}')
    (root/'index.csv').write_text('\n'.join(rows))
    (root/'boxes.csv').write_text(f'image_id,label,x0,y0,x1,y1\n{"i99" if given_ids else NAME},mass,1,2,3,4\n{"i1" if given_ids else "ok0"},mass,{NAME},2,3,4\n')
    return len(rows) - 1


@pytest.mark.parametrize('given_ids', [True, False])
def test_a_planted_name_is_nowhere(tmp_path, pictures, capsys, given_ids):
    n = plant(tmp_path/'s', pictures, given_ids)
    source = read_folder(tmp_path/'s')
    data = prepare(source, tmp_path/'s', tmp_path/'out', size=SIZE, backend='sequential', salt=tmp_path/'salt')
    assert len(data) >= 3 and len(rejected(data)) >= 10
    check_law(data, n)
    found = everything(data.folder) | {'screen': ''.join(capsys.readouterr()), 'issues': source.report.issues[source.report.issues.kind != 'file is absent'].drop(columns='item').to_csv(), 'report': repr(source.report)}
    for where, text in found.items():
        for name in (NAME, OTHER): assert name.lower() not in text.lower(), (where, text[max(0, text.lower().index(name.lower()) - 200):][:400])
    if not given_ids: assert not data.manifest.image_id.str.startswith('ok').any() and data.manifest.image_id.is_unique


def test_errors_repeat_no_name(tmp_path, pictures):
    header = 'image_path,image_id,patient_id,laterality,view'
    root = write(tmp_path/'s', [f'ok0.png,a,P,{NAME},CC'], pictures, header)
    with pytest.raises(DataError) as e: read_folder(root)
    assert NAME not in str(e.value) and e.value.row == 0 and e.value.column == 'laterality'
    (root/'letter.png').write_text(f'{NAME}, {OTHER}')
    write(root, [f'letter.png,a,{NAME},L,CC'], pictures, header)
    with pytest.raises(DataError, match='none of 1 files') as e: run(root, tmp_path/'out')
    assert NAME not in str(e.value)
    write(root, [f'ok0.png,a,{NAME},L,CC,train', f'ok1.png,b,{NAME},R,CC,test'], pictures, header + ',split')
    with pytest.raises(DataError, match=r'train \(row 0\), test \(row 1\)') as e: split_source(read_folder(root))
    assert NAME not in str(e.value)


def test_names_in_paths_whatever_their_case():
    salt = 'a secret of ours'
    for path in ('images/Meadow_Ivy/a.png', 'MEADOW^IVY.png', 'ivy-meadow/1.dcm', 'x/meadowivy.png', 'Meadow.png', 'müller_Meadow Ivy.png'):
        assert 'meadow' not in without_names(path, ('Meadow_Ivy', ''), salt).lower(), path
    assert without_names('Mu\u0308ller/a.png', ('Müller',), salt).endswith('/a.png') and 'ller' not in without_names('Mu\u0308ller/a.png', ('Müller',), salt)
    assert without_names('images/12/a.png', ('1', ''), salt) == 'images/12/a.png'


def test_reasons_repeat_no_file():
    assert 'eier' not in without_text_of("Rows is 'Meier'; Meier stands in it, MEIER too", b'....MEIER^ANNA....') and without_text_of("BitsStored is 12 of 'MONOCHROME2'.", b'') == "BitsStored is 12 of 'MONOCHROME2'."


def test_default_ids_are_hashed_and_boxes_follow(tmp_path, pictures):
    root = write(tmp_path/'s', [f'{OTHER}/ok_{NAME}.png,P,L,CC', f'ok1_{NAME}.png,P,R,CC'], pictures, 'image_path,patient_id,laterality,view')
    (root/'boxes.csv').write_text(f'image_id,label,x0,y0,x1,y1\nok_{NAME},mass,5,30,20,50\n')
    (root/'sentences.csv').write_text(f'exam_id,laterality,sentence,label,image_id,box\nP,L,a mass.,mass,ok_{NAME},0\n')
    data = run(root, tmp_path/'out')
    assert data.boxes.image_id.tolist() == data.manifest.image_id[:1].tolist() == data.sentences.image_id.tolist() and data.sentences.box.tolist() == [0]
    assert run(root, tmp_path/'again').manifest.image_id.tolist() == data.manifest.image_id.tolist() # the same salt, the same ids
    assert not any(NAME.lower() in text.lower() or OTHER.lower() in text.lower() for text in everything(tmp_path/'out').values())


def test_old_ages_are_capped(tmp_path, pictures):
    data = run(write(tmp_path/'s', ['ok0.png,a,P,L,CC,97', 'ok1.png,b,P,R,CC,089Y', 'ok2.png,c,P,L,MLO,90+', 'ok3.png,d,P,R,MLO,'], pictures, 'image_path,image_id,patient_id,laterality,view,age'), tmp_path/'out')
    assert data.manifest.age.tolist()[:3] == [90, 89, 90] and np.isnan(data.manifest.age[3])


def test_a_run_of_preparation_repeats_no_name(tmp_path, pictures):
    "All that `medvl run prepare` writes: notebook, report, journal, tables, log."
    from medvl.run.runner import run_experiment
    plant(tmp_path/'s', pictures, False)
    done = run_experiment('prepare', dict(data=str(tmp_path/'s'), height=48, width=32, jobs=1), outputs=tmp_path/'out')
    assert done.state == 'done'
    for where, text in everything(tmp_path/'out').items():
        for name in (NAME, OTHER): assert name.lower() not in text.lower(), (where, text[max(0, text.lower().index(name.lower()) - 300):][:600])
