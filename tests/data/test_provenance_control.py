"Borders, padding, file and origin: at chance where nothing is wrong, fires where copies are mixed."
import warnings

import numpy as np
import pandas as pd
import pytest
from golden import sample

from medvl.core.errors import DataError
from medvl.data.phantom.disk import png_bytes
from medvl.data.provenance_control import LINE_CLUES, PADDING_CLUES, assert_provenance, border_clues, clue_table, file_clues, provenance_control, provenance_facts, provenance_line
from medvl.data.releases.folder import read_folder
from medvl.data.schema import Report, Source, empty

CLUES = [*PADDING_CLUES, *LINE_CLUES]


def noise(n, seed, per=2):
    "Clues and a label that know nothing of each other."
    r = np.random.default_rng(seed)
    who = np.repeat(np.arange(n//per), per)
    y = np.repeat(r.random(n//per) < .4, per).astype(float)
    return pd.DataFrame({'patient_id': [f'p{w}' for w in who], 'label_ill': y, 'height': r.integers(90, 110, n), **{c: r.random(n) for c in CLUES}})


def test_padding_is_measured_to_the_pixel():
    film = np.pad(np.full((50, 30), 99, np.uint8), ((3, 7), (0, 20)))
    clues = dict(zip(CLUES, border_clues(film)))
    assert [clues[f'padding {s}'] for s in ('top', 'bottom', 'wall', 'air')] == pytest.approx([3/60, 7/60, 0, 20/50])
    mirrored = dict(zip(CLUES, border_clues(film[:, ::-1], right=True)))
    assert clues == mirrored
    assert border_clues(np.zeros((4, 4), np.uint8))[:4].tolist() == [1.0]*4
    assert border_clues(film.astype(np.uint16)*257) == pytest.approx(border_clues(film))


def test_a_label_by_lot_rarely_fires():
    fired = [provenance_control(noise(120, s), groups=('file', 'padding', 'lines', 'all'), n_boot=150, seed=s).fires.any() for s in range(6)]
    assert sum(fired) <= 1


@pytest.mark.parametrize('clue', ['padding air', 'height', 'source'])
def test_each_kind_of_clue_is_caught(clue):
    table = noise(160, 3)
    if clue == 'source': table['source'] = np.where(table.label_ill == 1, 'a', 'b')
    else: table[clue] = table.label_ill + .1*table[clue]/table[clue].max()
    with pytest.raises(DataError, match='FIRES for ill'): assert_provenance(table, n_boot=150)
    found = provenance_control(table, n_boot=150).set_index('clues')
    name = {'padding air': 'padding', 'height': 'file', 'source': 'origin'}[clue]
    assert found.fires[name] and found.low[name] > .8 and found.fires['all']
    assert not found.fires.drop([name, 'all']).any()


def test_files_are_measured_too(tmp_path):
    r = np.random.default_rng(0)
    rows = []
    for k in range(24):
        ill, film = k % 2, r.integers(20, 250, (40, 30)).astype(np.uint8)
        if ill: film = np.pad(film, ((0, 0), (5, 5)))
        (tmp_path/f'{k}.png').write_bytes(png_bytes(film))
        rows.append(dict(image_path=f'{k}.png', patient_id=f'p{k}', laterality='L', source='x', label_ill=float(ill)))
    (tmp_path/'bad.png').write_bytes(b'no')
    records = pd.DataFrame([*rows, dict(rows[0], image_path='bad.png')])
    source = Source(records, empty('boxes'), empty('sentences'), Report('made'))
    with pytest.warns(UserWarning, match='1 files cannot be read'): table = clue_table(source, tmp_path)
    assert len(table) == 24 and len(file_clues(tmp_path/'0.png')) == 9 + len(CLUES)
    with pytest.raises(ValueError, match='give root'): clue_table(source)
    assert provenance_control(table, groups=('file', 'padding'), n_boot=100).fires.all()
    assert 'FIRES for ill' in provenance_line(provenance_control(table, n_boot=100))


def test_one_source_asks_nothing_of_preparation():
    assert provenance_facts(None, pd.DataFrame({'source': ['a', 'a'], 'label_x': [0, 1]})) == []
    assert provenance_facts(None, pd.DataFrame({'source': ['a', 'b']})) == []


def test_it_fires_on_the_mixture_of_real_copies():
    "All of one folder's images are malignant and padded, those of the other squashed: the origin is the label."
    tables = []
    for folder, keep in (('mammo', 'CDD-CESM'), ('cdd_cesm', 'CDD-CESM')):
        root = sample(f'{folder}/index.csv').parent
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            source = read_folder(root)
        r = source.records[source.records.source == keep].iloc[::5].reset_index(drop=True)
        tables.append(clue_table(source._replace(records=r), root).assign(source=folder))
    found = provenance_control(pd.concat(tables, ignore_index=True), ['malignant'], n_boot=100).set_index('clues')
    assert found.fires[['origin', 'file', 'padding', 'all']].all() and (found.low[['file', 'padding']] > .7).all()
