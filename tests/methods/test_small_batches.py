"""A batch of one in a method that compares samples is refused, or warned about; never done with loss 0."""
import warnings

import pytest
import torch
from training import Breasts, Pairs, Small, SmallConfig, run, settings, small, tiny_mammoclip

from medvl.core.errors import DataError
from medvl.data.sampler import EpochBatches
from medvl.methods.base import Method
from medvl.methods.recipes import method_names, new_method, recipe
from medvl.train.checks import check_chunk_norms, check_rows
from medvl.train.loop import train
from medvl.train.plan import plan
from medvl.train.step import Loop

TEXTS = ['no effusion.', 'small effusion.', 'large pneumothorax.']


class Contrast(Small):
    "The tests' small method, which says that it compares."
    least_batch = 2


class LastOne(Pairs):
    "A sampler of its own that keeps what does not fill a batch: the last batch of an epoch has one sample."
    def batches(self, batch_size, seed, rank=0, world=1): return EpochBatches(len(self), batch_size, seed, rank=rank, world=world, drop_last=False)


def contrast(seed=0):
    torch.manual_seed(seed)
    return Contrast()


@pytest.mark.parametrize('name', [m for m in method_names() if recipe(m, 'smoke').train is not None])
def test_every_method_says_what_it_needs(name):
    method = new_method(name, 'smoke', TEXTS)
    contrastive = name in ('mammoclip', 'lovt', 'clip', 'convirt', 'simclr', 'xvl', 'a2i2')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        if contrastive:
            with pytest.raises(DataError, match='has 1 sample .*p7.*tells samples apart and needs at least 2'): check_rows(method, 1, 'a batch', ['p7'])
        else: check_rows(method, 1, 'a batch')
        assert len(said) == (name in ('byol', 'pixelpro'))
        check_rows(method, 2, 'a batch')


def test_lovt_without_global_losses_compares_inside_a_sample():
    method = new_method('lovt', 'smoke', TEXTS, i2t_weight=0.0, t2i_weight=0.0)
    with pytest.warns(UserWarning, match='its recipe means'): check_rows(method, 1, 'a batch')


def test_a_batch_of_one_is_refused_before_the_first_step(tmp_path):
    for go in (lambda: run(tmp_path/'a', contrast(), batch_size=1, chunk_size=None), lambda: plan(contrast(), Pairs(), settings(batch_size=1, chunk_size=None), tmp_path/'a')):
        with pytest.raises(DataError, match='batch_size=1, 1 process.* needs at least 2'): go()
    with pytest.raises(DataError, match='needs at least 2'): train(tiny_mammoclip(), Breasts(), settings(batch_size=1, chunk_size=None), tmp_path/'a')
    assert not list(tmp_path.rglob('metrics.jsonl'))
    run(tmp_path/'b', small(), batch_size=4, max_steps=1, warmup=0, chunk_size=None) # a method that says nothing may


def test_the_last_batch_of_an_epoch_is_looked_at(tmp_path):
    with pytest.raises(DataError, match=r'step 3: a batch has 1 sample \(p0\d\d\)'): run(tmp_path, contrast(), LastOne(17), accumulate=1, valid=None)


def test_processes_count_where_they_gather(tmp_path):
    loop = Loop(contrast(), Pairs(), settings(batch_size=2, chunk_size=None), tmp_path)
    loop.exchange = type('Two', (), dict(world=2))
    assert loop.together(1) == 2
    loop.method = type('Apart', (), dict(gathered=()))
    assert loop.together(1) == 1


@pytest.mark.parametrize('n, samples', [(1, 1024), (5, 1), (3, 2)])
def test_validation_that_compares_nothing_is_refused_at_once(tmp_path, n, samples):
    with pytest.raises(DataError, match='a block of the validation set .* has 1 sample'): run(tmp_path, contrast(), valid=Pairs(n, seed=1), valid_samples=samples)


def test_a_chunk_of_one_is_said():
    norm = torch.nn.BatchNorm1d(3)
    for rows, chunk, says in ((5, 4, True), (4, 1, True), (6, 4, False), (8, 4, False), (1, 1, False), (4, None, False)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            check_chunk_norms(norm, rows, chunk)
        assert bool(said) is says, (rows, chunk)


def test_a_run_without_any_gradient_is_not_done(tmp_path):
    "Whatever the reason: texts that are all alike and masked, frozen weights, a loss that is constant."
    class Still(Small):
        def losses(self, features, batch, state): return {'loss': (features['image'].sum() + features['text'].sum()) * 0}
    with pytest.raises(DataError, match='gradient of every step was exactly 0'): run(tmp_path, Still(), max_steps=2, warmup=0)


def test_supervised_methods_may(tmp_path):
    class Regression(Method):
        config_class = SmallConfig
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(8, 4)
        def encode(self, batch): return {'y': self.encoder(batch['images'])}
        def losses(self, features, batch, state): return {'loss': (features['y'] - batch['words']).square().mean()}
    assert run(tmp_path, Regression(), batch_size=1, max_steps=2, warmup=0, chunk_size=None, valid=None, accumulate=1)[1].stopped == 'finished'
