"""A sweep that is killed again and again loses nothing and mislabels nothing."""
import os
import random
import signal
import time

import pytest

from medvl.core.errors import DataError
from medvl.core.paths import digest, read_json, read_jsonl, write_json
from medvl.core.run import run_state
from medvl.run.parameters import RefusedError
from medvl.run.sweep import parse_grid, plan_sweep, run_planned, run_sweep, split_values, sweep_table
from run_notebooks import BEGIN, counting, kill, medvl, notebook, total, until


def _check(table, folder, steps):
    "Every planned run is done once, under its own parameters, with the number these parameters give."
    plan = read_json(folder/'sweep.json')
    assert list(table.state) == ['done'] * len(plan['runs'])
    assert sorted(p.parent.name for p in folder.glob('*/journal.jsonl')) == sorted(r['folder'] for r in plan['runs'])
    for entry, row in zip(plan['runs'], table.itertuples()):
        p = entry['params']
        assert row.total == total(p['slope'], p['seed'], steps) and digest(read_json(folder/entry['folder']/'params.json')) == digest(p)


def test_killed_at_random_nothing_is_lost(tmp_path):
    "Scheduler, runners and kernels are shot in turn; the same command finishes the sweep."
    steps, rng, shots = 10, random.Random(0), 0
    nb = counting(tmp_path/'e01_count.ipynb', steps=steps, pause=0.4)
    command = ['sweep', nb, '-g', 'slope=1,2.5', '-g', 'seed=0,1', '--jobs', '2', '--retries', '0']
    for what in ('scheduler', 'runner', 'kernel'):
        process = medvl(*command, outputs=tmp_path, wait=False)
        event = dict(runner='started', kernel='opened').get(what, 'started') # the target must be there, however busy the machine is
        journals = until(lambda event=event: [p for p in tmp_path.glob('sweep-*/*/journal.jsonl') if run_state(p.parent) == 'running'
                                              and read_jsonl(p)[-1]['event'] in (event, 'heartbeat', 'opened')])
        time.sleep(rng.uniform(0, 0.5))
        if what == 'scheduler': shots += kill(process.pid)
        for journal in journals:
            if what == 'scheduler': continue
            last = [e for e in read_jsonl(journal) if e['event'] == event]
            if last and run_state(journal.parent) == 'running': shots += kill(last[-1]['pid'])
        if what != 'scheduler': process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    code, out, err = medvl(*command, outputs=tmp_path)
    assert code == 0 and shots >= 1, (shots, out, err)
    folders = list(tmp_path.glob('sweep-*'))
    assert len(folders) == 1
    table = sweep_table(folders[0])
    _check(table, folders[0], steps)
    assert table.attempts.max() > 1 # somebody was really hit


@pytest.mark.parametrize('backend, options', [('local', {}), ('dask', {}), ('slurm', {'cluster': 'local'}), ('slurm', {'cluster': 'debug'})],
                         ids=['local', 'dask', 'submitit-local', 'submitit-debug'])
def test_backends_agree(tmp_path, backend, options):
    pytest.importorskip({'dask': 'distributed', 'slurm': 'submitit'}.get(backend, 'medvl'))
    nb = counting(tmp_path/'e01_count.ipynb', steps=2, pause=0)
    grid = dict(slope=['1', '3']) if backend == 'local' else dict(slope=['3'])
    table = run_sweep(nb, grid, dict(seed=4), tmp_path/'out', jobs=2, backend=backend, options=options)
    _check(table, next((tmp_path/'out').iterdir()), 2)
    assert (tmp_path/'out'/next((tmp_path/'out').iterdir())/'summary.csv').exists()


def test_killed_run_is_continued_at_once(tmp_path):
    nb = notebook(tmp_path/'e01_x.ipynb', 'seed: int = 0', BEGIN,
                  'import os\nif not run.path("once").exists():\n    run.path("once").touch()\n    os.kill(os.getpid(), 9)\nrun.metric("total", seed)', 'run.done()')
    table = run_sweep(nb, dict(seed=[5]), outputs=tmp_path/'out', retries=1)
    assert (list(table.state), list(table.attempts), list(table.total)) == (['done'], [2], [5])


def test_failed_runs_are_retried_only_when_asked(tmp_path):
    nb = notebook(tmp_path/'e01_x.ipynb', 'seed: int = 0', BEGIN, f'from pathlib import Path\nif not Path({str(tmp_path/"mended")!r}).exists(): 1/0', 'run.done()')
    assert list(run_sweep(nb, dict(seed=[0]), outputs=tmp_path/'out').attempts) == [1]
    (tmp_path/'mended').touch()
    assert list(run_sweep(nb, dict(seed=[0]), outputs=tmp_path/'out').state) == ['failed']
    assert list(run_sweep(nb, dict(seed=[0]), outputs=tmp_path/'out', retry_failed=True).state) == ['done']


def test_plan_is_checked_before_anything_is_written(tmp_path):
    nb = counting(tmp_path/'e01_count.ipynb')
    for grid, params, says in ((dict(slop=[1]), {}, "Did you mean 'slope'"), (dict(slope=['x']), {}, 'must be a float'), (dict(slope=[1]), dict(slope=2), 'in the grid and'),
                               (dict(slope=['1', '1.0']), {}, 'twice')):
        with pytest.raises(RefusedError, match=says): plan_sweep(nb, grid, params, tmp_path/'out')
    with pytest.raises(RefusedError, match='none of local'): run_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out', backend='cloud')
    assert not (tmp_path/'out').exists()
    assert plan_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out') != plan_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out', fresh=True)


def test_edited_notebook_is_another_sweep_and_a_started_one_keeps_its_own(tmp_path):
    nb = counting(tmp_path/'e01_count.ipynb', steps=2, pause=0)
    folder = plan_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out')
    nb.write_text(nb.read_text().replace('slope * step', '100 * step'))
    assert plan_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out') != folder
    assert run_planned(folder, 0).metrics['total']['value'] == total(1, 0, 2)


def test_mislabelled_run_is_found(tmp_path):
    nb = counting(tmp_path/'e01_count.ipynb', steps=1, pause=0)
    table = run_sweep(nb, dict(slope=[1]), outputs=tmp_path/'out')
    target = next((tmp_path/'out').iterdir())/table.run[0]/'params.json'
    write_json(target, {**read_json(target), 'slope': 2.0})
    with pytest.raises(DataError, match='slope = 2.0, the plan 1.0'): sweep_table(target.parents[1])


def test_grid_texts():
    assert split_values('[a,b],"c,d",{e: [1,2]},f') == ['[a,b]', '"c,d"', '{e: [1,2]}', 'f']
    assert parse_grid(['lr=1,2', 'x=[1,2]']) == dict(lr=['1', '2'], x=['[1,2]'])
    with pytest.raises(RefusedError, match='twice'): parse_grid(['lr=1', 'lr=2'])
    assert 'MEDVL_RUN' not in os.environ


def test_a_sweep_of_an_experiment_of_before(tmp_path):
    "Its old name stands for values of its own, unless the grid or the fixed parameters give them."
    points = lambda *args: [r['params'] for r in read_json(plan_sweep(*args, outputs=tmp_path)/'sweep.json')['runs']]
    assert [(p['samples'], p['duplicates'], p['seed']) for p in points('pretrain_labels', {'seed': [0, 1]})] == [('mixture', 'mask', 0), ('mixture', 'mask', 1)]
    both = points('pretrain_chest', {'method': ['byol', 'clip']}, {'view_options': {'blur': 0.0}})
    assert [(p['method'], p['augment_options']) for p in both] == [('byol', {'blur': 0.0}), ('clip', {'blur': 0.0})]
    assert [p['method'] for p in points('pretrain_chest', {'text_options': [{}]})] == ['simclr']
