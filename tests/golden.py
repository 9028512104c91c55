"""Where the numbers of the originals and the real sample data lie; tests skip with the reason when they are absent."""
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get('MEDVL_SHARED', Path(__file__).resolve().parents[2]/'shared'))


def golden(name):
    "Path of a golden file, e.g. 'mammoclip/losses.npz'; skips the test when it is absent."
    path = SHARED/'golden'/name
    if not path.exists(): pytest.skip(f'golden data absent: {name}')
    return path


def sample(name):
    "Path of real sample data, e.g. 'mammo/index.csv'; skips the test when it is absent."
    path = SHARED/'data'/name
    if not path.exists(): pytest.skip(f'sample data absent: {name}')
    return path
