"""No score of ours stands beside a published one unless it was made on the paper's own data."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medvl.core.paths import read_json
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.prepared import write_table
from medvl.evaluate.protocols.xvl_published import XVL_REMARKS
from medvl.methods.published import ABSENT, beside_paper, is_of, published, verdict
from medvl.run.runner import RunFailedError, run_experiment

REPO = Path(__file__).resolve().parents[2]
FOUND = pd.DataFrame({'task': ['mass'], 'metric': ['auroc'], 'value': [.6], 'low': [.5], 'high': [.7]})


@pytest.mark.parametrize('sources, there', [(['vindr'], True), (['VinDr', 'vindr'], True), (['phantom'], False), (['vindr', 'phantom'], False), ([], False),
                                            (['vindrish'], False), (['CDD-CESM'], False), ([np.nan], False)])
def test_only_the_papers_own_images(sources, there):
    table = beside_paper('zero-shot', sources, FOUND)
    assert table.ours.notna().any() == there == is_of(sources, 'VinDr')
    assert (table[table.data == 'RSNA'].verdict == ABSENT).all()
    if not there: assert (table.verdict == ABSENT).all() and table[['ours', 'low', 'high']].isna().all().all()


def test_sites_of_rsna_are_rsna(): assert is_of(['rsna_site1', 'rsna_site2'], 'RSNA') and not is_of(['rsna_site1', 'vindr'], 'RSNA')


@pytest.mark.parametrize('value, low, high, says', [(.60, .59, .61, 'agrees'), (.70, .50, .80, 'agrees'), (.70, .65, .80, 'differs by +0.12'), (.40, None, None, 'differs by -0.18'),
                                                    (np.nan, None, None, 'no number')])
def test_verdicts(value, low, high, says): assert says in verdict(.58, value, low, high)


def test_every_line_of_the_papers_tables_has_an_experiment():
    "For every protocol in the published tables an experiment lays its numbers beside it."
    called = {}
    for path in (REPO/'nbs'/'experiments').glob('*.ipynb'):
        code = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')
        if 'beside_paper(' in code: called[path.stem] = code
    who = {'zero-shot': 'e20_zero_shot', 'linear probe': 'e30_linear_probe', 'fine-tuned': 'e35_finetune', 'detection': 'e45_detection', 'Mammo-FActOR': 'e40_mammo_factor'}
    for protocol in published().protocol.unique():
        name, = [e for p, e in who.items() if protocol.startswith(p)]
        assert name in called and next(p for p in who if protocol.startswith(p)).split()[0] in called[name], protocol


@pytest.fixture(scope='module')
def phantom(tmp_path_factory):
    return prepared_phantom(tmp_path_factory.mktemp('phantom'), 24, (96, 64)).folder


@pytest.fixture(scope='module')
def relabelled(tmp_path_factory):
    "A phantom that calls itself VinDr: the way to run the cells that need VinDr-Mammo."
    prepared = prepared_phantom(tmp_path_factory.mktemp('vindr'), 24, (96, 64), seed=1)
    write_table(prepared.manifest.assign(source='vindr'), 'manifest', prepared.folder)
    return prepared.folder


def test_a_phantom_stands_beside_nothing(phantom, tmp_path):
    run = run_experiment('zero_shot', dict(data=phantom, n_boot=20), outputs=tmp_path)
    table = pd.read_csv(run.folder/'tables'/'published.csv')
    assert len(table) == 4 and table.ours.isna().all() and (table.verdict == ABSENT).all()
    model = run_experiment('pretrain', dict(data=phantom, init=True), outputs=tmp_path)
    with pytest.raises(RunFailedError, match='not VinDr'): run_experiment('paper_tables', dict(vindr=phantom, model=model.folder, n_boot=20), outputs=tmp_path)


def test_the_papers_data_stand_beside_and_are_collected(relabelled, tmp_path):
    run = run_experiment('zero_shot', dict(data=relabelled, n_boot=20), outputs=tmp_path)
    table = pd.read_csv(run.folder/'tables'/'published.csv').set_index(['data', 'task'])
    assert table.ours['VinDr', 'mass'] == pytest.approx(read_json(run.folder/'metrics.json')['mass_auroc']['value'])
    assert 'other pre-training data' in table.verdict['VinDr', 'mass'] and table.verdict['RSNA', 'cancer'] == ABSENT
    all_rows = run_experiment('paper_tables', dict(runs=[str(run.folder)], n_boot=20), outputs=tmp_path)
    collected = pd.read_csv(all_rows.folder/'tables'/'paper.csv')
    rows = collected[collected.ours.notna()]
    assert set(rows.protocol) == {'zero-shot'} and set(rows.data) == {'VinDr'} and table.ours['VinDr', 'mass'] in rows.ours.tolist()
    xvl = pd.read_csv(all_rows.folder/'tables'/'paper_xvl.csv').set_index(['task', 'metric']) # X-VL's numbers, alone: no image was CheXpert's
    assert xvl.published['edema', 'auroc'] == .903 and xvl.ours.isna().all() and set(xvl.verdict) == {ABSENT}
    page = json.loads((all_rows.folder/'run.ipynb').read_text())
    said = ''.join(''.join(o.get('text', '')) for c in page['cells'] for o in c.get('outputs', []))
    assert all(text in said for text in XVL_REMARKS.values())


def test_five_papers_in_one_table(tmp_path):
    "LoVT's table of a run of `localized`, and that of X-VL, land in their rows; nothing else is filled; a table of a phantom is no table of a paper."
    from medvl.core.run import Run
    from medvl.evaluate.localized.published import beside_published
    from medvl.evaluate.protocols.paper_table import five_papers, measured_elsewhere, paper_table
    from medvl.evaluate.protocols.xvl_published import beside_xvl
    every = five_papers()
    assert every.system.nunique() == 5 and every.published.between(-1, 1).all() and (paper_table().verdict == ABSENT).all() and paper_table().ours.isna().all()
    assert not measured_elsewhere().images.str.contains('hantom').any()
    local, xvl = Run.create('localized', {}, tmp_path), Run.create('match_zero_shot', {}, tmp_path)
    local.table('published', beside_published(pd.DataFrame([dict(task='covid_linear', value=.43, low=.41, high=.45, phantom=False, n_train=133, n_test=44)])))
    xvl.table('published_xvl', beside_xvl(['chexpert'], pd.DataFrame([dict(task='edema', metric='auroc', value=.88, low=.8, high=.93)])))
    run = run_experiment('paper_tables', dict(runs=[str(local.folder), str(xvl.folder)]), tmp_path, report=False)
    found = pd.read_csv(run.folder/'tables'/'paper_all.csv')
    filled = found[found.ours.notna()].set_index('system')
    assert len(found) == len(every) and sorted(filled.index) == ['LoVT', 'Medical X-VL']
    assert filled.loc['LoVT', 'task'] == 'covid_linear' and filled.loc['LoVT', 'verdict'].startswith('agrees') and filled.loc['Medical X-VL', 'ours'] == .88
