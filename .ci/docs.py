"""Build the site of medvl from the checkout, offline: `make docs`. Developer tool; medvl does not import it.

    python .ci/docs.py                      # all of it into _docs/; open _docs/index.html, no server needed
    python .ci/docs.py --check              # only ask whether every link leads somewhere; a few seconds
    python .ci/docs.py --runs FOLDER …      # lay the reports of these runs (or folders of runs) into the gallery

Exit status 1: a link that leads nowhere; each is named with its page. Nothing is fetched: styles, search and formulas (MathML) are part of the pages.
"""
import argparse
import ast
import base64
import contextlib
import hashlib
import html
import json
import os
import posixpath
import re
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import mistune

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]
from index import ROOMS, title  # noqa: E402

from medvl.arguments import argument_places, signature_comments  # noqa: E402

TEXTS = {'README.md': 'README', 'RESULTS.md': 'All results', 'CONTRIBUTING.md': 'How to work on medvl', 'CHANGELOG.md': 'Changes', 'SECURITY.md': 'Security',
         'data_csv/README.md': 'A data set to begin with', 'nbs/guides/command_line.md': 'From the shell', 'nbs/guides/your_data.md': 'Your own data',
         'nbs/guides/gpu_and_cluster.md': 'On a GPU, on a cluster', 'nbs/guides/what_is_checked.md': 'What is checked'}
PARTS = {'tutorials': 'Tutorials', 'guides': 'Guides', 'experiments': 'Experiments', 'data': 'Data cards', 'benchmarks': 'Benchmarks'}
WORD = re.compile(r'[^\W_][\w.\-]*[^\W_]|[^\W_]', re.U)
LINK = re.compile(r'<a href="([^"]*)"')
ID = re.compile(r' id="([^"]+)"')
REPORTS = 'gallery' # small run folders that came with the checkout: the gallery's own examples


def page_of(source):
    "Where a file of the checkout stands on the site, or None: 'nbs/a.ipynb' -> 'nbs/a.html'."
    stem, ending = posixpath.splitext(source)
    return f'{stem}.html' if ending in ('.ipynb', '.md') else None


def anchor(text):
    "The id of a heading, as JupyterLab makes it."
    return re.sub(r'\s+', '-', re.sub(r'[`*$"<>]', '', text).strip())


def ticked(text):
    "Plain text of a docstring or comment, what stands in backticks as code."
    return re.sub(r'`([^`\n]+)`', r'<code>\1</code>', html.escape(text))


def loosely(text): return re.sub(r'[\W_]+', '', text.lower())


def formula(tex, block=False):
    "TeX as MathML, which browsers draw themselves; TeX as text where it cannot be read."
    from latex2mathml.converter import convert
    try: return convert(tex.strip(), display='block' if block else 'inline')
    except Exception: return f'<code class="tex">{html.escape(tex)}</code>' # one odd formula does not end the build; --check counts them


class Renderer(mistune.HTMLRenderer):
    "HTML with ids on headings, formulas as MathML, and inline code that names a module or notebook as a link."
    def __init__(self, site):
        super().__init__(escape=False)
        self.site, self.headings, self.base = site, [], ''

    def heading(self, text, level, **_):
        name, plain = anchor(html.unescape(re.sub(r'<[^>]+>', '', text))), re.sub(r'<math.*?</math>|<[^>]+>', '', text)
        while any(name == h[2] for h in self.headings): name += '-'
        self.headings.append((level, plain, name))
        return f'<h{level} id="{html.escape(name)}">{text}</h{level}>\n'

    def inline_math(self, text): return self.site.formula(text)

    def block_math(self, text): return f'<div class="wide">{self.site.formula(text, True)}</div>\n'

    def codespan(self, text):
        to = self.site.names.get(html.unescape(text))
        code = f'<code>{text}</code>'
        return f'<a href="{self.site.way(self.base, to)}">{code}</a>' if to and to != self.base else code

    def block_code(self, code, info=None): return f'<pre>{self.site.highlight(code, (info or "").split(" ")[0])}</pre>\n'

    def table_cell(self, text, align=None, head=False):
        tag = 'th' if head else 'td'
        return f'<{tag}{f" class={align}" if align else ""}>{text}</{tag}>\n'

    def link(self, text, url, title=None): return f'<a href="{self.site.link(self.base, url)}">{text}</a>'

    def image(self, text, url, title=None):
        return f'<img src="{self.site.picture(self.base, url)}" alt="{html.escape(text)}">'


class Site:
    "Pages as they are made, where they may lead, and what was wrong with them."
    def __init__(self, root=ROOT, out=None, only=None, quick=False):
        self.root, self.out, self.quick = Path(root), Path(out or Path(root)/'_docs'), quick
        self.pages, self.ids, self.links, self.broken, self.entries, self.written = {}, {}, [], [], [], []
        self.odd, self.maths, self.marked = 0, {}, {}
        self.sources = self.found(only)
        self.names = {} # text of inline code -> page
        for s in self.sources: self.names[Path(s).stem] = page_of(s)
        self.modules = {self.dotted(p): p for p in sorted((self.root/'medvl').rglob('*.py')) if p.name not in ('_modidx.py', '__init__.py')
                        and 'AUTOGENERATED' in p.read_text(encoding='utf-8')[:2000]}
        for m in self.modules: self.names[m] = self.names[m.removeprefix('medvl.')] = f'api/{m}.html'

    def dotted(self, path): return '.'.join(path.relative_to(self.root).with_suffix('').parts)

    def found(self, only):
        "Sources of pages, relative to the checkout; a part of them for a quick look."
        every = [p.relative_to(self.root).as_posix() for p in sorted((self.root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts
                 and p.name[0] not in '_.']
        every += [t for t in TEXTS if (self.root/t).exists()]
        return [s for s in every if only is None or any(re.search(o, s) for o in only)]

    # what pages are made of

    def formula(self, tex, block=False):
        key = tex, block
        if key not in self.maths:
            self.maths[key] = html.escape(tex) if self.quick else formula(tex, block)
            self.odd += '<code class="tex">' in self.maths[key]
        return self.maths[key]

    def highlight(self, code, language='python'):
        "Source with classes for its colours; each text once."
        if self.quick: return ''
        key = code, language
        if key not in self.marked:
            from pygments import highlight
            from pygments.formatters import HtmlFormatter
            from pygments.lexers import BashLexer, PythonLexer, TextLexer, YamlLexer
            lexer = {'python': PythonLexer, 'py': PythonLexer, 'sh': BashLexer, 'bash': BashLexer, 'yaml': YamlLexer}.get(language, TextLexer)
            self.marked[key] = highlight(code, lexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip('\n')
        return self.marked[key]

    def way(self, base, to):
        "The relative way from a page to another, or to a file."
        page, _, part = to.partition('#')
        return posixpath.relpath(page, posixpath.dirname(base) or '.') + (f'#{part}' if part else '') if page else f'#{part}'

    def link(self, base, url):
        "A link of a source as one of the site; a file that is no page goes along."
        url = html.unescape(url)
        if re.match(r'[a-z][a-z0-9+.\-]*:', url): return html.escape(url)
        path, _, part = url.partition('#')
        source = posixpath.normpath(posixpath.join(posixpath.dirname(self.source), unquote(path))) if path else self.source
        to = self.target(source)
        if to is None:
            self.broken.append((self.source, url, 'there is no such file'))
            return html.escape(url)
        part = unquote(part)
        self.links.append((self.source, url, to, part))
        return html.escape(self.way(base, f'{to}#{part}' if part else to))

    def target(self, source):
        "The page or file that a source becomes on the site."
        if source in self.sources: return page_of(source)
        if source.startswith('medvl/') and source.endswith('.py') and source[:-3].replace('/', '.') in self.modules: return f'api/{source[:-3].replace("/", ".")}.html'
        if source in ('nbs', '.'): return 'index.html'
        part = source.removeprefix('nbs/')
        if part in PARTS: return f'lists/{part}.html'
        path = self.root/source
        if path.is_file() and path.suffix in ('.ipynb', '.md'): return page_of(source) # beside the part that is built
        if not path.exists() or not path.resolve().is_relative_to(self.root.resolve()): return None
        if path.is_dir(): return 'index.html' if (path/'README.md').exists() is False else self.target(f'{source}/README.md')
        if not self.quick and path.stat().st_size < 2e6: self.copy(path, f'files/{source}')
        return f'files/{source}'

    def picture(self, base, url):
        "A picture that a text shows, copied beside the pages."
        if re.match(r'(https?|data):', url): return html.escape(url)
        path = self.root/posixpath.normpath(posixpath.join(posixpath.dirname(self.source), unquote(url)))
        if not path.is_file():
            self.broken.append((self.source, url, 'there is no such picture'))
            return html.escape(url)
        return self.way(base, self.copy(path, f'files/{path.relative_to(self.root).as_posix()}'))

    def copy(self, path, to):
        if not self.quick:
            (self.out/to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.out/to)
        return to

    def image(self, base, data, ending='png'):
        "A picture out of a notebook as a file; the same picture once."
        if self.quick: return ''
        raw = base64.b64decode(''.join(data)) if ending != 'svg' else ''.join(data).encode()
        to = f'pictures/{hashlib.sha256(raw).hexdigest()[:16]}.{ending}'
        if not (self.out/to).exists():
            (self.out/to).parent.mkdir(parents=True, exist_ok=True)
            (self.out/to).write_bytes(raw)
        return self.way(base, to)

    # pages

    def markdown(self, base):
        "What turns text of a page into HTML; `.renderer.headings` collects its headings."
        renderer = Renderer(self)
        renderer.base = base
        return mistune.Markdown(renderer=renderer, plugins=[mistune.plugins.import_plugin(p) for p in ('table', 'strikethrough', 'math')])

    def output(self, base, out):
        "One output of a cell as HTML."
        text = lambda v: ''.join(v)
        if out['output_type'] == 'stream': return f'<pre class="out">{html.escape(text(out["text"]))}</pre>' if out.get('name') != 'stderr' else ''
        if out['output_type'] == 'error': return f'<pre class="out bad">{html.escape(out["ename"])}: {html.escape(out["evalue"])}</pre>'
        data = out.get('data', {})
        for kind, ending in (('image/png', 'png'), ('image/jpeg', 'jpg'), ('image/svg+xml', 'svg')):
            if kind in data: return f'<figure class="paper"><img src="{self.image(base, data[kind], ending)}" alt="output of the cell above" loading="lazy"></figure>'
        if 'text/html' in data:
            kept = re.sub(r'<(script|style)\b.*?</\1>', '', text(data['text/html']), flags=re.S | re.I)
            kept = re.sub(r'data:image/(png|jpeg);base64,([A-Za-z0-9+/=\n]+)', lambda m: self.image(base, m[2], m[1].replace('jpeg', 'jpg')), kept)
            return f'<div class="wide out">{re.sub(ID, "", kept)}</div>'
        if 'text/markdown' in data: return self.markdown(base)(text(data['text/markdown']))
        return f'<pre class="out">{html.escape(text(data["text/plain"]))}</pre>' if 'text/plain' in data else ''

    def notebook(self, source):
        "The page of a notebook: text, code, outputs; hidden cells stay hidden."
        base, parts, words, picture = page_of(source), [], [], None
        self.source = source
        md = self.markdown(base)
        module = ''
        for cell in json.loads((self.root/source).read_text(encoding='utf-8'))['cells']:
            text, name = ''.join(cell['source']), cell.get('id', '')
            if not text.strip(): continue
            if cell['cell_type'] == 'markdown':
                parts.append(f'<div id="{name}">{md(text)}</div>')
                words.append(text)
                continue
            if cell['cell_type'] != 'code': continue
            found = re.search(r'^#\|\s*default_exp\s+(\S+)', text, re.M)
            if found: module = f'medvl.{found[1]}'
            if re.search(r'^#\|\s*(hide|default_exp)\b', text, re.M): continue
            marks = re.findall(r'^#\|\s*(.+)', text, re.M)
            code = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip('\n')
            label = (f'<a class="mark" href="{self.way(base, f"api/{module}.html")}">in {module}</a>' if 'export' in marks and module in self.modules else
                     f'<span class="mark">{html.escape(", ".join(m for m in marks if m != "export"))}</span>' if set(marks) - {'export'} else '')
            if 'parameters' in cell['metadata'].get('tags', []): label = '<span class="mark">parameters</span>'
            outs = ''.join(self.output(base, o) for o in cell.get('outputs', []))
            if picture is None: picture = next((m[1] for m in re.finditer(r'<figure class="paper"><img src="([^"]+)"', outs)), None)
            parts.append(f'<div class="cell" id="{name}">{label}<pre class="code">{self.highlight(code)}</pre>{outs}</div>')
            words += re.findall(r'^(?:def|class) (\w+)', code, re.M)
        heads = md.renderer.headings
        self.page(base, heads[0][1] if heads else Path(source).stem, ''.join(parts), heads[1:], source, words, picture=picture)

    def text(self, source):
        self.source, base = source, page_of(source)
        md, text = self.markdown(base), (self.root/source).read_text(encoding='utf-8')
        text = re.sub(r'<(p|div|picture|source)\b[^>]*>|</(p|div|picture)>', '', text)
        body = md(text)
        body = re.sub(r'<img src="(?!https?:|data:)([^"]+)"', lambda m: m[0] if 'files/' in m[1] else f'<img src="{self.picture(base, m[1])}"', body)
        self.page(base, TEXTS.get(source, Path(source).stem), body, md.renderer.headings[1:], source, [text])

    def module(self, name):
        "The reference of a module: what it offers, each argument in a row."
        path, base = self.modules[name], f'api/{name}.html'
        source = path.read_text(encoding='utf-8')
        tree, lines = ast.parse(source), source.splitlines()
        book = next((f'nbs/{m[1]}' for m in re.finditer(r'File to edit: (?:\.\./)+nbs/(\S+\.ipynb)', source)), None)
        self.source = book or path.relative_to(self.root).as_posix()
        cells = [(k, m[1]) for k, line in enumerate(lines, 1) if (m := re.match(r'# %% \S*\.ipynb #(\w+)', line))]
        md, parts, heads, words = self.markdown(base), [], [], []
        public = set()
        for n in tree.body:
            if isinstance(n, ast.Assign) and any(getattr(t, 'id', '') == '__all__' for t in n.targets): public = set(ast.literal_eval(n.value))
        about = (ast.get_docstring(tree) or '').strip()
        parts.append(f'<h1 id="{name}">{name}</h1><p>{html.escape(about)}</p>')
        if book in self.sources: parts.append(f'<p class="soft">Explained, shown and tested in <a href="{self.way(base, page_of(book))}">{Path(book).stem}</a>.</p>')
        grown = {}
        for n in tree.body:
            to = next((d.args[0].id for d in getattr(n, 'decorator_list', []) if isinstance(d, ast.Call) and getattr(d.func, 'id', '') == 'patch' and d.args
                       and isinstance(d.args[0], ast.Name)), None)
            if to: grown.setdefault(to, []).append(n)
        for n in tree.body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public:
                heads.append((2, n.name, n.name)); words.append(n.name)
                parts.append(self.described(n, lines, n.name, base, book, cells))
                inside = [m for m in n.body if isinstance(m, ast.FunctionDef)] if isinstance(n, ast.ClassDef) else []
                for m in [*inside, *grown.pop(n.name, [])]:
                    if m.name.startswith('_'): continue
                    words.append(f'{n.name}.{m.name}')
                    parts.append(self.described(m, lines, f'{n.name}.{m.name}', base, book, cells, 3))
        for owner, functions in grown.items(): # methods that this module lends to a class of another
            for m in functions:
                if m.name.startswith('_'): continue
                heads.append((2, f'{owner}.{m.name}', f'{owner}.{m.name}')); words.append(f'{owner}.{m.name}')
                parts.append(self.described(m, lines, f'{owner}.{m.name}', base, book, cells))
        constants = [(t.id, ast.unparse(n.value)) for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
                     for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if getattr(t, 'id', None) in public and n.value is not None]
        if constants:
            heads.append((2, 'Constants', 'Constants'))
            rows = ''.join(f'<tr id="{k}"><td><code>{k}</code></td><td><code>{html.escape(v[:300])}{" …" if len(v) > 300 else ""}</code></td></tr>' for k, v in constants)
            parts.append(f'<h2 id="Constants">Constants</h2><div class="wide"><table>{rows}</table></div>')
            words += [k for k, _ in constants]
        del md
        self.page(base, name, ''.join(parts), heads, self.source, [about, *words])
        self.entries += [(w, f'{base}#{w}', 'api', '') for w in words]

    def described(self, node, lines, name, base, book, cells, level=2):
        "Signature, docstring and a table of arguments of a function, method or class."
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        source = '\n'.join(lines[first - 1:node.end_lineno])
        with contextlib.suppress(SyntaxError, IndexError): comments = signature_comments(source)
        init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == '__init__'), None) if isinstance(node, ast.ClassDef) else None
        if init is not None: comments = {**signature_comments('\n'.join(lines[init.lineno - 1:init.end_lineno])), **comments}
        about, rows = ast.get_docstring(node) or '', []
        if isinstance(node, ast.ClassDef):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            rows = [(n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else '') for n in fields]
            sign = f'class {node.name}' + (f'({", ".join(ast.unparse(b) for b in node.bases)})' if node.bases else '')
        else: sign = f'{name}({", ".join(a for _, _, a in argument_places(node)[0] if a not in ("self", "cls", "returns"))})'
        f = init or (node if isinstance(node, ast.FunctionDef) else None)
        if f is not None:
            a = f.args
            plain = [*a.posonlyargs, *a.args]
            given = dict(zip([x.arg for x in reversed(plain)], reversed([ast.unparse(d) for d in a.defaults])))
            given |= {x.arg: ast.unparse(d) for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
            named = [*plain, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
            star = {getattr(a.vararg, 'arg', None): '*', getattr(a.kwarg, 'arg', None): '**'}
            rows += [(star.get(x.arg, '') + x.arg, ast.unparse(x.annotation) if x.annotation else '', given.get(x.arg, ''))
                     for x in named if x.arg not in ('self', 'cls')]
            if f is node and (node.returns is not None or 'returns' in comments):
                kind = ast.unparse(node.returns) if node.returns else ''
                if kind != 'None': rows.append(('returns', kind, ''))
        escape = lambda t: html.escape(t.strip("'\"") if t[:1] in "'\"" and t[-1:] in "'\"" and ' ' not in t else t)
        table = ''.join(f'<tr><td><code>{html.escape(k)}</code></td><td class="soft"><code>{escape(kind)}</code></td><td><code>{html.escape(d[:120])}</code></td>'
                        f'<td>{ticked(comments.get(k.lstrip("*"), ""))}</td></tr>' for k, kind, d in rows)
        head = '<tr><th>argument</th><th>type</th><th>default</th><th>meaning</th></tr>'
        cell = next((c for k, c in reversed(cells) if k <= first), None)
        back = f' <a class="mark" href="{self.way(base, f"{page_of(book)}#{cell}")}">source</a>' if cell and book in self.sources else ''
        if back: self.links.append((self.source, f'#{cell}', page_of(book), cell))
        return (f'<h{level} id="{name}"><code>{html.escape(sign)}</code>{back}</h{level}>'
                + ''.join(f'<p>{ticked(p)}</p>' for p in re.split(r'\n\s*\n', about) if p)
                + (f'<div class="wide"><table class="args">{head}{table}</table></div>' if rows else ''))

    def page(self, base, name, body, heads=(), source='', words=(), picture=None):
        "Lay a page out and write it."
        self.ids[base] = set(ID.findall(body))
        self.pages[base] = dict(name=html.unescape(re.sub(r'<[^>]+>', '', name)), source=source, picture=picture and posixpath.normpath(posixpath.join(posixpath.dirname(base), picture)))
        text = re.sub(r'<[^>]+>|[`*$\\{}]', ' ', ' '.join(words))
        seen = dict.fromkeys(w.lower() for w in WORD.findall(text) if len(w) > 1)
        self.entries.append((self.pages[base]['name'], base, self.kind(base), ' '.join([*seen])))
        if self.quick: return
        up = '../' * base.count('/')
        inner = [h for h in heads if h[0] in (2, 3)]
        toc = ''.join(f'<li class="l{level}"><a href="#{html.escape(i)}">{t}</a></li>' for level, t, i in inner)
        menu = ''.join(f'<a href="{up}{to}">{t}</a>' for t, to in MENU)
        near = self.neighbours(base, up)
        made = LAYOUT.format(name=html.escape(self.pages[base]['name']), up=up, menu=menu, body=body, near=near,
                             toc=f'<nav class="toc"><details open><summary>On this page</summary><ul>{toc}</ul></details></nav>' if len(inner) > 1 else '',
                             source=f'<p class="soft foot">Made from <code>{html.escape(source)}</code>. Research software, not a medical device.</p>' if source else '')
        path = self.out/base
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made, encoding='utf-8')

    def kind(self, base):
        part = base.split('/')
        if part[0] == 'nbs' and len(part) == 3: return PARTS.get(part[1], part[1])
        return {'api': 'API', 'nbs': 'Notebook', 'lists': 'List', 'reports': 'Report'}.get(part[0], 'Text')

    def neighbours(self, base, up):
        "The page before and the one after, in reading order."
        order = self.order
        if base not in order: return ''
        k, out = order.index(base), []
        for j, sign in ((k - 1, '←'), (k + 1, '→')):
            same = 0 <= j < len(order) and order[j].rpartition('/')[0] == base.rpartition('/')[0]
            out.append(f'<a href="{up}{order[j]}">{sign} {html.escape(self.titles.get(order[j], Path(order[j]).stem))}</a>' if same else '<span></span>')
        return f'<nav class="near">{"".join(out)}</nav>'

    def list_page(self, base, name, about, table, extra=''):
        "A list: rows of (cells), each cell HTML."
        self.source = base
        head, *rows = table
        body = (f'<h1 id="top">{name}</h1><p>{about}</p>{extra}<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>'
                + ''.join('<tr>' + ''.join(f'<td>{c}</td>' for c in r) + '</tr>' for r in rows) + '</table></div>')
        self.page(base, name, body, (), '', [about, *(re.sub('<[^>]+>', ' ', ' '.join(map(str, r))) for r in rows)])

    # all of it

    def build(self, runs=()):
        "Write every page; (pages, seconds a part)."
        took, began = {}, time.perf_counter()
        if not self.quick:
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir(parents=True)
            for name in ('docs.css', 'docs.js'): shutil.copyfile(HERE/name, self.out/name)
            from pygments.formatters import HtmlFormatter
            light, dark = (HtmlFormatter(style=s).get_style_defs('.code,pre') for s in ('default', 'github-dark'))
            rules = lambda css: '\n'.join(line for line in css.splitlines() if re.match(r'\.code,pre \.\w', line) or ' .' in line).replace('.code,pre ', 'pre ')
            (self.out/'colours.css').write_text(rules(light) + '\n@media (prefers-color-scheme: dark){' + rules(dark) + '}\n', encoding='utf-8')
        self.order = [page_of(s) for s in self.sources if s.endswith('.ipynb')] + [f'api/{m}.html' for m in self.modules]
        self.titles = {page_of(s): title(self.root/s).replace('`', '') for s in self.sources if s.endswith('.ipynb')} | {f'api/{m}.html': m for m in self.modules}
        for what, work in (('notebooks', [(self.notebook, s) for s in self.sources if s.endswith('.ipynb')]), ('texts', [(self.text, s) for s in self.sources if s.endswith('.md')]),
                           ('API', [(self.module, m) for m in self.modules]), ('lists', [(lambda _: self.lists(), '')]), ('gallery', [(self.gallery, runs)])):
            for do, with_ in work: do(with_)
            took[what] = time.perf_counter() - began - sum(took.values())
        self.home()
        if not self.quick: self.search_index()
        self.check_links()
        return took

    def a(self, base, to, text): return f'<a href="{self.way(base, to)}">{html.escape(str(text))}</a>'

    def lists(self):
        "Lists of everything that has a name."
        for part, name in PARTS.items():
            base, rows = f'lists/{part}.html', [('', '')]
            for s in self.sources:
                if s.startswith(f'nbs/{part}/'): rows.append((self.a(base, page_of(s), Path(s).stem), html.escape(self.titles.get(page_of(s), TEXTS.get(s, '')))))
            self.list_page(base, name, f'{len(rows) - 1} pages.', rows)
        base, rows = 'lists/notebooks.html', [('room', 'notebook', '')]
        for low, high, room, _ in ROOMS:
            rows += [(room, self.a(base, page_of(s), Path(s).stem), html.escape(self.titles[page_of(s)])) for s in self.sources
                     if re.match(r'nbs/\d', s) and low <= int(s[4:7]) < high]
        self.list_page(base, 'Notebooks of the library', 'The library is written from these notebooks; each defines, shows and says.', rows)
        base, rows = 'lists/api.html', [('module', '')]
        for m, path in self.modules.items():
            rows.append((self.a(base, f'api/{m}.html', m), html.escape((ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').split('\n')[0])))
        self.list_page(base, 'API reference', 'Every module; the comments beside arguments appear as tables.', rows)
        if self.quick: # these ask the registries, which imports torch
            for n in ('methods', 'recipes', 'releases'): self.page(f'lists/{n}.html', n, '')
            return
        from medvl.run.catalogue import method_table, recipe_table, release_table
        base, cell = 'lists/methods.html', lambda v: html.escape(str(v))
        methods = [(self.a(base, to, m), cell(about), cell(r)) if (to := self.names.get(f'methods.{m}')) else (cell(m), cell(about), cell(r))
                   for m, about, r in method_table().itertuples(index=False)]
        self.list_page(base, 'Methods', 'What can be built by name: <code>medvl run pretrain -p method=NAME</code>.', [('method', 'about', 'recipes'), *methods])
        recipes = [tuple(map(cell, r)) for r in recipe_table().itertuples(index=False)]
        self.list_page('lists/recipes.html', 'Recipes', 'Named configurations of the methods: <code>-p config=NAME</code>.', [('method', 'recipe', 'about', 'size, pixels', 'samples'), *recipes])
        readers = lambda text: self.a('lists/releases.html', self.names[text], text) if text in self.names else cell(text)
        releases = [(cell(r.release), cell(r.access), cell(r.licence), readers(r.reader)) for r in release_table().itertuples()]
        self.list_page('lists/releases.html', 'Public releases', 'Data sets that are read as they are given out; a card each under <a href="data.html">Data cards</a>.',
                       [('release', 'access', 'licence', 'reader'), *releases])

    def gallery(self, runs):
        "Pictures of every experiment, and the reports of runs."
        from medvl.core.run import run_folders, run_info
        base, cards = 'gallery.html', []
        self.source = 'gallery.html'
        places = [p for r in (*runs, self.root/REPORTS) for p in ([Path(r)] if (Path(r)/'journal.jsonl').exists() else run_folders(r) if Path(r).is_dir() else [])]
        for folder in [] if self.quick else places:
            from medvl.run.report import write_report
            to = f'reports/{folder.name}/report.html'
            for one in (folder, *(p.parent for p in sorted((folder/'steps').glob('*/journal.jsonl')))): # a report links its tables and its steps
                there = self.out/'reports'/folder.name/one.relative_to(folder)
                there.mkdir(parents=True, exist_ok=True)
                write_report(one, there/'report.html')
                for table in sorted((one/'tables').glob('*.csv')): self.copy(table, (there/'tables'/table.name).relative_to(self.out).as_posix())
                self.written.append((there/'report.html').relative_to(self.out).as_posix())
            info, drawn = run_info(folder), sorted((folder/'figures').glob('*.png'))
            picture = f'<img src="{self.copy(drawn[-1], f"pictures/{folder.name}.png")}" alt="" loading="lazy">' if drawn else ''
            self.ids[to] = set()
            self.entries.append((f'{info["name"]}: report', to, 'Report', ''))
            cards.append(f'<a class="card" href="{to}">{picture}<b>{html.escape(info["name"])}</b><span>{html.escape(info["state"])}, report of a run</span></a>')
        body = '<h1 id="top">Gallery</h1><h2 id="Reports">Reports of runs</h2>'
        body += f'<div class="cards">{"".join(cards)}</div>' if cards else '<p>No run was given: <code>make docs RUNS=outputs</code> lays the reports of your runs here.</p>'
        for part, name in (('experiments', 'Experiments'), ('tutorials', 'Tutorials'), ('benchmarks', 'Benchmarks')):
            shown = [(p, v) for p, v in self.pages.items() if p.startswith(f'nbs/{part}/') and v['picture']]
            body += f'<h2 id="{name}">{name}</h2><div class="cards">' + ''.join(
                f'<a class="card" href="{p}"><img src="{v["picture"]}" alt="" loading="lazy"><b>{html.escape(v["name"])}</b></a>' for p, v in shown) + '</div>'
        self.page(base, 'Gallery', body, [(2, t, t) for t in ('Reports', 'Experiments', 'Tutorials', 'Benchmarks')], '', ['pictures reports figures'])

    def home(self):
        self.source = 'index.html'
        count = lambda part: sum(s.startswith(f'nbs/{part}') for s in self.sources)
        kinds = [('lists/tutorials.html', 'Learn', f'{count("tutorials/")} tutorials with exercises that check themselves'), ('lists/experiments.html', 'Run', f'{count("experiments/")} experiments: one command each'),
                 ('lists/data.html', 'Data cards', f'{count("data/")} public releases'), ('lists/methods.html', 'Methods', 'five systems, and what they are compared with'),
                 ('lists/recipes.html', 'Recipes', 'named configurations'), ('lists/guides.html', 'Guides', 'shell, own data, GPUs'), ('gallery.html', 'Gallery', 'pictures and reports'),
                 ('lists/notebooks.html', 'Notebooks', 'the source of the library'), ('lists/api.html', 'API reference', f'{len(self.modules)} modules'), ('RESULTS.html', 'Results', 'every number, with the command that makes it')]
        if 'nbs/experiments/e90_paper_tables.ipynb' in self.sources: kinds.append(('nbs/experiments/e90_paper_tables.html', 'Paper tables', 'published, ours, protocol, verdict'))
        cards = ''.join(f'<a class="card" href="{to}"><b>{t}</b><span>{about}</span></a>' for to, t, about in kinds if to in self.pages)
        readme = ''
        if 'README.md' in self.sources:
            self.source = 'README.md'
            md = self.markdown('index.html')
            text = re.sub(r'<(p|div|picture|source)\b[^>]*>|</(p|div|picture)>', '', (self.root/'README.md').read_text(encoding='utf-8'))
            readme = md(text)
            readme = re.sub(r'<img src="(?!https?:|data:)([^"]+)"', lambda m: m[0] if 'files/' in m[1] else f'<img src="{self.picture("index.html", m[1])}"', readme)
        head, sep, rest = readme.partition('</h1>')
        self.page('index.html', 'medvl', (head + sep if sep else '<h1 id="medvl">medvl</h1>') + f'<div class="cards">{cards}</div>' + (rest if sep else readme), (), 'README.md', ['home'])

    def search_index(self):
        rows = [[n, p, k, w] for n, p, k, w in self.entries]
        (self.out/'search.js').write_text('window.DOCS=' + json.dumps(rows, ensure_ascii=False, separators=(',', ':')) + '\n', encoding='utf-8')

    def check_links(self):
        "Each link of a source leads to a page that is there, and to a heading on it."
        for source, url, to, part in self.links:
            if to not in self.pages and to.endswith('.html') and not to.startswith('files/'):
                if not (self.root/source).exists() or len(self.sources) > 300: self.broken.append((source, url, 'no such page'))
                continue
            if part and part not in self.ids.get(to, ()):
                if to in self.ids and not any(loosely(i) == loosely(part) for i in self.ids[to]): self.broken.append((source, url, 'no such heading'))
        if not self.quick: # and so does each link of the pages as written, the menu's too
            every = {p: (self.out/p).read_text(encoding='utf-8') for p in (*self.pages, *self.written)}
            for p, text in every.items():
                for url in set(re.findall(r'<(?:a|img|link|script)\b[^<>]*? (?:href|src)="([^"]*)"', text)):
                    url = html.unescape(url)
                    path = url.partition('#')[0]
                    if re.match(r'[a-z][a-z0-9+.\-]*:', url) or not path: continue
                    if not (self.out/posixpath.normpath(posixpath.join(posixpath.dirname(p), unquote(path)))).exists(): self.broken.append((p, url, 'is not on the site'))
        self.broken = list(dict.fromkeys(self.broken))


MENU = [('Learn', 'lists/tutorials.html'), ('Run', 'lists/experiments.html'), ('Data', 'lists/data.html'), ('Methods', 'lists/methods.html'), ('Notebooks', 'lists/notebooks.html'),
        ('API', 'lists/api.html'), ('Gallery', 'gallery.html'), ('Results', 'RESULTS.html')]
LAYOUT = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name} · medvl</title><link rel="icon" href="data:,"><link rel="stylesheet" href="{up}docs.css"><link rel="stylesheet" href="{up}colours.css"></head><body data-up="{up}">
<header><a class="brand" href="{up}index.html">medvl</a><nav class="menu">{menu}</nav><div class="find"><input type="search" placeholder="Search" aria-label="Search"><ol hidden></ol></div></header>
<div class="frame"><main>{body}{near}{source}</main>{toc}</div><script src="{up}docs.js"></script></body></html>
'''


def keep_run(folder, to):
    "A small copy of a run for the gallery: no outputs of cells, no paths, no names of machines; pictures and tables made small."
    import io

    import PIL.Image
    folder, to = Path(folder), Path(to)
    plain = lambda v: {k: plain(x) for k, x in v.items()} if isinstance(v, dict) else [plain(x) for x in v] if isinstance(v, list) else Path(v).name if isinstance(v, str) and v.startswith('/') else v
    kept = ('event', 'time', 'clock', 'attempt', 'state', 'name', 'text', 'reason', 'exit_code')
    shutil.rmtree(to, ignore_errors=True)
    for one in (folder, *(p.parent for p in sorted((folder/'steps').glob('*/journal.jsonl')))):
        new = to/one.relative_to(folder)
        new.mkdir(parents=True)
        events = [json.loads(line) for line in (one/'journal.jsonl').read_text(encoding='utf-8').splitlines()]
        lines = [json.dumps({k: e[k] for k in kept if k in e}, ensure_ascii=False) for e in events if e['event'] not in ('heartbeat', 'opened')]
        (new/'journal.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
        for name in ('params.json', 'metrics.json', 'provenance.json', 'model/config.json', 'model/preprocess.json', 'model/base/config.json'):
            if not (one/name).is_file(): continue
            (new/name).parent.mkdir(parents=True, exist_ok=True)
            found = plain(json.loads((one/name).read_text(encoding='utf-8')))
            (new/name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        if (one/'training'/'metrics.jsonl').is_file(): # its last line says how many steps there were
            (new/'training').mkdir()
            (new/'training'/'metrics.jsonl').write_text((one/'training'/'metrics.jsonl').read_text().splitlines()[-1] + '\n')
        for name in ('run.ipynb', 'source.ipynb'):
            if not (one/name).is_file(): continue
            nb = json.loads((one/name).read_text(encoding='utf-8'))
            cells = [dict(c, metadata={k: v for k, v in c['metadata'].items() if k == 'tags'}, **(dict(outputs=[], execution_count=None) if c['cell_type'] == 'code' else {}))
                     for c in nb['cells'] if not {'injected-parameters', 'papermill-error-cell-tag'} & set(c['metadata'].get('tags', []))]
            (new/name).write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5), ensure_ascii=False) + '\n', encoding='utf-8')
        if one != folder: continue
        for kind in ('tables', 'figures'):
            for p in sorted((one/kind).glob('*')):
                (new/kind).mkdir(exist_ok=True)
                if p.suffix == '.csv' and p.stat().st_size < 30_000: shutil.copyfile(p, new/kind/p.name)
                if p.suffix == '.png':
                    image, buffer = PIL.Image.open(p).convert('RGB'), io.BytesIO()
                    image.thumbnail((900, 900))
                    image.quantize(96).save(buffer, 'png', optimize=True)
                    (new/kind/p.name).write_bytes(buffer.getvalue())
    return to


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--out', default=ROOT/'_docs')
    ask.add_argument('--check', action='store_true', help='only the links')
    ask.add_argument('--runs', nargs='*', default=[], help='runs, or folders of runs, for the gallery')
    ask.add_argument('--keep', nargs='*', default=[], help=f'store a small copy of these runs in {REPORTS}/ for the gallery, and end')
    ask.add_argument('--only', nargs='*', help='regular expressions: only these sources')
    asked = ask.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    for r in asked.runs:
        if not Path(r).is_dir(): raise SystemExit(f'There is no folder {r} with runs.')
    for r in asked.keep: print(keep_run(r, ROOT/REPORTS/Path(r).name.split('-')[0]))
    if asked.keep: return
    began = time.perf_counter()
    site = Site(out=asked.out, only=asked.only, quick=asked.check)
    took = site.build(asked.runs)
    print(f'{len(site.pages)} pages, {len(site.links)} links, {time.perf_counter() - began:.0f} s (' + ', '.join(f'{k} {v:.0f}' for k, v in took.items()) + ')'
          + (f', {site.odd} formulas left as TeX' if site.odd else ''))
    for source, url, why in site.broken: print(f'broken link in {source}: {url}: {why}', file=sys.stderr)
    if site.broken: raise SystemExit(1)
    if not asked.check: print(f'open {site.out/"index.html"}')


if __name__ == '__main__': main()
