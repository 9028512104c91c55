"""What a GPU would refuse or wait for, without a GPU: every method and the whole loop on the pretend accelerator."""
import numpy as np
import pytest
import torch
from device_cases import PRETRAINED, TRAINED, case
from pretend_accelerator import DEVICE, WAITS, Accelerator, train_on_device
from training import Pairs, contents, settings, small

from medvl.core.errors import DataError
from medvl.train import loop as loop_module
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

MATCHING = {'retinanet': 24, 'yolo': 8} # boxes and anchors are matched by their number, which must be asked
ALL_AT_ONCE = dict(epochs=1000, max_steps=3, batch_size=4, lr=1e-3, warmup=0, clip=1.0, ema=.9, precision='bf16', trackers=(), save_every=100, log_every=100)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return str(tmp_path_factory.mktemp('device'))


@pytest.fixture
def steps(monkeypatch):
    "The waits of each step that is made."
    found, plain = [], loop_module.one_step
    def counted(loop, batches):
        before = len(WAITS)
        out = plain(loop, batches)
        found.append([f'{place} {what}' for what, place in WAITS[before:]])
        return out
    monkeypatch.setattr(loop_module, 'one_step', counted)
    return found


# ---- the device itself

def test_the_device_refuses_what_a_gpu_refuses():
    with Accelerator():
        x = torch.ones(3, device=DEVICE)
        for wrong, message in ((lambda: x + torch.ones(3), 'same device'), (x.numpy, 'convert pretend'), (lambda: np.asarray(x), 'convert pretend'),
                               (lambda: torch.rand(3, generator=torch.Generator(), device=DEVICE), 'generator')):
            with pytest.raises((RuntimeError, TypeError), match=message): wrong()
        assert float((x + torch.tensor(1.)).sum()) == 6 # a number of no dimension may lie on the CPU
    assert not torch.accelerator.device_count(), 'outside there is no such device'


def test_the_device_counts_what_a_gpu_waits_for():
    with Accelerator() as accelerator:
        x = torch.ones(4, device=DEVICE)
        for wait in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.cpu(), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.ones(2).to(DEVICE)):
            accelerator.forget()
            wait()
            assert sum(accelerator.waits.values()) == 1
            assert next(iter(accelerator.waits)).startswith('tests/device/on_device/device_training.py:')
        accelerator.forget()
        x[x > 2] = 0; x * 2; torch.where(x > 0, x, 0); torch.ones(2).to(DEVICE, non_blocking=True); x.sum()
        assert not accelerator.waits


def test_the_device_has_random_numbers_of_its_own():
    with Accelerator():
        torch.manual_seed(3)
        first = torch.rand(3, device=DEVICE).cpu()
        torch.rand(3) # the CPU's draws do not move the device's
        second = torch.rand(3, device=DEVICE).cpu()
        torch.manual_seed(3)
        torch.testing.assert_close(torch.rand(3, device=DEVICE).cpu(), first, rtol=0, atol=0)
        with torch.random.fork_rng(): torch.rand(9, device=DEVICE)
        torch.testing.assert_close(torch.rand(3, device=DEVICE).cpu(), second, rtol=0, atol=0)


def test_bf16_is_bf16_there():
    with Accelerator(), torch.autocast(DEVICE.type, torch.bfloat16):
        y = torch.nn.Linear(3, 2).to(DEVICE)(torch.ones(4, 3, device=DEVICE))
        assert y.dtype == torch.bfloat16 and y.softmax(-1).dtype == torch.float32


# ---- every method

@pytest.mark.parametrize('name', TRAINED)
def test_every_method_trains_and_waits_at_most_twice(name, folder, tmp_path, monkeypatch, steps):
    "bf16, clipping, averaged weights, checks for NaN: one read a step for the pretrained systems."
    train_on_device(monkeypatch)
    method, data, transform = case(name, folder)
    with Accelerator():
        result = train(method, data, TrainConfig(**ALL_AT_ONCE), tmp_path, transform=transform)
        assert method.device.type == DEVICE.type and result.step == 3
    assert all(len(waits) <= MATCHING.get(name, 2) for waits in steps[1:]), steps[-1] # the first fills tables
    if name in PRETRAINED: assert [place.split(':')[0] for place in steps[-1]] == ['medvl/train/step.py']


@pytest.mark.parametrize('name', PRETRAINED)
def test_numbers_are_those_of_the_cpu(name, folder, tmp_path, monkeypatch):
    "Without random layers the device's first loss is the CPU's: nothing is lost on the way."
    losses = []
    for there in (False, True):
        method, data, transform = case(name, folder)
        for m in method.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        config = TrainConfig(**{**ALL_AT_ONCE, 'max_steps': 1, 'precision': 'fp32', 'log_every': 1})
        if there:
            train_on_device(monkeypatch)
            with Accelerator(): result = train(method, data, config, tmp_path/'there', transform=transform)
        else: result = train(method, data, config, tmp_path/'here', transform=transform)
        losses.append(result.history.loss.iloc[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- the loop

LOOP = dict(precision='bf16', epochs=4)


def test_gradcache_accumulation_average_and_exact_resume(tmp_path, monkeypatch, steps):
    train_on_device(monkeypatch)
    class Dies(Exception): pass
    def dies(method, state):
        if state.step == 10: raise Dies
        return {}
    with Accelerator():
        on = lambda path, validate=None, seed=0: train(small(seed), Pairs(), settings(**LOOP), path, Pairs(24, seed=1), validate=validate)
        on(tmp_path/'whole')
        assert all(len(waits) == 1 for waits in steps), 'one read a step, with chunks, accumulation, clipping and averaged weights'
        with pytest.raises(Dies): on(tmp_path/'cut', dies)
        on(tmp_path/'cut', seed=99)
    assert contents(tmp_path/'cut') == contents(tmp_path/'whole')


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_sample_is_named_there_too(tmp_path, monkeypatch, precision):
    train_on_device(monkeypatch)
    with Accelerator(), pytest.raises(DataError, match=r'step \d+: loss, i2t, t2i not finite: images of sample p017\.'):
        train(small(), Pairs(nan=17), settings(precision=precision), tmp_path)


def test_a_guard_names_step_and_sample(folder, tmp_path, monkeypatch):
    "The method's own check is read with the loss."
    train_on_device(monkeypatch)
    method, data, transform = case('simclr', folder)
    plain = method.image_encoder.forward
    def spoilt(x):
        out = plain(x)
        return torch.cat([out[:1] * torch.nan, out[1:]]) if method.training else out
    method.image_encoder.forward = spoilt
    with Accelerator(), pytest.raises(DataError, match='step 1: '): train(method, data, TrainConfig(**ALL_AT_ONCE, freeze_bn=True), tmp_path, transform=transform)
