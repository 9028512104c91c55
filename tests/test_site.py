"""The site: every link of notebooks and texts leads somewhere; a small part of it is built as `make docs` builds all, without a network."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO/'.ci'))
docs = pytest.importorskip('docs', reason='the site is built with the developer tools (pip install -e .[dev])')
PART = ['nbs/000_core', 'nbs/812_', 'nbs/tutorials/t02', 'nbs/experiments/e20', 'README.md', 'CONTRIBUTING.md']


@pytest.fixture(scope='module')
def whole():
    site = docs.Site(quick=True)
    site.build()
    return site


def test_every_link_leads_somewhere(whole):
    assert len(whole.pages) > 700 and len(whole.links) > 1000 and not whole.broken, whole.broken[:10]


def test_every_notebook_and_module_has_a_page(whole):
    books = [p.relative_to(REPO).with_suffix('.html').as_posix() for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert not set(books) - set(whole.pages)
    assert 'api/medvl.core.run.html' in whole.pages and {'gallery.html', 'index.html', *(f'lists/{n}.html' for n in ('methods', 'recipes', 'experiments', 'data', 'api'))} <= set(whole.pages)


@pytest.fixture(scope='module')
def part(tmp_path_factory):
    site = docs.Site(out=tmp_path_factory.mktemp('site'), only=PART)
    site.lists = lambda: [site.page(to, to, '<h1>list</h1>') for _, to in docs.MENU if to.startswith('lists/')] # the registries take seconds
    for m in list(site.modules):
        if m not in ('medvl.core.paths', 'medvl.arguments', 'medvl.core.patch', 'medvl.core.run'): del site.modules[m]
    site.build()
    return site


def test_pages_as_written(part):
    "Pictures are files, formulas are drawn by the browser, code is coloured, argument comments are rows, nothing comes from the net."
    page = (part.out/'nbs/tutorials/t02_contrastive.html').read_text()
    assert '<math' in page and '<span class="kn">import' in page and 'data:image' not in page and '#| hide' not in page
    for src in re.findall(r'<img src="([^"]+)"', page): assert (part.out/'nbs/tutorials'/src).resolve().stat().st_size > 500
    reference = (part.out/'api/medvl.core.paths.html').read_text()
    assert '<td>folder to start from; default: the working directory</td>' in reference and 'Raises: FileNotFoundError' in reference
    assert 'Run.metric(name, value, step, extra)' in (part.out/'api/medvl.core.run.html').read_text() and 'Run.table(' in (part.out/'api/medvl.core.run.html').read_text()
    for p in part.out.rglob('*.html'):
        text = p.read_text()
        assert not re.search(r'<(script|link|img|iframe)\b[^<>]*? (src|href)="(https?:)?//', text), p
        assert 'name="viewport"' in text and ('prefers-color-scheme' in text) == ('reports' in p.parts), p # the style of pages stands in one file, that of a report in the report
    assert '@import' not in (part.out/'docs.css').read_text() and 'prefers-color-scheme: dark' in (part.out/'docs.css').read_text()


def test_the_index_of_the_search_holds_words_and_functions(part):
    rows = json.loads((part.out/'search.js').read_text().removeprefix('window.DOCS='))
    assert any(r[0] == 'find_repo' and r[1] == 'api/medvl.core.paths.html#find_repo' for r in rows)
    assert any('contrastive' in r[3] and r[1].endswith('t02_contrastive.html') for r in rows)


def small(folder, text):
    for name in ('nbs', 'medvl'): (folder/name).mkdir(parents=True)
    cells = [dict(cell_type='markdown', id='a1', metadata={}, source=t) for t in ('# One\n\n> first\n\n## Here it is', text)]
    (folder/'nbs'/'000_core.one.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    (folder/'nbs'/'guides').mkdir()
    return docs.Site(folder, folder/'out', quick=True)


@pytest.mark.parametrize('text, why', [('[x](gone.ipynb)', 'no such file'), ('[x](#Not-here)', 'no such heading'), ('![p](gone.png)', 'no such picture'), ('[x](../../../etc/passwd)', 'no such file')])
def test_a_broken_link_is_named(tmp_path, text, why):
    site = small(tmp_path, text)
    site.build()
    assert [(b[0], why in b[2]) for b in site.broken] == [('nbs/000_core.one.ipynb', True)]


def test_good_links_pass(tmp_path):
    site = small(tmp_path, '[x](#Here-it-is) [y](000_core.one.ipynb#Here-it-is) [z](https://example.org/x) [a](mailto:a@example.org)')
    site.build()
    assert not site.broken


def test_without_a_network_the_whole_command_works(tmp_path):
    "No name can be looked up, no address reached: the command still ends well."
    (tmp_path/'sitecustomize.py').write_text('import socket\ndef no(*a, **k): raise OSError("the network was asked")\nsocket.getaddrinfo = socket.create_connection = no\n')
    env = dict(PATH='/usr/bin:/bin', PYTHONPATH=f'{tmp_path}:{REPO}', HOME=str(tmp_path), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, str(REPO/'.ci'/'docs.py'), '--check'], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bad = subprocess.run([sys.executable, str(REPO/'.ci'/'docs.py'), '--check', '--runs', str(tmp_path/'none')], env=env, capture_output=True, text=True, timeout=300)
    assert bad.returncode and 'There is no folder' in bad.stderr


def test_the_site_in_a_browser(part, browse):
    "No page is wider than a phone; somebody who types a word finds the page, opened as a file."
    for page in ('index.html', 'api/medvl.core.paths.html', 'nbs/tutorials/t02_contrastive.html'):
        for width in (390, 820, 1400):
            found = browse(part.out/page, width, 'return [document.documentElement.scrollWidth, innerWidth]')
            assert found[0] <= found[1] + 1, (page, width, found)
    say = '''const i = document.querySelector('.find input'); i.focus(); i.value = 'find_repo'; i.dispatchEvent(new Event('input'));
             await new Promise(r => setTimeout(r, 800)); return [...document.querySelectorAll('.find li a')].map(a => a.textContent)'''
    assert any(t.startswith('find_repo') for t in browse(part.out/'index.html', 1400, say))


def test_runs_kept_for_the_gallery_are_small_and_anonymous(tmp_path):
    "What stands in the checkout, and what --keep makes of a run: pages of it and of its steps, no path, no machine, no output of a cell."
    from medvl.core.run import Run, run_folders
    kept = run_folders(REPO/docs.REPORTS)
    assert len(kept) >= 3
    for folder in kept:
        text = '\n'.join(p.read_text() for p in folder.rglob('*') if p.suffix in ('.json', '.jsonl', '.ipynb', '.csv'))
        assert not re.search(r'"(/work|/home|/root|/tmp)/|"host": "|"machine": "[0-9a-f]{12}"|"pid"', text), folder
        assert all(p.stat().st_size < 200_000 for p in folder.rglob('*') if p.is_file()), folder
    run = Run.create('mine', dict(data='/secret/place/set'), tmp_path/'out')
    run.begin('hand'); run.metric('auroc', .7, low=.6, high=.8); run.done()
    small = docs.keep_run(run.folder, tmp_path/'small')
    assert '/secret' not in ''.join(p.read_text() for p in small.rglob('*.json*')) and json.loads((small/'params.json').read_text()) == {'data': 'set'}
    site = docs.Site(out=tmp_path/'site', only=['README.md'])
    site.modules = {}
    site.lists = lambda: [site.page(to, to, '<h1>list</h1>') for _, to in docs.MENU if to.startswith('lists/')]
    site.build([small])
    assert 'auroc' in (tmp_path/'site'/'reports'/'small'/'report.html').read_text() and (tmp_path/'site'/'reports'/'mammo_clip'/'steps'/'pretrain'/'report.html').is_file()
