"""Every notebook runs, agrees with the exported modules, and is clean."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_sizes import smaller

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('_'))
ENV = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
RUN_HERE = [p for p in NOTEBOOKS if p.parent.name != 'tutorials'] # those run with their solutions, in test_tutorials


def name(path): return path.relative_to(REPO/'nbs').as_posix()


@pytest.mark.parametrize('path', RUN_HERE, ids=name)
def test_runs(path, tmp_path, run_notebook):
    state, said = run_notebook(path, tmp_path, parameters=smaller(path))
    assert state == 0, f'{name(path)} failed ({state}):\n{said[-6000:]}'


def test_a_failing_notebook_fails(tmp_path, run_notebook):
    "The runner is not blind: an error, an exit, a kill and a notebook that never ends are failures."
    for number, (source, seconds) in enumerate((('1/0', 60), ('import os; os._exit(0 if False else 3)', 60), ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 60),
                                                ('import time; time.sleep(60)', 2), ('assert "torch" == "a fine library"', 60))):
        cell = dict(cell_type='code', id=f'a1b2c3d{number}', metadata={}, source=source, outputs=[], execution_count=None)
        path = tmp_path/f'bad{number}.ipynb'
        path.write_text(json.dumps(dict(cells=[cell], metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')}, nbformat=4, nbformat_minor=5)))
        assert run_notebook(path, tmp_path, seconds)[0] != 0, source
    good = tmp_path/'good.ipynb'
    good.write_text(path.read_text().replace('a fine library', 'torch'))
    assert run_notebook(good, tmp_path)[0] == 0


def test_export_is_current(tmp_path):
    "`nbdev_export` of the notebooks gives exactly the modules that are committed."
    for item in ('settings.ini', 'pyproject.toml'): shutil.copy(REPO/item, tmp_path/item)
    shutil.copytree(REPO/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, env=ENV, check=True,
                   capture_output=True, text=True)
    ours = {p.relative_to(REPO/'medvl'): p.read_text() for p in (REPO/'medvl').rglob('*.py')}
    made = {p.relative_to(tmp_path/'medvl'): p.read_text() for p in (tmp_path/'medvl').rglob('*.py')}
    assert sorted(ours) == sorted(made), 'Modules without a notebook, or notebooks without a module: run `make export`.'
    stale = [str(k) for k in ours if ours[k] != made[k]]
    assert not stale, f'These modules differ from their notebooks: {stale}. Edit the notebook and run `make export`.'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_is_clean(path):
    "No execution counts, no foreign metadata, no personal paths, no identifiers; figures are small; tags survive."
    text = path.read_text()
    nb = json.loads(text)
    assert set(nb['metadata']) <= {'kernelspec'} and nb['metadata']['kernelspec']['name'] == 'python3'
    for cell in nb['cells']:
        assert set(cell['metadata']) <= {'tags', 'hide_input'}, f'cell {cell["id"]}: run `make clean-notebooks`'
        assert cell.get('execution_count') is None
        for out in cell.get('outputs', []):
            assert out['output_type'] != 'error', f'cell {cell["id"]} stores an error'
            size = max((len(''.join(v)) for v in out.get('data', {}).values()), default=0)
            assert size < 180_000, f'cell {cell["id"]} stores an output of {size} bytes'
    outputs = json.dumps([c.get('outputs', []) for c in nb['cells'] if c['cell_type'] == 'code'])
    assert not re.search(r'/(home|root|Users|work)/\w', outputs), 'an output shows a personal path'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_prose_is_prose(path):
    "Only the first cell has a title of the first level: a `# ` before every line turns paragraphs into headings."
    cells = json.loads(path.read_text())['cells']
    loud = [c['id'] for c in cells[1:] if c['cell_type'] == 'markdown' and any(l.startswith('# ') for l in ''.join(c['source']).split('\n'))]
    assert not loud, f'markdown cells that shout: {loud}'
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and not first.startswith('# #') and '\n> ' in first, 'the first cell is a title and, below it, a line that begins with >'


EXPERIMENTS = [p for p in NOTEBOOKS if p.parent.name in ('experiments', 'benchmarks')]


@pytest.mark.parametrize('path', EXPERIMENTS, ids=name)
def test_has_parameters(path):
    tags = [c['metadata'].get('tags', []) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    assert sum('parameters' in t for t in tags) == 1, 'papermill needs exactly one cell tagged `parameters`'


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    path = tmp_path/'x.ipynb'
    cell = dict(cell_type='code', id='a1b2c3d4', metadata={'tags': ['parameters'], 'scrolled': True}, source='a = 1', outputs=[], execution_count=3)
    path.write_text(json.dumps(dict(cells=[cell], metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')},
                                    nbformat=4, nbformat_minor=5)))
    subprocess.run([sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})'], cwd=REPO, env=ENV, check=True)
    cell = json.loads(path.read_text())['cells'][0]
    assert cell['metadata'] == {'tags': ['parameters']} and cell['execution_count'] is None


def test_rooms_import_only_rooms_above():
    "The house of design.md: a room imports only rooms that stand above it, and exported code needs nothing of nbdev's family."
    rooms = ['core', 'show', 'data', 'models', 'losses', 'methods', 'train', 'evaluate', 'attribute', 'run', 'api', 'commands']
    for path in (REPO/'medvl').rglob('*.py'):
        if path.name in ('_modidx.py', '__init__.py'): continue
        relative = path.relative_to(REPO/'medvl')
        room = relative.parts[0].removesuffix('.py')
        text = path.read_text()
        assert not re.search(r'^\s*(from|import) (fastcore|nbdev|execnb|ghapi)', text, re.M), f'{relative} imports a developer tool'
        depth = len(relative.parts)
        for dots, target in re.findall(r'^\s*from (\.+)([\w.]*) import', text, re.M):
            other = room if len(dots) < depth else target.split('.')[0]
            assert not other or rooms.index(other) <= rooms.index(room), f'{relative} imports {other}, a room below it'
        for target in re.findall(r'^\s*(?:from|import) medvl\.(\w+)', text, re.M):
            assert rooms.index(target) <= rooms.index(room), f'{relative} imports {target}, a room below it'


def test_no_hard_coded_paths():
    found = [str(p.relative_to(REPO)) for p in (REPO/'medvl').rglob('*.py') if re.search(r'[\'"]/(home|root|Users|work|restricted|data)/', p.read_text())]
    assert not found


def test_the_map_names_every_notebook():
    "nbs/index.ipynb is what .ci/index.py writes: `python .ci/index.py` renews it."
    import importlib.util
    spec = importlib.util.spec_from_file_location('index', REPO/'.ci'/'index.py')
    index = importlib.util.module_from_spec(spec); spec.loader.exec_module(index)
    written = [''.join(c['source']) for c in json.loads((REPO/'nbs'/'index.ipynb').read_text())['cells']]
    assert written == list(index.texts())
    linked = {m for t in written for m in re.findall(r'\]\(([^)#]+)\)', t) if '://' not in m}
    assert not [m for m in linked if not (REPO/'nbs'/m).exists()]
    assert not [p for p in NOTEBOOKS if p.name != 'index.ipynb' and p.relative_to(REPO/'nbs').as_posix() not in linked]
