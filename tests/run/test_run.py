"""The runner's word can be trusted: every way of not finishing is told from success."""
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.paths import append_jsonl, read_json, read_jsonl
from medvl.core.run import HEARTBEAT, STALE, Run, RunBusy, is_alive, process_identity, run_info, run_state
from medvl.run.parameters import Parameter, RefusedError, check_bounds, check_parameters, convert, notebook_parameters
from medvl.run.report import clean_html, write_report
from medvl.run.runner import ALIASES, RunFailedError, find_experiment, find_run, names_now, run_experiment
from run_notebooks import BEGIN, counting, medvl, notebook, total, until

DONE = 'run.metric("answer", 42)\nrun.done()'


@pytest.mark.parametrize('cells, state, code, says', [
    ([BEGIN, DONE], 'done', 0, ''),
    ([BEGIN, 'import sys; sys.exit(0)', DONE], 'failed', 1, 'SystemExit'),
    ([BEGIN, DONE, 'import sys; sys.exit(0)', 'print("never")'], 'failed', 1, 'never ran'),
    ([BEGIN, 'import os; os.kill(os.getpid(), 9)', DONE], 'killed', 137, 'kernel died'),
    ([BEGIN, 'import os; os._exit(0)', DONE], 'killed', 137, 'kernel died'),
    ([BEGIN, '1/0', DONE], 'failed', 1, 'ZeroDivisionError'),
    ([BEGIN, 'print("forgot to say done")'], 'failed', 1, 'never called run.done()'),
    (['print("never opened the run")'], 'failed', 1, 'never called run.done()'),
    (['lr = 7.0', BEGIN, DONE], 'failed', 1, 'labelled lr = 0.5'),
], ids=['done', 'sys.exit', 'exit after done', 'SIGKILL', '_exit', 'exception', 'no done', 'no run', 'relabelled'])
def test_every_ending_has_its_name(tmp_path, cells, state, code, says):
    nb = notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', *cells)
    run = run_experiment(nb, dict(lr='0.5'), outputs=tmp_path/'out', check=False)
    info = run_info(run.folder)
    assert (info['state'], info['exit_code']) == (state, code), info
    assert says in info['reason']
    assert (run.folder/'report.html').exists() and (run.folder/'run.ipynb').exists()
    assert read_json(run.folder/'params.json') == {'lr': 0.5}


def test_killed_cells_are_not_marked_completed(tmp_path):
    nb = notebook(tmp_path/'x.ipynb', 'lr = 1', BEGIN, 'import os; os.kill(os.getpid(), 9)', DONE)
    run = run_experiment(nb, outputs=tmp_path, check=False)
    marks = [c['metadata'].get('papermill', {}).get('status') for c in read_json(run.folder/'run.ipynb')['cells'] if c['cell_type'] == 'code']
    assert marks[-2:] == ['killed', 'pending'] and marks[0] == 'completed'


def test_failure_raises_and_keeps_all(tmp_path):
    nb = notebook(tmp_path/'x.ipynb', 'lr = 1', BEGIN, 'run.metric("before", 1.5)', 'raise ValueError("sample 17 is NaN")')
    with pytest.raises(RunFailedError, match='sample 17 is NaN') as e: run_experiment(nb, outputs=tmp_path)
    assert (e.value.exit_code, e.value.run.metrics['before']['value']) == (1, 1.5)
    assert 'sample 17 is NaN' in (e.value.run.folder/'report.html').read_text()


@pytest.mark.parametrize('params, says', [(dict(lrr=1), "Did you mean 'lr'"), (dict(lr='fast'), 'must be a float'), (dict(lr=True), 'must be a float'),
                                          (dict(steps='2.5'), 'must be an int'), (dict(lr='nan'), 'must be a float')])
def test_refused_before_anything_runs(tmp_path, params, says):
    nb = notebook(tmp_path/'x.ipynb', 'lr: float = 0.1\nsteps: int = 3', BEGIN, DONE)
    with pytest.raises(RefusedError, match=says): run_experiment(nb, params, outputs=tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('path', sorted((Path(__file__).parents[2]/'nbs').glob('[eb]*/[eb]*.ipynb')), ids=lambda p: p.stem)
def test_what_stands_in_a_notebook_may_be_typed(path):
    "A default that its own help refuses ('0: none; else at least 2') could not be given by hand."
    for p in notebook_parameters(path): check_bounds(p, p.default)


@pytest.mark.parametrize('tags, source, says', [((), 'lr = 1', 'tagged "parameters"'), (('parameters',), 'lr = = 1', 'not Python')])
def test_bad_notebook_is_refused(tmp_path, tags, source, says):
    with pytest.raises(RefusedError, match=says): run_experiment(notebook(tmp_path/'x.ipynb', source, BEGIN, tags=tags), outputs=tmp_path/'out')
    (tmp_path/'text.ipynb').write_text('no json')
    with pytest.raises(RefusedError, match='no notebook'): run_experiment(tmp_path/'text.ipynb', outputs=tmp_path/'out')


def test_same_interpreter_whatever_is_installed_as_python3(tmp_path):
    spec = tmp_path/'jupyter'/'kernels'/'python3'
    spec.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps(dict(argv=['/bin/false'], display_name='wrong', language='python')))
    nb = notebook(tmp_path/'x.ipynb', 'lr = 1', BEGIN, 'import sys; run.note(sys.executable)', DONE)
    code, out, err = medvl('run', nb, outputs=tmp_path/'out', env={'JUPYTER_PATH': str(tmp_path/'jupyter')})
    assert code == 0, err
    folder = next((tmp_path/'out').iterdir())
    assert [e['text'] for e in read_jsonl(folder/'journal.jsonl') if e['event'] == 'note'] == [sys.executable]


def _running(outputs):
    "Wait until a counting run has made a few steps; its folder."
    def look():
        for p in Path(outputs).glob('*/state.json'):
            if json.loads(p.read_text())[0] >= 3: return p.parent
    return until(look)


@pytest.mark.parametrize('sig, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_end(tmp_path, sig, code):
    process = medvl('run', counting(tmp_path/'e01_count.ipynb', steps=400), outputs=tmp_path/'out', wait=False)
    folder = _running(tmp_path/'out')
    with pytest.raises(RefusedError, match='is running'): run_experiment(resume=folder)
    process.send_signal(sig)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    info = run_info(folder)
    assert (info['state'], info['exit_code']) == ('killed', code) and '--resume' in err


def test_time_limit(tmp_path):
    run = run_experiment(counting(tmp_path/'e01_count.ipynb', steps=400), outputs=tmp_path, timeout=2.5, check=False)
    assert (run.info['state'], run.info['exit_code']) == ('killed', 124) and 'time limit' in run.info['reason']


def test_killed_runner_is_seen_its_kernel_ends_and_resume_gives_the_same_number(tmp_path):
    nb = counting(tmp_path/'e01_count.ipynb', steps=40)
    process = medvl('run', nb, '-p', 'slope=2', outputs=tmp_path/'out', wait=False)
    folder = _running(tmp_path/'out')
    events = read_jsonl(folder/'journal.jsonl')
    kernel = next(e for e in events if e['event'] == 'opened')
    owner = next(e for e in events if e['event'] == 'started')
    process.kill()
    process.communicate()
    assert run_state(folder) == 'killed'
    until(lambda: is_alive(dict(kernel, machine=owner['machine'])) is False, 5)
    with pytest.raises(RefusedError, match='slope = 2.0'): run_experiment(resume=folder, params=dict(slope=3))
    before = json.loads((folder/'state.json').read_text())[0]
    run = run_experiment(resume=folder)
    assert (run.state, run.info['attempt'], run.metrics['total']['value']) == ('done', 2, total(2, 0, 40)) and 3 <= before < 40
    assert (folder/'attempts'/'1'/'provenance.json').exists()
    with pytest.raises(RefusedError, match='is done'): run_experiment(resume=folder)


def test_resume_with_a_mended_notebook_says_so(tmp_path):
    nb = notebook(tmp_path/'e01_x.ipynb', 'lr = 1', BEGIN, '1/0', 'run.done()')
    run = run_experiment(nb, outputs=tmp_path/'out', check=False)
    notebook(nb, 'lr = 1', BEGIN, '1/1', 'run.done()')
    assert run_experiment(resume=run.folder).state == 'done'
    assert 'was changed since attempt 1' in (run.folder/'report.html').read_text()
    assert '1/0' in (run.folder/'attempts'/'1'/'source.ipynb').read_text() and '1/1' in (run.folder/'source.ipynb').read_text()


def test_one_folder_has_one_owner(tmp_path):
    run = Run.create('x', {}, tmp_path)
    run.begin('runner')
    with pytest.raises(RunBusy): Run(run.folder).begin('runner')
    run.end('killed')
    Run(run.folder).begin('runner')


def test_journal_survives_a_torn_line(tmp_path):
    run = Run.create('x', {}, tmp_path)
    run.begin('runner')
    with open(run.folder/'journal.jsonl', 'a') as f: f.write('{"event": "end", "state": "do')
    assert run_state(run.folder) == 'running'
    run.write('finished')
    run.end('done')
    assert run_state(run.folder) == 'done'


def test_other_machine_is_judged_by_its_heartbeat(tmp_path):
    from datetime import UTC, datetime, timedelta
    who = dict(process_identity(), machine='another', host='node7')
    at = lambda s: (datetime.now(UTC) - timedelta(seconds=s)).isoformat()
    append_jsonl(tmp_path/'journal.jsonl', dict(event='started', attempt=1, time=at(9000), **who))
    append_jsonl(tmp_path/'journal.jsonl', dict(event='heartbeat', attempt=1, time=at(HEARTBEAT)))
    assert run_state(tmp_path) == 'running'
    (tmp_path/'journal.jsonl').unlink()
    append_jsonl(tmp_path/'journal.jsonl', dict(event='started', attempt=1, time=at(9000), **who))
    append_jsonl(tmp_path/'journal.jsonl', dict(event='heartbeat', attempt=1, time=at(STALE + 5)))
    assert run_state(tmp_path) == 'killed'


def test_old_attempt_cannot_speak_for_the_new_one(tmp_path):
    run = Run.create('x', {}, tmp_path)
    run.begin('runner')
    run.write('finished')
    run.end('killed')
    late = Run(run.folder)
    late.attempt = 1
    run.begin('runner')
    late.write('finished') # a kernel of the first attempt that lived on
    run.end('done')
    assert run_state(run.folder) == 'failed'


def test_run_is_found_by_the_beginning_of_its_name(tmp_path):
    run = Run.create('pretrain', {}, tmp_path)
    assert find_run('pretrain', tmp_path) == run.folder and find_run(run.folder) == run.folder
    Run.create('pretrain', {'a': 1}, tmp_path)
    with pytest.raises(RefusedError, match='beginning of 2 runs'): find_run('pretrain', tmp_path)
    with pytest.raises(RefusedError, match='Unknown run'): find_run('zzz', tmp_path)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_through_the_command_line(x):
    assert convert(Parameter('lr', 'float', 0.1), repr(x)) == x


@given(st.text(min_size=1))
def test_text_is_never_changed(x):
    assert convert(Parameter('name', 'str', ''), x) == x


@given(st.text(alphabet='abcdefgh_', min_size=1, max_size=8))
@settings(max_examples=30)
def test_unknown_names_never_pass(name):
    path = Path(os.environ.get('TMPDIR', '/tmp'))/f'medvl-test-{os.getpid()}.ipynb'
    notebook(path, 'abc: int = 1\nhead: str = "x"')
    try:
        if name in ('abc', 'head'): assert set(check_parameters(path, {name: '1'})) == {'abc', 'head'}
        else:
            with pytest.raises(RefusedError, match='Unknown parameter'): check_parameters(path, {name: '1'})
    finally: path.unlink()


def test_optional_lists_literals_and_magics(tmp_path):
    nb = notebook(tmp_path/'x.ipynb', '%matplotlib inline\nimport os\na: Optional[int] = None # at most\nb: list[int] = [1]\nc: "Literal[\'x\', \'y\']" = \'x\'\n'
                  'd: dict = {}\nroot = os.getcwd() # computed\nz: int | str = 3')
    found = {p.name: p for p in notebook_parameters(nb)}
    assert found['root'].computed and found['a'].help == 'at most' and found['c'].choices == ('x', 'y')
    assert check_parameters(nb, dict(a='none', b='4,5', d='{k: 1}', z='seven')) == dict(a=None, b=[4, 5], c='x', d={'k': 1}, z='seven')
    assert check_parameters(nb, dict(a='3', z='7'))['z'] == 7
    for bad in (dict(b='1,x'), dict(c='z'), dict(d='3')):
        with pytest.raises(RefusedError): check_parameters(nb, bad)


HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(1)>'


def test_report_is_self_contained_and_harmless(tmp_path):
    import pandas as pd
    nb = notebook(tmp_path/'x.ipynb', f'text: str = {HOSTILE!r} # {HOSTILE}', BEGIN,
                  f'import pandas as pd\nfrom IPython.display import HTML, display\nrun.note({HOSTILE!r})\nrun.table("t", pd.DataFrame({{"{HOSTILE}": [{HOSTILE!r}]}}))\n'
                  f'run.metric({HOSTILE!r}, 1)\nprint({HOSTILE!r})\ndisplay(HTML({HOSTILE!r}))', 'run.done()')
    run = run_experiment(nb, outputs=tmp_path)
    page = (run.folder/'report.html').read_text()
    assert '<script' not in page and '<img src=x' not in page and 'onerror=alert(1)>' not in page.replace('onerror=alert(1)&gt;', '')
    assert 'src="http' not in page and '<link' not in page and 'meant for diagnosis' in page
    pd.DataFrame().to_csv(run.folder/'tables'/'empty.csv')
    write_report(run.folder)


@given(st.text(alphabet='<>/abscriptimgonload ="\'&;', max_size=60))
def test_cleaned_html_never_acts(text):
    out = clean_html(text).lower()
    assert '<script' not in out and '<img' not in out and '<style' not in out


def test_by_hand_run_and_abandoned_run(tmp_path):
    first = Run.current('hand', dict(a=1), outputs=tmp_path)
    second = Run.current('hand', dict(a=1), outputs=tmp_path)
    assert first.folder != second.folder and (first.state, second.state) == ('killed', 'running')
    second.done()
    assert second.state == 'done'
    with pytest.raises(RefusedError, match='by hand'): run_experiment(resume=first.folder)


def test_a_notebook_that_was_run_before_can_be_run_again(tmp_path, monkeypatch):
    "By hand in JupyterLab the names of an earlier run are still there: objects and large results are no parameters."
    from medvl.core.run import Run
    monkeypatch.delenv('MEDVL_RUN', raising=False)
    names = {'__name__': '__main__', 'lr': 0.1, 'judged': {'mass': object()}, 'table': [list(range(5000))], 'bad': float('nan'), 'tasks': ['a']}
    run = Run.current('again', names, outputs=tmp_path)
    assert run.params == {'lr': 0.1, 'tasks': ['a']}
    run.done()


def old_run(folder, name, params, notebook_name):
    "A run folder as the experiments of before left it when they were killed: begun, with their own notebook, which is gone now."
    run = Run.create(name, params, folder.parent, folder, notebook=str(folder.parent/notebook_name), notebook_sha256='0', cwd=str(folder.parent))
    run.begin('runner')
    run.end('killed', 'for the test', 137)
    notebook(folder/'source.ipynb', 'a = 1', 'raise ImportError("the experiment of before")')
    return run


def test_experiments_of_before_are_found_and_their_parameters_too():
    assert find_experiment('pretrain_chest') == find_experiment('e15_pretrain_chest') == find_experiment('pretrain')
    assert names_now('e12_pretrain_labels', dict(duplicates='positives')) == dict(samples='mixture', duplicates='positives')
    assert names_now('my/pretrain.ipynb', dict(text_options={})) == dict(text_options={})
    with pytest.raises(RefusedError, match='is called augment_options now'): names_now('pretrain_chest', dict(view_options={}), ['augment_options'])
    for name in ALIASES: assert set(names_now(name, {})) | set(ALIASES[name].renamed.values()) <= {p.name for p in notebook_parameters(find_experiment(name))}


def test_a_run_of_an_experiment_of_before_goes_on(tmp_path):
    "The old folder, its old name and parameters; what they are called now; to the numbers of a new run."
    chest = dict(method='simclr', config='smoke', images=20, view_options={'blur': 0.0}, text_options={}, max_steps=1, seed=1)
    run = old_run(tmp_path/'pretrain_chest-1', 'pretrain_chest', chest, 'e15_pretrain_chest.ipynb')
    with pytest.raises(RefusedError, match='other parameters'): run_experiment(resume=run.folder, params=dict(view_options={'blur': 1.0}))
    with pytest.raises(RefusedError, match='is a run of pretrain_chest'): run_experiment('zero_shot', resume=run.folder)
    done = run_experiment('pretrain_chest', resume=run.folder, params=dict(view_options={'blur': 0.0}), report=False)
    assert run_state(run.folder) == 'done' and done.name == 'pretrain_chest' and read_json(run.folder/'params.json') == chest
    new = run_experiment('pretrain_chest', {k: v for k, v in chest.items() if k != 'method'}, tmp_path, report=False)
    same = lambda r: {k: v['value'] for k, v in r.metrics.items()}
    assert new.name == 'pretrain' and new.params['method'] == 'simclr' and same(new) == same(done)


def test_a_terminal_sees_the_work_inside(tmp_path):
    "Step, loss and time left of the bar in the notebook, drawn by the runner; nothing is left behind."
    import os
    import pty
    import sys
    nb = notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', BEGIN, 'import time\nfrom medvl.core.progress import progress\n'
                  'with progress(desc="train", total=12, unit="step") as bar:\n    for i in range(12):\n        time.sleep(.2)\n'
                  '        bar.update(); bar.set_postfix(loss=f"{i / 10:.3f}", refresh=False)\n        list(progress(range(3), desc="inner"))', 'run.done()')
    child, fd = pty.fork()
    if not child:
        os.environ.pop('IN_TEST', None); os.environ.pop('MEDVL_PROGRESS', None)
        os.execv(sys.executable, [sys.executable, '-c', 'from medvl.commands import main; main()', 'run', str(nb), '--outputs', str(tmp_path/'out')])
    out = b''
    while True:
        try: more = os.read(fd, 65536)
        except OSError: break # Linux says so at the end of a terminal
        if not more: break
        out += more
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, out.decode()
    text = out.decode()
    assert 'of 12 steps' in text and 'loss=0.' in text and 's left' in text and 'cell 4 of 5  train' in text and 'inner' not in text, text
    assert not list((tmp_path/'out').glob('*/.progress*'))


def test_a_good_run_ends_without_interrupting_its_kernel(tmp_path, monkeypatch):
    "An interruption of an idle kernel stands as ERROR in the log, or in the terminal."
    from jupyter_client.manager import AsyncKernelManager
    seen, own = [], AsyncKernelManager._async_interrupt_kernel

    async def interrupt(self):
        seen.append(self)
        await own(self)
    monkeypatch.setattr(AsyncKernelManager, '_async_interrupt_kernel', interrupt)
    run = run_experiment(notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', BEGIN, 'run.done()'), outputs=tmp_path/'out')
    assert run.state == 'done' and not seen
