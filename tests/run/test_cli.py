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


@pytest.mark.parametrize('args, says', [(['zero-shot', 'MODEL', 'IMAGE', 'mass'], 'at least two'), (['explain', 'MODEL', 'IMAGE', ' '], 'empty'),
                                        (['embed', 'MODEL', 'absent.dcm'], 'absent.dcm'), (['embed', 'nowhere', 'IMAGE'], 'nowhere')])
def test_model_commands_refuse_in_words(args, says, model_and_image, tmp_path):
    names = {'MODEL': model_and_image[0], 'IMAGE': model_and_image[1]}
    done = program(*[names.get(a, a) for a in args], *(['-o', str(tmp_path/'e.npy')] if args[0] == 'embed' else []))
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr, done.stderr[-500:]

