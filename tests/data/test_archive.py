"""An archive of one's own: what is joined, what is set aside and counted, who is one person, and that nobody changes sides when it grows."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from pydicom.uid import generate_uid
from typer.testing import CliRunner

import medvl.data.archive_files as files
from medvl.core.errors import DataError
from medvl.data.archive import deal_parts, index_archive
from medvl.data.dicom.write import write_dicom
from medvl.data.prepare.run import prepare
from medvl.data.releases.folder import read_folder
from medvl.data.source_split import split_source
from medvl.run.cli import app


class Archive:
    "An export that is made file by file."
    def __init__(self, base):
        self.root, self.table, self.salt = base/'export', base/'reports.csv', base/'salt.txt'
        self.root.mkdir()
        self.salt.write_text('a salt for tests\n')
        self.n = 0

    def add(self, patient, accession, name=None, folder='', **fields):
        "One film; every file has other pixels."
        self.n += 1
        y, x = np.mgrid[:64, :48]
        film = (250*np.clip(1.1 - (x/96)**2 - ((y - 32)/64)**2, 0, 1) + self.n % 7*x).astype(np.uint16)
        path = self.root/folder/f'{name or self.n}.dcm'
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 'L' if self.n % 2 else 'R'
        write_dicom(path, film if side == 'L' else film[:, ::-1].copy(), PatientID=patient, AccessionNumber=accession, **{'ViewPosition': 'CC', 'ImageLaterality': side, 'PatientAge': '052Y', **fields})
        return path

    def reports(self, *rows, header='accession,report_text'):
        self.table.write_text('\n'.join([header, *rows]) + '\n')
        return self.table

    def index(self, reports=True, **options): return index_archive(self.root, self.table if reports else None, salt=self.salt, **options)


@pytest.fixture
def archive(tmp_path): return Archive(tmp_path)


def why(found, what): return found.aside.reason[found.aside.what == what].value_counts().to_dict()


# ---------------------------------------------------------------- joining

def test_what_does_not_match_is_said_and_the_books_are_right(archive):
    for i in range(6): archive.add(f'p{i}', f'A{i}')
    archive.reports('A0,A mass.', 'A1,Clear.', 'A7,No image.', ',No key.', 'A8,No image.')
    found = archive.index()
    assert why(found, 'table row') == {'no image has it': 2, 'the key is empty': 1}
    c = found.counts
    assert (c['files'], c['images'], c['reports'], c['joined'], c['without_report']) == (6, 6, 5, 2, 4)
    assert '4 images have no report' in repr(found) and '5 reports: 2 joined, 0 merged, 3 set aside' in repr(found)
    only = archive.index(need_report=True)
    assert only.counts['images'] == 2 and why(only, 'file') == {'no report': 4}


def test_accession_numbers_that_repeat_in_the_table(archive):
    for i in range(3): archive.add(f'p{i}', f'A{i}')
    archive.reports('A0,Clear.', 'A0,Clear.', 'A1,A mass.', 'A1,No mass.', 'A2,A cyst.')
    found = archive.index()
    assert found.records.report_text.tolist() == ['Clear.', '', 'A cyst.'] and found.counts['merged'] == 1
    assert why(found, 'table row') == {'its key stands in several rows that differ': 2}


def test_an_accession_number_of_two_patients_tells_nothing(archive):
    archive.add('p0', 'A0'); archive.add('p1', 'A0'); archive.add('p2', 'A2')
    archive.reports('A0,A mass.', 'A2,Clear.')
    found = archive.index()
    assert found.records.report_text.tolist() == ['', '', 'Clear.'] and why(found, 'table row') == {'its key belongs to several patients': 1}
    assert found.counts['exams'] == 3 # of two patients, two exams


def test_an_accession_number_that_is_used_again_on_another_day(archive):
    "A placeholder, or numbers that begin anew each year: the exams stay apart by their study, and a report of that number is nobody's."
    first, again, third = (generate_uid() for _ in range(3))
    for study, day in ((first, '20200301'), (first, '20200301'), (again, '20220301')): archive.add('p0', 'A0', StudyInstanceUID=study, StudyDate=day)
    archive.add('p1', 'A1', StudyInstanceUID=third, StudyDate='20200301'); archive.add('p1', 'A1', StudyInstanceUID=generate_uid(), StudyDate='20200301') # two series of one exam
    archive.reports('A0,A mass.', 'A1,Clear.')
    found = archive.index()
    assert found.records.groupby('patient_id').exam_id.nunique().to_dict() == {'p0': 2, 'p1': 1} and found.counts['exams'] == 3
    assert found.records.exam_id[0] == found.records.exam_id[1] != found.records.exam_id[2]
    assert found.records.report_text.tolist() == ['', '', '', 'Clear.', 'Clear.'] and why(found, 'table row') == {'its key stands on exams of several days': 1}
    assert not {'20200301', '20220301'} & set(str(v) for v in found.records.to_numpy().ravel()) and '20220301' not in (archive.root/'index_scan.jsonl').read_text()


def test_column_names_in_capitals_are_names(archive):
    archive.add('p0', 'A0')
    archive.reports('A0;Clear.;2;A', header='Accession Number;Report;BIRADS;Density')
    found = archive.index(on='Accession Number')
    assert found.records[['report_text', 'birads', 'density']].iloc[0].tolist() == ['Clear.', '2', 'A']


def test_a_mistake_in_the_table_costs_no_scan(archive, monkeypatch, tmp_path):
    "The table is looked at before the files; what was looked at is kept where the join then fails."
    opened, real = [], files.file_facts
    monkeypatch.setattr(files, 'file_facts', lambda path, *a, **k: (opened.append(path.name), real(path, *a, **k))[1])
    for i in range(3): archive.add(f'p{i}', f'A{i}')
    archive.reports('A0,Clear.')
    with pytest.raises(DataError): archive.index(on='acession')
    with pytest.raises(DataError): archive.index(same=tmp_path/'none.csv')
    assert opened == []
    archive.reports('0,Clear.')
    with pytest.raises(DataError, match='not one of 1 reports'): archive.index()
    assert len(opened) == 3
    archive.reports('A0,Clear.')
    assert archive.index().counts['joined'] == 1 and len(opened) == 3 and not list(archive.root.glob('*.part.jsonl'))


def test_nothing_that_matches_is_an_error_that_shows_no_id(archive):
    archive.add('p0', 'A1234'); archive.add('p1', 'A1235')
    archive.reports('1234,Clear.', '1235,Clear.')
    with pytest.raises(DataError, match="looks like 'a9999', that of the table like '9999'") as e: archive.index()
    assert '1234' not in str(e.value)


def test_mistyped_columns(archive):
    archive.add('p0', 'A0')
    archive.reports('A0,Clear.')
    with pytest.raises(DataError, match="Did you mean 'accession'"): archive.index(on='acession')
    archive.reports('A0,Clear.', header='accession,befund')
    with pytest.raises(DataError, match='no column holds a report'): archive.index()
    assert archive.index(text='befund').records.report_text.tolist() == ['Clear.']
    with pytest.raises(ValueError, match='accession'): archive.index(field='acession')
    archive.reports(header='accession,report')
    with pytest.raises(DataError, match='no rows'): archive.index()


@pytest.mark.parametrize('column', ['patient_id', 'study_uid', 'file'])
def test_other_keys(archive, column):
    uid = generate_uid()
    archive.add('p0', 'A0', 'a', StudyInstanceUID=uid); archive.add('p1', '', 'b')
    archive.reports({'patient_id': 'p0', 'study_uid': uid, 'file': 'a.dcm'}[column] + ',Clear.', header=f'{column},report')
    assert archive.index(on=column).records.report_text.tolist() == ['Clear.', '']


def test_a_patient_with_several_exams_needs_the_accession_number(archive):
    archive.add('p0', 'A0'); archive.add('p0', 'A1'); archive.add('p1', 'A2')
    archive.reports('p0,Clear.', 'p1,A mass.', header='patient_id,report')
    found = archive.index(on='patient_id')
    assert found.records.report_text.tolist() == ['', '', 'A mass.'] and list(why(found, 'table row')) == ['the patient has several exams: join on the accession number']


def test_columns_come_along_and_names_stay_behind(archive):
    archive.add('p0', 'A0', PatientName='Meadow^Ivy', PatientBirthDate='19610304')
    archive.reports('A0,Ivy Meadow,A mass.,4,1,C,04.03.1961', header='accession,name,findings,birads,label_mass,density,born')
    found = archive.index()
    assert found.records[['findings', 'birads', 'label_mass', 'density']].iloc[0].tolist() == ['A mass.', '4', '1', 'C'] and 'name, born' in repr(found)
    for path in archive.root.glob('index*'):
        text = path.read_text().upper()
        assert 'MEADOW' not in text and '1961' not in text and path.stat().st_mode & 0o077 == 0, path.name


# ---------------------------------------------------------------- files

def test_every_kind_of_file_is_counted(archive):
    taken = archive.add('p0', 'A0')
    archive.add('p0', 'A0', ImageType=['DERIVED', 'PRIMARY', 'TOMO_2D'])
    for k in range(3): archive.add('p0', 'A0', folder='slices', ImageType=['DERIVED', 'PRIMARY', 'TOMOSYNTHESIS', 'NONE'], InstanceNumber=k)
    archive.add('p0', 'A0', SOPClassUID='1.2.840.10008.5.1.4.1.1.13.1.3', NumberOfFrames=40)
    archive.add('p0', 'A0', Modality='CT'); archive.add('p0', 'A0', ViewPosition=''); archive.add('', 'A0')
    shutil.copy(taken, archive.root/'copy.dcm')
    (archive.root/'viewer.exe').write_bytes(b'MZ')
    (archive.root/'torn.dcm').write_bytes(taken.read_bytes()[:400])
    (archive.root/'.hidden').write_text('no')
    found = archive.index(reports=False)
    told = why(found, 'file')
    assert found.counts['files'] == 12 and found.counts['images'] == 2 and sum(told.values()) == 10
    assert told['tomosynthesis: slices or projections'] == 4 and told['modality CT'] == 1 and told['no view in the header'] == 1 and told['no patient id'] == 1
    assert told['the same image as in another file'] == 1 and told['no DICOM file'] == 1 and sum('header' in k and 'view' not in k for k in told) == 1
    assert sorted(found.records.source) == ['archive', 'archive_synthetic'] and '4 × tomosynthesis' in repr(found)


def test_films_of_the_chest(archive):
    for i, view in enumerate(('PA', 'LL', '')): archive.add(f'p{i}', f'A{i}', Modality='DX', BodyPartExamined='CHEST', ViewPosition=view, ImageLaterality='')
    assert archive.index(reports=False).counts['images'] == 2
    found = archive.index(reports=False, view='FRONTAL')
    assert found.records['view'].tolist() == ['PA', 'LL', 'FRONTAL'] and set(found.records.laterality) == {''}


def test_nothing_to_take_and_nothing_there(archive, tmp_path):
    with pytest.raises(DataError, match='no file'): archive.index(reports=False)
    archive.add('p0', 'A0', Modality='US')
    with pytest.raises(DataError, match='none of 1 files is an image to take: modality US'): archive.index(reports=False)
    assert archive.index(reports=False, modalities=('US',)).counts['images'] == 1
    with pytest.raises(DataError, match='does not exist'): index_archive(tmp_path/'nowhere', salt=archive.salt)


def test_age_is_told_or_computed_and_capped(archive):
    archive.add('p0', 'A0', PatientAge='', PatientBirthDate='19600502', StudyDate='20240501'); archive.add('p1', 'A1', PatientAge='095Y'); archive.add('p2', 'A2', PatientAge='')
    assert archive.index(reports=False).records.age.tolist()[:2] == [63., 90.] and np.isnan(archive.index(reports=False).records.age.iloc[2])


# ---------------------------------------------------------------- growing

def test_patients_join_and_nobody_changes_sides(archive, monkeypatch):
    opened, real = [], files.file_facts
    monkeypatch.setattr(files, 'file_facts', lambda path, *a, **k: (opened.append(path.name), real(path, *a, **k))[1])
    for i in range(12): archive.add(f'p{i}', f'A{i}')
    archive.reports(*(f'A{i},Clear.' for i in range(40)))
    parts = archive.index().records.set_index('image_path').split
    assert set(parts) == {'train', 'valid', 'test'} and len(opened) == 12
    for i in range(30): archive.add(f'q{i}', f'A{i + 12}')
    for i in range(3): archive.add(f'p{i}', f'B{i}') # they come again
    later = archive.index()
    assert len(opened) == 12 + 33 # what was there is not opened again
    now = later.records.set_index('image_path').split
    assert (now[parts.index] == parts).all() and later.records.groupby('patient_id').split.nunique().max() == 1
    assert later.counts['new_patients'] == 30 and later.counts['exams'] == 45
    share = later.records.drop_duplicates('patient_id').split.value_counts(normalize=True)
    assert abs(share['train'] - .6) < .03 and abs(share['test'] - .25) < .03
    archive.index(view='PA')
    assert len(opened) == 45 + 45 # other settings: everything anew
    assert (archive.index().records.set_index('image_path').split[parts.index] == parts).all()


def test_a_patient_who_moves_to_another_id(archive):
    path = archive.add('p0', 'A0', SOPInstanceUID='1.2.3.4', StudyInstanceUID='1.2.3')
    for i in range(1, 8): archive.add(f'p{i}', f'A{i}')
    before = archive.index(reports=False).records
    path.unlink()
    archive.add('moved', 'A0', name='new place', SOPInstanceUID='1.2.3.4', StudyInstanceUID='1.2.3')
    archive.add('moved', 'A9')
    found = archive.index(reports=False)
    mine = found.records[found.records.image_path.isin(['new place.dcm', '10.dcm'])]
    assert set(mine.patient_id) == {'p0'} and set(mine.split) == {before.split[before.patient_id == 'p0'].iloc[0]} and len(mine) == 2
    assert 'one image under two ids' in repr(found)


def test_ids_that_turn_out_to_be_one_person(archive, tmp_path):
    for i in range(8): archive.add(f'p{i}', f'A{i}')
    parts = archive.index(reports=False).records.set_index('patient_id').split
    a, b = parts.index[parts == 'train'][0], parts.index[parts == 'test'][0]
    table = tmp_path/'same.csv'
    table.write_text(f'patient_id,same_as\n{a},{b}\n')
    with pytest.raises(DataError, match='1 persons have ids in several parts'): archive.index(reports=False, same=table)
    fresh = archive.index(reports=False, same=table, out=tmp_path/'fresh')
    assert fresh.records[fresh.records.image_path.str.endswith(('1.dcm', '8.dcm'))].shape[0] == 2 and fresh.counts['patients'] == 7
    table.write_text('patient,is\n')
    with pytest.raises(DataError, match='patient_id and same_as'): archive.index(reports=False, same=table)


def test_one_name_and_birth_date(archive, tmp_path):
    who = dict(PatientName='Hill^Eve', PatientBirthDate='19700101')
    archive.add('p0', 'A0', **who); archive.add('p1', 'A1', **who); archive.add('p2', 'A2', PatientName='Hill^Eve')
    found = archive.index(reports=False)
    assert found.records.patient_id.tolist() == ['p0', 'p0', 'p2'] and 'one name and birth date' in repr(found)
    assert archive.index(reports=False, apart=True, out=tmp_path/'apart').counts['patients'] == 3


def test_an_index_of_somebody_elses_is_not_overwritten(archive):
    archive.add('p0', 'A0')
    (archive.root/'index.csv').write_text('mine')
    with pytest.raises(DataError, match='did not write'): archive.index(reports=False)
    (archive.root/'index.csv').unlink()
    archive.index(reports=False)
    with open(archive.root/'index.csv', 'a') as f: f.write('\n')
    with pytest.raises(DataError, match='changed by hand'): archive.index(reports=False)
    (archive.root/'index.csv').unlink() # moved away: the parts are remembered
    archive.index(reports=False)


def test_dealing_is_fair_and_stable():
    for n in (1, 4, 13, 200):
        dealt = deal_parts([f'p{i}' for i in range(n)], {})
        count = pd.Series(dealt).value_counts()
        assert all(abs(count.get(s, 0) - f*n) <= 1 for s, f in zip(('train', 'valid', 'test'), (.6, .15, .25)))
        assert deal_parts([f'p{i}' for i in range(n)], {}) == dealt
    assert deal_parts(list('abcdefgh'), {}, seed=1) != deal_parts(list('abcdefgh'), {})


# ---------------------------------------------------------------- and then

def test_from_the_shell_to_a_prepared_folder_that_grows(archive, tmp_path, monkeypatch):
    "medvl index, prepare, new patients, medvl index, prepare with reuse: the same images, the same sides."
    monkeypatch.setenv('MEDVL_SALT', str(archive.salt))
    for i in range(8): archive.add(f'p{i}', f'A{i}')
    archive.reports(*(f'A{i},A mass in the left breast.' for i in range(12)))
    command = ['index', str(archive.root), '--reports', str(archive.table), '--on', 'accession', '-o', str(tmp_path/'idx'), '--jobs', '1']
    out = CliRunner().invoke(app, command)
    assert out.exit_code == 0 and '8 files: 8 images of 8 exams of 8 patients' in out.output and not (archive.root/'index.csv').exists()

    def ready(name, reuse=None):
        source = split_source(read_folder(tmp_path/'idx'))
        return prepare(source, tmp_path/'idx', tmp_path/name, size=(48, 32), jobs=1, salt=archive.salt, reuse=reuse)
    old = ready('old')
    for i in range(8, 12): archive.add(f'p{i}', f'A{i}')
    assert CliRunner().invoke(app, command).exit_code == 0
    new = ready('new', tmp_path/'old')
    assert len(old) == 8 and len(new) == 12
    side = new.manifest.drop_duplicates('patient_id').set_index('patient_id').split
    assert (side[old.manifest.patient_id] == old.manifest.split.to_numpy()).all()
    assert not {'p0', 'A0'} & set(new.manifest.astype(str).to_numpy().ravel()) and (new.manifest.report != '').all() # ids are hashed in preparation
    wrong = CliRunner().invoke(app, [*command[:4], '--on', 'nothing'])
    assert wrong.exit_code == 2 and 'nothing' in wrong.output
    assert json.loads((tmp_path/'idx'/'index.json').read_text())['parts'].keys() == {f'p{i}' for i in range(12)}
