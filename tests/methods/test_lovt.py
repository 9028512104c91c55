"""LoVT and its text baselines: pools, projections, alignment and losses against the original's numbers and against plain writings; the methods in training."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden
from torch import nn

from medvl.losses.contrastive import DUPLICATES, contrastive_terms
from medvl.losses.global_nce import cosine_distance, global_mse, global_nce, top_k_accuracy
from medvl.losses.local import grid_distances, local_contrastive, local_mse, positive_weights, sequence_distances, weighted_places
from medvl.models.alignment import CrossAttention
from medvl.models.pooling import AttentionPool, build_pool, masked_max, masked_mean, pool_sentences
from medvl.models.projection import Projection, back_in_place, real_rows

EXACT = dict(rtol=1e-9, atol=1e-11)


def arrays(name):
    z = np.load(golden(f'lovt/{name}'))
    return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}


def under(z, prefix):
    "The arrays whose names begin so; a 1x1 convolution's last axis is taken off."
    found = {k[len(prefix):]: v for k, v in z.items() if k.startswith(prefix)}
    return {k: v.squeeze(-1) if v.dim() == 3 else v for k, v in found.items()}


def close(a, b, **tol): torch.testing.assert_close(a, b, check_dtype=False, **(tol or EXACT))


def filled(module, state):
    "A module in float64 with these weights, all of them."
    module.double().load_state_dict(state, strict=True)
    return module


# --- pools

@pytest.mark.parametrize('folded', [True, False])
def test_attention_pool_golden(folded):
    z = arrays('attention_pool.npz')
    pool = filled(AttentionPool(64, folded=folded, legacy_padded_mean=True), under(z, 'param/'))
    for kind, x, mask in (('', z['x'], None), ('_masked', z['x_masked'], z['mask']), ('_masked_padded10', z['x_masked_padded10'], z['mask_padded10'])):
        pooled, weights = pool(x, mask)
        close(pooled, z[f'pooled{kind}'])
        close(weights, z[f'weights{kind}'])
    close(masked_max(z['x_masked'], z['mask']), z['max_pool_masked'])
    close(masked_mean(z['x_masked'], z['mask'], legacy_padded_mean=True), z['avg_pool_masked'])
    close(masked_mean(z['x']), z['avg_pool'])
    assert (masked_mean(z['x_masked'], z['mask']) - z['avg_pool_masked']).abs().max() > 1, 'the default divides by the true length'
    pool.legacy_padded_mean = False
    a, b = pool(z['x_masked'], z['mask'])[0], pool(z['x_masked_padded10'], z['mask_padded10'])[0]
    close(a, b, rtol=0, atol=1e-13)
    assert (z['pooled_masked'] - z['pooled_masked_padded10']).abs().max() > .02


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('padded', [False, True])
def test_folded_pool_is_the_plain_pool(dtype, tol, legacy, padded):
    torch.manual_seed(0)
    pool = AttentionPool(128, legacy_padded_mean=legacy).to(dtype)
    for p in (pool.attention.in_proj_bias, pool.attention.out_proj.bias): nn.init.normal_(p)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]]) if padded else None
    found = {}
    for pool.folded in (True, False):
        x = torch.randn(3, 9, 128, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        pool.zero_grad()
        out, w = pool(x, mask)
        (out.square().sum() + (w ** 2).sum()).backward()
        found[pool.folded] = [out, w, x.grad, *(p.grad for p in pool.parameters())]
    for a, b in zip(*found.values()): assert (a - b).norm() <= tol * b.norm().clamp(min=1)


def test_pool_without_a_real_place_gives_no_weight_and_no_nan():
    pool, mask = AttentionPool(16), torch.tensor([[True, False], [False, False]])
    x = torch.randn(2, 2, 16, requires_grad=True)
    out, w = pool(x, mask)
    out.sum().backward()
    assert w[1].tolist() == [0, 0] and out.isfinite().all() and x.grad.isfinite().all() and x.grad[1].abs().sum() == 0
    assert masked_mean(x, mask)[1].abs().sum() == 0 and masked_max(x, mask)[1].abs().sum() == 0


def test_sentences_golden_and_by_loops():
    z = arrays('report_sentences.npz')
    n, spans = z['sentence_mask'].shape[1], z['sentence_token_mask'].sum(-1)
    sentence = torch.zeros_like(z['input_ids'])
    for row, lengths in zip(sentence, spans.tolist()):
        at = 1
        for i, length in enumerate(lengths): row[at:at + length] = i + 1; at += length
    vectors, mask = pool_sentences(z['token_features'], sentence)
    assert vectors.shape[1] == n and torch.equal(mask, z['sentence_mask']) and torch.equal(mask, z['local_mask'])
    close(vectors, z['sentence_features'])
    pool = filled(AttentionPool(16, legacy_padded_mean=True), under(z, 'pool_param/'))
    pooled, weights = pool(vectors, mask)
    close(pooled, z['global_attpool'])
    close(weights, z['weights_attpool'])
    close(build_pool('max', 16)(z['token_features'], sentence > 0)[0], z['global_maxpool'])
    leaf = z['token_features'].clone().requires_grad_()
    pool_sentences(leaf, sentence)[0].sum().backward()
    assert leaf.grad[sentence == 0].abs().sum() == 0 and leaf.grad.sum() == mask.sum() * 16
    assert pool_sentences(leaf, sentence, 5)[1].shape == (5, 5)


# --- projections and alignment

@pytest.mark.parametrize('norm', ['batch', 'layer', 'None'])
def test_projections_golden(norm):
    z = arrays('projections.npz')
    for kind, x in (('seq', z['x_seq']), ('glob', z['x_glob'])):
        m = filled(Projection(24, 12, 32, norm.lower(), legacy_padded_norm=True), under(z, f'{norm}/{kind}_param/'))
        close(m(x), z[f'{norm}/train/{kind}'])
        if norm == 'batch' and kind == 'seq':
            for k, v in under(z, 'batch/seq_buffers_after/').items(): close(m.state_dict()[k], v)
        close(m.eval()(x), z[f'{norm}/eval/{kind}'])


def test_padding_stays_out_of_the_projections_norm():
    torch.manual_seed(0)
    m, x = Projection(8, 4, 16), torch.randn(3, 5, 8)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    rows, where = real_rows(x, mask)
    assert torch.equal(back_in_place(rows, where, x.shape), x * mask[..., None])
    reference = Projection(8, 4, 16)
    reference.load_state_dict(m.state_dict())
    close(m(x, mask)[mask], reference.rows(x[mask]))
    close(m.norm.running_var, reference.norm.running_var)
    assert m(x, mask)[~mask].abs().sum() == 0
    m.legacy_padded_norm = True
    assert (m(x, mask)[mask] - reference.rows(x[mask])).abs().max() > .01
    for layer in (m.projection_before, m.projection_after): assert layer.bias.abs().sum() == 0
    big = Projection(2048)
    assert big.projection_before.weight.std().item() == pytest.approx(math.sqrt(2 / 2048), rel=.01) and big.projection_after.weight.std().item() == pytest.approx(math.sqrt(1 / 512), rel=.01)


VARIANTS = {'lovt': dict(), 'cosine_t0_2_layernorm': dict(similarity='cosine', temperature=.2, norm='layer'), 'asymmetric_nonorm': dict(symmetric=False, norm='none')}


@pytest.mark.parametrize('name', list(VARIANTS))
def test_cross_attention_golden(name):
    z = arrays('cross_attention.npz')
    m = filled(CrossAttention(32, legacy_padded_norm=True, **VARIANTS[name]), under(z, f'{name}/param_before/'))
    for mode in ('train', 'eval'):
        g = under({k: v.unsqueeze(-1) if v.dim() == 3 else v for k, v in z.items()}, f'{name}/{mode}/')
        g = {k: v.squeeze(-1) if v.dim() == 4 else v for k, v in g.items()}
        a, b = z['hidden_a'].clone().requires_grad_(), z['hidden_b'].clone().requires_grad_()
        out = m.train(mode == 'train')(a, b, z['mask_b'])
        for ours, theirs in (('regions', 'attended_b2a'), ('sentences', 'attended_a2b'), ('region_attention', 'attention_probs_b2a'), ('sentence_attention', 'attention_probs_a2b')):
            close(out[ours], z[f'{name}/{mode}/{theirs}'])
        for s, direction in zip(m.scores(a, b), ('b2a', 'a2b')): close(s, z[f'{name}/{mode}/attention_scores_{direction}'])
        (out['regions'].pow(3).sum() + out['sentences'].pow(3).sum()).backward()
        close(a.grad, z[f'{name}/{mode}/grad_a_of_sum_cubes'], rtol=1e-9, atol=1e-9)
        close(b.grad, z[f'{name}/{mode}/grad_b_of_sum_cubes'], rtol=1e-9, atol=1e-9)
    for k, v in under(z, f'{name}/buffers_after/').items(): close(m.state_dict()[k], v)


def test_cross_attention_ignores_padding_by_default():
    torch.manual_seed(0)
    m = CrossAttention(16).double()
    a, b = torch.randn(3, 9, 16).double(), torch.randn(3, 3, 16).double()
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    state = {k: v.clone() for k, v in m.state_dict().items()}
    one = m(a, b, mask)
    after = {k: v.clone() for k, v in m.state_dict().items()}
    m.load_state_dict(state)
    wide = torch.cat([b.masked_fill(~mask[..., None], 50.), 7 * torch.ones(3, 4, 16).double()], 1)
    two = m(a, wide, torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1))
    close(two['regions'], one['regions'])
    close(two['sentences'][:, :3], one['sentences'])
    assert two['sentences'][:, 3:].abs().sum() == 0 and two['region_attention'][..., 3:].abs().sum() == 0
    for k in after: close(m.state_dict()[k], after[k])


def test_cross_attention_options():
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 16), torch.randn(2, 4, 16)
    m = CrossAttention(16, temperature=.5, trainable_temperature=True)
    m(a, b)['regions'].pow(3).sum().backward()
    assert m.log_temperature.item() == pytest.approx(math.log(.5)) and m.log_temperature.grad.abs() > 0
    close(m(a, b)['regions'], _same(CrossAttention(16, temperature=.5), m)(a, b)['regions'], rtol=1e-5, atol=1e-6)
    drop = CrossAttention(16, dropout=.5, norm='none')
    out = drop(a, b)
    close(out['region_attention'].sum(-1), torch.ones(2, 9), rtol=1e-5, atol=1e-5)
    assert (out['sentence_attention'] == 0).any() and not (drop.eval()(a, b)['sentence_attention'] == 0).any()
    assert not list(CrossAttention(16, projections=False, norm='none').parameters())
    close(CrossAttention(16, projections=False, norm='l2')(a, b)['regions'].norm(dim=-1), torch.ones(2, 9), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Did you mean 'layer'"): CrossAttention(16, norm='layr')


def _same(new, old):
    new.load_state_dict({k: v for k, v in old.state_dict().items() if k in new.state_dict()})
    return new


# --- losses

@pytest.mark.parametrize('tau', [.1, .3])
@pytest.mark.parametrize('same', [0, 1])
def test_global_nce_golden(tau, same):
    z = arrays('global_nce_b8_d16.npz')
    a, b, g = z['zg_a'].requires_grad_(), z['zg_b'].requires_grad_(), under(z, f'tau{tau}_same{same}/')
    out = global_nce(a, b, tau, bool(same))
    close(out['i2t'], g['loss_a2b'])
    close(out['t2i'], g['loss_b2a'])
    total = .75 * out['i2t'] + .25 * out['t2i']
    close(total, g['weighted_075_025'])
    total.backward()
    close(a.grad, g['grad_weighted_zg_a'])
    close(b.grad, g['grad_weighted_zg_b'])
    cross = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = [(x @ x.T).fill_diagonal_(-9) for x in (F.normalize(a, dim=1).detach(), F.normalize(b, dim=1).detach())]
    for logits, mine, d in ((cross, own[0], 'a2b'), (cross.T, own[1], 'b2a')):
        for k in (1, 5): close(top_k_accuracy(torch.cat([logits, mine], 1) if same else logits, k=k), g[f'{d}_top_{k}_acc'])


def test_global_variants_and_accuracy_golden():
    z = arrays('global_other.npz')
    log_tau = torch.tensor(math.log(.2), dtype=torch.float64, requires_grad=True)
    close(log_tau.detach(), z['nce_trainable_log_tau'], rtol=1e-6, atol=0)
    log_tau = z['nce_trainable_log_tau'].clone().requires_grad_()
    out = global_nce(z['zg_a'], z['zg_b'], log_tau.exp(), same_modality=True) # the original class's default
    close(out['i2t'], z['nce_trainable_tau0_2_loss_a2b'])
    close(out['t2i'], z['nce_trainable_tau0_2_loss_b2a'])
    (.75 * out['i2t'] + .25 * out['t2i']).backward()
    close(log_tau.grad, z['nce_trainable_grad_log_tau'])
    close(global_mse(z['zg_a'], z['zg_b']), z['mse_loss'])
    for name, x, y, loss in (('predictor_1', 'zg_a', 'zg_b', 'a2b'), ('predictor_2', 'zg_b', 'zg_a', 'b2a')):
        m = filled(Projection(12, 12, 20), under(z, f'predictor_param/{name}.'))
        close(cosine_distance(m(z[x]), z[y]).mean(), z[f'predictor_loss_{loss}'])
    z = arrays('topk_accuracy.npz')
    for k in (1, 5): close(top_k_accuracy(z['logits'], z['target'], k), z[f'top_{k}_acc'])


@pytest.mark.parametrize('duplicates', DUPLICATES)
def test_global_nce_is_the_one_pair_case_of_contrastive_terms(duplicates):
    torch.manual_seed(0)
    a, b, group = torch.randn(7, 8).double(), torch.randn(7, 8).double(), torch.tensor([0, 1, 0, 2, 3, 2, 4])[:, None]
    terms = contrastive_terms(F.normalize(a, dim=1)[:, None], F.normalize(b, dim=1)[:, None], 10., text_group=group, duplicates=duplicates)
    for rows in (None, (2, 5)):
        ours = global_nce(a, b, text_group=group, duplicates=duplicates, rows=rows)
        if rows is None: close(ours['i2t'], terms['i2t']), close(ours['t2i'], terms['t2i'])
    parts = [global_nce(a, b, same_modality=True, text_group=group, duplicates=duplicates, rows=r) for r in ((0, 3), (3, 7))]
    whole = global_nce(a, b, same_modality=True, text_group=group, duplicates=duplicates)
    for k in whole: close((3 * parts[0][k] + 4 * parts[1][k]) / 7, whole[k])
    assert all(v.isfinite() for v in whole.values())


LOCAL = dict(default={}, no_weights=dict(weights=None), no_smooth=dict(decay=None), identity_positives=dict(threshold=0, decay=None),
             identity_positives_absolute=dict(threshold=0, decay=None, relative=False), absolute_1_5_lambda2_tau0_1=dict(threshold=1.5, decay=2., relative=False, temperature=.1),
             same_modality_negatives=dict(same_modality=True), normalized_by_num_negatives=dict(legacy_count=49))


def reference_positives(threshold, decay, relative):
    "The original's unnormalised positives: coordinates divided first, then torch.cdist in float32 by its matrix product."
    grid = torch.cartesian_prod(torch.arange(7.), torch.arange(7.)) / (math.sqrt(98) if relative else 1)
    d = torch.cdist(grid, grid, compute_mode='use_mm_for_euclid_dist')
    return (d <= threshold) * (torch.exp(-decay * d) if decay is not None else 1.)


@pytest.mark.parametrize('name', list(LOCAL))
def test_local_image_golden(name):
    """With the original's positives all losses and gradients to 1e-9. With exact distances to 2e-6, except `identity_positives`,
    where the original's float32 distances lose the positives of four regions: that is shown, not matched."""
    z, config = arrays('local_image.npz'), json.loads(golden('lovt/local_image_variants.json').read_text())[name]
    c = dict(threshold=.5, decay=1., relative=True, temperature=.3, weights=z['weights'], same_modality=False, legacy_count=0) | LOCAL[name]
    assert (config['distance_threshold'], config['threshold_type'], config['similarity_temperature']) == (c['threshold'], 'relative' if c['relative'] else 'absolute', c['temperature'])
    stored = z[f'{name}/pos_weights_unnormalized']
    close(reference_positives(c['threshold'], c['decay'], c['relative']), stored, rtol=0, atol=1e-7)
    exact = positive_weights(grid_distances(7, 7, c['relative']), c['threshold'], c['decay'])
    options = {k: c[k] for k in ('temperature', 'weights', 'same_modality', 'legacy_count')}

    def run(positives):
        a, b = z['zl_a'].clone().requires_grad_(), z['zl_b2a'].clone().requires_grad_()
        out = local_contrastive(a, b, positives, **options)
        return out, {k: torch.autograd.grad(out[k], (a, b), retain_graph=True) for k in out}
    out, grads = run(stored / stored.sum(1, keepdim=True).clamp(min=1e-12))
    for k in ('l2att', 'att2l'):
        close(out[k], z[f'{name}/loss_{k}'])
        for g, side in zip(grads[k], ('a', 'b2a')): close(g, z[f'{name}/grad_{k}_zl_{side}'], rtol=1e-9, atol=1e-10)
    ours, grads = run(exact)
    lost = (stored.diag() == 0).nonzero().flatten().tolist()
    if name == 'identity_positives':
        assert lost == [10, 19, 20, 33] and torch.equal(exact, torch.eye(49, dtype=torch.float64))
        close(ours['l2att'], z['identity_positives_absolute/loss_l2att'])
        return
    assert lost == []
    for k in ('l2att', 'att2l'):
        assert abs(ours[k] - z[f'{name}/loss_{k}']) < 2e-6
        for g, side in zip(grads[k], ('a', 'b2a')): close(g, z[f'{name}/grad_{k}_zl_{side}'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name,options', [('default', {}), ('no_weights', dict(weights=None)), ('neighbours_abs1', dict(threshold=1)), ('same_modality_negatives', dict(same_modality=True))])
def test_local_report_golden(name, options):
    z = arrays('local_report.npz')
    options = dict(weights=z['weights'], threshold=0, same_modality=False) | options
    positives = positive_weights(sequence_distances(10), options.pop('threshold'), None)
    a, b = z['zl_b'].requires_grad_(), z['zl_a2b'].requires_grad_()
    out = local_contrastive(a, b, positives, mask=z['mask'], **options)
    for k in out:
        close(out[k], z[f'{name}/loss_{k}'])
        for g, side in zip(torch.autograd.grad(out[k], (a, b), retain_graph=True), ('b', 'a2b')): close(g, z[f'{name}/grad_{k}_zl_{side}'])


def test_local_report_variants_golden():
    z = arrays('local_report.npz')
    close(local_mse(z['zl_b'], z['zl_a2b'], z['mask'], z['weights']), z['local_mse/loss'])
    for name, x, y, loss in (('predictor_a', 'zl_b', 'zl_a2b', 'l2att'), ('predictor_b', 'zl_a2b', 'zl_b', 'att2l')):
        m = filled(Projection(32, 32, 20, legacy_padded_norm=True), under(z, f'local_predictor/param/{name}.'))
        close(weighted_places(cosine_distance(m(z[x], z['mask']), z[y]), z['mask'], z['weights']), z[f'local_predictor/loss_{loss}'])


@pytest.mark.parametrize('n', [1, 2, 5])
def test_local_loss_ignores_padding(n):
    torch.manual_seed(0)
    a, b, w, p = torch.randn(3, n, 8).double(), torch.randn(3, n, 8).double(), torch.rand(3, n).double(), positive_weights(sequence_distances(n + 4), 1)
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n - 1)], [1]])
    pad = lambda x, v: torch.cat([x, torch.full((3, 4, *x.shape[2:]), v, dtype=x.dtype)], 1)
    for same in (False, True):
        short = local_contrastive(a, b, p[:n, :n], mask=mask, weights=w, same_modality=same)
        long = local_contrastive(pad(a, 3.), pad(b, 9.), p, mask=pad(mask, False), weights=pad(w, 5.), same_modality=same)
        for k in short: close(short[k], long[k])


@pytest.mark.parametrize('same', [False, True])
def test_the_originals_constant_counts_padding_too(same):
    "The original subtracts log(choices / 2N) from every place, padded ones included, and counts 2n choices with the own kind; a sample without a place stays finite."
    torch.manual_seed(0)
    a, b, mask = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 8).double(), torch.arange(5) < torch.tensor([[5], [3], [1]])
    p = positive_weights(sequence_distances(5), 0, None)
    plain, with_it = (local_contrastive(a, b, p, mask=mask, same_modality=same, legacy_count=n) for n in (0, 512))
    wanted = -sum(5 * math.log(n * (1 + same) / 1024) for n in (5, 3, 1)) / 3
    for k in plain: close(with_it[k] - plain[k], torch.tensor(wanted, dtype=torch.float64))
    assert all(v.isfinite() for v in local_contrastive(a, b, p, mask=mask & (torch.arange(3) > 0)[:, None], same_modality=same, legacy_count=512).values())


@pytest.mark.parametrize('grid,threshold,decay,relative', [((3, 5), .4, 2., True), ((1, 6), 1., None, False), ((1, 1), .5, 1., True), ((4, 2), 0, None, True)])
def test_local_loss_on_any_grid_is_its_loop(grid, threshold, decay, relative):
    "Grids that are no squares, masks with holes, thresholds in both units."
    torch.manual_seed(0)
    n = grid[0] * grid[1]
    at = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    a, b, w, mask = torch.randn(2, n, 6).double(), torch.randn(2, n, 6).double(), torch.rand(2, n).double(), torch.rand(2, n) > .3
    mask[:, 0] = True
    out = local_contrastive(a, b, positive_weights(grid_distances(*grid, relative), threshold, decay), .2, mask, w)
    total = {'l2att': 0., 'att2l': 0.}
    for i in range(2):
        here = mask[i].nonzero().flatten().tolist()
        for k in here:
            d = [math.dist(at[k], at[j]) / (math.hypot(*grid) if relative else 1) for j in here]
            p = torch.tensor([(math.exp(-decay * x) if decay is not None else 1.) * (x <= threshold + 1e-9) for x in d], dtype=torch.float64)
            for name, x, y in (('l2att', a, b), ('att2l', b, a)):
                s = torch.stack([torch.cosine_similarity(x[i, k], y[i, j], 0) / .2 for j in here])
                total[name] += w[i, k] / w[i, here].sum() * (s.logsumexp(0) - (p / p.sum() * s).sum()) / 2
    for k in total: close(out[k], total[k])


def test_grid_distances_are_exact():
    d = grid_distances(3, 5, relative=False)
    for i in range(15):
        for j in range(15): assert d[i, j] == math.hypot(i // 5 - j // 5, i % 5 - j % 5)
    assert (grid_distances(8, 8) <= .5 + 1e-9).sum() == (grid_distances(8, 8, False).square().round() <= 32).sum()


# --- the method

from dataclasses import replace  # noqa: E402

from training import gradients, settings  # noqa: E402

from medvl.core.errors import DataError  # noqa: E402
from medvl.data.batch import slice_batch  # noqa: E402
from medvl.data.text.sentences import SentenceTokens  # noqa: E402
from medvl.data.text.tokens import build_wordpiece  # noqa: E402
from medvl.methods.base import StepState, build, capabilities, from_pretrained, save_pretrained  # noqa: E402
from medvl.methods.clip import CLIP, CLIPConfig  # noqa: E402
from medvl.methods.convirt import ConVIRT, ConVIRTConfig  # noqa: E402
from medvl.methods.lovt import ABLATIONS, LoVT, LoVTConfig, ablation  # noqa: E402
from medvl.train.gradcache import backward_batch  # noqa: E402

NAMES = {'pool_a': 'image_pool', 'pool_b': 'text_pool', 'project_global_a': 'image_projection', 'project_global_b': 'text_projection', 'project_local_a': 'region_projection',
         'project_local_b': 'sentence_projection', 'cross_attention': 'alignment'}
SENTENCES = ['Small left effusion.', 'The heart is large.', 'No pneumothorax.', 'Right basal opacity.', 'Lines and tubes are unchanged.', 'No acute process.']
TOKENIZER = build_wordpiece(SENTENCES, size=150)
TINY = dict(image_encoder='resnet-tiny', text_encoder='tiny', dim=16, hidden=24)
METHODS = {'lovt': (LoVT, LoVTConfig), 'clip': (CLIP, CLIPConfig), 'convirt': (ConVIRT, ConVIRTConfig)}


def make(kind='lovt', seed=0, **changes):
    torch.manual_seed(seed)
    cls, config = METHODS[kind]
    return cls(config(**{**TINY, **changes}), TOKENIZER)


def reports_of(n, one=False):
    return [[SENTENCES[(i + k) % 6] for k in range(1 if one else 1 + i % 4)] for i in range(n)]


def batch_of(n=6, one=False, reports=None, dtype=torch.uint8, size=64):
    g = torch.Generator().manual_seed(3)
    reports = reports or reports_of(n, one)
    tokens = SentenceTokens(TOKENIZER).batch(reports)
    return {'images': torch.randint(0, 256, (len(reports), 1, 1, size, size), dtype=torch.uint8, generator=g).to(dtype), 'sample_id': [f's{i}' for i in range(len(reports))],
            'tokens': {k: torch.from_numpy(v).unsqueeze(1) for k, v in tokens.items()}, 'sentences': reports, 'text_group': torch.arange(len(reports)).view(-1, 1)}


class GivenImages(nn.Module):
    "Stands for a ResNet whose last map is what the test says."
    num_features = 64
    def __init__(self, maps): super().__init__(); self.maps, self.unused = maps, nn.Parameter(torch.zeros(1, dtype=torch.float64))
    def feature_maps(self, x, level=-1): return self.maps
    def forward(self, x): return self.maps.mean((2, 3))


class GivenTokens(nn.Module):
    "Stands for a BERT in which each sentence is one token."
    num_features, max_length = 48, 512
    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.text_encoder = hidden, nn.Module()
        self.text_encoder.config = type('C', (), {'vocab_size': 10 ** 6})
    def tokens(self, ids, mask): return self.hidden


def test_lovt_stack_golden():
    "The method itself, from encoder outputs to losses and all gradients, in float64."
    z = arrays('lovt_stack.npz')
    regions, sentences, mask = z['yl_a'].requires_grad_(), z['yl_b'].requires_grad_(), z['mask_b']
    config = LoVTConfig(dim=32, hidden=40, frozen_layers=0, legacy_padded_mean=True, legacy_padded_norm=True)
    hidden = torch.cat([torch.zeros(4, 1, 48, dtype=torch.float64), sentences, torch.zeros(4, 1, 48, dtype=torch.float64)], 1)
    method = LoVT(config, None, GivenImages(regions.mT.unflatten(2, (7, 7))), GivenTokens(hidden)).double().train()
    for theirs, ours in NAMES.items(): filled(getattr(method, ours), under(z, f'param/{theirs}/'))
    numbers = F.pad((torch.arange(1, 7) * mask), (1, 1))
    batch = {'images': torch.zeros(4, 1, 1, 8, 8), 'sample_id': list('abcd'), 'tokens': {'input_ids': numbers[:, None], 'attention_mask': torch.ones_like(numbers)[:, None], 'sentence': numbers[:, None]}}
    state = {k: v.clone() for k, v in method.state_dict().items()}
    image, text = method.read_images(batch['images']), method.read_texts(batch['tokens'])
    assert torch.equal(text['mask'], mask)
    for ours, theirs in ((image['pooled'], 'yg_a'), (text['pooled'], 'yg_b'), (image['weights'], 'weights_a'), (text['weights'], 'weights_b'), (image['regions'], 'yl_a')): close(ours, z[theirs])
    local = method.align(image, text)
    for ours, theirs in (('regions', 'zl_a'), ('sentences', 'zl_b'), ('regions_attended', 'zl_b2a'), ('sentences_attended', 'zl_a2b'), ('region_attention', 'attention_probs_b2a'),
                         ('sentence_attention', 'attention_probs_a2b')): close(local[ours], z[theirs])
    method.load_state_dict(state)
    for side, read in (('a', image), ('b', text)): close(getattr(method, NAMES[f'project_global_{side}'])(read['pooled']), z[f'zg_{side}'])
    method.load_state_dict(state)
    method.local.positives_of[7, 7, regions.device, regions.dtype] = (p := reference_positives(.5, 1., True).double()) / p.sum(1, keepdim=True)
    out = method(batch)
    pairs = {'i2t': 'global_a2b', 't2i': 'global_b2a', 'regions_l2att': 'local_a_l2att', 'regions_att2l': 'local_a_att2l', 'sentences_l2att': 'local_b_l2att', 'sentences_att2l': 'local_b_att2l'}
    for ours, theirs in pairs.items(): close(out[ours], z[f'metric/{theirs}_loss'])
    close(out['loss'], z['total_loss'])
    out['loss'].backward()
    close(regions.grad, z['grad_yl_a'])
    close(sentences.grad[mask], z['grad_yl_b'][mask])
    for theirs, ours in NAMES.items():
        for k, g in under(z, f'grad/{theirs}/').items(): close(dict(getattr(method, ours).named_parameters())[k].grad, g, rtol=1e-9, atol=1e-10)
    method.local.positives_of.clear()
    method.load_state_dict(state)
    assert abs(method(batch)['loss'] - z['total_loss']) < 2e-6, 'with exact grid distances'
    logits = (F.normalize(z['zg_a'], dim=1) @ F.normalize(z['zg_b'], dim=1).T)
    for k in (1, 5): close(top_k_accuracy(logits, k=k), z[f'metric/global_a2b_top_{k}_acc']), close(top_k_accuracy(logits.T, k=k), z[f'metric/global_b2a_top_{k}_acc'])


@pytest.mark.parametrize('kind', list(METHODS))
def test_the_gradient_reaches_every_trained_part(kind):
    method = make(kind, probe=('effusion', 'opacity')).train()
    batch = batch_of(one=kind != 'lovt') | {'labels': torch.tensor([[1., 0]] * 3 + [[0., 1]] * 3)}
    method(batch)['loss'].backward()
    dead = [n for n, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [n for n in dead if 'pooler' not in n and not n.endswith('position_embeddings.weight')], dead
    head = method.image_pool.attention.in_proj_bias.grad.chunk(3)[1] if kind != 'convirt' else torch.zeros(1)
    assert head.abs().sum() == 0, 'the key bias cancels in the softmax'


@pytest.mark.parametrize('kind', list(METHODS))
@pytest.mark.parametrize('size', [1, 2, 4])
def test_gradcache_equals_the_full_batch_with_frozen_norms(kind, size):
    method = make(kind, duplicates='mask').double().eval()
    batch = batch_of(one=kind != 'lovt', dtype=torch.float64)
    batch['text_group'] = batch['text_group'] // 2
    method.zero_grad()
    loss = method(batch)['loss']
    loss.backward()
    whole = gradients(method)
    method.zero_grad()
    out = backward_batch(method, batch, StepState(), size)
    found = gradients(method)
    assert out.losses['loss'].item() == pytest.approx(loss.item(), abs=1e-12) and found.keys() == whole.keys()
    for k in whole: assert (found[k] - whole[k]).abs().max() <= 1e-10 * max(1., whole[k].abs().max()), k


def test_chunks_in_training_mode_are_the_same_chunks_in_one_graph():
    "BatchNorm sees a chunk, as in the paper it sees a micro-batch: running statistics move once a chunk."
    from medvl.train.gradcache import join, seed_chunk
    a, b, batch = make().double().train(), make().double().train(), batch_of(dtype=torch.float64)
    backward_batch(a, batch, StepState(), 3)
    parts = []
    for i in range(2):
        seed_chunk(StepState(), 0, i)
        parts.append(b.encode(slice_batch(batch, 3 * i, 3 * i + 3)))
    b.losses(join(parts), batch, StepState())['loss'].backward()
    found, whole = gradients(a), gradients(b)
    for k in whole: assert (found[k] - whole[k]).abs().max() <= 1e-10 * max(1., whole[k].abs().max()), k
    for x, y in zip(a.buffers(), b.buffers()): assert torch.equal(x, y)


@pytest.mark.parametrize('training', [False, True])
def test_a_report_does_not_feel_its_neighbours_padding(training):
    "The same six studies; the last report is longer or shorter, and the tokens are padded further. Dropout off, BatchNorm as in training or frozen."
    method = make().double().eval()
    for m in method.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.train(training)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    batch = batch_of(dtype=torch.float64)
    one = method(batch)
    wide = {**batch, 'tokens': {k: F.pad(v, (0, 40)) for k, v in batch['tokens'].items()}}
    method.load_state_dict(state)
    two = method(wide)
    for k in one: assert two[k].item() == pytest.approx(one[k].item(), abs=1e-10), k
    longer = batch_of(reports=reports_of(5) + [SENTENCES * 2], dtype=torch.float64)
    if training: return
    a, b = method.encode(batch), method.encode(longer)
    for k in ('text', 'sentences', 'regions_attended', 'sentences_attended', 'sentence_weights'):
        n = a[k].shape[1]
        close(b[k][:5, :n], a[k][:5], rtol=1e-9, atol=1e-10)
    old = make(legacy_padded_mean=True).double().eval()
    assert (old.encode(longer)['text'][:5] - old.encode(batch)['text'][:5]).abs().max() > 1e-5, 'the original feels it'


def test_losses_are_the_weighted_sum_and_every_ablation_is_what_it_says():
    batch = batch_of()
    for name in ABLATIONS:
        config, train, text = ablation(name, **TINY, vocab_size=150)
        method = LoVT(config, TOKENIZER).train()
        out = method(batch)
        weights = {'i2t': config.i2t_weight, 't2i': config.t2i_weight} | {f'{k}_{d}': w for k, w in (('regions', config.region_weight), ('sentences', config.sentence_weight)) for d in ('l2att', 'att2l')}
        assert out['loss'].item() == pytest.approx(sum(w * out[k].item() for k, w in weights.items() if k in out), rel=1e-5), name
        assert (method.local is not None) == ('regions_l2att' in out) == any('alignment' in n for n, _ in method.named_parameters())
        settings(**{**train, 'precision': 'fp32', 'trackers': (), 'cpu': True})
        assert set(text) <= {'slot'}
    p = LoVT(ablation('identity', **TINY, vocab_size=150)[0], TOKENIZER).local.positives((3, 2), torch.zeros(1))
    assert torch.equal(p, torch.eye(6))
    with pytest.raises(ValueError, match="Did you mean 'no_weight'"): ablation('no_weigt')
    with pytest.raises(ValueError, match='identity'): make(positives='identiti')


@pytest.mark.parametrize('kind', list(METHODS))
def test_saving_and_loading(tmp_path, kind):
    method, batch = make(kind).eval(), batch_of(one=kind != 'lovt')
    again = from_pretrained(save_pretrained(method, tmp_path / kind))
    assert again.name == kind and again.config == replace(method.config, text_pretrained=False)
    with torch.no_grad():
        assert torch.equal(again(batch)['loss'], method(batch)['loss'])
        assert torch.equal(again.encode_text(['No effusion. The heart is large.']), method.encode_text(['No effusion. The heart is large.']))
        if kind == 'lovt': assert torch.equal(again.attention_maps(batch['images'], batch['sentences'])[0], method.attention_maps(batch['images'], batch['sentences'])[0])
    assert {'encode_image', 'encode_text', 'project_text', 'image_features', 'feature_maps'} <= set(capabilities(again))
    assert build(kind, {**TINY, 'vocab_size': 150}, tokenizer=TOKENIZER).config.dim == 16


def test_freezing_follows_the_encoder(tmp_path):
    method = make()
    assert method.config.frozen_layers == 0 and all(p.requires_grad for p in method.text_encoder.parameters())
    method.text_encoder.text_encoder.save_pretrained(tmp_path / 'bert')
    half = make(text_encoder=str(tmp_path / 'bert'))
    frozen = {n for n, p in half.text_encoder.named_parameters() if not p.requires_grad}
    assert half.config.frozen_layers == 1 and frozen and all('embeddings' in n or 'layer.0.' in n for n in frozen)
    assert make(text_encoder=str(tmp_path / 'bert'), text_pretrained=False).config.frozen_layers == 0
    with pytest.raises(ValueError, match='has 2'): make(frozen_layers=3)


def test_bad_input_is_named():
    method, batch = make().eval(), batch_of()
    none = {**batch, 'tokens': {**batch['tokens'], 'sentence': batch['tokens']['sentence'] * (torch.arange(6) != 2).view(6, 1, 1)}}
    with pytest.raises(DataError, match='without sentences: s2'): method.encode(none)
    with pytest.raises(DataError, match='without sentences: s0'): method.encode({**batch, 'tokens': {**batch['tokens'], 'sentence': torch.zeros_like(batch['tokens']['sentence'])}})
    with pytest.raises(ValueError, match='sentence'): method.encode({**batch, 'tokens': {k: v for k, v in batch['tokens'].items() if k != 'sentence'}})
    with pytest.raises(ValueError, match='one image'): method.encode({**batch, 'images': batch['images'].expand(-1, 2, -1, -1, -1)})
    for name in ('lovt', 'clip', 'convirt'):
        with pytest.raises(DataError, match='images without a report: s0, s1'): make(name).encode({k: v for k, v in batch.items() if k != 'tokens'})
    nan = {**batch, 'images': batch['images'].float()}
    nan['images'][4] = float('nan')
    with pytest.raises(DataError, match='not finite: s4'): method.encode(nan)
    with pytest.raises(ValueError, match='positive'): make(temperature=0.)
    with pytest.raises(ValueError, match='local_temperature=0.0 must be positive'): make(local_temperature=0.)
    with pytest.raises(ValueError, match='radius=-1 must be 0 or more'): make(radius=-1)
    with pytest.raises(DataError): method.encode_text([[]])
    with pytest.raises(ValueError, match='set vocab_size'): LoVT(LoVTConfig(**TINY, vocab_size=40), TOKENIZER)


def test_lovt_answers_about_places():
    method, batch = make().eval(), batch_of()
    with torch.no_grad():
        maps, real = method.attention_maps(batch['images'], batch['sentences'])
        assert maps.shape == (6, 4, 2, 2) and real.sum(1).tolist() == [len(r) for r in batch['sentences']]
        close(maps.sum((2, 3)), real.float(), rtol=1e-5, atol=1e-5)
        vectors, again = method.sentences(batch['sentences'])
        assert torch.equal(real, again) and vectors[~real].abs().sum() == 0
        close(vectors[real].norm(dim=-1), torch.ones(int(real.sum())), rtol=1e-5, atol=1e-5)
        close(method.regions(batch['images']).norm(dim=-1), torch.ones(6, 4), rtol=1e-5, atol=1e-5)
        close(method.encode_text(batch['sentences']), method.encode(batch)['text'], rtol=1e-4, atol=1e-5)
        close(method.encode_image(batch['images']), method.encode(batch)['image'], rtol=1e-4, atol=1e-5)
        close(method.encode_image(batch['images'][:, 0]), method.encode(batch)['image'], rtol=1e-4, atol=1e-5)
    assert method.encode_text([]).shape == (0, 16)


class Studies:
    "Samples of the batch contract: a corner of the image is bright, one sentence names it."
    def __init__(self, n=16, one=False): self.n, self.one, self.tokens = n, one, SentenceTokens(TOKENIZER)
    def __len__(self): return self.n
    def __getitem__(self, key):
        epoch, i = key
        image = np.random.default_rng([i, 5]).integers(0, 60, (64, 64)).astype(np.uint8)
        image[(i % 2) * 32:(i % 2) * 32 + 24, (i // 2 % 2) * 32:(i // 2 % 2) * 32 + 24] += 150
        sentences = [SENTENCES[i % 4], *SENTENCES[4:4 + (0 if self.one else i % 3)]]
        tokens = self.tokens(sentences)
        tokens.pop('kept')
        return dict(images=[image], view=['PA'], sample_id=f's{i}', patient_id=str(i), index=i, epoch=epoch, tokens=[tokens], sentences=sentences, text=[' '.join(sentences)],
                    text_group=np.array([i % 4 + 10 * len(sentences)]))

    def collate(self, samples):
        from medvl.data.batch import collate
        return collate(samples)


@pytest.mark.parametrize('kind', list(METHODS))
def test_training_lowers_the_loss_and_resumes_bit_by_bit(tmp_path, kind):
    from training import contents

    from medvl.train.loop import train

    class Died(Exception): pass
    config = settings(epochs=3, batch_size=8, chunk_size=4 if kind != 'convirt' else None, accumulate=1, lr=2e-3, ema=0.0, save_every=2, valid_every=6)
    data, valid = Studies(16, kind != 'lovt'), Studies(8, kind != 'lovt')
    make_one = lambda: make(kind, duplicates='mask')
    result = train(make_one(), data, config, tmp_path / 'whole', valid)
    losses = result.history.loss.tolist()
    assert losses[-1] < losses[0] and result.step == 6

    def dies(method, state):
        if state.step >= 6: raise Died
        return {}
    with pytest.raises(Died): train(make_one(), data, config, tmp_path / 'cut', valid, None, dies)
    train(make(kind, seed=5, duplicates='mask'), data, config, tmp_path / 'cut', valid)
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


def _gradient(batch):
    from medvl.train.distributed import average_gradients, exchange_of
    method, exchange = make(duplicates='mask').double().eval(), exchange_of()
    n = 6 // exchange.world
    backward_batch(method, slice_batch(batch, exchange.rank * n, (exchange.rank + 1) * n), StepState(), None, exchange=exchange)
    average_gradients(method.parameters())
    return gradients(method)


def test_two_processes_give_the_gradient_of_one():
    "The global vectors are gathered; the local losses of each process are averaged."
    from medvl.train.distributed import launch
    batch = batch_of(dtype=torch.float64)
    batch['text_group'] = batch['text_group'] // 2
    one = _gradient(batch)
    for two in launch(_gradient, batch):
        for k in one: assert (two[k] - one[k]).abs().max() <= 1e-10 * max(1., one[k].abs().max()), k


# --- files of the original

from plain_resnet import make as plain_weights  # noqa: E402

from medvl.methods.released.lovt_files import PARTS, fill_encoder, find_part, from_lovt, open_lovt  # noqa: E402
from medvl.models.checkpoints import Checkpoint  # noqa: E402
from medvl.models.resnet import ResNet  # noqa: E402

PATHS = {'image_encoder': 'model.encoder_a.resnet', 'text_encoder.text_encoder': 'model.encoder_b.bert', **{ours: f'model.{theirs}' for theirs, ours in NAMES.items()}}


def as_original(method):
    "A Lightning file with the module names of the golden arrays; local projections as 1x1 convolutions."
    state = {'online_eval.scan.linear.weight': torch.zeros(5, 128)}
    for k, v in method.state_dict().items():
        part = next(p for p in PATHS if k.startswith(p + '.'))
        state[PATHS[part] + k[len(part):]] = v[..., None] if part in ('region_projection', 'sentence_projection') and v.dim() == 2 else v
    return state


def test_a_lightning_file_opens_strictly_and_safely(tmp_path):
    method = make(legacy_padded_mean=True, legacy_padded_norm=True).eval()
    state, config = as_original(method), method.config
    torch.save({'state_dict': state, 'epoch': 3, 'hyper_parameters': {'lr': 1e-4}}, tmp_path / 'lovt.ckpt')
    again, report = from_lovt(tmp_path / 'lovt.ckpt', config, TOKENIZER)
    batch = batch_of()
    with torch.no_grad(): assert torch.equal(again(batch)['loss'], method(batch)['loss'])
    assert report.complete and len(report.loaded) == len(method.state_dict()) and report.ignored == ['online_eval.scan.linear.weight']
    for bad, match in (({k: v for k, v in state.items() if 'cross_attention' not in k}, 'alignment is not found'), ({**state, 'model.extra': torch.zeros(1)}, 'model.extra'),
                       ({k: v for k, v in state.items() if k != 'model.project_global_a.norm.bias'}, 'missing: image_projection.norm.bias'),
                       ({**state, 'other.cross_attention.key_projection.weight': torch.zeros(1)}, 'may stand under')):
        with pytest.raises(DataError, match=match): from_lovt(Checkpoint(bad), config, TOKENIZER)
    moved = {k.replace('model.pool_a.', 'x.'): v for k, v in state.items()}
    with pytest.raises(DataError, match='image_pool is not found'): open_lovt(Checkpoint(moved))
    assert open_lovt(Checkpoint(moved), paths={'image_pool': 'x.'}).paths['image_pool'] == 'x.'
    torch.save({'state_dict': {'model.encoder_a.resnet.layer4.0.conv1.weight': print}}, tmp_path / 'evil.ckpt')
    with pytest.raises(DataError): from_lovt(tmp_path / 'evil.ckpt', config, TOKENIZER)
    (tmp_path / 'torn.ckpt').write_bytes((tmp_path / 'lovt.ckpt').read_bytes()[:9000])
    with pytest.raises(DataError): from_lovt(tmp_path / 'torn.ckpt', config, TOKENIZER)


def test_the_recorded_module_names_are_found():
    names = [k[len('param/'):].replace('/', '.') for k in np.load(golden('lovt/lovt_stack.npz')).files if k.startswith('param/')]
    for theirs, ours in NAMES.items(): assert find_part(names, ours) == theirs + '.'
    assert set(NAMES.values()) < set(PARTS)


def test_encoders_are_filled_from_any_file(tmp_path):
    sd, method = plain_weights('resnet-tiny'), make()
    torch.save(sd, tmp_path / 'resnet.pth')
    assert fill_encoder(method, tmp_path / 'resnet.pth').ignored == ['fc.weight', 'fc.bias']
    assert torch.equal(method.image_encoder.layer2[0].conv1.weight, sd['layer2.0.conv1.weight'])
    other = ResNet('resnet-tiny')
    report = fill_encoder(other, Checkpoint(as_original(method)))
    assert report.complete and torch.equal(other.layer2[0].conv1.weight, sd['layer2.0.conv1.weight']) and len(report.ignored) > 50
    with pytest.raises(DataError, match='do not fit'): fill_encoder(ResNet('resnet-18'), tmp_path / 'resnet.pth')
    assert torch.equal(make(image_weights=str(tmp_path / 'resnet.pth')).image_encoder.bn1.weight, sd['bn1.weight'])


def test_full_size_counts():
    "ResNet-50 and BERT on the meta device: the numbers of the spec's section 1.4 and 1.5."
    with torch.device('meta'): method = LoVT(LoVTConfig(text_encoder='bert-base-clinical-config'))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(method.image_pool) == 16_785_408 and count(method.text_pool) == 2_362_368 and count(method.alignment) == 788_992 and count(method.image_encoder) == 23_508_032
    assert method.config.frozen_layers == 0
    with torch.device('meta'): half = LoVT(LoVTConfig(text_encoder='bert-base-clinical-config', frozen_layers=6))
    frozen = {n.split('.')[1] if 'embeddings' in n else int(n.split('.')[3]) for n, p in half.text_encoder.named_parameters() if not p.requires_grad}
    trained = {int(n.split('.')[3]) for n, p in half.text_encoder.named_parameters() if p.requires_grad and 'layer.' in n}
    assert frozen == {'embeddings', *range(6)} and trained == set(range(6, 12))
