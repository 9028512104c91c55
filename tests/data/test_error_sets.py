"""ReXErr-v1 and CorBenchX: what is read is written again to the byte; what is missing is named."""
import json

import pandas as pd
import pytest

from medvl.core.errors import DataError
from medvl.data.releases.error_sets import CORBENCHX_TYPES, error_pairs, kinds_in, read_corbenchx, read_rexerr, write_corbenchx, write_rexerr
from medvl.data.text.errors import ERROR_KINDS, ErrorGenerator, error_table

REPORT = dict(dicom_id="['a', 'b']", study_id='007', subject_id='3', original_report=' Heart, "large".\n\nNo effusion. ', error_report='Heart, "small".\r\nNA',
              errors_sampled="['Change Severity', 'Add Typo', 'False Prediction']")
SENTENCES = [dict(dicom_id='a', study_id='7', subject_id='3', original_sentence='No effusion.', error_sentence=t, error_present=p, error_type=k)
             for t, p, k in (('No effusion.', '0', ''), ('Effusion.', '1', 'False Prediction'), ('Compared to prior.', '2', 'nan'))]
REVIEW = dict(original_report='a', error_report='b', errors_sampled='[]', acceptable='Yes', comments='')
ROW = dict(image_path='physionet.org/files/p18/p18079244/s58587528/c6.jpg', input_report='Consolodation — left.', output_report='Consolidation — left.',
           error_type='Spelling Error', error_description='Misspelling "Consolidation".')


@pytest.mark.parametrize('level, rows', [('report', [REPORT, {**REPORT, 'error_report': ''}]), ('sentence', SENTENCES), ('review', [REVIEW])])
def test_rexerr_without_loss(level, rows, tmp_path):
    table = pd.DataFrame(rows, dtype=object).assign(extra='kept ')
    first = write_rexerr(table, tmp_path/'a.csv')
    read = read_rexerr(first)
    assert read.attrs['level'] == level and read.to_dict('records') == table.to_dict('records')
    assert write_rexerr(read, tmp_path/'b.csv').read_bytes() == first.read_bytes()


@pytest.mark.parametrize('gone', list(REPORT))
def test_rexerr_names_the_missing_column(gone, tmp_path):
    pd.DataFrame([{k: v for k, v in REPORT.items() if k != gone}]).to_csv(tmp_path/'a.csv', index=False)
    with pytest.raises(DataError, match=gone): read_rexerr(tmp_path/'a.csv', 'report')
    with pytest.raises(DataError, match=gone): write_rexerr(pd.DataFrame([{k: v for k, v in REPORT.items() if k != gone}]), tmp_path/'b.csv')


def test_rexerr_bad_files(tmp_path):
    with pytest.raises(DataError, match='does not exist'): read_rexerr(tmp_path/'none.csv')
    with pytest.raises(ValueError, match='sentence'): read_rexerr(tmp_path/'none.csv', 'sentences')
    (tmp_path/'empty.csv').write_text('')
    with pytest.raises(DataError, match='not a table'): read_rexerr(tmp_path/'empty.csv')
    (tmp_path/'bytes.csv').write_bytes(b'\xff\xfe\x00a,b\n1,2')
    with pytest.raises(DataError): read_rexerr(tmp_path/'bytes.csv')


def test_corbenchx_without_loss(tmp_path):
    rows = [ROW, {**ROW, 'error_type': ['Omission', 'Other'], 'score': 1.5}, dict(reversed(ROW.items()))]
    for indent in (None, 4):
        first = tmp_path/f'{indent}.json'
        first.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding='utf-8')
        assert write_corbenchx(read_corbenchx(first), tmp_path/'again.json', indent).read_bytes() == first.read_bytes()


@pytest.mark.parametrize('gone', list(ROW))
def test_corbenchx_names_the_missing_key(gone, tmp_path):
    (tmp_path/'a.json').write_text(json.dumps([ROW, {k: v for k, v in ROW.items() if k != gone}]))
    with pytest.raises(DataError, match=f'row 1.*{gone}'): read_corbenchx(tmp_path/'a.json')
    with pytest.raises(DataError, match=gone): write_corbenchx(pd.DataFrame([{k: v for k, v in ROW.items() if k != gone}]), tmp_path/'b.json')


@pytest.mark.parametrize('text', ['', '{', '{}', '[]', '[1]', '"a"'])
def test_corbenchx_bad_files(text, tmp_path):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(DataError): read_corbenchx(tmp_path/'a.json')
    with pytest.raises(DataError): read_corbenchx(tmp_path/'none.json')


def test_pairs():
    pairs = error_pairs(pd.DataFrame([ROW, {**ROW, 'input_report': ROW['output_report'].upper() + '!', 'error_type': 'Side Confusion'}], dtype=object))
    assert pairs.kinds.tolist() == [('spelling error',), ('location',)] and pairs.changed.tolist() == [True, False]
    assert pairs.patient_id.tolist() == ['18079244'] * 2 and pairs.study_id.tolist() == ['58587528'] * 2
    assert error_pairs(pd.DataFrame([REPORT])).kinds[0] == ('severity', 'add typo', 'insertion')
    assert error_pairs(pd.DataFrame(SENTENCES)).changed.tolist() == [False, True, True]
    assert {'omission', 'insertion', 'location'} <= {kinds_in(t)[0] for t in CORBENCHX_TYPES} & set(ERROR_KINDS)
    for bad in (3, None, "['a'", '[1]'):
        with pytest.raises(DataError, match='mistakes'): kinds_in(bad)
    with pytest.raises(DataError, match='neither'): error_pairs(pd.DataFrame({'a': [1]}))


def test_own_mistakes_in_their_format(tmp_path):
    "What we make can be written as CorBenchX, and comes back as it was."
    texts = ['Small left effusion. Heart is normal.', 'Large right pneumothorax.', 'Normal chest.']
    made = error_table(ErrorGenerator(texts), texts, ('location', 'severity', 'mismatch'))
    made = made[made.changed]
    table = pd.DataFrame(dict(image_path='', input_report=made.text, output_report=made.original, error_type=made.kind, error_description=made.was), dtype=object)
    pairs = error_pairs(read_corbenchx(write_corbenchx(table.reset_index(drop=True), tmp_path/'own.json')))
    assert pairs.text.tolist() == made.text.tolist() and [k for k, in pairs.kinds] == made.kind.tolist() and pairs.changed.all()
