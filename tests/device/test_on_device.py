"""The tests of the pretend accelerator, each file in an interpreter of its own: a device once registered starts threads of autograd, after which nothing can be forked."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEAST = {'device_a2i2': 1, 'device_attribution': 38, 'device_bench': 3, 'device_bert': 2, 'device_cardiomegaly': 8, 'device_lr_range': 2, 'device_protocols': 10, 'device_training': 20, 'device_xvl': 3, 'device_writing': 12} # tests in each file, at least


@pytest.mark.parametrize('name', sorted(LEAST))
def test_on_the_pretend_accelerator(name, tmp_path):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'python_files=device_*.py', '--basetemp', str(tmp_path/'inside'),
                           str(HERE/'on_device'/f'{name}.py')], capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    said = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, said
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) >= LEAST[name], said


def test_no_file_is_forgotten():
    assert {p.stem for p in (HERE/'on_device').glob('device_*.py')} == set(LEAST)
