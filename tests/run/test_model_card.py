"""A trained model carries its card: data, training, metrics, limits, intended use."""
import shutil
from pathlib import Path

import huggingface_hub
import pytest

import medvl
from medvl.api import load
from medvl.run.runner import run_experiment


@pytest.fixture(scope='module')
def run(tmp_path_factory): return run_experiment('pretrain', outputs=tmp_path_factory.mktemp('trained'), report=False)


def test_the_card_of_a_trained_and_of_an_untrained_model(run, tmp_path):
    text = (run.folder/'model'/'README.md').read_text()
    for words in ('# mammoclip', 'recipe: mammoclip, smoke', 'Trained on', 'no patient', '- steps: ', '- whole batch: ', '| valid_loss | ', 'Nothing was tested', '## Limits', '## What it is for', 'not for diagnosis', '## Load it', 'medvl 1.'):
        assert words in text, (words, text)
    assert load(run.folder).card['training']['run'] == run.folder.name and '/' not in text.split('## Training')[1].split('## Metrics')[0]
    model = load(run.folder)
    model.card = {}
    other = (model.save_pretrained(tmp_path/'bare')/'README.md').read_text()
    assert 'How it was trained is not recorded' in other and 'Nothing was measured' in other


@pytest.mark.parametrize('how', ['method of the model', 'function'])
def test_the_hub_gets_the_full_card(run, tmp_path, monkeypatch, how):
    "At the boundary of the hub's client: what is uploaded is what is saved, it says where it lies, and it loads from there."
    made = []
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', lambda self, repo, **k: made.append((repo, k['private'], k['repo_type'])))
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', lambda self, *, repo_id, folder_path, commit_message: shutil.copytree(folder_path, tmp_path/'hub') and f'hub:{repo_id}')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, **k: str(tmp_path/'hub'))
    model = load(run.folder)
    answer = model.push_to_hub('lab/mine') if how != 'function' else medvl.push_to_hub(model, 'lab/mine', private=False)
    assert answer == 'hub:lab/mine' and made == [('lab/mine', how != 'function', 'model')]
    card, saved = (tmp_path/'hub'/'README.md').read_text(), (run.folder/'model'/'README.md').read_text()
    assert card == saved.replace('medvl.load("this folder")', 'medvl.load("lab/mine")') and card != saved
    for words in ('## Data', 'Trained on', '## Metrics', '| valid_loss | ', '## Limits', '## What it is for', 'not for diagnosis', 'recipe: mammoclip, smoke'): assert words in card, words
    again = medvl.load('lab/mine') # by the call that the card names
    assert again.card == model.card and again.size == model.size and again.profile == model.profile
    assert {p.name for p in (tmp_path/'hub').iterdir()} == {p.name for p in (run.folder/'model').iterdir()}


def test_a_bare_method_says_that_it_is_one(run, monkeypatch):
    sent = {}
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', lambda self, repo, **k: None)
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', lambda self, *, repo_id, folder_path, commit_message: sent.update(card=(Path(folder_path)/'README.md').read_text()))
    medvl.push_to_hub(load(run.folder).method, 'lab/bare')
    assert 'weights alone' in sent['card'] and 'not recorded here' in sent['card'] and 'from_pretrained("lab/bare")' in sent['card']
