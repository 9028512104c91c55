"""Every registered method and every recipe keeps the contract of the house (design.md); and a method that breaks a promise is caught by the check of that promise."""
import copy
import importlib
import random
import re
from dataclasses import fields
from pathlib import Path

import contract
import pytest
import torch
import torch.nn.functional as F
from contract import ALL, FACTOR, HEADS, TRAINED, from_recipe, new_batch, new_case
from torch import nn
from training import Pairs, Small

import medvl
from medvl.core.config import config_from_dict
from medvl.data.augment.makers import augment_kind, new_augment
from medvl.data.batch import check_batch
from medvl.data.samples.builders import sample_kind
from medvl.methods.base import method_class, methods, register
from medvl.methods.recipes import method_names, recipe
from medvl.train.distributed import launch
from medvl.train.settings import TrainConfig, check_config

STEPS = [*TRAINED, *HEADS, FACTOR] # what is trained; `initialised` is not
ONE_LOSS = {'byol', 'mae', 'simclr', 'supervised', 'classifier', 'segmenter', 'unet', FACTOR} # their loss has no parts: what stands beside it are other numbers


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(method, samples, augmentation, batch) by name: made once; each test takes a copy of the method."
    folder, kept = tmp_path_factory.mktemp('cases'), {}
    def of(name):
        if name not in kept:
            method, data, transform = new_case(folder, name)
            kept[name] = method, data, transform, check_batch(new_batch(data, transform))
        method, *rest = kept[name]
        return copy.deepcopy(method), *rest
    of.folder = folder
    return of


def test_every_method_is_here():
    "All that the package registers: a new method that is neither found by its recipes nor named among the heads fails here."
    package = Path(medvl.__file__).parent
    for path in package.rglob('*.py'):
        if re.search(r'^@register\b', path.read_text(), re.M): importlib.import_module('.'.join(('medvl', *path.relative_to(package).with_suffix('').parts)))
    ours = {n for n in methods() if method_class(n).__module__.startswith('medvl.')}
    assert ours == set(ALL) - {'unet'} and ONE_LOSS <= set(STEPS) and len(ours) >= 14 # the segmenter has two heads


# ------------------------------------------------------------------------------------------------ every method

@pytest.mark.parametrize('name', ALL)
def test_capabilities_have_their_signatures(name, made): contract.check_signatures(made(name)[0])


@pytest.mark.parametrize('name', STEPS)
def test_losses_are_finite_and_teach_all_that_is_trained(name, made):
    method, _, _, batch = made(name)
    contract.check_losses(method, batch)


@pytest.mark.parametrize('name', [n for n in STEPS if n not in ONE_LOSS])
def test_the_loss_is_the_weighted_sum(name, made):
    method, data, transform, _ = made(name)
    contract.check_sum(method, data, transform)


@pytest.mark.parametrize('name', STEPS)
def test_encode_and_losses_have_no_side_effects(name, made):
    method, _, _, batch = made(name)
    contract.check_no_side_effects(contract.stirred(method), batch)


@pytest.mark.parametrize('name', STEPS)
def test_chunks_are_the_whole(name, made):
    method, _, _, batch = made(name)
    contract.check_chunked(contract.stirred(method), batch)


@pytest.mark.parametrize('name', ALL)
def test_saved_and_opened(name, made, tmp_path):
    method, _, _, batch = made(name)
    contract.check_saved(method, batch, tmp_path/'m', name in STEPS)


@pytest.mark.parametrize('name', STEPS)
def test_killed_and_resumed(name, made, tmp_path):
    method, data, transform, _ = made(name)
    def make(seed): return contract.stirred(copy.deepcopy(method)) if seed else copy.deepcopy(method)
    contract.check_resumed(make, data, transform, tmp_path)


@pytest.mark.parametrize('name', STEPS)
def test_a_range_test_leaves_no_trace(name, made):
    method, data, transform, _ = made(name)
    contract.check_lr_range(method, data, transform)


def test_two_processes_are_one(made):
    "All methods that gather, in one pair of processes: gradients, and the loss where each computes it whole."
    names = [n for n in STEPS if made(n)[0].gathered]
    cases = {n: (contract.stirred(made(n)[0]), made(n)[3]) for n in names}
    assert len(names) >= 11
    want = {n: contract.part_gradient(copy.deepcopy(m), b) for n, (m, b) in cases.items()}
    contract.check_pair(want, launch(lambda: {n: contract.part_gradient(m, b) for n, (m, b) in cases.items()}))


@pytest.mark.parametrize('name', [n for n in method_names() if sample_kind(recipe(n, 'smoke').samples).images])
def test_missing_views_count_for_nothing(name, made):
    method, _, _, batch = made(name)
    contract.check_present(contract.stirred(method), batch)


# ------------------------------------------------------------------------------------------------ every recipe

def each(keep): return [pytest.param(n, k, id=f'{n}-{k}') for n in method_names() for k, _ in contract.all_recipes(n) if keep(n, k)]


IDLE = {'smoke+no_g': ('image_pool', 'text_pool', 'image_projection', 'text_projection'), # without the global loss
        'smoke+local_only': ('views.encoder.layer4',)} # A2I2: above the stage that is read


def real(n, k): return n in TRAINED and (k == 'small' or k.startswith('smoke+'))


@pytest.mark.parametrize('name, key', each(lambda n, k: True))
def test_recipes_name_what_exists(name, key):
    "Configuration, settings, samples and augmentation: every field is one of their dataclasses, and the settings fit the method."
    named = dict(contract.all_recipes(name))[key]
    assert named.about and len(named.size) == 2 and named.keep in ('best', 'last') and named.phantom in ('breast', 'chest', 'heart')
    config_from_dict(method_class(name).config_class, named.config)
    config_from_dict(sample_kind(named.samples).options, named.sample_options)
    config_from_dict(augment_kind(named.augment).options, named.augment_options)
    assert callable(new_augment(named.augment, named.augment_options, named.versions))
    if named.train is None: assert name not in TRAINED
    else: check_config(config_from_dict(TrainConfig, named.train), method_class(name))


@pytest.mark.parametrize('name, key', each(real))
def test_small_networks_for_real(name, key, made):
    "The network of the recipe with its own samples and versions."
    method, data, transform = from_recipe(made.folder, name, key)
    wanted = config_from_dict(type(method.config), dict(contract.all_recipes(name))[key].config)
    stated = [f.name for f in fields(wanted) if getattr(wanted, f.name) is not None] # None: the method's own choice
    assert {n for n in stated if getattr(wanted, n) != getattr(method.config, n)} <= {'labels', 'probe', 'vocab_size', 'frozen_layers', 'seed'}
    contract.check_losses(method, check_batch(new_batch(data, transform, 4)), IDLE.get(key, ()))


@pytest.mark.parametrize('name, key', each(lambda n, k: '+' not in k and not real(n, k)))
def test_large_networks_without_memory(name, key, made):
    "Networks on the meta device; samples and versions of the recipe for real, beside a small network."
    method = contract.without_weights(name, key)
    assert len(list(method.parameters())) > 10 and all(p.is_meta for p in method.parameters())
    if name not in TRAINED: return
    _, data, transform = from_recipe(made.folder, name, key, network='smoke')
    batch = check_batch(new_batch(data, transform, 3))
    assert len(batch['sample_id']) == 3 and len(batch.get('augmented', [0])) == recipe(name, key).versions


# ------------------------------------------------------------------------------------------------ a broken promise is caught

def broken(cls):
    "Registered under a name of its own, so that it can be saved."
    cls.name = f'test-{cls.__name__.lower()}'
    return register(cls)


@broken
class Right(Small): "Keeps every promise: what the others differ from."


@broken
class NotFinite(Small):
    def losses(self, *args): return {**(out := super().losses(*args)), 'loss': out['loss'] / 0}


@broken
class Nameless(Small):
    def losses(self, *args): return {'total': super().losses(*args)['loss']}


@broken
class Cut(Small):
    def encode(self, batch): return {**(out := super().encode(batch)), 'text': out['text'].detach()}


@broken
class Idle(Small):
    def __init__(self, config=None):
        super().__init__(config)
        self.spare = nn.Parameter(torch.zeros(3))


@broken
class NoSum(Small):
    def losses(self, *args): return {**(out := super().losses(*args)), 'loss': out['i2t'] * out['t2i']}


@broken
class Counts(Small):
    def __init__(self, config=None):
        super().__init__(config)
        self.register_buffer('seen', torch.zeros(()))

    def encode(self, batch):
        self.seen += 1
        return super().encode(batch)


@broken
class Spoils(Small):
    def encode(self, batch):
        batch['words'] += 1e-3
        return super().encode(batch)


@broken
class Rescales(Small):
    def losses(self, features, batch, state):
        with torch.no_grad(): features['image'].mul_(1.01)
        return super().losses(features, batch, state)


@broken
class Wanders(Small):
    def losses(self, *args): return {**(out := super().losses(*args)), 'loss': out['loss'] + random.random()}


@broken
class Centred(Small):
    def encode(self, batch): return {**(out := super().encode(batch)), 'image': out['image'] - out['image'].mean(0)}


@broken
class Forgets(Small):
    def __init__(self, config=None):
        super().__init__(config)
        self.register_buffer('shift', torch.zeros(6), persistent=False)

    def encode(self, batch): return {**(out := super().encode(batch)), 'image': F.normalize(out['image'] + self.shift, dim=-1)}


@broken
class Remembers(Small):
    seen = 0
    def after_step(self, features, batch, state): self.seen += 1
    def losses(self, *args): return {**(out := super().losses(*args)), 'loss': out['loss'] * (1 + self.seen)}


@broken
class Lonely(Small):
    gathered = ()


@broken
class TimesWorld(Small):
    def losses(self, features, batch, state): return {k: v * state.world for k, v in super().losses(features, batch, state).items()}


@broken
class Odd(Small):
    def encode_image(self, images): return images


@broken
class Views(Small):
    "Reads pixels; `heeds`: what is present."
    heeds = (True, True)
    def __init__(self, config=None):
        super().__init__(config)
        self.pixels = nn.Linear(16, 8)

    def mean(self, images, present):
        x = self.pixels(images.float().flatten(2) / 255)
        if present is None: return x.mean(1)
        return torch.where(present[..., None], x, 0).sum(1) / present.sum(1, keepdim=True)

    def encode(self, batch): return super().encode({**batch, 'images': self.mean(batch['images'], batch.get('present') if self.heeds[0] else None)})

    def encode_image(self, images, present=None, views=None):
        x = self.mean(images[:, None] if images.dim() == 4 else images, present if self.heeds[1] else None)
        return F.normalize(self.image_encoder(x), dim=-1)


@broken
class BlindInTraining(Views): heeds = (False, True)


@broken
class Hoards(Right):
    "Its past steps, in a list that nobody can put back, change its loss."
    def __init__(self, config=None):
        super().__init__(config)
        self.past = []
    def losses(self, features, batch, state):
        found = super().losses(features, batch, state)
        return {**found, 'loss': found['loss'] * (1 + len(self.past))}
    def after_step(self, features, batch, state): self.past.append(state.step)


@broken
class BlindWhenAsked(Views): heeds = (True, False)


def pairs(n=6): return Pairs().collate([Pairs()[0, i] for i in range(n)])


def two_views():
    return {**pairs(), 'images': torch.randint(0, 256, (6, 2, 1, 4, 4), generator=torch.Generator().manual_seed(0)).float()}


def put_to(check, cls, folder):
    torch.manual_seed(0)
    method = cls()
    return {'signatures': lambda: contract.check_signatures(method),
            'losses': lambda: contract.check_losses(method, pairs()),
            'sum': lambda: contract.check_sum(method, Pairs(), None),
            'side effects': lambda: contract.check_no_side_effects(contract.stirred(method), pairs()),
            'chunks': lambda: contract.check_chunked(contract.stirred(method), pairs()),
            'saved': lambda: contract.check_saved(method, pairs(), folder/'m'),
            'resumed': lambda: contract.check_resumed(lambda seed: contract.stirred(cls()) if seed else copy.deepcopy(method), Pairs(), None, folder),
            'range': lambda: contract.check_lr_range(method, Pairs(), None),
            'views': lambda: contract.check_present(contract.stirred(method), two_views())}[check]()


@pytest.mark.parametrize('check, cls, says', [
    ('signatures', Odd, 'encode_image'), ('losses', NotFinite, 'not finite'), ('losses', Nameless, "no 'loss'"), ('losses', Cut, 'no gradient reaches text_encoder'),
    ('losses', Idle, 'no gradient at all.*spare'), ('sum', NoSum, 'not a weighted sum'), ('side effects', Counts, 'change the method: seen'), ('side effects', Spoils, 'change the batch: words'),
    ('side effects', Rescales, 'change the features: image'), ('side effects', Wanders, 'a second time: loss'), ('chunks', Centred, 'gradient of chunks'), ('saved', Forgets, 'saved and opened'),
    ('resumed', Remembers, 'other bits'), ('range', Hoards, 'what it says after'), ('views', BlindInTraining, 'reach the loss'), ('views', BlindWhenAsked, 'reach the vector')], ids=lambda x: getattr(x, '__name__', None))
def test_a_broken_promise_is_caught(check, cls, says, tmp_path):
    "And only for what is broken: the method without the fault passes the same check."
    with pytest.raises(AssertionError, match=says): put_to(check, cls, tmp_path/'wrong')
    put_to(check, Views if check == 'views' else Right, tmp_path/'right')


def test_a_loss_that_two_processes_do_not_share_is_caught():
    def found(cls):
        torch.manual_seed(0)
        return contract.part_gradient(contract.stirred(cls()), pairs())
    kinds = (Right, Lonely, TimesWorld)
    want, two = {c.name: found(c) for c in kinds}, launch(lambda: {c.name: found(c) for c in kinds})
    contract.check_pair({Right.name: want[Right.name]}, two)
    for cls in kinds[1:]:
        with pytest.raises(AssertionError, match=f'{cls.name} in two processes'): contract.check_pair({cls.name: want[cls.name]}, two)
