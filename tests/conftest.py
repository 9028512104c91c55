"""Tests run on one torch thread, silently, and say how many golden comparisons could not be made."""
import os
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


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    absent = [r for r in skipped if 'golden data absent' in str(r.longrepr) or 'sample data absent' in str(r.longrepr)]
    terminalreporter.write_line(f'golden and sample data: {len(absent)} tests skipped because ../shared is absent')
