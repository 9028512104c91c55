"""Segmentation and YOLO heads, their losses, and the metrics of LoVT's localized evaluation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden

from medvl.core.errors import DataError
from medvl.losses.segmentation import check_masks, dice_loss, segmentation_loss
from medvl.losses.yolo import WEIGHTS, grid_loss, shape_overlap, yolo_loss, yolo_targets
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
            out['classes'][i, a, gy, gx] = F.one_hot(torch.tensor(c), classes).float()
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
