"""Clocks that are set, parents that are shot, folders that two want, places that cannot be written."""
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training import contents, run, small
from typer.testing import CliRunner

from medvl.core.errors import DataError
from medvl.core.paths import append_jsonl, read_jsonl
from medvl.core.run import FolderLock, Run, RunBusy, is_alive, process_identity, run_info
from medvl.run.report import write_report
from medvl.run.runner import _changes
from run_notebooks import medvl, notebook, until

linux = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='process start times in ticks are read from /proc')
HOSTILE = '<script>alert(1)</script>&"\''


def gone(process):
    try: return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess: return True


@linux
def test_identity_survives_clock_steps(monkeypatch):
    me = process_identity()
    monkeypatch.setattr(psutil.Process, 'create_time', lambda self: me['process_started'] + 3600.0) # what follows from /proc/stat after the clock was set
    assert is_alive(me) is True and is_alive({**me, 'ticks': me['ticks'] + 1}) is False
    assert is_alive({k: v for k, v in me.items() if k != 'ticks'}) is False # an old journal knows the wall clock only


@linux
def test_seconds_of_a_run_survive_clock_steps(tmp_path):
    run = Run.create('x', {}, tmp_path)
    run.begin('test')
    started = read_jsonl(run.folder/'journal.jsonl')[-1]
    append_jsonl(run.folder/'journal.jsonl', dict(event='heartbeat', attempt=1, time='1999-01-01T00:00:00.000+00:00', clock=started['clock'] + 5))
    assert 0 <= run_info(run.folder)['seconds'] < 60 # still running
    append_jsonl(run.folder/'journal.jsonl', dict(event='end', state='failed', attempt=1, time='1999-01-01T00:00:00.000+00:00', clock=started['clock'] + 7))
    assert run_info(run.folder)['seconds'] == 7.0
    run._release()


@linux
def test_kernel_survives_a_clock_step_and_html_survives_everything(tmp_path):
    "The wall clock is set while a kernel runs; its Run is shown with hostile names and a NaN, in the notebook and in the report."
    nb = notebook(tmp_path/'x.ipynb', 'step: float = 1000.0', 'from medvl.core.run import Run\nrun = Run.current("x", globals())',
                  'import psutil, time\nreal = psutil._pslinux.boot_time\npsutil._pslinux.boot_time = lambda: real() + step\ntime.sleep(2.5)',
                  f'run.metric({HOSTILE!r}, float("nan"), unit={HOSTILE!r})\nrun.metric("inf", float("inf"))\nrun.metric("ok", 0.5)\nprint(run._repr_html_())\nrun', 'run.done()')
    code, out, err = medvl('run', nb, outputs=tmp_path/'out')
    assert code == 0, err
    page = next((tmp_path/'out').glob('*/report.html')).read_text()
    assert '<script' not in page and 'font:16px/1.6 -apple-system,"Segoe UI",Roboto' in page and '&#34;Segoe' not in page


def test_html_of_a_run(tmp_path):
    run = Run.create('x', {}, folder=tmp_path/'a&<b>')
    run.metric(HOSTILE, float('nan')); run.metric('inf', float('-inf')); run.metric('ok', 0.5)
    page = run._repr_html_()
    assert '<script' not in page and '<b>a&amp;&lt;b&gt;</b>' in page and 'nan' in page and '-inf' in page and '0.5' in page
    style = write_report(run.folder).read_text().split('<style>')[1].split('</style>')[0]
    assert '&#' not in style and '"Segoe UI"' in style


HELPER = '''import sys, time
from medvl.core.orphans import end_with_parent
end_with_parent(int(sys.argv[1]), .05)
time.sleep(600)'''


def test_a_helper_whose_parent_is_gone_already_ends_at_once():
    assert subprocess.run([sys.executable, '-c', HELPER, '1' if os.getppid() != 1 else '2'], timeout=60).returncode == 137


LOADERS = '''import sys
sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
from training import Pairs, run
class Slow(Pairs):
    def __getitem__(self, key):
        import time; time.sleep(.2)
        return super().__getitem__(key)
run(sys.argv[1], data=Slow(), workers=2)'''


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_loaders_end_with_a_training_that_is_shot_and_its_folder_is_free(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', LOADERS, str(tmp_path), str(Path(__file__).parents[1])], env={**os.environ, 'MEDVL_PROGRESS': '0', 'OMP_NUM_THREADS': '1'})
    loaders = until(lambda: len(found := psutil.Process(child.pid).children(recursive=True)) >= 2 and found, 60)
    until(lambda: (tmp_path/'.lock').exists(), 60)
    with pytest.raises(DataError, match='another training is using this folder'): run(tmp_path)
    child.kill(); child.wait()
    FolderLock(tmp_path).release() # at once, though the loaders may still live
    until(lambda: all(map(gone, loaders)), 5)


POOL = '''import sys, time
from joblib import Parallel, delayed
from medvl.core.orphans import pool_options
def work(k):
    open(sys.argv[1] + str(k), "w").close(); time.sleep(600)
Parallel(2, **pool_options())(delayed(work)(k) for k in range(2))'''


@pytest.mark.parametrize('moment', ['starting', 'working'])
def test_pool_workers_end_with_their_parent(tmp_path, moment):
    child = subprocess.Popen([sys.executable, '-c', POOL.replace('sys.argv[1]', repr(f'{tmp_path}/'))], stderr=subprocess.DEVNULL)
    workers = until(lambda: len(found := [c for c in psutil.Process(child.pid).children(recursive=True) if '--process-name' in c.cmdline()]) == 2 and found, 60)
    if moment == 'working': until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    child.kill(); child.wait()
    until(lambda: all(map(gone, workers)), 20)


def test_one_folder_one_holder(tmp_path):
    "In one process, in two, after a fork, and after the file was removed by an orderly end."
    first = FolderLock(tmp_path)
    with pytest.raises(RunBusy): FolderLock(tmp_path)
    ask = [sys.executable, '-c', f'from medvl.core.run import FolderLock\nFolderLock({str(tmp_path)!r})']
    assert subprocess.run(ask, capture_output=True).returncode == 1
    if hasattr(os, 'fork'):
        pid = os.fork()
        if pid == 0:
            first.release() # the child's copy holds nothing
            os._exit(0)
        os.waitpid(pid, 0)
        assert subprocess.run(ask, capture_output=True).returncode == 1
    first.release(); first.release()
    assert not (tmp_path/'.lock').exists()
    second = FolderLock(tmp_path)
    first.release()
    with pytest.raises(RunBusy): FolderLock(tmp_path)
    second.release()


def test_two_trainings_in_one_folder(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(DataError, match='another training .* Wait for it'): run(tmp_path)
    lock.release()
    run(tmp_path, max_steps=2, warmup=0)
    assert not (tmp_path/'.lock').exists()


def test_another_version_is_said_at_resume(tmp_path, monkeypatch):
    import medvl.train.loop as loop
    run(tmp_path/'whole', max_steps=4)
    monkeypatch.setattr(loop, '__version__', '0.0.9')
    monkeypatch.setattr(loop, '_steps', lambda l, real=loop._steps: (g for _, g in zip(range(2), real(l))))
    run(tmp_path/'a', max_steps=4)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match='made with medvl 0.0.9 .now '): run(tmp_path/'a', method=small(seed=5), max_steps=4)
    assert contents(tmp_path/'a') == contents(tmp_path/'whole')


def test_what_changed_is_said_by_the_runner():
    old = dict(versions=dict(medvl='0.1', torch='2.1'), python='3.11', commit='a' * 40, hardware=dict(omp_threads='1', cpus=2, torch_threads=9))
    new = dict(versions=dict(medvl='0.2', torch='2.1'), python='3.11', commit='a' * 40, hardware=dict(omp_threads=None, cpus=2, gpus=[]))
    assert _changes(old, old) == [] and 'medvl 0.1 → 0.2, threads (OMP_NUM_THREADS) 1 → not set' in _changes(old, new)[0]


NOWHERE = ['/sys/x', '/dev/null/x', '/proc/x'] if Path('/sys').exists() else ['/dev/null/x']


@pytest.mark.parametrize('place', NOWHERE)
@pytest.mark.parametrize('args', [['run', 'NB'], ['sweep', 'NB', '-g', 'lr=1'], ['phantom', 'PLACE', '-n', '1'], ['prepare', 'SOURCE', 'PLACE'], ['embed', 'model', 'image.png', '-o', 'PLACE/e.npy'],
                                  ['explain', 'model', 'image.png', 'a mass', '-o', 'PLACE/x.png'], ['convert', 'x.tar', 'PLACE/y']])
def test_unwritable_places_are_one_line(tmp_path, monkeypatch, place, args):
    from medvl.commands import app
    from medvl.data.phantom.breast_dataset import write_phantom
    monkeypatch.setenv('MEDVL_OUTPUTS', place)
    monkeypatch.setenv('MEDVL_SALT', str(tmp_path/'salt'))
    if 'SOURCE' in args: write_phantom(tmp_path/'source', 1, (64, 40), 0, 'easy', 'png', 1)
    words = dict(NB=str(notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', 'pass')), PLACE=place, SOURCE=str(tmp_path/'source'))
    out = CliRunner().invoke(app, [words.get(a, a.replace('PLACE', place)) for a in args])
    assert out.exit_code == 2 and out.output.startswith('medvl: ') and out.output.count('\n') == 1 and place.split('/x')[0] in out.output, (out.output, out.exception)


def test_errors_of_files_are_one_line_for_every_command(tmp_path, monkeypatch):
    from medvl.commands import app
    (tmp_path/'file').write_text('x')
    for args in (['runs', 'show', str(tmp_path/'file'/'x')], ['report', str(tmp_path/'none')], ['embed', str(tmp_path/'none'), 'x.png', '-o', str(tmp_path/'e.npy')], ['params', str(tmp_path/'none.ipynb')],
                 ['run', '--resume', str(tmp_path/'none')], ['sweep', '--resume', str(tmp_path/'none')]):
        out = CliRunner().invoke(app, args)
        assert out.exit_code == 2 and out.output.count('\n') == 1, (args, out.output)


def test_a_runs_name_is_a_model(tmp_path, monkeypatch):
    from medvl.commands import model_of
    monkeypatch.setenv('MEDVL_OUTPUTS', str(tmp_path))
    one, two = Run.create('pretrain', {}), Run.create('x', {}, folder=tmp_path/'sweep-p'/'0001-ab')
    for r in (one, two):
        (r.folder/'model').mkdir()
        (r.folder/'model'/'config.json').touch()
    for text, folder in ((one.folder.name, one.folder), ('pretrain-', one.folder), ('0001-ab', two.folder), ('sweep-p/0001-ab', two.folder), (str(two.folder), two.folder)):
        assert Path(model_of(text)) == (folder/'model').resolve(), text
    assert model_of('owner/name') == 'owner/name' and model_of('nowhere') == 'nowhere'
