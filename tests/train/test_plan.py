"The plan of a run against the run itself."
import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from medvl.data.augment.breast_versions import Augment, AugmentConfig
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.augment.makers import new_augment
from medvl.data.phantom.populations import new_phantom
from medvl.data.samples.builders import Parts, new_samples, sample_kind
from medvl.evaluate.stats.selection import splits_of
from medvl.methods.parts.image import WithVersions
from medvl.methods.recipes import method_names, new_method, recipe
from medvl.run.cli import app
from medvl.train.loop import train
from medvl.train.plan import kept_for_backward, plan
from medvl.train.settings import TrainConfig

CONFIG = TrainConfig(epochs=2, batch_size=6, lr=1e-3, warmup=0, trackers=(), cpu=True, keep_last=1)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    prepared, named = prepared_phantom(tmp_path_factory.mktemp('phantom'), 8, (64, 48)), recipe('mammoclip', 'smoke')
    method = new_method('mammoclip', 'smoke', prepared.manifest.report)
    data = BreastTextDataset(prepared, method.tokenizer, BreastTextConfig(**named.sample_options))
    return method, data, Augment(AugmentConfig(**named.augment_options))


def test_changes_nothing_and_draws_nothing(made, tmp_path):
    method, data, augment = made
    weights, state = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    plan(method, data, CONFIG, tmp_path/'run', data, augment)
    assert all(torch.equal(v, weights[k]) for k, v in method.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not (tmp_path/'run').exists()


def test_counts_are_those_of_the_run(made, tmp_path):
    method, data, augment = made
    planned = plan(method, data, CONFIG, tmp_path/'run', data, augment)
    result = train(copy.deepcopy(method), data, CONFIG, tmp_path/'run', valid=data, transform=augment)
    assert planned.value('steps') == result.step
    folder = max((tmp_path/'run'/'checkpoints').glob('*/'))
    written = sum(f.stat().st_size for f in folder.rglob('*.safetensors'))
    assert planned.value('checkpoint') * 2 ** 20 == pytest.approx(written, rel=0.05)
    everything = sum(f.stat().st_size for f in (tmp_path/'run').rglob('*') if f.is_file())
    assert planned.value('disk') * 2 ** 20 >= 0.9 * everything


def test_activations_of_a_large_batch_are_foretold(made):
    "The line through 2 and 4 samples meets what 12 samples keep; texts are of different lengths, so not to the byte."
    method, data, augment = made
    planned = plan(method, data, replace(CONFIG, batch_size=12), valid=data, transform=augment)
    batch = augment(data.collate([data[(0, i)] for i in range(12)]), 0, 0)
    method.train()
    assert planned.value('activations') * 2 ** 20 == pytest.approx(kept_for_backward(method, lambda: method(batch)), rel=0.15)
    method.eval()


def test_chunks_average_and_optimizer_are_counted(made):
    method, data, augment = made
    ask = lambda **changes: plan(method, data, replace(CONFIG, batch_size=12, **changes), transform=augment)
    plain, chunked, averaged, sgd = ask(), ask(chunk_size=2), ask(ema=0.9), ask(optimizer='sgd')
    assert chunked.value('activations') < plain.value('activations') / 3
    assert averaged.value('checkpoint') > plain.value('checkpoint') > sgd.value('checkpoint')


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp('phantoms')
    return {k: splits_of(new_phantom(k, folder/k, n, size, 0, 'easy'), needed=('train', 'valid')) for k, n, size in (('breast', 12, (96, 64)), ('chest', 24, (64, 64)), ('heart', 12, (64, 64)))}


@pytest.mark.parametrize('name', [m for m in method_names() if recipe(m, 'smoke').train is not None])
def test_every_method_can_be_planned(phantoms, name, tmp_path):
    "With the samples, versions and rates of its recipe: the way of the experiment `pretrain`, in small."
    named = recipe(name, 'smoke')
    parts = Parts(phantoms[named.phantom], labels=tuple(phantoms[named.phantom]['train'].labels)[:2])
    method = new_method(name, 'smoke', sample_kind(named.samples).texts(parts, named.sample_options), **({'labels': parts.labels} if name == 'supervised' else {}))
    parts.labels = parts.labels if name == 'supervised' else ()
    training, valid = (new_samples(named.samples, parts, p, getattr(method, 'tokenizer', None), named.sample_options, p == 'train') for p in ('train', 'valid'))
    transform = new_augment(named.augment, named.augment_options, named.versions)
    planned = plan(method, training, TrainConfig(**{**named.train, 'batch_size': 4, 'max_steps': 3, 'cpu': True}), tmp_path/'run',
                   WithVersions(valid, transform) if named.versions > 1 else valid, transform)
    assert planned.value('activations') > 0 and planned.value('steps') == 3 and not (tmp_path/'run').exists()


def test_too_large_a_run_is_told(made, monkeypatch):
    method, data, augment = made
    monkeypatch.setattr('medvl.train.plan._free', lambda device: 2 ** 20)
    short = plan(method, data, CONFIG, transform=augment).short
    assert len(short) == 1 and 'lower chunk_size or batch_size' in short[0]


def test_command(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, '-c', 'from medvl.run.cli import main; main()', 'run', *args, '--outputs', str(tmp_path)], capture_output=True, text=True)
    done = run('pretrain', '--plan')
    assert done.returncode == 0, done.stderr
    assert 'memory, together' in done.stdout and 'time of a step' in done.stdout and not list(tmp_path.rglob('*.safetensors'))
    refused = CliRunner().invoke(app, ['run', 'zero_shot', '--plan', '--outputs', str(tmp_path)])
    assert refused.exit_code == 2 and "'plan'" in refused.output
    assert CliRunner().invoke(app, ['run', '--plan', '--resume', 'pretrain', '--outputs', str(tmp_path)]).exit_code == 2
