"""Every way x every system: a map or a clear error; images, networks and masks that are none; networks that are frozen or asked without gradients."""
import re

import numpy as np
import pytest
import torch
from torch import nn

from medvl.attribute.attribute import EXPLANATIONS, attribute
from medvl.attribute.gradients import saliency
from medvl.attribute.map_measures import contrast_to_noise, map_and_mask, map_measures, pointing_score, top_share
from medvl.attribute.mammo_factor import MammoFactor, MammoFactorConfig
from medvl.attribute.targets import Target
from medvl.attribute.ways import ATTENTION_WAYS, CHANNEL_WAYS, PIXEL_WAYS, vit_of
from medvl.methods.recipes import new_method
from medvl.methods.supervised import Supervised, SupervisedConfig
from medvl.models.vision import TransformersVision
from medvl.models.vit import VisionTransformer
from test_ways import QUICK, TEXTS
from test_ways import systems as systems_of_ways # noqa: F401

FILM = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
GUIDED = {'guided_backprop', 'deconvolution', 'guided_gradcam'}
SCORES = (set(PIXEL_WAYS) | set(CHANNEL_WAYS)) - {'cam'} # need nothing but a score
COMPARES = {'input_x_gradient', 'integrated_gradients', 'gradient_shap', 'deeplift', 'occlusion', 'rise', 'scorecam', 'gscorecam'}
ATTENTION, WORDS = set(ATTENTION_WAYS), {'word_relevance', 'word_attention', 'word_gradcam'}
# what each system can be asked; everything else must be refused, and said why
GIVES = {'CNN': SCORES | {'cam'}, 'pair': SCORES | {'places'}, 'writer': SCORES, 'detector': SCORES, 'regressor': SCORES,
         'ViT': (SCORES - GUIDED) | ATTENTION | WORDS | {'similarity', 'attention', 'places'},
         'fusion': (SCORES - GUIDED) | ATTENTION | WORDS | {'similarity', 'attention', 'places'},
         'aligner': SCORES | {'attention', 'aligned', 'places'},
         'views': SCORES | {'similarity', 'attention', 'places', 'word_attention', 'abnormality'},
         'factor': {'factor'}}
PAIRS = [(how, system) for system in GIVES for how in EXPLANATIONS]
ABLE = [(how, system) for how, system in PAIRS if how in GIVES[system]]
SAID = ('explains|needs|reads attention|follows a text|met no ReLU|kind of map|has no attention|trained MammoFactor|captum|has the attention|no class|does not offer|classes|no sentence of this report')
TORCHS = re.compile('element 0 of tensors|differentiated Tensors|has no attribute|unexpected keyword|LinAlg|size mismatch')


@pytest.fixture(scope='module')
def systems(request):
    mass, none = Target('class', 'mass'), Target('sentence', 'No mass is seen.')
    base = new_method('mammoclip', 'smoke', TEXTS).eval()
    return {**request.getfixturevalue('systems_of_ways'), 'aligner': (new_method('lovt', 'smoke', TEXTS).eval(), none, {}), 'views': (new_method('a2i2', 'smoke', TEXTS).eval(), none, {}),
            'factor': (MammoFactor(MammoFactorConfig({'mass': ['there is a mass']}, grid=(2, 2), width=base.config.dim), base=base).eval(), mass, {})}


def ask(systems, how, system, image=FILM, baseline='blur', **more):
    method, target, own = systems[system]
    told = {k: v for k, v in own.items() if how in SCORES | ATTENTION - {'rollout'} and how != 'eigencam'}
    if system == 'regressor' and how in COMPARES and baseline: told['baseline'] = baseline
    if how in WORDS: target, told = Target('word', 'mass'), dict(report='No mass is seen.')
    return attribute(method, image, target, how, **told, **QUICK.get(how, {}), **more)


def captum(how):
    if how == 'deeplift': pytest.importorskip('captum')


@pytest.mark.parametrize('how,system', PAIRS)
def test_a_map_or_a_clear_no(how, system, systems):
    captum(how)
    if how in GIVES[system]:
        found = ask(systems, how, system)
        assert found.map.ndim == 2 and found.map.isfinite().all() and found.meta['signed'] == EXPLANATIONS[how].signed
        return
    with pytest.raises((ValueError, TypeError), match=SAID) as e: ask(systems, how, system)
    assert not TORCHS.search(str(e.value)) and len(str(e.value)) > 25


@pytest.mark.parametrize('how,system', ABLE)
def test_flat_images_give_defined_maps_and_broken_ones_are_refused(how, system, systems):
    captum(how)
    for grey in (0., 128.): assert ask(systems, how, system, torch.full((64, 64), grey)).map.isfinite().all()
    for wrong in (float('nan'), float('inf')):
        image = FILM.clone(); image[3, 5] = wrong
        with pytest.raises(ValueError, match='1 pixels of the image are not finite'): ask(systems, how, system, image)


@pytest.mark.parametrize('how,system', ABLE)
def test_a_layer_that_is_not_there(how, system, systems):
    captum(how)
    with pytest.raises((ValueError, TypeError), match='layer|level|map') as e: ask(systems, how, system, level='nowhere')
    assert not TORCHS.search(str(e.value))


@pytest.mark.parametrize('how,system', ABLE)
def test_frozen_networks_and_callers_without_gradients_get_the_same_map(how, system, systems):
    captum(how)
    method = systems[system][0]
    plain, wanted = ask(systems, how, system).map, {n: p.requires_grad for n, p in method.named_parameters()}
    try:
        for p in method.parameters(): p.requires_grad_(False)
        frozen = ask(systems, how, system).map
        assert not any(p.requires_grad for p in method.parameters()), 'a frozen weight was thawed'
    finally:
        for n, p in method.named_parameters(): p.requires_grad_(wanted[n])
    with torch.no_grad(): bare = ask(systems, how, system).map
    with torch.inference_mode(): still = ask(systems, how, system, FILM.clone()).map
    for other in (frozen, bare, still): torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in method.parameters()) and not still.is_inference()


class Cut(Supervised):
    "Computes its answer where no gradient can follow."
    def logits(self, images, present=None):
        with torch.no_grad(): return super().logits(images, present)


@pytest.mark.parametrize('how', sorted(SCORES | {'cam'}))
def test_a_model_without_gradients(how):
    captum(how)
    cut = Cut(SupervisedConfig(image_encoder='resnet-tiny', labels=('mass', 'scar'))).eval()
    if how in ('occlusion', 'rise', 'cam'):
        assert attribute(cut, FILM, 'mass', how, **QUICK.get(how, {})).map.isfinite().all()
        return
    with pytest.raises(ValueError, match='no gradient reaches (the image|this map).*occlusion'): attribute(cut, FILM, 'mass', how, **QUICK.get(how, {}))


def test_weights_that_are_broken_or_born_without_gradients_are_named():
    make = lambda: Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('mass', 'scar'))).eval()
    with torch.inference_mode(): born = make()
    for how in ('gradcam', 'saliency', 'integrated_gradients'):
        with pytest.raises(ValueError, match=r'image_encoder\S+ was made inside torch.inference_mode'): attribute(born, FILM, 'mass', how, **QUICK.get(how, {}))
    assert attribute(born, FILM, 'mass', 'occlusion', **QUICK['occlusion']).map.isfinite().all()
    ill = make()
    with torch.no_grad(): ill.head.weight[0, 0] = float('nan')
    class Off(torch.nn.Module):
        "A ReLU whose first channel is off: autograd brings no NaN through it."
        def forward(self, x): return (x - torch.tensor([1e9] + [0.]*(x.shape[1] - 1)).view(1, -1, *[1]*(x.ndim - 2))).relu()
    off = make()
    off.load_state_dict(ill.state_dict())
    off.head = torch.nn.Sequential(Off(), off.head)
    for method, name in ((ill, 'head.weight'), (off, 'head.1.weight')):
        for how in ('gradcam', 'saliency', 'integrated_gradients', 'smoothgrad', 'guided_backprop', 'occlusion', 'rise', 'hirescam'):
            with pytest.raises(ValueError, match=f"how='{how}' is not finite: {name} holds NaN"): attribute(method, FILM, 'mass', how, **QUICK.get(how, {}))
    with pytest.raises(ValueError, match='no gradient reaches the image'): saliency(lambda v: torch.zeros(len(v)), torch.rand(1, 1, 4, 4))


@pytest.mark.parametrize('how', sorted(SCORES))
def test_a_number_is_explained_from_somewhere(how, systems):
    captum(how)
    if how in COMPARES:
        with pytest.raises(ValueError, match='baseline='): ask(systems, how, 'regressor', baseline=None)
        a, b = (ask(systems, how, 'regressor', baseline=x).map for x in ('blur', 'mean'))
        assert not torch.allclose(a, b)
    else: assert ask(systems, how, 'regressor', baseline=None).map.isfinite().all()


@pytest.mark.parametrize('how', sorted(ATTENTION))
def test_attention_that_was_not_recorded(how, systems):
    method = systems['ViT'][0]
    class Fused(VisionTransformer):
        "Runs its blocks past their forward, as a compiled or fused network does."
        def tokens(self, x, masked=None):
            x = self.embed(x, masked)
            for block in self.blocks: x = block.attend(x)[0]
            return self.norm(x)
    encoder = method.image_encoder
    kind = type(encoder)
    try:
        encoder.__class__ = Fused
        with pytest.raises(ValueError, match='recorded in 0 of .* blocks.*occlusion'): attribute(method, FILM, 'a mass', how)
    finally: encoder.__class__ = kind
    class Holder(nn.Module): pass
    holder, library = Holder(), TransformersVision.__new__(TransformersVision)
    nn.Module.__init__(library); holder.image_encoder = library
    with pytest.raises(TypeError, match='does not record .*SDPA'): vit_of(holder, how)


def test_guided_backprop_meets_relus_however_they_are_called():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 1, 3)
    from medvl.attribute.gradients import deep_lift, guided_backprop
    torch.manual_seed(0)
    m, x = Called(), torch.randn(1, 1, 12, 12)
    relu = nn.ReLU()
    calls = {'module': relu, 'function': nn.functional.relu, 'torch': torch.relu, 'method': lambda v: v.relu(), 'in place': lambda v: nn.functional.relu(v, inplace=True),
             'method in place': lambda v: v.relu_(), 'in place, not returned': lambda v: (torch.relu_(v), v)[1]}
    maps = {n: guided_backprop(lambda v, f=f: m.c(f(m.b(f(m.a(v))))).sum((1, 2, 3)), x, m) for n, f in calls.items()}
    for n, g in maps.items(): torch.testing.assert_close(g, maps['module'], msg=n)
    assert not torch.allclose(maps['module'], saliency(lambda v: m.c(relu(m.b(relu(m.a(v))))).sum((1, 2, 3)), x))
    pytest.importorskip('captum')
    class Whole(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.m, self.f = m, f
        def forward(self, v): return self.m.c(self.f(self.m.b(self.f(self.m.a(v))))).sum((1, 2, 3))[:, None]
    found, gap = deep_lift(Whole(nn.functional.relu), x, 0, 0.)
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-4) # complete: the rule was applied
    two = nn.Sequential(m.a, nn.ReLU(), m.b, nn.ReLU(), m.c)
    class Modules(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = two
        def forward(self, v): return self.two(v).sum((1, 2, 3))[:, None]
    torch.testing.assert_close(found, deep_lift(Modules(), x, 0, 0.)[0], rtol=1e-4, atol=1e-6)


def test_the_invariants_of_the_ways(systems):
    "Specification 5.2: CAM is Grad-CAM times the cells, and with the bias its mean is the logit; HiResCAM is Grad-CAM behind pooling; integrated gradients and occlusion of nothing."
    cnn, mass = systems['CNN'][:2]
    cam, grad, hires = (attribute(cnn, FILM, mass, how) for how in ('cam', 'gradcam', 'hirescam'))
    torch.testing.assert_close(cam.map, grad.map * grad.map.numel(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hires.map, grad.map, rtol=1e-4, atol=1e-6)
    assert float(cam.map.mean()) + cam.meta['bias'] == pytest.approx(cam.meta['score'], abs=1e-4)
    assert attribute(cnn, FILM, mass, 'occlusion', baseline=FILM[None, None], **QUICK['occlusion']).map.abs().max() < 1e-6
    torch.testing.assert_close(attribute(cnn, FILM, mass, 'smoothgrad', samples=2, spread=0.).map, attribute(cnn, FILM, mass, 'saliency').map)
    assert attribute(cnn, FILM, mass, 'vargrad', samples=2, spread=0.).map.abs().max() < 1e-9
    k = attribute(cnn, FILM, mass, 'gscorecam', channels=10**6).map
    torch.testing.assert_close(k, attribute(cnn, FILM, mass, 'scorecam').map, rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match='mean and one linear layer'): attribute(Bent(SupervisedConfig(image_encoder='resnet-tiny', labels=('mass', 'scar'))).eval(), FILM, 'mass', 'cam')


class Bent(Supervised):
    "Has more than a mean behind its last map."
    def logits(self, images, present=None): return super().logits(images, present).tanh() * 3


@pytest.mark.parametrize('measure', [pointing_score, top_share, contrast_to_noise, map_measures, map_and_mask])
def test_maps_and_masks_that_do_not_fit(measure):
    truth = np.zeros((6, 6), bool); truth[1:3, 1:4] = True
    for flat in (np.zeros((6, 6)), np.full((6, 6), 3.)): measure(flat, truth)
    with pytest.raises(ValueError, match='the same'): measure(np.zeros((6, 6)), truth[:5])
    with pytest.raises(ValueError, match='must be'): measure(np.zeros((2, 6, 6)), truth)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match='not finite'): measure(np.where(truth, wrong, 0.), truth)
    if measure in (pointing_score, top_share):
        with pytest.raises(ValueError, match='empty mask'): measure(np.zeros((6, 6)), truth & ~truth)
