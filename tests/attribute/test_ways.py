"""Every way for every system: CNN, ViT, encoder pair, fusion network, writer, detector, regressor; and what cannot be asked."""
import numpy as np
import pytest
import torch

from medvl.attribute.attribute import EXPLANATIONS, attribute
from medvl.attribute.targets import Target, score_of
from medvl.attribute.ways import ATTENTION_WAYS, CHANNEL_WAYS, PIXEL_WAYS, UNSIGNED, WAYS, block_attention, vit_of
from medvl.methods.classifier import new_classifier
from medvl.methods.recipes import new_method
from medvl.methods.retinanet import detector_from

RELU = ('guided_backprop', 'deconvolution', 'guided_gradcam', 'deeplift', 'cam') # of their own kind: asked below, and in test_every_way
TEXTS = ['The heart is large.', 'No mass is seen.']
QUICK = {'rise': dict(masks=20, cells=4), 'occlusion': dict(window=24, stride=20), 'integrated_gradients': dict(steps=4), 'smoothgrad': dict(samples=2),
         'vargrad': dict(samples=2), 'gradient_shap': dict(samples=2), 'gscorecam': dict(channels=4)}


@pytest.fixture(scope='module')
def film(): return torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture(scope='module')
def systems():
    clip, mammo = new_method('clip', 'smoke', TEXTS).eval(), new_method('mammoclip', 'smoke', TEXTS).eval()
    vit, writer = new_method('xvl', 'smoke-2022', TEXTS).eval(), new_method('writer', 'smoke', TEXTS).eval()
    sentence, mass = Target('sentence', 'a mass'), Target('class', 'mass')
    return {'CNN': (new_classifier(clip, ('mass', 'effusion')).eval(), mass, {}), 'pair': (clip, sentence, {}),
            'ViT': (vit, sentence, {}), 'fusion': (vit, sentence, dict(by='match')), 'writer': (writer, Target('answer', 'no mass'), {}),
            'detector': (detector_from(mammo, ('mass',)).eval(), Target('box', ('mass', (8, 8, 40, 40))), {}),
            'regressor': (new_method('proxy', 'smoke').eval(), Target('age', 'age'), {})}


@pytest.mark.parametrize('system', ['CNN', 'pair', 'ViT', 'fusion', 'writer', 'detector', 'regressor'])
@pytest.mark.parametrize('how', sorted((set(PIXEL_WAYS) | set(CHANNEL_WAYS)) - set(RELU)))
def test_a_map_of_every_system(how, system, systems, film):
    method, target, more = systems[system]
    if how == 'eigencam': more = {}
    if system == 'regressor' and how in ('input_x_gradient', 'integrated_gradients', 'gradient_shap', 'occlusion', 'rise', 'scorecam', 'gscorecam'): more = {**more, 'baseline': 'blur'}
    before = {k: v.clone() for k, v in method.state_dict().items()}
    found = attribute(method, film, target, how, **more, **QUICK.get(how, {}))
    assert found.map.ndim == 2 and found.map.isfinite().all() and found.map.dtype == torch.float32
    assert found.meta['how'] == how and found.meta['signed'] == (how not in UNSIGNED)
    if how in PIXEL_WAYS or how in ('rise', 'occlusion'): assert found.map.shape == film.shape
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items()) and all(p.grad is None for p in method.parameters())


def test_a_matched_sentence_against_its_contrary(systems, film):
    "A fusion network is asked twice and the odds are subtracted; before, the contrary was dropped without a word."
    method, x = systems['fusion'][0], film[None, None]
    yes, no = (score_of(method, Target('sentence', s), by='match')(x) for s in ('a mass', 'the heart is large'))
    pair = Target('sentence', 'a mass', 'the heart is large')
    torch.testing.assert_close(score_of(method, pair, by='match')(x), yes - no)
    assert attribute(method, film, pair, 'saliency', by='match').meta['score'] == pytest.approx(float(yes - no), abs=1e-5) and float(yes - no) != 0
    with pytest.raises(ValueError, match='only a sentence'): attribute(systems['CNN'][0], film, 'mass', 'saliency', against='no mass')


@pytest.mark.parametrize('how', sorted(ATTENTION_WAYS))
def test_attention_of_a_vit_and_of_nothing_else(how, systems, film):
    method, target, _ = systems['ViT']
    found = attribute(method, film, target, how)
    encoder = vit_of(method, how)
    assert found.map.shape == tuple(s // encoder.stride for s in film.shape) and (found.map >= 0).all() and found.map.sum() > 0
    assert all('forward' not in vars(b) for b in encoder.blocks)
    with pytest.raises(TypeError, match='on a ViT'): attribute(systems['CNN'][0], film, systems['CNN'][1], how)


def test_recorded_attention_is_that_of_the_fused_kernel(systems, film):
    method = systems['ViT'][0]
    x = film[None, None]
    with torch.no_grad():
        plain = method.encode_image(x)
        with block_attention(method.image_encoder) as maps: torch.testing.assert_close(method.encode_image(x), plain, rtol=1e-5, atol=1e-6)
    assert len(maps) == len(method.image_encoder.blocks)
    torch.testing.assert_close(maps[-1].sum(-1), torch.ones_like(maps[-1].sum(-1)))


def test_integrated_gradients_are_complete_for_a_system(systems, film):
    for system in ('CNN', 'pair', 'regressor'):
        method, target, _ = systems[system]
        found = attribute(method, film, target, 'integrated_gradients', baseline='blur', steps=64)
        score = score_of(method, target)
        from medvl.attribute.faithfulness import blurred
        with torch.no_grad(): change = float(score(film[None, None]) - score(blurred(film[None, None])))
        assert abs(float(found.map.sum()) - change) < .05 * max(abs(change), 1e-3) + 1e-4, system
        assert abs(found.meta['gap']) < .05 * max(abs(change), 1e-3) + 1e-4


def test_what_cannot_be_asked_is_said(systems, film):
    age, target, _ = systems['regressor']
    for how in ('integrated_gradients', 'occlusion', 'gradient_shap', 'input_x_gradient'):
        with pytest.raises(ValueError, match='baseline='): attribute(age, film, target, how)
    with pytest.raises(ValueError, match='number'): attribute(age, film, Target('age', 'weight'))
    with pytest.raises(TypeError, match='estimate'): attribute(systems['pair'][0], film, target)
    with pytest.raises(ValueError, match='no area'): attribute(systems['detector'][0], film, Target('box', ('mass', (9, 9, 9, 20))))
    with pytest.raises(ValueError, match='class'): attribute(systems['detector'][0], film, Target('box', ('nodule', (0, 0, 9, 9))))
    with pytest.raises(ValueError, match='not a layer'): attribute(systems['pair'][0], film, 'a mass', 'saliency', level='image_encoder')
    with pytest.raises(ValueError, match='layer'): attribute(systems['pair'][0], film, 'a mass', 'gradcam', level='nowhere')
    with pytest.raises(ValueError, match='compares with nothing'): attribute(systems['pair'][0], film, 'a mass', 'saliency', baseline='blur')
    with pytest.raises(ValueError, match='no such option'): attribute(systems['pair'][0], film, 'a mass', 'rise', sharp=True)
    with pytest.raises(ValueError, match='a baseline'): attribute(systems['pair'][0], film, 'a mass', 'occlusion', baseline=torch.zeros(3, 3))
    assert set(WAYS) <= set(EXPLANATIONS)


def test_many_from_one_seed(systems, film):
    method, target, _ = systems['pair']
    for how in ('rise', 'smoothgrad', 'gradient_shap'):
        a, b = (attribute(method, film, target, how, seed=3, **QUICK[how]).map for _ in range(2))
        assert torch.equal(a, b) and not np.allclose(a, attribute(method, film, target, how, seed=4, **QUICK[how]).map)
