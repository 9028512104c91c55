"""The contract of a method as checks that fail: each takes a method with samples that its own recipe makes, and complains where a promise is broken."""
import copy
import multiprocessing
import os
import signal
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from device_cases import HEADS, case
from safetensors.torch import load_file
from training import contents, gradients, quiet

from medvl.core.config import config_from_dict
from medvl.data.augment.makers import new_augment
from medvl.data.batch import batch_size, collate, present_rows, slice_batch
from medvl.data.phantom.populations import new_phantom
from medvl.data.samples.builders import Parts, new_samples, sample_kind
from medvl.data.text.tokens import build_wordpiece
from medvl.evaluate.stats.selection import splits_of
from medvl.methods.base import WEIGHTS, StepState, capabilities, capability_problems, from_pretrained, method_class, save_pretrained
from medvl.methods.recipes import ablated, method_names, new_method, recipe, recipes
from medvl.models.text import CONFIGURATIONS
from medvl.train.distributed import average_gradients, exchange_of
from medvl.train.gradcache import backward_batch, check_chunks
from medvl.train.loop import train
from medvl.train.lr_range import lr_range_test
from medvl.train.settings import TrainConfig

TRAINED = [n for n in method_names() if recipe(n, 'smoke').train is not None]
FACTOR = 'mammo_factor'
ALL = [*method_names(), *HEADS, FACTOR] # every method that this package registers; the untrained baseline too
ASKED = ('encode_image', 'image_features', 'logits', 'predict') # capabilities of images alone
LIKE = dict(rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ a method and its samples

@lru_cache
def parts_of(folder, kind, count, size):
    "The splits of a phantom."
    return splits_of(new_phantom(kind, Path(folder)/f'{kind}-{count}-{size[0]}', count, size), needed=('train', 'valid'))


def from_recipe(folder, name, key, network=''):
    "(method, training samples, augmentation) of a recipe, as the experiment `pretrain` makes them; images are those of the smoke recipe, and the network too where `network` says so."
    small, named = recipe(name, 'smoke'), dict(all_recipes(name))[key]
    parts = parts_of(str(folder), small.phantom, 16 if small.phantom == 'breast' else 24, small.size)
    read = next((k for k in ('labels', 'probe') if k in method_class(name).config_class.__dataclass_fields__), '')
    labels = tuple(parts['train'].labels) if read else ()
    kind, options = sample_kind(named.samples), {'seed': 0, **named.sample_options}
    source = Parts(parts, {}, labels, None)
    method = new_method(name, network or key.split('+')[0], kind.texts(source, options), 0, **{**({} if network else named.config), **({read: labels} if read else {})})
    data = new_samples(named.samples, source, 'train', getattr(method, 'tokenizer', None), options)
    return method, data, new_augment(named.augment, named.augment_options, named.versions)


def without_weights(name, key):
    "The network of a recipe on the meta device; what would load weights from elsewhere has its configuration alone."
    given = dict(all_recipes(name))[key].config
    knows, words = method_class(name).config_class.__dataclass_fields__, build_wordpiece(['No mass.', 'Small effusion.'], 60)
    there = given.get('text_encoder', knows['text_encoder'].default if 'text_encoder' in knows else '')
    changes = {k: False for k in ('image_pretrained', 'text_pretrained') if k in knows}
    if there and there not in CONFIGURATIONS: changes['text_encoder'] = 'bert-base-clinical-config'
    with torch.device('meta'): return new_method(name, key, **({'tokenizer': words} if there or dict(all_recipes(name))[key].own_words else {}), **changes)


def new_case(folder, name):
    "The same for every name: recipes where there are, and the heads."
    if name in method_names(): return from_recipe(folder, name, 'smoke')
    if name in HEADS: return case(name, str(folder))
    from device_cases import breasts

    from medvl.attribute.mammo_factor import MammoFactor, MammoFactorConfig
    from medvl.data.samples.targets import TargetImages
    from medvl.methods.former import new_mammoclip
    data = breasts(str(folder))
    base = new_mammoclip('smoke', data.manifest.report)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in base.image_encoder.parameters(): p += .2 * torch.randn_like(p) # an untrained one hardly tells images apart
    return MammoFactor(MammoFactorConfig(prompts={'mass': ['mass']}, grid=(4, 3), width=base.config.dim, temperature=1.0), base), TargetImages(data, ('mass',)), None


def new_batch(data, transform, n=6, epoch=0, first=0):
    samples = [data[epoch, (first + i) % len(data)] for i in range(n)]
    batch = getattr(data, 'collate', collate)(samples)
    return transform(batch, 0, epoch) if transform else batch


# ------------------------------------------------------------------------------------------------ the promises

def flat(tree):
    "All tensors of a tree, by their path."
    if isinstance(tree, torch.Tensor): return {'': tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {f'{k}.{p}': t for k, v in pairs for p, t in flat(v).items()}


def same(a, b, what):
    "Equal bits."
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys(), f'{what}: {sorted(a.keys() ^ b.keys())}'
    for k in a: assert torch.equal(torch.nan_to_num(a[k].float()), torch.nan_to_num(b[k].float())), f'{what}: {k} differs'


def forward(method, batch, state=None):
    torch.manual_seed(0)
    features = method.encode(batch)
    torch.manual_seed(1)
    return features, method.losses(features, batch, state or StepState())


def check_signatures(method):
    assert not capability_problems(type(method)), capability_problems(type(method))
    assert all(isinstance(getattr(method, n), tuple) for n in ('gathered', 'gathered_batch', 'keeps', 'unsaved'))


def check_losses(method, batch, idle=()):
    "Named scalars that are finite; their gradient reaches every part that is trained; `idle`: parts that a recipe leaves out."
    stirred(method).train().zero_grad()
    late = getattr(method.config, 'align_epochs', 0) # before it, X-VL reads nothing together
    features, losses = forward(method, {**batch, 'epoch': late} if late else batch, StepState(epoch=late))
    assert 'loss' in losses, "no 'loss'"
    scalars = {k: v for k, v in losses.items() if isinstance(v, torch.Tensor)}
    assert all(v.dim() == 0 for v in scalars.values()) and torch.isfinite(losses['loss']), f'not finite: {losses}'
    losses['loss'].backward()
    for name, part in method.named_children():
        if name in idle: continue
        trained = [p for p in part.parameters() if p.requires_grad]
        if trained: assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained), f'no gradient reaches {name}'
    bare = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None and not n.startswith(idle)]
    assert not bare, f'no gradient at all: {bare[:5]}'
    assert all(torch.isfinite(g).all() for g in gradients(method).values()), 'a gradient that is not finite'
    method.zero_grad()


def check_sum(method, data, transform, batches=24):
    "'loss' is a fixed weighted sum of the losses beside it, fitted over far more batches than there are names."
    method.eval()
    with torch.no_grad(): rows = [{n: float(v) for n, v in forward(method, new_batch(data, transform, 4, k, k))[1].items()} for k in range(batches)]
    parts = [n for n in rows[0] if n != 'loss' and all(np.isfinite(r[n]) for r in rows)]
    assert 0 < len(parts) < batches - 4, f'{len(parts)} losses beside the sum'
    a, b = np.array([[*(r[n] for n in parts), 1.] for r in rows]), np.array([r['loss'] for r in rows])
    assert b.std() > 1e-4, 'one loss for all batches'
    far = np.abs(a @ np.linalg.lstsq(a, b, rcond=None)[0] - b).max() / b.std()
    assert far < 1e-2, f'loss is not a weighted sum of {parts}: {far:.2g} standard deviations away'


def check_no_side_effects(method, batch):
    "Encode and losses change neither the method, nor the batch, nor the features; twice the same."
    method.eval()
    weights, entries = copy.deepcopy(dict(method.state_dict(keep_vars=False))), copy.deepcopy(flat(batch))
    features, losses = forward(method, batch)
    before = {k: v.detach().clone() for k, v in flat(features).items()}
    torch.manual_seed(1)
    method.losses(features, batch, StepState())
    same(before, {k: v.detach() for k, v in flat(features).items()}, 'losses change the features')
    same(weights, dict(method.state_dict()), 'encode or losses change the method')
    same(entries, flat(batch), 'encode or losses change the batch')
    again = forward(method, batch)[1]
    same({k: v.detach() for k, v in losses.items()}, {k: v.detach() for k, v in again.items()}, 'a second time')


def check_chunked(method, batch):
    "Chunks give the gradient and the losses of the whole; who cannot says so."
    if not method.chunkable:
        try: check_chunks(method, 2)
        except ValueError: return
        raise AssertionError('chunks are not refused')
    quiet(method)
    method.zero_grad()
    one = backward_batch(method, batch, StepState(), None)
    whole = gradients(method)
    method.zero_grad()
    two = backward_batch(method, batch, StepState(), 2)
    assert whole and float(one.losses['loss']) == float(one.losses['loss'])
    close(gradients(method), whole, 'gradient of chunks')
    assert abs(float(one.losses['loss'] - two.losses['loss'])) <= 1e-4 * max(1, abs(float(one.losses['loss']))), 'loss of chunks'
    method.zero_grad()


def close(found, wanted, what, tolerance=1e-3):
    assert found.keys() == wanted.keys(), f'{what}: {sorted(found.keys() ^ wanted.keys())[:5]}'
    largest = max(float(w.abs().max()) for w in wanted.values())
    for k, w in wanted.items():
        far = float((found[k] - w).abs().max())
        assert far <= max(tolerance * float(w.abs().max()), 1e-3 * largest), f'{what}: {k} differs by {far:.2g} of {float(w.abs().max()):.2g}'


def stirred(method):
    "Weights and statistics as after some training, so that nothing is what a new method has."
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        for n, p in [*method.named_parameters(), *method.named_buffers()]:
            if p.is_floating_point() and not n.startswith(tuple(method.unsaved)): p += .04 * torch.rand(p.shape, generator=g).to(p.dtype) - .02*(p.requires_grad)
    if method.unsaved: method.renew_unsaved()
    return method.eval()


def told(method, batch, trains=True):
    "What a method says: losses, features, and capabilities of images."
    size = batch['images'].shape[-2:] if 'images' in batch else (8, 8)
    images = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = dict(zip(('features', 'losses'), forward(method, batch))) if trains else {}
        ask = [c for c in ASKED if c in capabilities(method) and (method.name, c) != ('segmenter', 'logits')] # it takes what `features` gave
        return {**out, **{c: getattr(method, c)(images) for c in ask},
                **({'encode_text': method.encode_text(['no effusion', 'a mass'])} if hasattr(method, 'encode_text') else {})}


def check_saved(method, batch, folder, trains=True):
    stirred(method)
    save_pretrained(method, folder)
    again = from_pretrained(folder)
    assert type(again) is type(method), f'{type(again).__name__} comes back'
    left = {k for k in method.state_dict() if k.startswith(tuple(method.unsaved))}
    assert set(load_file(folder/WEIGHTS)) == set(method.state_dict()) - left, 'names of weights'
    a, b = told(method, batch, trains), told(again, batch, trains)
    assert flat(a)
    same(a, b, 'saved and opened')


def train_small(make, data, transform, folder, steps, killed=None, **changes):
    "Three samples a step, a checkpoint every second one; killed by the system at the validation of step `killed`."
    def dies(method, state):
        if killed and state.step >= killed: os.kill(os.getpid(), signal.SIGKILL)
        return {'valid_loss': 1 / (1 + state.step), 'valid_auroc': .5}
    settings = TrainConfig(**dict(epochs=100, max_steps=steps, batch_size=3, lr=1e-3, warmup=1, trackers=(), cpu=True, save_every=2, valid_every=3, ema=.9) | changes)
    train(make(), data, settings, folder, None, transform, dies)


def killed_run(make, data, transform, folder, **changes):
    "Leave a run folder whose process the system killed in its third step."
    child = multiprocessing.get_context('fork').Process(target=partial(train_small, **changes), args=(make, data, transform, folder, 3, 3))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, child.exitcode


def check_same_end(whole, cut):
    (files, rows), (other, others) = contents(whole), contents(cut)
    assert files == other, f'other bits: {[k for k in files if files[k] != other.get(k)]}'
    assert rows == others, 'other metrics'


def check_resumed(make, data, transform, folder):
    "Killed in its third step, and gone on with from other initial weights: the bits of a run that was not."
    train_small(partial(make, 0), data, transform, folder/'whole', 3)
    killed_run(partial(make, 0), data, transform, folder/'cut')
    train_small(partial(make, 1), data, transform, folder/'cut', 3)
    check_same_end(folder/'whole', folder/'cut')


def check_lr_range(method, data, transform):
    "A range test trains, and leaves weights, queues, twins, gradients, modes and generators as they were."
    stirred(method)
    held = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    before, modes, draws = copy.deepcopy({k: v.detach() for k, v in held.items()}), [m.training for m in method.modules()], torch.get_rng_state()
    settings = TrainConfig(epochs=50, batch_size=3, weight_decay=0., cpu=True)
    batch = new_batch(data, transform, 3)
    with torch.random.fork_rng(), torch.no_grad(): said = forward(method, batch)[1]
    found = lr_range_test(method, data, settings, transform, low=1e-5, high=1e-3, points=4, stop=1e9)
    assert len(found.table) == 4 and found.table.loss.nunique() > 1, found.table
    now = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    same(before, {k: v.detach() for k, v in now.items()}, 'the range test left')
    assert all(now[k] is held[k] for k in held), 'a tensor was exchanged'
    assert modes == [m.training for m in method.modules()] and torch.equal(draws, torch.get_rng_state()) and not gradients(method)
    with torch.no_grad(): same(said, forward(method, batch)[1], 'what it says after a range test')


def part_gradient(method, batch):
    "The gradient that this process has, of its part of the batch."
    exchange, quieted = exchange_of(), quiet(method)
    quieted.zero_grad()
    n = batch_size(batch) // exchange.world
    out = backward_batch(method, slice_batch(batch, exchange.rank * n, (exchange.rank + 1) * n), StepState(rank=exchange.rank, world=exchange.world), None, exchange=exchange)
    average_gradients(method.parameters())
    return gradients(method), float(out.losses['loss'])


def check_pair(one, two):
    "What both processes of a pair found is what one finds: name -> (gradients, loss)."
    for found in two:
        for name, (gradient, _) in one.items(): close(found[name][0], gradient, f'{name} in two processes')
    for name, (_, loss) in one.items():
        mean = sum(found[name][1] for found in two) / len(two)
        assert abs(mean - loss) <= 1e-3 * max(1, abs(loss)), f'{name}: loss {mean} in two processes, {loss} in one'


def check_present(method, batch):
    "Where views may be missing, what their pixels hold is of no account: neither the vector, nor loss, gradient or statistics."
    images = batch['images']
    views = images if images.shape[1] > 1 else torch.cat([images, images.flip(-1)], 1)
    here = torch.ones(views.shape[:2], dtype=torch.bool)
    here[1::3], here[1::3, 1], here[2::3, 1] = False, True, False # one view alone; one view missing
    if 'encode_image' in capabilities(method):
        method.eval()
        with torch.no_grad():
            words = [['CC', 'MLO']] * len(views)
            found = [method.encode_image(torch.where(here[:, :, None, None, None], views, fill), here, words) for fill in (0, 200)]
            plain = method.encode_image(torch.where(here[:, :, None, None, None], views, 200), None, words)
            alone = method.encode_image(views[1:2, 1])
        same(found[0], found[1], 'pixels of a missing view reach the vector')
        torch.testing.assert_close(found[0][1], alone[0], **LIKE, msg=lambda m: f'the vector of one view alone: {m}')
        assert not torch.equal(found[1], plain), 'present is not read'
    if images.shape[1] > 1 and reads_views(method):
        full, parts = {**batch, 'present': here, 'rows': present_rows(here)}, []
        for fill in (0., 200.):
            method.train().zero_grad()
            copied = copy.deepcopy(method)
            _, losses = forward(copied, {**full, 'images': torch.where(here[:, :, None, None, None], images.float(), fill)})
            losses['loss'].backward()
            parts.append({'loss': losses['loss'].detach(), **gradients(copied), **dict(copied.named_buffers())})
        same(parts[0], parts[1], 'pixels of a missing view reach the loss')
        all_here = torch.ones_like(here)
        assert float(forward(method, {**batch, 'present': all_here, 'rows': present_rows(all_here)})[1]['loss'].detach()) != float(parts[0]['loss']), 'present is not read'


def reads_views(method): return method.name != FACTOR


def config_of(name, named):
    "The configuration, training settings and options of a recipe as their dataclasses: what does not exist is refused."
    return config_from_dict(method_class(name).config_class, named.config), named.train and config_from_dict(TrainConfig, named.train)


@cache
def all_recipes(name):
    "(recipe's name, recipe) of every recipe of a method and each of their ablations."
    return [pair for key, named in recipes(name).items() for pair in ((key, named), *((f'{key}+{other}', ablated(named, other)) for other in named.ablations))]
