"""The losses of A2I2 against the numbers of the original (golden/a2i2), and what must not change them."""
import json

import numpy as np
import pytest
import torch
from golden import golden

from medvl.losses.intra_exam import intra_loss
from medvl.losses.keyword_rank import pair_values, rank_loss, shared_words, word_numbers
from medvl.losses.reconstruction import reconstruction_terms
from medvl.losses.region_words import exam_loss, exam_similarity, global_similarity, local_similarity, word_attention

KEYWORDS = {'distinct': ['mass left birads5 malignant', 'mass left birads2', 'calcification right birads5'], 'tie': ['mass left', 'mass right', 'cyst'], 'none': ['a', 'b', 'c']}


def arrays(name):
    z = np.load(golden(f'a2i2/{name}'))
    return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}


def near(a, b): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)


def ranked(similarity, words): return rank_loss(similarity, shared_words(word_numbers(words), symmetric=False), symmetric=False)


def cases(a):
    "Keyword strings of the cases whose strings are known."
    return {c: k for c, k in KEYWORDS.items() if f'{c}__c2f' in a}


def test_attention():
    a = arrays('attention_fn.npz')
    near(torch.nn.functional.cosine_similarity(a['cos_x1'], a['cos_x2'], eps=1e-8), a['cos'])
    for temperature, suffix in ((float(a['temp1']), ''), (1., '_temp1_1')):
        query, context = a['query'].requires_grad_(), a['context'].requires_grad_()
        attention, seen = word_attention(context.flatten(2).mT, query.mT, None, temperature)
        near(seen.mT, a[f'weighted{suffix}'])
        near(attention.unflatten(2, context.shape[2:]), a[f'attn{suffix}'])
        if suffix: continue
        weighted = seen.mT
        g = torch.autograd.grad((weighted * torch.linspace(-1, 1, weighted.numel()).view(weighted.shape)).sum(), [query, context])
        near(g[0], a['grad_query_of_weighted_dot_linspace'])
        near(g[1], a['grad_context'])


def local_case(a, aggregation='sum', leaf=False):
    "The reference's 12 images and 12 repeated texts as 3 exams of 4 views and 3 reports."
    image, words = a['img_local'].clone().requires_grad_(leaf), a['words'].clone().requires_grad_(leaf)
    lengths = a['cap_lens'].view(3, 4)[:, 0]
    assert torch.equal(lengths[:, None].expand(3, 4).flatten(), a['cap_lens'].flatten())
    text = words.view(3, 4, *words.shape[1:])[:, 0].mT
    mask = torch.arange(text.shape[1]) < lengths[:, None]
    S = local_similarity(image.flatten(2).mT, text, mask, tuple(a['temps'].tolist()), aggregation)
    return image, words, S, exam_similarity(S.unflatten(0, (3, 4)))


def test_local_loss():
    a = arrays('local_loss.npz')
    image, words, S, exams = local_case(a, leaf=True)
    near(S.repeat_interleave(4, 1), a['similarities_12x12'])
    near(exams, a['similarities_3x3'])
    losses = exam_loss(exams)
    for case, keywords in cases(a).items():
        near(losses[0], a[f'{case}__loss0'].reshape(()))
        near(losses[1], a[f'{case}__loss1'].reshape(()))
        near(ranked(exams, keywords), a[f'{case}__c2f'].reshape(()))
    g = torch.autograd.grad(losses[0] + losses[1] + .001 * ranked(exams, KEYWORDS['distinct']), [image, words])
    near(g[0], a['grad_img_local'])
    near(g[1].view(3, 4, *words.shape[1:])[:, 0], a['grad_words'].view(3, 4, *words.shape[1:]).sum(1)) # a report stands once
    mean = exam_loss(local_case(a, 'mean')[3])
    near(mean[0], a['mean_agg__loss0'].reshape(()))
    near(mean[1], a['mean_agg__loss1'].reshape(()))
    near(ranked(local_case(a, 'mean')[3], KEYWORDS['distinct']), a['mean_agg__c2f'].reshape(()))
    for i in range(12):
        n = int(a['cap_lens'][i])
        attention, _ = word_attention(a['img_local'][i:i + 1].flatten(2).mT, a['words'][i:i + 1, :, :n].mT, None, float(a['temps'][0]))
        near(attention.unflatten(2, (4, 4)), a[f'att_{i}'])


def test_global_loss():
    a = arrays('global_loss.npz')
    for case, keywords in cases(a).items():
        image, text = a['img'].clone().requires_grad_(), a['txt'].clone().requires_grad_()
        S = exam_similarity(global_similarity(image.view(3, 4, -1), text.view(3, 4, -1)[:, 0], float(a['temp3'])))
        losses, c2f = exam_loss(S), ranked(S, keywords)
        near(losses[0], a[f'{case}__loss0'].reshape(()))
        near(losses[1], a[f'{case}__loss1'].reshape(()))
        near(c2f, a[f'{case}__c2f'].reshape(()))
        g = torch.autograd.grad(losses[0] + losses[1] + .001 * c2f, [image, text])
        near(g[0], a[f'{case}__grad_img'])
        near(g[1].view(3, 4, -1)[:, 0], a[f'{case}__grad_txt'].view(3, 4, -1).sum(1))
    texts = a['txt_all_different'].view(3, 4, -1) # texts that differ within an exam: blocks of 4×4
    cosines = torch.nn.functional.cosine_similarity(a['img'][:, None], texts.flatten(0, 1)[None], dim=-1)
    near(exam_similarity(global_similarity(a['img'].view(3, 4, -1), texts)), 10 * cosines.view(3, 4, 3, 4).mean((1, 3)))


def test_exams_without_keywords():
    "The case `empty` does not tell its strings; one without words ties with all others, and exactly that order gives its number."
    a = arrays('global_loss.npz')
    S = exam_similarity(global_similarity(a['img'].view(3, 4, -1), a['txt'].view(3, 4, -1)[:, 0], float(a['temp3'])))
    found = {i: float(ranked(S, ['' if k == i else 'mass left' for k in range(3)])) for i in range(3)}
    assert sum(abs(v - float(a['empty__c2f'])) < 1e-4 for v in found.values()) == 1, found
    assert float(ranked(S, ['', '', ''])) == 0


def test_keyword_ranks():
    told = json.loads(golden('a2i2/keyword_rank.json').read_text())
    S = torch.tensor(told['sims'], dtype=torch.float64)
    s = pair_values(S)
    for case in told['cases'].values():
        r = pair_values(shared_words(word_numbers(case['keywords']), symmetric=False), symmetric=False)
        assert r.argsort(stable=True).tolist() == case['argsort']
        groups = [s[r == level].tolist() for level in r.unique().tolist()]
        for ours, theirs in zip(groups, case['groups_low_to_high'], strict=True): assert sorted(ours) == pytest.approx(sorted(theirs), rel=1e-5)


def test_intra_loss():
    a = arrays('intra_loss.npz')
    for name, grad, value in (('img_global', 'grad_global', 'inner_global'), ('img_local', 'grad_local', 'inner_local')):
        x = a[name].clone().requires_grad_()
        views = x.view(3, 2, 2, *x.shape[1:]) # exam, breast, CC and MLO
        loss = intra_loss(views[:, :, 0].flatten(0, 1), views[:, :, 1].flatten(0, 1), None, None, float(a['temp3']))
        near(loss, a[value].reshape(()))
        near(torch.autograd.grad(loss, x)[0], a[grad])


def test_reconstruction():
    a = arrays('reconstruction.npz')
    m, y = a['m'].clone().requires_grad_(), a['y'].clone().requires_grad_()
    rec, rough = (x.mean() for x in reconstruction_terms(m, y, a['images'], a['ato']))
    near(rec, a['rec'].reshape(()))
    near(rough, a['blur'].reshape(()))
    near(rec + .005 * rough, a['rec_total'].reshape(()))
    g = torch.autograd.grad(rec + .005 * rough, [m, y])
    near(g[0], a['grad_m'])
    near(g[1], a['grad_y'])
