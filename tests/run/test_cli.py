"""The command line: exit codes, plain messages, no heavy imports."""
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from medvl.run.cli import app
from run_notebooks import BEGIN, medvl, notebook

cli = CliRunner()


def test_help_loads_nothing_heavy():
    code = 'import sys, medvl.commands; print(sorted({"torch", "pandas", "numpy", "papermill", "matplotlib", "transformers"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    from medvl.commands import app as full
    out = cli.invoke(full, ['--help'])
    assert out.exit_code == 0 and all(c in out.output for c in ('run', 'sweep', 'runs', 'embed', 'zero-shot', 'explain', 'prepare', 'phantom', 'info'))


def test_run_list_show_compare_report(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_OUTPUTS', str(tmp_path/'out'))
    nb = notebook(tmp_path/'e01_fit.ipynb', 'lr: float = 0.1 # step size\nname: str = "a"', BEGIN, 'run.metric("auroc", lr, low=0.0, high=1.0)', 'run.done()')
    (tmp_path/'p.yaml').write_text('lr: 0.3\nname: b')
    assert 'lr: float = 0.1  # step size' in cli.invoke(app, ['params', str(nb)]).output
    code, out, err = medvl('run', nb, '-f', tmp_path/'p.yaml', '-p', 'lr=0.7', outputs=tmp_path/'out')
    assert code == 0 and 'report.html' in out, err
    assert cli.invoke(app, ['run', str(nb)]).exit_code == 0
    listed = cli.invoke(app, ['runs', 'list']).output
    assert listed.count('done') == 2 and 'auroc' in listed
    names = sorted(p.name for p in (tmp_path/'out').iterdir())
    shown = cli.invoke(app, ['runs', 'show', names[0]]).output
    assert 'lr = ' in shown and 'auroc' in shown and 'report.html' in shown
    compared = cli.invoke(app, ['runs', 'compare', *names]).output
    assert '0.7 (0 to 1)' in compared and 'name' in compared
    assert 'No runs.' in cli.invoke(app, ['runs', 'list', '--state', 'failed']).output
    assert cli.invoke(app, ['report', names[0]]).exit_code == 0


@pytest.mark.parametrize('args, says', [(['run', 'pretrian-nothing'], 'Unknown experiment'), (['run', 'NB', '-p', 'lrr=1'], "Did you mean 'lr'"),
    (['run', 'NB', '-p', 'lr'], 'name=value'), (['run', '--resume', 'nothing'], 'Unknown run'), (['runs', 'show', 'nothing'], 'Unknown run'),
    (['sweep', 'NB', '-g', 'lr=x'], 'must be a float'), (['run', 'NB', '-f', 'nothing.yaml'], 'cannot be read'), (['sweep', 'NB', '--backend', 'cloud', '-g', 'lr=1'], 'none of')])
def test_refusals_leave_with_2_and_one_line(tmp_path, args, says):
    nb = notebook(tmp_path/'e01_fit.ipynb', 'lr: float = 0.1', BEGIN, 'run.done()')
    result = cli.invoke(app, [str(nb) if a == 'NB' else a for a in args] + (['--outputs', str(tmp_path/'out')]))
    assert result.exit_code == 2 and says in result.output and 'Traceback' not in result.output
    assert not (tmp_path/'out').exists() or not any((tmp_path/'out').glob('*/journal.jsonl'))


def test_failed_run_names_its_folder_and_leaves_with_1(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', 'lr: float = 0.1', BEGIN, 'import sys; sys.exit(0)', 'run.done()')
    result = cli.invoke(app, ['run', str(nb), '--outputs', str(tmp_path/'out')])
    assert result.exit_code == 1 and 'SystemExit' in result.output and 'medvl run --resume fit-' in result.output


def test_phantom_and_prepare(tmp_path):
    made = cli.invoke(app, ['phantom', str(tmp_path/'source'), '-n', '2', '--size', '64', '40'])
    assert made.exit_code == 0 and (tmp_path/'source'/'index.csv').exists(), made.output
    done = cli.invoke(app, ['prepare', str(tmp_path/'source'), str(tmp_path/'prepared'), '--size', '64', '40', '--jobs', '1'], env={'MEDVL_SALT': str(tmp_path/'salt')})
    assert done.exit_code == 0 and '8 images' in done.output, done.output + repr(done.exception)
    wrong = cli.invoke(app, ['prepare', str(tmp_path/'nothing'), str(tmp_path/'p2')])
    assert wrong.exit_code == 2 and 'index.csv' in wrong.output


@pytest.fixture(scope='module')
def model_and_image(tmp_path_factory):
    "A real saved model (untrained) and a DICOM of the phantom."
    from medvl.api import Model
    from medvl.data.phantom.breast_exam import phantom_exam
    from medvl.data.phantom.breast_dataset import phantom_dicom
    from medvl.methods.recipes import new_method
    folder, exam = tmp_path_factory.mktemp('model'), phantom_exam(0, 3, bits=12)
    phantom_dicom(exam, exam.views['L', 'MLO']).save_as(folder/'x.dcm', enforce_file_format=True)
    Model(new_method('mammoclip', 'smoke', [exam.report]), size=(96, 64)).save_pretrained(folder/'model')
    return str(folder/'model'), str(folder/'x.dcm')


def program(*args):
    "Run the program as a user does."
    return subprocess.run([sys.executable, '-c', 'from medvl.commands import main; main()', *args], capture_output=True, text=True)


def test_model_commands(tmp_path, model_and_image):
    from medvl.commands import app as full
    model, image = model_and_image
    out = cli.invoke(full, ['embed', model, image, image, '-o', str(tmp_path/'e.npy')])
    assert out.exit_code == 0 and np.load(tmp_path/'e.npy').shape == (2, 32), out.output
    for prompts in ([], ['no mass', 'mass']):
        said = cli.invoke(full, ['zero-shot', model, image, *prompts])
        assert said.exit_code == 0 and said.output.splitlines()[1].endswith('  mass'), said.output
    shown = cli.invoke(full, ['explain', model, image, 'there is a mass', '-o', str(tmp_path/'x.png')])
    assert shown.exit_code == 0 and (tmp_path/'x.png').stat().st_size > 500, shown.output
    pair = cli.invoke(full, ['explain', model, image, 'there is a mass', '--against', 'there is no mass', '-o', str(tmp_path/'y.png')])
    assert pair.exit_code == 0 and 'minus its contrary' in pair.output and 'Asked against “there is no mass”' in pair.output, pair.output


@pytest.mark.parametrize('args, says', [(['zero-shot', 'MODEL', 'IMAGE', 'mass'], 'at least two'), (['explain', 'MODEL', 'IMAGE', ' '], 'empty'),
                                        (['embed', 'MODEL', 'absent.dcm'], 'absent.dcm'), (['embed', 'nowhere', 'IMAGE'], 'nowhere')])
def test_model_commands_refuse_in_words(args, says, model_and_image, tmp_path, monkeypatch, capfd):
    from medvl.commands import main
    names = {'MODEL': model_and_image[0], 'IMAGE': model_and_image[1]}
    given = [*(names.get(a, a) for a in args), *(['-o', str(tmp_path/'e.npy')] if args[0] == 'embed' else [])]
    monkeypatch.setattr(sys, 'argv', ['medvl', *given])
    with pytest.raises(SystemExit) as left: main()
    said = capfd.readouterr().err
    assert left.value.code == 2 and says in said and 'Traceback' not in said, said[-500:]
    if says == 'nowhere': # and a process of its own leaves with the same
        done = program(*given)
        assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr, done.stderr[-500:]


def test_what_there_is_is_listed():
    whole = cli.invoke(app, ['--version'])
    assert whole.exit_code == 0 and whole.output.startswith('medvl ')
    assert cli.invoke(app, ['-h']).output == cli.invoke(app, ['--help']).output
    listed = cli.invoke(app, ['run']).output
    assert 'pretrain ' in listed and 'Pre-train a method' in listed and listed == cli.invoke(app, ['experiments']).output
    assert 'xvl ' in cli.invoke(app, ['methods']).output
    assert 'small-2022' in cli.invoke(app, ['recipes', 'xvl']).output and 'lovt' not in cli.invoke(app, ['recipes', 'xvl']).output
    assert 'VQA-RAD' in cli.invoke(app, ['datasets']).output
    assert all(len(line) <= 120 for what in ('run', 'methods', 'recipes', 'datasets') for line in cli.invoke(app, [what]).output.splitlines())
    wrong = cli.invoke(app, ['recipes', 'xlv'])
    assert wrong.exit_code == 2 and 'xvl' in wrong.output


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_of_an_experiment_names_its_parameters(flag, tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', "data: 'Data' = '' # folder\nlr: float = 0.1 # step size\nseed: int = 3 # of all", BEGIN, 'run.done()')
    out = cli.invoke(app, ['run', str(nb), flag]).output
    assert out.index('what goes in') < out.index('data: Data') < out.index('what is done') < out.index('lr: float = 0.1  # step size')
    assert out.index('how much') < out.index('seed: int = 3') < out.index('--resume')
    plain = cli.invoke(app, ['run', flag]).output
    assert 'Usage' in plain and 'what goes in' not in plain
    assert cli.invoke(app, ['run', 'pretrian', flag]).exit_code == 2


@pytest.fixture
def three_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_OUTPUTS', str(tmp_path/'out'))
    nb = notebook(tmp_path/'e01_fit.ipynb', 'lr: float = 0.1\nname: str = "a"', BEGIN,
                  'run.metric("loss", 1 - lr, unit="nats")\nif lr > .05: run.metric("auroc", lr, low=0.0, high=1.0, unit="share")', 'run.done()')
    for lr in (.7, .9, .01): assert cli.invoke(app, ['run', str(nb), '-p', f'lr={lr}']).exit_code == 0


def test_runs_are_listed_sorted_and_the_best_is_named(three_runs):
    out = cli.invoke(app, ['runs', 'list', '--sort', 'metric']).output.splitlines()
    assert [line.split('lr=')[1] for line in out[1:]] == ['0.7', '0.9', '0.01'] and 'auroc 0.9 (0 to 1)' in out[2] and 'name=' not in out[1]
    assert all(len(line) <= 120 for line in out)
    assert len(cli.invoke(app, ['runs', 'list', '--metric', 'auroc']).output.splitlines()) == 3
    assert 'lr=0.9' in cli.invoke(app, ['runs', 'best', 'auroc']).output
    assert 'lr=0.9' in cli.invoke(app, ['runs', 'best', 'loss', '--lowest']).output
    assert 'lr=0.01' in cli.invoke(app, ['runs', 'best', 'loss']).output
    for args in (['best', 'dice'], ['list', '--sort', 'size'], ['list', '--format', 'xml']):
        assert cli.invoke(app, ['runs', *args]).exit_code == 2, args


def test_runs_are_given_out_as_csv_latex_and_markdown(three_runs):
    import io
    import pandas as pd
    table = pd.read_csv(io.StringIO(cli.invoke(app, ['runs', 'list', '--format', 'csv']).output))
    assert sorted(table.loss.round(2)) == [.1, .3, .99] and table.auroc.isna().sum() == 1
    rows = cli.invoke(app, ['runs', 'list', '--format', 'md']).output.splitlines()
    assert len(rows) == 5 and all(r.count('|') == 6 for r in rows)
    assert r'\begin{tabular}' in cli.invoke(app, ['runs', 'list', '--format', 'latex']).output


def test_the_end_prints_the_main_metrics(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', 'lr: float = 0.1', BEGIN,
                  'for i in range(12): run.metric(f"m{i}", i / 10)\nrun.metric("auroc", .8, low=.7, high=.9, unit="share")\nrun.done()')
    out = cli.invoke(app, ['run', str(nb), '--outputs', str(tmp_path/'out')]).output
    assert out.index('auroc: 0.8 (0.7 to 0.9) share') < out.index('m0: 0') and 'and 5 more' in out and 'm8' not in out
