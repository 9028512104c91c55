"""Tables: every bad value is found, with its place; nothing good is lost."""
import numpy as np
import pandas as pd
import pytest
from golden import sample
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.data.prepared import table_digest, typed
from medvl.data.schema import BOXES, MANIFEST, RECORDS, check_columns, empty, find_problems, fit_boxes, read_csv, read_list, sort_out, tidy, validate

GOOD = {'image_path': 'a.png', 'patient_id': '1', 'laterality': 'L', 'view': 'CC', 'age': '50', 'density': 'B', 'birads': '2', 'report_text': 'x'}


def table(*changes): return pd.DataFrame([GOOD | {'image_id': f'i{n}'} | c for n, c in enumerate(changes)])


@pytest.mark.parametrize('wrong,right', [('lateralty', 'laterality'), ('Laterality', 'laterality'), ('patientid', 'patient_id'), ('patient-id', 'patient_id'),
                                         ('image_pth', 'image_path'), ('birads_', 'birads'), ('densty', 'density'), ('repot_text', 'report_text')])
def test_misspelt_columns(wrong, right):
    with pytest.raises(DataError) as e: check_columns(table({}).rename(columns={right: wrong}), 'records', 'index.csv')
    assert e.value.column == wrong and repr(right) in str(e.value) and 'index.csv' in str(e.value)


@pytest.mark.parametrize('name', [n for n, c in RECORDS.items() if c.required])
def test_missing_columns(name):
    with pytest.raises(DataError, match=f"'{name}' is missing"): check_columns(table({}).drop(columns=name), 'records')


def test_extra_columns_are_listed_not_kept():
    assert check_columns(table({}).assign(licence='x', width=3), 'records') == ['licence', 'width']
    assert 'licence' not in validate(table({}).assign(licence='x'), 'records')


@pytest.mark.parametrize('change,column,problem', [
    ({'laterality': 'X'}, 'laterality', 'not one of'), ({'laterality': ''}, 'laterality', 'empty'), ({'view': 'upside'}, 'view', 'not one of'), ({'view': ''}, 'view', 'empty'),
    ({'patient_id': ''}, 'patient_id', 'empty'), ({'patient_id': 'nan'}, 'patient_id', 'empty'), ({'age': 'old'}, 'age', 'not a number'), ({'age': '-3'}, 'age', 'less'),
    ({'age': '300'}, 'age', 'more'), ({'density': 'E'}, 'density', 'not one of'), ({'image_id': 'i0'}, 'image_id', 'twice'), ({'split': 'dev'}, 'split', 'not one of'),
    ({'label_mass': '2'}, 'label_mass', 'label'), ({'label_mass': 'yes'}, 'label_mass', 'not a number'), ({'spacing_y': '0'}, 'spacing_y', 'less'), ({'fold': '1.5'}, 'fold', 'whole')])
def test_bad_values_name_their_place(change, column, problem):
    df = table({}, {}, change)
    with pytest.raises(DataError) as e: validate(df, 'records', 'index.csv')
    assert e.value.row == 2 and e.value.column == column and problem in str(e.value)
    good, problems = sort_out(df, 'records')
    assert good.index.tolist() == [0, 1] and problems.row.tolist() == [2] and problems.column.tolist() == [column]


@pytest.mark.parametrize('value', [None, np.nan, 'nan', 'NaN', '', float('nan'), pd.NA])
def test_nan_report_is_no_report(value):
    assert validate(table({'report_text': value}, {}), 'records').report_text.tolist() == ['', 'x']


def test_forms_are_brought_together():
    out = validate(table({'laterality': 'left', 'view': 'mlo', 'density': 'c'}, {'laterality': 'Right ', 'view': ' cc'}), 'records')
    assert out.laterality.tolist() == ['L', 'R'] and out['view'].tolist() == ['MLO', 'CC'] and out.density[0] == 'C'


def test_labels_are_one_zero_or_nothing():
    out = validate(table({'label_mass': '1'}, {'label_mass': '0'}, {'label_mass': ''}, {'label_mass': '1.0'}), 'records')
    np.testing.assert_array_equal(out.label_mass, [1, 0, np.nan, 1])


def boxes(*edges): return pd.DataFrame([dict(zip(BOXES, ['a', 'mass', *e, ''])) for e in edges])


def test_boxes():
    good, problems = sort_out(boxes((0, 0, 5, 5), (5, 0, 5, 5), (0, 6, 5, 5), (np.nan, 0, 1, 1), ('x', 0, 1, 1)), 'boxes')
    assert good.index.tolist() == [0] and problems.row.tolist()[:2] == [1, 2] and set(problems.row) == {1, 2, 3, 4}
    with pytest.raises(DataError, match='row 1.*no area'): validate(boxes((0, 0, 5, 5), (5, 0, 5, 5)), 'boxes')


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-50, 200)]*4), min_size=1, max_size=8))
def test_fit_boxes_agrees_with_the_plain_rule(edges):
    inside, kept, cut = fit_boxes(edges, 100, 120)
    for (x0, y0, x1, y1), b, k, c in zip(edges, inside, kept, cut):
        plain = [min(max(x0, 0), 120), min(max(y0, 0), 100), min(max(x1, 0), 120), min(max(y1, 0), 100)]
        assert b.tolist() == plain and k == (plain[2] > plain[0] and plain[3] > plain[1]) and c == (k and plain != [x0, y0, x1, y1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['L', 'R', 'left', 'X', '']), st.sampled_from(['CC', 'mlo', 'Q', '']), st.sampled_from(['1', '', 'nan']),
                          st.sampled_from(['40', '', '999', 'x'])), min_size=1, max_size=12))
def test_sorting_out_loses_nothing(rows):
    "Good and bad rows are a partition, and the bad are those that a plain loop finds."
    df = table(*[dict(laterality=s, view=v, patient_id=p, age=a) for s, v, p, a in rows])
    good, problems = sort_out(df, 'records')
    plain = [n for n, (s, v, p, a) in enumerate(rows) if s in ('X', '') or v in ('Q', '') or p in ('', 'nan') or a in ('999', 'x')]
    assert sorted(set(problems.row)) == plain and good.index.tolist() == [n for n in range(len(rows)) if n not in plain]


@pytest.mark.parametrize('text', ["__import__('os').system('true')", '[' * 5000, "['a', ['b']]", '{"a": 1}', "['a'", '1', "['a']; import os", "[b'a']", '[None]'])
def test_hostile_lists(text):
    with pytest.raises(DataError) as e: read_list(text, 'f.csv', 4, 'text')
    assert (e.value.row, e.value.column, e.value.file) == (4, 'text', 'f.csv')


def test_other_names_are_no_misspelling():
    "A table of boxes without labels is told so; 'table' and 'level' are not 'label'."
    for name in ('table', 'level', 'value', 'note'):
        with pytest.raises(DataError, match="'label' is missing") as e: check_columns(pd.DataFrame(columns=['image_id', name, 'x0', 'y0', 'x1', 'y1']), 'boxes')
        assert 'did you mean' not in str(e.value) and e.value.column == 'label'
    for name in ('lable', 'labels', 'labl'):
        with pytest.raises(DataError, match="did you mean 'label'"): check_columns(pd.DataFrame(columns=['image_id', name, 'x0', 'y0', 'x1', 'y1']), 'boxes')


def test_csv_reading(tmp_path):
    path = tmp_path/'t.csv'
    path.write_bytes('\ufeffpatient_id,age\n"NA","1"\n007,\n"a ""b"", c",3\n'.encode())
    assert read_csv(path).patient_id.tolist() == ['NA', '007', 'a "b", c']
    for data, words in ((b'', 'empty'), (b'a,b\n1,2,3\n', 'not a table'), (b'a\xff\n', 'UTF-8'), (b'a,a\n1,2\n', 'twice'),
                        (b'image_path;patient_id\na;1,5\n', 'semicolons'), (b'image_path\tpatient_id\na\tb\n', 'tabs')):
        path.write_bytes(data)
        with pytest.raises(DataError, match=words): read_csv(path)
    with pytest.raises(DataError, match='does not exist'): read_csv(tmp_path/'none.csv')


def test_types_and_digest():
    out = typed(empty('manifest'), 'manifest')
    assert list(out) == list(MANIFEST) and str(out.row.dtype) == 'int64' and str(out.burned_in_text.dtype) == 'bool'
    df = pd.DataFrame({'a': [1., np.nan], 'b': ['x', 'y']})
    other = [df.assign(a=[1., 2.]), df.assign(b=['x', 'z']), df.iloc[::-1], df.rename(columns={'b': 'c'}), df.assign(b=['xy', ''])]
    assert len({table_digest(t) for t in [df, *other]}) == 6 and table_digest(df) == table_digest(df.copy())


def test_a_million_cells_quickly():
    df = pd.concat([table({})]*50_000, ignore_index=True).assign(image_id=[f'i{n}' for n in range(50_000)])
    df.loc[[7, 40_000], 'laterality'] = 'Z'
    assert find_problems(tidy(df, 'records')[0], 'records').row.tolist() == [7, 40_000]


def test_real_index():
    from medvl.data.releases.folder import read_folder
    source = read_folder(sample('mammo/index.csv').parent)
    assert len(source.records) == 636 and len(source.boxes) == 418
    issues = source.report.issues
    assert not issues.kind.isin(['row set aside', 'box set aside', 'file is absent']).any()
    assert issues[issues.kind == 'density not certain'].detail.value_counts().to_dict() == {'fatty': 92, 'dense-glandular': 88, 'fatty-glandular': 78}
    assert set(source.records.birads) <= {'', '1', '2', '3', '4', '4B', '4C', '5'} and set(source.records.density) == {'', 'A', 'B', 'C', 'D'}
    assert source.records.label_malignant.sum() == 187 and source.records.label_malignant.isna().sum() == 2
