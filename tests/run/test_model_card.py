"""A trained model carries its card: data, training, metrics, limits, intended use."""
from medvl.api import load
from medvl.run.runner import run_experiment


def test_the_card_of_a_trained_and_of_an_untrained_model(tmp_path):
    run = run_experiment('pretrain', outputs=tmp_path, report=False)
    text = (run.folder/'model'/'README.md').read_text()
    for words in ('# mammoclip', 'recipe: mammoclip, smoke', 'Trained on', 'no patient', '- steps: ', '- whole batch: ', '| valid_loss | ', 'Nothing was tested', '## Limits', '## What it is for', 'not for diagnosis', '## Load it', 'medvl 1.'):
        assert words in text, (words, text)
    assert load(run.folder).card['training']['run'] == run.folder.name and '/' not in text.split('## Training')[1].split('## Metrics')[0]
    model = load(run.folder)
    model.card = {}
    other = (model.save_pretrained(tmp_path/'bare')/'README.md').read_text()
    assert 'How it was trained is not recorded' in other and 'Nothing was measured' in other
