"""The range test against the numbers of Lightning's finders; everything restored, before a run and within one; schedules and AdamW of the cardiomegaly and EHR originals."""
import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden
from training import Pairs, Small, settings, small
from torch import nn

from medvl.core.errors import DataError
from medvl.data.phantom.populations import new_phantom
from medvl.methods.base import Method
from medvl.methods.recipes import method_names, recipe
from medvl.train.adamw_reference import ReferenceAdamW
from medvl.train.cycle import cycle_momentum, falling_steps, one_cycle
from medvl.train.feed import make_loader
from medvl.train.lr_range import divergence_limit, left_as_it_was, lr_grid, lr_range_of, lr_range_test, smooth_losses, suggest_rates
from medvl.train.machine import arithmetic, training_mode
from medvl.train.optim import Plateau, lr_scale, make_optimizer
from medvl.train.settings import TrainConfig, check_config
from medvl.train.step import Loop, one_step

ROOT = Path(__file__).parents[2]
RULES = {'lightning_1': 'old_rule_pl1.5', 'lightning_2': 'new_rule_pl2.6'}


# ---- the originals' numbers

@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('curve', ['figure_like', 'diverges'])
def test_grid_smoothing_stop_and_suggestion_are_lightnings(rule, curve):
    z, told = np.load(golden('cardiomegaly/lr_range_test.npz')), json.loads(golden('cardiomegaly/lr_range_test.json').read_text())[curve]
    want, raw = told[RULES[rule]], z[f'{curve}/raw_loss']
    rates = lr_grid(told['n'], told['lr_min'], told['lr_max'], rule)
    smoothed = smooth_losses(raw, .98, rule)
    ends = [k for k in range(1, len(raw)) if smoothed[k] > divergence_limit(smoothed[:k + 1])]
    count = (ends[0] if ends else len(raw) - 1) + 1
    assert count == want['points_recorded']
    np.testing.assert_allclose(rates[:count], z[f'{curve}/{RULES[rule]}/lr'], rtol=1e-12)
    np.testing.assert_allclose(smoothed[:count], z[f'{curve}/{RULES[rule]}/smoothed_loss'], rtol=1e-12)
    assert suggest_rates(rates[:count], smoothed[:count], rule)['steepest'] == pytest.approx(want['suggested_lr'], rel=1e-12)


def test_the_rate_in_the_originals_code_is_a_point_of_that_grid():
    note = json.loads(golden('cardiomegaly/lr_range_test.json').read_text())['grid_note']
    rates = lr_grid(100, 1e-8, 1., 'lightning_1')
    assert rates[96] == pytest.approx(note['index_96_of_default_grid'], rel=1e-12) and rates[51] == pytest.approx(note['index_51_of_default_grid'], rel=1e-12)


PLATEAUS = {'age_proxy_min_on_loss': ('min', .01, 1e-3), 'sex_proxy_max_on_score': ('max', .01, 1e-3), 'ae_max_on_score': ('max', .05, 1e-3),
            'finetune_age_published_max_on_loss': ('max', .001, 1e-3), 'finetune_sex_published_max_on_loss': ('max', 1e-4, 1e-2),
            'finetune_age_corrected_min_on_loss': ('min', .001, 1e-3), 'finetune_sex_corrected_min_on_loss': ('min', 1e-4, 1e-2)}


def test_every_plateau_is_the_originals():
    z, seen = np.load(golden('cardiomegaly/schedules.npz')), set()
    for key in (k for k in z.files if k.startswith('lr/')):
        _, name, values = key.split('/')
        mode, lr, least = PLATEAUS[name]
        plateau, rates = Plateau(.5, 3, mode, least=least), [lr]
        for value in z[f'seq/{values}']: rates.append(lr * plateau.see(float(value)))
        np.testing.assert_allclose(rates, z[key], rtol=1e-12, err_msg=key)
        seen.add(name)
    assert seen == set(PLATEAUS)


def test_a_plateau_in_the_wrong_direction_halves_while_the_loss_improves():
    z = np.load(golden('cardiomegaly/schedules.npz'))
    halved = lambda name: len(set(z[f'lr/{name}/loss_falling'])) - 1
    assert halved('finetune_age_published_max_on_loss') == 9 and halved('finetune_age_corrected_min_on_loss') == 0


def test_falling_steps_and_one_cycle_are_torchs():
    z = np.load(golden('cardiomegaly/schedules.npz'))
    ours = [.05 * lr_scale(4 * e, 100, 0, 'steps', epoch_steps=4, fall=(5, .1)) for e in range(25)]
    np.testing.assert_allclose(ours, z['steplr/step5_from_0.05_25_epochs'], rtol=1e-12)
    np.testing.assert_allclose([.01 * lr_scale(s, 450, .3, 'one_cycle_torch') for s in range(450)], z['onecycle/total450_max0.01/lr'], rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose([cycle_momentum(s, 450) for s in range(450)], z['onecycle/total450_max0.01/momentum'], rtol=1e-12)


@pytest.mark.parametrize('total, share', [(7, .3), (10, .3), (33, .25), (100, .5)])
def test_one_cycle_is_torchs_at_other_lengths(total, share):
    o = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1., momentum=.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(o, 1., total_steps=total, pct_start=share)
    for s in range(total):
        assert one_cycle(s, total, share) == pytest.approx(o.param_groups[0]['lr'], rel=1e-9)
        assert cycle_momentum(s, total, share) == pytest.approx(o.param_groups[0]['momentum'], rel=1e-9)
        o.step()
        if s < total - 1: scheduler.step()


@pytest.mark.parametrize('total, share', [(1, .3), (2, .3), (3, .3), (10, 0.), (10, 1.)])
def test_a_cycle_that_cannot_rise_or_fall_is_refused(total, share):
    with pytest.raises(ValueError, match='one cycle'): one_cycle(0, total, share)


def test_adamw_is_the_one_transformers_had():
    z = np.load(golden('cardiomegaly/training_trace.npz'))
    w = nn.Parameter(torch.tensor(z['adamw/start']))
    ours, torchs = ReferenceAdamW([w], lr=float(z['adamw/lr'])), nn.Parameter(torch.tensor(z['adamw/start']))
    other = torch.optim.AdamW([torchs], lr=float(z['adamw/lr']), eps=1e-6, weight_decay=0)
    for k, g in enumerate(z['adamw/grads']):
        w.grad, torchs.grad = torch.tensor(g), torch.tensor(g)
        ours.step(); other.step()
        np.testing.assert_allclose(w.detach().numpy(), z['adamw/reference_after_each_step'][k], rtol=0, atol=1e-12)
        np.testing.assert_allclose(torchs.detach().numpy(), z['adamw/torch_adamw_eps1e6_after_each_step'][k], rtol=0, atol=1e-12)


def test_old_adamw_decays_after_the_step_and_resumes():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = make_optimizer(net, 1e-2, .1, 'adamw_reference', no_decay=())
    before = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before * (1 - 1e-2 * .1))
    from medvl.train.checkpoint import optimizer_tensors, restore_optimizer
    other = copy.deepcopy(net)
    again = make_optimizer(other, 1e-2, .1, 'adamw_reference', no_decay=())
    restore_optimizer(again, optimizer_tensors(optimizer))
    for model, o in ((net, optimizer), (other, again)):
        for p in model.parameters(): p.grad = torch.ones_like(p)
        o.step()
    for a, b in zip(net.parameters(), other.parameters()): assert torch.equal(a, b)


# ---- settings

@pytest.mark.parametrize('changes, message', [(dict(cycle_momentum=(.95, .85)), 'one_cycle_torch'), (dict(plateau_least=2.), 'shares of lr'), (dict(fall_factor=0.), 'shares of lr'),
                                              (dict(fall_epochs=0), 'fall_epochs')])
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message): check_config(TrainConfig(**changes))


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'adamw_reference'])
def test_the_loop_moves_rate_and_momentum_of_a_cycle(optimizer, tmp_path):
    config = settings(schedule='one_cycle_torch', warmup=.3, cycle_momentum=(.95, .85), max_steps=10, optimizer=optimizer, lr=.01, accumulate=1, chunk_size=None)
    loop = Loop(small(), Pairs(), config, tmp_path)
    groups = iter(make_loader(loop.dataset, loop.batches))
    for s in range(10):
        assert one_step(loop, [next(groups)])['lr'] == pytest.approx(.01 * one_cycle(s, 10, .3))
        group = loop.optimizer.param_groups[0]
        assert (group['momentum'] if optimizer == 'sgd' else group['betas'][0]) == pytest.approx(cycle_momentum(s, 10))


# ---- everything restored

class Twin(Small):
    "Small, with what else methods have: a twin, a queue that is replaced, a buffer that is not saved, a counter of Python's."
    name = 'test-twin'
    def __init__(self, config=None):
        super().__init__(config)
        self.twin = copy.deepcopy(self.text_encoder).requires_grad_(False)
        self.register_buffer('queue', torch.zeros(4, 6))
        self.register_buffer('passed', torch.zeros(1), persistent=False)
        self.seen = 0

    def after_step(self, features, batch, state):
        for a, b in zip(self.twin.parameters(), self.text_encoder.parameters()): a.lerp_(b.detach(), .1)
        self.queue = torch.cat([features['image'].float(), self.queue])[:4]
        self.passed += 1
        self.seen += 1
        np.random.rand(); random.random(); torch.rand(1)


def twin():
    torch.manual_seed(0)
    return Twin()


def everything(method, loop=None):
    "All that a run holds, as bits."
    tensors = {f'{t}{n}': v for t in ('parameters', 'buffers') for n, v in getattr(method, f'named_{t}')()}
    more = {f'asked {n}': torch.tensor(p.requires_grad) for n, p in method.named_parameters()} | {f'mode {n}': torch.tensor(m.training) for n, m in method.named_modules()}
    if loop:
        more |= {f'{i}/{k}': torch.as_tensor(v) for i, s in enumerate(loop.optimizer.state.values()) for k, v in s.items()}
        more |= {f'average {k}': v for k, v in (loop.average.values if loop.average else {}).items()}
        more |= {'step': torch.tensor([loop.step, loop.total]), 'scale': torch.tensor(loop.scaler.get_scale()), 'lr': torch.tensor([g['lr'] for g in loop.optimizer.param_groups])}
    more['torch'], more['numpy'] = torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))
    more['python'] = torch.tensor(random.getstate()[1])
    return {k: v.detach().clone() for k, v in {**tensors, **more}.items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_before_a_run_nothing_has_changed(tmp_path):
    method = twin().eval()
    method.scale.grad = torch.tensor(3.)
    before, held = everything(method), dict(method.named_parameters())
    found = lr_range_test(method, Pairs(), settings(lr_scales={'text_encoder': 0}), folder=tmp_path/'run', points=12, low=1e-4, high=.1)
    assert len(found.table) == 12 and found.table.loss.nunique() > 1, 'the test must train'
    same(before, everything(method))
    assert method.seen == 0 and method.scale.grad == 3 and all(p is held[n] for n, p in method.named_parameters())
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('changes', [dict(optimizer='adamw'), dict(optimizer='sgd', ema=0.), dict(optimizer='adamw_reference', clip=0.), dict(precision='bf16'),
                                     dict(schedule='one_cycle_torch', warmup=.3, cycle_momentum=(.95, .85)), dict(freeze_bn=True)])
def test_a_run_goes_on_as_if_there_had_been_no_test(changes, tmp_path):
    "Three steps, a test, three steps: the bits of six."
    def steps(tested):
        with arithmetic(True):
            torch.manual_seed(11); np.random.seed(1); random.seed(1)
            loop = Loop(twin(), Pairs(), settings(**changes), tmp_path)
            training_mode(loop.method, loop.config.freeze_bn)
            batches = iter(make_loader(loop.dataset, loop.batches))
            for _ in range(3): one_step(loop, [next(batches) for _ in range(2)])
            if tested:
                before = everything(loop.method, loop)
                found = lr_range_of(loop, points=9, low=1e-3, high=10.)
                assert len(found.table) > 1 and found.table.loss.nunique() > 1
                same(before, everything(loop.method, loop))
            for _ in range(3): one_step(loop, [next(batches) for _ in range(2)])
            return everything(loop.method, loop)
    same(steps(False), steps(True))


def test_the_scale_of_fp16_comes_back(tmp_path):
    with arithmetic(True):
        loop = Loop(twin(), Pairs(), settings(precision='fp16', lr=1e-3), tmp_path)
        assert loop.scaler.is_enabled()
        training_mode(loop.method)
        batches = iter(make_loader(loop.dataset, loop.batches))
        one_step(loop, [next(batches) for _ in range(2)])
        before, state = everything(loop.method, loop), loop.scaler.state_dict()
        lr_range_of(loop, points=8, low=1e-3, high=1e4)
        same(before, everything(loop.method, loop))
        assert loop.scaler.state_dict() == state


def test_an_error_restores_too(tmp_path):
    method = twin()
    before = everything(method)
    with pytest.raises(DataError, match='empty report'): lr_range_test(method, Pairs(empty=5), settings(batch_size=16, accumulate=1), folder=tmp_path, points=40, high=1e-5)
    with pytest.raises(DataError, match='truncated'): lr_range_test(method, Pairs(broken=7), settings(accumulate=1), folder=tmp_path, points=40, high=1e-5)
    same(before, everything(method))
    with pytest.raises(ZeroDivisionError), left_as_it_was(method):
        method.seen, method.queue = 9, torch.ones(4, 6)
        method.double()
        raise ZeroDivisionError
    same(before, everything(method))
    assert method.seen == 0 and method.scale.dtype == torch.float32


def test_the_first_rates_are_tried_on_the_batches_of_the_run(tmp_path):
    "The first loss is that of training's first step; within a run, that of the step that comes next."
    with arithmetic(True):
        loop = Loop(small(), Pairs(), settings(), tmp_path)
        training_mode(loop.method)
        batches = iter(make_loader(loop.dataset, loop.batches))
        for _ in range(2):
            first = lr_range_of(loop, points=3).table.loss[0]
            assert one_step(loop, [next(batches) for _ in range(2)])['loss'] == first


def test_more_points_than_the_run_has_steps_and_a_warmed_head(tmp_path):
    found = lr_range_test(small(), Pairs(), settings(max_steps=4), folder=tmp_path, points=20, high=1e-3)
    assert len(found.table) == 20
    found = lr_range_test(small(), Pairs(), settings(max_steps=4, head_warmup=2), folder=tmp_path, points=20, high=1e-3, rule='lightning_2')
    assert len(found.table) == 20 and found.rule == 'lightning_2'


# ---- curves that are odd

class Says(Method):
    "A loss that is what the test says, step by step."
    def __init__(self, values):
        super().__init__()
        self.image_encoder, self.values = nn.Linear(8, 1), list(values)
    def encode(self, batch): return {'x': self.image_encoder(batch['images'])}
    def losses(self, features, batch, state):
        return {'loss': features['x'].mean() * 0 + self.values[min(state.step, len(self.values) - 1)]}


def tried(values, **how):
    return lr_range_test(Says(values), Pairs(), settings(ema=0., clip=0., accumulate=1, chunk_size=None), points=len(values), **how)


def test_a_loss_that_is_nan_from_the_start_is_an_error():
    with pytest.raises(DataError, match='no rate is to blame'): tried([float('nan')] * 5)
    with pytest.raises(DataError, match='p003'): lr_range_test(small(), Pairs(nan=3), settings(batch_size=48, accumulate=1, chunk_size=None))


def test_a_loss_that_becomes_nan_ends_the_curve():
    found = tried([1., .9, .8, .7, float('inf'), 1.])
    assert found.ended == 'not finite' and len(found.table) == 4


def test_a_loss_that_rises_ends_the_curve():
    found = tried([1., .5, .5, 9., 9.], beta=0.)
    assert found.ended == 'diverged' and found.table.loss.tolist() == [1., .5, .5, 9.]


def test_a_negative_loss_is_no_divergence():
    found = tried([-1., -2., -1.5, -1.9, -2.5], beta=0.)
    assert found.ended == 'finished' and len(found.table) == 5
    assert tried([-1., -2., 40., 1.], beta=0.).ended == 'diverged'


@pytest.mark.parametrize('values', [[1., 1., 1., 1.], [1., 2., 3., 3.5]])
def test_a_loss_that_never_falls_suggests_nothing(values):
    found = tried(values, beta=0.)
    assert all(v != v for v in found.suggestions.values()) and 'none' in repr(found)


def test_a_curve_of_two_points_has_an_answer():
    found = tried([1., .5], beta=0.)
    assert found.suggestions['tenth'] == pytest.approx(.1) and found.suggestions['steepest'] != found.suggestions['steepest']


@pytest.mark.parametrize('how, message', [(dict(points=1), 'at least 2 points'), (dict(low=0.), '0 < low < high'), (dict(low=1., high=.1), '0 < low < high'), (dict(beta=1.), 'beta'),
                                          (dict(stop=1.), 'stop'), (dict(rule='lightning'), "'lightning_1'|lightning_1")])
def test_wrong_settings_are_named(how, message):
    with pytest.raises(ValueError, match=message): lr_range_test(small(), Pairs(), settings(), **{'points': 3, **how})


def test_valley_is_the_longest_fall():
    losses = [5, 6, 7, 6.5, 4, 3, 2, 2.5, 9]
    assert suggest_rates(np.arange(1., 10), losses)['valley'] == 5. # from 7 (index 2) to 2 (index 6): the middle is index 4
    assert falling_steps(11, 5, .5) == .25


# ---- every method, as the experiment does it

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp('phantoms'), {}
    def of(kind, size):
        if (kind, size) not in made:
            new_phantom(kind, folder/f'{kind}-{size[0]}', 24, size, 0, 'easy')
            made[kind, size] = folder/f'{kind}-{size[0]}'/'prepared'
        return made[kind, size]
    return of


@pytest.mark.parametrize('name', [m for m in method_names() if recipe(m, 'smoke').train is not None])
def test_the_experiment_looks_for_the_rate_of_every_method(name, phantoms, tmp_path, monkeypatch):
    "`medvl run lr_range -p method=…`: its own cells, as far as the curves."
    named, told = recipe(name, 'smoke'), {}
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs/experiments/e14_lr_range.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    exec(cells[0], told)
    told |= dict(method=name, data=str(phantoms(named.phantom, tuple(named.size))), points=3, high=1e-3, batch_size=4)
    monkeypatch.setenv('MEDVL_OUTPUTS', str(tmp_path))
    for code in cells[1:4]: exec(code.replace('globals()', '{}'), told)
    assert [len(f.table) for f in told['found'].values()] == [3] and np.isfinite(told['curves'].loss).all() and told['curves'].loss.nunique() > 1
