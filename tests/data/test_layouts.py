"""Every reader of a release is reached from the shell by one word; chest folders need no column for the side; the miniature runs."""
import importlib
import inspect
import pkgutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from releases import usable
from releases_cxr import chest, write_chexpert, write_nih_cxr, write_object_cxr, write_openi, write_rsna_pneumonia, write_siim
from typer.testing import CliRunner

from medvl.core.errors import DataError
from medvl.data import releases
from medvl.data.prepare.run import prepare
from medvl.data.prepared import open_prepared
from medvl.data.releases.folder import read_folder
from medvl.data.releases.layouts import LAYOUTS, read_layout, usual_profile
from medvl.data.releases.retrieval_sets import RetrievalSet
from medvl.data.schema import Source
from medvl.run.catalogue import release_table
from medvl.run.cli import app
from medvl.run.parameters import RefusedError, check_parameters
from medvl.run.runner import experiments, run_experiment

REPO = Path(__file__).resolve().parents[2]


def readers():
    "Every function of the readers' folder that gives records of images."
    for m in pkgutil.iter_modules(releases.__path__):
        for name, f in inspect.getmembers(importlib.import_module(f'medvl.data.releases.{m.name}'), inspect.isfunction):
            if name.startswith('read_') and f.__module__.endswith(m.name) and inspect.signature(f).return_annotation in (Source, RetrievalSet, 'Source', 'RetrievalSet'):
                yield f'{m.name}.{name}'


def test_every_reader_of_images_has_a_layout():
    found = set(readers())
    assert len(found) > 25 and found - {'layouts.read_layout'} == {l.reader for l in LAYOUTS.values()}
    assert set(release_table().layout) - {''} <= set(LAYOUTS)
    without = release_table().query("layout == ''").release.tolist() # questions, mistaken reports and phrases: no images of their own to prepare
    assert without == ['CorBenchX', 'MS-CXR', 'ReXErr-v1', 'SLAKE 1.0', 'VQA-RAD']


@pytest.mark.parametrize('layout', LAYOUTS)
def test_an_absent_place_is_a_clear_error(layout, tmp_path):
    needs = {n: 'x' for n in LAYOUTS[layout].needs}
    with pytest.raises(DataError, match='no such file or folder'): read_layout(layout, tmp_path/'nowhere', tmp_path/'drawn', needs)


def test_chest_releases_by_name(tmp_path):
    pixels = [chest(shift=i) for i in range(4)]
    box = [(10, 12, 50, 60)]
    made = {
        'rsna_pneumonia': write_rsna_pneumonia(tmp_path/'a', [dict(id=f'p{i}', pixels=p, boxes=box if i % 2 else []) for i, p in enumerate(pixels)]),
        'siim': write_siim(tmp_path/'b', [dict(id=f'p{i}', pixels=p) for i, p in enumerate(pixels)]),
        'object_cxr': write_object_cxr(tmp_path/'c', [dict(id=f'p{i}', pixels=p, shapes=[('box', [[5, 5], [40, 40]])]) for i, p in enumerate(pixels)]),
        'nih_cxr': write_nih_cxr(tmp_path/'d', [dict(id=f'0000000{i + 1}_000', pixels=cv2.resize(p, (1024, 1024)), boxes=[('Mass', 100, 100, 300, 300)], labels=('Mass',)) for i, p in enumerate(pixels)]),
        'openi': write_openi(tmp_path/'e', [dict(uid=i + 1, findings='The lungs are clear.', impression='Normal.', images=[(f'CXR{i + 1}_IM-1', 'Frontal', p)]) for i, p in enumerate(pixels)], tables=True),
        'chexpert': write_chexpert(tmp_path/'f', [dict(part='train', patient=i + 1, pixels=p, labels={'Edema': 1}) for i, p in enumerate(pixels)])}
    for layout, root in made.items():
        source, base = read_layout(layout, root, tmp_path/'drawn'/layout)
        usable(source, base)
        assert usual_profile(source) == 'letterbox_v1' and len(source.records) >= 3, layout
        if LAYOUTS[layout].draws and layout != 'siim': assert base == tmp_path/'drawn'/layout and (source.records.mask_path != '').any(), layout
    source, _ = read_layout('openi', made['openi'], options={'views': ['FRONTAL'], 'min_tokens': 1})
    assert len(source.records) == 4


def test_the_shell_prepares_a_release_with_its_masks(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_SALT', str(tmp_path/'salt.txt'))
    root = write_rsna_pneumonia(tmp_path/'release', [dict(id=f'p{i:02d}', pixels=chest(shift=i), boxes=[(10, 12, 50, 60)] if i % 2 else []) for i in range(12)])
    run = run_experiment('prepare', dict(data=str(root), layout='rsna_pneumonia', out=str(tmp_path/'prepared'), height=64, width=64, jobs=1), outputs=tmp_path/'out')
    data = open_prepared(tmp_path/'prepared')
    assert run.state == 'done' and len(data) == 12 and data.info['profile'] == 'letterbox_v1' and (data.manifest.mask_row >= 0).sum() >= 6 and (data.manifest.laterality == '').all()


def test_a_mistyped_layout_is_refused_before_anything_runs():
    with pytest.raises(RefusedError, match='vindr'): check_parameters(experiments()['prepare'], dict(layout='vinder'))


def test_datasets_names_the_layouts():
    out = CliRunner().invoke(app, ['datasets'])
    assert out.exit_code == 0 and 'rsna_pneumonia' in out.output and 'layout' in out.output.splitlines()[0]


def test_chest_folder_without_sides(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4): cv2.imwrite(str(tmp_path/f'{i}.png'), rng.integers(20, 200, (60, 50)).astype(np.uint8))
    table = pd.DataFrame({'image_path': [f'{i}.png' for i in range(4)], 'patient_id': ['1', '1', '2', '3'], 'view': ['PA', 'LATERAL', 'ap', 'FRONTAL'], 'report_text': 'No effusion.'})
    table.to_csv(tmp_path/'index.csv', index=False)
    salt = tmp_path/'salt.txt'
    salt.write_text('a salt for tests\n')
    data = prepare(read_folder(tmp_path), tmp_path, tmp_path/'out', profile='letterbox_v1', size=(48, 48), jobs=1, salt=salt)
    assert len(data) == 4 and set(data.manifest.laterality) == {''}
    also = prepare(table, tmp_path, tmp_path/'out2', profile='letterbox_v1', size=(48, 48), jobs=1, salt=salt) # records by hand, too
    assert (also.images[0] == data.images[0]).all()
    for change, word in ((dict(view=['PA', 'CC', 'AP', 'PA']), "'laterality' is missing"), (dict(lateralty=''), 'did you mean')): # a breast needs its side
        table.assign(**change).to_csv(tmp_path/'index.csv', index=False)
        with pytest.raises(DataError, match=word): read_folder(tmp_path)


# ---------------------------------------------------------------- a folder that grows

def grown(tmp_path, n, change=()):
    "A folder of n films, of which those in `change` hold other pixels."
    folder = tmp_path/f'films{n}{"c" if change else ""}'
    folder.mkdir()
    for i in range(n): cv2.imwrite(str(folder/f'{i}.png'), chest(shift=i + (50 if i in change else 0)))
    pd.DataFrame({'image_path': [f'{i}.png' for i in range(n)], 'patient_id': [str(i) for i in range(n)], 'view': 'PA', 'report_text': 'Clear.'}).to_csv(folder/'index.csv', index=False)
    return folder


def test_what_is_the_same_is_copied(tmp_path, monkeypatch, capsys):
    import medvl.data.prepare.run as module
    salt = tmp_path/'salt.txt'
    salt.write_text('a salt for tests\n')
    asked, compute = [], module.run_jobs
    monkeypatch.setattr(module, 'run_jobs', lambda jobs, *a: (asked.append([j.number for j in jobs]), compute(jobs, *a))[1])
    ready = lambda folder, out, reuse=None, size=(48, 48): prepare(read_folder(folder), folder, tmp_path/out, profile='letterbox_v1', size=size, jobs=1, salt=salt, reuse=reuse)
    small, large = grown(tmp_path, 5), grown(tmp_path, 8, change=(2,))
    old = ready(small, 'old')
    asked.clear()
    new = ready(large, 'new', reuse=tmp_path/'old')
    assert asked == [[2, 5, 6, 7]] and '4 of 8 images are taken over' in capsys.readouterr().out # file 2 holds other pixels
    assert new.digest == ready(large, 'whole').digest and new.verify() == 8
    asked.clear()
    ready(large, 'sized', tmp_path/'old', (40, 40))
    assert asked == [list(range(8))] # other rules: nothing is taken over
    with pytest.raises(DataError, match='from itself'): ready(large, 'new', reuse=tmp_path/'new')
    with pytest.raises(DataError, match='no prepared folder'): ready(large, 'other', reuse=small)
    lines = (tmp_path/'old'/'journal.jsonl').read_text().replace('"rules"', '"before"')
    (tmp_path/'old'/'journal.jsonl').write_text(lines)
    with pytest.raises(DataError, match='did not note how'): ready(large, 'other2', reuse=tmp_path/'old')
    assert old.verify() == 5


def test_a_torn_store_is_not_taken_over(tmp_path):
    salt = tmp_path/'salt.txt'
    salt.write_text('a salt for tests\n')
    small = grown(tmp_path, 4)
    ready = lambda out, reuse=None: prepare(read_folder(small), small, tmp_path/out, profile='letterbox_v1', size=(48, 48), jobs=1, salt=salt, reuse=reuse)
    ready('old')
    path = tmp_path/'old'/'journal.jsonl'
    import json
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]['pixel_sha256'] = '0'*64
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    with pytest.raises(DataError, match='do not belong to the journal'): ready('new', tmp_path/'old')


# ---------------------------------------------------------------- the miniature

def test_the_miniature_runs(tmp_path, monkeypatch):
    "The command of data_csv/README.md."
    monkeypatch.setenv('MEDVL_SALT', str(tmp_path/'salt.txt'))
    command = 'medvl run prepare -p data=data_csv -p out=prepared -p height=112 -p width=72'
    assert command in (REPO/'data_csv'/'README.md').read_text()
    monkeypatch.chdir(REPO)
    told = [a.replace('out=prepared', f'out={tmp_path}/prepared') for a in command.split()[1:]]
    done = CliRunner().invoke(app, [*told, '--outputs', str(tmp_path/'out')])
    assert done.exit_code == 0, done.output
    data = open_prepared(tmp_path/'prepared')
    assert len(data) == 84 and data.manifest.patient_id.nunique() == 20 and data.manifest.exam_id.nunique() == 21 and set(data.manifest.split) == {'train', 'valid', 'test'}
    assert sum(p.stat().st_size for p in (REPO/'data_csv').rglob('*') if p.is_file()) < 1_000_000


def test_options_of_a_reader_are_checked_before_anything_runs():
    e = experiments()['prepare']
    with pytest.raises(RefusedError, match='views'): check_parameters(e, dict(layout='openi', layout_options='{"view": ["LATERAL"]}'))
    assert check_parameters(e, dict(data='.', layout='openi', layout_options='{"views": ["LATERAL"]}'))['layout_options'] == {'views': ['LATERAL']}
