"""A clean install: the wheel holds modules and experiments, imports without developer tools, and `import medvl` is quick."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

BLOCK = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'fastcore', 'nbdev', 'execnb', 'ghapi', 'torchvision', 'timm', 'captum', 'zarr', 'gdcm', 'pylibjpeg', 'pytest', 'hypothesis'}:
            raise ModuleNotFoundError(f'blocked for the test: {name}', name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The wheel, unpacked."
    folder = tmp_path_factory.mktemp('wheel')
    tree = folder/'tree' # a copy: what an earlier build left in the checkout would come along
    for part in ('medvl', 'nbs/experiments'): shutil.copytree(REPO/part, tree/part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'setup.py', 'settings.ini', 'README.md', 'LICENSE'): shutil.copy(REPO/name, tree)
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', str(tree), '--no-deps', '--no-build-isolation', '-q', '-w', str(folder)],
                          capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    wheel, = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder/'site')
    return folder/'site'


def run(site, code, **env):
    "Run code with the unpacked wheel in front of everything else, away from the checkout."
    full = os.environ | {'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'} | env
    return subprocess.run([sys.executable, '-c', code], cwd=site.parent, env=full, capture_output=True, text=True)


def test_wheel_holds_the_experiments(site):
    ours = {p.name for p in (REPO/'nbs'/'experiments').glob('*.ipynb')}
    assert ours and {p.name for p in (site/'medvl'/'experiments').glob('*.ipynb')} == ours


def test_wheel_holds_every_package(site):
    "Nothing is listed by hand: every module of the tree is there, every package can be found, the mark of typed code too, and nothing that the tree has no more."
    own = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob('*') if p.suffix in ('.py', '.typed') and 'experiments' not in p.parts}
    tree = own(REPO/'medvl')
    assert {'py.typed', '__init__.py', 'data/releases/__init__.py', 'methods/parts/__init__.py', 'evaluate/stats/__init__.py'} <= tree and own(site/'medvl') == tree
    assert {p.parent for p in (REPO/'medvl').rglob('*.py')} == {p.parent for p in (REPO/'medvl').rglob('__init__.py')}, 'a folder of modules without __init__.py is no package'


def test_a_method_of_another_room_is_found_by_its_name(site):
    "What the package announces of itself: a saved Mammo-FActOR opens without an import by hand."
    done = run(site, "from medvl.methods.base import method_class; print(method_class('mammo_factor').__module__)")
    assert done.stdout.strip() == 'medvl.attribute.mammo_factor', done.stderr[-2000:]


def test_every_module_imports_without_developer_tools(site):
    code = BLOCK + """
import medvl
for m in pkgutil.walk_packages(medvl.__path__, 'medvl.'):
    if not m.name.startswith('medvl.experiments') and not m.name.endswith('_modidx'): importlib.import_module(m.name)
print(medvl.__file__, len(sys.modules))
"""
    done = run(site, code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(site) in done.stdout


def test_command_line_answers(site):
    done = run(site, BLOCK + "import sys; sys.argv = ['medvl', '--help']; from medvl.run.cli import main; main()")
    assert 'run' in done.stdout and 'sweep' in done.stdout, done.stderr[-2000:]


def test_import_is_lazy(site):
    "`import medvl` loads neither torch nor pandas; its names appear when they are asked for."
    done = run(site, "import sys, medvl; assert 'torch' not in sys.modules and 'pandas' not in sys.modules; print(medvl.load, medvl.__version__)")
    assert done.returncode == 0, done.stderr[-2000:]


def test_settings_and_project_ask_for_the_same():
    "settings.ini (nbdev, the design card) and pyproject.toml (pip) name the same loose ranges, and the constraints pin each of them."
    import configparser
    import tomllib
    settings = configparser.ConfigParser()
    settings.read(REPO/'settings.ini')
    project = tomllib.loads((REPO/'pyproject.toml').read_text())['project']
    assert settings['DEFAULT']['requirements'].split() == project['dependencies']
    assert settings['DEFAULT']['dev_requirements'].split() == project['optional-dependencies']['dev']
    plain = lambda name: name.lower().replace('_', '-')
    pinned = {plain(line.split('==')[0]) for line in (REPO/'constraints.txt').read_text().splitlines() if '==' in line}
    asked = [plain(d.split('[')[0].split('>')[0].split('<')[0].split('=')[0]) for d in [*project['dependencies'], *sum(project['optional-dependencies'].values(), [])]]
    assert not sorted(set(asked) - pinned), 'a dependency without a tested version in constraints.txt'
