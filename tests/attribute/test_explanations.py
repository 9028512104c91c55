"""Every explanation, curve and measure against the numbers of the golden files, and its invariants (spec 5.2)."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden import golden
from medvl.attribute.attention_flow import (StreamRelevance, attention_relevance, attention_rollout, class_row, legrad, legrad_layer,
                                            weighed_attention)
from medvl.attribute.cams import class_activation_map, eigen_cam, grad_cam_plus_plus, library_picture
from medvl.attribute.faithfulness import blurred, change_curve, curve_steps, imputed, infidelity, sensitivity
from medvl.attribute.gradcam import KINDS
from medvl.attribute.gradients import (deep_lift, gradient_shap, guided_backprop, guided_grad_cam, input_times_gradient, integrated_gradients,
                                       saliency, smooth_gradient)
from medvl.attribute.map_measures import contrast_to_noise, map_measures, map_region, otsu_threshold, pointing_score, top_share
from medvl.attribute.masking import channel_masks, occlusion, rise, rise_masks, score_cam, steepest_channels

TARGETS = [1, 2]


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'cardiomegaly/{name}.npz')).items()}


def close(a, b, eps=1e-9):
    double = lambda v: v.detach().double() if isinstance(v, torch.Tensor) else torch.as_tensor(v, dtype=torch.float64)
    torch.testing.assert_close(double(a), double(b), rtol=eps, atol=eps)


@pytest.fixture(scope='module')
def g(): return arrays('attr_cnn')


@pytest.fixture(scope='module')
def c(): return arrays('attr_cam_and_curves')


class Net(nn.Module):
    def __init__(self, w):
        super().__init__()
        made = json.loads(golden('cardiomegaly/attr_cnn.json').read_text())
        (a, b), (_, d) = made['conv1'], made['conv2']
        self.conv1, self.relu1 = nn.Conv2d(a, b, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2, self.fc = nn.Conv2d(b, d, 3, padding=1, stride=made['stride2']), nn.ReLU(), nn.Linear(d, made['outputs'])
        self.double().load_state_dict({k[2:]: v for k, v in w.items() if k.startswith('w/')})

    def forward(self, x): return self.fc(self.relu2(self.conv2(self.relu1(self.conv1(x)))).mean((2, 3)))


@pytest.fixture(scope='module')
def net(g): return Net(g).eval()


@pytest.fixture(scope='module')
def x(g): return g['x_u8'].double() / 255


def of(net, i): return lambda v: net(v)[:, TARGETS[i]]


def each(net):
    "The score of image 0's target and of image 1's, for batches in that order (repeated)."
    return lambda v: net(v)[torch.arange(len(v)), torch.tensor(TARGETS).repeat(len(v) // 2)]


def test_the_network_is_the_one(g, net, x): close(net(x), g['logits'])


@pytest.mark.parametrize('name, f', [
    ('saliency_abs', lambda s, x, g: saliency(s, x, signed=False)), ('saliency_signed', lambda s, x, g: saliency(s, x)),
    ('input_x_gradient', lambda s, x, g: input_times_gradient(s, x)),
    ('integrated_gradients_50_zero', lambda s, x, g: integrated_gradients(s, x)),
    ('integrated_gradients_50_blur', lambda s, x, g: integrated_gradients(s, x, g['baseline_blur7'])),
    ('integrated_gradients_8_riemann_trapezoid_zero', lambda s, x, g: integrated_gradients(s, x, steps=8, rule='riemann_trapezoid'))])
def test_gradients(name, f, g, net, x):
    found = f(each(net), x, g)
    if isinstance(found, tuple):
        found, gap = found
        if f'delta/{name}' in g: close(gap, g[f'delta/{name}'], 1e-7)
    close(found, g[f'attr/{name}'], 1e-7 if 'integrated' in name else 1e-9)


@pytest.mark.parametrize('chunk', [1, 7, 200])
def test_integrated_gradients_do_not_depend_on_chunks_and_are_complete(chunk, net, x):
    found, gap = integrated_gradients(each(net), x, chunk=chunk)
    close(found, integrated_gradients(each(net), x)[0])
    assert gap.abs().max() < .01 * (net(x) - net(0 * x)).abs().max()


def test_averages_over_noise(g, net, x):
    noise = g['draws/smoothgrad_noise'].unflatten(0, (2, -1))
    for name, kind in (('smoothgrad', 'mean'), ('vargrad', 'variance'), ('smoothgrad_sq', 'square')):
        close(smooth_gradient(each(net), x, kind, noise=noise), g[f'attr/{name}'])


def test_gradient_shap(g, net, x):
    d = lambda case, k: g[f'draws/gradient_shap_{case}/{k}']
    for i in range(2):
        case = f'original_settings/image{i}'
        draws = d(case, 'noise')[None], d(case, 'mix')[None], d(case, 'baseline_index')[None]
        close(gradient_shap(of(net, i), x[i:i + 1], torch.cat([0 * x[i:i + 1], x[i:i + 1]]), draws=draws), g[f'attr/gradient_shap_{case}'])
    case = 'two_baselines'
    draws = [d(case, k).unflatten(0, (2, -1)) for k in ('noise', 'mix', 'baseline_index')]
    close(gradient_shap(each(net), x, g['baselines/gradient_shap_two_baselines'], draws=draws), g[f'attr/gradient_shap_{case}'])


def test_other_rules_for_relu(g, net, x):
    close(guided_backprop(each(net), x, net), g['attr/guided_backprop'])
    close(guided_backprop(each(net), x, net, guided=False), g['attr/deconvolution'])
    for name, mode in (('guided_gradcam_conv2', 'nearest'), ('guided_gradcam_conv2_bilinear', 'bilinear')):
        close(guided_grad_cam(each(net), x, net, g['attr/layer_gradcam_conv2'][:, 0], mode), g[f'attr/{name}'])
    close(saliency(each(net), x), g['attr/saliency_signed']) # the network is as before


def test_deep_lift_is_captums(g, net, x):
    pytest.importorskip('captum')
    for name, base in (('zero', 0.), ('blur', g['baseline_blur7'])):
        found, gap = deep_lift(net, x, TARGETS, base)
        close(found, g[f'attr/deeplift_{name}']); close(gap, g[f'delta/deeplift_{name}'], 1e-7)


def test_captum_gives_the_same_on_another_network():
    attr = pytest.importorskip('captum.attr')
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).double().eval()
    x, score = torch.rand(3, 1, 16, 16).double(), lambda v: net(v)[:, 4]
    close(guided_backprop(score, x, net), attr.GuidedBackprop(net).attribute(x, target=4))
    close(guided_backprop(score, x, net, False), attr.Deconvolution(net).attribute(x, target=4))
    close(integrated_gradients(score, x, .2, 20)[0], attr.IntegratedGradients(net).attribute(x, .2, target=4, n_steps=20))
    their = attr.Occlusion(net).attribute(x, sliding_window_shapes=(1, 5, 4), strides=(1, 3, 2), baselines=.1, target=4)
    for i in range(3): close(occlusion(score, x[i], (5, 4), (3, 2), .1), their[i, 0], 1e-6)


@pytest.mark.parametrize('name, window, stride, baseline', [('win15_stride8_zero', 15, 8, 0.), ('win5_stride3_zero', 5, 3, 0.), ('win5_stride3_baseline0.3', 5, 3, .3)])
def test_occlusion(name, window, stride, baseline, g, net, x):
    for i in range(2): close(occlusion(of(net, i), x[i], window, stride, baseline, chunk=7), g[f'attr/occlusion_{name}'][i, 0], 1e-6)


@pytest.mark.parametrize('layer', ['relu1', 'conv2', 'relu2'])
def test_cams(layer, g, c, net, x):
    a, d = g[f'act/{layer}'], g[f'grad/{layer}']
    kind = lambda k: KINDS[k](a[:, None], d[:, None])[:, 0]
    close(kind('grad_cam'), g[f'attr/layer_gradcam_{layer}'][:, 0])
    close(kind('hires_cam'), c[f'cam/hirescam/{layer}/signed'])
    close(kind('layer_cam').relu(), c[f'cam/layercam/{layer}'].relu())
    heat, weights = grad_cam_plus_plus(a, d)
    close(heat, c[f'cam/gradcam_pp/{layer}/signed']); close(weights, c[f'cam/gradcam_pp/{layer}/channel_weights'])
    close(kind('grad_cam++'), heat)
    close(grad_cam_plus_plus(a, d, 1e-6)[0], c[f'cam/gradcam_pp_eps1e-6/{layer}/signed'])
    for name, centred in (('uncentred', False), ('centred', True)):
        ours, their = eigen_cam(a, centred), c[f'cam/eigencam_{name}/{layer}']
        for o, t in zip(ours, their): close(o if (o * t).sum() > 0 else -o, t, 1e-8)


def test_cam_is_grad_cam_times_places_and_hires_cam_is_grad_cam_behind_pooling(g, c, net):
    a, d = g['act/relu2'], g['grad/relu2']
    found = class_activation_map(a, net.fc.weight[TARGETS])
    close(found, c['cam/cam_linear_head/relu2'])
    close(found, 256 * KINDS['grad_cam'](a[:, None], d[:, None])[:, 0]) # 16 x 16 places
    close(KINDS['hires_cam'](a[:, None], d[:, None]), KINDS['grad_cam'](a[:, None], d[:, None]))


def test_a_library_turns_its_picture_upside_down(g):
    cam = KINDS['grad_cam'](g['act/relu2'][:, None], g['grad/relu2'][:, None])[:, 0]
    close(library_picture(cam, (32, 32), inverted=False), g['monai_gradcam_relu2_identity'][:, 0], 1e-5)
    close(library_picture(cam, (32, 32)), g['monai_gradcam_relu2_default'][:, 0], 1e-4)


@pytest.mark.parametrize('layer', ['conv2', 'relu2'])
def test_score_cam(layer, g, c, net, x):
    for i in range(2):
        a = g[f'act/{layer}'][i]
        close(channel_masks(a, (32, 32)), c[f'scorecam/{layer}/masks'][i], 1e-6)
        heat, weights, scores = score_cam(of(net, i), x[i], a, chunk=3)
        for found, key in ((heat, 'map_relu'), (weights, 'weights'), (scores, 'scores_logit')): close(found, c[f'scorecam/{layer}/{key}'][i], 1e-6)
        chosen = steepest_channels(g[f'grad/{layer}'][i], 8)
        close(score_cam(of(net, i), x[i], a, chosen)[1], weights, 1e-6) # all channels asked: gScoreCAM is Score-CAM


def test_rise(c, net, x):
    masks = rise_masks((32, 32), grids=c['rise/low_resolution'], shifts=c['rise/shifts_yx'])
    close(masks, c['rise/masks'], 1e-6)
    for i in range(2):
        p = lambda v, i=i: net(v).softmax(1)[:, TARGETS[i]]
        close(p(masks[:, None] * x[i]), c['rise/probabilities'][i], 1e-6)
        close(rise(p, x[i], masks, 'expected', chunk=7), c['rise/map_divided_by_N_times_0.5'][i], 1e-6)
        close(rise(p, x[i], masks), c['rise/map_divided_by_mask_sum'][i], 1e-6)


@pytest.mark.parametrize('kind', ['deletion', 'insertion'])
@pytest.mark.parametrize('base', ['zero', 'mean', 'blur'])
@pytest.mark.parametrize('name', ['saliency', 'gradcam_nearest'])
def test_curves(name, base, kind, c, g, net, x):
    close(curve_steps(1024, 16), c['curves/pixels'])
    for i in range(2):
        p, heat = lambda v, i=i: net(v).softmax(1)[:, TARGETS[i]], c[f'curves/{name}/map'][i]
        shares, answers, area = change_curve(p, x[i], heat, kind, g['baseline_blur7'][i] if base == 'blur' else base, chunk=5)
        close(shares, c['curves/fractions']); close(answers, c[f'curves/{name}/{kind}/{base}/probability'][i])
        close(area, c[f'curves/{name}/{kind}/{base}/auc'][i])


def test_blur_at_the_border(g, x):
    close(blurred(x), g['baseline_blur7'])
    inside = blurred(torch.ones(1, 1, 9, 9))
    assert inside.min() > .999 # the border is not darkened


def test_infidelity_and_sensitivity(g, net, x):
    for i in range(2):
        p = g['infidelity/perturbations'][8 * i:8 * i + 8]
        for name in ('saliency_signed', 'integrated_gradients_50_zero'): close(infidelity(of(net, i), x[i], g[f'attr/{name}'][i], p), g[f'infidelity/{name}'][i])
        close(infidelity(of(net, i), x[i], g['attr/integrated_gradients_50_zero'][i], p, normalise=True), g['infidelity/integrated_gradients_50_zero_normalised'][i])
        q = g['sensitivity/perturbations'][6 * i:6 * i + 6]
        close(sensitivity(lambda v, i=i: saliency(of(net, i), v), x[i], q), g['sensitivity/saliency_signed'][i])
        close(sensitivity(lambda v, i=i: integrated_gradients(of(net, i), v)[0], x[i], q), g['sensitivity/integrated_gradients_50_zero'][i], 1e-7)


def cases(): return json.loads(golden('cardiomegaly/localisation.json').read_text())


def test_measures_of_maps():
    z, told, seen = arrays('localisation'), cases(), 0
    for name, v in told.items():
        if f'{name}/map' not in z: continue
        heat, truth = z[f'{name}/map'].numpy(), z[f'{name}/mask'].numpy()
        got = map_measures(heat, truth)
        want = {'chance': 'chance', 'pointing': 'pointing_expected', 'energy': 'energy', 'silent': 'energy_undefined_zero_map', 'rank': 'rank_expected', 'auroc': 'auroc',
                'average_precision': 'average_precision', 'iou_otsu': 'iou_otsu', 'pixels_otsu': 'otsu_pixels', 'iou_quantile': 'iou_quantile95', 'pixels_quantile': 'quantile95_pixels'}
        for ours, theirs in want.items(): assert got[ours] == pytest.approx(v[theirs], abs=1e-9) if v[theirs] is not None else got[ours] is None, (name, ours)
        if v['otsu_threshold_on_minmax'] is None: assert np.isnan(otsu_threshold(heat)), name
        else: assert otsu_threshold(heat) == pytest.approx(v['otsu_threshold_on_minmax'], abs=1e-9), name
        if truth.any():
            assert pointing_score(heat, truth, ties='first') == v['pointing_first_tol0'] and pointing_score(heat, truth, 2., 'first') == v['pointing_first_tol2'], name
            assert top_share(heat, truth, 'first') == pytest.approx(v['rank_first'], abs=1e-9), name
        seen += 1
    assert seen == 14


@pytest.fixture(scope='module')
def v(): return arrays('attr_vit')


def layers(v, at): return [v[f'{at}/layer{i}'] for i in range(2)]


def test_rollout(v):
    close(attention_rollout(layers(v, 'attention')), v['rollout/matrix'])
    close(class_row(attention_rollout(layers(v, 'attention')), (4, 4)), v['rollout/cls_to_patches'])
    close(class_row(attention_rollout(layers(v, 'attention'), residual=False), (4, 4)), v['rollout_without_residual/cls_to_patches'])


@pytest.mark.parametrize('score', ['class_logit', 'text_similarity'])
def test_relevance(score, v):
    a, d = layers(v, 'attention'), layers(v, f'chefer/{score}/attention_gradient')
    for i in range(2): close(weighed_attention(a[i], d[i]), v[f'chefer/{score}/A_bar/layer{i}'])
    r = attention_relevance(a, d)
    close(r, v[f'chefer/{score}/R']); close(class_row(r, (4, 4)), v[f'chefer/{score}/cls_to_patches'])
    close(class_row(attention_relevance(a, d, first=-1), (4, 4)), v[f'chefer/{score}/last_layer_only/cls_to_patches'])


class ViT(nn.Module):
    "The golden's transformer, plain, with its attention kept."
    def __init__(self, made):
        super().__init__()
        self.made, self.w = made, {}
        for p in made['weights']:
            n = int(np.prod(p['shape']))
            self.w[p['name']] = torch.from_numpy(p['offset'] + p['scale'] * formula(n, p['salt'])).view(p['shape'])

    def tokens(self, x):
        w, m = self.w, self.made
        p, (r, c) = m['patch'], m['grid']
        patches = x.view(-1, r, p, c, p).transpose(2, 3).reshape(-1, r * c, p * p)
        t = torch.cat([w['cls'].expand(len(x), 1, -1), F.linear(patches, w['patch.weight'], w['patch.bias'])], 1) + w['pos']
        norm = lambda t, n: F.layer_norm(t, t.shape[-1:], w[f'{n}.weight'], w[f'{n}.bias'], m['layer_norm_eps'])
        out, maps = [], []
        for i in range(m['depth']):
            b = f'block{i}'
            q, k, v = F.linear(norm(t, f'{b}.norm1'), w[f'{b}.qkv.weight'], w[f'{b}.qkv.bias']).chunk(3, -1)
            heads = lambda y: y.unflatten(-1, (m['heads'], -1)).transpose(1, 2)
            a = (heads(q) @ heads(k).mT * (m['dim'] // m['heads']) ** -.5).softmax(-1)
            maps.append(a)
            t = t + F.linear((a @ heads(v)).transpose(1, 2).flatten(2), w[f'{b}.proj.weight'], w[f'{b}.proj.bias'])
            t = t + F.linear(F.gelu(F.linear(norm(t, f'{b}.norm2'), w[f'{b}.fc1.weight'], w[f'{b}.fc1.bias'])), w[f'{b}.fc2.weight'], w[f'{b}.fc2.bias'])
            out.append(norm(t, 'norm'))
        return out, maps


def formula(n, salt):
    "The value formula of the golden README."
    h, m = np.arange(n, dtype=np.uint64), np.uint64(2 ** 32 - 1)
    h = (h * np.uint64(2654435761) + np.uint64(salt * 2246822519 + 374761393)) & m
    for shift, times in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(times)) & m
    return ((h ^ (h >> np.uint64(16))).astype(np.float64) + .5) / 2 ** 31 - 1


@pytest.mark.parametrize('name', ['class_logit_cls_pool', 'text_similarity_cls_pool', 'text_similarity_mean_pool'])
def test_legrad(name, v):
    made = json.loads(golden('cardiomegaly/attr_vit.json').read_text())
    vit, x = ViT(made), v['x_u8'].double() / 255
    for p in vit.w.values(): p.requires_grad_()
    tokens, maps = vit.tokens(x)
    pool = (lambda t: t[:, 0]) if 'cls_pool' in name else (lambda t: t.mean(1))
    if name.startswith('class'): score = lambda t: F.linear(pool(t), vit.w['head.weight'], vit.w['head.bias'])[torch.arange(2), made['targets']]
    else: score = lambda t: F.cosine_similarity(F.linear(pool(t), vit.w['image_projection']), vit.w['text_vector'][None])
    gradients = []
    for i in range(2):
        s = score(tokens[i])
        close(s.detach(), v[f'legrad/{name}/score/layer{i}'])
        gradients.append(torch.autograd.grad(s.sum(), maps[i], retain_graph=True)[0])
        close(legrad_layer(gradients[i], (4, 4)), v[f'legrad/{name}/E/layer{i}'])
    close(legrad(gradients, (4, 4)), v[f'legrad/{name}/sum'])


def test_relevance_of_two_streams():
    z, made = arrays('chefer_bimodal'), json.loads(golden('cardiomegaly/chefer_bimodal.json').read_text())
    bar = lambda at: weighed_attention(z[f'{at}/attention'], z[f'{at}/gradient'])
    r = StreamRelevance.start(made['text_tokens'], made['image_tokens'], z['after_cross0/R_tt'])
    for i in range(made['text_self']): r.text_self(bar(f'text_self{i}'))
    for i in range(made['image_self']): r.image_self(bar(f'image_self{i}'))
    for i in range(made['cross_blocks']):
        last = i == made['cross_blocks'] - 1
        r.cross(bar(f'cross{i}_text_to_image'), None if last else bar(f'cross{i}_image_to_text'))
        r.text_self(bar(f'cross{i}_text_self'))
        if not last: r.image_self(bar(f'cross{i}_image_self'))
        for k in ('tt', 'ii', 'ti', 'it'): close(getattr(r, k), z[f'after_cross{i}/R_{k}'], 1e-12)


# --- bad input -------------------------------------------------------------------------------------------------------

def test_maps_that_are_no_maps():
    truth = np.zeros((4, 4), bool); truth[1:3, 1:3] = True
    with pytest.raises(ValueError, match='not finite'): map_measures(np.full((4, 4), np.nan), truth)
    with pytest.raises(ValueError, match='the same'): map_measures(np.zeros((4, 5)), truth)
    with pytest.raises(ValueError, match='not finite'): map_region(np.full((4, 4), np.inf))
    empty = map_measures(np.ones((4, 4)), ~truth & truth)
    assert all(empty[k] is None for k in ('pointing', 'energy', 'rank', 'auroc', 'average_precision'))
    one = map_measures(np.ones((4, 4)), truth)
    assert one['pointing'] == one['chance'] and one['rank'] == pytest.approx(.25) and one['auroc'] == .5 and one['iou_otsu'] == 0
    assert contrast_to_noise(np.ones((4, 4)), truth) == 0. and contrast_to_noise(np.ones((4, 4)), truth & ~truth) is None
    assert contrast_to_noise(truth * 1., truth) == np.inf and contrast_to_noise(-1. * truth, truth) == -np.inf


def test_what_is_all_missing_is_filled_without_nan():
    x = torch.rand(2, 1, 8, 8)
    assert imputed(x, torch.ones(2, 1, 8, 8, dtype=torch.bool)).isfinite().all()
    assert torch.equal(imputed(x, torch.zeros(2, 1, 8, 8, dtype=torch.bool)), x)


def test_a_model_without_gradients_is_named():
    with pytest.raises(ValueError, match='no gradient reaches the image'): saliency(lambda v: torch.zeros(len(v)), torch.rand(1, 1, 4, 4))
