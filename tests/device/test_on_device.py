"""The tests of the pretend accelerator, each file in a process of its own: a device once registered starts threads of autograd, after which nothing can be forked."""
import os
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEAST = {'device_a2i2': 1, 'device_attribution': 38, 'device_bench': 3, 'device_bert': 2, 'device_cardiomegaly': 8, 'device_lr_range': 2, 'device_protocols': 10, 'device_training': 20, 'device_xvl': 3, 'device_writing': 12} # tests in each file, at least


@pytest.mark.parametrize('name', sorted(LEAST))
def test_on_the_pretend_accelerator(name, tmp_path, run_notebook):
    more = ('-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'python_files=device_*.py', '--rootdir', str(HERE.parents[1]), '--basetemp', str(tmp_path/'inside'))
    state, said = run_notebook(HERE/'on_device'/f'{name}.py', tmp_path, arguments=more, PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep))
    assert state == 0, said[-6000:]
    assert int(re.search(r'(\d+) passed', said)[1]) >= LEAST[name], said[-6000:]


def test_no_file_is_forgotten():
    assert {p.stem for p in (HERE/'on_device').glob('device_*.py')} == set(LEAST)
