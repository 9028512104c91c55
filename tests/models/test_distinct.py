"""Texts are encoded once, in passes of similar length, with the same vectors and gradients."""
import time

import pytest
import torch

from medvl.models.distinct import encode_distinct
from medvl.models.text import build_text_encoder


def texts(n=60, longest=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.cat([torch.randint(3, 15, (n - 1,), generator=g), torch.tensor([longest])])
    ids = torch.randint(5, 200, (n, longest), generator=g) * (torch.arange(longest) < lengths[:, None])
    ids[:n // 4] = ids[n // 4:2 * (n // 4)]
    return ids, (ids > 0).long()


@pytest.fixture(scope='module')
def encoder(): return build_text_encoder('tiny', 'bos', vocab_size=200).eval()


@pytest.mark.parametrize('rows', [1, 7, 1000])
def test_the_same_vectors_and_gradients(encoder, rows):
    ids, mask = texts()
    def run(way):
        encoder.zero_grad()
        out = way()
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        return out.detach(), encoder.text_encoder.embeddings.word_embeddings.weight.grad.clone()
    (a, ga), (b, gb) = run(lambda: encoder(ids, mask)), run(lambda: encode_distinct(encoder, ids, mask, rows))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ga, gb, rtol=1e-3, atol=1e-3 * ga.abs().max().item())


def test_each_text_once_and_no_wider_than_needed():
    ids, mask = texts()
    seen = []
    encode_distinct(lambda i, m: seen.append(i.shape) or i[:, :1].float(), ids, mask, 16)
    assert sum(s[0] for s in seen) == len(ids.unique(dim=0)) and [s[1] for s in seen] == sorted(s[1] for s in seen) and seen[0][1] < 15


def test_words_that_only_padding_tells_apart():
    "The same tokens, one of them masked: two texts."
    ids, mask = torch.tensor([[2, 7, 8, 3], [2, 7, 8, 3]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    out = encode_distinct(lambda i, m: (i * m).sum(1, keepdim=True).float(), ids, mask)
    assert out[:, 0].tolist() == [20, 9]


def test_much_faster_than_one_at_a_time(encoder):
    ids, mask = texts(150)
    best = lambda way: min(((begin := time.process_time()), way(), time.process_time() - begin)[2] for _ in range(3))
    with torch.no_grad():
        one = best(lambda: [encoder(i[None, :n], m[None, :n]) for i, m, n in zip(ids, mask, mask.sum(1))])
        assert one / best(lambda: encode_distinct(encoder, ids, mask)) > 3 # five and more on a quiet machine
