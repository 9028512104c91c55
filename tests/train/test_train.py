"""The loop: learning, options, choosing on validation, failures with names, and nothing left behind."""
import json
import time

import numpy as np
import pytest
import torch
from torch import nn
from training import Breasts, Pairs, Small, run, settings, small, tiny_mammoclip

from medvl.core.errors import DataError
from medvl.data.batch import slice_batch
from medvl.methods.base import StepState, from_pretrained
from medvl.train.average import Average
from medvl.train.checkpoint import checkpoints, load_checkpoint
from medvl.train.checks import broken_rows, guilty
from medvl.train.feed import RunBatches
from medvl.train.loop import train
from medvl.train.machine import training_mode
from medvl.train.optim import lr_scale
from medvl.train.settings import TrainConfig, check_config
from medvl.train.step import Loop, one_step
from medvl.train.validation import blocks, validation_loss

PLAIN = dict(chunk_size=None, accumulate=1, ema=0.0, clip=0.0, save_every=0, valid_every=0)


def weights(method): return torch.cat([p.detach().flatten() for p in method.parameters()])


def test_it_is_the_plain_loop(tmp_path):
    "Without options the loop equals ten lines of torch."
    torch.manual_seed(0)
    data, config = Pairs(), settings(**{**PLAIN, 'epochs': 2})
    theirs = small(drop=0.0)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{'params': decayed, 'weight_decay': 1e-4}, {'params': [p for p in theirs.parameters() if p.ndim < 2], 'weight_decay': 0.0}], fused=True)
    theirs.train()
    for step, keys in enumerate(RunBatches(data, config)):
        for g in optimizer.param_groups: g['lr'] = 3e-2 * lr_scale(step, 12, 2, 'cosine')
        optimizer.zero_grad()
        theirs(data.collate([data[k] for k in keys]))['loss'].backward()
        optimizer.step()
    ours, result = run(tmp_path, small(drop=0.0), data, valid=None, **{**PLAIN, 'epochs': 2})
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)
    assert result.step == 12 and not any(k.startswith('valid') for k in result.history)


def test_the_bar_says_epoch_and_loss(tmp_path, monkeypatch):
    told = []

    class Bar:
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def update(self): pass
        def set_postfix(self, refresh, **said): told.append(said)
    monkeypatch.setattr('medvl.train.loop.progress', lambda **k: Bar())
    run(tmp_path, small(), valid=None, **{**PLAIN, 'epochs': 2})
    assert [t['epoch'] for t in told] == ['1 of 2'] * 6 + ['2 of 2'] * 6 and all(float(t['loss']) > 0 for t in told)


def test_it_learns(tmp_path):
    "Pairs never seen are matched far better than before; chance is log 24."
    method = small(drop=0.0)
    valid = Pairs(24, seed=1)
    before = validation_loss(method, valid, StepState())['valid_loss']
    _, result = run(tmp_path, method, epochs=30, valid=valid)
    assert before > 2.5 and result.best_value < 1.6
    found = from_pretrained(result.best)
    assert validation_loss(found, valid, StepState())['valid_loss'] == pytest.approx(result.best_value, rel=1e-5)
    assert json.loads((result.best/'config.json').read_text())['metrics']['valid_loss'] == pytest.approx(result.best_value)


def test_mammoclip_learns(tmp_path):
    method = tiny_mammoclip(bn_momentum=0.3)
    _, result = run(tmp_path, method, Breasts(20), None, epochs=12, batch_size=10, accumulate=1, chunk_size=5, lr=3e-3, warmup=0, save_every=100, ema=0)
    losses = result.history['loss']
    assert losses.iloc[-4:].mean() < 0.9 * losses.iloc[:4].mean()


def test_accumulation_averages(tmp_path):
    "Two batches a step, by hand, with their own draws."
    a, b = small(drop=0.0).double(), small(drop=0.0).double()
    loop = Loop(a, Pairs(), settings(**{**PLAIN, 'accumulate': 2}), tmp_path)
    training_mode(a)
    batches = [Pairs().collate([Pairs()[0, i] for i in range(k, k + 8)]) for k in (0, 8)]
    out = one_step(loop, batches)
    b.train()
    losses = [b(batch)['loss'] for batch in batches]
    (sum(losses) / 2).backward()
    assert out['loss'] == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-6)
    assert out['grad_norm'] == pytest.approx(float(torch.cat([p.grad.flatten() for p in b.parameters()]).norm()), rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


def test_clipping(tmp_path):
    _, result = run(tmp_path, clip=0.05, epochs=1, optimizer='sgd', momentum=0.0, lr=1.0, weight_decay=0.0, warmup=0, schedule='constant', ema=0.0, max_steps=1)
    moved = (weights(small()) - weights(run(tmp_path, clip=0.05, epochs=1, optimizer='sgd', momentum=0.0, lr=1.0, weight_decay=0.0, warmup=0, schedule='constant',
                                            ema=0.0, max_steps=1)[0])).norm()
    assert result.history.grad_norm.iloc[0] > 0.05 and float(moved) == pytest.approx(0.05, rel=1e-3)


def test_schedule_is_the_one_logged(tmp_path):
    _, result = run(tmp_path, schedule='reference', warmup=4, no_decay=())
    np.testing.assert_allclose(result.history.lr, [3e-2 * lr_scale(t, 18, 4, 'reference') for t in range(18)], rtol=1e-12)
    assert result.history.lr.iloc[0] == 0


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision(tmp_path, precision):
    _, half = run(tmp_path/'half', precision=precision, epochs=10)
    _, full = run(tmp_path/'full', epochs=10)
    assert half.history.loss.iloc[0] == pytest.approx(full.history.loss.iloc[0], rel=0.05) and half.history.loss.iloc[0] != full.history.loss.iloc[0]
    assert half.best_value == pytest.approx(full.best_value, abs=0.3)
    state = load_checkpoint(checkpoints(tmp_path/'half'/'checkpoints')[0])[1]
    assert (state['scaler'].get('scale', 0) > 1) == (precision == 'fp16')


def test_fp16_skips_an_overflow(tmp_path):
    "A scale beyond fp16: the steps are skipped and the scale halved, until gradients are finite."
    loop = Loop(small(), Pairs(), settings(precision='fp16', accumulate=1, schedule='constant', warmup=0), tmp_path)
    loop.scaler._init_scale = 2.0 ** 60
    training_mode(loop.method)
    before, batch = weights(loop.method), Pairs().collate([Pairs()[0, i] for i in range(8)])
    one_step(loop, [batch])
    assert torch.equal(weights(loop.method), before) and loop.scaler.get_scale() == 2.0 ** 59
    for _ in range(60): one_step(loop, [batch])
    assert not torch.equal(weights(loop.method), before)
    assert torch.isfinite(weights(loop.method)).all()


def test_channels_last_and_compile_change_nothing_but_rounding(tmp_path):
    kwargs = dict(epochs=1, accumulate=1, batch_size=8, chunk_size=4, lr=1e-2, optimizer='sgd', clip=0, warmup=0, save_every=100, freeze_bn=True)
    plain, _ = run(tmp_path/'a', tiny_mammoclip(), Breasts(), None, **kwargs)
    last, _ = run(tmp_path/'b', tiny_mammoclip(), Breasts(), None, channels_last=True, **kwargs)
    built, _ = run(tmp_path/'c', tiny_mammoclip(), Breasts(), None, compile='eager', **kwargs)
    assert any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in last.parameters() if p.ndim == 4)
    for other in (last, built): torch.testing.assert_close(weights(other), weights(plain), rtol=1e-3, atol=1e-5)
    assert built.image_encoder._compiled_call_impl is None


def test_freeze_bn(tmp_path):
    frozen, _ = run(tmp_path/'a', freeze_bn=True, valid=None)
    free, _ = run(tmp_path/'b', valid=None)
    assert torch.equal(frozen.image_encoder[1].running_mean, torch.zeros(16)) and frozen.image_encoder[1].num_batches_tracked == 0
    assert free.image_encoder[1].num_batches_tracked == 18 * 2 * 2 and not torch.equal(free.image_encoder[1].running_mean, torch.zeros(16))
    assert not torch.equal(frozen.image_encoder[1].weight, torch.ones(16))


def test_average_by_hand():
    method = small()
    average, kept = Average(method, 0.5), weights(method).clone()
    for step in range(5):
        with torch.no_grad():
            for p in method.parameters(): p.add_(1.0)
        method.image_encoder[1].num_batches_tracked += 3
        average.update(method, step)
        keep = min(0.5, (1 + step) / (10 + step))
        kept = keep * kept + (1 - keep) * weights(method)
    with average.applied(method):
        torch.testing.assert_close(weights(method), kept)
        assert method.image_encoder[1].num_batches_tracked == 15


def test_average_is_validated_and_published(tmp_path):
    method, result = run(tmp_path, ema=0.95)
    published = from_pretrained(result.last)
    assert not torch.equal(weights(published), weights(method))
    shown = validation_loss(published, Pairs(24, seed=1), StepState(seed=0))['valid_loss']
    assert shown == pytest.approx(result.history.valid_loss.dropna().iloc[-1], rel=1e-5)


class Sampled(Small):
    "Records what after_step sees."
    def after_step(self, features, batch, state): self.seen = [*getattr(self, 'seen', []), (len(features['image']), state.step)]


def test_after_step_once_a_step_with_all_rows(tmp_path):
    method = Sampled()
    run(tmp_path, method, valid=None)
    assert method.seen == [(16, s) for s in range(18)]


@pytest.mark.parametrize('keeps', [(), ('images',)])
def test_after_step_sees_the_batches_of_the_step(tmp_path, keeps):
    "All its samples, in order, without pixels unless they are kept; and how long an epoch is."
    class Watching(Small):
        def after_step(self, features, batch, state): self.seen = [*getattr(self, 'seen', []), (batch, features, state)]
    Watching.keeps = keeps
    method = Watching()
    run(tmp_path, method, valid=None, max_steps=2, warmup=0)
    data = Pairs()
    for batch, features, state in method.seen:
        assert ('images' in batch) == bool(keeps) and {'words', 'sample_id', 'text', 'epoch'} <= set(batch)
        assert len(batch['sample_id']) == len(batch['words']) == len(features['image']) == 16 and state.epoch_steps == 3
        for i, name in enumerate(batch['sample_id']): assert torch.equal(batch['words'][i], data[0, int(name[1:])]['words'])
        if keeps: assert batch['images'].shape == (16, 8)


# Choosing

def test_early_stop_and_best(tmp_path):
    values = iter([0.5, 0.7, 0.6, 0.7, 0.65, 0.9])
    method, result = run(tmp_path, small(), valid=None, validate=lambda m, s: {'auroc': next(values)}, monitor='auroc', mode='max', early_stop=3, valid_every=2, ema=0.0)
    assert (result.stopped, result.step, result.best_step, result.best_value) == ('early stop', 10, 4, 0.7)
    assert {4, 8, 10} == {int(p.name[5:]) for p in checkpoints(tmp_path/'checkpoints')}
    best = load_checkpoint(tmp_path/'checkpoints'/'step-00000004')[0]['model']
    assert torch.equal(from_pretrained(result.best).text_encoder.weight, best['text_encoder.weight'])
    assert torch.equal(from_pretrained(result.last).text_encoder.weight, method.text_encoder.weight)
    _, again = run(tmp_path, small(), valid=None, validate=lambda m, s: {'auroc': 1.0}, monitor='auroc', mode='max', early_stop=3, valid_every=2, ema=0.0)
    assert again.step == 10 and again.stopped == 'early stop'


def test_nan_metric_is_never_best(tmp_path):
    values = iter([float('nan'), 0.4, float('nan'), 0.3, 0.2, 0.1])
    _, result = run(tmp_path, valid=None, validate=lambda m, s: {'auroc': next(values)}, monitor='auroc', mode='max', valid_every=3)
    assert result.best_value == 0.4 and result.best_step == 6


@pytest.mark.parametrize('metrics,message', [({'test_auroc': 0.9}, 'test data is for the end'), ({'aurok': 0.9}, "'aurok'")])
def test_refused_metrics(tmp_path, metrics, message):
    with pytest.raises(ValueError, match=message): run(tmp_path, valid=None, validate=lambda m, s: metrics, monitor='auroc')


@pytest.mark.parametrize('changes,message', [
    (dict(monitor='test_loss'), 'never on test data'), (dict(precision='bf8'), "'bf16'"), (dict(schedule='cosin'), "'cosine'"), (dict(epochs=0), 'epochs=0'),
    (dict(lr=float('nan')), 'lr=nan'), (dict(ema=1.0), 'ema=1.0'), (dict(batch_size=64), '64'), (dict(accumulate=9), 'accumulate=9'), (dict(warmup=99), 'warmup=99'),
    (dict(trackers=('tensorbord',)), "'tensorboard'"), (dict(compile='fastest'), 'compile'), (dict(sync_bn=True), 'GPUs'), (dict(chunk_size=0), 'chunk_size=0')])
def test_settings_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message): run(tmp_path, **changes)
    assert not (tmp_path/'metrics.jsonl').exists()


def test_not_chunkable(tmp_path):
    class Whole(Small): chunkable = False
    with pytest.raises(ValueError, match='Whole cannot be chunked'): run(tmp_path, Whole())
    _, result = run(tmp_path, Whole(), chunk_size=None)
    assert result.step == 18 and result.best_value is not None
    check_config(TrainConfig(chunk_size=2), small())


# The validation loss

@pytest.mark.parametrize('batch', [1, 5, 24])
def test_validation_loss_ignores_the_batch_size(batch):
    method, valid = small().double(), Pairs(24, seed=1)
    whole = valid.collate([valid[0, i] for i in range(24)])
    method.eval()
    with torch.no_grad(): full = float(method(whole)['loss'])
    method.train()
    assert validation_loss(method, valid, StepState(), batch, 1000)['valid_loss'] == pytest.approx(full, abs=1e-10)
    halves = [float(method.losses(method.eval().encode(slice_batch(whole, a, a + 12)), None, None)['loss'].detach()) for a in (0, 12)]
    assert validation_loss(method, valid, StepState(), batch, 12)['valid_loss'] == pytest.approx(np.mean(halves), abs=1e-10)


def test_losses_that_draw_are_validated_alike():
    "Their draws have a key of their own: twice the same, whatever the batch size, and behind it the generator goes on."
    class Drawing(Small):
        def losses(self, features, batch, state): return {**super().losses(features, batch, state), 'loss': torch.rand(()), 'drawn': torch.rand(())}
    method, valid = Drawing(), Pairs(24, seed=1)
    found = [validation_loss(method, valid, StepState(step=s, seed=2), b, 12) for s, b in ((0, 3), (5, 24))]
    assert found[0]['valid_drawn'] == found[1]['valid_drawn'] and found[0]['valid_loss'] == found[1]['valid_loss'] != validation_loss(method, valid, StepState(seed=3), 3, 12)['valid_loss']


def test_validation_with_texts_of_different_length():
    "Chunks are padded to different lengths; groups and masks are joined with them."
    method = tiny_mammoclip()
    values = [validation_loss(method, Breasts(9), StepState(), b, 9)['valid_loss'] for b in (1, 4, 9)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_blocks():
    for n in (1, 7, 1023, 1024, 1025, 5000):
        found = blocks(n, 1024)
        assert np.array_equal(np.concatenate(found), np.arange(n)) and max(map(len, found)) <= 1024 and max(map(len, found)) - min(map(len, found)) <= 1


# Failures

@pytest.mark.parametrize('chunk', [None, 4])
def test_nan_sample_is_named(tmp_path, chunk):
    with pytest.raises(DataError, match=r'loss, i2t, t2i not finite: images of sample p017\. .*checkpoints'): run(tmp_path, data=Pairs(nan=17), chunk_size=chunk)
    state = load_checkpoint(checkpoints(tmp_path/'checkpoints')[0])[0]['model'] if checkpoints(tmp_path/'checkpoints') else {}
    assert all(torch.isfinite(v).all() for v in state.values())


def test_nan_in_validation_is_named(tmp_path):
    with pytest.raises(DataError, match='validation: .*sample p003'): run(tmp_path, valid=Pairs(24, nan=3))


def test_empty_report_is_named(tmp_path):
    with pytest.raises(DataError, match='empty report text: sample p009'): run(tmp_path, data=Pairs(empty=9))


@pytest.mark.parametrize('workers', [0, 1])
def test_loader_error_names_the_sample(tmp_path, workers):
    with pytest.raises(DataError, match='sample 17 of epoch 0 cannot be loaded: OSError: image_17.png is truncated'): run(tmp_path, data=Pairs(broken=17), workers=workers)


def test_overflow_of_one_sample_is_found_in_spite_of_batchnorm():
    method, batch = small(), Pairs().collate([Pairs()[0, i] for i in range(8)])
    class Overflows(nn.Module):
        def forward(self, x): return x / (x[:, :1] != batch['images'][5, 0])
    method.image_encoder.insert(0, Overflows())
    method.train()
    assert broken_rows(method.encode(batch), 8) == list(range(8))
    assert guilty(method, batch) == {5: 'features'} and method.training


def test_exploded_weights_are_told_apart(tmp_path):
    with pytest.raises(DataError, match='weights already are not'):
        run(tmp_path, lr=1e38, optimizer='sgd', clip=0, warmup=0, schedule='constant', valid=None, ema=0)


def test_weights_can_be_trained_after_a_failure(tmp_path):
    "The run stops at the bad sample; with the sample mended it is another data set, so it starts in another folder."
    class Mended(Pairs): digest = 'v1'
    bad = Mended(nan=17)
    with pytest.raises(DataError): run(tmp_path, data=bad)
    bad.nan = None
    _, result = run(tmp_path, data=bad)
    assert result.stopped == 'finished'


# Traces

def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, result = run(tmp_path, trackers=('tensorboard',), epochs=2)
    place, = (tmp_path/'tensorboard').iterdir()
    assert place.name.startswith('medvl-') # the project: `project=` gives another
    events = EventAccumulator(str(place))
    events.Reload()
    assert [e.step for e in events.Scalars('loss')] == list(range(1, 7))
    assert events.Scalars('valid_loss')[-1].value == pytest.approx(result.history.valid_loss.iloc[-1], rel=1e-5)


def test_globals_are_left_alone(tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    method = Small()
    torch.manual_seed(123)
    run(tmp_path, method, epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0]) and before[1:] == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    assert all(p.grad is None for p in method.parameters())


def test_result_shows_itself(tmp_path):
    _, result = run(tmp_path)
    assert 'best valid_loss' in repr(result) and '<table>' in result._repr_html_() and str(tmp_path) not in result._repr_html_()
    assert list(result.history.index) == list(range(1, 19)) and result.history.seconds.notna().all()
    assert result.summary()['steps'] == '18 of 18'


def test_log_every(tmp_path):
    _, result = run(tmp_path, log_every=5, valid=None)
    assert list(result.history.index) == [5, 10, 15, 18]


def test_overhead(tmp_path):
    "What the loop adds to a step: a few milliseconds, below 1 % of a step of half a second."
    class Still(Pairs):
        def __init__(self): super().__init__(16); self.samples = [Pairs.__getitem__(self, (0, i)) for i in range(16)]
        def __getitem__(self, key): return self.samples[key[1]]
    config = settings(**{**PLAIN, 'epochs': 150, 'save_every': 1000, 'schedule': 'constant'})
    method, data = small(), Still()
    batch = data.collate([data[0, i] for i in range(8)])
    optimizer = torch.optim.AdamW(method.parameters(), fused=True)
    def plain():
        optimizer.zero_grad(); method(batch)['loss'].backward(); optimizer.step()
    times = []
    for _ in range(150):
        began = time.process_time(); plain(); times.append(time.process_time() - began)
    began = time.process_time()
    train(method, data, config, tmp_path)
    loop_times = (time.process_time() - began) / 300
    added = loop_times - float(np.median(times))
    assert added < 5e-3, f'{1000 * added:.2f} ms a step'


@pytest.mark.parametrize('lr', [1e6, 1e38])
def test_mammoclip_that_diverges_blames_the_weights(tmp_path, lr):
    "Found in review: the samples were blamed."
    from medvl.data.augment.breast_versions import Augment, AugmentConfig
    from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
    from medvl.data.phantom.breast_prepared import prepared_phantom
    from medvl.methods.recipes import new_method, recipe
    named, prepared = recipe('mammoclip', 'smoke'), prepared_phantom(tmp_path/'phantom', 8, (64, 48))
    method = new_method('mammoclip', 'smoke', prepared.manifest.report)
    data = BreastTextDataset(prepared, method.tokenizer, BreastTextConfig(**named.sample_options))
    settings = TrainConfig(max_steps=12, batch_size=4, lr=lr, optimizer='sgd', clip=0, warmup=0, schedule='constant', trackers=(), cpu=True)
    with pytest.raises(DataError, match='weights'):
        train(method, data, settings, tmp_path/'run', transform=Augment(AugmentConfig(**named.augment_options)))
