"""Paths mean what they mean beside the caller, and a run's name stands for its folder."""
import os
from pathlib import Path

import pytest

from medvl.core.paths import append_jsonl, read_json
from medvl.core.places import absolute, place, runs_named
from medvl.core.run import Run, is_run, run_events, run_folders
from medvl.run.history import list_runs
from medvl.run.parameters import Parameter, RefusedError, check_parameters, notebook_parameters, placed
from medvl.run.runner import find_run, run_experiment
from medvl.run.sweep import parse_grid, plan_sweep, run_sweep
from run_notebooks import BEGIN, counting, medvl, notebook

PLACES = '''data: 'Data' = ''
files: 'list[Source]' = []
plain: str = ''  # a notebook that does not say what is a path
options: dict = {}
out: "File" = ""
text: str = ""
seed: int = 3'''
LOOK = '''from pathlib import Path
who = lambda p: (Path(p)/"who").read_text()
run.note(" ".join([who(data), *map(who, files), who(plain), who(options["tokenizer"]), text]))
Path(out).mkdir(); (Path(out)/"made").touch()'''


@pytest.fixture
def clone(tmp_path):
    "A checkout with a decoy of every name, and a caller's folder whose name papermill would format."
    for folder, who in ((tmp_path/'clone', 'decoy'), (tmp_path/"call er's {seed} \"é\"", 'caller'), (tmp_path/'third', 'third')):
        for name in ('data', 'a {seed}'):
            (folder/name).mkdir(parents=True)
            (folder/name/'who').write_text(who)
    (tmp_path/'clone'/'settings.ini').write_text('[DEFAULT]\nlib_name = medvl\n')
    return tmp_path/'clone', next(tmp_path.glob('call*'))


def test_paths_of_the_caller_and_resume_from_elsewhere(clone, monkeypatch):
    "Killed in its first attempt, resumed from a third folder: the caller's data both times, outputs beside the caller."
    clone, caller = clone
    shot = 'import os\nif run.attempt == 1: os.kill(os.getpid(), 9)'
    nb = notebook(clone/'e01_x.ipynb', PLACES, BEGIN, shot, LOOK, 'run.done()')
    jinja = "{{ 7*7 }} {seed} $HOME 'q' \"d\"\n%s"
    code, out, err = medvl('run', nb, '-p', 'data=data', '-p', 'files=data,a {seed}', '-p', 'plain=data', '-p', 'options={"tokenizer": "data"}', '-p', 'out=made {here}',
                           '-p', f'text={jinja}', '--outputs', 'runs', '--no-report', outputs='unused', cwd=caller)
    assert code == 137, (out, err)
    run = run_folders(caller/'runs')[0]
    monkeypatch.chdir(clone.parent/'third')
    resumed = run_experiment(resume=run)
    assert resumed.state == 'done'
    notes = [e['text'] for e in run_events(run) if e['event'] == 'note']
    assert ' '.join(['caller'] * 5) + ' ' + jinja in notes
    assert (caller/'made {here}'/'made').exists() and sorted(p.name for p in clone.iterdir()) == ['a {seed}', 'data', 'e01_x.ipynb', 'settings.ini']
    assert read_json(run/'params.json')['text'] == jinja and (run/'report.html').exists()


@pytest.mark.parametrize('kind, given, expected', [('File', 'new', 'HERE/new'), ('File', '', ''), ('File', '/abs', '/abs'), ('Source', 'hub/name', 'hub/name'), ('Source', 'data', 'HERE/data'),
    ('Source', 'efficientnet-b2', 'efficientnet-b2'), ('Source', './new', 'HERE/./new'), ('File', 'data/../x', 'HERE/data/../x'), ('Source', '', ''), ('File', '~no-such-user/x', 'HERE/~no-such-user/x'),
    ('list[Source]', ['data', 'hub/name'], ['HERE/data', 'hub/name']), ('File | None', None, None), ('str', 'data', 'data')])
def test_each_kind_of_place(tmp_path, monkeypatch, kind, given, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data').mkdir()
    here = lambda t: os.path.normpath(t.replace('HERE', str(tmp_path))) if isinstance(t, str) and t.startswith('HERE') and '..' not in t else t and t.replace('HERE', str(tmp_path))
    expected = [here(e) for e in expected] if isinstance(expected, list) else here(expected)
    assert placed(Parameter('x', kind, ''), given, tmp_path/'runs') == expected


def test_sweep_grids_hold_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a', "b's", 'c [1]'): (tmp_path/name).mkdir()
    nb = notebook(tmp_path/'e01_x.ipynb', PLACES, BEGIN, 'run.done()')
    folder = plan_sweep(nb, parse_grid(["data=a,b's,c [1]"]), {'options': '{"tokenizer": "a", "mode": "a"}'}, outputs='out')
    plan = read_json(folder/'sweep.json')
    assert [r['params']['data'] for r in plan['runs']] == [str(tmp_path/n) for n in ('a', "b's", 'c [1]')]
    assert plan['runs'][0]['params']['options'] == {'tokenizer': str(tmp_path/'a'), 'mode': 'a'} and plan['cwd'] == str(tmp_path) and folder.is_absolute()


def test_two_meanings_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append_jsonl(tmp_path/'runs'/'pretrain-1'/'journal.jsonl', dict(event='created'))
    append_jsonl(tmp_path/'runs'/'sweep-a'/'0000-x'/'journal.jsonl', dict(event='created'))
    for name in ('pretrain-1', 'owner/model'): (tmp_path/name).mkdir(parents=True)
    told = []
    assert place('pretrain-1', tmp_path/'runs', told.append) == str(tmp_path/'pretrain-1') and 'not as' in told[0] and 'runs/pretrain-1' in told[0]
    assert place('owner/model', tmp_path/'runs', told.append) == str(tmp_path/'owner/model') and len(told) == 2
    assert place('0000-x', tmp_path/'runs') == place('sweep-a/0000-x', tmp_path/'runs') == str(tmp_path/'runs'/'sweep-a'/'0000-x')
    append_jsonl(tmp_path/'runs'/'sweep-b'/'0000-x'/'journal.jsonl', dict(event='created'))
    with pytest.raises(RefusedError, match='2 runs are called 0000-x'): placed(Parameter('model', 'Source', ''), '0000-x', tmp_path/'runs')
    assert find_run('sweep-b/0000-x', tmp_path/'runs').parent.name == 'sweep-b'
    assert absolute('x') == str(tmp_path/'x') and len(runs_named('0000-x', tmp_path/'runs')) == 2


def test_a_run_of_prepare_stands_for_its_data(tmp_path):
    run = Run.create('prepare', {}, tmp_path)
    (run.folder/'phantom').mkdir()
    (run.folder/'phantom'/'dataset.json').touch()
    assert placed(Parameter('data', 'Data', ''), run.folder.name, tmp_path) == str((run.folder/'phantom').resolve())
    assert placed(Parameter('model', 'Source', ''), run.folder.name, tmp_path) == str(run.folder.resolve())
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'elsewhere'/'dataset.json').touch()
    other = Run.create('prepare', {'out': str(tmp_path/'elsewhere')}, tmp_path)
    assert placed(Parameter('data', 'Data', ''), other.folder.name, tmp_path) == str(tmp_path/'elsewhere')


def test_other_journals_are_no_runs_and_odd_ones_do_not_end_the_list(tmp_path):
    "A preparation keeps a journal too (Tutorial 1 leaves one in outputs/); whatever a run folder holds, the others are listed."
    assert len(list_runs(tmp_path)) == 0
    append_jsonl(tmp_path/'prepared'/'journal.jsonl', dict(number=0, row=0, stage=''))
    append_jsonl(tmp_path/'t01'/'prepared'/'journal.jsonl', dict(number=0, row=0, stage=''))
    assert len(list_runs(tmp_path)) == 0 and not is_run(tmp_path/'prepared')
    good = Run.create('good', {}, tmp_path)
    for name, files in dict(a={'journal.jsonl': 'no JSON {'}, b={'journal.jsonl': '5\n[1]\n{"event": "started"}\n'}, c={'metrics.json': '[1, 2]'}, d={'metrics.json': '{"x": {}}'},
                            e={'provenance.json': '[]'}, f={'journal.jsonl': ''}, g={'journal.jsonl': '\xff\xfe'}).items():
        bad = Run.create(name, {}, folder=tmp_path/name)
        for file, text in files.items(): (bad.folder/file).write_bytes(text.encode('latin1'))
    table = list_runs(tmp_path)
    assert sorted(table.run) == sorted(['a', 'b', 'c', 'd', 'e', 'f', 'g', good.folder.name]) and (table[table.run == good.folder.name].state == 'new').all()
    assert len(list_runs(tmp_path, experiment='good')) == 1
    with pytest.raises(RefusedError, match='Unknown run'): find_run('prepared', tmp_path)


@pytest.mark.parametrize('stem', ['a=b,c', 'ü {x} é', 'n' * 240])
def test_names_of_notebooks_become_names_of_runs(tmp_path, stem):
    nb = counting(tmp_path/f'{stem}.ipynb', steps=1)
    run = Run.create(stem, check_parameters(nb, {}), tmp_path/'out')
    assert find_run(run.folder.name, tmp_path/'out') == run.folder and len(run.folder.name.encode()) < 200
    assert plan_sweep(nb, {'seed': [0]}, outputs=tmp_path/'out').is_dir()


def test_every_experiment_says_what_its_places_are():
    "Folders of data, models and results are places; every list says of what; options name their class."
    from medvl.run.runner import experiments
    for name, path in experiments().items():
        for p in notebook_parameters(path):
            if p.name in ('data', 'model', 'out', 'folder', 'table', 'tables', 'embeddings', 'released', 'against', 'factor', 'real', 'image_encoder', 'text_encoder'):
                assert any(k in p.type for k in ('Data', 'Source', 'File')), (name, p)
            if p.type.startswith('list'): assert '[' in p.type, (name, p)
            if p.name.endswith('_options'): assert 'fields of' in p.help, (name, p)


def test_sweep_is_continued_by_its_name(tmp_path):
    with pytest.raises(RefusedError, match='no sweep'): run_sweep(outputs=tmp_path, folder=tmp_path)
    (tmp_path/'sweep-x').mkdir()
    with pytest.raises(RefusedError, match='sweep-x is no sweep'): run_sweep(outputs=tmp_path, folder=Path('sweep-x'))
