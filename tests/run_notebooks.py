"""Tiny experiment notebooks for the tests of the runner."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BEGIN = 'from medvl.core.run import Run\nrun = Run.current("test", globals())'
# counts in steps of 0.05 s with a checkpoint each; the result depends on parameters alone
COUNT = '''import time, json
state = run.path("state.json")
done, total = json.loads(state.read_text()) if state.exists() else (0, 0.0)
for step in range(done, steps):
    total += slope * step + seed
    time.sleep(pause)
    tmp = run.path("state.tmp"); tmp.write_text(json.dumps([step + 1, total])); tmp.replace(state)
run.metric("total", total)'''


def notebook(path, *sources, tags=('parameters',)):
    "Write a notebook whose first code cell is tagged."
    title = dict(cell_type='markdown', id='title', metadata={}, source='# A test\n\nSome **markdown** with <b>html</b>.')
    cells = [dict(cell_type='code', id=f'c{k}', metadata=dict(tags=list(tags) if k == 0 else []), source=s, outputs=[], execution_count=None)
             for k, s in enumerate(sources)]
    Path(path).write_text(json.dumps(dict(cells=[title, *cells], metadata={}, nbformat=4, nbformat_minor=5)))
    return Path(path)


def counting(path, steps=20, pause=0.05):
    return notebook(path, f'slope: float = 1.0\nseed: int = 0\nsteps: int = {steps}\npause: float = {pause}', BEGIN, COUNT, 'run.done()')


def total(slope, seed, steps): return sum(slope * k + seed for k in range(steps))


def medvl(*args, outputs, wait=True, **kwargs):
    "Call the command line in a process of its own."
    command = [sys.executable, '-c', 'from medvl.run.cli import main; main()', *map(str, args)]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'MEDVL_OUTPUTS': str(outputs), 'MEDVL_PROGRESS': '0'} | kwargs.pop('env', {})
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    if not wait: return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def until(condition, seconds=60):
    "Wait for a condition."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value: return value
        time.sleep(0.05)
    raise AssertionError('waited in vain')


def kill(pid):
    try: os.kill(pid, signal.SIGKILL)
    except ProcessLookupError: return False
    return True
