"""Plain papermill on an experiment: a word about parameters that nobody has, and copy and report in the run's folder."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from medvl.core.paths import read_json, write_json
from medvl.core.run import Run, run_events, run_folders
from medvl.run.history import brief_runs
from run_notebooks import BEGIN, notebook as bare_notebook, until

PARAMETERS = 'lr: float = 0.1 # step size\nseed: int = 3'
METRIC = 'run.metric("auroc", lr, low=0.0, high=1.0, unit="share")\nprint("told", lr)'


def notebook(path, *sources):
    "As an experiment of ours: with the kernel that it wants."
    kernel = dict(display_name='python3', language='python', name='python3')
    write_json(path, read_json(bare_notebook(path, *sources)) | dict(metadata=dict(kernelspec=kernel)))
    return path


def started(*command, outputs, cwd=None, **kwargs):
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MEDVL_RUN', 'JPY_SESSION_NAME')} | {'MEDVL_OUTPUTS': str(outputs)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, **kwargs)


def papermill(*args, outputs, cwd=None):
    process = started('-m', 'papermill', *args, outputs=outputs, cwd=cwd)
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def settled(outputs, more=lambda run: True):
    "The one run, when the last marks of papermill are in the copy and its helper has written its page after that copy."
    run, = run_folders(outputs)
    copy, page = run/'run.ipynb', run/'report.html'
    ended = lambda: copy.exists() and read_json(copy)['metadata']['papermill']['end_time']
    until(lambda: ended() and page.exists() and page.stat().st_mtime_ns >= copy.stat().st_mtime_ns and more(run), 120)
    return run


@pytest.fixture
def good(tmp_path): return notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'run.done()')


def test_unknown_parameter_is_warned_of_and_the_copy_is_kept(good, tmp_path):
    code, said = papermill('e01_fit.ipynb', 'out_{lr}.ipynb', '-p', 'lr', '0.3', '-p', 'sed', '7', outputs=tmp_path/'runs', cwd=tmp_path)
    assert code == 0, said
    assert "Did you mean 'seed'" in said # in the terminal
    run = settled(tmp_path/'runs')
    written, copy = read_json(tmp_path/'out_0.3.ipynb'), read_json(run/'run.ipynb')
    until(lambda: read_json(run/'run.ipynb') == written)
    shown = [''.join(o['text']) for c in copy['cells'] for o in c.get('outputs', []) if o.get('name') == 'stderr']
    assert any("Did you mean 'seed'" in s for s in shown) # in the notebook
    page = (run/'report.html').read_text()
    assert Run(run).state == 'done' and '0.3 (0 to 1)' in page and 'Did you mean' in page and 'told 0.3' in page
    assert [''.join(c['source']) for c in read_json(run/'source.ipynb')['cells']] == [''.join(c['source']) for c in read_json(good)['cells']]
    line, = brief_runs(tmp_path/'runs').to_dict('records')
    assert 'lr=0.3' in line['changed'] and 'seed=' not in line['changed'] # defaults are known from the notebook


def test_known_parameters_and_none_are_quiet(good, tmp_path):
    for args in ((), ('-p', 'lr', '0.2')):
        outputs = tmp_path/f'runs{len(args)}'
        code, said = papermill(good, tmp_path/'out.ipynb', *args, outputs=outputs)
        assert code == 0 and 'Did you mean' not in said and 'Unknown parameter' not in said, said
        run = settled(outputs)
        assert Run(run).state == 'done' and not [e for e in run_events(run) if e['event'] == 'note']


@pytest.mark.parametrize('how', ['another folder', 'written at the end only', 'read from a pipe'])
def test_other_ways_to_call_papermill(good, tmp_path, how):
    (tmp_path/'sub').mkdir()
    more = {'another folder': ('e01_fit.ipynb', 'out.ipynb', '--cwd', 'sub'), 'read from a pipe': ('-', 'out.ipynb'),
            'written at the end only': ('e01_fit.ipynb', 'out.ipynb', '--no-request-save-on-cell-execute', '--autosave-cell-every', '0')}[how]
    process = started('-m', 'papermill', *more, '-p', 'lr', '0.2', outputs=tmp_path/'runs', cwd=tmp_path, stdin=subprocess.PIPE)
    process.communicate(good.read_text() if how == 'read from a pipe' else None, timeout=240)
    run = settled(tmp_path/'runs')
    assert process.returncode == 0 and Run(run).state == 'done' and 'told 0.2' in (run/'report.html').read_text()


def test_failed_run_leaves_copy_and_report_with_the_failing_cell(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'raise ValueError("no such breast")', 'run.done()')
    code, said = papermill(nb, tmp_path/'out.ipynb', '-p', 'lr', '0.3', outputs=tmp_path/'runs')
    assert code == 1, said
    run = settled(tmp_path/'runs', lambda run: 'An Exception was encountered' in (run/'run.ipynb').read_text())
    info, page = Run(run).info, (run/'report.html').read_text()
    assert info['state'] == 'failed' and info['reason'] == 'ValueError: no such breast in code cell 5; 1 of 6 code cells never ran' and info['exit_code'] == 1
    assert 'This run is not done' in page and 'ValueError: no such breast' in page and '0.3 (0 to 1)' in page
    assert [e['event'] for e in run_events(run)].count('end') == 1


def test_run_that_never_says_done_is_no_done_run(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC)
    assert papermill(nb, tmp_path/'out.ipynb', outputs=tmp_path/'runs')[0] == 0
    info = Run(settled(tmp_path/'runs')).info
    assert info['state'] == 'failed' and 'never called run.done()' in info['reason']


def test_cell_that_fails_after_done_is_said(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, 'run.done()', '1/0')
    assert papermill(nb, tmp_path/'out.ipynb', outputs=tmp_path/'runs')[0] == 1
    run = settled(tmp_path/'runs')
    assert Run(run).state == 'done' and 'After the run was done' in (run/'report.html').read_text()


def test_killed_kernel_leaves_copy_and_report(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'import os; os.kill(os.getpid(), 9)', 'run.done()')
    code, said = papermill(nb, tmp_path/'out.ipynb', outputs=tmp_path/'runs')
    assert code != 0 and 'Kernel died' in said, said
    run = settled(tmp_path/'runs')
    info = Run(run).info
    assert info['state'] == 'killed' and 'code cell 4 of 5' in info['reason'] and info['exit_code'] == 137
    assert 'told 0.1' in (run/'report.html').read_text()


def test_interrupted_papermill_leaves_copy_and_report(tmp_path):
    nb = notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'import time; time.sleep(600)', 'run.done()')
    process = started('-m', 'papermill', nb, tmp_path/'out.ipynb', outputs=tmp_path/'runs', start_new_session=True)
    until(lambda: any((f/'metrics.json').exists() for f in run_folders(tmp_path/'runs')), 120)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT) # Ctrl-C
    process.communicate(timeout=120)
    run, = run_folders(tmp_path/'runs')
    until(lambda: (run/'report.html').exists(), 120)
    info = Run(run).info
    assert info['state'] == 'killed' and 'code cell 4 of 5' in info['reason'], info
    assert 'told 0.1' in (run/'report.html').read_text()


def test_script_that_calls_papermill_is_found_too(tmp_path):
    "No command line tells the file: it is found by its cells; the script goes on after the notebook."
    notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'run.done()')
    notebook(tmp_path/'decoy.ipynb', PARAMETERS, BEGIN, METRIC, 'run.done()')
    code = '''
        import papermill, os
        os.makedirs("made")
        papermill.execute_notebook("e01_fit.ipynb", "made/out.ipynb", dict(lr=.4, sed=1), progress_bar=False)
        input()'''
    process = started('-c', textwrap.dedent(code), outputs=tmp_path/'runs', cwd=tmp_path, stdin=subprocess.PIPE)
    until(lambda: (tmp_path/'runs').exists() and run_folders(tmp_path/'runs'), 120)
    run = settled(tmp_path/'runs')
    assert process.poll() is None
    process.communicate('\n', timeout=60)
    assert Run(run).state == 'done' and 'told 0.4' in (run/'report.html').read_text() and 'Did you mean' in (run/'report.html').read_text()


def test_file_elsewhere_is_found_when_it_is_named(tmp_path):
    notebook(tmp_path/'e01_fit.ipynb', PARAMETERS, BEGIN, METRIC, 'run.done()')
    call = 'import papermill; papermill.execute_notebook("e01_fit.ipynb", {0!r}, {1}, progress_bar=False)'
    far, runs = tmp_path/'a'/'b'/'c'/'d', tmp_path/'runs'
    far.mkdir(parents=True)
    for k, params in enumerate((dict(lr=.4), dict(lr=.4, PAPERMILL_OUTPUT_PATH=str(far/'out1.ipynb')))):
        process = started('-c', call.format(str(far/f'out{k}.ipynb'), params), outputs=runs/str(k), cwd=tmp_path)
        assert process.communicate(timeout=120) and process.returncode == 0
    lost, = run_folders(runs/'0')
    run = settled(runs/'1')
    assert not [e for e in run_events(run) if e['event'] == 'note'] # nobody calls papermill's own name unknown
    until(lambda: (lost/'report.html').exists() and '--inject-output-path' in (lost/'report.html').read_text())
    assert not (lost/'run.ipynb').exists()


def test_elsewhere_nothing_happens(good, tmp_path):
    "Without papermill, e.g. in JupyterLab or under nbclient, no helper is started and the run is as it was; `medvl run` has its own copy."
    code = '''
        import nbclient, nbformat, psutil
        nb = nbformat.read("e01_fit.ipynb", 4)
        nb.cells.insert(3, nbformat.v4.new_code_cell("import psutil; print([p.cmdline() for p in psutil.Process().children(recursive=True)])"))
        nbclient.execute(nb)
        print("helpers", [o for c in nb.cells for o in c.get("outputs", []) if "papermill_copy" in o.get("text", "")])
        print("asked", any("[" in o.get("text", "") for c in nb.cells for o in c.get("outputs", [])))'''
    process = started('-c', textwrap.dedent(code), outputs=tmp_path/'runs', cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert 'helpers []' in out and 'asked True' in out, out + err
    run, = run_folders(tmp_path/'runs')
    assert Run(run).state == 'done' and not (run/'run.ipynb').exists() and not (run/'report.html').exists()
