"""Detection: boxes, losses, network, method, average precision, FROC; against the original's numbers and against plain formulas."""
import contextlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.data.batch import collate
from medvl.data.samples.boxes import DetectionAugment, box_classes, detection_dataset, detection_subset
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.evaluate.metrics.coco import BOX, arrange_boxes, candidate_pairs, coco_map, match
from medvl.evaluate.protocols.detector import detect, evaluate_detections, map_validation
from medvl.evaluate.metrics.froc import detection_table, froc_table, reference_map
from medvl.losses.detection import IGNORED, detection_loss, match_anchors
from medvl.methods.base import StepState, from_pretrained, save_pretrained
from medvl.methods.retinanet import RetinaNet, RetinaNetConfig, detector_from, from_released_names, reference_config
from medvl.models.boxes import LEVELS, anchor_grid, base_anchors, box_iou, clip_boxes, decode_boxes, encode_boxes, nms
from medvl.models.detector import Head, Pyramid, encoder_taps, select_boxes, tap_channels
from medvl.models.efficientnet import EfficientNet
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

SMALL = dict(image_encoder='efficientnet-tiny', pyramid_width=8, head_width=8, anchor_size=2.0, drop_connect=0.0)


def tensors(name):
    z = np.load(golden(f'mammoclip/{name}.npz'))
    return {k: torch.from_numpy(z[k]) for k in z.files}


def test_anchors_golden():
    z = np.load(golden('mammoclip/anchors.npz'))
    for level in LEVELS: np.testing.assert_allclose(base_anchors(2 ** (level + 2)), z[f'base_{2 ** (level + 2)}'], atol=1e-10)
    for h, w in ((512, 512), (96, 64), (160, 128), (100, 75)): np.testing.assert_array_equal(anchor_grid(h, w), z[f'anchors_{h}x{w}'][0])
    large = anchor_grid(1520, 912)
    assert len(large) == z['anchors_1520x912_count']
    np.testing.assert_allclose(large.double().sum(0), z['anchors_1520x912_colsum'])


def test_decoding_golden():
    z = tensors('box_decode')
    decoded = decode_boxes(z['deltas'], z['anchors'], limit=None)
    torch.testing.assert_close(decoded, z['decoded'], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(clip_boxes(z['decoded'], 128, 128, reference=True), z['clipped_128x128'], rtol=0, atol=0)


def test_losses_golden():
    z = tensors('focal_box_loss')
    anchors, real = z['anchors'][0], [a[a[:, 4] >= 0] for a in z['annotations']]
    torch.testing.assert_close(anchors, anchor_grid(128, 128), rtol=0, atol=0)
    torch.testing.assert_close(box_iou(anchors, real[0][:, :4]), z['iou_img0'], rtol=1e-6, atol=1e-7)
    boxes, labels = [a[:, :4] for a in real], [a[:, 4].long() for a in real]
    options = dict(empty='skip', force=False, clamped=True)
    for alpha, gamma in ((.25, 2.), (.6, 2.), (.25, 1.5)):
        p, d, key = z['classification'].clone().requires_grad_(), z['regression'].clone().requires_grad_(), f'a{alpha}_g{gamma}'
        out = detection_loss(p, d, anchors, boxes, labels, alpha=alpha, gamma=gamma, **options)
        torch.testing.assert_close(out['class'], z[f'{key}_cls'][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out['box'], z[f'{key}_reg'][0], rtol=1e-5, atol=1e-6)
        for i, want in enumerate(z[f'{key}_per_image']):
            one = detection_loss(p[i:i + 1], d[i:i + 1], anchors, boxes[i:i + 1], labels[i:i + 1], alpha=alpha, gamma=gamma, **options)
            torch.testing.assert_close(torch.stack([one['class'], one['box']]), want, rtol=1e-5, atol=1e-6)
        if (alpha, gamma) != (.25, 2.): continue
        out['loss'].backward()
        torch.testing.assert_close(p.grad, z[f'{key}_grad_cls'], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d.grad, z[f'{key}_grad_reg'], rtol=1e-5, atol=1e-7)


def test_pyramid_and_heads_golden():
    z = tensors('fpn_heads_small')
    pyramid, regression, classification = Pyramid((8, 12, 20), 16), Head(4, 16, 16), Head(3, 16, 16)
    for module, prefix in ((pyramid, 'fpn.'), (regression, 'reg.'), (classification, 'cls.')):
        module.load_state_dict({k: z[prefix + k] for k in module.state_dict()})
    levels = pyramid(z['C3'], z['C4'], z['C5'])
    for i, p in enumerate(levels): torch.testing.assert_close(p, z[f'P{i + 3}'], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(regression(levels), z['regression'], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classification(levels).sigmoid(), z['classification'], rtol=1e-4, atol=1e-5)


def formula_heads(keys, shapes):
    "The head weights of the golden README's formula."
    out = {}
    for i, key in enumerate(keys):
        shape = shapes[key]
        n = int(np.prod(shape))
        s = np.sin(.7 * np.arange(n) + i)
        s = np.sqrt(2 / (n / shape[0])) * s if len(shape) >= 2 else .1 * s - (key == 'classificationModel.output.bias')
        out[key] = torch.from_numpy(s.reshape(shape)).float()
    return out


def test_retinanet_b2_golden():
    "The whole detector, loaded under the original's names, with both kinds of paddings."
    z, keys = tensors('retinanet_b2_128'), json.loads(golden('mammoclip/retinanet_head_keys.json').read_text())['keys_in_order']
    encoder = {k: v.float() if v.is_floating_point() else v for k, v in torch.load(golden('mammoclip/b2_image_encoder_fp16.pt'), weights_only=True).items()}
    detector = RetinaNet(reference_config(classes=('a', 'b'), height=0, width=0)).eval()
    ours = detector.state_dict()
    shapes = {k: tuple(ours[next(iter(from_released_names({k: 0})))].shape) for k in keys}
    detector.load_state_dict(from_released_names({**formula_heads(keys, shapes), **{f'efficientnet.{k}': v for k, v in encoder.items()}}))
    with torch.no_grad():
        maps = encoder_taps(detector.image_encoder, z['x'])
        levels = detector.pyramid(*maps)
        scores, deltas = detector.classification(levels).sigmoid(), detector.regression(levels)
        clip = EfficientNet('efficientnet-b2', padding='clip').eval()
        clip.load_state_dict(encoder)
        other = encoder_taps(clip, z['x'])
    for i in range(3):
        torch.testing.assert_close(maps[i], z[f'C{i + 3}'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[i], z[f'clip_C{i + 3}'], rtol=1e-4, atol=1e-5)
        assert (maps[i] - other[i]).norm() > .05 * maps[i].norm()
    for i, p in enumerate(levels): torch.testing.assert_close(p, z[f'P{i + 3}'], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, z['classification'], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deltas, z['regression'], rtol=1e-4, atol=1e-4)


def test_selection_golden():
    "On the original's own answers: many scores are equal up to rounding there, so rounding would change who wins."
    z = tensors('retinanet_b2_128')
    found = select_boxes(z['classification'][0], z['regression'][0], anchor_grid(128, 128), 128, 128, per_class=False, candidates=0, top=0, reference=True)
    torch.testing.assert_close(found['scores'], z['det_scores'], rtol=0, atol=0)
    torch.testing.assert_close(found['boxes'], z['det_boxes'], rtol=1e-5, atol=1e-4)
    assert torch.equal(found['labels'], z['det_labels'])


def test_reference_map_golden():
    stored = json.loads(golden('mammoclip/map_eval.json').read_text())
    truth = pd.DataFrame([(i, int(b[4]), *b[:4]) for i, boxes in enumerate(stored['annotations_x1y1x2y2cls']) for b in boxes], columns=['image_id', 'label', *BOX])
    found = pd.DataFrame([(i, c, s, *b) for i, part in enumerate(stored['detections_scores_labels_boxes']) for s, c, b in zip(*part)],
                         columns=['image_id', 'label', 'score', *BOX])
    for key, want in stored['results'].items():
        score, overlap = (float(x) for x in key.removeprefix('score').split('_iou'))
        got = reference_map(truth, found, range(len(stored['annotations_x1y1x2y2cls'])), score=score, overlap=overlap, ties='listed')
        assert got['mean'] == pytest.approx(want['mAP'], abs=1e-12)
        for c, (ap, n) in want['ap'].items(): assert got[int(c)] == pytest.approx(ap, abs=1e-12) and (truth.label == int(c)).sum() == n


def naive_nms(boxes, scores, threshold, labels=None):
    left, kept = scores.argsort(descending=True, stable=True).tolist(), []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if (labels is not None and labels[i] != labels[best]) or naive_iou(boxes[best], boxes[i]) <= threshold]
    return kept


def naive_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(w, 0) * max(h, 0)
    return float(inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([.2, .5, .8]), st.sampled_from([1, 5, 1024]), st.booleans())
def test_nms_is_the_loop(seed, n, threshold, block, per_class):
    rng = np.random.default_rng(seed)
    corner, side = rng.integers(0, 30, (n, 2)), rng.integers(2, 30, (n, 2))
    boxes, scores = torch.from_numpy(np.concatenate([corner, corner + side], 1)).double(), torch.from_numpy(rng.integers(0, 6, n) / 5)
    labels = torch.from_numpy(rng.integers(0, 2, n)) if per_class else None
    assert nms(boxes, scores, threshold, labels, block).tolist() == naive_nms(boxes, scores, threshold, labels)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(32, 32), (64, 96), (50, 75), (33, 129)]))
def test_boxes_properties(seed, size):
    "Overlaps equal the plain formula and are symmetric; coding goes there and back; the number of anchors is the number of cells times nine."
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (6, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(1, 40, (6, 2))], 1))
    iou = box_iou(boxes, boxes)
    np.testing.assert_allclose(iou, [[naive_iou(a, b) for b in boxes] for a in boxes], atol=1e-12)
    assert torch.equal(iou, iou.T) and torch.allclose(iou.diagonal(), torch.ones(6).double())
    grid = anchor_grid(*size)
    assert len(grid) == 9 * sum(-(-size[0] // 2**level) * -(-size[1] // 2**level) for level in LEVELS)
    some = grid[torch.from_numpy(rng.integers(0, len(grid), 6))].double()
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, some), some, limit=None), boxes, rtol=1e-6, atol=1e-6)


def scene(seed, images=25, labels=('calcification', 'mass', 'asymmetry')):
    "A random scene with near misses, ties of scores, integer boxes, images without truth, and all of COCO's size ranges."
    rng = np.random.default_rng(seed)
    def boxes(n):
        corner, side = rng.uniform(0, 300, (n, 2)).round(), rng.uniform(4, 160, (n, 2)).round()
        return pd.DataFrame(np.concatenate([corner, corner + side], 1), columns=BOX).assign(image_id=rng.integers(0, images, n), label=rng.choice(labels, n))
    truth = boxes(2 * images)
    truth = truth[truth.image_id % 4 != 0].reset_index(drop=True)
    near = truth.loc[rng.integers(0, len(truth), 6 * images)].reset_index(drop=True)
    near[BOX] += rng.normal(0, 5, (len(near), 4)).round(int(seed % 2))
    near = near[(near.x1 > near.x0 + 1) & (near.y1 > near.y0 + 1)]
    found = pd.concat([near, boxes(6 * images)], ignore_index=True).sample(frac=1, random_state=seed).reset_index(drop=True)
    return truth, found.assign(score=rng.random(len(found)).round(2)), list(range(images))


def oracle(truth, found, images, which):
    "pycocotools itself, or faster_coco_eval, its C++ port."
    names = sorted({*truth.label, *found.label})
    def rows(table):
        return [dict(id=i + 1, image_id=int(r.image_id), category_id=names.index(r.label), iscrowd=0, bbox=[r.x0, r.y0, r.x1 - r.x0, r.y1 - r.y0],
                     area=(r.x1 - r.x0) * (r.y1 - r.y0), **({'score': float(r.score)} if 'score' in table else {})) for i, r in enumerate(table.itertuples())]
    data = dict(images=[dict(id=i) for i in images], categories=[dict(id=i, name=n) for i, n in enumerate(names)], annotations=rows(truth), info={})
    with contextlib.redirect_stdout(io.StringIO()):
        if which == 'pycocotools':
            coco = pytest.importorskip('pycocotools.coco').COCO()
            coco.dataset = data
            coco.createIndex()
            e = pytest.importorskip('pycocotools.cocoeval').COCOeval(coco, coco.loadRes(rows(found)), 'bbox')
        else:
            fast = pytest.importorskip('faster_coco_eval')
            coco = fast.COCO(data)
            e = fast.COCOeval_faster(coco, coco.loadRes(rows(found)), 'bbox')
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e


@pytest.mark.parametrize('which', ['pycocotools', 'faster_coco_eval'])
@pytest.mark.parametrize('seed', range(6))
def test_coco_map_is_cocos(seed, which):
    truth, found, images = scene(seed)
    e, ours = oracle(truth, found, images, which), coco_map(truth, found, images, ties='listed')
    columns = ['AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR_1', 'AR_10', 'AR_100', 'AR_small', 'AR_medium', 'AR_large']
    np.testing.assert_allclose(ours.loc['mean', columns].to_numpy(float), np.array(e.stats[:12]), atol=1e-9)
    precision = np.asarray(e.eval['precision'])  # (overlaps, recalls, classes, areas, detections)
    for k, name in enumerate(ours.index[:-1]):
        assert ours.AP[name] == pytest.approx(precision[:, :, k, 0, -1].mean(), abs=1e-9)
        assert ours.AP50[name] == pytest.approx(precision[0, :, k, 0, -1].mean(), abs=1e-9)


def plain_ap50(truth, found):
    "COCO's AP at 0.5 of one class, written as loops."
    taken, hits = set(), []
    for r in found.sort_values('score', ascending=False, kind='stable').itertuples():
        able = [(naive_iou([r.x0, r.y0, r.x1, r.y1], t[1:]), i) for i, t in enumerate(truth[['image_id', *BOX]].itertuples(index=False)) if t[0] == r.image_id and i not in taken]
        best = max(able, default=(0, -1))
        hits.append(best[0] >= .5)
        if hits[-1]: taken.add(best[1])
    tp, fp = np.cumsum(hits), np.cumsum(np.logical_not(hits))
    precision, recall = tp / (tp + fp), tp / len(truth)
    return np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])


@pytest.mark.parametrize('seed', range(3))
def test_ap50_is_the_loops_and_bootstrap_is_a_resample(seed):
    truth, found, images = scene(seed, images=8, labels=('mass',))
    found = found.assign(score=np.random.default_rng(seed).permutation(len(found)) / len(found))
    assert coco_map(truth, found, images).AP50['mass'] == pytest.approx(plain_ap50(truth, found), abs=1e-9)
    table = detection_table(truth, found, pd.DataFrame({'image_id': images, 'patient_id': [i // 2 for i in images]}), n_boot=100).set_index(['task', 'metric'])
    row = table.loc['mass', 'AP50']
    assert row.low < row.value < row.high and row.patients == 4 and row.n_positive == len(truth)
    one = detection_table(truth, found, pd.DataFrame({'image_id': images, 'patient_id': 'same'}), n_boot=20).set_index(['task', 'metric']).loc['mass', 'AP50']
    assert np.isnan(one.low) and 'one patient' in one.note


def test_detections_change_ap_as_they_should():
    truth, found, images = scene(1, labels=('mass',))
    base = coco_map(truth, found, images).AP50['mass']
    assert coco_map(truth, truth.assign(score=1.), images).loc['mean', ['AP', 'AR_100']].tolist() == [1, 1]
    assert coco_map(truth, found.iloc[:0], images).AP['mass'] == 0
    assert coco_map(truth, found.assign(score=found.score * .1 + .5), images).AP50['mass'] == pytest.approx(base)  # only the order matters
    worse = pd.concat([found, found.iloc[:20].assign(x0=900., x1=950., score=2.)])
    assert coco_map(truth, worse, images).AP50['mass'] < base
    absent = coco_map(truth, found, images, labels=['mass', 'asymmetry'])
    assert np.isnan(absent.AP['asymmetry']) and absent.AP['mean'] == absent.AP['mass']


def test_froc_by_hand_and_monotone():
    truth, found, images = scene(2, labels=('mass',))
    table = froc_table(truth, found, images, rates=(0, .5, 2, 1000), n_boot=0).query("task == 'mass'").value.to_numpy()[:4]
    assert (np.diff(table) >= 0).all()
    s = arrange_boxes(truth, found, images)
    touched = np.unique(match(s, candidate_pairs(s, .25), [.25]))
    assert table[-1] == pytest.approx((touched >= 0).sum() / len(truth))  # at any number of false marks: all that is ever hit
    strict = froc_table(truth, found, images, rates=(.5,), n_boot=0, duplicates='false').value.iloc[0]
    assert strict <= froc_table(truth, found, images, rates=(.5,), n_boot=0).value.iloc[0]


@pytest.mark.parametrize('spoil, error, words', [
    (lambda t, f, i: (t.assign(x1=t.x0), f, i), DataError, 'without area'),
    (lambda t, f, i: (t.iloc[:0], f, i), DataError, 'no true box'),
    (lambda t, f, i: (t, f.assign(score=np.nan), i), DataError, 'not finite'),
    (lambda t, f, i: (t, f, i[:-1]), ValueError, 'image_id'),
    (lambda t, f, i: (t, f.drop(columns='score'), i), ValueError, 'score'),
    (lambda t, f, i: (t, f, [*i, 0]), ValueError, 'twice'),
])
def test_bad_tables(spoil, error, words):
    with pytest.raises(error, match=words): coco_map(*spoil(*scene(0)))


def test_small_boxes_and_empty_images_teach():
    "Ours by default: a box that no anchor covers gets its best anchors, an image without boxes pulls all answers down; the original does neither."
    anchors, tiny = anchor_grid(64, 64), torch.tensor([[30., 30, 33, 34]])
    assert not (match_anchors(anchors, tiny, force=False) >= 0).any()
    match = match_anchors(anchors, tiny)
    overlap = box_iou(anchors, tiny)[:, 0]
    assert torch.equal(match >= 0, overlap == overlap.max())
    for empty, sign in (('negatives', 1), ('skip', 0)):
        logits, deltas = torch.zeros(1, len(anchors), 2, requires_grad=True), torch.zeros(1, len(anchors), 4, requires_grad=True)
        detection_loss(logits, deltas, anchors, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], empty=empty)['loss'].backward()
        assert (logits.grad.sign() == sign).all() and (deltas.grad == 0).all()
    between = torch.tensor([[0., 0, 40, 40]])
    ignored = match_anchors(anchors, between) == IGNORED
    logits = torch.zeros(1, len(anchors), 1, requires_grad=True)
    detection_loss(logits, torch.zeros(1, len(anchors), 4), anchors, [between], [torch.zeros(1, dtype=torch.int64)])['loss'].backward()
    assert ignored.any() and (logits.grad[0, ignored] == 0).all() and (logits.grad[0, ~ignored] != 0).all()


@pytest.fixture(scope='module')
def phantom(tmp_path_factory):
    return prepared_phantom(tmp_path_factory.mktemp('detection'), 6, (96, 64), difficulty='easy')


def batch_of(data, n=4): return collate([data[0, i] for i in range(n)])


def test_bad_boxes_and_names(phantom):
    with pytest.raises(ValueError, match='mass'): box_classes(phantom, 'masses')
    spoilt = phantom.subset(np.arange(len(phantom)))
    spoilt.boxes.loc[2, 'y1'] = spoilt.boxes.y0[2]
    with pytest.raises(DataError, match='without area') as e: box_classes(spoilt)
    assert e.value.row == 2 and e.value.column == 'y1'
    normal = phantom.subset((~phantom.manifest.image_id.isin(phantom.boxes.image_id)).to_numpy())
    with pytest.raises(DataError, match='no boxes'): box_classes(normal)
    with pytest.raises(DataError, match='no image has a box of mass'): detection_subset(normal, ('mass',))
    with pytest.raises(DataError, match='no true box'): map_validation(normal, ('mass',))
    detector, batch = RetinaNet(RetinaNetConfig(**SMALL)), batch_of(detection_dataset(phantom, ('mass',), 'positive'))
    flat = {**batch, 'boxes': [[b[0][:, [0, 1, 0, 3]]] for b in batch['boxes']]}
    with pytest.raises(DataError, match=str(batch['sample_id'][0])): detector(flat)
    with pytest.raises(DataError, match='no boxes'): detector({k: v for k, v in batch.items() if k != 'boxes'})
    for wrong in (dict(taps='stride'), dict(freeze='encoders'), dict(height=100, width=100), dict(classes=('mass', 'mass')), dict(height=64)):
        with pytest.raises(ValueError): RetinaNet(RetinaNetConfig(**{**SMALL, **wrong}))


def test_boxes_follow_the_augmentation(phantom):
    "A bright block painted where a box is must be where the box goes."
    data = detection_dataset(phantom, ('mass',), 'positive', train=True)
    batch = batch_of(data)
    batch['images'] = torch.zeros_like(batch['images'])
    batch['images'][:, 0, 0, 30:60, 20:40] = 255
    batch['boxes'], batch['box_labels'] = [[np.array([[20, 30, 40, 60]], np.float32)] for _ in range(4)], [[['mass']]] * 4
    out = DetectionAugment(rotate=0., shear=0., translate=.1, scale=(.9, 1.1), affine=1., elastic=0.)(batch, seed=0)
    for image, boxes in zip(out['images'], out['boxes']):
        y, x = (image[0, 0] > 127).nonzero(as_tuple=True)
        np.testing.assert_allclose(boxes[0][0], [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1.01)
    away = DetectionAugment(rotate=0., shear=0., translate=2., affine=1., elastic=0., keep=.5)(batch, seed=1)
    assert all(len(b[0]) == len(n[0]) for b, n in zip(away['boxes'], away['box_labels'])) and any(not len(b[0]) for b in away['boxes'])
    assert RetinaNet(RetinaNetConfig(**SMALL, classes=('mass',)))(away, StepState())['loss'].isfinite()


@pytest.mark.parametrize('freeze', ['encoder', 'weights', 'none'])
def test_frozen_is_frozen(phantom, freeze, tmp_path):
    "Through the real training loop: what may move, moves, and nothing else does."
    torch.manual_seed(0)
    detector = RetinaNet(RetinaNetConfig(**SMALL, classes=('mass',), freeze=freeze))
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    config = TrainConfig(epochs=1, max_steps=2, batch_size=2, lr=1e-3, warmup=0, trackers=(), cpu=True)
    result = train(detector, detection_dataset(phantom, ('mass',), 'positive', train=True), config, tmp_path/'run', transform=DetectionAugment(elastic=0.))
    assert result.step == 2
    moved = {k for k, v in detector.state_dict().items() if not torch.equal(v, before[k])}
    encoder = {k.split('.')[-1] for k in moved if k.startswith('image_encoder.')}
    assert any(k.startswith('classification.') for k in moved) and any(k.startswith('pyramid.') for k in moved)
    assert encoder == {'encoder': set()}.get(freeze, encoder)
    assert ('running_mean' in encoder) == (freeze != 'encoder') and ('weight' in encoder) == (freeze == 'none')


def test_overfits_a_few_images_and_finds_them(phantom):
    "Forty-five steps on three images: the boxes are found again, by predict and by the tables."
    torch.manual_seed(0)
    chosen = detection_subset(phantom, ('mass',), 'positive').subset(np.arange(3))
    detector = RetinaNet(RetinaNetConfig(**{**SMALL, 'pyramid_width': 24, 'head_width': 24}, classes=('mass',)))
    batch = DetectionAugment(mode='none')(batch_of(detection_dataset(chosen, ('mass',)), 3))
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-3)
    for _ in range(45):
        optimizer.zero_grad()
        detector(batch)['loss'].backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(20): detector(batch)  # BatchNorm's running statistics catch up
    result = evaluate_detections(detect(detector, chosen), chosen, ('mass',), n_boot=0)
    assert result.coco.AP50['mass'] > .6, result.coco
    assert result.table.query("task == 'mass' and metric == 'AP50'").value.item() == pytest.approx(result.coco.AP50['mass'])


def test_sizes_saving_and_encoder_transfer(phantom, tmp_path):
    torch.manual_seed(0)
    detector = RetinaNet(RetinaNetConfig(**SMALL, classes=('mass', 'lymph_node'), score_threshold=.005)).eval()
    x = torch.from_numpy(phantom.images.read(np.arange(2)))[:, None]
    kept = from_pretrained(save_pretrained(detector, tmp_path/'detector'))
    for a, b in zip(detector.predict(x), kept.predict(x)): assert all(torch.equal(a[k], b[k]) for k in a)
    for size in ((96, 64), (50, 33), (97, 65)):
        for f in detector.predict(x[..., :size[0], :size[1]]):
            assert len(f['boxes']) and (f['boxes'] >= 0).all() and (f['boxes'] <= torch.tensor([size[1], size[0]] * 2)).all() and (f['scores'].diff() <= 0).all()
    resized = RetinaNet(RetinaNetConfig(**SMALL, classes=('mass', 'lymph_node'), score_threshold=.005, height=64, width=64)).eval()
    assert max(f['boxes'][:, 3].max() for f in resized.predict(x)) > 64  # given in pixels of the image, not of the resized one
    again = detector_from(detector, ('mass',), pyramid_width=8, head_width=8)
    torch.testing.assert_close(again.eval().feature_maps(x), detector.feature_maps(x))
    with pytest.raises(TypeError, match='EfficientNet'): tap_channels(torch.nn.Linear(2, 2))
    merged = RetinaNet(RetinaNetConfig(**SMALL, merge=True))
    assert merged.names == ('finding',) and set(detect(merged, phantom.subset([0])).label) <= {'finding'}
