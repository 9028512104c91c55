"""The house of design.md, measured from its files: one name means one thing in a room, nobody reaches into another module, notebooks show what they define."""
import ast
import collections
import json
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO/'medvl'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py'))
NOTEBOOKS = sorted(p for p in (REPO/'nbs').glob('[0-9]*.ipynb'))


def room(path): return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def test_no_module_name_twice_in_a_room():
    count = collections.Counter((room(p), p.stem) for p in MODULES)
    assert not [k for k, n in count.items() if n > 1]


def test_no_public_name_twice_in_a_room():
    "A function or class of one name in two modules of a room means two things to a reader."
    homes = collections.defaultdict(set)
    for p in MODULES:
        for node in ast.parse(p.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): homes[room(p), node.name].add(p.name)
    assert not {k: sorted(v) for k, v in homes.items() if len(v) > 1}


def test_nobody_imports_a_private_name():
    found = []
    for p in MODULES:
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('medvl')):
                found += [f'{p.relative_to(PACKAGE)}: {a.name}' for a in node.names if a.name.startswith('_') and not a.name.startswith('__')]
    assert not found


def test_no_notebook_number_twice():
    count = collections.Counter(re.match(r'\d+[a-z]*', p.name)[0] for p in NOTEBOOKS)
    assert not [k for k, n in count.items() if n > 1]


def exported(source):
    "Whether a cell defines something for the library (imports alone do not count)."
    if not source.lstrip().startswith(('#| export', '#|export')): return False
    lines = [l for l in source.splitlines() if l.strip() and not l.startswith(('#', 'import ', 'from ', ' ', ')'))]
    return bool(lines)


def test_at_most_three_exported_cells_in_a_row():
    "Define, show, say: what was defined is used before the next thing comes."
    long = {}
    for p in NOTEBOOKS:
        row = best = 0
        for c in json.loads(p.read_text())['cells']:
            source = ''.join(c['source'])
            if c['cell_type'] != 'code' or not source.strip(): continue
            row = row + 1 if exported(source) else 0
            best = max(best, row)
        if best > 3: long[p.name] = best
    assert not long


def test_no_ladder_of_classes():
    "No chain of classes of our own is longer than three: a system has its parts, it does not inherit them."
    bases = collections.defaultdict(list)
    for p in MODULES:
        for node in ast.parse(p.read_text()).body:
            if isinstance(node, ast.ClassDef): bases[node.name].append([b.id for b in node.bases if isinstance(b, ast.Name)])

    def chain(name, seen=()):
        ours = [b for bs in bases[name] for b in bs if b in bases and b not in (*seen, name)]
        return 1 + max((chain(b, (*seen, name)) for b in ours), default=0)
    assert not [n for n in list(bases) if chain(n) > 3]


def test_references_lead_to_the_paper():
    "A reader has papers and our notebooks, not the builders' notes."
    for p in (REPO/'nbs').rglob('*.ipynb'):
        for c in json.loads(p.read_text())['cells']:
            text = ''.join(c['source'])
            assert not re.search(r"(?i)\bspec(ification)?s?,? (section|\d)|\bLoVT spec|\bthe spec\b|\(spec[,)]|shared/specs", text), f'{p.name}: {c["id"]}'


def public_functions(tree):
    "Functions a reader can import: not private, not grown onto a class by `patch`."
    grown = lambda n: any(getattr(getattr(d, 'func', d), 'id', '') == 'patch' for d in n.decorator_list)
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith('_') and not grown(n)]


def test_names_say_what_they_do():
    "A bare verb or noun that could mean anything is no name of a public function."
    bare = {'look', 'put', 'judge', 'after', 'paper', 'person', 'reference', 'follow', 'claim', 'said', 'told', 'settled', 'about', 'ask', 'share', 'beside'}
    assert not [f'{p.relative_to(PACKAGE)}: {n}' for p in MODULES for n in public_functions(ast.parse(p.read_text())) if n in bare]


def test_an_augmented_copy_is_a_version():
    "A view is a projection; where versions are made, asked for or compared, they are called so, in names and in words."
    for name in ('data/augment/chest_versions', 'losses/self_supervised', 'methods/simclr', 'methods/byol', 'methods/pixelpro'):
        tree = ast.parse((PACKAGE/f'{name}.py').read_text())
        said = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert not [n for n in said if re.search(r'views|Views|MultiView', n)], name
