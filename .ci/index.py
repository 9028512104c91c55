"""Write nbs/index.ipynb, the map of all notebooks: a line and a link each, read off their first cells."""
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]/'nbs'
PARTS = [('tutorials', 'Learn', 'Walkthroughs with exercises that check themselves, each a few minutes of computing.'),
         ('experiments', 'Run', 'Parameterised notebooks; `medvl run NAME`, `medvl run NAME --help`.'),
         ('data', 'Data sets', 'A card for each public release: where to get it, its licence, its quirks, how it is read.'),
         ('benchmarks', 'Measure', 'The plain way beside ours, in one run.')]
ROOMS = [(0, 10, 'core', 'seeds, runs, errors, provenance'), (10, 100, 'show', 'figures, exercises, widgets'),
         (100, 200, 'data', 'from a file to a batch; phantoms; releases'), (200, 250, 'models', 'networks and checkpoints'),
         (250, 300, 'losses', 'tensors in, a number out, each beside its formula'), (300, 400, 'methods', 'the systems, one notebook each, and what they share'),
         (400, 500, 'train', 'one loop for all methods'), (500, 600, 'evaluate', 'metrics, intervals, protocols'),
         (600, 700, 'attribute', 'explanations, and what scores them'), (700, 800, 'run', 'command line, sweeps, reports'), (800, 900, 'api', 'one image, one call')]


def title(path):
    "The heading of a notebook."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    found = re.match(r'\s*#\s+(.+)', ''.join(cells[0]['source'])) if cells else None
    return found[1].strip().replace('|', r'\|') if found else path.stem


def lines(paths): return '\n'.join(f'| [{p.stem}]({p.relative_to(NBS).as_posix()}) | {title(p)} |' for p in paths)


def table(name, about, paths): return f'## {name}\n\n{about}\n\n| | |\n| --- | --- |\n{lines(paths)}'


def texts():
    "The markdown cells of the map."
    own = sorted(p for p in NBS.glob('[0-9]*.ipynb'))
    yield '# medvl: the map\n\n> Every notebook of the laboratory in one list, in reading order\n\nThe notebooks are the source: the library `medvl` is written from them. Begin with a tutorial, run an experiment, or read a room from its top. [From the shell](guides/command_line.md), [your own data](guides/your_data.md), [on a GPU](guides/gpu_and_cluster.md), [what is checked](guides/what_is_checked.md), [all results](../RESULTS.md).'
    for folder, name, about in PARTS: yield table(name, about, sorted((NBS/folder).glob('[!_.]*.ipynb')))
    for low, high, name, about in ROOMS:
        yield table(f'Room `{name}`', f'{about[0].upper()}{about[1:]}.', [p for p in own if low <= int(p.name[:3]) < high])


def main():
    cells = [dict(cell_type='markdown', id=f'map{i:05d}', metadata={}, source=t.splitlines(keepends=True)) for i, t in enumerate(texts())]
    meta = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    (NBS/'index.ipynb').write_text(json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
