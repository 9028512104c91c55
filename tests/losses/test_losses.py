"""Losses against the reference's numbers, brute-force loops, and properties."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.losses.classification import balance, classification_loss, combine_losses
from medvl.losses.contrastive import (DUPLICATES, breast_clip_contrastive_loss, breast_clip_loss, contrastive_terms, row_loss, scale_of,
                                      shared_reports)


@pytest.fixture(scope='module')
def z(): return np.load(golden('mammoclip/losses.npz'))


def case(z, c, grad=False):
    t = [torch.from_numpy(z[f'c{c}_{n}']).clone().requires_grad_(grad) for n in ('image', 'image_view', 'text', 'text2')]
    return t, torch.stack(t[:2], 1), torch.stack(t[2:], 1)


def test_all_144_rows_of_the_full_loss(z):
    for c, ls, i2i, t2t, train, scale, loss, *terms in z['full_rows']:
        _, image, text = case(z, int(c))
        out = breast_clip_loss(image, text, scale, i2i, t2t, ls, training=bool(train))
        assert out['loss'].item() == pytest.approx(loss, rel=1e-5)
        if train:
            for name, value in zip(('i2t', 't2i', 'i2i', 't2t'), terms): assert out[name].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize('c', [0, 1])
def test_default_loss_and_all_gradients(z, c):
    leaves, image, text = case(z, c, grad=True)
    s = torch.tensor(1 / .07, requires_grad=True)  # the file's gradient is the one by the scale, not by its logarithm
    loss = breast_clip_loss(image, text, s)['loss']
    loss.backward()
    assert loss.item() == pytest.approx(z[f'c{c}_default_loss'].item(), rel=1e-5)
    for leaf, name in zip(leaves, ('image', 'image_view', 'text', 'text2')):
        want = torch.from_numpy(z[f'c{c}_grad_{name}'])
        torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert s.grad.item() == pytest.approx(z[f'c{c}_grad_logit_scale'].item(), rel=1e-5)


@pytest.mark.parametrize('c', [0, 1])
def test_contrastive_rows(z, c):
    _, image, text = case(z, c)
    for ls, train, scale, loss, i2t, t2i in z[f'c{c}_contrastive_rows']:
        out = breast_clip_contrastive_loss(image[:, :1], text[:, :1], scale, label_smoothing=ls, training=bool(train))
        assert out['loss'].item() == pytest.approx(loss, rel=1e-5)
        if not math.isnan(i2t): assert (out['i2t'].item(), out['t2i'].item()) == pytest.approx((i2t, t2i), rel=1e-5)


def test_two_ranks(z):
    _, image, text = case(z, 0)
    ranks = [breast_clip_loss(image, text, 1 / .07, training=False, rows=r)['loss'].item() for r in ((0, 2), (2, 4))]
    assert ranks == pytest.approx(z['two_rank_loss_per_rank'].tolist(), rel=1e-5)
    assert sum(ranks) / 2 == pytest.approx(breast_clip_loss(image, text, 1 / .07)['loss'].item(), rel=1e-5)


def test_classification_and_combined(z):
    pred, target = torch.from_numpy(z['cls_pred']), torch.from_numpy(z['cls_target'])
    cls = classification_loss(pred, target, 'negative')
    assert cls.item() == pytest.approx(z['cls_loss'].item(), rel=1e-5)
    _, image, text = case(z, 0)
    out = combine_losses({'contrastive': (.7, lambda: breast_clip_loss(image, text, 1 / .07, training=False)), 'classification': (.3, cls)})
    for k, name in (('loss', 'combined_total'), ('contrastive', 'combined_contrastive'), ('classification', 'combined_classification')):
        assert out[k].item() == pytest.approx(z[name].item(), rel=1e-5)


def unit_rows(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def brute(image, text, scale, smoothing, group, how):
    "Every term, one number at a time."
    n = len(image)
    same = [[any(a == b for a in group[i].tolist() for b in group[j].tolist()) for j in range(n)] for i in range(n)]

    def ce(A, B, e, shared):
        total = 0.
        for i in range(n):
            keep = [j for j in range(n) if not (shared and how == 'mask' and same[i][j] and j != i)]
            own = [j for j in range(n) if j == i or (shared and how == 'positives' and same[i][j])]
            l = [scale * float(A[i] @ B[j]) for j in range(n)]
            lse = math.log(sum(math.exp(l[j]) for j in keep))
            total -= (1 - e) * sum(l[j] - lse for j in own) / len(own) + e * sum(l[j] - lse for j in keep) / len(keep)
        return total / n
    I, T = image.unbind(1), text.unbind(1)
    pairs = lambda X, shared: [ce(a, b, 0, shared) for k, a in enumerate(X) for m, b in enumerate(X) if k != m]
    mean = lambda x: sum(x) / len(x) if x else 0.
    return {'i2t': mean([ce(a, b, smoothing, True) for a in I for b in T]), 't2i': mean([ce(b, a, smoothing, True) for a in I for b in T]),
            'i2i': mean(pairs(I, False)), 't2t': mean(pairs(T, True))}


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), v=st.integers(1, 3), t=st.integers(1, 3), e=st.sampled_from([0., .1, .5]), how=st.sampled_from(DUPLICATES),
       groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_number_of_views_texts_and_duplicates(n, v, t, e, how, groups, seed):
    image, text = unit_rows(seed, n, v, 5), unit_rows(seed + 1, n, t, 5)
    group = torch.randint(0, groups, (n, t), generator=torch.Generator().manual_seed(seed))
    ours, theirs = contrastive_terms(image, text, 7., e, group, how), brute(image, text, 7., e, group, how)
    for k in theirs: assert ours[k].item() == pytest.approx(theirs[k], rel=1e-9, abs=1e-9), k


@pytest.mark.parametrize('how', DUPLICATES)
def test_rows_of_processes_average_to_the_whole(how):
    image, text = unit_rows(0, 6, 2, 8), unit_rows(1, 6, 2, 8)
    group = torch.tensor([[1], [2], [1], [3], [3], [1]]).expand(6, 2)
    f = lambda rows: breast_clip_loss(image, text, 9., text_group=group, duplicates=how, rows=rows)['loss'].item()
    assert sum(f(r) for r in ((0, 2), (2, 4), (4, 6))) / 3 == pytest.approx(f(None), rel=1e-12)


@pytest.mark.parametrize('how', DUPLICATES)
def test_gradients_are_right(how):
    image, text = unit_rows(2, 4, 2, 3).requires_grad_(), unit_rows(3, 4, 2, 3).requires_grad_()
    s, group = torch.tensor(1.5, dtype=torch.float64, requires_grad=True), torch.tensor([[0], [0], [1], [2]]).expand(4, 2)
    f = lambda i, t, s: breast_clip_loss(i, t, scale_of(s), label_smoothing=.1, text_group=group, duplicates=how)['loss']
    assert torch.autograd.gradcheck(f, (image, text, s))


def test_without_duplicates_the_options_agree():
    image, text, group = unit_rows(0, 5, 2, 8), unit_rows(1, 5, 2, 8), torch.arange(5).view(5, 1).expand(5, 2)
    values = [breast_clip_loss(image, text, 9., label_smoothing=.1, text_group=group, duplicates=d)['loss'].item() for d in DUPLICATES]
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_all_the_same_report_has_no_nan():
    x = unit_rows(0, 4, 2, 8).requires_grad_()
    for how in DUPLICATES:
        loss = breast_clip_loss(x, x.detach(), 50., text_group=torch.zeros(4, 2, dtype=torch.long), duplicates=how)['loss']
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_half_precision_inputs_are_computed_in_float32():
    image, text = unit_rows(0, 6, 2, 32).float(), unit_rows(1, 6, 2, 32).float()
    with torch.autocast('cpu', torch.bfloat16): inside = breast_clip_loss(image, text, 100.)['loss']
    assert inside.dtype == torch.float32 and torch.equal(inside, breast_clip_loss(image, text, 100.)['loss'])
    assert torch.isfinite(breast_clip_loss(image.half(), text.half(), 1e4)['loss'])


def test_scale_is_limited_with_a_gradient_below_the_limit():
    assert scale_of(torch.tensor(20.)).item() == pytest.approx(100, rel=1e-5)
    assert scale_of(torch.tensor(5.), None).item() == pytest.approx(math.exp(5), rel=1e-5)
    s = torch.tensor(2., requires_grad=True); scale_of(s).backward()
    assert s.grad.item() == pytest.approx(math.exp(2), rel=1e-5)


def test_shared_reports_is_symmetric_and_any_text_counts():
    assert shared_reports(torch.tensor([[1, 2], [2, 3], [4, 4]])).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize('call,words', [
    (lambda: contrastive_terms(torch.zeros(2, 3), torch.zeros(2, 1, 3), 1.), r'\(n,v,d\)'),
    (lambda: contrastive_terms(torch.zeros(2, 1, 3), torch.zeros(3, 1, 3), 1.), 'same n'),
    (lambda: contrastive_terms(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), 1., duplicates='mask'), 'text_group'),
    (lambda: row_loss(torch.zeros(2, 2), duplicates='msk'), 'mask'),
    (lambda: classification_loss(torch.zeros(2, 1), torch.zeros(1, 2)), 'shape'),
    (lambda: classification_loss(torch.zeros(1, 1), torch.zeros(1, 1), 'ignore'), 'mask'),
    (lambda: combine_losses({}), 'no loss')])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_pos_weight_balances_a_rare_finding():
    y = torch.tensor([1.] + [0.] * 9 + [float('nan')] * 5).unsqueeze(1)
    x = torch.zeros_like(y, requires_grad=True)
    classification_loss(x, y, pos_weight=balance(y)).backward()
    assert balance(y).item() == 9 and x.grad.sum().item() == pytest.approx(0, abs=1e-7) and (x.grad[10:] == 0).all()
    assert balance(torch.zeros(500, 1)).item() == 100
