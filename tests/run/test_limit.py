"""`-p limit=N`: any experiment on the first N patients of each split, for training too, and said so on its page."""
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from medvl.core.by_papermill import unknown_parameters
from medvl.core.first_patients import first_rows, limit_patients, patient_limit
from medvl.core.paths import read_jsonl
from medvl.core.run import Run
from medvl.data.phantom.kinds import prepared_phantom
from medvl.data.prepared import first_patients, open_prepared
from medvl.run.brief import run_sentences
from medvl.run.catalogue import parameter_lines
from medvl.run.cli import app
from medvl.run.parameters import RefusedError, check_parameters, notebook_parameters
from medvl.run.runner import experiments, run_experiment
from medvl.run.sweep import run_sweep

# experiments in which a limit has nothing to cut
NO_PATIENTS = {
    'believed_maps': 'joins tables of runs of attribution_bench; its own toy is cut as every phantom',
    'compare_runs': 'lays runs beside each other; its own toy is cut as every phantom',
}
# what opens or draws data and takes the first patients only; nothing else may
CUTS = re.compile(r'\b(open_prepared|prepare|prepare_task|new_phantom|prepared_phantom|prepared_chest_phantom|heart_phantom|first_rows|draw_patients|chest_histograms)\(')


@pytest.fixture(autouse=True)
def no_limit_left(): yield; limit_patients(0)


def source(path): return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')


def patients(manifest): return manifest.groupby('split').patient_id.nunique().to_dict()


def test_the_first_patients_of_each_split(tmp_path):
    data = prepared_phantom(tmp_path, 20, (48, 32))
    few = first_patients(data, 3)
    assert set(patients(few.manifest)) == {'train', 'valid', 'test'} and max(patients(few.manifest).values()) <= 3
    for name, part in data.manifest.groupby('split'): # the first in the order of the file, with all their rows
        wanted = part.patient_id.drop_duplicates()[:3]
        assert few.manifest[few.manifest.split == name].image_id.tolist() == part[part.patient_id.isin(wanted)].image_id.tolist()
    assert few.digest != data.digest and first_patients(data, 99) is data and first_patients(data, 0) is data


def test_every_experiment_takes_a_limit_and_none_has_one_of_its_own():
    for name, path in experiments().items():
        assert (found := check_parameters(path, dict(limit='5'))['limit']) == 5 and isinstance(found, int), name
        assert 'limit' not in {p.name for p in notebook_parameters(path)} and any('first so many patients' in l for l in parameter_lines(path)), name
    with pytest.raises(RefusedError, match='at least 0'): check_parameters(experiments()['zero_shot'], dict(limit=-1))
    with pytest.raises(RefusedError, match='must be an int'): check_parameters(experiments()['zero_shot'], dict(limit='0.5'))
    assert 'limit' not in check_parameters(experiments()['zero_shot'], {})


def test_every_experiment_reads_where_the_cut_is_made():
    for name, path in experiments().items():
        text = source(path)
        assert name in NO_PATIENTS or CUTS.search(text), f'{name}: nothing takes the first patients, and NO_PATIENTS has no reason for it'
        assert 'Run.current(' in text and not re.search(r'whole=True|_limit\(0\)|limit_patients\(', text), name
        opening = next((i for i, c in enumerate(text.split('\n')) if re.search(r'= .*\b(open_prepared|new_phantom|prepared_phantom)\(', c) and 'def ' not in c), None)
        current = next(i for i, c in enumerate(text.split('\n')) if 'Run.current(' in c)
        assert opening is None or current < opening, f'{name}: data are opened before the run says how many patients'
    assert set(NO_PATIENTS) <= set(experiments())


def test_what_was_called_limit_before_has_a_name():
    named = dict(grounding='judged', generate='exams', vqa='images', oversight='reports', correct='reports', image_use='images', xvl_parts='reports')
    for name, parameter in named.items():
        found = {p.name: p for p in notebook_parameters(experiments()[name])}
        assert found[parameter].default == (250 if name == 'xvl_parts' else None), name


def test_a_training_on_the_first_patients(tmp_path):
    data = prepared_phantom(tmp_path/'p', 24, (48, 32))
    run = run_experiment('pretrain', dict(data=str(data.folder), batch_size=2, limit=4), outputs=tmp_path/'out')
    assert run.params['limit'] == 4 and any('first 4 patients of each split: no result' in e.get('text', '') for e in read_jsonl(run.folder/'journal.jsonl'))
    said = (run.folder/'model'/'README.md').read_text()
    assert 1 <= int(said.split(' patients')[0].split()[-1]) <= 4 # of the training part
    assert 'tried on the first 4 patients of each split: no result' in (run.folder/'report.html').read_text().lower()
    assert 'no result' in run_sentences(run.folder)[1]
    assert len(open_prepared(data.folder)) == len(data) and patient_limit() == 0 # here nothing is limited
    judged = run_experiment('zero_shot', dict(data=str(data.folder), limit=2, n_boot=5), outputs=tmp_path/'out', report=False)
    assert max(patients(pd.read_csv(judged.folder/'tables'/'scores.csv')).values()) <= 2


def test_the_kinds_that_read_otherwise(tmp_path):
    "Codes of patients, reports that are made wrong, questions: three of the seven, and the one without pictures."
    run = run_experiment('bert_pretrain', dict(source='codes', limit=6, n_boot=2, max_steps=2), outputs=tmp_path, report=False)
    assert '6 sequences to train' in json.dumps(json.loads((run.folder/'run.ipynb').read_text()))
    run = run_experiment('oversight', dict(limit=3, n_boot=2, tune_epochs=0), outputs=tmp_path, report=False)
    assert 1 <= pd.read_csv(run.folder/'tables'/'mistakes.csv').row.nunique() <= 3 # a report each
    run = run_experiment('vqa', dict(limit=4, n_boot=2, blind=False), outputs=tmp_path, report=False)
    assert pd.read_csv(run.folder/'tables'/'answers.csv').image_id.nunique() <= 4


def test_prepare_prepares_the_first_patients(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_SALT', str(tmp_path/'salt.txt'))
    repo = Path(__file__).resolve().parents[2]
    given = dict(data=str(repo/'data_csv'), height=48, width=32, jobs=1)
    run = run_experiment('prepare', dict(given, out=str(tmp_path/'p'), limit=2), outputs=tmp_path/'out', report=False)
    data = open_prepared(tmp_path/'p')
    assert max(patients(data.manifest).values()) <= 2 and len(data.images) == len(data) # no more was decoded
    assert data.info['rows']['not_chosen'] > 0 and run.metrics['left_out']['value'] == 0
    run_experiment('prepare', dict(given, out=str(tmp_path/'q')), outputs=tmp_path/'out', report=False)
    whole = open_prepared(tmp_path/'q')
    wanted = [p for _, part in whole.manifest.groupby('split', sort=False) for p in part.patient_id.drop_duplicates()[:2]]
    assert set(data.manifest.patient_id) == set(wanted) # the same deal as of all of them


def notebook(path, *cells):
    code = [dict(cell_type='code', id=f'c{i}', metadata={'tags': ['parameters']} if not i else {}, source=s, execution_count=None, outputs=[]) for i, s in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=code, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_a_step_of_such_a_run_is_one_too(tmp_path):
    inner = notebook(tmp_path/'e02_inner.ipynb', "data: 'Data' = ''", "from medvl.core.run import Run\nfrom medvl.data.prepared import open_prepared\nrun = Run.current('inner', globals())\nrun.metric('n', open_prepared(data).manifest.patient_id.nunique())\nrun.done()")
    outer = notebook(tmp_path/'e01_outer.ipynb', "data: 'Data' = ''\ninner: 'File' = ''", "from medvl.core.run import Run\nfrom medvl.run.runner import run_experiment\nrun = Run.current('outer', globals())\nrun_experiment(inner, dict(data=data), folder=run.folder/'steps'/'inner', report=False)\nrun.done()")
    data = prepared_phantom(tmp_path/'p', 16, (48, 32))
    for limit in (1, 0):
        run = run_experiment(outer, dict(data=str(data.folder), inner=str(inner), limit=limit), outputs=tmp_path/'out', report=False)
        step = Run(run.folder/'steps'/'inner')
        assert step.metrics['n']['value'] == (3 if limit else 16) and step.params.get('limit', 0) == limit


def test_by_hand_and_under_plain_papermill(tmp_path, monkeypatch):
    data = prepared_phantom(tmp_path/'p', 16, (48, 32))
    run = Run.current('hand', {'limit': 1}, tmp_path/'out')
    assert max(patients(open_prepared(data.folder).manifest).values()) == 1
    assert any('first 1 patient of each split' in e.get('text', '') for e in read_jsonl(run.folder/'journal.jsonl'))
    run.done()
    assert len(open_prepared(data.folder)) == len(data)
    Run.current('hand', {'limit': 2}, tmp_path/'out'); later = Run.current('hand', {}, tmp_path/'out') # the first was given up
    assert len(open_prepared(data.folder)) == len(data) and 'limit' not in later.params
    later.done()
    with pytest.raises(ValueError, match='whole number of patients'): Run.current('hand', {'limit': -3}, tmp_path/'out')
    monkeypatch.setenv('MEDVL_LIMIT', 'few')
    with pytest.raises(ValueError, match="MEDVL_LIMIT is 'few'"): open_prepared(data.folder)
    assert unknown_parameters(["data = ''", '# Parameters\nlimit = 5\ndate = 1'], ).keys() == {'date'}


def test_a_folder_that_is_gone_on_with_is_left_alone(tmp_path):
    shared = [n for n, p in experiments().items() if any('to go on with' in q.help for q in notebook_parameters(p))]
    assert len(shared) >= 9
    for name in shared:
        path = experiments()[name]
        values = check_parameters(path, dict(folder=str(tmp_path), limit=3))
        assert values['folder'] == str(tmp_path/'first-3-patients') == check_parameters(path, values)['folder'], name # also when it goes on
        assert check_parameters(path, dict(folder=str(tmp_path)))['folder'] == str(tmp_path), name


def test_a_sweep_on_the_first_patients(tmp_path, monkeypatch):
    data = prepared_phantom(tmp_path/'p', 16, (48, 32))
    inner = notebook(tmp_path/'e02_inner.ipynb', "data: 'Data' = ''\nfolder: 'File' = ''  # where things lie, to go on with\nseed: int = 0",
                     "from medvl.core.run import Run\nfrom medvl.data.prepared import open_prepared\nrun = Run.current('inner', globals())\nrun.metric('n', open_prepared(data).manifest.patient_id.nunique())\nrun.done()")
    given = dict(data=str(data.folder), folder=str(tmp_path/'f'), limit=1)
    table = run_sweep(inner, dict(seed=[0, 1]), given, tmp_path/'out')
    assert table.state.tolist() == ['done', 'done'] and table.n.tolist() == [3, 3]


def test_rows_of_any_table():
    t = pd.DataFrame(dict(uid=[3, 3, 1, 2, 2], part=['b', 'a', 'a', 'a', 'a']))
    assert first_rows(t, 1, 'uid', 'part').index.tolist() == [0, 1] and first_rows(t, 2, 'uid').uid.tolist() == [3, 3, 1]
    assert first_rows(t.iloc[:0], 1, 'uid') is not None and len(first_rows(t, 1, 'nobody')) == 5


def test_help_says_so():
    assert 'any experiment:' in CliRunner().invoke(app, ['run', 'zero_shot', '--help']).output
    assert 'first so many patients' in CliRunner().invoke(app, ['params', 'vqa']).output


def test_too_few_patients_are_named_as_the_reason(tmp_path):
    bad = notebook(tmp_path/'e03_bad.ipynb', 'x: int = 0', "from medvl.core.run import Run\nrun = Run.current('bad', globals())\nraise ValueError('one class only')")
    got = CliRunner().invoke(app, ['run', str(bad), '-p', 'limit=2', '--outputs', str(tmp_path/'o'), '--no-report'])
    assert got.exit_code == 1 and 'one class only' in got.output and 'with a larger limit' in got.output
