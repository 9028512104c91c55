"""What every method promises: signatures, what is saved, views that are missing, pixels that are kept."""
import ast
import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training import breasts_batch, gradients, quiet, tiny_mammoclip

import medvl
from medvl.core.errors import DataError
from medvl.core.paths import read_json, sha256_file, write_json
from medvl.data.batch import check_batch, collate, present_rows
from medvl.data.text.tokens import build_wordpiece
from medvl.losses.contrastive import contrastive_terms
from medvl.methods.base import CAPABILITIES, CONFIG, WEIGHTS, Method, StepState, capabilities, capability_problems, from_pretrained, plain_state, save_pretrained
from medvl.methods.byol import BYOL, BYOLConfig
from medvl.methods.classifier import Classifier, ClassifierConfig
from medvl.methods.clip import CLIP, CLIPConfig
from medvl.methods.lovt import LoVT, LoVTConfig
from medvl.methods.pixelpro import PixelPro, PixelProConfig
from medvl.methods.retinanet import RetinaNet, RetinaNetConfig
from medvl.methods.supervised import Supervised, SupervisedConfig
from medvl.train.gradcache import backward_batch

PACKAGE = Path(medvl.__file__).parent
HOMES = ['methods.mammoclip.MammoCLIP', 'methods.lovt.LoVT', 'methods.clip.CLIP', 'methods.convirt.ConVIRT', 'methods.simclr.SimCLR', 'methods.byol.BYOL',
         'methods.pixelpro.PixelPro', 'methods.supervised.Supervised', 'methods.initialised.Initialised', 'methods.classifier.Classifier', 'methods.retinanet.RetinaNet',
         'methods.segmenter.Segmenter', 'methods.yolo.Yolo', 'attribute.mammo_factor.MammoFactor']


def class_of(home):
    module, name = home.rsplit('.', 1)
    return getattr(import_module(f'medvl.{module}'), name)


@pytest.mark.parametrize('home', HOMES)
def test_signatures(home):
    "Every capability has the declared signature, `after_step` and `losses` those of the base, and what is gathered is named by the method itself."
    cls = class_of(home)
    assert capability_problems(cls) == []
    for name in ('after_step', 'losses', 'encode'):
        assert list(inspect.signature(getattr(cls, name)).parameters) == list(inspect.signature(getattr(Method, name)).parameters), name
    assert all(isinstance(getattr(cls, n), tuple) for n in ('gathered', 'gathered_batch', 'keeps', 'unsaved')) and isinstance(cls.autocast_losses, bool)
    assert set(cls.keeps) <= {'images', 'augmented', 'masks'}


def test_nothing_is_gathered_unasked():
    assert Method.gathered_batch == Method.keeps == Method.unsaved == () and Method.autocast_losses is False


def test_a_wrong_signature_is_found():
    class Odd(Method):
        def encode_image(self, images): pass
        def match(self, images, texts, weight): pass
        def predict(self, images, top=3, **more): pass
    assert [p.split('(')[0] for p in capability_problems(Odd)] == ['encode_image', 'match']


def asked_of_methods():
    "(file, name) of every call on something called method, base or model.method, in the rooms that ask."
    own = set(dir(Method)) | {'none'}
    for room in ('evaluate', 'attribute', 'api.py'):
        for p in [PACKAGE / room] if room.endswith('.py') else sorted((PACKAGE / room).rglob('*.py')):
            for node in ast.walk(ast.parse(p.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)): continue
                of = ast.unparse(node.func.value)
                if of in ('method', 'base', 'self.base', 'self.method', 'model.method') and node.func.attr not in own: yield p.name, node.func.attr


def test_protocols_ask_for_declared_capabilities_alone():
    calls = set(asked_of_methods())
    known = {('mammo_factor.py', '_apply'), ('attribute.py', 'text_vector'), ('attribute.py', 'maps_of'), ('sanity.py', 'replace'), ('attribute.py', 'attributes'), ('api.py', 'tokenizer')}
    assert len(calls) > 12 and not {c for c in calls if c[1] not in CAPABILITIES} - known


# ------------------------------------------------------------------------------------------------ views that are missing

def with_missing(batch, *here):
    present = torch.tensor(here)
    return {**batch, 'present': present, 'rows': present_rows(present)}


HERE = [(True, True), (True, False), (False, True), (True, True), (False, True), (True, False)]


def test_all_views_present_changes_no_number():
    method, batch = tiny_mammoclip().double(), breasts_batch(6)
    for mode in (method.train, method.eval):
        mode(); torch.manual_seed(0); a = method(batch, StepState())
        torch.manual_seed(0); b = method(with_missing(batch, *[(True, True)] * 6), StepState())
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('changes', [{}, dict(loss='single'), dict(duplicates='positives', label_smoothing=.1)])
def test_pixels_of_a_missing_view_change_nothing(training, changes):
    "Neither the loss nor any gradient nor BatchNorm's statistics, whatever they hold: NaN, too."
    batch, found = with_missing(breasts_batch(6), *HERE), []
    for fill in (0., 200., float('nan')):
        method = tiny_mammoclip(**changes).double().train(training)
        images = torch.where(batch['present'][:, :, None, None, None], batch['images'], fill)
        torch.manual_seed(1)
        out = method({**batch, 'images': images}, StepState()); out['loss'].backward()
        found.append(({k: v.item() for k, v in out.items()}, gradients(method), [b.clone() for b in method.buffers()]))
    for losses, grads, buffers in found[1:]:
        assert losses == found[0][0] and all(np.isfinite(v) for v in losses.values())
        assert all(torch.equal(g, grads[k]) for k, g in found[0][1].items()) and all(map(torch.equal, buffers, found[0][2]))


def test_missing_views_in_words():
    "The multi-view loss with missing views, written as loops: a missing view neither searches nor is found."
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 2, 4, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    here = torch.tensor([(True, True), (True, False), (False, True), (True, True), (False, True)])
    out = contrastive_terms(image, text, 5., present=here)

    def search(asks, own, candidates): # every searcher among its candidates
        rows = [-(5 * (a @ torch.stack(c).T)).log_softmax(0)[o] for a, o, c in zip(asks, own, candidates)]
        return torch.stack(rows)
    i2t = [search([image[i, v]], [i], [list(text[:, t])]) for v in range(2) for t in range(2) for i in range(5) if here[i, v]]
    t2i = [search([text[i, t]], [[j for j in range(5) if here[j, v]].index(i)], [[image[j, v] for j in range(5) if here[j, v]]])
           for v in range(2) for t in range(2) for i in range(5) if here[i, v]]
    both = [i for i in range(5) if here[i].all()]
    one = [search([image[i, 0]], [[j for j in range(5) if here[j, 1]].index(i)], [[image[j, 1] for j in range(5) if here[j, 1]]]) for i in both]
    two = [search([image[i, 1]], [[j for j in range(5) if here[j, 0]].index(i)], [[image[j, 0] for j in range(5) if here[j, 0]]]) for i in both]
    for name, want in (('i2t', torch.cat(i2t).mean()), ('t2i', torch.cat(t2i).mean()), ('i2i', (torch.cat(one).mean() + torch.cat(two).mean()) / 2)):
        torch.testing.assert_close(out[name], want, rtol=1e-12, atol=1e-12)
    assert contrastive_terms(image, text, 5., present=torch.tensor([(True, False)] * 5))['i2i'] == 0


@pytest.mark.parametrize('size', [1, 2, 4])
def test_missing_views_in_chunks(size):
    batch, method = with_missing(breasts_batch(6), *HERE), quiet(tiny_mammoclip().double())
    method.zero_grad(); backward_batch(method, batch, StepState(), None); whole = gradients(method)
    method.zero_grad(); backward_batch(method, batch, StepState(), size)
    for k, g in gradients(method).items(): torch.testing.assert_close(g, whole[k], rtol=1e-8, atol=1e-10)


def tiny_text(cls, config, **changes):
    torch.manual_seed(0)
    words = ['No mass.', 'There is a mass.', 'The heart is large.']
    return cls(config('resnet-tiny', text_encoder='tiny', max_length=32, dim=8, hidden=16, **changes), build_wordpiece(words, size=80)).eval()


def views_of_all():
    torch.manual_seed(0)
    yield 'mammoclip', tiny_mammoclip().eval()
    yield 'lovt', tiny_text(LoVT, LoVTConfig)
    yield 'supervised', Supervised(SupervisedConfig(image_encoder='resnet-tiny')).eval()


@pytest.mark.parametrize('name', ['mammoclip', 'lovt', 'supervised'])
def test_absent_views_do_not_enter_the_mean(name):
    method, images = dict(views_of_all())[name], torch.randint(0, 256, (3, 2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here = torch.tensor([(True, True), (True, False), (False, True)])
    with torch.no_grad():
        e, plain = method.encode_image(images, here, views=[['CC', 'MLO']] * 3), method.encode_image(images)
        torch.testing.assert_close(e[0], plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(e[1], method.encode_image(images[1:2, 0])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(e[2], method.encode_image(images[2:, 1])[0], rtol=1e-4, atol=1e-5)
        other = images.clone(); other[1, 1] = 255; other[2, 0] = 0
        assert torch.equal(method.encode_image(other, here), e) and not torch.equal(method.encode_image(other), plain)
        with pytest.raises(ValueError, match='without any view'): method.encode_image(images, torch.tensor([(True, True), (False, False), (True, True)]))


def test_a_classifier_averages_what_is_there():
    torch.manual_seed(0)
    method, images = Classifier(ClassifierConfig(image_encoder='efficientnet-tiny')).eval(), torch.randint(0, 256, (2, 2, 1, 48, 48), dtype=torch.uint8)
    batch = dict(images=images, sample_id=['a', 'b'], present=torch.tensor([(True, False), (False, True)]))
    torch.testing.assert_close(method.encode(batch)['logits'], torch.cat([method.logits(images[:1, 0]), method.logits(images[1:, 1])]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what is saved

def twin(name):
    torch.manual_seed(0)
    if name == 'byol': method = BYOL(BYOLConfig(image_encoder='resnet-tiny', hidden=16, dim=8))
    else: method = PixelPro(PixelProConfig(image_encoder='resnet-tiny', hidden=16, dim=8, instance_weight=1., instance_hidden=16))
    with torch.no_grad():
        for p in method.teacher.parameters(): p += 1. # as after training: the teacher lags behind
    return method.eval()


@pytest.mark.parametrize('name', ['byol', 'pixelpro'])
def test_saved_models_hold_no_twins(name, tmp_path):
    method = twin(name)
    folder = save_pretrained(method, tmp_path/name)
    stored, whole = load_file(folder/WEIGHTS), plain_state(method)
    assert {k for k in whole if k not in stored} == {k for k in whole if k.startswith('teacher.')} != set() and set(stored) < set(whole)
    again = from_pretrained(folder)
    for k, v in again.student.state_dict().items(): assert torch.equal(v, again.teacher.state_dict()[k]) and torch.equal(v, method.student.state_dict()[k]), k
    assert not any(p.requires_grad for p in again.teacher.parameters())


@pytest.mark.parametrize('name', ['byol', 'pixelpro'])
def test_folders_of_before_still_open(name, tmp_path):
    "They bring the teacher, and it is taken; one that brings half of it is refused."
    method = twin(name)
    folder = save_pretrained(method, tmp_path/name)

    def store(weights):
        save_file(weights, str(folder/WEIGHTS), metadata={'format': 'pt'})
        write_json(folder/CONFIG, {**read_json(folder/CONFIG), 'weights_sha256': sha256_file(folder/WEIGHTS)})
    whole = plain_state(method)
    store(whole)
    for k, v in from_pretrained(folder).state_dict().items(): assert torch.equal(v, whole[k]), k
    store({k: v for k, v in whole.items() if k != next(n for n in whole if n.startswith('teacher.'))})
    with pytest.raises(DataError, match='missing: teacher'): from_pretrained(folder)
    store({k: v for k, v in whole.items() if not k.startswith(('teacher.', 'projector.'))})
    with pytest.raises(DataError, match='missing: projector'): from_pretrained(folder)


def test_a_method_without_unsaved_parts_keeps_every_name(tmp_path):
    method = tiny_mammoclip()
    assert set(load_file(save_pretrained(method, tmp_path/'m')/WEIGHTS)) == set(method.state_dict())


# ------------------------------------------------------------------------------------------------ pixels that are kept, pairs that match

def test_pixels_that_losses_need_are_kept_in_chunks():
    torch.manual_seed(0)
    method = RetinaNet(RetinaNetConfig(image_encoder='efficientnet-tiny', classes=('mass',), pyramid_width=8, head_width=8, freeze='encoder')).eval()
    samples = [dict(images=[np.full((64, 64), 50 * i + 20, np.uint8)], sample_id=f's{i}', boxes=[np.array([[8, 8, 40, 40]], np.float32)], box_labels=[['mass']]) for i in range(3)]
    batch = check_batch(collate(samples))
    method.zero_grad(); a = backward_batch(method, batch, StepState(), None); whole = gradients(method)
    method.zero_grad(); b = backward_batch(method, batch, StepState(), 2)
    assert method.keeps == ('images',) and float(a.losses['loss']) == pytest.approx(float(b.losses['loss']), rel=1e-5)
    for k, g in gradients(method).items(): torch.testing.assert_close(g, whole[k], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('cls,config', [(LoVT, LoVTConfig), (CLIP, CLIPConfig)])
def test_match_takes_what_was_read(cls, config):
    method, images = tiny_text(cls, config), torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    texts = ['No mass.', 'There is a mass.']
    with torch.no_grad():
        found = method.match(method.read_images(images), method.read_texts(texts))
        torch.testing.assert_close(found, method.encode_image(images) @ method.encode_text(texts).T, rtol=1e-4, atol=1e-5)
        assert found.shape == (3, 2) and torch.equal(method.match(method.read_images(images), method.read_texts(method.token_batch(texts))), found)
    assert {'match', 'read_images', 'read_texts', 'image_vectors', 'text_vectors'} <= set(capabilities(method))
