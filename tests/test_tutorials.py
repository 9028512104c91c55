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


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_no_answer_stands_above_its_blank(path):
    "Checks come from the bank by name, numbered in the order of the page, and nothing above a blank spells its solution out."
    number, all_cells, plain = path.stem.split('_')[0], cells(path), lambda s: re.sub(r'[\s$]', '', s)
    for k, (answer, n, check, solution) in enumerate(exercises(path), 1):
        assert (answer, check) == (f'answer_{k}', f'check_{k}'), f'{path.name}: exercise {k} is called {answer}'
        assert f"{check} = exercise('{number}.{k}'" in all_cells[n]['source'], f'{path.name}: {check} does not come from show.exercise_bank'
        body = plain(re.split(r'return |: (?=\()|lambda [^:]*: |^\w+ = ', solution.splitlines()[-1])[-1])
        above = plain('\n'.join(c['source'] for c in all_cells[:n + 1]))
        if len(body) > 5: assert body not in above, f'{path.name}: the solution of exercise {k} stands above its blank: {body}'
    assert 'Exercise(' not in '\n'.join(c['source'] for c in all_cells if c['cell_type'] == 'code')


def test_the_bank_holds_the_exercises_of_the_tutorials():
    from medvl.show.exercise_bank import BANK, exercise
    assert set(BANK) == {f'{p.stem.split("_")[0]}.{k}' for p in TUTORIALS for k in range(1, len(exercises(p)) + 1)}
    with pytest.raises(ValueError, match='t09.9'): exercise('t09.9')
    for a, right in ((31, 'right'), (511, 'wrong'), (..., 'open')): assert exercise('t02.4')(a).state == right


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_text_claims_nothing_of_a_run_that_is_not_stored(path):
    "What stands in prose must not depend on one run; numbers are printed by cells, and every printing cell has stored its output."
    for cell in cells(path):
        if cell['cell_type'] == 'markdown': assert 'run stored here' not in cell['source']
        elif 'print(' in cell['source'] and '#| slow' not in cell['source'] and '#| hide' not in cell['source']:
            assert cell['outputs'], f'{path.name}: {cell["id"]} has no stored output'
