"""A range test on the pretend accelerator: it computes there, and brings a method back to where it lay; a run there goes on as if nothing had been."""
import numpy as np
import torch
from pretend_accelerator import DEVICE, Accelerator, train_on_device
from training import Pairs, settings, small

from medvl.train.feed import make_loader
from medvl.train.lr_range import lr_range_of, lr_range_test
from medvl.train.machine import training_mode
from medvl.train.step import Loop, one_step


def bits(method): return {k: v.detach().cpu().clone() for k, v in method.state_dict().items()}


def same(a, b): assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_method_comes_back_to_the_cpu(tmp_path, monkeypatch):
    train_on_device(monkeypatch)
    with Accelerator():
        method = small()
        before = bits(method)
        found = lr_range_test(method, Pairs(), settings(cpu=False), folder=tmp_path, points=6, high=1e-2)
        assert len(found.table) == 6 and np.isfinite(found.table.loss).all() and found.table.loss.nunique() > 1
        assert {p.device.type for p in method.parameters()} == {'cpu'}
        same(before, bits(method))


def test_a_run_there_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    train_on_device(monkeypatch)
    def steps(tested):
        torch.manual_seed(3)
        loop = Loop(small(), Pairs(), settings(cpu=False, precision='bf16'), tmp_path)
        assert loop.device.type == DEVICE.type
        training_mode(loop.method)
        batches = iter(make_loader(loop.dataset, loop.batches))
        for _ in range(2): one_step(loop, [next(batches) for _ in range(2)])
        if tested: assert len(lr_range_of(loop, points=5, low=1e-3, high=1.).table) > 1
        for _ in range(2): one_step(loop, [next(batches) for _ in range(2)])
        return {**bits(loop.method), **{f'average {k}': v.cpu().clone() for k, v in loop.average.values.items()}, 'draw': torch.rand(3, device=DEVICE).cpu()}
    with Accelerator(): same(steps(False), steps(True))
