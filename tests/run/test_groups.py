"""`medvl runs list --groups FILE`: tables of the runs that a file names, with honest differences from the baseline."""
import io
import re

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medvl.core.errors import DataError
from medvl.core.run import Run
from medvl.evaluate.stats.bootstrap import compare
from medvl.run.cli import app
from medvl.run.group_tables import group_table
from medvl.run.groups import read_groups

cli = CliRunner()
PATIENTS = np.arange(120) // 2


def made(outputs, name, value, scores=None, labels=None, state='done', **params):
    run = Run.current(name, params, outputs)
    if scores is not None:
        run.table('scores', pd.DataFrame(dict(image_id=[f'i{k}' for k in range(120)], patient_id=PATIENTS, split='test', label_mass=labels, score_mass=scores)))
    run.metric('mass_auroc', value, low=value - .1, high=value + .1, n=120, unit='image')
    run.metric('loss', 1 - value)
    run.done() if state == 'done' else run._close(state, 'as asked', 1)
    return run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_OUTPUTS', str(tmp_path/'out'))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    strong, weak = labels + rng.normal(size=120) * .7, labels + rng.normal(size=120) * 2
    exact = compare(labels, strong, weak, PATIENTS)
    out = tmp_path/'out'
    made(out, 'ours', exact.a, strong, labels, lr=.1, model='/somewhere/pretrain-1')
    made(out, 'theirs', exact.b, weak, labels, lr=.1)
    made(out, 'bare', .7, lr=.1)
    for k in range(3):
        made(out, 'seeded', .70 + .01 * k, arm='a', seed=k)
        made(out, 'seeded', .60 + .02 * k, arm='b', seed=k)
    made(out, 'broken', .9, state='failed')
    return exact


def written(tmp_path, *lines):
    (tmp_path/'paper.csv').write_text('\n'.join(lines) + '\n')
    return tmp_path/'paper.csv'


def test_tables_in_order_with_the_baseline_and_paired_differences(runs, tmp_path):
    file = written(tmp_path, 'group,run,experiment,parameters,name,order,baseline', 'Masses,bare-,,,Bare,3,', 'Masses,ours-*,,,Ours,2,', 'Masses,theirs-,,,Theirs,1,x',
                   'Again,,ours,model=pretrain-*; lr=0.10,,,')
    table = group_table(file)
    assert list(table.group) == ['Masses'] * 3 + ['Again'] and list(table.name[:3]) == ['Theirs', 'Ours', 'Bare'] and table.attrs['remarks'] == []
    ours, bare = table.iloc[1], table.iloc[2]
    # to the bit what the same rows give directly
    assert (ours.difference, ours.difference_low, ours.difference_high, ours.difference_over) == (runs.difference.value, runs.difference.low, runs.difference.high, 'patients')
    assert bare.difference == pytest.approx(.7 - runs.b) and np.isnan(bare.difference_low) # nothing paired: no interval
    assert table.runs[3].startswith('ours-')
    shown = cli.invoke(app, ['runs', 'list', '--groups', str(file)]).output
    assert shown.index('Theirs (baseline)') < shown.index('Ours ') < shown.index('Bare ') and f'{runs.difference.value:+.3f} ({runs.difference.low:+.3f} to' in shown
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_seeds_are_averaged_and_paired(runs, tmp_path):
    file = written(tmp_path, 'category,name,paper_name,baseline,has_local,order', 'A,seeded-*,all,,,', 'B,broken,Broken,,1,')
    said = group_table(file).attrs['remarks']
    assert len(said) == 1 and 'not clear: row 0' in said[0] and 'differ in arm' in said[0] # seeds alone may differ
    file = written(tmp_path, 'group,experiment,parameters,baseline', 'A,seeded,arm=a,', 'A,seeded,arm=b,yes')
    row = group_table(file).iloc[0]
    assert (row.value, row.n, row.over, row.difference_over) == (pytest.approx(.71), 3, 'seeds', 'seeds')
    gaps = np.array([.10, .09, .08])
    half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3) # t of two degrees of freedom
    assert (row.difference_low, row.difference_high) == (pytest.approx(.09 - half, abs=1e-6), pytest.approx(.09 + half, abs=1e-6))


def test_other_rows_or_labels_or_numbers_are_not_paired(runs, tmp_path):
    out, labels = tmp_path/'out', np.r_[np.ones(60), np.zeros(60)]
    made(out, 'other', runs.a, labels, labels)
    wrong = made(out, 'wrong', .5, pd.read_csv(next(out.glob('theirs-*'))/'tables'/'scores.csv').score_mass, pd.read_csv(next(out.glob('theirs-*'))/'tables'/'scores.csv').label_mass)
    file = written(tmp_path, 'group,run,baseline', 'A,theirs-,1', 'A,other-,', f'A,{wrong.folder.name},')
    assert group_table(file).difference_low.isna().all()


def test_missing_and_doubled_runs_are_named(runs, tmp_path):
    made(tmp_path/'out', 'bare', .8, lr=.1) # once more, later
    file = written(tmp_path, 'group,run,experiment,parameters,name', 'A,nobody,,,N', 'A,ours-*,,,O', 'A,ours,,,O2', 'A,,bare,,', 'A,broken-,,,', 'A,,broken,,')
    result = cli.invoke(app, ['runs', 'list', '--groups', str(file)])
    assert result.exit_code == 0
    said = [line for line in result.output.splitlines() if line.startswith('medvl:')]
    assert any("missing: row 0: there is no run 'nobody'" in s for s in said) and any('duplicate: row 2' in s and 'in row 1 already' in s for s in said)
    assert any("duplicate: row 3: 'bare' was run again" in s for s in said) and any('missing: row 5' in s and '1 of it are not done' in s for s in said)
    assert re.search(r'bare-\S+ +0.800', result.output) # the newest
    assert re.search(r'broken-\S+ +failed', result.output) and 'missing' in result.output


@pytest.mark.parametrize('lines, says', [
    (['group,run,basline', 'A,x,1'], "column basline: Unknown column 'basline'. Did you mean 'baseline'"), (['group,name', 'A,x'], 'column run: the column is missing'),
    (['run', 'x'], 'column group: the column is missing'), (['group,run,order', 'A,x,1', 'A,y,first'], "row 1, column order: 'first' is no number"),
    (['group,run,baseline', 'A,x,1', 'B,y,1', 'A,z,yes'], 'row 2, column baseline: A has two baselines, rows 0 and 2'), (['group,run,baseline', 'A,x,perhaps'], 'row 0, column baseline'),
    (['group,run,experiment', 'A,x,fit'], 'row 0, column run: both are given'), (['group,run,experiment', 'A,,'], 'row 0, column run: no run is named'),
    (['group,run', ',x'], 'row 0, column group: the cell is empty'), (['group,experiment,parameters', 'A,fit,lr'], "row 0, column parameters: 'lr' is not of the form"),
    (['group,run,parameters', 'A,x,lr=1'], 'row 0, column parameters: parameters belong to an experiment'), (['group,run,metric', 'A,x,a', 'A,y,b'], 'row 1, column metric'),
    (['group,run', 'A,x', 'A,y,z,w'], 'is no CSV table')])
def test_a_file_that_cannot_be_meant_is_refused_by_row_and_column(lines, says, tmp_path):
    file = written(tmp_path, *lines)
    with pytest.raises(DataError, match='paper.csv') as e: read_groups(file)
    assert says in str(e.value)
    result = cli.invoke(app, ['runs', 'list', '--groups', str(file), '--outputs', str(tmp_path)])
    assert result.exit_code == 2 and says in result.output and 'Traceback' not in result.output


def test_an_absent_file_is_named(tmp_path):
    result = cli.invoke(app, ['runs', 'list', '--groups', str(tmp_path/'none.csv'), '--outputs', str(tmp_path)])
    assert result.exit_code == 2 and 'none.csv' in result.output and 'cannot be read' in result.output


def test_formats_and_show(runs, tmp_path):
    file = written(tmp_path, 'group,run,name,order,baseline', 'Masses,ours-,Ours,2,', 'Masses,theirs-,Theirs,1,x', 'Other,bare-,Bare,,', 'Other,none,Absent,,')
    ask = lambda *more: cli.invoke(app, ['runs', *more, '--groups', str(file)])
    table = pd.read_csv(io.StringIO(ask('list', '--format', 'csv').stdout))
    assert list(table.name) == ['Theirs', 'Ours', 'Bare', 'Absent'] and table.baseline.tolist() == [True, False, False, False] and table.difference.notna().sum() == 1
    assert ask('list', '--format', 'latex').output.count(r'\begin{tabular}') == 2 and '% Masses' in ask('list', '--format', 'latex').output
    rows = ask('list', '--format', 'md').output
    assert '## Masses' in rows and '| Theirs (baseline) |' in rows
    assert ask('list', '--format', 'xml').exit_code == 2
    assert 'loss' in ask('list', '--metric', 'loss').output and 'no metric' not in ask('list', '--metric', 'loss').output
    assert "no metric 'dice'" in ask('list', '--metric', 'dice').output
    for name in ('Ours', 'Masses'):
        shown = ask('show', name).output
        assert 'Theirs (baseline)' in shown and 'Bare' not in shown and 'files:' not in shown and 'missing' not in shown
    whole = ask('show', 'ours-').output
    assert whole.index('Theirs (baseline)') < whole.index('files:') # then the run itself
    assert 'stands in no table' in ask('show', 'broken-').output and ask('show', 'nobody').exit_code == 2 and 'Masses' in ask('show', 'nobody').output


def test_localized_evaluations_are_paired_over_their_draws(tmp_path, monkeypatch):
    "Drawn for the same patients both; with other data there is no interval."
    from medvl.core.paths import write_json
    from medvl.run.group_tables import _over_draws
    rng, task, kept, runs = np.random.default_rng(1), 'covid_linear', {}, {}
    for name, data in (('a', 'd1'), ('b', 'd1'), ('c', 'd2')):
        with Run.current('localized', dict(model=name), tmp_path/'out') as run: run.metric(f'phantom_{task}', .5, low=.4, high=.6)
        home, kept[name], runs[name] = run.path('evaluation', 'about.json').parent, rng.normal(size=(2, 100)), run
        write_json(home/'about.json', {}); write_json(home/'localized.json', {})
        write_json(home/task/'identity.json', dict(data=data, split='lovt', config=dict(seed=0, n_boot=100)))
        for k in range(2):
            (home/task/f'run-{k}').mkdir()
            np.save(home/task/f'run-{k}'/'draws.npy', kept[name][k])
    gap = (kept['a'] - kept['b']).mean(0)
    assert _over_draws(runs['a'], runs['b'], f'phantom_{task}') == pytest.approx(tuple(np.quantile(gap, [.025, .975])))
    assert _over_draws(runs['a'], runs['c'], f'phantom_{task}') is None and _over_draws(runs['a'], runs['b'], 'other') is None
