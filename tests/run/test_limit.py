"""`-p limit=100` tries any experiment on the first patients, and says so."""
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medvl.core.paths import read_jsonl
from medvl.data.phantom.kinds import prepared_phantom
from medvl.data.prepared import first_patients, open_prepared
from medvl.run.cli import app
from medvl.run.parameters import RefusedError, check_parameters
from medvl.run.runner import experiments, run_experiment


def test_the_first_patients_keep_the_split(tmp_path):
    data = prepared_phantom(tmp_path, 20, (48, 32))
    few = first_patients(data, 10)
    assert few.manifest.patient_id.nunique() == pytest.approx(10, abs=1) and set(few.manifest.split) == {'train', 'valid', 'test'}
    assert (few.manifest.drop_duplicates('patient_id').split.value_counts() <= data.manifest.drop_duplicates('patient_id').split.value_counts()).all()
    assert few.digest != data.digest and first_patients(data, 99) is data and first_patients(data, 1).manifest.patient_id.nunique() == 3 # one a part


def test_every_experiment_takes_a_limit():
    for name, path in experiments().items(): assert (found := check_parameters(path, dict(limit='5'))['limit']) == 5 and isinstance(found, int), name
    with pytest.raises(RefusedError, match='at least 0'): check_parameters(experiments()['zero_shot'], dict(limit=-1))
    assert 'limit' not in check_parameters(experiments()['zero_shot'], {})


def test_a_run_on_the_first_patients(tmp_path, monkeypatch):
    data = prepared_phantom(tmp_path/'p', 24, (48, 32))
    run = run_experiment('pretrain', dict(data=str(data.folder), batch_size=2, limit=12), outputs=tmp_path/'out', report=False)
    assert run.params['limit'] == 12 and any('first 12 patients' in e.get('text', '') for e in read_jsonl(run.folder/'journal.jsonl'))
    said = (run.folder/'model'/'README.md').read_text()
    assert int(said.split(' patients')[0].split()[-1]) < 12 # of the training part
    assert len(open_prepared(data.folder)) == len(data) # here nothing is limited


def test_prepare_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDVL_SALT', str(tmp_path/'salt.txt'))
    repo = Path(__file__).resolve().parents[2]
    run_experiment('prepare', dict(data=str(repo/'data_csv'), out=str(tmp_path/'p'), height=48, width=32, jobs=1, limit=6), outputs=tmp_path/'out', report=False)
    assert open_prepared(tmp_path/'p').manifest.patient_id.nunique() == 6


def test_help_says_so():
    assert 'any experiment:' in CliRunner().invoke(app, ['run', 'zero_shot', '--help']).output
