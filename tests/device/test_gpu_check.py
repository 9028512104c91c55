"""`make gpu-check` without a GPU: one line and exit 2; tiny on the CPU it makes its table."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2]/'.ci'/'gpu_check.py'


def check(*arguments): return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=400, env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so():
    done = check()
    assert done.returncode == 2 and done.stdout.count('\n') == 1 and 'no GPU here' in done.stdout


def test_the_same_code_runs_on_the_cpu(tmp_path):
    done = check('--device', 'cpu', '--methods', 'simclr', '--out', str(tmp_path/'found.json'))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path/'found.json').read_text())
    rows = {r['check']: r for r in found['rows']}
    assert rows['train, kill, resume']['value'] == 'same bits' and rows['compile=eager']['difference'] < 1e-3
    assert {r['what'] for r in found['rows'] if r['check'] == 'benchmark'} == {'b40_step', 'b41_gradcache'}
    assert 'same bits' in done.stdout and all(r['ok'] for r in found['rows'])


def test_what_goes_wrong_is_a_row_and_a_status(monkeypatch):
    sys.path.insert(0, str(SCRIPT.parent))
    import gpu_check
    report = gpu_check.Report(60)
    report.add('a', 'b', lambda: 1 / 0)
    report.end = 0
    report.add('c', 'd', lambda: dict(ok=True))
    assert [r['ok'] for r in report.rows] == [False, None] and 'ZeroDivisionError' in report.rows[0]['value'] and report.rows[1]['value'] == 'left out: no time'
