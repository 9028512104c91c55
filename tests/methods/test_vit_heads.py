"""Heads on a vision transformer: by name, from X-VL, frozen and fine-tuned, saved, and through the localized tasks."""
import numpy as np
import pytest
import torch
from localized import LABELS, evaluate, small, squares

from medvl.core.errors import DataError
from medvl.core.paths import read_jsonl
from medvl.data.samples.dense import DenseDataset
from medvl.evaluate.localized.run import head_maker, load_carrier
from medvl.evaluate.localized.tasks import select_tasks
from medvl.methods.base import StepState, build, from_pretrained, save_pretrained
from medvl.methods.classifier import new_classifier
from medvl.methods.recipes import new_method
from medvl.methods.retinanet import RetinaNet, RetinaNetConfig, detector_from
from medvl.methods.segmenter import segmenter_from
from medvl.methods.yolo import yolo_from
from medvl.models.simple_pyramid import SimplePyramid
from medvl.models.vision import build_image_encoder
from medvl.models.vit import VITS, VisionTransformer

same = lambda a, b: all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope='module')
def reader():
    "X-VL of 2022 on a small ViT."
    return new_method('xvl', 'smoke-2022', ['no mass is seen', 'there is a mass']).eval()


@pytest.fixture(scope='module')
def data(tmp_path_factory): return squares(tmp_path_factory.mktemp('squares')/'opacity')


def batch_of(data, n=8):
    part = DenseDataset(data, ('opacity',), truth='mask')
    return part.collate([part[0, i] for i in range(n)])


@pytest.fixture(scope='module')
def batch(data):
    masks, boxes = batch_of(data), DenseDataset(data, ('opacity',), truth='boxes')
    found = boxes.collate([boxes[0, i] for i in range(8)])
    return {**masks, **{k: found[k] for k in ('boxes', 'box_labels')}}


def fit(method, batch, steps, lr):
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr)
    method.train()
    losses = []
    for step in range(steps):
        loss = method(batch, StepState(step))['loss']
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        method.after_step({}, {}, StepState(step))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('name', sorted(VITS))
def test_every_vit_is_known_by_name(name):
    with torch.device('meta'): vit = build_image_encoder(name, image_size=64, depth=1)
    assert isinstance(vit, VisionTransformer) and vit.num_features == VITS[name][0] and vit.last == 'conv4'


def test_weights_by_name_and_refusals(tmp_path):
    vit = build_image_encoder('vit-tiny', image_size=64, width=32, depth=1, heads=4)
    torch.save({'teacher': {f'backbone.{k}': v for k, v in vit.state_dict().items()}}, tmp_path/'dino.pth')
    from medvl.models.vit import load_vit
    again = build_image_encoder('vit-tiny', image_size=64, width=32, depth=1, heads=4)
    load_vit(again, tmp_path/'dino.pth', 'teacher')
    assert same(vit.state_dict(), again.state_dict())
    torch.save(vit.state_dict(), tmp_path/'plain.pth')
    assert same(vit.state_dict(), build_image_encoder('vit-tiny', weights=tmp_path/'plain.pth', image_size=64, width=32, depth=1, heads=4).state_dict())
    with pytest.raises(DataError, match='no pre-trained weights for vit-tiny'): build_image_encoder('vit-tiny', pretrained=True)
    with pytest.raises(ValueError, match="Did you mean 'vit-small'"): build_image_encoder('vit-smal')


def test_the_pyramid_by_hand():
    "Branches that only double and halve: the finer map repeats each place where its kernel is one, the coarser keeps the larger."
    p = SimplePyramid(4, 16, ('conv3', 'conv4', 'conv5'), 6)
    kinds = {n: [type(m).__name__ for m in b] for n, b in p.branches.items()}
    tail = ['Conv2d', 'ChannelNorm', 'Conv2d', 'ChannelNorm']
    assert kinds == {'conv3': ['ConvTranspose2d', 'ChannelNorm', 'GELU', *tail], 'conv4': tail, 'conv5': ['MaxPool2d', *tail]}
    x = torch.randn(2, 4, 4, 6)
    out = p(x)
    assert {n: tuple(m.shape) for n, m in out.items()} == {'conv3': (2, 6, 8, 12), 'conv4': (2, 6, 4, 6), 'conv5': (2, 6, 2, 3)}
    for m in out.values(): # the last norm: each place has mean 0 and variance 1 over channels
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(m.var(1, unbiased=False), torch.ones_like(m[:, 0]), atol=1e-3, rtol=0)
    top = p.branches['conv5'][0](x)
    torch.testing.assert_close(top[0, 0, 0, 0], x[0, 0, :2, :2].max())
    with pytest.raises(ValueError, match='doublings'): SimplePyramid(4, 12, ('conv4',))
    with pytest.raises(ValueError, match='no stage of a pyramid'): VisionTransformer('vit-tiny', 56, 14, width=32, depth=1, heads=4).stages(torch.zeros(1, 1, 28, 28))


@pytest.mark.parametrize('frozen', [True, False])
def test_classifier(reader, batch, frozen, tmp_path):
    "The probe leaves the encoder alone to the bit; fine-tuning moves all of it; saved and opened it answers the same."
    method = new_classifier(reader, ('opacity',), frozen=frozen)
    torch.testing.assert_close(method.eval().image_features(batch['images']), reader.image_features(batch['images']))
    before = {k: v.clone() for k, v in method.image_encoder.state_dict().items()}
    found = fit(method, {'images': batch['images'], 'labels': batch['masks'].flatten(1).amax(1, keepdim=True).float()}, 20, .02 if frozen else 2e-3)
    assert found[-1] < found[0]
    moved = [k for k, v in method.image_encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert (moved == []) if frozen else (set(moved) == set(before) and 'masked_embed' not in moved)
    again = from_pretrained(save_pretrained(method, tmp_path/'m'))
    torch.testing.assert_close(again.predict(batch['images']), method.eval().predict(batch['images']))
    third = new_classifier(again, ('a', 'b')) # and from there on
    torch.testing.assert_close(third.eval().image_features(batch['images']), method.image_features(batch['images']))


def test_classifier_by_name_and_on_a_stage(batch):
    method = new_classifier('vit-tiny', ('opacity',), frozen=False)
    assert method.head.in_features == 192
    conv = new_method('xvl', 'smoke', ['no mass is seen', 'there is a mass']).eval() # reads the stage conv4 of a ResNet
    on_stage = new_classifier(conv, ('opacity',), frozen=False)
    maps = conv.image_encoder.feature_maps(conv.image_side.scaled(batch['images']), 'conv4')
    torch.testing.assert_close(on_stage.eval().image_features(batch['images']), maps.mean((2, 3)))
    fit(on_stage, {'images': batch['images'], 'labels': torch.ones(8, 1)}, 1, 1e-3)
    assert all((p.grad is not None) == p.requires_grad for p in on_stage.parameters())


@pytest.mark.parametrize('head', ['linear', 'mlp', 'unet'])
def test_segmenter(reader, batch, head, tmp_path):
    options = dict(pyramid_width=16, image_mean=.35) | (dict(hidden=16) if head == 'mlp' else {})
    frozen = segmenter_from(reader, 'opacity', head, **options)
    assert list(frozen.features(batch['images'])) == ['conv4'] and (frozen.pyramid is None) == (head != 'unet')
    before = {k: v.clone() for k, v in frozen.image_encoder.state_dict().items()}
    found = fit(frozen, batch, 15, 1e-2)
    assert found[-1] < found[0] and same(before, frozen.image_encoder.state_dict())
    kept = {**batch, 'taps': frozen.eval().features(batch['images'])}
    torch.testing.assert_close(frozen(kept)['loss'], frozen(batch)['loss'], rtol=1e-5, atol=1e-6)
    again = from_pretrained(save_pretrained(frozen, tmp_path/'m'))
    torch.testing.assert_close(again.predict(batch['images']), frozen.predict(batch['images']))
    tuned = segmenter_from(again, 'opacity', head, frozen=False, head_warmup=2, **options)
    before = {k: v.clone() for k, v in tuned.image_encoder.state_dict().items()}
    fit(tuned, batch, 2, 1e-3)
    assert same(before, tuned.image_encoder.state_dict())
    fit(tuned, batch, 4, 1e-3)
    assert not same(before, tuned.image_encoder.state_dict())


def test_a_fine_tuned_unet_on_a_vit_outlines_what_it_saw(reader, batch):
    method = segmenter_from(reader, 'opacity', 'unet', frozen=False, pyramid_width=16, width=.5, image_mean=.35)
    fit(method, batch, 40, 3e-3)
    p, y = method.predict(batch['images']) > .5, batch['masks'].bool()
    assert 2 * (p & y).sum() / (p.sum() + y.sum()) > .8


def test_yolo_and_retinanet_find_what_they_saw(reader, batch, tmp_path):
    yolo = yolo_from(reader, 'opacity', frozen=False, pyramid_width=16, width=.5, image_mean=.35)
    found = fit(yolo, batch, 40, 3e-3)
    assert found[-1] < .7 * found[0] and all(p.grad is not None for p in yolo.parameters())
    retina = detector_from(reader, ('opacity',), pyramid_width=16, head_width=16)
    found = fit(retina, batch, 30, 3e-3)
    assert found[-1] < .6 * found[0] and all(p.grad is not None for p in retina.parameters())
    for method in (yolo, retina):
        again = from_pretrained(save_pretrained(method, tmp_path/method.name))
        for a, b in zip(again.predict(batch['images']), method.eval().predict(batch['images'])): torch.testing.assert_close(a, b)
    rests = detector_from(reader, ('opacity',), pyramid_width=16, head_width=16, freeze='encoder')
    before = {k: v.clone() for k, v in rests.image_encoder.state_dict().items()}
    fit(rests, batch, 3, 1e-2)
    assert same(before, rests.image_encoder.state_dict())
    with torch.device('meta'): by_name = RetinaNet(RetinaNetConfig(image_encoder='vit-tiny'))
    assert by_name.scales is not None
    dense = new_method('proxy', 'smoke', (), 0, image_encoder='densenet-tiny')
    with pytest.raises(TypeError, match='EfficientNet, ResNet or ViT'): detector_from(dense, ('x',))


def test_names_build_heads():
    for name, more in (('segmenter', {'stage': 'conv4'}), ('yolo', {'pyramid_width': 8, 'width': .1}), ('classifier', {'labels': ['a']})):
        method = build(name, {'image_encoder': 'vit-tiny', **({'classes': ['a']} if name != 'classifier' else {}), **more})
        assert isinstance(method.image_encoder, VisionTransformer)
    with pytest.raises(DataError, match='do not divide'): segmenter_from('vit-tiny', 'a').predict(torch.zeros(1, 1, 48, 48))


def test_what_is_stored_about_a_vit_is_checked(reader, tmp_path):
    import json
    folder = save_pretrained(segmenter_from(reader, 'opacity'), tmp_path/'m')
    file = folder/'image_encoder'/'config.json'
    good = json.loads(file.read_text())
    for wrong, why in (({'heads': 5}, 'heads must divide'), ({'depth': 10**7}, 'no network'), ({'colour': 1}, 'colour'), ({'name': 'vit-huge'}, 'vision transformer')):
        file.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(DataError, match=why): from_pretrained(folder)


@pytest.fixture(scope='module')
def saved(reader, tmp_path_factory):
    "A folder with the saved reader; data sets of squares join it."
    folder = tmp_path_factory.mktemp('saved')
    save_pretrained(reader, folder/'reader')
    return folder


@pytest.mark.parametrize('number', range(1, 19))
def test_localized_tasks_take_a_vit(number, saved, tmp_path):
    "Each of the 18: cached features where the encoder rests, training, the one test, and the table."
    task = select_tasks(number)[0]
    data, source = squares(saved/task.dataset, LABELS if task.dataset == 'nih' else task.classes[0], n=(8, 4, 8)), str(saved/'reader')
    found = evaluate(tmp_path/'run', number, {task.dataset: data}, source, runs=1, max_epochs=1, max_lrs=1, min_images=4, max_batch=4, n_boot=8)
    row = found.results.iloc[0]
    assert (row.status, row.task, row.metric, row.encoder, row.n_test) == ('done', task.key, task.metric, 'vit-tiny', 8)
    assert 0 <= row.value <= 1 and row.runs == 1
    assert (tmp_path/'run'/'features').exists() == task.frozen
    log = [r for r in read_jsonl(tmp_path/'run'/task.key/'run-0'/'training'/'metrics.jsonl') if r['kind'] == 'train']
    assert log and all(np.isfinite(r['loss']) for r in log)
    method = head_maker(load_carrier(source), data, small())(task)
    assert (method.pyramid is None) == (task.head == 'linear')
    assert any(p.requires_grad for p in method.image_encoder.parameters()) != task.frozen
