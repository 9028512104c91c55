"""No golden file of LoVT, Mammo-CLIP, X-VL, A2I2 or the cardiomegaly originals lies unread: every one is named by a test, and holds what its manifest says."""
import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from golden import SHARED, golden

TESTS = Path(__file__).resolve().parent
SYSTEMS = ('lovt', 'mammoclip', 'xvl', 'a2i2', 'cardiomegaly')


def names_in(path):
    "Patterns of the names that a test file may read: its strings, and its f-strings with a gap for each value."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside: yield re.escape(node.value)
        elif isinstance(node, ast.JoinedStr):
            told = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
            stem = Path(''.join(t or '' for t in told)).stem
            if sum(c.isalpha() for c in stem) >= 3: yield ''.join('[^_]*' if t is None else re.escape(t) for t in told)


def unread(files, patterns):
    "Those of `files` (relative to the golden folder) that no pattern names, with or without folder and ending."
    known = re.compile('|'.join(f'(?:{p})' for p in sorted(set(patterns))))
    return [f for f in files if not any(known.fullmatch(n) for n in (f, Path(f).name, Path(f).stem))]


def test_every_golden_file_is_read_by_a_test():
    if not (SHARED/'golden').is_dir(): pytest.skip('golden data absent: ../shared/golden')
    files = [f'{s}/{p.name}' for s in SYSTEMS for p in sorted((SHARED/'golden'/s).iterdir()) if p.name != 'README.md']
    patterns = [n for p in TESTS.rglob('*.py') if p != Path(__file__).resolve() for n in names_in(p)] + [re.escape(f'{s}/manifest.json') for s in ('lovt', 'cardiomegaly')]
    assert len(files) > 80 and unread(files, patterns) == []


def test_an_unread_file_is_noticed():
    patterns = ['arch_[^_]*\\.json', re.escape('lovt/dice.npz'), 'local_image']
    assert unread(['lovt/dice.npz', 'lovt/local_image.npz', 'mammoclip/arch_b2.json', 'mammoclip/arch_b5_w.json', 'lovt/new.npz'], patterns) == ['mammoclip/arch_b5_w.json', 'lovt/new.npz']


@pytest.mark.parametrize('system', ['lovt', 'cardiomegaly'])
def test_the_arrays_are_those_of_the_manifest(system):
    listed, folder = json.loads(golden(f'{system}/manifest.json').read_text()), SHARED/'golden'/system
    assert {p.name for p in folder.glob('*.npz')} == {n for n in listed if n.endswith('.npz')}
    for name in sorted(listed):
        if not name.endswith('.npz'): continue
        arrays = np.load(folder/name)
        assert {k: [list(arrays[k].shape), str(arrays[k].dtype)] for k in arrays.files} == listed[name], name
