"""Two gloo processes against one, over the same samples."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path


import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from training import Breasts, Pairs, breasts_batch, contents, gradients, quiet, run, small, tiny_mammoclip

from medvl.data.batch import present_rows, slice_batch
from medvl.methods.base import Method, StepState
from medvl.core.paths import read_jsonl
from medvl.train.loop import INEXACT
from medvl.train.checkpoint import checkpoints, load_checkpoint
from medvl.train.distributed import anywhere, average_gradients, average_statistics, exchange_of, gather_objects, gather_rows, launch, spread_weights
from medvl.train.gradcache import backward_batch, gathered_batch
from medvl.train.validation import validation_loss


def mammoclip_gradient(dtype, chunk, batch):
    method = quiet(tiny_mammoclip().to(dtype))
    exchange = exchange_of()
    n = 6 // exchange.world
    out = backward_batch(method, slice_batch(batch, exchange.rank * n, (exchange.rank + 1) * n), StepState(), chunk, exchange=exchange)
    average_gradients(method.parameters())
    return gradients(method), out.losses['loss'].item(), {k: v.shape for k, v in out.features.items()}


@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('chunk', [None, 2])
def test_mammoclip_of_two_processes_is_that_of_one(dtype, tolerance, chunk):
    "BatchNorm frozen: the same gradient of every parameter, the temperature too, in both processes; groups of equal reports are gathered."
    batch = breasts_batch(6, double=dtype == torch.float64)
    one, loss, shapes = mammoclip_gradient(dtype, None, batch)
    for two, other, gathered in launch(mammoclip_gradient, dtype, chunk, batch):
        assert other == pytest.approx(loss, rel=tolerance) and gathered == shapes
        assert two.keys() == one.keys()
        for k in one:
            scale = max(1e-3, float(one[k].abs().max()))
            assert float((one[k] - two[k]).abs().max()) <= tolerance * max(1.0, scale), k


class Negatives(Method):
    """A loss over the own rows only, whose negatives come from all rows, as that of image-text matching; or one that every process computes whole.
    Its scale acts in the losses; `rare` is used by the second process alone, `own_loss` is made in `encode`."""
    gathered, gathered_batch, chunkable = ('image', 'text', 'rare'), ('text_group',), True

    def __init__(self, kind='own'):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.image, self.text, self.scale = kind, nn.Linear(8, 4), nn.Linear(4, 4), nn.Parameter(torch.tensor(.3))

    def encode(self, batch):
        image, text = self.image(batch['images']), self.text(batch['words'])
        return {'image': image, 'text': torch.stack([text, text.tanh()], 1).flatten(0, 1), 'rare': image * 2, 'own_loss': (image - text).square().sum(1)}

    def losses(self, features, batch, state):
        image, text = features['image'], features['text'][::2]
        logits, n = self.scale.exp() * image @ text.T, len(image)
        if self.kind == 'whole': return {'loss': F.cross_entropy(logits, torch.arange(n)) + features['own_loss'].mean()}
        own = torch.arange(n)[state.own]
        hard = logits[own].masked_fill(F.one_hot(own, n).bool(), -1e9).argmax(1) # of anybody's rows
        loss = F.softplus((image[own] * (text[hard] - text[own])).sum(1) * self.scale).mean() + features['own_loss'].mean()
        if own[0] > 0: loss = loss + features['rare'].square().mean() # in one process only
        return {'loss': loss, 'first': own[0].float()}


def negatives_batch(): return {**(b := Pairs().collate([Pairs()[0, i] for i in range(6)])), 'images': b['images'].double(), 'words': b['words'].double()}


def negatives_gradient(kind, chunk, counts):
    method, exchange, batch = Negatives(kind).double(), exchange_of(), negatives_batch()
    start = sum(counts[:exchange.rank])
    out = backward_batch(method, slice_batch(batch, start, start + counts[exchange.rank]), StepState(), chunk, exchange=exchange)
    average_gradients(method.parameters())
    return gradients(method), float(out.losses['loss'])


@pytest.mark.parametrize('chunk', [None, 2])
def test_a_loss_over_own_rows_is_the_mean_over_processes(chunk):
    "Neither × world nor lost: the gradient is that of the mean of both processes' losses, computed in one graph."
    method, counts = Negatives().double(), (3, 3)
    losses = []
    for rank in range(2):
        features = method.encode(negatives_batch())
        rows = slice(3 * rank, 3 * rank + 3)
        losses.append(method.losses({**features, 'own_loss': features['own_loss'][rows]}, {}, StepState(rank=rank, world=2, own=rows))['loss'])
    (sum(losses) / 2).backward()
    want = gradients(method)
    assert losses[0] != losses[1]
    for rank, (found, loss) in enumerate(launch(negatives_gradient, 'own', chunk, counts)):
        assert loss == pytest.approx(losses[rank].item(), rel=1e-12) and found.keys() == want.keys()
        for k in want: torch.testing.assert_close(found[k], want[k], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('chunk', [None, 2])
def test_a_whole_loss_is_still_that_of_one_process(chunk):
    want, loss = negatives_gradient('whole', None, (6,))
    for found, _ in launch(negatives_gradient, 'whole', chunk, (3, 3)):
        for k in want: torch.testing.assert_close(found[k], want[k], rtol=1e-10, atol=1e-12)


def test_own_rows_of_unequal_numbers():
    "Two rows a sample and three samples less in one process: `own` counts samples."
    def work():
        method, r = Negatives().double(), dist.get_rank()
        batch, seen = slice_batch(negatives_batch(), 4 * r, 4 + 2 * r), []
        method.losses = lambda features, batch, state: (seen.append((state.own, {k: len(v) for k, v in features.items()})), {'loss': features['image'].sum()})[1]
        backward_batch(method, batch, StepState(), None, exchange=exchange_of())
        return seen[0]
    for rank, (own, sizes) in enumerate(launch(work)):
        assert own == (slice(0, 4), slice(4, 6))[rank] and sizes == {'image': 6, 'text': 12, 'rare': 6, 'own_loss': (4, 2)[rank]}


def test_rows_of_present_views_are_gathered():
    def work():
        class Views(Negatives): gathered_batch = ('present', 'rows')
        r = dist.get_rank()
        present = torch.tensor([(True, False), (True, True), (False, True)])[(slice(0, 2), slice(2, 3))[r]]
        return gathered_batch({'present': present, 'rows': present_rows(present)}, Views(), exchange_of())
    for batch in launch(work): assert batch['rows'].tolist() == [0, 2, 3, 5] == present_rows(batch['present']).tolist()


def test_gather_rows_of_unequal_numbers():
    def work():
        r = dist.get_rank()
        rows, mine = gather_rows(torch.full((1 + 2 * r, 2), float(r)))
        names, own = gather_rows([f'{r}{i}' for i in range(1 + r)])
        return rows, mine, names, own
    (rows, mine, names, own), (_, mine1, _, own1) = launch(work)
    assert rows[:, 0].tolist() == [0, 1, 1, 1] and (mine, mine1) == (slice(0, 1), slice(1, 4))
    assert names == ['00', '10', '11'] and (own, own1) == (slice(0, 1), slice(1, 3))


def test_gradients_statistics_and_flags():
    def work():
        r = dist.get_rank()
        method = small(seed=r)
        spread_weights(method)
        start = method.text_encoder.weight.detach().clone()
        method.scale.grad = torch.tensor(float(r))
        if r == 1: method.text_encoder.weight.grad = torch.ones(6, 4)
        average_gradients(method.parameters())
        method.train()
        method.image_encoder[1].running_mean.fill_(float(r))
        average_statistics(method)
        return start, method.scale.grad, method.text_encoder.weight.grad, method.text_encoder.bias.grad, method.image_encoder[1].running_mean, anywhere(r == 1), gather_objects(r)
    a, b = launch(work)
    for result in (a, b):
        assert torch.equal(result[0], small(seed=0).text_encoder.weight) and result[1] == 0.5 and torch.equal(result[2], torch.full((6, 4), 0.5))
        assert result[3] is None and torch.equal(result[4], torch.full((16,), 0.5)) and result[5] is True and result[6] == [0, 1]


def test_validation_is_shared_and_the_same():
    method, valid = small(), Pairs(23, seed=1)
    one = validation_loss(method, valid, StepState(), 4, 12)
    for two in launch(lambda: validation_loss(method, valid, StepState(), 4, 12)): assert two == pytest.approx(one, rel=1e-6)


SAME = dict(freeze_bn=True, epochs=3, batch_size=8, chunk_size=4, accumulate=2)


def test_a_run_of_two_processes_is_that_of_one(tmp_path):
    "The whole loop, BatchNorm frozen and dropout off: weights, losses, norms and validation agree; rank 0 alone writes."
    _, one = run(tmp_path/'one', small(drop=0.0), **{**SAME, 'batch_size': 16, 'accumulate': 1})
    launch(lambda: str(run(tmp_path/'two', small(drop=0.0), **{**SAME, 'accumulate': 1})[1]))
    a, b = (load_checkpoint(checkpoints(tmp_path/x/'checkpoints')[0])[0]['model'] for x in ('one', 'two'))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)
    _, rows = contents(tmp_path/'two')
    train_rows = [r for r in rows if r['kind'] == 'train']
    assert len(train_rows) == one.step
    for row, loss in zip(train_rows, one.history.loss): assert row['loss'] == pytest.approx(loss, rel=1e-3)


def test_two_processes_resume_exactly(tmp_path):
    "Both processes die in the middle, BatchNorm and dropout on; the resumed pair ends with the bits of the pair that did not."
    class Died(Exception): pass
    def dies(method, state):
        if state.step >= 7: raise Died
        return {}
    kwargs = dict(epochs=4, batch_size=4, chunk_size=2, accumulate=2, save_every=3, valid_every=7)
    launch(lambda: str(run(tmp_path/'whole', **kwargs)[1]))
    with pytest.raises(Exception, match='Died'): launch(lambda: run(tmp_path/'cut', validate=dies, **kwargs))
    assert checkpoints(tmp_path/'cut'/'checkpoints')[0].name == 'step-00000006'
    launch(lambda: str(run(tmp_path/'cut', small(seed=5), **kwargs)[1]))
    assert contents(tmp_path/'cut') == contents(tmp_path/'whole')


def test_nan_in_one_process_stops_both_with_its_name(tmp_path):
    with pytest.raises(Exception, match='images of sample p017'): launch(lambda: run(tmp_path, data=Pairs(nan=17)))


def dies_at(step):
    "Something that stops a run as a kill would."
    def validate(method, state):
        if state.step >= step: raise RuntimeError('Died')
        return {}
    return validate


@pytest.mark.parametrize('first, then', [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_and_says_that_it_is_inexact(tmp_path, first, then, capfd):
    "BatchNorm frozen, random layers off: the whole batch is the same, so the weights agree up to rounding; what is not the same to the bit is said and stored."
    kwargs, sizes = dict(epochs=3, chunk_size=4, accumulate=1, freeze_bn=True, save_every=2, valid_every=3), {1: 16, 2: 8}
    go = lambda n, f: f() if n == 1 else launch(lambda: str(f()), processes=n)
    go(first, lambda: run(tmp_path/'whole', small(drop=0.0), batch_size=sizes[first], **kwargs)[1])
    with pytest.raises(Exception, match='Died'): go(first, lambda: run(tmp_path/'cut', small(drop=0.0), batch_size=sizes[first], validate=dies_at(5), **kwargs)[1])
    assert not (tmp_path/'cut'/INEXACT).exists()
    go(then, lambda: run(tmp_path/'cut', small(seed=5, drop=0.0), batch_size=sizes[first], **kwargs)[1]) # the same settings: the batch is shared anew
    told, = read_jsonl(tmp_path/'cut'/INEXACT)
    assert told['step'] == 4 and told['processes'] == [first, then] and 'inexact: from step 4 on' in capfd.readouterr().err
    a, b = (load_checkpoint(checkpoints(tmp_path/x/'checkpoints')[0]) for x in ('whole', 'cut'))
    assert a[1]['step'] == b[1]['step'] and b[1]['run']['processes'] == then and b[1]['run']['train']['batch_size'] == sizes[then]
    for k in a[0]['model']: torch.testing.assert_close(a[0]['model'][k], b[0]['model'][k], rtol=1e-3, atol=1e-4)


def test_another_whole_batch_is_another_run(tmp_path):
    with pytest.raises(RuntimeError, match='Died'): run(tmp_path, batch_size=8, save_every=2, validate=dies_at(4), valid_every=1)
    with pytest.raises(Exception, match='cannot be shared evenly by 3'): launch(lambda: run(tmp_path, batch_size=8, save_every=2), processes=3)
    with pytest.raises(Exception, match='processes: 1 -> 2'): launch(lambda: run(tmp_path, batch_size=6, save_every=2))


def test_processes_that_were_told_other_things_are_stopped(tmp_path):
    "Two hosts with two folders of data (here with two rates) would train a mixture, and nobody would know."
    with pytest.raises(Exception, match='different data, methods or settings'):
        launch(lambda: run(tmp_path, batch_size=4, accumulate=1, lr=1e-3*(1 + dist.get_rank())))


def other_host(folder, meet, host):
    "What the second host runs."
    launch(lambda: str(run(folder, **json.loads(os.environ['KWARGS']))[1]), processes=1, hosts=2, host=host, meet=meet)


def test_two_hosts_of_one_process_are_two_processes(tmp_path):
    kwargs, meet = dict(epochs=2, batch_size=4, chunk_size=2), f'127.0.0.1:{free_port()}'
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import test_distributed as t; t.other_host(sys.argv[2], sys.argv[3], int(sys.argv[4]))'
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'KWARGS': json.dumps(kwargs), 'PYTHONPATH': os.pathsep.join([*places, os.environ.get('PYTHONPATH', '')])}
    both = [subprocess.Popen([sys.executable, '-c', code, places[1], str(tmp_path/'a'), meet, str(h)], env=env, stderr=subprocess.PIPE, text=True) for h in range(2)]
    ends = [(p.communicate(timeout=200)[1], p.returncode) for p in both]
    assert [code for _, code in ends] == [0, 0], ends
    launch(lambda: str(run(tmp_path/'b', **kwargs)[1]))
    assert contents(tmp_path/'a') == contents(tmp_path/'b')


def test_hosts_must_know_where_to_meet():
    with pytest.raises(ValueError, match='need a place to meet'): launch(print, hosts=2)
    with pytest.raises(ValueError, match='the numbers are 0 to 1'): launch(print, hosts=2, host=2, meet='a:1')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_torchrun(tmp_path):
    "torchrun gives what `launch` gives. (accelerate launch starts several processes only on GPUs, through torchrun's code, or with MPI.)"
    kwargs, script = dict(epochs=2, batch_size=4, chunk_size=2), str(Path(__file__).parents[1]/'training.py')
    command = ['torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={free_port()}', script]
    done = subprocess.run([sys.executable, '-m', *command, str(tmp_path/'a'), json.dumps(kwargs)], capture_output=True, text=True, timeout=100,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    launch(lambda: str(run(tmp_path/'b', **kwargs)[1]))
    assert contents(tmp_path/'a') == contents(tmp_path/'b')


def test_mammoclip_run_of_two(tmp_path):
    kwargs = dict(epochs=1, batch_size=4, chunk_size=2, accumulate=1, lr=1e-3, warmup=0)
    result = launch(lambda: run(tmp_path, tiny_mammoclip(), Breasts(), Breasts(5), **kwargs)[1].summary())
    assert result[0]['steps'] == result[1]['steps'] == '2 of 2' and result[0]['best valid_loss'] == result[1]['best valid_loss']


def test_mammoclip_curve_of_two_is_that_of_one(tmp_path):
    "The real system, BatchNorm frozen, random layers off: the loss curve, step by step, over the same samples."
    def still():
        method = tiny_mammoclip(drop_connect=0.0, dropout=0.0)
        for m in method.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.0
        return method
    kwargs = dict(epochs=3, chunk_size=2, accumulate=1, lr=1e-3, warmup=0, freeze_bn=True)
    _, one = run(tmp_path/'one', still(), Breasts(), Breasts(5), batch_size=8, **kwargs)
    launch(lambda: str(run(tmp_path/'two', still(), Breasts(), Breasts(5), batch_size=4, **kwargs)[1]))
    _, rows = contents(tmp_path/'two')
    two = [r['loss'] for r in rows if r['kind'] == 'train']
    assert len(two) == one.step == 6 and max(two) - min(two) > 1e-3
    assert two == pytest.approx(list(one.history.loss.dropna())[:6], rel=1e-4)
