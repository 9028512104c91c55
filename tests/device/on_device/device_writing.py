"""Decoding and training of what writes on the pretend accelerator: nothing on the wrong device, the CPU's texts, one wait a word."""
import pytest
import torch
from contract import from_recipe, new_batch
from pretend_accelerator import DEVICE, WAITS, Accelerator

from medvl.data.batch import to_device
from medvl.models.decoder import new_word_stack
from medvl.models.search import SearchConfig, search

SEARCHES = [SearchConfig(max_length=10), SearchConfig(max_length=10, rules='reference'), SearchConfig('greedy', max_length=10, no_repeat=2, repeat_penalty=1.3),
            SearchConfig('sample', max_length=10, seed=3, top_k=9, top_p=.9), SearchConfig(max_length=8, min_length=8)]


def stack():
    torch.manual_seed(0)
    out = new_word_stack(40, 32, 4, text_layers=1, fusion_layers=2, text_hidden=48, fusion_hidden=64, context=24, positions=32, dropout=0.).eval()
    with torch.no_grad():
        for p in out.parameters(): p += .1 * torch.randn_like(p)
    return out


@pytest.mark.parametrize('c', SEARCHES, ids=lambda c: f'{c.how}-{c.rules}-{c.min_length}')
@pytest.mark.parametrize('cached', [True, False])
def test_the_same_texts_as_on_the_cpu(c, cached):
    context, mask = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0]])
    def run(device):
        parts = stack().to(device), context.to(device), mask.to(device), torch.full((3,), 2, device=device), torch.tensor([[7, 8], [9, -1], [-1, -1]], device=device)
        before = len(WAITS)
        with torch.no_grad(): return search(parts[0].start(parts[1], parts[2], cached), parts[3], 3, c, (0, 1, 2, 4), parts[4]), len(WAITS) - before
    want, _ = run('cpu')
    with Accelerator():
        found, waits = run(DEVICE)
        if c.rules == 'standard': assert waits <= c.max_length + 19, f'{waits} waits for {c.max_length} words' # one a word, and six for each of the three images that is done
    assert [[h.tokens for h in f] for f in found] == [[h.tokens for h in f] for f in want]
    assert all(abs(a.score - b.score) < 1e-3 for f, g in zip(found, want) for a, b in zip(f, g))


@pytest.mark.parametrize('name', ['writer', 'answerer'])
def test_trains_and_writes_there(name, tmp_path):
    method, data, transform = from_recipe(tmp_path, name, 'smoke')
    batch = new_batch(data, transform, 4)
    images, said = batch['images'][:2], ['is there a nodule?'] * 2 if name == 'answerer' else None
    method.eval()
    want, wanted = method.generate(images, said, max_length=8), method(batch)['loss'].item()
    with Accelerator():
        there = method.to(DEVICE)
        moved = to_device(batch, DEVICE)
        loss = there(moved)['loss']
        loss.backward()
        assert abs(loss.item() - wanted) < 1e-4 and there.generate(moved['images'][:2], said, max_length=8) == want
        if name == 'answerer': assert len(there.answer(moved['images'][:2], said, ['yes', 'no'])) == 2
        if said is None: assert list(there.stream_text(moved['images'][:1], max_length=6))
