"""Clipping by names, a plateau with a mode, empty texts that a dataset allows: settings and what they do."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from training import Pairs, run, settings, small

from medvl.core.errors import DataError
from medvl.train.loop import keep_if_best
from medvl.train.optim import Plateau
from medvl.train.settings import FREE, TrainConfig, check_same_run, fingerprint
from medvl.train.step import Loop, one_step
from medvl.train.machine import training_mode

ONE = dict(epochs=1, optimizer='sgd', momentum=0.0, lr=1.0, weight_decay=0.0, warmup=0, schedule='constant', ema=0.0, max_steps=1, clip=0.0, valid=None)


def moved(folder, **limits):
    "How far each tensor of the small method moved in one step of plain gradient descent."
    before = dict(small().named_parameters())
    after, result = run(folder, small(), **{**ONE, **limits})
    return {n: float((p - before[n]).norm().detach()) for n, p in after.named_parameters()}, result.history.grad_norm.iloc[0]


def test_groups_and_tensors_are_clipped(tmp_path):
    free, norm = moved(tmp_path/'free')
    assert norm == pytest.approx(np.linalg.norm(list(free.values())), rel=1e-4)
    found, same = moved(tmp_path/'names', clip_names={'image_encoder': .02, 'scale': 1e-4})
    image = [v for k, v in found.items() if k.startswith('image')]
    assert same == norm, 'the norm in the log is that before clipping'
    assert np.linalg.norm(image) == pytest.approx(.02, rel=1e-3) and found['scale'] == pytest.approx(1e-4, rel=1e-2)
    assert found['text_encoder.weight'] == pytest.approx(free['text_encoder.weight'])
    whole = [free[k] for k in found if k.startswith('image')]
    assert list(np.array(image) / np.linalg.norm(image)) == pytest.approx(list(whole / np.linalg.norm(whole)), rel=1e-2, abs=1e-6), 'the direction stays'
    each, _ = moved(tmp_path/'each', clip_each={'image_encoder': .01})
    for k, v in each.items(): assert v == pytest.approx(min(free[k], .01) if k.startswith('image') else free[k], rel=1e-3, abs=1e-7)
    both, _ = moved(tmp_path/'both', clip_each={'*': .01}, clip=.015)
    assert np.linalg.norm(list(both.values())) == pytest.approx(.015, rel=1e-3)


@pytest.mark.parametrize('changes, message', [(dict(clip_names={'text': 1.0}), "left for 'text'"), (dict(clip_each={'*': 0.0}), 'above 0'), (dict(plateau_mode='up'), 'plateau_mode')])
def test_limits_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message): run(tmp_path, **changes)


class Run:
    "What `judge` reads of a loop."
    first, step, best, bad = False, 1, None, 0
    def __init__(self, **changes):
        self.config = TrainConfig(schedule='plateau', monitor='valid_auroc', mode='max', **changes)
        self.plateau = Plateau(self.config.plateau_factor, self.config.plateau_patience)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 3))
@examples(max_examples=60, deadline=None)
def test_a_share_that_should_rise_lowers_the_rate_as_what_it_lacks_did(values, patience):
    "The rates are those of `valid_auroc_missed`, so runs of before go on as they were; the memory is the same too."
    now, before = Run(plateau_monitor='valid_auroc', plateau_mode='max', plateau_patience=patience), Plateau(patience=patience)
    for value in values:
        keep_if_best(now, {'valid_auroc': value})
        assert before.see(1 - value) == now.plateau.scale
    assert now.plateau.state() == before.state()


def test_the_old_name_is_the_new_setting():
    old, new = TrainConfig(schedule='plateau', plateau_monitor='valid_auroc_missed'), TrainConfig(schedule='plateau', plateau_monitor='valid_auroc', plateau_mode='max')
    assert old == new
    class Named: name, config = 'toy', None
    stored = fingerprint(new, Named, 'ab')
    stored['train'] = {k: v for k, v in stored['train'].items() if k not in ('plateau_mode', 'clip_names', 'clip_each')} | {'plateau_monitor': 'valid_auroc_missed'}
    check_same_run(stored, fingerprint(new, Named, 'ab'))
    with pytest.raises(DataError, match='plateau_mode'): check_same_run(stored, fingerprint(TrainConfig(schedule='plateau', plateau_monitor='valid_auroc'), Named, 'ab'))
    with pytest.raises(DataError, match='clip_names'): check_same_run(stored, fingerprint(TrainConfig(**{**new.__dict__, 'clip_names': {'a': 1.0}}), Named, 'ab'))
    assert 'clip_names' not in FREE


def test_a_run_of_before_knows_its_augmentation():
    "What makes versions was called MultiView when older runs began; they go on."
    from medvl.data.augment.chest_versions import MultiVersion
    class Named: name, config = 'toy', None
    new = fingerprint(TrainConfig(), Named, 'ab', transform=MultiVersion('simclr'))
    check_same_run({**new, 'transform': {'name': 'MultiView'}}, new)
    with pytest.raises(DataError, match='transform'): check_same_run({**new, 'transform': {'name': 'Augment'}}, new)


def test_a_dataset_says_whether_texts_may_be_empty(tmp_path):
    data = Pairs(empty=9)
    with pytest.raises(DataError, match='empty report text: sample p009'): run(tmp_path/'a', data=data)
    data.allows_empty_text = True
    assert run(tmp_path/'b', data=data)[1].stopped == 'finished'
    kept = Pairs(empty=9)
    kept.config = type('Text', (), dict(empty='keep')) # as datasets said it before
    assert run(tmp_path/'c', data=kept)[1].stopped == 'finished'


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_bad_step_changes_nothing(tmp_path, accumulate):
    "The loss is read after the backward pass: still before any weight, moment or average is touched."
    data = Pairs(nan=3)
    loop = Loop(small(), data, settings(accumulate=accumulate, valid_every=0), tmp_path)
    training_mode(loop.method)
    before = {k: v.clone() for k, v in loop.method.state_dict().items() if 'running' not in k and 'tracked' not in k}
    batches = [data.collate([data[0, i] for i in rows]) for rows in (range(8, 16), range(8))[-accumulate:]]
    with pytest.raises(DataError, match=r'step 1: loss, i2t, t2i not finite: images of sample p003\.'): one_step(loop, batches)
    assert all(torch.equal(v, loop.method.state_dict()[k]) for k, v in before.items())
    assert loop.step == 0 and not loop.optimizer.state and all(p.grad is None for p in loop.trainable)
    assert one_step(loop, [data.collate([data[0, i] for i in range(8, 16)])] * accumulate)['loss'] > 0
