"""Every tutorial runs at smoke size, as a student leaves it and with the folded solutions filled in; every exercise accepts its solution."""
import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((REPO/'nbs'/'tutorials').glob('t*.ipynb'))
OPEN = re.compile(r'^(answer_\w+) = \.\.\.', re.M)
FOLDED = re.compile(r'<details>.*?```python\n(.*?)```.*?</details>', re.S)


def cells(path):
    return [dict(c, source=''.join(c['source'])) for c in json.loads(path.read_text())['cells']]


def exercises(path):
    "(answer's name, number of its cell, check's name, solution)"
    found, all_cells = [], cells(path)
    for n, cell in enumerate(all_cells):
        if cell['cell_type'] != 'code' or not (match := OPEN.search(cell['source'])): continue
        folded = FOLDED.search(all_cells[n + 1]['source']) if n + 1 < len(all_cells) else None
        assert folded, f'{path.name}: {match[1]} has no folded solution right below it'
        found.append((match[1], n, match[1].replace('answer', 'check'), folded[1].strip()))
    return found


def solved(path):
    "The notebook with every solution in place; the check must be open before and right after."
    nb = json.loads(path.read_text())
    for answer, n, check, solution in exercises(path):
        source = ''.join(nb['cells'][n]['source'])
        assert f'{check}({answer})' in source, f'{path.name}: the cell of {answer} does not call {check}({answer})'
        start, stop = OPEN.search(source).start(), source.find('\n', OPEN.search(source).start())
        filled = source[:start] + f'assert {check}(...).state == "open"\n{solution}' + source[stop:]
        nb['cells'][n]['source'] = filled + f'\nassert {check}({answer}), {check}({answer}).text'
    return nb


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs_with_its_solutions(path, tmp_path, run_notebook):
    copy = tmp_path/path.name
    copy.write_text(json.dumps(solved(path)))
    state, said = run_notebook(copy, tmp_path, MEDVL_SMOKE='1')
    assert state == 0, f'{path.name} failed ({state}):\n{said[-6000:]}'


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_teaches(path):
    "It asks questions, says what one will learn, and leaves every answer open."
    text = '\n'.join(c['source'] for c in cells(path))
    assert len(exercises(path)) >= 2 and 'You will learn' in text and 'Before you start' in text
    assert '#| export' not in text and 'default_exp' not in text
    assert 'MEDVL_SMOKE' in text, 'a tutorial says how small it becomes in the tests'
