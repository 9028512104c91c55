"""Age, sex, both autoencoders and the masked one on the pretend accelerator: bf16, one wait a step, the CPU's numbers."""
import pytest
import torch
from contract import from_recipe
from pretend_accelerator import DEVICE, WAITS, Accelerator, train_on_device

from medvl.train import loop as loop_module
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

METHODS = ('proxy', 'reconstruction', 'dual_autoencoder', 'mae')
SETTINGS = dict(epochs=100, max_steps=3, batch_size=4, lr=1e-3, warmup=0, clip=1.0, trackers=(), save_every=100, log_every=1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('device')


@pytest.mark.parametrize('name', METHODS)
def test_it_trains_there_and_waits_once_a_step(name, folder, tmp_path, monkeypatch):
    found, plain = [], loop_module.one_step
    def counted(loop, batches):
        before = len(WAITS)
        out = plain(loop, batches)
        found.append([place for _, place in WAITS[before:]])
        return out
    monkeypatch.setattr(loop_module, 'one_step', counted)
    train_on_device(monkeypatch)
    method, data, transform = from_recipe(folder, name, 'smoke')
    with Accelerator():
        result = train(method, data, TrainConfig(**SETTINGS, precision='bf16'), tmp_path/'run', transform=transform)
        assert method.device.type == DEVICE.type and result.step == 3
    assert [place.split(':')[0] for place in found[-1]] == ['medvl/train/step.py'], found[-1]


@pytest.mark.parametrize('name', METHODS)
def test_numbers_are_those_of_the_cpu(name, folder, tmp_path, monkeypatch):
    losses = []
    for there in (False, True):
        method, data, transform = from_recipe(folder, name, 'smoke')
        settings = TrainConfig(**{**SETTINGS, 'max_steps': 2})
        if there:
            train_on_device(monkeypatch)
            with Accelerator(): losses.append(train(method, data, settings, tmp_path/'there', transform=transform).history.loss.tolist())
        else: losses.append(train(method, data, settings, tmp_path/'here', transform=transform).history.loss.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and torch.isfinite(torch.tensor(losses)).all()
