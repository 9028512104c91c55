"""One step of X-VL's networks and losses on the pretend accelerator: nothing on the wrong device, and no wait."""
import torch
import torch.nn.functional as F
from pretend_accelerator import DEVICE, WAITS, Accelerator

from medvl.losses.ibot import ibot_loss
from medvl.losses.itc import itc_loss
from medvl.losses.itm import RejectionDraws, draw_negatives, itm_loss, likeness, matching_pairs, row_draws
from medvl.losses.overlap import MASK_TERMS, combo_loss
from medvl.losses.sentence_search import group_rows, sentence_loss
from medvl.losses.words import mlm_loss
from medvl.models.distinct import encode_distinct
from medvl.models.fusion import FusionBert, KeyValueCache, attention_maps
from medvl.models.ibot_head import Centre, IBOTHead
from medvl.models.queue import FeatureQueue, IndexQueue
from medvl.models.vit import VisionTransformer
from medvl.train.clip_each import clip_each


def networks():
    torch.manual_seed(0)
    return (VisionTransformer(image_size=32, width=16, depth=2, heads=2, masked=True), IBOTHead(16, 12, 12, shared=True, hidden=8, bottleneck=4), Centre(12),
            FusionBert(40, width=16, heads=2, layers=3, fusion_layer=1, hidden=32, head=True, dropout=0.), FeatureQueue(8, 16), IndexQueue(8))


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (4, 6), generator=g)
    return (torch.randn(4, 1, 32, 32, generator=g), torch.rand(4, 2, 2, generator=g) > .5, ids, torch.where(torch.rand(4, 6, generator=g) < .3, ids, -100),
            torch.ones(4, 6, dtype=torch.long), torch.arange(4))


def one_step(networks, batch, u):
    vit, head, centre, bert, queue, index = networks
    x, masked, ids, labels, mask, numbers = batch
    image, words = vit.tokens(x, masked), bert(ids, mask=mask, mode='text')
    z, zt = F.normalize(image[:, 0], dim=1), F.normalize(words[:, 0], dim=1)
    itc, scores = itc_loss(z, zt, z, zt, queue.rows, queue.rows, .1, .4, 'hard', same=index.same(numbers, numbers))
    at, ai, right = matching_pairs(draw_negatives(scores['t2i'][:, :4], u), draw_negatives(scores['i2t'][:, :4], u, likeness(words[:, 0], words[:, 0])))
    itm = itm_loss(bert(states=words[at], mask=mask[at], context=image[ai], mode='fusion')[:, 0, :2], right)[0]
    mlm = mlm_loss(bert.logits(bert(ids, mask=mask, context=image)), labels)
    grouped, real = group_rows(zt, [1, 0, 2, 1])
    two = lambda t: t.unflatten(0, (2, -1))
    classes, patches = (two(t) for t in head(torch.cat([image, image])))
    ibot = ibot_loss(classes, patches, classes, patches, torch.stack([masked, masked]).flatten(-2), centre.value, centre.value)
    total = sum(itc.values()) + itm + mlm + sentence_loss(z, grouped.detach(), real, .1) + ibot['loss']
    total.backward()
    clip_each(vit.parameters(), 3.)
    queue.enqueue(z), index.enqueue(numbers), centre.update(classes.detach().mean((0, 1)))
    return total


def test_a_step_waits_for_nothing_and_is_the_cpus():
    parts, data, u = networks(), batch(), row_draws(4, 0)
    want, wanted = one_step(parts, data, u).item(), parts[0].cls_token.grad.clone()
    with Accelerator():
        moved, there = [p.to(DEVICE) for p in networks()], [t.to(DEVICE) for t in data]
        draws = row_draws(4, 0, device=DEVICE)
        before = len(WAITS)
        total = one_step(moved, there, draws)
        assert WAITS[before:] == []
        assert abs(total.item() - want) < 1e-4
        torch.testing.assert_close(moved[0].cls_token.grad.cpu(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved[4].rows.cpu(), parts[4].rows)


def test_what_is_not_part_of_a_step_runs_there_too():
    with Accelerator():
        vit, _, _, bert, _, _ = [p.to(DEVICE) for p in networks()]
        x, masked, ids, labels, mask, _ = [t.to(DEVICE) for t in batch()]
        image, cache = vit.tokens(x), KeyValueCache()
        bert(ids[:, :2], context=image, causal=True, cache=cache)
        cache.reorder(torch.tensor([1, 0]).to(DEVICE))
        assert bert(ids[:2, 2:3], causal=True, cache=cache).shape == (2, 1, 16) and vit.last_attention(x).shape == (4, 2, 5, 5)
        with attention_maps(bert) as record: bert(ids, mask=mask, context=image).sum().backward()
        assert sorted(record.gradients) == [1, 2]
        assert encode_distinct(lambda i, m: bert(i, mask=m, mode='text')[:, 0], ids, mask).shape == (4, 16)
        assert RejectionDraws(shared=False, generator=torch.Generator().manual_seed(0))(torch.zeros(4, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE) > 0).shape == (4,)
        s = torch.zeros(2, 1, 4, 4, device=DEVICE)
        assert combo_loss(s, (s + 1 > 0).float(), dict.fromkeys(MASK_TERMS, 1.))['loss'].item() > 0


def test_pairs_words_and_hidden_words_are_the_cpus():
    "Judgement of all pairs, maps of words, hidden words with and without the image, and self-attention: nothing on the wrong device."
    from medvl.attribute.self_attention import head_maps
    from medvl.methods.recipes import new_method
    said, images = ['The heart is large.', 'No effusion.', 'No mass is seen.', 'Normal lungs.'], torch.randint(0, 256, (3, 1, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    spans = [(said[0], (4, 9)), (said[1], (3, 11)), (said[2], (3, 7))]

    def answers(method, x):
        read = method.read_images(x)
        out = {'match': method.match(read, method.read_texts(said)), 'attention': method.word_maps(x, said[:3])[0], 'gradcam': method.word_maps(x, said[:3], 'gradcam')[0],
               'hidden': method.fill_mask(read, spans)['log_prob'], 'alone': method.fill_mask(None, spans)['log_prob'], 'map': method.feature_maps(x)}
        return out if method.image_grid is not None else {**out, 'heads': head_maps(method, x)}
    for name in ('smoke', 'smoke-2022'):
        method = new_method('xvl', name, said).eval().requires_grad_(False)
        want = answers(method, images)
        with Accelerator():
            moved = new_method('xvl', name, said).eval().requires_grad_(False).to(DEVICE)
            got = {k: v.cpu() for k, v in answers(moved, images.to(DEVICE)).items()}
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-3, atol=1e-5)


def test_heads_on_a_vit_train_on_the_device_as_on_the_cpu():
    from medvl.methods.base import StepState
    from medvl.methods.recipes import new_method
    from medvl.methods.retinanet import detector_from
    from medvl.methods.segmenter import segmenter_from
    from medvl.methods.yolo import yolo_from
    g = torch.Generator().manual_seed(0)
    batch = {'images': torch.randint(0, 256, (2, 1, 1, 64, 64), generator=g).float(), 'masks': (torch.rand(2, 1, 64, 64, generator=g) > .8).byte(), 'sample_id': ['a', 'b'],
             'boxes': [[[[8., 8., 40., 40.]]], [[[20., 10., 60., 50.]]]], 'box_labels': [[['x']], [['x']]]}
    makers = (lambda r: segmenter_from(r, 'x', 'unet', frozen=False, pyramid_width=8, width=.1), lambda r: yolo_from(r, 'x', frozen=False, pyramid_width=8, width=.1),
              lambda r: detector_from(r, ('x',), pyramid_width=8, head_width=8))
    for make in makers:
        want = make(new_method('xvl', 'smoke-2022', ['a mass is seen'])).train()
        loss = want(batch, StepState())['loss']
        loss.backward()
        with Accelerator():
            moved = make(new_method('xvl', 'smoke-2022', ['a mass is seen'])).to(DEVICE).train()
            there = moved({**batch, 'images': batch['images'].to(DEVICE)}, StepState())['loss']
            there.backward()
            assert abs(there.item() - loss.item()) < 1e-3 * abs(loss.item()) and moved.image_encoder.cls_token.grad is not None
