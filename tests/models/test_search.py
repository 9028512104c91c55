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
