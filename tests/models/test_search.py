"""Choosing words: the original's beams, what a beam must find, what may not come, and cache against recomputation."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import golden

from medvl.models.decoder import new_word_stack
from medvl.models.search import SearchConfig, beam_search, check_search, collect, rank_texts, repeated, search, stream

TINY = dict(vocab_size=40, width=32, heads=4, text_layers=1, text_hidden=48, fusion_layers=2, fusion_hidden=64, context=24, positions=32, dropout=0.0)
FORMS = {'joined': dict(joined=True), 'two': {}, 'looking': dict(text_layers=0)}


class Toy:
    "The golden language model: T[word] + src[0] + 0.3 t src[1]."
    def __init__(self, table, src): self.table, self.src, self.t = table, src, 0

    def __call__(self, words):
        out = self.table[words] + self.src[:, 0] + .3 * self.t * self.src[:, 1]
        self.t += 1
        return out

    def choose(self, rows, within=False): self.src = self.src[rows]


@pytest.mark.parametrize('beams, low, high', [(1, 0, 8), (3, 2, 10), (3, 5, 6), (4, 2, 12)])
def test_beams_of_the_original(beams, low, high):
    d = np.load(golden('xvl/beam_search_toy.npz'))
    wanted = json.loads(golden('xvl/beam_search_results.json').read_text()).get(f'beam{beams}_min{low}_max{high}')
    if wanted is None: pytest.skip('this case is not among those handed over')
    c = SearchConfig(beams=beams, rules='reference', min_length=low, max_length=high, length_power=float(d['alpha_length_penalty']))
    toy = Toy(torch.from_numpy(d['T']), torch.from_numpy(d['src']))
    found = beam_search(toy, torch.full((3,), int(d['bos'])), int(d['eos']), c)
    assert [[list(h.tokens) for h in f] for f in found] == wanted['ids']
    for f, scores in zip(found, wanted['scores']): np.testing.assert_allclose([h.score for h in f], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('k', [2, 4, 6])
def test_ranking_of_the_original(k):
    "The first token counts twice in the original; counted once, other answers win."
    d = {n: torch.from_numpy(v) for n, v in np.load(golden('xvl/vqa_rank_answer.npz')).items()}
    read = lambda ids, rows: d['T'][ids] + d['question_states'][rows, :1]
    ids = d['answer_ids']
    which, score = rank_texts(read, 4, ids, (ids != 0).long(), keep=k, first_twice=True)
    assert torch.equal(which, d[f'top{k}_ids'])
    torch.testing.assert_close(score.softmax(-1), d[f'top{k}_probs'], rtol=1e-4, atol=1e-5)
    assert not torch.equal(rank_texts(read, 4, ids, (ids != 0).long())[0], d['top6_ids'])


def stack(form, seed=0):
    torch.manual_seed(seed)
    out = new_word_stack(**{**TINY, **FORMS[form]}).eval()
    with torch.no_grad():
        for p in out.parameters(): p += .1 * torch.randn_like(p)
    return out


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('c', [SearchConfig(max_length=9), SearchConfig(max_length=9, rules='reference'), SearchConfig(beams=5, max_length=9, no_repeat=1),
                               SearchConfig('greedy', max_length=9), SearchConfig('sample', max_length=9, seed=2)], ids=lambda c: f'{c.how}-{c.rules}-{c.beams}')
def test_cache_and_batch_change_nothing(form, c):
    "The same texts with and without the cache, alone and in a batch, whatever ends first."
    model, context, mask = stack(form), torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5, [1] * 5])
    def run(rows, cached=True):
        with torch.no_grad(): return search(model.start(context[rows], mask[rows], cached), torch.full((len(rows),), 2), 3, c, (0, 1, 2, 4), keys=rows)
    whole = run([0, 1, 2, 3])
    for found in (run([0, 1, 2, 3], False), [run([i])[0] for i in range(4)]):
        assert [[h.tokens for h in f] for f in found] == [[h.tokens for h in f] for f in whole]
        assert all(abs(a.score - b.score) < 1e-4 for f, g in zip(found, whole) for a, b in zip(f, g))


class Chain:
    "Logits by the last word."
    def __init__(self, logits): self.logits = logits
    def __call__(self, words): return self.logits[words]
    def choose(self, rows, within=False): pass


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('power', [0., .6, 1.])
def test_a_wide_beam_finds_the_best_text_of_all(seed, power):
    "Every text of at most four tokens counted out."
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)) * 2
    logp, end, first, longest = logits.log_softmax(-1).tolist(), 3, 2, 4
    def every(text=(first,), total=0.):
        for w in range(6):
            longer, t = (*text, w), total + logp[text[-1]][w]
            if w == end or len(longer) == longest + 1: yield longer, t / ((5 + len(longer) - 1) / 6) ** power
            else: yield from every(longer, t)
    want = sorted(every(), key=lambda x: -x[1])[:3]
    found = beam_search(Chain(logits), torch.tensor([first]), end, SearchConfig(beams=300, min_length=0, max_length=longest, length_power=power))[0]
    assert [h.tokens for h in found[:3]] == [t for t, _ in want]
    np.testing.assert_allclose([h.score for h in found[:3]], [s for _, s in want], rtol=1e-4)


@pytest.mark.parametrize('rules', ['standard', 'reference'])
def test_lengths_hold(rules):
    logits = torch.zeros(8, 8)
    logits[:, 3] = 5. # the end is always likeliest
    for low, high in ((0, 1), (1, 3), (4, 4), (3, 9)):
        for h in beam_search(Chain(logits), torch.tensor([2, 2]), 3, SearchConfig(rules=rules, min_length=low, max_length=high))[1]:
            words = [t for t in h.tokens[1:] if t != 3]
            if rules == 'standard': assert low <= len(words) <= high and len(h.tokens) - 1 <= high and h.finished == (h.tokens[-1] == 3)
            else: assert len(h.tokens) - 1 <= high


def test_nothing_is_said_twice():
    logits = torch.full((9, 9), .5)
    logits[:, 5] = 9.
    for how in ('beam', 'greedy'):
        c = SearchConfig(how, no_repeat=2, min_length=7, max_length=7)
        h = search(Chain(logits), torch.tensor([2]), 3, c)[0][0].tokens[1:]
        pairs = list(zip(h, h[1:]))
        assert len(pairs) == len(set(pairs))
    assert repeated(torch.tensor([[5]]), 3, 9).sum() == 0
    once = collect(stream(Chain(logits), torch.tensor([2]), 3, SearchConfig('greedy', repeat_penalty=50., min_length=5, max_length=5)), torch.tensor([2]), 3)[0][0].tokens
    assert len(set(once[1:])) > 2


@pytest.mark.parametrize('changes', [dict(min_length=5, max_length=4), dict(max_length=0, min_length=0), dict(beams=0), dict(how='greed'), dict(rules='paper'), dict(top_k=-1),
                                     dict(temperature=0.), dict(top_p=1.5), dict(length_power=-1.), dict(repeat_penalty=.5), dict(no_repeat=-1)])
def test_what_cannot_be_is_refused(changes):
    with pytest.raises(ValueError): check_search(replace(SearchConfig(), **changes))
