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
from training import Breasts, Pairs, breasts_batch, contents, gradients, quiet, run, small, tiny_mammoclip

from medvl.data.batch import slice_batch
from medvl.methods.base import StepState
from medvl.train.checkpoint import checkpoints, load_checkpoint
from medvl.train.distributed import anywhere, average_gradients, average_statistics, exchange_of, gather_objects, gather_rows, launch, spread_weights
from medvl.train.gradcache import backward_batch
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


def test_another_number_of_processes_is_another_run(tmp_path):
    run(tmp_path)
    with pytest.raises(Exception, match='processes: 1 -> 2'): launch(lambda: run(tmp_path))


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
