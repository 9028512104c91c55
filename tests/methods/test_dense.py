"""Segmentation and YOLO heads, their losses, and the metrics of LoVT's localized evaluation."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden

from medvl.api import Model
from medvl.core.errors import DataError
from medvl.evaluate.metrics.coco import BOX
from medvl.evaluate.localized.detection import (
    OVERLAPS, precision_draws, froc_draws, arrange_localized, average_precisions, detection_scores, froc_value, hits_of, localized_map, localized_table, localized_validation, marks_of,
)
from medvl.evaluate.metrics.froc import ranking_of, _weighted
from medvl.evaluate.metrics.segmentation import PixelCounts, metric_values, count_masks, dice_validation, patient_sums, segmentation_scores, segmentation_table
from medvl.losses.segmentation import check_masks, dice_loss, segmentation_loss
from medvl.losses.yolo import WEIGHTS, grid_loss, shape_overlap, yolo_loss, yolo_targets
from medvl.methods.base import StepState, from_pretrained, save_pretrained
from medvl.methods.segmenter import segmenter_from
from medvl.methods.yolo import yolo_from
from medvl.models.boxes import box_iou
from medvl.models.unet import LinearHead, UNet, stage_channels
from medvl.models.yolo import ANCHORS, STRIDES, YoloHead, decode_grid, plus_one, select_yolo, split_raw, yolo_anchors

SIZE = (224, 224)


@pytest.fixture(scope='module')
def yolo(): return {k: torch.from_numpy(v) for k, v in np.load(golden('lovt/yolo_1class.npz')).items()}


def boxes_of(g, images=3): # boxes x0,y0,x1,y1 and labels of each image
    flat = torch.cat([g['target_boxes_xywh'][:, :2], g['target_boxes_xywh'].double()[:, :2] + g['target_boxes_xywh'][:, 2:]], 1).float()
    return [flat[g['target_image'] == i] for i in range(images)], [g['target_class'][g['target_image'] == i] for i in range(images)]


# ---- heads
def test_linear_head_golden():
    g = {k: torch.from_numpy(v) for k, v in np.load(golden('lovt/linear_segmentation_head.npz')).items()}
    head = LinearHead({'conv5': 24}, 1).double()
    head.load_state_dict({'classifier.weight': g['param/classifier.weight'][..., None], 'classifier.bias': g['param/classifier.bias']})
    logits = head({'conv5': g['features']}, SIZE)
    assert (logits.sigmoid()[:, 0] - g['probs']).abs().max() < 1e-9
    assert abs(dice_loss(logits, g['target'][:, None]) - g['loss']) < 1e-9


@pytest.mark.parametrize('name', ('resnet-50', 'resnet-18', 'resnet-tiny'))
def test_parameter_counts(name):
    from medvl.models.resnet import ResNet
    channels = stage_channels(ResNet(name), UNet.reads)
    with torch.device('meta'):
        unet, yolo_head, linear = UNet(channels, 1), YoloHead(channels, 1), LinearHead(channels, 1)
        rgb, thin = UNet({**channels, 'input': 3}, 1), UNet(channels, 1, .25)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(linear) == channels['conv5'] + 1
    assert count(rgb) - count(unet) == 2 * 9 * channels['conv5'] // 32
    assert count(thin) < .15 * count(unet)
    if name == 'resnet-50': assert (round(count(unet) / 1e6, 1), round(count(rgb) / 1e6, 1), round(count(yolo_head) / 1e6, 1)) == (124.3, 124.3, 21.6)


# ---- segmentation losses
@pytest.mark.parametrize('classes', (1, 8))
@pytest.mark.parametrize('name', ('dice', 'bce', 'bce+dice', 'focal'))
def test_mask_losses_golden(name, classes):
    g = np.load(golden('lovt/dice.npz'))
    key = f'loss_{name.replace("+", "")}_C{classes}/'
    x, y = torch.from_numpy(g[key + 'logits']).requires_grad_(), torch.from_numpy(g[key + 'targets'])
    loss = segmentation_loss(x, y, name)['loss']
    loss.backward()
    assert abs(loss.item() - g[key + 'loss']) < 1e-6
    assert np.abs(x.grad.numpy() - g[key + 'grad_logits']).max() < 1e-7


@pytest.mark.parametrize('classes', (1, 8))
def test_dice_of_empty_targets_golden(classes):
    g = np.load(golden('lovt/dice.npz'))
    x = torch.from_numpy(g[f'loss_dice_C{classes}_empty_target/logits']).requires_grad_()
    loss = dice_loss(x, torch.zeros_like(x))
    loss.backward()
    assert loss.item() == g[f'loss_dice_C{classes}_empty_target/loss'] == 0 and not x.grad.any()


def test_dice_groupings_against_a_plain_loop():
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 6, 5), (torch.rand(3, 2, 6, 5) < .3).float()
    y[1, 0] = 0
    plain = lambda x, y: 1 - 2 * (x.sigmoid() * y).sum() / (x.sigmoid() + y).sum()
    assert torch.isclose(dice_loss(x, y, 'class'), torch.stack([plain(x[:, k], y[:, k]) for k in range(2)]).mean())
    assert torch.isclose(dice_loss(x, y, 'image'), torch.stack([plain(x[i, k], y[i, k]) for i in range(3) for k in range(2) if y[i, k].any()]).mean())
    assert dice_loss(x.half(), y.half()).isfinite()
    many = torch.full((8, 1, 96, 96), 5.)  # more pixels than float16 can count
    assert torch.isclose(dice_loss(many.half(), torch.ones(8, 1, 96, 96)), dice_loss(many, torch.ones(8, 1, 96, 96)), atol=1e-3)


def test_masks_that_do_not_fit():
    x = torch.zeros(2, 2, 8, 8)
    for masks, text in ((torch.zeros(2, 2, 8, 9), 'masks of 8×9 pixels'), (torch.zeros(2, 3, 8, 8), '3 masks an image'), (torch.zeros(2, 8, 8), r'must be \(b,k,h,w\)')):
        with pytest.raises(DataError, match=text): check_masks(x, masks, ['a'])


# ---- YOLO against the original
def test_overlap_golden():
    g = {k: torch.from_numpy(v) for k, v in np.load(golden('lovt/bbox_iou.npz')).items()}
    assert (box_iou(plus_one(g['box1_xyxy']), plus_one(g['boxes2_xyxy']))[0] - g['iou']).abs().max() < 1e-6


@pytest.mark.parametrize('scale', range(3))
def test_targets_loss_and_decoding_golden(yolo, scale):
    at, anchors = f's{scale}/', yolo['anchors'][scale]
    raw = yolo[at + 'raw'].clone().requires_grad_()
    boxes, labels = boxes_of(yolo)
    target = yolo_targets(boxes, labels, anchors, raw.shape[-2:], SIZE, convention='reference')
    assert torch.equal(target['found'].float(), yolo[at + 'target_mask'])
    assert torch.equal(target['silent'].float(), yolo[at + 'target_noobj_mask'])
    for i, name in enumerate(('tx', 'ty', 'tw', 'th')): assert (target['box'][..., i] - yolo[at + f'target_{name}']).abs().max() < 1e-5
    assert torch.equal(target['found'].float(), yolo[at + 'target_tconf']) and torch.equal(target['classes'], yolo[at + 'target_tcls'])
    terms = grid_loss(raw, target)
    for name in 'xywh': assert abs(terms[name] - yolo[at + f'loss_{name}']) < 1e-6
    assert abs(terms['objectness'] + .5 * terms['silence'] - yolo[at + 'loss_conf']) < 1e-6 and terms['class'] == yolo[at + 'loss_cls'] == 0
    loss = sum(WEIGHTS[k] * v for k, v in terms.items())
    loss.backward()
    assert abs(loss - yolo[at + 'loss']) < 1e-6
    assert (raw.grad - yolo[at + 'grad_raw']).abs().max() < 1e-7
    decoded = decode_grid(raw.detach(), anchors, SIZE, None)
    assert ((decoded - yolo[at + 'decoded']).abs() / yolo[at + 'decoded'].abs().clamp(min=1)).max() < 1e-5


def test_whole_loss_golden(yolo):
    raws = [yolo[f's{s}/raw'] for s in range(3)]
    found = yolo_loss(raws, *boxes_of(yolo), yolo_anchors('reference'), SIZE, convention='reference')
    assert abs(found['loss'] - sum(yolo[f's{s}/loss'] for s in range(3))) < 2e-6
    assert torch.equal(yolo_anchors('reference'), yolo['anchors'])


@pytest.mark.parametrize('threshold', (.2, .97))
def test_suppression_golden(yolo, threshold):
    decoded, name = torch.cat([yolo[f's{s}/decoded'] for s in range(3)], 1), f'nms{threshold}/'
    for i in range(3):
        mine, theirs = select_yolo(decoded[i], SIZE, threshold, top=0, reference=True), yolo[name + 'image'] == i
        assert len(mine['boxes']) == theirs.sum()
        box = torch.cat([mine['boxes'][:, :2], mine['boxes'][:, 2:] - mine['boxes'][:, :2]], 1)
        order = lambda conf, b: np.lexsort((b[:, 0].numpy(), -conf.numpy()))  # equal confidence: order by position
        a, b = order(mine['scores'], box), order(yolo[name + 'conf'][theirs], yolo[name + 'boxes_xywh'][theirs])
        assert torch.equal(mine['scores'][a], yolo[name + 'conf'][theirs][b])
        assert ((box[a] - yolo[name + 'boxes_xywh'][theirs][b]).abs() / box[a].abs().clamp(min=1)).max() < 1e-4
        assert torch.equal(mine['labels'][a].float(), yolo[name + 'classes'][theirs][b])


# ---- YOLO against a plain loop, without the original
def plain_targets(boxes, labels, anchors, grid, size, classes, convention):
    more = float(convention == 'reference')
    shape = (len(boxes), len(anchors), *grid)
    out = {'found': torch.zeros(shape, dtype=torch.bool), 'silent': torch.ones(shape, dtype=torch.bool), 'box': torch.zeros(*shape, 4), 'classes': torch.zeros(*shape, classes)}
    for i, (bs, cs) in enumerate(zip(boxes, labels)):
        for b, c in zip(bs.tolist(), cs.tolist()):
            sx, sy = size[1] / grid[1], size[0] / grid[0]
            x, y, w, h = (b[0] + b[2]) / 2 / sx, (b[1] + b[3]) / 2 / sy, (b[2] - b[0]) / sx, (b[3] - b[1]) / sy
            gx, gy = min(max(int(x), 0), grid[1] - 1), min(max(int(y), 0), grid[0] - 1)
            overlaps = []
            for aw, ah in (anchors / torch.tensor([sx, sy])).tolist():
                inner = (min(w, aw) + more) * (min(h, ah) + more)
                overlaps.append(inner / ((w + more) * (h + more) + (aw + more) * (ah + more) - inner))
            for a, o in enumerate(overlaps):
                if o > .5: out['silent'][i, a, gy, gx] = False
            a = int(np.argmax(overlaps))
            out['found'][i, a, gy, gx] = True
            aw, ah = (anchors[a] / torch.tensor([sx, sy])).tolist()
            out['box'][i, a, gy, gx] = torch.tensor([x - gx, y - gy, np.log(w / aw), np.log(h / ah)])
            if convention == 'clean': out['classes'][i, a, gy, gx] = 0  # the original leaves the class of an earlier box there
            out['classes'][i, a, gy, gx, c] = 1
    if convention == 'clean': out['silent'] &= ~out['found']
    return out


@pytest.mark.parametrize('convention', ('clean', 'reference'))
def test_targets_against_a_plain_loop(convention):
    rng = np.random.default_rng(0)
    size, boxes, labels = (96, 160), [], []
    for n in (0, 40, 7, 1):
        corner, side = rng.uniform(-5, 150, (n, 2)), rng.uniform(2, 90, (n, 2))
        boxes.append(torch.tensor(np.concatenate([corner, corner + side], 1), dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.from_numpy(rng.integers(0, 3, n)))
    for stride, anchors in zip(STRIDES, yolo_anchors(size=size)):
        grid = (size[0] // stride, size[1] // stride)
        mine, plain = (f(boxes, labels, anchors, grid, size, 3, convention) for f in (yolo_targets, plain_targets))
        for name in mine: assert torch.allclose(mine[name].float(), plain[name].float(), atol=2e-4), name
        assert (plain['classes'].sum(-1).max() > 1) == (convention == 'reference')


def test_loss_of_images_without_boxes_and_options():
    torch.manual_seed(0)
    raws = [torch.randn(2, 3 * 7, 96 // s, 96 // s, requires_grad=True) for s in STRIDES]
    none, no = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    found = yolo_loss(raws, none, no, yolo_anchors(size=(96, 96)), (96, 96), reduction='boxes')
    assert found['position'] == found['size'] == found['class'] == 0 and found['objectness'] > 0
    found['loss'].backward()
    assert all(r.grad.isfinite().all() and not split_raw(r.grad)[..., :4].any() for r in raws)
    one, c = [torch.tensor([[10., 10, 70, 60]]), torch.zeros(0, 4)], [torch.tensor([1]), no[0]]
    everywhere, best = (yolo_loss(raws, one, c, yolo_anchors(size=(96, 96)), (96, 96), scales=s) for s in ('all', 'best'))
    assert 0 < best['class'] < everywhere['class']
    with pytest.raises(DataError, match='1 boxes and 2 labels'): yolo_loss(raws, one, [torch.tensor([1, 1]), no[0]], yolo_anchors(), (96, 96))
    with pytest.raises(DataError, match='without area'): yolo_loss(raws, [torch.tensor([[10., 10, 10, 60]]), none[0]], c, yolo_anchors(), (96, 96))
    assert len(ANCHORS) == 2 and shape_overlap(torch.ones(1, 2), torch.ones(1, 2)).item() == 1


# ---- methods
def batch_of(b=4, classes=('opacity',), size=64):
    g = torch.Generator().manual_seed(0)
    masks = (torch.rand(b, len(classes), size, size, generator=g) < .2).to(torch.uint8)
    boxes = [[np.array([[5, 6, 30, 40 + i]], np.float32)[:i % 2]] for i in range(b)]
    return dict(images=torch.randint(0, 256, (b, 1, 1, size, size), generator=g, dtype=torch.uint8), masks=masks, boxes=boxes, box_labels=[[[classes[0]] * len(x[0])] for x in boxes],
                sample_id=[f's{i}' for i in range(b)], patient_id=[f'p{i // 2}' for i in range(b)], index=torch.arange(b))


MAKERS = {'linear': lambda s, **c: segmenter_from(s, ('opacity',), 'linear', **c), 'unet': lambda s, **c: segmenter_from(s, ('opacity',), 'unet', width=.25, **c),
          'yolo': lambda s, **c: yolo_from(s, ('opacity',), **c)}


def steps(method, n, start=0):
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3, weight_decay=.1)
    method.train()
    for step in range(start, start + n):
        features = method.encode(batch)
        loss = method.losses(features, batch, StepState(step))['loss']
        optimizer.zero_grad(set_to_none=True); loss.backward(); optimizer.step()
        method.after_step(features, batch, StepState(step))
    return method


batch = batch_of()


@pytest.mark.parametrize('head', MAKERS)
def test_frozen_and_warming_encoders_do_not_move(head):
    bits = lambda m: {k: v.clone() for k, v in m.image_encoder.state_dict().items()}
    same = lambda a, b: [k for k in a if not torch.equal(a[k], b[k])]
    frozen = MAKERS[head]('resnet-tiny')
    before, old = bits(frozen), {k: v.clone() for k, v in frozen.head.state_dict().items()}
    steps(frozen, 3)
    assert not same(before, bits(frozen)) and not any(m.training for m in frozen.image_encoder.modules()) and not any(p.requires_grad for p in frozen.image_encoder.parameters())
    assert same(old, frozen.head.state_dict())
    warm = MAKERS[head]('resnet-tiny', frozen=False, head_warmup=3)
    before = bits(warm)
    steps(warm, 3)
    assert not same(before, bits(warm))
    assert all(m.training for m in warm.image_encoder.modules())  # and right after the warm-up it learns
    steps(warm, 1, start=3)
    assert len(same(before, bits(warm))) == len(before)
    assert set(warm.warmup_names()) == {n for n, _ in warm.named_parameters() if n.startswith('head.')}


@pytest.mark.parametrize('head', MAKERS)
def test_warm_up_goes_on_after_saving(head, tmp_path):
    warm = steps(MAKERS[head]('resnet-tiny', frozen=False, head_warmup=5), 2)
    again = from_pretrained(save_pretrained(warm, tmp_path / head)).train()
    assert again.resting and again.steps == 2 and not again.eval().resting
    a, b = warm.predict(batch['images']), again.predict(batch['images'])
    assert torch.equal(a, b) if head != 'yolo' else all(torch.equal(x['boxes'], y['boxes']) for x, y in zip(a, b))
    assert warm.training


@pytest.mark.parametrize('head', MAKERS)
def test_kept_features_and_chunks_change_nothing(head):
    from medvl.train.gradcache import backward_batch
    method = MAKERS[head]('resnet-tiny').eval()
    kept = {**batch, 'taps': {k: v.half() for k, v in method.features(batch['images']).items()}}
    exact = {**batch, 'taps': method.features(batch['images'])}
    assert torch.allclose(method(exact)['loss'], method(batch)['loss'], atol=1e-6) and torch.allclose(method(kept)['loss'], method(batch)['loss'], atol=1e-2)
    gradients = []
    for data, chunk in ((batch, None), (batch, 3), (exact, 2)):
        method.zero_grad(set_to_none=True)
        backward_batch(method, data, StepState(), chunk)
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    for other in gradients[1:]: assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize('head', MAKERS)
def test_training_loop_with_warm_up_and_resume(head, tmp_path):
    import os
    import signal
    from dataclasses import replace

    from medvl.train.loop import train
    from medvl.train.settings import TrainConfig

    class Data:
        classes, digest = ('opacity',), 'four'
        def __len__(self): return 4
        def __getitem__(self, key): return {k: v[key[1]] for k, v in batch.items()}
        @staticmethod
        def collate(samples): return {k: torch.stack([s[k] for s in samples]) if torch.is_tensor(samples[0][k]) else [s[k] for s in samples] for k in samples[0]}

    config = TrainConfig(max_steps=4, batch_size=2, lr=1e-3, schedule='constant', warmup=0, weight_decay=.1, head_warmup=3, trackers=(), cpu=True, valid_every=1, mode='max')
    validate = dice_validation(Data()) if head != 'yolo' else localized_validation(Data())
    seen, made = [], MAKERS[head]('resnet-tiny', frozen=False, head_warmup=3)
    start = {k: v.clone() for k, v in made.image_encoder.state_dict().items()}
    def watch(method, state):
        seen.append((state.step, all(torch.equal(v, start[k]) for k, v in method.image_encoder.state_dict().items())))
        return validate(method, state)
    metric = 'valid_dice' if head != 'yolo' else 'valid_map'
    train(made, Data(), replace(config, monitor=metric), tmp_path / 'whole', validate=watch)
    assert seen == [(1, True), (2, True), (3, True), (4, False)]
    assert made.steps == 4
    broken = MAKERS[head]('resnet-tiny', frozen=False, head_warmup=3)  # stopped after two steps, then taken up by a fresh method
    def stop(method, state):
        if state.step == 2 and not (tmp_path / 'stopped').exists():
            (tmp_path / 'stopped').touch()
            os.kill(os.getpid(), signal.SIGINT)
        return validate(method, state)
    with pytest.raises(KeyboardInterrupt): train(broken, Data(), replace(config, monitor=metric), tmp_path / 'parts', validate=stop)
    fresh = MAKERS[head]('resnet-tiny', frozen=False, head_warmup=3)
    train(fresh, Data(), replace(config, monitor=metric), tmp_path / 'parts', validate=stop)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), made.state_dict().values()))


class Stageless(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.image_encoder = None, torch.nn.Conv2d(1, 2, 3)


def test_sources_of_encoders(tmp_path):
    from medvl.methods.classifier import Classifier, ClassifierConfig
    from medvl.models.resnet import ResNet
    from safetensors.torch import save_file
    torch.manual_seed(3)
    resnet = ResNet('resnet-tiny')
    save_file({**resnet.state_dict(), 'fc.weight': torch.zeros(2, 128), 'fc.bias': torch.zeros(2)}, str(tmp_path / 'tv.safetensors'))
    save_file({f'encoder.{k}': v for k, v in resnet.state_dict().items()}, str(tmp_path / 'other.safetensors'))
    for source, more in ((tmp_path / 'tv.safetensors', {}), (str(tmp_path / 'other.safetensors'), {'prefix': 'encoder.'})):
        for make in (segmenter_from, yolo_from):
            made = make(source, 'opacity', image_encoder='resnet-tiny', **more)
            assert all(torch.equal(a, b) for a, b in zip(made.image_encoder.state_dict().values(), resnet.state_dict().values()))
            with pytest.raises(DataError, match='not the weights of resnet-18'): make(source, 'opacity', image_encoder='resnet-18', **more)
    with pytest.raises(DataError, match='prefix'): segmenter_from(tmp_path / 'other.safetensors', 'opacity', image_encoder='resnet-tiny')
    for make in (segmenter_from, yolo_from):
        with pytest.raises(TypeError, match='no image encoder with stages'): make(Stageless(), 'opacity')
        with pytest.raises(TypeError, match='gives no stages'): make('autoencoder-tiny', 'opacity')
    other = Classifier(ClassifierConfig(image_encoder='efficientnet-tiny'))
    for head in ('linear', 'unet'): # an EfficientNet's reductions are its stages
        made = segmenter_from(other, 'opacity', head)
        assert all(torch.equal(a, b) for a, b in zip(made.image_encoder.parameters(), other.image_encoder.parameters()))
        assert made.predict(torch.zeros(1, 1, 64, 96, dtype=torch.uint8)).shape == (1, 1, 64, 96)
        assert torch.equal(made.image_features(torch.ones(1, 1, 64, 96)), made.image_encoder.eval()(made.scaled_images(torch.ones(1, 1, 64, 96))))
    odd = Classifier(ClassifierConfig(image_encoder='efficientnet-tiny', padding='detector'))
    with pytest.raises(ValueError, match='padding'): segmenter_from(odd, 'opacity')
    a, b, c = (segmenter_from('resnet-tiny', 'opacity', seed=s) for s in (0, 0, 1))
    assert torch.equal(a.head.classifier.weight, b.head.classifier.weight) and not torch.equal(a.head.classifier.weight, c.head.classifier.weight)
    save_pretrained(segmenter_from('resnet-tiny', 'opacity', seed=5), tmp_path / 'saved')
    assert torch.equal(yolo_from(tmp_path / 'saved', 'x').image_encoder.conv1.weight, segmenter_from('resnet-tiny', 'opacity', seed=5).image_encoder.conv1.weight)
    trained = Classifier(ClassifierConfig(image_encoder='resnet-tiny', image_mean=.3, image_std=.2))
    made = yolo_from(trained, 'opacity', image_std=.1)
    assert (made.config.image_mean, made.config.image_std) == (.3, .1) and torch.equal(made.image_encoder.conv1.weight, trained.image_encoder.conv1.weight)


def test_saved_heads_open_in_a_fresh_process(tmp_path):
    "A saved folder opens by the name of its method, whatever was imported before; so `medvl.load` reads segmenters and detectors too."
    for name, made in (('unet', segmenter_from('resnet-tiny', 'opacity', head='unet', width=.05)), ('yolo', yolo_from('resnet-tiny', 'opacity', width=.05))):
        Model(made, 'lovt_v1', (64, 64)).save_pretrained(tmp_path / name)
    code = (f"from medvl.methods.base import from_pretrained; print(from_pretrained({str(tmp_path / 'yolo')!r}).name)\n"
            f"import medvl; print(medvl.load({str(tmp_path / 'unet')!r}).method.name)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['yolo', 'segmenter']


def test_hostile_batches_and_configurations():
    segmenter, yolo = segmenter_from('resnet-tiny', ('opacity', 'nodule')), yolo_from('resnet-tiny', 'opacity')
    two = batch_of(classes=('opacity', 'nodule'))
    assert segmenter(two)['loss'].isfinite() and segmenter.predict(two['images'][:, 0]).shape == (4, 2, 64, 64)
    for change, text in ((dict(masks=two['masks'][..., :60]), r'masks of 64×60 pixels .*s0'), (dict(masks=two['masks'][:, :1]), '1 masks an image'),
                         (dict(images=two['images'][..., :60]), 'multiples of 32')):
        with pytest.raises(DataError, match=text): segmenter({**two, **change})
    with pytest.raises(DataError, match='no masks'): segmenter({k: v for k, v in two.items() if k != 'masks'})
    with pytest.raises(ValueError, match='must be'): segmenter.predict(two['images'][0, 0])
    bad = [[np.array([[5, 6, 5, 40]], np.float32)]] * 4
    with pytest.raises(DataError, match=r"without area in image 's0'"): yolo({**batch, 'boxes': bad, 'box_labels': [[['opacity']]] * 4})
    assert yolo({**batch, 'box_labels': [[['other'] * len(x[0])] for x in batch['boxes']]})['position'] == 0
    assert yolo({**batch, 'boxes': [[x[0][:0]] for x in batch['boxes']], 'box_labels': [[[]]] * 4})['loss'].isfinite()
    for changes, text in ((dict(loss='dise'), 'Did you mean'), (dict(dice_over='pixel'), 'Unknown'), (dict(pos_weight=(1., 2.)), 'one weight'), (dict(head_warmup=4), 'warm-up')):
        with pytest.raises(ValueError, match=text): segmenter_from('resnet-tiny', 'opacity', **changes)
    for changes in (dict(anchors='x'), dict(reduction='x'), dict(scales='x')):
        with pytest.raises(ValueError, match='Unknown'): yolo_from('resnet-tiny', 'opacity', **changes)
    with pytest.raises(ValueError, match='each once'): yolo_from('resnet-tiny', ('a', 'a'))


# ---- metrics against the original
def tables(g): # truth, detections, images of a golden file
    boxes = lambda p: np.concatenate([g[p][:, :2], g[p][:, :2] + g[p][:, 2:]], 1).astype(float)
    truth = pd.DataFrame(boxes('gt_boxes_xywh'), columns=BOX).assign(image_id=g['gt_image'], label=[f'c{i}' for i in g['gt_class']])
    found = pd.DataFrame(boxes('pred_boxes_xywh'), columns=BOX).assign(image_id=g['pred_image'], label=[f'c{i}' for i in g['pred_class']], score=g['pred_conf'].astype(float))
    return truth, found, range(int(g['n_images']))


@pytest.mark.parametrize('classes', (1, 3))
def test_localized_map_golden(classes):
    g = np.load(golden(f'lovt/detection_{classes}class.npz'))
    labels = [f'c{i}' for i in range(classes)]
    values = localized_map(*tables(g), labels, ties='listed')
    for name in g:
        if name.startswith('metric/') and 'froc' not in name: assert abs(values[name[7:]] - g[name]) < 1e-6, name
    scene = arrange_localized(*tables(g), labels, ties='listed')
    assert np.abs(average_precisions(scene, hits_of(scene, OVERLAPS)).T - g['ap_per_threshold_class']).max() < 1e-6
    assert np.allclose(g['iou_thresholds'], OVERLAPS)
    table = localized_table(*tables(g), labels, n_boot=50, ties='listed').set_index(['task', 'metric'])
    assert abs(table.value['mean', 'mAP'] - g['metric/mAP']) < 1e-6 and abs(table.value['mean', 'pos_mAP'] - g['metric/pos_mAP']) < 1e-6
    if classes == 1:
        assert abs(table.value['c0', 'froc'] - g['metric/froc']) < 1e-6
        gain, false, _ = marks_of(arrange_localized(*tables(g), labels, plus_one=False, ties='listed'))
        for name, rates in (('froc_fps_0.5_1.0', (.5, 1.)), ('froc_fps_0.125', (.125,))):
            assert abs(froc_value(gain, false, len(g['gt_image']), int(g['n_images']), rates) - g[f'metric/{name}']) < 1e-6


def test_froc_edge_cases_golden():
    wanted = json.loads(golden('lovt/froc_edge_cases.json').read_text())
    truth = pd.DataFrame([['a', 'x', 10., 10, 30, 30]], columns=['image_id', 'label', *BOX])
    hit, miss = [12., 12, 28, 28], [100., 100, 116, 116]
    def value(marks, images):
        found = pd.DataFrame([('a', 'x', s, *b) for s, b in zip((.9, .8), marks)], columns=['image_id', 'label', 'score', *BOX]).astype({'score': float})
        return froc_value(*marks_of(arrange_localized(truth, found, images, ['x'], False))[:2], 1, len(images))
    assert froc_value(np.zeros(0, int), np.zeros(0, bool), 0, 1) == wanted['no_predictions_no_targets']
    found = {'no_predictions_one_target': value([], ['a']), 'one_hit_no_fp': value([hit], ['a']), 'fp_then_hit_2_images': value([miss, hit], ['a', 'b']),
             'hit_then_fp_2_images': value([hit, miss], ['a', 'b']), 'fp_only_with_target_elsewhere': value([miss], ['a', 'b'])}
    for name, v in found.items(): assert abs(v - wanted[name]) < 1e-6, name


def plain_froc(gain, false, n_boxes, n_images, rates):
    "The challenge's loop, mark by mark."
    noted, found, wrong = [], 0, 0
    for g, f in zip(gain, false):
        found, wrong = found + g, wrong + f
        if len(noted) < len(rates) and wrong / n_images >= rates[len(noted)]: noted.append(found / n_boxes if n_boxes else 1.)
    if not noted: return found / n_boxes if n_boxes else 1.
    return np.mean(noted + noted[-1:] * (len(rates) - len(noted)))


def test_froc_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(300):
        d, n = rng.integers(0, 40), rng.integers(1, 9)
        false = rng.random(d) < rng.random()
        gain = np.where(false, 0, rng.integers(0, 3, d))
        boxes = gain.sum() + rng.integers(0, 3)
        rates = np.sort(rng.choice([.125, .2, .25, .5, 1., 2., 4., 8.], rng.integers(1, 8), replace=False))
        assert abs(froc_value(gain, false, boxes, n, rates) - plain_froc(gain, false, boxes, n, rates)) < 1e-12


def random_tables(rng, images=12, classes=2):
    def some(n):
        corner, side = rng.uniform(0, 100, (n, 2)), rng.uniform(4, 40, (n, 2))
        return pd.DataFrame(np.concatenate([corner, corner + side], 1), columns=BOX).assign(image_id=rng.integers(0, images, n), label=[f'c{i}' for i in rng.integers(0, classes, n)])
    truth = some(15)
    near = truth.sample(40, replace=True, random_state=int(rng.integers(1e6))).reset_index(drop=True)
    near[BOX] += rng.normal(0, 3, near[BOX].shape)
    found = pd.concat([near[(near.x1 > near.x0) & (near.y1 > near.y0)], some(20)], ignore_index=True)
    return truth, found.assign(score=rng.permutation(len(found)) / 100.), range(images)


def plain_ap(truth, found, label, threshold, more):
    "Average precision row by row."
    t, f = truth[truth.label == label].reset_index(drop=True), found[found.label == label].sort_values('score', ascending=False)
    taken, hits = set(), []
    for p in f.itertuples():
        best, which = threshold, None
        for q in t[t.image_id == p.image_id].itertuples():
            w, h = min(p.x1, q.x1) - max(p.x0, q.x0) + more, min(p.y1, q.y1) - max(p.y0, q.y0) + more
            inner = max(w, 0) * max(h, 0)
            area = lambda b: (b.x1 - b.x0 + more) * (b.y1 - b.y0 + more)
            overlap = inner / (area(p) + area(q) - inner)
            if overlap > best and q.Index not in taken: best, which = overlap, q.Index
        taken.add(which)
        hits.append(which is not None)
    tp = np.cumsum(hits)
    precision, recall = tp / np.arange(1, len(tp) + 1), tp / len(t)
    return np.mean([max((p for p, r in zip(precision, recall) if r >= at), default=0) for at in np.linspace(0, 1, 101)])


@pytest.mark.parametrize('plus_one', (True, False))
def test_map_against_a_plain_loop(plus_one):
    for seed in range(3):
        truth, found, images = random_tables(np.random.default_rng(seed))
        values, plain = localized_map(truth, found, images, plus_one=plus_one), {t: np.mean([plain_ap(truth, found, c, t, float(plus_one)) for c in ('c0', 'c1')]) for t in (.5, .75)}
        for t in plain: assert abs(values[f'mAP@{t:g}'] - plain[t]) < 1e-9


def test_bootstrap_of_boxes_is_that_of_repeated_patients():
    from medvl.evaluate.stats.bootstrap import patient_counts
    truth, found, images = random_tables(np.random.default_rng(5))
    frame = pd.DataFrame({'image_id': images, 'patient_id': [i // 3 for i in images]})
    scene = arrange_localized(truth, found, frame, plus_one=False)
    gain, false, patient = marks_of(scene)
    boxes_of = np.bincount(scene.patient_of(scene.group[scene.label_of(scene.group) == 0]), minlength=4)
    draws = froc_draws(gain, false, patient, boxes_of, np.full(4, 3), 5, 0)
    for draw, weights in zip(draws, patient_counts(4, 0, 0, 5).T.astype(int)):
        copies = [(p, j) for p, n in enumerate(weights) for j in range(n)]
        parts = [[x[x.image_id // 3 == p] for x in (truth, found)] for p, _ in copies]
        t, f = (pd.concat([x[k].assign(image_id=x[k].image_id + 100 * j) for x, (_, j) in zip(parts, copies)], ignore_index=True) for k in (0, 1))
        again = arrange_localized(t, f, [i + 100 * j for p, j in copies for i in range(3 * p, 3 * p + 3)], ['c0', 'c1'], plus_one=False)
        g, w, _ = marks_of(again)
        n = (t.label == 'c0').sum()
        assert np.isnan(draw) if not n else abs(draw - froc_value(g, w, n, again.n_images)) < 1e-12
    assert localized_table(truth, found, images, n_boot=20).low.notna().all()
    hit, everyone = hits_of(scene, OVERLAPS), np.ones(12, bool)
    ranked, patient, boxes_of, _ = ranking_of(scene, 0, hit)
    assert np.array_equal(precision_draws(scene, hit, everyone, 100, 0)[0], np.stack([_weighted(h, patient, boxes_of, 100, 0) for h in ranked]), equal_nan=True)


def test_dice_golden():
    g = np.load(golden('lovt/dice.npz'))
    p, y = (torch.from_numpy(g[k]) for k in ('probs', 'targets'))
    parts = [count_masks(a[:, None], b[:, None]).numpy() for a, b in zip(p, y)]
    counts = np.concatenate(parts)
    found = PixelCounts(counts, ('x',), pd.DataFrame({'image_id': range(12), 'patient_id': range(12)}))
    table = segmentation_table(found, n_boot=20).set_index(['task', 'metric']).value
    assert abs(table['x', 'dice'] - g['dice_micro']) < 1e-6 and abs(table['x', 'image_dice'] - g['dice_samples_positive_images']) < 1e-6
    for part, wanted in zip(parts, g['dice_micro_per_batch']):
        tp, fp, fn = part.sum((0, 1))
        assert abs(2 * tp / max(2 * tp + fp + fn, 1) - wanted) < 1e-6


def test_segmentation_table_against_scikit_learn_and_repeated_patients():
    from medvl.evaluate.stats.bootstrap import patient_counts
    from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
    rng = np.random.default_rng(0)
    p, y = rng.random((10, 2, 8, 8)), (rng.random((10, 2, 8, 8)) < .3).astype(int)
    y[:4, 0] = 0
    found = PixelCounts(count_masks(torch.from_numpy(p), torch.from_numpy(y)).numpy(), ('a', 'b'), pd.DataFrame({'image_id': range(10), 'patient_id': [i // 3 for i in range(10)]}))
    table = segmentation_table(found, n_boot=0).set_index(['task', 'metric']).value
    for k, name in enumerate('ab'):
        flat = y[:, k].ravel(), p[:, k].ravel() >= .5
        for metric, f in (('dice', f1_score), ('iou', jaccard_score), ('precision', precision_score), ('recall', recall_score)): assert abs(table[name, metric] - f(*flat)) < 1e-12
        assert abs(table[name, 'image_dice'] - np.mean([f1_score(y[i, k].ravel(), p[i, k].ravel() >= .5) for i in range(10) if y[i, k].any()])) < 1e-12
    weights, sums = patient_counts(4, 0, 0, 7).astype(int), patient_sums(found)
    draws = metric_values(sums @ weights.astype(float))
    for b in range(7):
        rows = np.concatenate([np.tile(np.flatnonzero(np.arange(10) // 3 == i), n) for i, n in enumerate(weights[:, b])]).astype(int)
        again = PixelCounts(found.counts[rows], found.labels, found.images.iloc[rows].reset_index(drop=True))
        assert np.allclose(draws[..., b], metric_values(patient_sums(again).sum(2, keepdims=True))[..., 0], equal_nan=True)


def test_a_class_without_truth_or_prediction():
    counts = np.zeros((3, 3, 3), int)
    counts[:, 0], counts[0, 1] = (5, 1, 1), (0, 0, 4)   # found; there, but never found; not there at all
    counts[1, 2, 1] = 7                                   # ... but predicted once
    found = PixelCounts(counts, ('a', 'b', 'c'), pd.DataFrame({'image_id': range(3), 'patient_id': range(3)}))
    table = segmentation_table(found, n_boot=30).set_index(['task', 'metric'])
    assert table.value['b', 'dice'] == 0 and table.value['b', 'precision'] == 0 and np.isnan(table.value['c', 'dice'])
    assert table.value['mean', 'dice'] == table.value['a', 'dice'] / 2 and 'no positive pixel' in table.note['c', 'dice'] and 'resamples' in table.note['b', 'dice']
    with pytest.raises(DataError, match='no image shows'): segmentation_table(PixelCounts(counts[:, 2:], ('c',), found.images))
    with pytest.raises(ValueError, match=r'are \(n,k,3\)'): PixelCounts(counts[:2], ('a', 'b', 'c'), found.images)


def test_scores_of_methods_on_a_dense_dataset(tmp_path):
    class Data:
        classes = ('nodule', 'opacity')
        def __len__(self): return 4
        def __getitem__(self, key): return {k: v[key[1]] for k, v in batch_of(classes=self.classes).items()}
        @staticmethod
        def collate(samples): return {k: torch.stack([s[k] for s in samples]) if torch.is_tensor(samples[0][k]) else [s[k] for s in samples] for k in samples[0]}

    data, method = Data(), segmenter_from('resnet-tiny', ('opacity',)).train()
    result = segmentation_scores(method, data, batch_size=3, n_boot=20)  # the method's class is the data's second plane
    p = method.predict(batch_of(classes=data.classes)['images'])
    assert np.array_equal(result.found.counts, count_masks(p, batch_of(classes=data.classes)['masks'][:, 1:]).numpy()) and method.training
    assert segmentation_scores(p, data, ('opacity',), n_boot=0).value() == result.value()
    with pytest.raises(ValueError, match='class of this data set'): segmentation_scores(segmenter_from('resnet-tiny', 'opacities'), data)
    found = detection_scores(yolo_from('resnet-tiny', ('nodule',), score_threshold=.5), data, n_boot=20)
    assert len(found.images) == 4 and len(found.truth) == 2 and found.images.patient_id.nunique() == 2
    assert {'mAP', 'mAP_plain', 'froc'} <= set(found.table.metric)
    with pytest.raises(DataError, match='no true box'): detection_scores(yolo_from('resnet-tiny', ('mass',), score_threshold=.9), data)
