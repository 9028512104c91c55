"""One call for every map: raw, signed, with its meta; what cannot be explained is said."""

import pytest
import torch
from tiny_maps import Tiny
from torch import nn

from medvl.attribute.attribute import EXPLANATIONS, Attribution, attribute
from medvl.attribute.targets import TARGETS, Explanation, Target, class_names, target_of
from medvl.attribute.gradcam import grad_cam
from medvl.attribute.mammo_factor import Explainer, MammoFactor, MammoFactorConfig
from medvl.attribute.sentence_maps import sentence_maps
from medvl.attribute.similarity import similarity_map
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.classifier import Classifier, ClassifierConfig
from medvl.methods.lovt import LoVT, LoVTConfig
from medvl.methods.supervised import Supervised, SupervisedConfig


IMAGE = torch.rand(40, 24, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture
def tiny(): return Tiny().train()


def lovt():
    torch.manual_seed(0)
    return LoVT(LoVTConfig('resnet-tiny', text_encoder='tiny', max_length=32, dim=8, hidden=16), build_wordpiece(['No mass.', 'There is a mass.'], size=80))


@pytest.mark.parametrize('shape', [(40, 24), (1, 40, 24), (1, 1, 40, 24)])
def test_a_sentence_by_gradcam(tiny, shape):
    a = attribute(tiny, IMAGE.reshape(shape), 'a mass')
    assert isinstance(a, Attribution) and torch.equal(a.map, grad_cam(tiny, IMAGE[None, None], 'a mass', positive=False)[0]) and a.map.shape == (10, 6)
    assert a.map.min() < 0 and a.meta['signed'] and a.meta['image_size'] == (40, 24) and a.meta['kind'] == 'sentence' and a.meta['target'] == 'a mass'
    assert tiny.training and tiny.drop.training and all(p.grad is None for p in tiny.parameters())
    same, other = attribute(tiny, IMAGE.to(torch.float32), ['a mass']), attribute(tiny, IMAGE, 'a mass', against='no mass at all')
    assert torch.equal(same.map, a.map) and not torch.equal(other.map, a.map) and other.meta['options'] == {'against': 'no mass at all'}
    with torch.no_grad(): tiny.eval(); assert a.meta['score'] == pytest.approx(float(tiny.encode_image(IMAGE[None, None])[0] @ nn.functional.normalize(tiny.project_text(['a mass']), dim=1)[0]), rel=1e-5)


def test_a_sentence_against_its_contrary(tiny):
    "One score minus the other: for ways that are linear in what is asked, one map minus the other."
    pair = Target('sentence', 'a mass', 'no mass at all')
    for how in ('gradcam', 'hirescam', 'similarity', 'saliency', 'integrated_gradients', 'occlusion'):
        yes, no = (attribute(tiny, IMAGE, s, how).map for s in ('a mass', 'no mass at all'))
        found = attribute(tiny, IMAGE, pair, how)
        torch.testing.assert_close(found.map, yes - no, rtol=1e-4, atol=1e-6)
        assert torch.equal(attribute(tiny, IMAGE, 'a mass', how, against='no mass at all').map, found.map) and not torch.allclose(found.map, yes)
        assert found.meta['against'] == 'no mass at all' and "against 'no mass at all'" in repr(found)
    assert attribute(tiny, IMAGE, 'a mass').meta['against'] is None and 'against' not in repr(attribute(tiny, IMAGE, 'a mass'))
    for how in ('attention', 'aligned', 'places'):
        with pytest.raises(ValueError, match='reads the sentence alone'): attribute(lovt(), torch.rand(64, 64) * 255, Target('sentence', 'There is a mass.', 'No mass.'), how)
    with pytest.raises(ValueError, match='only a sentence has a contrary'): Target('class', 'mass', 'no mass')


def test_nothing_is_normalised(tiny):
    "Twice the text vector gives twice the map of every signed way that is linear in it."
    v = torch.randn(6, generator=torch.Generator().manual_seed(1))
    for how in ('gradcam', 'hirescam', 'similarity'):
        torch.testing.assert_close(attribute(tiny, IMAGE, 2 * v, how).map, 2 * attribute(tiny, IMAGE, v, how).map)
        torch.testing.assert_close(attribute(tiny, IMAGE, -v, how).map, -attribute(tiny, IMAGE, v, how).map)
    assert attribute(tiny, IMAGE, v).meta['target'] == 'a text vector'


def test_ways_are_those_of_the_map_makers(tiny):
    assert torch.equal(attribute(tiny, IMAGE, 'a mass', 'similarity').map, similarity_map(tiny, IMAGE[None, None], 'a mass')[0])
    assert torch.equal(attribute(tiny, IMAGE, 'a mass', 'layercam', 'image_encoder.stem').map, grad_cam(tiny, IMAGE[None, None], 'a mass', 'layer_cam', 'image_encoder.stem', positive=False)[0])
    method, image, report = lovt().eval(), torch.rand(64, 64) * 255, ['No mass.', 'There is a mass.']
    for how, kind in (('attention', 'attention'), ('aligned', 'cosine'), ('places', 'global')):
        a = attribute(method, image, report[1], how, report=report)
        assert torch.equal(a.map, sentence_maps(method, image[None], report, kind)[1]) and a.meta['report'] == report
    assert float(attribute(method, image, 'No mass.', 'attention').map.sum()) == pytest.approx(1, rel=1e-4) and not EXPLANATIONS['attention'].signed
    with pytest.raises(ValueError, match='no sentence of this report'): attribute(method, image, 'A scar.', 'attention', report=report)


@pytest.mark.parametrize('make', [lambda: Classifier(ClassifierConfig(image_encoder='efficientnet-tiny', labels=('mass', 'scar'))),
                                  lambda: Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('mass', 'scar'))),
                                  lambda: Classifier(ClassifierConfig(image_encoder='efficientnet-tiny', labels=('density',), classes=('A', 'B', 'scar')))])
def test_a_class_by_gradcam(make):
    "The map of a logit: equal to autograd's own, by name and by number; the parameters are untouched."
    torch.manual_seed(0)
    method, image = make().eval(), torch.rand(64, 64) * 255
    names = class_names(method)
    a, i = attribute(method, image, 'scar'), names.index('scar')
    caught = []
    original = method.image_encoder.feature_maps
    method.image_encoder.feature_maps = lambda *args, **kwargs: caught.append(original(*args, **kwargs).detach().requires_grad_()) or caught[-1]
    logit = method.logits(image[None, None])[0, i]
    gradient = torch.autograd.grad(logit, caught[0])[0]
    want = (gradient.mean((2, 3), keepdim=True) * caught[0]).sum(1)[0].detach()
    del method.image_encoder.feature_maps
    torch.testing.assert_close(a.map, want, rtol=1e-4, atol=1e-9)
    assert a.map.min() < 0 < a.map.abs().max()
    assert a.meta['kind'] == 'class' and a.meta['score'] == pytest.approx(logit.item(), rel=1e-4) and torch.equal(attribute(method, image, i).map, a.map) and all(p.grad is None for p in method.parameters())
    for wrong, message in (('skar', 'Did you mean'), (len(names), 'no class')):
        with pytest.raises(ValueError, match=message): attribute(method, image, wrong)


def test_mammo_factor(tiny):
    torch.manual_seed(0)
    factor = MammoFactor(MammoFactorConfig({'mass': ['a mass'], 'calcium': ['bright']}, grid=(5, 3), width=6), base=tiny)
    a, b = attribute(factor, IMAGE, 'calcium', 'factor'), attribute(factor, IMAGE, 'a small mass', 'factor')
    explainer, batch = Explainer(factor, positive=False), {'images': IMAGE[None, None, None]}
    torch.testing.assert_close(a.map.relu(), explainer.attribute(batch, 'calcium')[0]); torch.testing.assert_close(b.map.relu(), explainer.sentence(batch, 'a small mass')[0][0])
    assert (a.meta['kind'], b.meta['kind'], a.meta['head']) == ('class', 'sentence', 'calcium')


@pytest.mark.parametrize('kind', ['age', 'box', 'answer'])
def test_a_method_that_cannot_say_it_is_refused_clearly(tiny, kind):
    with pytest.raises(TypeError, match='needs (estimate|box_score|text_score)'): attribute(tiny, IMAGE, Target(kind, 1))
    with pytest.raises(ValueError, match=f'not {kind} .*These do: .*gradcam'): attribute(tiny, IMAGE, Target(kind, 1), 'similarity')


def test_a_later_way_is_one_entry(tiny, monkeypatch):
    monkeypatch.setitem(EXPLANATIONS, 'brightness', Explanation(lambda method, images, target, level: (images[0, 0], {'of': target.value}), ('word',), 'grey'))
    a = attribute(tiny, IMAGE, Target('word', 'mass'), 'brightness')
    assert torch.equal(a.map, IMAGE) and a.meta['of'] == 'mass' and 'brightness of word' in repr(a)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(how='gradkam'), ValueError, 'Did you mean'), (dict(level=2), ValueError, 'name any other layer'), (dict(level='image_encoder.steem'), ValueError, 'Did you mean'),
    (dict(how='similarity', level='image_encoder.stem'), ValueError, 'last map'), (dict(sharp=1), ValueError, 'no such option'), (dict(how='factor'), TypeError, 'trained MammoFactor'),
    (dict(how='attention'), ValueError, 'kind of map'), (dict(target=0), ValueError, 'no class 0')])
def test_refusals(tiny, kwargs, error, message):
    with pytest.raises(error, match=message): attribute(tiny, IMAGE, **{'target': 'a mass', **kwargs})


def test_targets(tiny):
    assert target_of(tiny, 'mass') == Target('sentence', 'mass') and target_of(tiny, ('a', 'b')) == Target('sentence', ['a', 'b']) and class_names(tiny) == ()
    assert set(TARGETS) == {'sentence', 'class', 'word', 'age', 'box', 'answer'} and {t for e in EXPLANATIONS.values() for t in e.targets} == set(TARGETS)
    with pytest.raises(ValueError, match='kind of target'): Target('colour', 1)
    with pytest.raises(ValueError, match='one image'): attribute(tiny, torch.zeros(2, 8, 8), 'a mass')
