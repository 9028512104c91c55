"""GradCache: equal to the whole batch (deterministic networks) and to the same chunks in one graph (stochastic ones), in float64."""
import pytest
import torch
from torch import nn
from training import Pairs, Small, breasts_batch, gradients, quiet, small, tiny_mammoclip

from medvl.core.seed import key_of
from medvl.data.batch import slice_batch
from medvl.methods.base import Method, StepState
from medvl.train.gradcache import backward_batch, join, seed_chunk, statistics_kept

STATE = StepState(step=3, total_steps=10, seed=1)


def pairs_batch(n=8): return Pairs().collate([Pairs()[0, i] for i in range(n)])


def chunked(method, batch, size, **kwargs):
    method.zero_grad()
    out = backward_batch(method, batch, STATE, size, **kwargs)
    return gradients(method), out


def one_graph(method, batch, size, n):
    "The same chunks in one graph, with the same draws."
    method.zero_grad()
    found = []
    for i, start in enumerate(range(0, n, size)):
        seed_chunk(STATE, 0, i)
        found.append(method.encode(slice_batch(batch, start, min(start + size, n))))
    losses = method.losses(join(found), batch, STATE)
    losses['loss'].backward()
    return gradients(method), losses


def same(a, b, tolerance=1e-10):
    assert a.keys() == b.keys()
    for k in a:
        scale = max(1.0, float(b[k].abs().max()))
        assert float((a[k] - b[k]).abs().max()) <= tolerance * scale, k


@pytest.mark.parametrize('size', [1, 2, 3, 4, 6])
def test_mammoclip_equals_the_full_batch(size):
    "Float64, BatchNorm frozen, stochastic layers off: any chunk size gives the gradient of the whole batch."
    method, batch = quiet(tiny_mammoclip().double()), breasts_batch(6)
    method.zero_grad()
    losses = method(batch, STATE)
    losses['loss'].backward()
    whole = gradients(method)
    found, out = chunked(method, batch, size)
    same(found, whole)
    assert float(out.losses['loss']) == pytest.approx(losses['loss'].item(), abs=1e-12)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('size', [2, 4])
def test_mammoclip_equals_its_chunks_in_one_graph(size, checkpointing):
    "Float64, BatchNorm and drop-connect and dropout on: the same chunks in one graph; running statistics updated once."
    options = dict(drop_connect=0.4, dropout=0.3, projection='mlp', image_checkpointing=checkpointing)
    a, b, batch = tiny_mammoclip(**options).double().train(), tiny_mammoclip(**options).double().train(), breasts_batch(6)
    found, out = chunked(a, batch, size)
    whole, losses = one_graph(b, batch, size, 6)
    same(found, whole)
    chunks = -(-6 // size)
    for (name, x), y in zip(a.named_buffers(), b.buffers()):
        if name.endswith('num_batches_tracked'): assert x == y == chunks
        else: assert torch.equal(x, y), name
    other, _ = chunked(tiny_mammoclip(**options).double().train(), batch, 6)
    assert any((other[k] - found[k]).abs().max() > 1e-6 for k in found), 'BatchNorm in chunks must differ from the full batch'


def test_stochastic_layers_really_draw():
    batch, state = pairs_batch(), StepState(step=4, total_steps=10, seed=1)
    a, _ = chunked(small(drop=0.5).double(), batch, 2)
    other = small(drop=0.5).double()
    backward_batch(other, batch, state, 2)
    assert any(not torch.equal(a[k], g) for k, g in gradients(other).items()), 'another step must draw other numbers'
    again, _ = chunked(small(drop=0.5).double(), batch, 2)
    assert all(torch.equal(a[k], again[k]) for k in a)


def test_two_passes_without_the_guard_would_differ():
    "The test above can fail: without the guard the statistics move twice."
    norm, x = nn.BatchNorm1d(3), torch.randn(5, 3)
    norm(x)
    once = norm.running_mean.clone()
    with statistics_kept(norm): norm(x)
    assert torch.equal(norm.running_mean, once) and norm.num_batches_tracked == 1
    norm(x)
    assert not torch.equal(norm.running_mean, once)


def test_the_guard_is_undone_by_an_error():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError), statistics_kept(norm): raise RuntimeError
    assert norm.track_running_stats


class Odd(Method):
    "Two rows a sample, a scalar feature with a gradient, an integer feature, and one that the loss does not use."
    chunkable = True

    def __init__(self):
        super().__init__()
        self.image_encoder, self.temperature, self.idle = nn.Linear(8, 4), nn.Parameter(torch.tensor(0.5)), nn.Linear(8, 2)

    def encode(self, batch):
        x = self.image_encoder(batch['images'].double())
        return {'rows': torch.stack([x, 2 * x], 1).flatten(0, 1), 'scalar': self.temperature ** 2, 'number': torch.arange(len(x)), 'idle': self.idle(batch['images'].double())}

    def losses(self, features, batch, state):
        assert len(features['number']) == len(batch['sample_id'])
        return {'loss': (features['rows'] @ features['rows'].T * features['scalar']).logsumexp(1).mean()}


@pytest.mark.parametrize('size', [1, 3, 8])
def test_odd_features(size):
    method, batch = Odd().double(), pairs_batch()
    whole, _ = one_graph(method, batch, 8, 8)
    found, _ = chunked(method, batch, size)
    same(found, whole)


class Masked(Small):
    "A loss of every sample alone is made in `encode`, where its text is drawn; the losses draw too."
    def encode(self, batch):
        f = super().encode(batch)
        return {**f, 'reconstruction': (self.image_encoder(batch['images'].to(f['text'].dtype)) - f['text'].detach()).square().mean(1)}

    def losses(self, features, batch, state):
        out = super().losses(features, batch, state)
        drawn = torch.rand(2)
        return {**out, 'loss': out['loss'] + features['reconstruction'].mean() + drawn[0] * features['image'].sum() / 9, 'drawn': drawn[1]}


@pytest.mark.parametrize('size', [1, 3, 8])
def test_a_loss_made_in_encode_is_the_same_whole_and_in_chunks(size):
    torch.manual_seed(0)
    method, batch = quiet(Masked().double()), pairs_batch()
    whole, a = chunked(method, batch, None)
    found, b = chunked(method, batch, size)
    same(found, whole)
    assert float(a.losses['loss']) == pytest.approx(float(b.losses['loss']), abs=1e-12) and a.losses['drawn'] == b.losses['drawn']
    without, _ = chunked(quiet(small().double()), batch, size)
    assert any((without[k] - found[k]).abs().max() > 1e-3 for k in without)


def test_losses_draw_under_a_key_of_their_own():
    "Whatever was drawn before, and in how many chunks; another step, rank or micro-batch draws other numbers."
    def drawn(size=None, micro=0, **changes):
        torch.manual_seed(123)
        torch.rand(5)
        return float(backward_batch(Masked().double(), pairs_batch(), StepState(**{**dict(step=3, seed=1), **changes}), size, micro=micro).losses['drawn'])
    assert drawn() == drawn(2) == drawn(3)
    assert len({drawn(), drawn(micro=1), drawn(step=4), drawn(seed=2), drawn(rank=1)}) == 5
    torch.manual_seed(key_of(1, 'losses', 3, 0, 0))
    want = float(torch.rand(2)[1])
    assert drawn() == want


def test_feature_without_rows_for_each_sample_is_refused():
    class Wrong(Odd):
        def encode(self, batch): return {'rows': self.image_encoder(batch['images'].double()).repeat(2, 1)[:-1]}
        def losses(self, features, batch, state): return {'loss': features['rows'].square().sum()}
    with pytest.raises(ValueError, match="'rows' has .* rows for 8 samples"): backward_batch(Wrong().double(), pairs_batch(), STATE, 3)


def test_scale_and_accumulation():
    "Halved gradients of two batches add up to the gradient of the mean."
    method, a, b = quiet(small().double()), pairs_batch(8), slice_batch(Pairs().collate([Pairs()[1, i] for i in range(8)]), 0, 8)
    method.zero_grad()
    for micro, batch in enumerate((a, b)): backward_batch(method, batch, STATE, 4, scale=0.5, micro=micro)
    found = gradients(method)
    method.zero_grad()
    ((method(a, STATE)['loss'] + method(b, STATE)['loss']) / 2).backward()
    same(found, gradients(method))


def test_losses_are_float32_under_bf16():
    kinds = []
    class Watch(type(small())):
        def losses(self, features, batch, state):
            kinds.append((features['image'].dtype, torch.is_autocast_enabled('cpu')))
            return super().losses(features, batch, state)
        def encode(self, batch): return {k: v.bfloat16() for k, v in super().encode(batch).items()}
    method = Watch()
    whole = backward_batch(method, pairs_batch(), STATE, 4, autocast=lambda: torch.autocast('cpu', torch.bfloat16))
    assert kinds == [(torch.float32, False)] and all(torch.isfinite(g).all() for g in gradients(method).values())
    assert whole.losses['loss'].dtype == torch.float32
    Watch.autocast_losses = True
    backward_batch(method, pairs_batch(), STATE, 4, autocast=lambda: torch.autocast('cpu', torch.bfloat16))
    assert kinds[1] == (torch.float32, True)


def test_augmentation_in_chunks_is_that_of_the_batch():
    "Draws are keyed by sample, so both passes and all chunk sizes augment alike."
    from medvl.data.augment.breast_versions import Augment
    augment, method, batch = Augment(affine=1.0, elastic=1.0), quiet(tiny_mammoclip().double()), breasts_batch(4, double=False)
    double = lambda b: {**b, 'images': b['images'].double()}
    prepare = lambda b: double(augment(b, 5, 2))
    whole, _ = chunked(method, batch, None, prepare=prepare)
    found, _ = chunked(method, batch, 2, prepare=prepare)
    same(found, whole)
    plain, _ = chunked(method, batch, 2, prepare=double)
    assert any((plain[k] - found[k]).abs().max() > 1e-8 for k in found)


@pytest.mark.parametrize('size,message', [(0, 'at least 1'), (2, 'chunkable=False')])
def test_refusals(size, message):
    method = small()
    method.chunkable = size == 0
    with pytest.raises(ValueError, match=message): backward_batch(method, pairs_batch(), STATE, size)


def test_less_memory_is_kept():
    "Bytes saved for the backward pass: about those of one chunk."
    def saved(size):
        alive, peak = [0], [0]
        class Held:
            def __init__(self, t): self.t = t; alive[0] += t.numel(); peak[0] = max(peak[0], alive[0])
            def __del__(self): alive[0] -= self.t.numel()
        method = tiny_mammoclip()
        method.train()
        own = {p.data_ptr() for p in method.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t if t.data_ptr() in own else Held(t), lambda h: h.t if isinstance(h, Held) else h):
            backward_batch(method, breasts_batch(8, double=False), STATE, size)
        return peak[0]
    assert saved(1) < saved(8) / 5
