"""Text means what its type says; what cannot be meant is refused before anything runs."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.config import check_fields
from medvl.core.errors import closest
from medvl.core.words import Word, plain_value, read_structure
from medvl.run.parameters import Parameter, RefusedError, check_parameters, convert, parse_assignments, read_parameters
from medvl.run.runner import RunFailedError, experiments, find_experiment, names_now
from medvl.run.sweep import parse_grid
from medvl.train.settings import TrainConfig
from run_notebooks import BEGIN, notebook

WORDS = ['no', 'yes', '007', 'null', 'a: b', 'on', '12:30', '1e-4', '0x10', '1_000', '~', 'None', '2024-01-01', '=', '<<', '- x', '1.10', 'NaN', 'true']


@pytest.mark.parametrize('kind', ['list', 'list[str]', 'List[str]', 'list[str] | None'])
def test_lists_of_text_keep_every_word(kind):
    p = Parameter('labels', kind, [])
    for text in (json.dumps(WORDS), repr(WORDS)): assert convert(p, Word(text)) == WORDS
    assert convert(p, Word('no,007,a: b')) == ['no', '007', 'a: b']
    assert convert(p, WORDS) == WORDS and convert(p, Word('')) in ([], None)


@given(st.lists(st.text()))
@settings(max_examples=60)
def test_any_list_of_text_comes_through_json(words):
    assert convert(Parameter('labels', 'list', []), Word(json.dumps(words))) == words
    assert convert(Parameter('x', 'dict', {}), Word(json.dumps({'k': words}))) == {'k': words}


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8)


@given(st.dictionaries(st.text(), json_values, max_size=3))
@settings(max_examples=60)
def test_any_mapping_comes_through_json(value): assert plain_value(read_structure(json.dumps(value))) == value


@pytest.mark.parametrize('kind, text, expected', [('int', '-3', -3), ('int', '1_000', 1000), ('float', '1e-4', 1e-4), ('float', 3, 3.0), ('float', '-.5', -.5), ('bool', 'no', False), ('str', '', ''),
    ('str', 'null', 'null'), ('str', '007', '007'), ('str', '"q"', '"q"'), ('Any', '007', '007'), ('Any', 'yes', 'yes'), ('Any', '"5"', '5'), ('Any', '5', 5), ('Any', 'null', None), ('Any', '[1, no]', [1, 'no']),
    ('int | None', 'None', None), ('int | None', '', None), ('str | None', 'null', None), ('str | None', '"null"', 'null'), ('int | str', '7', 7), ('int | str', '"7"', '7'), ('int | str', '007', 7),
    ('dict', '{"a": "no", "n": 1,}', {'a': 'no', 'n': 1}), ('dict', '{a: no, n: 1e-4}', {'a': 'no', 'n': 1e-4}), ('dict[str, float]', '{a: 1}', {'a': 1.0}), ('list[int | None]', '[1, null]', [1, None]),
    ('list[list[int]]', '[[1, 2], [3]]', [[1, 2], [3]]), ('tuple[int, str]', '[1, 007]', [1, '007']), ('Literal[1, 2]', '2', 2), ('Optional[list[float]]', '1,2', [1.0, 2.0])])
def test_text_by_type(kind, text, expected):
    choices = (1, 2) if 'Literal' in kind else ()
    got = convert(Parameter('x', kind, None, '', choices), Word(text) if isinstance(text, str) else text)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize('kind, text', [('int', ''), ('int', 'true'), ('int', 'None'), ('int', '1e3'), ('float', 'nan'), ('float', 'inf'), ('float', '-Infinity'), ('float', '1e999'), ('bool', ''), ('bool', '2'),
    ('list[int]', '1,x'), ('dict', '{"a": 1, "a": 2}'), ('dict', '[1]'), ('dict', 'word'), ('dict', '{"a": 1e999}'), ('dict', '{a, b}'), ('list', '[1, 2'), ('tuple[int, str]', '[1]'), ('Literal[1, 2]', '3')])
def test_what_cannot_be_meant_is_refused(kind, text):
    with pytest.raises(RefusedError, match='x'): convert(Parameter('x', kind, None, '', (1, 2) if 'Literal' in kind else ()), Word(text))


def test_files_and_grids_read_words_too(tmp_path):
    nb = notebook(tmp_path/'x.ipynb', 'a: list[str] = []\nb: str = ""\nc: float = 1.0\nd: bool = True\ne: int | None = 3\nf: list = [0.5, 1]', BEGIN)
    (tmp_path/'p.yaml').write_text('a: [no, 007, "null", 12:30]\nb: 1.10\nc: 1e-4\nd: no\ne: null\nf: [1, 2]')
    assert check_parameters(nb, read_parameters(tmp_path/'p.yaml')) == dict(a=['no', '007', 'null', '12:30'], b='1.10', c=1e-4, d=False, e=None, f=[1.0, 2.0])
    for text, says in (('a: 1\na: 2', 'twice'), ('[1]', 'one mapping'), ('a: [', 'not YAML')):
        (tmp_path/'p.yaml').write_text(text)
        with pytest.raises(RefusedError, match=says): read_parameters(tmp_path/'p.yaml')
    assert parse_grid(["b='x,y',it's,007"]) == {'b': ['x,y', "it's", '007']}
    with pytest.raises(RefusedError, match='given twice'): parse_assignments(['a=1', 'a=2'])
    assert parse_assignments(['a=b=c', 'b=']) == {'a': 'b=c', 'b': ''}


@pytest.mark.parametrize('asked, names, expected', [('learning_rate', ('seed', 'lr'), 'lr'), ('bs', ('batch_size', 'b'), 'batch_size'), ('num_workers', ('words', 'workers'), 'workers'), ('dataset', ('data', 'out'), 'data'),
                                                    ('learning_rat', ('learning_rate', 'lr'), 'learning_rate'), ('zzz', ('lr',), None)])
def test_names_of_other_libraries(asked, names, expected): assert closest(asked, names) == expected


@pytest.mark.parametrize('experiment, given, says', [('pretrain', dict(learning_rate=1), "Did you mean 'lr'"), ('pretrain', dict(model_options='{"i2i_wieght": 0.5}'), "Did you mean 'i2i_weight'"),
    ('pretrain', dict(train_options='{"learning_rate": 0.1}'), "Did you mean 'lr'"), ('pretrain', dict(train_options='{"ema": "high"}'), 'must be float'), ('pretrain', dict(text_options={'viws': 2}), 'viws'), ('pretrain', dict(text_options={}, sample_options={}), 'both are given'),
    ('pretrain', dict(lr=1e-3, train_options='{"lr": 0.1}'), 'given twice'), ('pretrain', dict(weight_decay=1), 'field of train_options'), ('pretrain_chest', dict(method='byol', model_options={'temprature': 1}), 'temprature'),
    ('pretrain_chest', dict(method='lovt', view_options={'per_bach': True}), 'per_bach'), ('pretrain', dict(augment_options={'mode': 3}), 'augment_options')])
def test_options_are_checked_before_anything_runs(experiment, given, says):
    given = {k: Word(v) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(RefusedError, match=says): check_parameters(find_experiment(experiment), names_now(experiment, given))


def test_good_options_pass():
    values = check_parameters(experiments()['pretrain'], dict(train_options='{"accumulate": 4, "ema": 0.999}', model_options={'i2i_weight': 1}))
    assert values['train_options'] == {'accumulate': 4, 'ema': 0.999} and check_fields(TrainConfig, {'lr': 1}) == {'lr': 1.0}
    assert check_parameters(experiments()['pretrain'], dict(method='simclr', model_options={'temperature': 0.2}))['model_options'] == {'temperature': 0.2}


def test_advice_can_be_followed():
    "What the errors of a preparation advise is a parameter of the experiment and an option of the command."
    from typer.testing import CliRunner

    from medvl.run.cli import app
    assert check_parameters(experiments()['prepare'], dict(overwrite='true', out='prepared'))['overwrite'] is True
    assert '--overwrite' in CliRunner().invoke(app, ['prepare', '--help']).output


def test_overwrite_removes_preparations_only(tmp_path):
    import pandas as pd

    from medvl.core.errors import DataError
    from medvl.data.phantom.breast_dataset import write_phantom
    from medvl.data.prepare.run import prepare
    write_phantom(tmp_path/'s', 1, (64, 40), 0, 'easy', 'png', 1)
    (tmp_path/'precious').mkdir()
    (tmp_path/'precious'/'thesis.txt').write_text('x')
    records = pd.read_csv(tmp_path/'s'/'index.csv', dtype=str, keep_default_na=False)
    with pytest.raises(DataError, match='something else'): prepare(records, tmp_path/'s', tmp_path/'precious', size=(64, 40), jobs=1, overwrite=True, salt=tmp_path/'salt')
    assert (tmp_path/'precious'/'thesis.txt').exists()


@pytest.mark.parametrize('ename, reason, again', [('DataError', '', True), ('ValueError', '', True), ('FileNotFoundError', '', True), ('OSError', '', False), ('OutOfMemoryError', '', False), ('RuntimeError', '', False),
                                                  ('', 'every cell ran, but the notebook never called run.done()', True)])
def test_a_failure_that_will_repeat_is_known(ename, reason, again):
    from medvl.run.runner import _repeats
    error = type('E', (Exception,), {'ename': ename})()
    assert _repeats('failed', reason, error) is again and not _repeats('killed', reason, error)


def test_resume_is_not_offered_where_it_would_fail_again(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from typer.testing import CliRunner

    import medvl.run.runner as runner
    from medvl.run.cli import app
    for repeats in (True, False):
        def fail(*args, repeats=repeats): raise RunFailedError(SimpleNamespace(folder=tmp_path/'fit-1', params={}), 'failed', 'why', 1, repeats)
        monkeypatch.setattr(runner, 'run_experiment', fail)
        out = CliRunner().invoke(app, ['run', 'pretrain'])
        assert out.exit_code == 1 and ('--resume' in out.output) is not repeats and ('happen again' in out.output) is repeats
