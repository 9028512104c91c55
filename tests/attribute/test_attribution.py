"""Grad-CAM for sentences against captum, paired comparison, weight randomisation: Mammo-FActOR's rivals and its lie detector."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from tiny_maps import Tiny, TinyConfig
from torch import nn

from medvl.attribute.attribute_prompts import ATTRIBUTES, attribute_prompts
from medvl.attribute.comparison import attribute_figure, paired_differences, paper_table
from medvl.attribute.factor_protocol import FeatureMaps, localise
from medvl.attribute.gradcam import KINDS, caught, grad_cam, grad_cams, map_gradients, sentence_score
from medvl.attribute.map_makers import attribute_vectors, comparison_makers, grad_cam_maker
from medvl.attribute.sanity import cascade, randomise, rank_similarity, restored, sanity_table, stages_of, structural_similarity
from medvl.attribute.similarity import similarity_map, text_vector
from medvl.core.errors import DataError
from medvl.core.paths import digest
from medvl.core.seed import numpy_rng
from medvl.methods.base import Method
from medvl.methods.recipes import new_method


@pytest.fixture
def tiny(): return Tiny()


@pytest.fixture(scope='module')
def clip(): return new_method('mammoclip', 'smoke', ['there is a mass', 'no mass is seen'])


def noise(n, h=40, w=24): return torch.rand(n, 1, h, w, generator=torch.Generator().manual_seed(0)) * 255


# ------------------------------------------------------------------------------------------------ Grad-CAM

@pytest.mark.parametrize('positive', [True, False])
@pytest.mark.parametrize('layer', ['image_encoder.act1', 'image_encoder.conv'])
def test_equals_captum(tiny, layer, positive):
    captum = pytest.importorskip('captum.attr')
    tiny.eval()
    v, x = text_vector(tiny, 'a mass'), noise(3)
    oracle = captum.LayerGradCam(lambda images: tiny.encode_image(images) @ v, tiny.get_submodule(layer))
    want = oracle.attribute(x.clone().requires_grad_(), relu_attributions=positive)[:, 0].detach()
    torch.testing.assert_close(grad_cam(tiny, x, v, layer=layer, positive=positive), want, rtol=1e-5, atol=1e-8)
    oracle = captum.LayerGradCam(lambda images: tiny.encode_image(images) @ v, tiny.image_encoder.act2) # the last map, found without a name
    want = oracle.attribute(x.clone().requires_grad_(), relu_attributions=positive)[:, 0].detach()
    torch.testing.assert_close(grad_cam(tiny, x, v, positive=positive), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('block', [0, 3, -1])
def test_equals_captum_on_mammo_clip(clip, block):
    captum = pytest.importorskip('captum.attr')
    modes = {m: m.training for m in clip.modules()}
    x, v, layer = noise(2, 96, 64), text_vector(clip, 'there is a mass'), clip.image_encoder._blocks[block]
    ours = grad_cam(clip, x, 'there is a mass', layer=layer)
    assert modes == {m: m.training for m in clip.modules()} and all(p.grad is None for p in clip.parameters())
    clip.eval()
    want = captum.LayerGradCam(lambda images: clip.encode_image(images) @ v, layer).attribute(x.clone().requires_grad_(), relu_attributions=True)[:, 0]
    torch.testing.assert_close(ours, want.detach(), rtol=1e-4, atol=1e-8)
    for m, training in modes.items(): m.training = training


def test_formulas_by_loops(tiny):
    x, layer = noise(2), 'image_encoder.act1'
    maps, g, _ = map_gradients(tiny, x, [sentence_score(tiny, 'mass')], layer)
    a, d = maps.double().numpy(), g[:, 0].double().numpy()
    for kind in KINDS:
        heat = np.zeros((2, *a.shape[-2:]))
        for i, k in np.ndindex(a.shape[:2]):
            if kind == 'grad_cam': heat[i] += d[i, k].mean() * a[i, k]
            if kind == 'hires_cam': heat[i] += d[i, k] * a[i, k]
            if kind == 'layer_cam': heat[i] += np.maximum(d[i, k], 0) * a[i, k]
            if kind == 'grad_cam++':
                alpha = d[i, k]**2 / (2 * d[i, k]**2 + a[i, k].sum() * d[i, k]**3) # equation 19: the sum is over the map alone
                heat[i] += (alpha * np.maximum(d[i, k], 0)).sum() * a[i, k]
        torch.testing.assert_close(grad_cam(tiny, x, 'mass', kind, layer).double(), torch.from_numpy(np.maximum(heat, 0)), rtol=1e-4, atol=1e-7)


def test_batch_targets_and_frozen_weights(tiny):
    x, words = noise(3), ['a', 'ab', ['abc', 'abcd']]
    many = grad_cams(tiny, x, words, layer='image_encoder.conv')
    for j, w in enumerate(words):
        for i in range(3): torch.testing.assert_close(many[i, j], grad_cam(tiny, x[[i]], w, layer='image_encoder.conv')[0], rtol=1e-4, atol=1e-8)
    tiny.requires_grad_(False)
    with torch.no_grad(): torch.testing.assert_close(grad_cams(tiny, x, words, layer='image_encoder.conv'), many)
    v, w = text_vector(tiny, 'a'), text_vector(tiny, 'ab')
    against = map_gradients(tiny, x, [sentence_score(tiny, 'a', against='ab')])[1]
    both = map_gradients(tiny, x, [sentence_score(tiny, v), sentence_score(tiny, w)])[1]
    torch.testing.assert_close(against[:, 0], both[:, 0] - both[:, 1])


def test_nothing_is_left_behind(tiny):
    with pytest.raises(RuntimeError, match='on purpose'):
        with caught(tiny): raise RuntimeError('on purpose')
    with pytest.raises(RuntimeError, match='on purpose'):
        with caught(tiny, 'image_encoder.conv'): raise RuntimeError('on purpose')
    assert 'feature_maps' not in vars(tiny.image_encoder) and not tiny.image_encoder.conv._forward_hooks
    assert tiny.feature_maps(noise(1)).grad_fn is not None, 'the encoder has its own gradients again'
    with pytest.raises(ValueError, match="Did you mean 'image_encoder.conv'"): grad_cam(tiny, noise(1), 'x', layer='image_encoder.con')
    with pytest.raises(ValueError, match='but 0 times'): grad_cam(tiny, noise(1), 'x', layer=nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match='no sentence'): grad_cam(tiny, noise(1), [])


def test_prompt_without_token_and_dropout(clip):
    clip.train()
    torch.testing.assert_close(text_vector(clip, 'mass'), text_vector(clip, 'mass'))
    torch.testing.assert_close(similarity_map(clip, noise(1, 96, 64), 'mass'), similarity_map(clip, noise(1, 96, 64), 'mass'))
    assert clip.training
    with pytest.raises(DataError, match='no token'): text_vector(clip, ['mass', '\u200b\u0000'])


# ------------------------------------------------------------------------------------------------ the same images for all

class Spots(Method):
    "Channel 0 sees blobs, channel 1 their opposite; the text space has one axis for each."
    config_class = TinyConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.image_encoder, self.one = SimpleNamespace(), nn.Parameter(torch.ones(1))
        self.image_encoder.feature_maps = lambda x: torch.cat([nn.functional.avg_pool2d(x, 8), nn.functional.avg_pool2d(1 - x, 8)], 1) * self.one

    def feature_maps(self, images, level=-1): return self.image_encoder.feature_maps(images.float() / 255)
    def project_image(self, f): return f
    def image_features(self, images): return self.feature_maps(images).mean((2, 3))
    def encode_image(self, images): return nn.functional.normalize(self.image_features(images), dim=1)
    def project_text(self, texts): return torch.stack([torch.eye(2)[0 if 'mass' in t else 1] for t in texts])


class Toy(SimpleNamespace):
    def __len__(self): return len(self.manifest)


def spotted(n=40):
    yy, xx, images, boxes = *np.mgrid[:64, :48], [], []
    for i in range(n):
        y, x = numpy_rng('spot', i).integers((12, 12), (52, 36))
        images.append((220 * np.exp(-((yy - y)**2 + (xx - x)**2) / 40)).astype(np.uint8))
        boxes.append(dict(image_id=f'i{i}', label='mass', x0=x - 8, y0=y - 8, x1=x + 8, y1=y + 8))
    m = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], patient_id=[f'p{i // 2}' for i in range(n)], label_mass=1., laterality='L', view='CC'))
    return Toy(manifest=m, boxes=pd.DataFrame(boxes), labels=['mass'], folder='toy', masks=None, image=lambda i: images[i], digest=digest([n]))


def test_grad_cam_finds_what_is_there_and_random_does_not(tmp_path):
    data, method = spotted(), Spots()
    makers = comparison_makers(method, data, {'mass': ['a mass', 'mass']}, kinds=('grad_cam', 'hires_cam'))
    maps = FeatureMaps(method, data, ['mass'], tmp_path)
    scores = localise(None, maps, makers=makers)
    alone = localise(None, maps)
    assert scores[scores.method == 'random'].energy.tolist() == alone[alone.method == 'random'].energy.tolist()
    d = paired_differences(scores, 'grad_cam', ('pointing', 'hit@0.25'), n_boot=200).set_index(['attribute', 'metric', 'method'])
    assert d.low['mass', 'pointing', 'random'] > .5 and d.difference['mass', 'pointing', 'hires_cam'] == 0
    assert len(attribute_figure(data, [0, 1], ['mass'], makers).axes) == 2 * (1 + len(makers))
    with pytest.raises(ValueError, match="name 'random' is taken"): localise(None, maps, makers={'random': makers['similarity']})
    with pytest.raises(ValueError, match="Did you mean 'grad_cam"): grad_cam_maker(method, data, attribute_vectors(method, {'mass': ['mass']}), 'grad_can')


def test_paired_differences_by_hand():
    rows = [('i0', 'p0', 'a', 1., 0.), ('i1', 'p0', 'a', 1., 1.), ('i2', 'p1', 'a', 0., 0.), ('i2', 'p1', 'b', 0., 1.)]
    scores = pd.DataFrame([dict(image_id=i, patient_id=p, attribute=a, method=m, pointing=v) for i, p, a, f, g in rows for m, v in (('f', f), ('g', g))])
    d = paired_differences(scores, 'f', ('pointing',), n_boot=256).set_index('attribute')
    assert d.difference.to_dict() == pytest.approx({'a': 1 / 3, 'b': -1, 'all': 0}) and (d.better['a'], d.worse['a'], d.n['all']) == (1, 0, 4)
    assert (d.low['a'], d.high['a']) == (0, .5) and np.isnan(d.low['b']) and 'one patient' in d.note['b']
    table = paper_table(scores, ('pointing',), n_boot=64)
    assert table.loc['f', ('a', 'pointing')].startswith('0.67 (') and table.loc['g', ('b', 'pointing')] == '1.00'
    assert table.loc['g', ('mean of attributes', 'pointing')] == '0.67'
    with pytest.raises(ValueError, match='g was not scored on the same images'): paired_differences(scores.drop(index=1), 'f', ('pointing',))


def test_sentences_of_attributes():
    for a in ATTRIBUTES:
        words = attribute_prompts(a)
        assert len(words) == len(set(words)) and all(('left' in w) != ('right' in w) for w in words)
        assert not any(w.startswith(('no ', 'without')) or ' free of ' in w for w in words)
        assert {side: sum(side in w for w in words) for side in ('left', 'right')} == {'left': len(words) // 2, 'right': len(words) // 2}
    assert len(attribute_prompts('mass')) >= 486 and len(attribute_prompts('suspicious_calcification')) >= 810
    with pytest.raises(ValueError, match='Give `leads`'): attribute_prompts('cyst')


# ------------------------------------------------------------------------------------------------ random weights

def test_similarities_by_independent_code():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (4, 9, 7)).astype(float), rng.random((4, 9, 7))
    np.testing.assert_allclose(rank_similarity(a, b), [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b)], atol=1e-12)
    kernel = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum()**2

    def ssim(x, y): # every window by hand
        x, y = ((v - v.min()) / np.ptp(v) for v in (x, y))
        px, py, out = np.pad(x, 5, mode='symmetric'), np.pad(y, 5, mode='symmetric'), []
        for i, j in np.ndindex(x.shape):
            u, v = px[i:i + 11, j:j + 11], py[i:i + 11, j:j + 11]
            mu, mv = (kernel * u).sum(), (kernel * v).sum()
            su, sv, cov = (kernel * (u - mu)**2).sum(), (kernel * (v - mv)**2).sum(), (kernel * (u - mu) * (v - mv)).sum()
            out.append((2 * mu * mv + 1e-4) * (2 * cov + 9e-4) / ((mu**2 + mv**2 + 1e-4) * (su + sv + 9e-4)))
        return np.mean(out)
    np.testing.assert_allclose(structural_similarity(a, b), [ssim(x, y) for x, y in zip(a, b)], atol=1e-10)


def test_cascade_restores_and_covers(clip):
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    stages = stages_of(clip.image_encoder, {'projection': clip.image_projection}, 3)
    named = {id(p) for _, modules in stages for m in modules for p in m.parameters()}
    assert named == {id(p) for m in (clip.image_encoder, clip.image_projection) for p in m.parameters()} and len(stages) == 4
    x, v = noise(3, 96, 64), text_vector(clip, 'there is a mass')
    draw = {'similarity': lambda: similarity_map(clip, x, v).numpy(), 'pixels': lambda: x[:, 0, ::32, ::32].numpy()}
    maps, again, other = (cascade(draw, stages, seed) for seed in (0, 0, 1))
    assert all(torch.equal(t, before[k]) for k, t in clip.state_dict().items())
    name = stages[-1][0]
    assert (maps[name]['similarity'] == again[name]['similarity']).all() and (maps[name]['similarity'] != other[name]['similarity']).any()
    table = sanity_table(maps, ['a', 'b', 'c'], n_boot=64)
    assert set(table[(table.method == 'pixels') & (table.step >= 0)].value.round(9)) == {1.}
    changed = table[(table.method == 'similarity') & (table.step > 0) & (table.metric == 'ssim')]
    assert len(changed) == 4 and (changed.value < .999).all() and table[table.step == 0].value.round(9).eq(1).all()


def test_cascade_puts_weights_back_after_an_error(tiny):
    before, calls = {k: v.clone() for k, v in tiny.state_dict().items()}, []

    def draw():
        calls.append(1)
        return np.full((2, 3, 3), np.nan if len(calls) == 3 else len(calls))
    with pytest.raises(ValueError, match="not finite after randomising.*how='shuffle'"): cascade(draw, stages_of(tiny.image_encoder, n_stages=3))
    assert all(torch.equal(t, before[k]) for k, t in tiny.state_dict().items())
    with restored(tiny):
        randomise(tiny.image_encoder, 0)
        assert torch.equal(tiny.image_encoder.conv.weight.flatten().sort().values, before['image_encoder.conv.weight'].flatten().sort().values)
        assert not torch.equal(tiny.image_encoder.conv.weight, before['image_encoder.conv.weight'])
    with pytest.raises(ValueError, match="Did you mean 'shuffle'"): randomise(tiny, 0, how='shufle')
    with pytest.raises(ValueError, match='at least two images'): sanity_table({'intact': {'m': np.zeros((1, 2, 2))}}, ['a'])
