"""No figure ends a run: what cannot be drawn is a note in journal and report and on the screen, and the numbers stay."""
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medvl.core.paths import read_jsonl
from medvl.core.run import Run
from medvl.evaluate.analysis.plots import plot_shared
from medvl.evaluate.metrics.froc import plot_froc
from medvl.evaluate.protocols.label_efficiency import plot_label_efficiency
from medvl.evaluate.localized.compare import plot_ranks, plot_tasks
from medvl.show.curves import plot_curves, plot_forest, plot_precision_recall, plot_reliability, plot_roc
from medvl.show.embedding import plot_embedding
from medvl.show.style import picture

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    run = Run.current('figures', dict(seed=0), outputs=tmp_path)
    run.metric('auroc', .7)
    yield run
    run.done()
    assert run.state == 'done' and run.metrics['auroc']['value'] == .7


def notes(run): return [e['text'] for e in read_jsonl(run.folder/'journal.jsonl') if e['event'] == 'note']


y, s = np.array([0, 1, 0, 1.]), np.array([.1, .9, .2, .8])
empty = pd.DataFrame({'task': [], 'model': [], 'value': [], 'low': [], 'high': []})
HARD = {
    'one class': (plot_roc, np.ones(4), s), 'no label': (plot_roc, np.full(4, np.nan), s), 'NaN scores': (plot_roc, y, s * np.nan), 'no rows': (plot_precision_recall, [], []),
    'one class, precision': (plot_precision_recall, np.zeros(4), s), 'rare class': (plot_roc, [1, *[0] * 30], np.arange(31.)), 'one patient': (plot_roc, y, s, np.zeros(4)),
    'no estimate': (plot_forest, empty), 'all NaN': (plot_forest, empty.reindex([0, 1]).assign(task=['a', 'b'])), 'no column': (plot_forest, pd.DataFrame({'task': ['a']})),
    'no task': (plot_tasks, empty), 'no result': (plot_shared, empty), 'no rank': (plot_ranks, pd.DataFrame({'average': [], 'first': []})),
    'no mark': (plot_froc, pd.DataFrame({'task': [], 'threshold': [], 'false_marks': [], 'sensitivity': []})), 'no curve': (plot_curves, pd.DataFrame({'step': [], 'name': [], 'value': []})),
    'absent journal': (plot_curves, '/nowhere/metrics.jsonl'), 'no fit': (plot_label_efficiency, pd.DataFrame({'task': ['a'], 'metric': 'auroc', 'fraction': 1., 'train_patients': np.nan, 'mean': np.nan,
                                                                                                               'least': np.nan, 'most': np.nan, 'low': np.nan, 'high': np.nan, 'fits': 0})),
    'logits': (plot_reliability, y, s * 9), 'one point': (plot_embedding, np.ones((1, 4)), pd.DataFrame({'a': [1]})), 'equal points': (plot_embedding, np.ones((5, 4)), pd.DataFrame({'a': [1] * 5})),
    'NaN points': (plot_embedding, np.full((5, 4), np.nan), pd.DataFrame({'a': [1] * 5})),
}


def test_every_figure_is_drawn_or_noted(run, capsys):
    for name, (plot, *args) in HARD.items():
        before = len(notes(run))
        drawn = run.figure(name.replace(' ', '_').replace(',', ''), plot, *args)
        said = capsys.readouterr().out
        file = run.folder/'figures'/f'{name.replace(" ", "_").replace(",", "")}.png'
        if drawn is None:
            text, = notes(run)[before:]
            assert text in said and re.match(r'The figure \S+ was not drawn: \w+: .', text) and not file.exists(), name
        else: assert file.stat().st_size > 500 and len(notes(run)) == before, name
        picture(drawn)
    assert not list((run.folder/'figures').glob('*tmp*'))


def test_figures_that_break_while_they_are_written(run):
    class Broken:
        def savefig(self, *_, **__): raise OSError('no space left')
    assert run.figure('full', Broken()) is None and 'no space left' in notes(run)[-1] and picture(None) is None
    with pytest.raises(KeyboardInterrupt): run.figure('stopped', lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_tests_of_notebooks_are_told(run, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    with pytest.raises(ValueError, match='labels 0 and 1'): run.figure('roc', plot_roc, np.ones(4), s)


def test_the_report_and_the_screen_show_the_note(tmp_path, monkeypatch):
    from medvl.run.report import write_report
    from typer.testing import CliRunner
    from medvl.run.cli import app
    notebook = tmp_path/'e01_drawing.ipynb'
    code = ["seed: int = 0  # a seed", "from medvl.core.run import Run\nfrom medvl.show.curves import plot_roc\nrun = Run.current('drawing', globals())\nrun.figure('roc', plot_roc, [1, 1], [.1, .2])\nrun.metric('n', 2)\nrun.done()"]
    cells = [dict(cell_type='code', id=f'c{i}', metadata={'tags': ['parameters']} if not i else {}, source=c, outputs=[], execution_count=None) for i, c in enumerate(code)]
    notebook.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), nbformat=4, nbformat_minor=5)))
    monkeypatch.delenv('IN_TEST', raising=False)
    found = CliRunner().invoke(app, ['run', str(notebook), '--outputs', str(tmp_path/'runs')])
    assert found.exit_code == 0, found.output
    assert 'note: The figure roc was not drawn: ValueError' in found.output
    folder, = (tmp_path/'runs').iterdir()
    assert 'The figure roc was not drawn' in Path(write_report(folder)).read_text()


def test_experiments_draw_through_the_run():
    "An experiment hands drawings over; a figure made beside the guard could end it."
    for path in sorted((REPO/'nbs'/'experiments').glob('e*.ipynb')):
        for cell in json.loads(path.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code': continue
            for line in source.splitlines():
                bare = re.match(r'(?!.*(run\.figure|import |lambda|def ))\S.*\b(plot_\w+|show_\w+|draw_\w+|attribute_figure|subplots|figure)\(', line) # unindented: not in a function
                assert not bare, f'{path.name}: {line.strip()[:120]}'
            assert not re.search(r"run\.figure\([^,]+, (plot|show|draw)_\w+\(", source), f'{path.name}: hand over the function, not its result'
