"""The promise of the house: a new system is ONE module. Another package brings SigLIP; nothing of ours is touched, and it is listed, built, saved, pre-trained, asked, located and explained."""
import importlib
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from medvl.core.paths import read_json
from medvl.methods import base
from medvl.methods.recipes import method_names, new_method, recipes
from medvl.run.runner import run_experiment

MODULE = '''
"""Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023: every pair of the batch is a yes-or-no question."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medvl.methods.base import register
from medvl.methods.parts.chest_recipes import ADAM, TEXT_WIDTHS, chest_recipes
from medvl.methods.parts.image_text import ImageTextConfig, ImageTextMethod


@dataclass
class SigLIPConfig(ImageTextConfig):
    "Configuration of SigLIP."
    image_pool: str = 'mean'  # so that a cell's vector is part of the image's
    bias: float = -10.0  # of every pair at the start, because most pairs are wrong


@register
class SigLIP(ImageTextMethod):
    "SigLIP on chest X-rays."
    name, config_class, chunkable, least_batch = 'siglip', SigLIPConfig, True, 1

    def __init__(self, config=None, tokenizer=None, image_encoder=None, text_encoder=None):
        super().__init__(config, tokenizer, image_encoder, text_encoder)
        self.log_scale, self.bias = torch.nn.Parameter(torch.tensor(10.).log()), torch.nn.Parameter(torch.tensor(self.config.bias))

    def project_image(self, features): return self.image_projection(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def losses(self, features, batch, state):
        logits = self.log_scale.exp() * features['image'] @ features['text'].mT + self.bias
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return {'loss': -F.logsigmoid(signs * logits).sum(1).mean()}


RECIPES = chest_recipes({}, TEXT_WIDTHS, samples='chest_reports', sample_options=dict(slot='sentence'),
                        train=dict(ADAM, batch_size=32, lr=1e-4, weight_decay=1e-6))
'''


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "Another package as pip would have installed it: a module, and metadata that announce it."
    site = tmp_path_factory.mktemp('site')
    (site/'other_lab').mkdir()
    (site/'other_lab'/'__init__.py').write_text('')
    (site/'other_lab'/'sigmoid.py').write_text(MODULE)
    info = site/'other_lab-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: other-lab\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[medvl.methods]\nsiglip = other_lab.sigmoid\n')
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(site)
    patch.setenv('PYTHONPATH', str(site), prepend=':') # of the kernels
    importlib.invalidate_caches()
    yield site
    patch.undo()
    base._methods.pop('siglip', None)
    for name in [n for n in sys.modules if n.startswith('other_lab')]: del sys.modules[name]


@pytest.fixture(scope='module')
def run(package, tmp_path_factory):
    return run_experiment('pretrain', dict(method='siglip', config='smoke', images=20, epochs=1), outputs=tmp_path_factory.mktemp('runs'), report=False)


def test_it_is_found_by_its_name(package):
    assert 'siglip' in method_names() and set(recipes('siglip')) == {'paper', 'reference', 'small', 'smoke'}
    code = "from medvl.methods.base import method_class; print(method_class('siglip').__module__)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'other_lab.sigmoid'


def test_a_broken_package_does_not_take_the_others_with_it(package):
    (package/'other_lab'/'broken.py').write_text('import no_such_module')
    entries = package/'other_lab-1.0.dist-info'/'entry_points.txt'
    before = entries.read_text()
    entries.write_text(before + 'broken = other_lab.broken\nbyol = other_lab.broken\n')
    try:
        with pytest.warns(UserWarning, match='broken of other_lab.broken cannot be imported'): assert {'siglip', 'byol'} <= set(method_names())
    finally: entries.write_text(before)


def test_built_saved_and_loaded(package, tmp_path):
    method = new_method('siglip', 'smoke', ['Small effusion.', 'No effusion.'], seed=3, bias=-5.)
    assert method.config.bias == -5. and 'bias' in {f.name for f in fields(method.config_class)}
    base.save_pretrained(method, tmp_path/'m')
    again = base.from_pretrained(tmp_path/'m')
    assert type(again).__name__ == 'SigLIP' and all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), again.state_dict().values()))


def test_pretrained_asked_and_explained(run):
    import medvl
    assert run.metrics['best_valid_loss']['value'] > 0 and read_json(run.folder/'model'/'config.json')['method'] == 'siglip'
    model = medvl.load(run.folder)
    image = np.random.default_rng(0).integers(0, 256, (80, 70), dtype=np.uint8)
    shares = model.zero_shot([image, image.T.copy()], ['no effusion', 'a large effusion'])
    assert shares.shape == (2, 2) and np.allclose(shares.sum(1), 1)
    told = model.explain(image, 'a large effusion')
    assert told.heat.shape == model.size and 'similarity map' in told.by and told.card['trained_on']


def test_located(run, tmp_path):
    import medvl
    from medvl.data.phantom.breast_prepared import public_salt
    from medvl.data.phantom.chest_exports import export_chest_phantom
    from medvl.data.releases.localized import prepare_task, read_task_dataset
    from medvl.evaluate.localized.run import run_localized
    from medvl.evaluate.localized.unit import LocalizedConfig
    made = export_chest_phantom('covid_rural', tmp_path/'covid_rural', 12, (64, 64), 0, 'easy')
    covid = read_task_dataset('covid_rural', made.root, tmp_path/'derived', split='patients', tables=made.tables)
    covid = prepare_task(covid, tmp_path/'prepared', (64, 64), jobs=1, salt=public_salt(tmp_path))
    options = LocalizedConfig(runs=2, max_epochs=1, max_lrs=1, max_batch=4, min_images=4, width=.05, eval_batch=8, n_boot=50)
    found = run_localized(medvl.load(run.folder).method, ['covid_linear'], {'covid_rural': covid}, tmp_path/'localized', options, 'siglip', True)
    assert list(found.done.task) == ['covid_linear'] and np.isfinite(found.done.value).all()
