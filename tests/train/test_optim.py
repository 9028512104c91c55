"""Schedules against the original's numbers and torch's own schedulers; parameter groups; AdamW against a hand-written step."""
import math

import numpy as np
import pytest
import torch
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medvl.train.optim import FALLING, SCHEDULES, Plateau, _bolts, lr_scale, make_optimizer, param_groups, set_lr, warmup_steps


@pytest.mark.parametrize('tag,total,warmup', [('T150_W10', 150, 10), ('T37_Wfrac0.1', 37, 0.1), ('T20_W0', 20, 0), ('T1500_W100_ep15', 1500, 100)])
def test_reference_schedule_is_the_originals(tag, total, warmup):
    z = np.load(golden('mammoclip/scheduler.npz'))
    assert warmup_steps(warmup, total) == int(z[f'{tag}_wsteps'])
    ours = [5e-5 * lr_scale(t, total, warmup, 'reference') for t in range(total + 1)]
    np.testing.assert_allclose(ours, z[tag], rtol=1e-9, atol=1e-20)


def test_reference_schedule_by_its_formula():
    "The same without the golden file: linear from 0, then cos squared."
    ours = [lr_scale(t, 40, 5, 'reference') for t in range(41)]
    formula = [t / 5 if t < 5 else math.cos(math.pi / 2 * (t - 5) / 35) ** 2 for t in range(41)]
    np.testing.assert_allclose(ours, formula, atol=1e-15)


@pytest.mark.parametrize('name,make', [
    ('cosine', lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
    ('linear', lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 20)),
    ('constant', lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))])
def test_shapes_are_torchs(name, make):
    o = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, theirs = make(o), []
    for _ in range(20): theirs.append(o.param_groups[0]['lr']); o.step(); scheduler.step()
    np.testing.assert_allclose([lr_scale(t, 20, 0, name) for t in range(20)], theirs, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FALLING), st.integers(1, 300), st.data())
def test_schedules_stay_between_0_and_1_and_fall_after_the_warm_up(name, total, data):
    warm = data.draw(st.integers(0, total - 1))
    values = [lr_scale(t, total, warm, name) for t in range(total)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    assert all(a >= b - 1e-12 for a, b in zip(values[warm:], values[warm + 1:]))
    assert all(a <= b + 1e-12 for a, b in zip(values[:warm], values[1:warm + 1]))
    if name != 'reference': assert min(values) > 0, 'a step would be wasted'


@pytest.mark.parametrize('warmup,total', [(-1, 10), (10, 10), (11, 10), (1.5, 10), (-0.5, 10)])
def test_impossible_warm_up_is_refused(warmup, total):
    with pytest.raises(ValueError, match='warmup'): warmup_steps(warmup, total)


def test_floor():
    assert lr_scale(100, 100, 0, 'cosine', floor=0.1) == pytest.approx(0.1)


def net():
    return nn.ModuleDict({'image_encoder': nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), 'text_encoder': nn.Linear(4, 4)})


def test_groups_partition_the_parameters():
    model = net()
    model['text_encoder'].bias.requires_grad_(False)
    groups = param_groups(model, 1e-3, 0.1, lr_scales={'text_*': 0.5, 'image_encoder.0': 2.0})
    names = [n for g in groups for n in g['names']]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    by_name = {n: g for g in groups for n in g['names']}
    assert by_name['text_encoder.weight']['lr'] == pytest.approx(5e-4) and by_name['text_encoder.weight']['weight_decay'] == 0.1
    assert by_name['image_encoder.0.bias']['lr'] == pytest.approx(2e-3) and by_name['image_encoder.0.bias']['weight_decay'] == 0.0
    assert by_name['image_encoder.1.weight']['lr'] == pytest.approx(1e-3)


def test_the_originals_groups_decay_everything():
    assert {g['weight_decay'] for g in param_groups(net(), 1e-3, 0.1, no_decay=())} == {0.1}


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match='nope'): param_groups(net(), 1e-3, no_decay=('nope',))
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match='nothing to train'): param_groups(frozen, 1e-3)


def test_adamw_step_by_hand():
    "Two steps of AdamW with decay and a scaled group, against the formula in float64."
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer(model, 1e-2, 0.1)
    m = [torch.zeros_like(w), torch.zeros_like(b)]; v = [torch.zeros_like(w), torch.zeros_like(b)]
    for t in (1, 2):
        lr = set_lr(optimizer, 1 / t)
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad(); model(x).square().sum().backward(); optimizer.step()
        out = x @ w.T + b
        grads = [2 * out.T @ x, 2 * out.sum(0)]
        for i, (p, g, decay) in enumerate(((w, grads[0], 0.1), (b, grads[1], 0.0))):
            m[i] = 0.9 * m[i] + 0.1 * g; v[i] = 0.999 * v[i] + 0.001 * g * g
            p.mul_(1 - lr * decay).sub_(lr * (m[i] / (1 - 0.9 ** t)) / ((v[i] / (1 - 0.999 ** t)).sqrt() + 1e-8))
    torch.testing.assert_close(model.weight, w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.bias, b, rtol=1e-10, atol=1e-12)


def test_schedules_of_lovt_and_lightning_bolts():
    z = np.load(golden('lovt/schedules.npz'))
    ours = lambda name, n, warm=0, total=None, epoch=10: [lr_scale(t, total or n, warm, name, epoch_steps=epoch) for t in range(n)]
    np.testing.assert_allclose(1e-4 * np.array(ours('cosine_bounce', 35)), z['cosine_annealing_per_epoch_T10_lr1e4_35steps'], rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(1e-4 * np.array(ours('cosine_restarts', 35)), z['cosine_warm_restarts_T10_lr1e4_35steps'], rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(1e-3 * np.array(ours('bolts_reference', 100, epoch=1)), z['linear_warmup_cosine_w0_max100'], atol=0)
    np.testing.assert_allclose(1e-3 * np.array(ours('bolts_reference', 100, 1, epoch=1)), z['linear_warmup_cosine_w1_max100'], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(1e-3 * np.array([_bolts(e, 10, 100, 0.01) for e in range(100)]), z['linear_warmup_cosine_w10_max100_start1e5'], rtol=1e-9, atol=1e-15)


def test_plateau_is_the_recorded_one():
    z, plateau, rates = np.load(golden('lovt/schedules.npz')), Plateau(), []
    for value in z['reduce_on_plateau_values']:
        rates.append(3e-4 * plateau.scale)
        plateau.see(value)
    np.testing.assert_allclose(rates, z['reduce_on_plateau_lr_before_each'], rtol=1e-12)


@pytest.mark.parametrize('name,make', [
    ('cosine_bounce', lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7)),
    ('cosine_restarts', lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 7))])
def test_epoch_schedules_are_torchs(name, make):
    o = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, theirs = make(o), []
    for _ in range(30): theirs.append(o.param_groups[0]['lr']); o.step(); scheduler.step()
    np.testing.assert_allclose([lr_scale(t, 30, 0, name, epoch_steps=7) for t in range(30)], theirs, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10) | st.just(float('nan')), min_size=1, max_size=40), st.integers(0, 4), st.sampled_from(['min', 'max']))
def test_plateau_is_torchs(values, patience, mode):
    o = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode, 0.5, patience, eps=0), Plateau(0.5, patience, mode)
    for value in values:
        scheduler.step(value)
        again = Plateau(0.5, patience, mode) # forgotten and brought back, as by a resumed run
        again.restore(plateau.state())
        plateau = again
        assert plateau.see(value) == pytest.approx(o.param_groups[0]['lr'])


@pytest.mark.parametrize('name', [n for n in SCHEDULES if n not in (*FALLING, 'plateau', 'one_cycle_torch')])
def test_epoch_schedules_ask_for_the_epoch_and_stay_in_bounds(name):
    with pytest.raises(ValueError, match='epoch_steps'): lr_scale(3, 20, 0, name)
    assert all(0 <= lr_scale(t, 40, 10, name, epoch_steps=10) <= 1 for t in range(40))


def test_adam_is_torchs_with_coupled_decay():
    ours, theirs = net(), net()
    theirs.load_state_dict(ours.state_dict())
    optimizer, reference = make_optimizer(ours, 1e-2, 0.1, 'adam', no_decay=()), torch.optim.Adam(theirs.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        for model, o in ((ours, optimizer), (theirs, reference)):
            o.zero_grad(); sum((p ** 2).sum() for p in model.parameters()).backward(); o.step()
    for a, b in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(a, b)


def test_staircase_is_albefs():
    "Warm-up by units of 100 steps inside the first epoch, then one value an epoch."
    from medvl.train.staircase import staircase
    values = [lr_scale(s, 1000, 200, 'staircase', .2, epoch_steps=250) for s in range(1000)]
    assert values == [staircase(s, 250, 4, 2, floor=.2) for s in range(1000)]
    assert values[0] == pytest.approx(.1) and values[100] == pytest.approx(.55) and values[200] == 1 and len(set(values[250:500])) == 1
    with pytest.raises(ValueError, match='epoch_steps'): lr_scale(0, 10, 0, 'staircase')
