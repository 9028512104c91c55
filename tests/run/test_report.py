"""The page of a run: three sentences on top, everything once, readable at three widths; runs that failed early have one, too."""
import json
import re

import pandas as pd
import pytest
from medvl.core.run import Run, run_folders
from medvl.run.brief import model_facts, run_sentences, side_by_side, weight_count
from medvl.run.parameters import RefusedError
from medvl.run.report import write_report
from medvl.run.runner import run_experiment
from medvl.run.sweep import run_sweep
from typer.testing import CliRunner

BEGIN = 'from medvl.core.run import Run\nrun = Run.current("x", globals())'


def notebook(path, *sources, text='# Demo\n\nWhat this run is for.'):
    cells = [dict(cell_type='markdown', id='t', metadata={}, source=text)]
    for k, s in enumerate(sources):
        if s.startswith('MD '): cells.append(dict(cell_type='markdown', id=f'm{k}', metadata={}, source=s[3:]))
        else: cells.append(dict(cell_type='code', id=f'c{k}', metadata=dict(tags=['parameters'] if k == 0 else []), source=s, outputs=[], execution_count=None))
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    table = 'pd.DataFrame([dict(task=t, metric="auroc", model=m, value=v, low=v - .1, high=v + .1) for t, m, v in (("mass", "trained", .79), ("mass", "untrained", .46))])'
    nb = notebook(folder/'e01_x.ipynb', 'data: str = ""  # folder', BEGIN,
                  f'import pandas as pd\nrun.note("PHANTOM: made images.")\nrun.table("zero_shot", {table})\nrun.table("zero_shot_change", pd.DataFrame([dict(task="mass", difference=.33, low=.2, high=.46)]))\n'
                  'run.table("each", pd.DataFrame(dict(a=[1, 1, 2])))\nrun.metric("zero_shot/mass_auroc", .79, low=.69, high=.89, unit="image", n=164)\nrun.metric("density_auroc", .79, low=.69, high=.89, unit="image", n=164)',
                  'MD ## How it fell\n\nThe loss of each step, on a logarithmic scale.',
                  'import matplotlib.pyplot as plt\nfrom medvl.show.style import picture\nfig, ax = plt.subplots(figsize=(9, 2)); ax.plot([1, 2])\npicture(run.figure("curve", fig))', 'run.done()')
    return run_experiment(nb, outputs=folder/'out')


def test_three_sentences_stand_on_top(good):
    page = (good.folder/'report.html').read_text()
    box = re.search(r'<div class="brief"[^>]*>(.*?)</div>', page, re.S)[1]
    assert box.count('<p>') == 3 and page.index('class="brief"') < page.index('id="results"')
    assert 'a phantom' in box and 'mass, AUROC 0.79 (0.69 to 0.89), untrained 0.46 (0.36 to 0.56), difference 0.33 (0.20 to 0.46), chance 0.5' in box


def test_everything_stands_once(good):
    "The figure, its sentence, the numbers of a row; a metric of another name with the same numbers stays."
    page = (good.folder/'report.html').read_text()
    assert page.count('data:image/png') == 1 and 'The loss of each step, on a logarithmic scale.</figcaption>' in page and 'Drawn here: <a href="#figure-curve">' in page
    assert 'zero_shot/mass_auroc' not in page.split('id="parameters"')[0] and 'density_auroc' in page
    assert '3 rows, 1 of them twins of others' in page
    for id in re.findall(r'href="#([^"]+)"', page): assert f'id="{id}"' in page, id
    assert all('<code>' not in part or '</details>' in part for part in page.split('id="notebook"')[1].split('<details')[1:])


def test_widths_and_the_dark(good, browse):
    page = good.folder/'report.html'
    for width in (390, 820, 1400):
        found = browse(page, width, '''return [document.documentElement.scrollWidth, innerWidth, [...document.images].every(i => i.naturalWidth > 0 && i.getBoundingClientRect().width <= innerWidth),
            [...document.querySelectorAll('details')].filter(d => d.querySelector('summary').textContent.trim() === 'code').some(d => d.open && d.querySelector('code').textContent.includes('run.figure'))]''')
        assert found[0] <= found[1] and found[2] and not found[3], (width, found)
    tall = browse(page, 390, '''return [...document.querySelectorAll('.stack tr')].map(r => [r.getBoundingClientRect().height, ...[...r.cells].map(c => c.getBoundingClientRect().right)])''')
    assert len(tall) > 3 and all(r[0] < 150 and max(r) <= 390 for r in tall), tall # on a phone each line is read whole
    colours = 'const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]'
    light, dark = (browse(page, 820, colours, dark=d) for d in (False, True))
    bright = lambda rgb: sum(map(int, re.findall(r'\d+', rgb)[:3]))
    assert bright(light[0]) > bright(light[1]) and bright(dark[0]) < bright(dark[1])


def test_a_run_that_failed_in_its_first_cell_has_a_page(tmp_path, browse):
    nb = notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', 'raise ValueError("there is no folder <gone>")', BEGIN, 'run.done()')
    run = run_experiment(nb, outputs=tmp_path/'out', check=False)
    assert run.state == 'failed'
    page = (run.folder/'report.html').read_text()
    assert 'Result: none, the run failed before it measured anything.' in page and 'It had written no number, figure or table until then.' in page
    assert 'there is no folder &lt;gone&gt;' in page and '<gone>' not in page
    assert browse(run.folder/'report.html', 390, 'return document.documentElement.scrollWidth <= innerWidth')


@pytest.mark.parametrize('first, says', [('lr: float = 0.1\nimport <no such thing>', None), ('lr: float = 0.1\nraise ValueError("gone & <lost>")', 'ValueError: gone &amp; &lt;lost&gt;'),
                                         ('lr: float = 0.1\nfolder = undefined_name', 'NameError'), ('lr: float = 0.1\nimport os; os.kill(os.getpid(), 9)', 'the kernel died')])
def test_the_very_first_cell_fails(tmp_path, first, says):
    "The cell of the parameters itself: refused where it is not Python, else a page that names the error and holds no numbers."
    nb = notebook(tmp_path/'e01_x.ipynb', first, BEGIN, 'run.done()')
    if says is None:
        with pytest.raises(RefusedError, match='parameters cell of e01_x.ipynb is not Python'): run_experiment(nb, outputs=tmp_path/'out')
        assert not run_folders(tmp_path/'out')
        return
    run = run_experiment(nb, outputs=tmp_path/'out', check=False)
    page = (run.folder/'report.html').read_text()
    assert run.state == ('killed' if 'died' in says else 'failed') and says in page and 'This run recorded no metrics.' in page and '<lost>' not in page
    assert 'It had written no number, figure or table until then.' in page and f'This run is not done ({run.state})' in page


@pytest.mark.parametrize('left', [(), ('params.json',), ('params.json', 'provenance.json'), ('params.json', 'run.ipynb')])
def test_a_folder_with_little_in_it_has_a_page(tmp_path, left):
    "Killed before it wrote more than its journal; a notebook that was torn while it was written."
    run = Run.create('x', {}, tmp_path)
    for file in list(run.folder.iterdir()):
        if file.name not in ('journal.jsonl', *left): file.unlink()
    if 'run.ipynb' in left: (run.folder/'run.ipynb').write_text('{"cells": [')
    page = write_report(run.folder).read_text()
    assert 'This run recorded no metrics.' in page and page.count('<p>', page.index('class="brief"'), page.index('class="use"')) == 3


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='no run folder'): run_sentences(tmp_path)
    (tmp_path/'w.safetensors').write_bytes(b'123')
    with pytest.raises(ValueError, match='no safetensors'): weight_count(tmp_path/'w.safetensors')
    assert model_facts(tmp_path) == {}


def test_odd_tables_are_left_as_they_are(tmp_path):
    run = Run.create('x', {}, tmp_path)
    both = dict(task=['a', 'a'], metric=['auroc'] * 2, model=['trained', 'untrained'], value=[.5, .6])
    run.table('twice', pd.DataFrame(both).loc[[0, 0, 1]])
    run.table('seeds', pd.DataFrame({**both, 'seed': [0, 1]}))
    run.table('none', pd.DataFrame({**both, 'value': [None, None]}))
    (run.folder/'tables'/'empty.csv').write_text('')
    (run.folder/'tables'/'torn.csv').write_text('a,b\n1,2,3,4\n1,2\n"')
    run.table('good', pd.DataFrame(both))
    assert list(side_by_side(run.folder)) == ['good']
    assert list(side_by_side(run.folder)['good'].columns) == ['task', 'trained', 'untrained', 'chance']
    page = write_report(run.folder).read_text()
    assert 'an empty table' in page and 'torn: cannot be read' in page


def test_a_sweep_has_a_page_that_links_its_runs(tmp_path, browse):
    from medvl.run.cli import app
    nb = notebook(tmp_path/'e01_x.ipynb', 'lr: float = 0.1', BEGIN, 'assert lr < 1, "too steep"\nrun.metric("auroc", lr, low=0., high=1.)', 'run.done()')
    table = run_sweep(nb, dict(lr=['0.2', '0.7', '2']), outputs=tmp_path/'out')
    page = next((tmp_path/'out').glob('*/report.html'))
    text = page.read_text()
    links = re.findall(r'href="([^"]+/report.html)"', text)
    assert len(links) == 3 and all((page.parent/l).is_file() for l in links) and 'too steep' in text and 'Highest of 2' in text
    assert re.search(r'<tr class="changed"><td><a href="0001', text) and list(table.state) == ['done', 'done', 'failed']
    assert browse(page, 390, 'return document.documentElement.scrollWidth <= innerWidth')
    page.unlink()
    said = CliRunner().invoke(app, ['report', str(page.parent)])
    assert said.exit_code == 0 and page.is_file(), said.output


@pytest.mark.parametrize('version,kind,says', [(3, 'chest phantom', True), (4, 'chest phantom', False), (2, 'breast phantom', False)])
def test_films_whose_border_tells_are_named(tmp_path, version, kind, says):
    from medvl.run.brief import _leaking
    (tmp_path/'phantom'/'source').mkdir(parents=True)
    (tmp_path/'phantom'/'source'/'phantom.json').write_text(json.dumps(dict(kind=kind, version=version)))
    for folder, params in ((tmp_path, {}), (tmp_path/'run', dict(data=str(tmp_path/'phantom'/'prepared'))), (tmp_path/'run', dict(data=str(tmp_path/'phantom')))):
        assert ('border' in _leaking(folder, params)) == says
    assert _leaking(tmp_path/'run', dict(data='')) == ''
    (tmp_path/'phantom'/'source'/'phantom.json').write_text(json.dumps(dict(kind=kind, version=version, config=dict(heart='ratio'))))
    assert ('rectangle' in _leaking(tmp_path, {})) == says
