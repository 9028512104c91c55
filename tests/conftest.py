"""Tests run on one torch thread, silently, and say how many golden comparisons could not be made."""
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MEDVL_PROGRESS', '0')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def run_notebook():
    "Run a notebook, or a file of tests, in a process of its own: path, folder for its outputs and log, pytest's arguments or the notebook's parameters, further environment -> (exit state, what it printed)."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    server = subprocess.Popen([sys.executable, str(Path(__file__).parent/'notebook_server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=env, cwd=Path(__file__).resolve().parents[1])
    def ask(path, folder, seconds=600, arguments=(), parameters=None, **more):
        log = Path(folder)/'notebook.log'
        server.stdin.write(json.dumps(dict(path=str(path), arguments=list(arguments), parameters=parameters, env={'MEDVL_OUTPUTS': str(Path(folder)/'outputs'), **more}, seconds=seconds, log=str(log))) + '\n')
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f'the notebook server died while it ran {path}'
        return json.loads(answer)['rc'], log.read_text(errors='replace')
    yield ask
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope='session')
def browse():
    "Show a file in headless Chromium: path, width, JavaScript -> what that returns. A page that asks the net fails."
    from browser import CHROMIUM, REASON, Browser
    if CHROMIUM is None: pytest.skip(REASON)
    browser = Browser()
    def ask(path, width, script, **kwargs):
        found = browser.open(path, width, **kwargs).run(script)
        assert not browser.asked, browser.asked
        return found
    yield ask
    browser.close()


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    absent = [r for r in skipped if 'golden data absent' in str(r.longrepr) or 'sample data absent' in str(r.longrepr)]
    terminalreporter.write_line(f'golden and sample data: {len(absent)} tests skipped because ../shared is absent')
