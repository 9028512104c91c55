"""Signatures say what they take, and rooms say what they are for."""
import ast
import importlib
from pathlib import Path

import medvl

PACKAGE = Path(medvl.__file__).parent
SHARE = 0.95 # of the public arguments


def public_arguments():
    "(module, function, argument, has it a type) for every argument of a public function or method."
    for path in sorted(PACKAGE.rglob('*.py')):
        if path.name == '_modidx.py': continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith('_'): continue
            for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if a.arg not in ('self', 'cls'):
                    yield str(path.relative_to(PACKAGE)), node.name, a.arg, a.annotation is not None


def test_public_arguments_have_types():
    found = list(public_arguments())
    bare = [f'{module}: {function}({name})' for module, function, name, typed in found if not typed]
    assert len(found) > 4000 and 1 - len(bare) / len(found) >= SHARE, f'{len(bare)} of {len(found)}, e.g. {bare[:10]}'


def test_rooms_are_shown_with_a_line():
    "`medvl.<tab>` shows rooms and public names; each package says in one line what it is for, however it was imported."
    rooms = {p.parent.name for p in PACKAGE.glob('*/__init__.py')}
    assert rooms - {'experiments'} <= set(medvl._ROOMS) and rooms | {'load', 'embed'} <= {*dir(medvl), 'experiments'}
    for path in sorted(PACKAGE.rglob('*/__init__.py')):
        name = '.'.join(path.parent.relative_to(PACKAGE).parts)
        if name == 'experiments': continue
        line = importlib.import_module(f'medvl.{name}').__doc__
        assert line and '\n' not in line and line == medvl._LINES[name], name


def test_types_are_shipped():
    assert (PACKAGE/'py.typed').exists()


def test_help_shows_the_comments_beside_arguments():
    import inspect

    from medvl.data.batch import slice_batch
    from medvl.train.settings import TrainConfig
    said = inspect.getdoc(slice_batch)
    assert said.startswith('Cut samples out of a batch.') and 'stop: behind the last sample' in said and 'returns: ' in said
    assert slice_batch.__doc__ == 'Cut samples out of a batch.' # whoever reads the docstring itself gets what is written
    assert 'lr: peak learning rate' in inspect.getdoc(TrainConfig)
    assert 'source: folder of a saved model' in inspect.getdoc(medvl.load)


def test_a_type_checker_accepts_the_signatures(tmp_path):
    "Signatures alone (as stubs): names that exist, defaults of the stated type, overrides that fit what they override."
    import subprocess
    import sys
    stubs = tmp_path/'stubs'
    made = subprocess.run([str(Path(sys.executable).with_name('stubgen')), '-q', '-o', str(stubs), str(PACKAGE), '--include-private'], capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    (stubs/'medvl'/'_modidx.pyi').unlink(missing_ok=True)
    files = [str(p) for p in stubs.rglob('*.pyi')]
    assert len(files) > 200
    checked = subprocess.run([sys.executable, '-m', 'mypy', *files, '--no-site-packages', '--ignore-missing-imports', '--cache-dir', str(tmp_path/'cache')], capture_output=True, text=True, cwd=tmp_path)
    known = ('expandtabs', '_Unpickler') # typeshed's private class says less than Python's own does
    wrong = [l for l in checked.stdout.splitlines() if ': error:' in l and not any(k in l for k in known)]
    assert checked.stdout.splitlines()[-1].startswith(('Success', 'Found')), checked.stdout + checked.stderr
    assert not wrong, '\n'.join(wrong)
