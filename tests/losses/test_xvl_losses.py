"""X-VL's losses against the originals' numbers, reference loops, limits and gradients."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden

from medvl.core.errors import DataError
from medvl.losses import ibot, itc, itm, overlap, sentence_search, words
from medvl.losses.segmentation import bce_loss, dice_loss, focal_mask_loss
from medvl.models.ibot_head import Centre
from medvl.models.queue import IndexQueue

close = lambda a, b: torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items()}


def normal(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0): return F.normalize(normal(*shape, seed=seed), dim=-1)


# -- contrast with momentum distillation -------------------------------------------------------------------------------------

def test_index_queue_of_fine_tuning():
    z = arrays('finetune_itc_idx_queue.npz')
    index = IndexQueue(24)
    index.rows.copy_(z['idx_queue_before'][0])
    same = index.same(z['idx'], z['idx'])
    assert torch.equal(same.float(), z['pos_idx'])
    close(itc.own_targets(4, 28, same=same), z['sim_targets'])
    losses, scores = itc.itc_loss(z['image_feat'], z['text_feat'], z['image_feat_m'], z['text_feat_m'], z['image_queue_before'].T, z['text_queue_before'].T,
                                  z['temp'], z['alpha'].item(), same=same)
    for name, value in losses.items(): close(value, z[f'loss_{name}'])
    for name, value in scores.items(): close(value, z[f'sim_{name}'])
    close((losses['i2t'] + losses['t2i']) / 2, z['loss_ita'])
    # its hard negatives: rows of the same image are refused before the draw; softmax, then zeros
    for name in ('i2t', 't2i'):
        want = z[f'weights_{name}']
        close(itm.negative_weights(scores[name][:, :4], refused=same[:, :4]), want / want.sum(1, keepdim=True))
    ones = torch.zeros(4, 4, dtype=torch.bool)
    draw = itm.RejectionDraws(draws=z['neg_draws'].tolist())
    texts, images, labels = itm.matching_pairs(draw(scores['t2i'][:, :4], ones), draw(scores['i2t'][:, :4], ones))
    assert torch.equal(labels, z['itm_labels']) and not same[texts[4:], images[4:]].any()
    close(itm.itm_loss(z['vl_output'], labels)[0], z['loss_itm'])


@pytest.mark.parametrize('alpha', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('in_modal', itc.IN_MODAL)
def test_two_processes_are_one(alpha, in_modal):
    i, t, im, tm, iq, tq = (unit(n, 5, seed=s) for s, n in enumerate((4, 4, 4, 4, 6, 6)))
    whole, scores = itc.itc_loss(i, t, im, tm, iq, tq, .2, alpha, in_modal)
    halves = [itc.itc_loss(i[s], t[s], im, tm, iq, tq, .2, alpha, in_modal, first=s.start) for s in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items(): torch.testing.assert_close(value, (halves[0][0][name] + halves[1][0][name]) / 2)
    torch.testing.assert_close(scores['i2t'], torch.cat([h[1]['i2t'] for h in halves]))
    assert set(whole) == ({'i2t', 't2i'} if in_modal == 'none' else {'i2t', 't2i', 'i2i', 't2t'})


def test_contrast_gradients_are_those_of_finite_differences():
    leaves = [unit(3, 4, seed=s).requires_grad_() for s in range(2)]
    im, tm, q = unit(3, 4, seed=2), unit(3, 4, seed=3), unit(5, 4, seed=4)
    tau = torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    # the teacher's part of the target does not move with tau: no gradient there, in the original neither
    fixed = lambda i, t: sum(itc.itc_loss(i, t, im, tm, q, q, .3, .4, 'distilled')[0].values())
    assert torch.autograd.gradcheck(fixed, leaves)
    hard = lambda tau: sum(itc.itc_loss(*leaves, im, tm, q, q, tau, 0.0, 'hard')[0].values())
    assert torch.autograd.gradcheck(hard, tau)


def test_no_target_is_made_of_a_gradient():
    i, t, im, tm = (unit(3, 4, seed=s).requires_grad_() for s in range(4))
    sum(itc.itc_loss(i, t, im, tm, temperature=.1)[0].values()).backward()
    assert i.grad is not None and t.grad is not None and im.grad is None and tm.grad is None


def test_contrast_in_half_precision_computes_in_float32():
    i = [unit(4, 8, seed=s) for s in range(4)]
    with torch.autocast('cpu', dtype=torch.bfloat16): got = itc.itc_loss(*[x.float() for x in i])[0]
    for name, value in itc.itc_loss(*[x.float() for x in i])[0].items(): assert torch.equal(got[name], value)


def test_contrast_refuses_what_does_not_fit():
    a, b = unit(3, 4), unit(2, 4)
    with pytest.raises(ValueError, match='do not fit'): itc.itc_loss(a, b, a, a)
    with pytest.raises(ValueError, match='do not fit'): itc.itc_loss(a, a, a, a, first=1)
    with pytest.raises(ValueError, match='within a modality'): itc.itc_loss(a, a, a, a, in_modal='soft')


# -- sentences ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('case', ['a', 'b', 'c'])
def test_sentences_and_their_gradients(case):
    z = arrays('in_batch_g2l.npz')
    if f'{case}_l' not in z: pytest.skip('a case that is not handed over')
    l, m = z[f'{case}_l'].requires_grad_(), z[f'{case}_m'].requires_grad_()
    loss = sentence_search.sentence_loss(m, l, z[f'{case}_mask'], z['temp'])
    loss.backward()
    close(loss.detach(), z[f'{case}_loss_masked'])
    close(l.grad, z[f'{case}_grad_l'])
    close(m.grad, z[f'{case}_grad_m'])
    close(sentence_search.sentence_loss(m, z[f'{case}_l_nomask'], None, z['temp']).detach(), z[f'{case}_loss_nomask'])


def test_sentences_of_two_processes_padding_and_reports_without_any():
    image, (l, real) = unit(4, 6), sentence_search.group_rows(unit(6, 6, seed=1), [2, 0, 1, 3])
    whole = sentence_search.sentence_loss(image, l, real, .2)
    halves = [sentence_search.sentence_loss(image[s], l, real, .2, s.start) for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + 2 * halves[1]) / 3) # one report of the first half has no sentence
    torch.testing.assert_close(sentence_search.sentence_loss(image, torch.where(real[..., None], l, 7.), real, .2), whole)
    none = sentence_search.sentence_loss(image.requires_grad_(), l, real & False, .2)
    none.backward()
    assert none.item() == 0 and image.grad.abs().max() == 0
    assert sentence_search.group_rows(torch.zeros(0, 3), [0, 0])[0].shape == (2, 1, 3)


# -- hard negatives -----------------------------------------------------------------------------------------------------------

def counted(draw, n=4, times=4000):
    return torch.stack([F.one_hot(draw(i), n).float() for i in range(times)]).mean(0)


def test_masked_draws_and_rejected_draws_have_one_distribution():
    scores, alike = normal(4, 4).float(), torch.eye(4)
    alike[0, 2] = alike[1, 3] = alike[1, 0] = .97
    generator = torch.Generator().manual_seed(0)
    ours = counted(lambda i: itm.draw_negatives(scores, itm.row_draws(4, 0, i), alike))
    theirs = counted(lambda i: itm.RejectionDraws(shared=False, generator=generator)(scores, alike >= .95))
    weights = itm.negative_weights(scores, refused=alike >= .95)
    torch.testing.assert_close(ours, weights, rtol=0, atol=.03)
    torch.testing.assert_close(theirs, weights, rtol=0, atol=.03)
    assert (ours[alike >= .95] == 0).all() and (theirs[alike >= .95] == 0).all()


def test_weights_of_the_original_are_ours_but_for_their_sum():
    z = arrays('head_pretrain_forward.npz')
    for name in ('i2t', 't2i'):
        want = z[f'weights_{name}']
        close(itm.negative_weights(z[f'sim_{name}'][:, :4]), want / want.sum(1, keepdim=True))


@pytest.mark.parametrize('u', [0.0, 1 - 2**-24])
def test_extreme_draws_never_give_own_or_refused(u):
    for seed in range(20):
        scores, alike = (normal(5, 5, seed=seed) * 30).float(), (normal(5, 5, seed=seed + 50) > .5).float()
        got = itm.draw_negatives(scores, torch.full((5,), u), alike)
        assert (got != torch.arange(5)).all()
        free = ~((alike >= .95) | torch.eye(5, dtype=torch.bool))
        assert all(free[i, j] or not free[i].any() for i, j in enumerate(got.tolist()))


def test_a_sure_student_still_draws():
    "Its softmax is 1 at the own column to the last bit; the original's zeroed row makes multinomial fail there."
    scores = torch.eye(3) * 1e4
    assert (itm.draw_negatives(scores, itm.row_draws(3, 0)) != torch.arange(3)).all()
    torch.testing.assert_close(itm.negative_weights(scores), (1 - torch.eye(3)) / 2)


def test_all_refused_and_a_batch_of_one():
    scores, alike = torch.zeros(3, 3), torch.tensor([[1, .99, .96], [.99, 1, .97], [.96, .97, 1]])
    assert itm.draw_negatives(scores, torch.rand(3), alike).tolist() == [2, 2, 0]
    drawn = counted(lambda i: itm.draw_negatives(scores, itm.row_draws(3, i), alike, fallback='unfiltered'), 3, 2000)
    torch.testing.assert_close(drawn, itm.negative_weights(scores), rtol=0, atol=.05)
    same = torch.ones(3, 3, dtype=torch.bool) # labels alike, no cosines: unfiltered
    assert (itm.draw_negatives(scores, torch.rand(3), same=same) != torch.arange(3)).all()
    with pytest.raises(ValueError, match='at least two'): itm.draw_negatives(scores[:1, :1], torch.rand(1))


def test_the_shared_counter_switches_the_filter_off():
    scores, refused = torch.zeros(60, 60), torch.ones(60, 60, dtype=torch.bool)
    refused[:, 0] = refused[0] = False
    count = lambda shared: refused[torch.arange(60), itm.RejectionDraws(20, shared, generator=torch.Generator().manual_seed(1))(scores, refused)].sum().item()
    assert count(True) > 50
    own = itm.RejectionDraws(100, True, generator=torch.Generator().manual_seed(1))
    own(scores, refused)
    assert own.count > 100 # goes on over the batch
    own(scores[:2, :2], torch.zeros(2, 2, dtype=torch.bool))
    assert own.count > 102


def test_labels_that_are_the_same():
    same = itm.same_labels(["'No Finding'", "no finding", "'Edema', 'Pneumonia'", 'Pneumonia Edema'])
    assert same.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    nan = math.nan
    assert itm.same_labels(torch.tensor([[nan, 1.], [nan, 1], [0, 1]])).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_matching_loss_and_accuracy():
    labels = torch.tensor([1, 1, 0, 0])
    loss, right = itm.itm_loss(torch.tensor([[0., 2], [0, -2], [0, 2], [0, -2]]), labels)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2) and right.item() == .5
    logits = normal(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: itm.itm_loss(x, labels)[0], logits)


# -- words --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def lm(): return arrays('mlm_lm_losses.npz')


def test_masked_words(lm):
    teacher, alpha = lm['soft_labels'].log(), lm['alpha'].item()
    close(words.mlm_loss(lm['mlm_logits'], lm['mlm_labels']), lm['mlm_loss_ce'])
    close(words.mlm_loss(lm['mlm_logits'], lm['mlm_labels'], teacher, alpha, 'sequence'), lm['mlm_loss_distill_reference_dim1'])
    close(words.mlm_loss(lm['mlm_logits'], lm['mlm_labels'], teacher, alpha), lm['mlm_loss_distill_corrected_dim_last'])
    asked = lm['mlm_labels'] != -100
    close(words.mlm_loss(lm['mlm_logits'][asked], lm['mlm_labels'][asked], teacher[asked], alpha), lm['mlm_loss_distill_corrected_dim_last'])


def test_next_words(lm):
    teacher, alpha, targets = lm['soft_labels'].log(), lm['alpha'].item(), lm['lm_targets']
    close(lm['lm_logits'][:, :-1], lm['lm_logits_shifted_return_logits'])
    close(words.next_word_loss(lm['lm_logits'], targets), lm['lm_loss_ce_per_sample'])
    close(words.next_word_loss(lm['lm_logits'], targets, teacher, alpha, 'sequence'), lm['lm_loss_distill_reference_dim1_per_sample'])
    close(words.next_word_loss(lm['lm_logits'], targets, teacher, alpha), lm['lm_loss_distill_corrected_per_sample'])


@pytest.mark.parametrize('axis', words.AXES)
def test_word_gradients_are_those_of_finite_differences(axis):
    labels = torch.tensor([[1, -100, 3], [0, 2, -100]])
    teacher = normal(2, 3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: words.mlm_loss(x, labels, teacher, .4, axis), normal(2, 3, 4).requires_grad_())


def test_the_last_word_of_a_causal_pass_is_a_target_only():
    from medvl.models.fusion import FusionBert
    model = FusionBert(13, width=8, heads=2, layers=1, fusion_layer=1, hidden=16, positions=8, head=True).eval()
    ids, other = torch.tensor([[2, 5, 6, 3]]), torch.tensor([[2, 5, 6, 9]])
    run = lambda read: words.next_word_loss(model.logits(model(read, mode='text', causal=True)), ids)
    torch.testing.assert_close(run(ids), run(other))
    assert not torch.allclose(run(ids), run(torch.tensor([[2, 7, 6, 3]])))


# -- iBOT ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def zi(): return arrays('ibot_loss.npz')


@pytest.mark.parametrize('case', ['g2l2_e0', 'g2l2_e4', 'g2l0_e2', 'g2l3_lam'])
def test_ibot_loss_gradients_centres_and_temperatures(zi, case):
    z = {k.split('__')[1]: v for k, v in zi.items() if k.startswith(f'{case}__')}
    if not z: pytest.skip('a case that is not handed over')
    epoch, start = z['epoch'].item(), z['mim_start_epoch'].item()
    for e in range(6):
        assert ibot.teacher_temperature(e) == pytest.approx(z['teacher_temp'][e].item())
        assert ibot.teacher_temperature(e, begin=start) == pytest.approx(z['teacher_temp2'][e].item())
    views = lambda x, n: x.unflatten(0, (n, -1))
    of_class, patches = z['student_cls'].requires_grad_(), z['student_patch'].requires_grad_()
    out = ibot.ibot_loss(views(of_class, 2), views(patches, 2), views(z['teacher_cls'], 2), views(z['teacher_patch'], 2), z['masks'].flatten(-2), z['center'][0],
                         z['center2'][0, 0], views(z['student_local_cls'], z['nlcrops'].item()) if 'student_local_cls' in z else None,
                         (ibot.teacher_temperature(epoch), ibot.teacher_temperature(epoch, begin=start)), weights=(z['lambda1'].item(), z['lambda2'].item()))
    for ours, theirs in (('class', 'cls_loss'), ('patch', 'patch_loss'), ('loss', 'loss')): close(out[ours].detach(), z[theirs])
    out['loss'].backward()
    close(of_class.grad, z['grad_student_cls'])
    close(patches.grad, z['grad_student_patch'])
    for name, x, axes in (('center', z['teacher_cls'], (0,)), ('center2', z['teacher_patch'], (0, 1))):
        centre = Centre(12, .9)
        centre.value.copy_(z[name].flatten())
        centre.update(x.mean(axes))
        close(centre.value, z[f'{name}_after'].flatten())


def test_ibot_without_hidden_patches_or_a_second_version():
    s = normal(2, 3, 4, 5).requires_grad_()
    loss = ibot.patch_loss(s, normal(2, 3, 4, 5, seed=1), torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and s.grad.abs().max() == 0
    with pytest.raises(ValueError, match='two are needed'): ibot.version_loss(s[:1, :, 0], s[:1, :, 0], torch.zeros(5))


# -- masks of findings ----------------------------------------------------------------------------------------------------------

def test_mask_losses():
    z = arrays('segmentation_losses.npz')
    s, y = z['logits'], z['target']
    sure = torch.where(s > 0, 60., -60.)
    got = dict(soft_dice=dice_loss(s, y, 'batch', 1e-5), soft_dice_per_image=dice_loss(s, y, 'image', 1e-5), jaccard=overlap.jaccard_loss(s, y), stable_bce=bce_loss(s, y),
               focal=focal_mask_loss(s, y), lovasz_hinge=overlap.lovasz_hinge(s, y), lovasz_sigmoid=overlap.lovasz_sigmoid(s, y),
               symmetric_lovasz=overlap.lovasz_hinge(s, y, symmetric=True), combo_bce3_dice1_focal4=overlap.combo_loss(s, y)['loss'],
               dice_metric_bin=1 - dice_loss(sure, y, 'image', 1e-5))
    assert {*got} == {*z} - {'logits', 'target'}
    for name, value in got.items(): assert value.item() == pytest.approx(z[name].item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize('loss', [overlap.jaccard_loss, overlap.lovasz_hinge, overlap.lovasz_sigmoid, lambda s, y: overlap.combo_loss(s, y, {'bce': 1, 'lovasz': 2})['loss']])
def test_mask_gradients_are_those_of_finite_differences(loss):
    assert torch.autograd.gradcheck(lambda s: loss(s, (normal(2, 1, 3, 3, seed=1) > 0).double()), normal(2, 1, 3, 3).requires_grad_())


def test_masks_that_are_empty_full_or_of_another_size():
    s = normal(2, 1, 4, 4)
    for y in (torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)):
        for loss in (overlap.jaccard_loss, overlap.lovasz_hinge, overlap.lovasz_sigmoid): assert loss(s, y).isfinite()
    with pytest.raises(DataError): overlap.lovasz_hinge(s, torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match='grouping'): overlap.jaccard_loss(s, s > 0, 'class')
