"""X-VL, both variants: whole steps as the originals', files, two processes, capabilities, bad input."""
import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import SHARED, golden
from training import contents, gradients, quiet, settings

from medvl.core.config import config_from_dict
from medvl.core.errors import DataError
from medvl.data.augment.makers import new_augment
from medvl.data.batch import check_batch, slice_batch
from medvl.data.phantom.populations import new_phantom
from medvl.data.samples.builders import Parts, new_samples
from medvl.data.text.tokens import build_wordpiece
from medvl.evaluate.stats.selection import splits_of
from medvl.losses.itm import RejectionDraws, likeness
from medvl.methods.base import CAPABILITIES, CONFIG, StepState, capabilities, capability_problems, from_pretrained, save_pretrained
from medvl.methods.parts.image import WithVersions
from medvl.methods.parts.pairs import weigh_attention
from medvl.methods.recipes import new_method, recipe
from medvl.methods.released.xvl_files import export_xvl, file_variant, open_xvl, xvl_state
from medvl.methods.xvl import XVL, XVLConfig, resolve
from medvl.models.momentum import momentum_update
from medvl.train.distributed import average_gradients, exchange_of, launch
from medvl.train.gradcache import backward_batch

close = lambda a, b: torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items()}


HEADS = dict(fusion_heads=4, image_heads=4, max_length=40)
LATE = StepState(step=1, epoch_steps=1, epoch=2) # alpha has grown to its end


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Checkpoints of both originals, as they would write them."
    folder = tmp_path_factory.mktemp('xvl')
    for year, name in (('2023', 'head'), ('2022', 'v2022')):
        torch.save({'model': arrays(f'{name}_pretrain_weights_before.npz'), 'optimizer': {'state': {}, 'param_groups': []}, 'lr_scheduler': {}, 'epoch': 3,
                    'config': {'queue_size': 24}}, folder/f'{year}.pth')
    return folder


def opened(files, year, **changes): return open_xvl(files/f'{year}.pth', text_heads=4, **HEADS, **changes)


def with_draws(method, draws):
    "Let a method choose the negatives that the original drew."
    draw = RejectionDraws(draws=draws.tolist())
    def choose(scores, f, batch, state):
        n = len(f['report'])
        refused = likeness(f['report'], f['report']) >= method.config.likeness_limit
        return draw(scores['t2i'][:, :n], refused), draw(scores['i2t'][:, :n], refused)
    method.choose_negatives = choose
    return draw


def tokens(ids, mask): return {'input_ids': ids.long()[:, None], 'attention_mask': mask.long()[:, None]}


# ------------------------------------------------------------------------------------------------ the 2023 step

def batch_2023(z):
    meta = json.loads(golden('xvl/head_pretrain_meta.json').read_text())
    ids, mask = z['text_input_ids'], z['text_attention_mask']
    sentence = torch.zeros_like(ids)
    for row, report in zip(sentence, meta['split_sentences']):
        numbers = [i for i, s in enumerate(report, 1) for _ in s.split()]
        row[1:1 + len(numbers)] = torch.tensor(numbers)
    return {'images': z['image'][:, None] * 255, 'augmented': [z['image'][:, None] * 255, z['image_aug'][:, None] * 255], 'sample_id': list('abcd'),
            'tokens': {**tokens(ids, mask), 'sentence': sentence[:, None]}, 'masked': tokens(z['input_ids'], mask), 'word_labels': z['labels'].long()[:, None]}


@pytest.fixture(scope='module')
def z(): return arrays('head_pretrain_forward.npz')


@pytest.fixture(scope='module')
def step23(files, z):
    "The method after its teacher followed once (the original does so before the teacher looks), features and losses."
    method = opened(files, '2023', distil_axis='sequence').method
    momentum_update(method.teacher, method.student, method.config.momentum)
    draw = with_draws(method, z['neg_draws'])
    features = method.encode(batch_2023(z))
    losses = method.losses(features, batch_2023(z), LATE)
    assert not list(draw.draws)
    return method, features, losses


def test_2023_the_whole_step(step23, z):
    method, f, out = step23
    for ours, theirs in dict(image='image_feat', text='text_feat', image_tokens='image_embeds', image_teacher='image_feat_m', text_teacher='text_feat_m',
                             report='text_sim_m').items(): close(f[ours].detach(), z[theirs])
    close(f['sentences'][:, :3], z['text_feat_m_l'])
    assert torch.equal(f['real'][:, :3].bool(), z['text_attention_mask_l_all'].bool()) and not f['real'][:, 3:].any()
    for ours, theirs in dict(i2t='loss_i2t', t2i='loss_t2i', i2i='loss_i2i', t2t='loss_t2t', sentences='loss_t2i_inMod_l', itc='loss_ita', itm='loss_itm', mlm='loss_mlm',
                             loss='total_loss').items(): close(out[ours].detach(), z[theirs])
    assert out['alpha'].item() == pytest.approx(z['alpha'].item())


def test_2023_the_default_distils_over_words(step23, z):
    method, f, _ = step23
    method.config.distil_axis = 'vocab'
    try: assert method.word_loss(f, LATE, .4)['mlm'].item() == pytest.approx(4.6039934, rel=1e-5)
    finally: method.config.distil_axis = 'sequence'


def test_2023_after_the_step(files, z):
    method = opened(files, '2023').method
    method.after_step({k: v for k, v in dict(image_teacher=z['image_feat_m'], text_teacher=z['text_feat_m'], report=z['text_sim_m']).items()}, {}, LATE)
    close(method.image_queue.rows.T, z['image_queue_after'])
    close(method.text_queue.rows.T, z['text_queue_after'])
    assert method.image_queue.pointer.item() == z['queue_ptr_after'].item()
    after, state = arrays('head_ema_after.npz'), xvl_state(method, first=2)
    for name, value in after.items(): close(state[name], value)


def test_2023_every_weight_that_learns_gets_a_gradient(step23):
    method, _, out = step23
    out['loss'].backward(retain_graph=True)
    assert not [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not any(p.grad is not None for p in method.teacher.parameters())


# ------------------------------------------------------------------------------------------------ the 2022 step

@pytest.fixture(scope='module')
def step22(files):
    z = arrays('v2022_pretrain_forward.npz')
    method = opened(files, '2022', distil_axis='sequence', late_twin=True, prototypes=24).method
    momentum_update(method.teacher, method.student, method.config.momentum) # `late` stays as the file has it
    method.centre.value.copy_(z['center_before'][0]), method.patch_centre.value.copy_(z['center2_before'][0, 0])
    ids, mask = z['text_input_ids'], z['text_attention_mask']
    batch = {'augmented': [z[f'image_{i}'][:, None] * 255 for i in range(4)], 'hidden': [z[f'mask_{i}'].bool() for i in (0, 1)], 'sample_id': list('abc'),
             'tokens': {**tokens(ids, mask), 'sentence': torch.zeros_like(ids)[:, None]}, 'masked': tokens(z['input_ids'], mask), 'word_labels': z['labels'].long()[:, None]}
    draw, features = with_draws(method, z['neg_draws']), method.encode(batch)
    losses = method.losses(features, batch, LATE)
    assert not list(draw.draws)
    return method, features, losses, z, batch


def test_2022_the_whole_step(step22):
    method, f, out, z, _ = step22
    for ours, theirs in dict(image='image_feat', text='text_feat', image_teacher='image_feat_m', text_teacher='text_feat_m').items(): close(f[ours].detach(), z[theirs])
    by_version = lambda x: x.transpose(0, 1).flatten(0, 1).detach()
    for ours, theirs in dict(class_student='student_output_cls', patch_student='student_output_patch', class_teacher='teacher_output_cls', patch_teacher='teacher_output_patch',
                             class_local='student_local_cls_').items(): close(by_version(f[ours]), z[theirs])
    for ours, theirs in dict(i2t='loss_i2t', t2i='loss_t2i', i2i='loss_i2i', t2t='loss_t2t', itc='loss_ita', itm='loss_itm', mlm='loss_mlm', ibot='loss_ibot',
                             ibot_class='ibot_cls_loss', ibot_patch='ibot_patch_loss').items(): close(out[ours].detach(), z[theirs])
    meta = json.loads(golden('xvl/v2022_pretrain_meta.json').read_text())
    assert out['loss'].item() == pytest.approx(sum(meta['losses']), rel=1e-4)


def test_2022_centres_and_the_late_twin(step22):
    method, f, _, z, batch = step22
    ahead = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.after_step({k: v.detach() for k, v in f.items()}, batch, LATE)
    close(method.centre.value, z['center_after'].flatten())
    close(method.patch_centre.value, z['center2_after'].flatten())
    assert all(torch.equal(v, ahead[k]) for k, v in method.late.state_dict().items())
    assert any(not torch.equal(v, ahead[k]) for k, v in method.teacher.state_dict().items())


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize('year', ['2023', '2022'])
def test_files_open_strictly_and_are_written_again(files, year, tmp_path):
    one = opened(files, year)
    stored = torch.load(files/f'{year}.pth')['model']
    assert one.variant == year and len(one.used) + len(one.dead) == len(stored) and f'{len(one.dead)} dead' in str(one)
    assert all('position_ids' in k for k in one.dead) if year == '2022' else any('fusion_encoder.bert.encoder.layer.1.' in k for k in one.dead)
    path = export_xvl(one.method, tmp_path/'again.pth', 2, one.dead)
    again = torch.load(path)['model']
    assert again.keys() == stored.keys()
    for k, v in stored.items(): torch.testing.assert_close(again[k], v, rtol=0, atol=0, check_dtype=False)
    if year == '2023': assert export_xvl(one.method, tmp_path/'bare.pth', 2) and torch.load(tmp_path/'bare.pth')['model'].keys() == stored.keys()


def test_files_that_do_not_fit_are_refused(files):
    with pytest.raises(DataError, match='X-VL 2022, not 2023'): opened(files, '2022', variant='2023')
    with pytest.raises(ValueError, match='variant'): opened(files, '2022', variant='2021')
    stored = torch.load(files/'2023.pth')['model']
    with pytest.raises(DataError, match='other_head'): open_xvl({**stored, 'other_head.weight': torch.zeros(2)}, text_heads=4, **HEADS)
    with pytest.raises(DataError, match='do not fit'): open_xvl({k: v for k, v in stored.items() if k != 'vision_proj.bias'}, text_heads=4, **HEADS)
    with pytest.raises(DataError, match='no checkpoint of X-VL'): file_variant({'layer': 0})


# ------------------------------------------------------------------------------------------------ in training

@pytest.fixture(scope='module')
def chest(tmp_path_factory): return new_phantom('chest', tmp_path_factory.mktemp('chest'), 36, (64, 64))


SMOKES = ('smoke', 'smoke-2022')


def made(chest, name='smoke', part='train', **changes):
    "The method of a recipe, its samples and its augmentation."
    r = recipe('xvl', name)
    method = new_method('xvl', name, list(chest.manifest.report), **changes)
    data = new_samples(r.samples, Parts(splits_of(chest, needed=('train', 'valid'))), part, method.tokenizer, r.sample_options, part == 'train')
    return method, data, new_augment(r.augment, r.augment_options, r.versions)


def a_batch(chest, name='smoke', n=6, **changes):
    method, data, augment = made(chest, name, **changes)
    return method, augment(data.collate([data[0, i] for i in range(n)]), 0, 0)


def doubled(batch): return {**batch, 'augmented': [v.double() for v in batch['augmented']]}


@pytest.mark.parametrize('name', SMOKES)
def test_chunks_give_the_gradient_of_the_whole(chest, name):
    method, batch = a_batch(chest, name)
    assert check_batch(batch) is batch
    method, batch = quiet(method.double()), doubled(batch)
    found = []
    for size in (None, 2, 4):
        method.zero_grad()
        out = backward_batch(method, batch, LATE, size)
        found.append((gradients(method), {k: v.item() for k, v in out.losses.items()}))
    for grads, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-9) and grads.keys() == found[0][0].keys()
        for k, g in grads.items(): torch.testing.assert_close(g, found[0][0][k], rtol=1e-7, atol=1e-10)


def one_of_several(name, state, batch, tokenizer, negatives):
    method = quiet(new_method('xvl', name, tokenizer=tokenizer, negatives=negatives).double())
    method.load_state_dict(state)
    exchange = exchange_of()
    n = 6 // exchange.world
    mine = slice_batch(batch, exchange.rank * n, (exchange.rank + 1) * n)
    out = backward_batch(method, mine, LATE, exchange=exchange)
    average_gradients(method.parameters())
    method.after_step(out.features, out.batch, LATE)
    return gradients(method), out.losses, {k: v for k, v in method.state_dict().items() if 'queue' in k or 'centre' in k}


@pytest.mark.parametrize('name', SMOKES)
@pytest.mark.parametrize('negatives', ['masked', 'random'])
def test_two_processes_are_one(chest, name, negatives):
    "Gradients of every weight, queues and centres; each judges its own rows, and negatives may come from the other process."
    method, batch = a_batch(chest, name)
    args = name, method.double().state_dict(), doubled(batch), method.tokenizer, negatives
    grads, losses, kept = one_of_several(*args)
    both = launch(one_of_several, *args)
    for two, _, other in both:
        assert two.keys() == grads.keys()
        for k, g in grads.items(): torch.testing.assert_close(two[k], g, rtol=1e-6, atol=1e-9, msg=k)
        for k, v in kept.items(): torch.testing.assert_close(other[k], v, rtol=1e-9, atol=1e-12, msg=k)
    for k in ('loss', 'itc', 'itm', 'mlm'): assert (both[0][1][k] + both[1][1][k]).item() / 2 == pytest.approx(losses[k].item(), rel=1e-9), k


class Died(Exception): pass


def fitted(folder, chest, name, stop=None, **changes):
    from medvl.train.loop import train
    method, data, augment = made(chest, name)
    valid = WithVersions(made(chest, name, 'valid')[1], augment, 0)
    def dies(m, state):
        if state.step >= stop: raise Died
        return {}
    r = recipe('xvl', name)
    config = settings(**{**{k: v for k, v in r.train.items() if k not in ('precision',)}, 'epochs': 3, 'valid_every': 2, 'save_every': 1, 'accumulate': 1, 'chunk_size': None, 'ema': 0.,
                         'warmup': 0, **changes})
    train(method, data, config, folder, valid, augment, dies if stop else None)
    return method


@pytest.mark.parametrize('name', SMOKES)
def test_a_killed_run_goes_on_to_the_same_numbers(chest, name, tmp_path):
    "Weights, twins, queues, pointers and centres, and every logged loss."
    whole = fitted(tmp_path/'whole', chest, name)
    with pytest.raises(Died): fitted(tmp_path/'cut', chest, name, stop=4)
    again = fitted(tmp_path/'cut', chest, name)
    state = whole.state_dict()
    assert {k.split('.')[0] for k in state} >= {'teacher', 'image_queue', 'text_queue', 'group_queue'}
    for k, v in again.state_dict().items(): assert torch.equal(v, state[k]), k
    losses = [{r['step']: r['loss'] for r in contents(tmp_path/f)[1] if r['kind'] == 'train'} for f in ('whole', 'cut')]
    assert losses[0] == losses[1] and len(losses[0]) > 6
    for r in contents(tmp_path/'whole')[1]: # meters of collapse, of vectors and of what waits in the queues
        if r['kind'] == 'train': assert 0 < r['spread'] < 1.5 and 0 < r['queue_spread'] < 1.5


def test_what_is_drawn_depends_on_seed_and_step_alone(chest):
    method, batch = a_batch(chest, likeness_limit=2.)
    method.train()
    with torch.no_grad(): f = method.encode(batch)
    losses = lambda state: {k: v.item() for k, v in method.losses(f, batch, state).items() if k == 'alpha'}
    draws = lambda **state: torch.stack(method.choose_negatives({k: torch.zeros(6, 54) for k in ('t2i', 'i2t')}, f, batch, StepState(**state)))
    assert torch.equal(draws(seed=1, step=2), draws(seed=1, step=2, rank=1)) and not torch.equal(draws(seed=1, step=2), draws(seed=1, step=3))
    assert (draws() != torch.arange(6)).all()
    assert [losses(StepState(step=s, epoch_steps=4))['alpha'] for s in (0, 2, 4, 9)] == pytest.approx([0, .2, .4, .4])


# ------------------------------------------------------------------------------------------------ asked and saved

@pytest.fixture(scope='module', params=SMOKES)
def asked(chest, request):
    method, batch = a_batch(chest, request.param)
    return method.eval().requires_grad_(False), batch


def test_signatures_and_what_is_offered(asked):
    method, _ = asked
    wanted = {'encode_image', 'encode_text', 'project_image', 'project_text', 'image_features', 'feature_maps', 'read_images', 'read_texts', 'image_vectors', 'text_vectors',
              'match', 'attention_maps'}
    assert capability_problems(method) == [] and wanted <= set(capabilities(method)) <= set(CAPABILITIES)


def test_match_is_each_pair_alone(asked, chest):
    method, batch = asked
    read, texts = method.read_images(batch['images']), method.read_texts(batch['tokens'])
    whole = method.match(read, texts, pairs=7)
    alone = method.match(method.read_images(batch['images'][4:5]), method.read_texts([batch['sentences'][2]]))
    torch.testing.assert_close(whole[4, 2], alone[0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.match(read, texts, 'probability'), whole.sigmoid())
    logits = method.judged(texts['states'], texts['words'], read['tokens'])
    torch.testing.assert_close(method.match(read, texts, 'logit').diagonal(), sum(z[:, 1] for z in logits) / len(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.encode_text([batch['sentences'][1]])[0], method.text_vectors(texts)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.encode_image(batch['images']), method.image_vectors(read), rtol=1e-4, atol=1e-5)


def test_views_are_averaged_and_missing_ones_left_out(asked):
    method, batch = asked
    two = torch.cat([batch['images'][:2], batch['images'][2:4]], 1)
    present = torch.tensor([[True, True], [True, False]])
    spoilt = torch.where(present[:, :, None, None, None], two.float(), 1e9)
    torch.testing.assert_close(method.encode_image(spoilt, present)[1], method.encode_image(batch['images'][1:2])[0], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(method.encode_image(spoilt, present)).all()


def test_maps_of_words_and_sentences(asked):
    "Attention sums to 1 for what is there; the right sign of Grad-CAM and the original's part what raises the score from what lowers it; nothing stays hooked."
    method, batch = asked
    images, texts = batch['images'][:2], batch['sentences'][:2]
    maps, real = method.attention_maps(images, texts)
    assert real.sum(1).tolist() == [len(t) for t in texts] and maps.shape[2:] == (4, 4)
    torch.testing.assert_close(maps.sum((2, 3)), real.float())
    words, there = method.attention_maps(images, texts, over='words')
    assert there.sum(1).tolist() == [int(m) - 1 for m in method.read_texts(texts)['words'].sum(1)] and words.shape[:2] == there.shape
    found = {how: method.attention_maps(images, texts, how=how)[0] for how in ('gradcam', 'reference')}
    assert all((m >= 0).all() and m.any() for m in found.values()) and not torch.allclose(*found.values())
    assert not any(p.grad is not None for p in method.parameters())
    assert not any(l.cross.probe for l in method.reader.fuser.layers if l.cross is not None)
    with pytest.raises(ValueError, match='kind of map'): method.attention_maps(images, texts, how='saliency')
    with pytest.raises(ValueError, match='only .CLS. is judged'): method.attention_maps(images, texts, how='gradcam', layer=1)
    with pytest.raises(ValueError, match='one text an image'): method.attention_maps(images, texts[:1])


def test_gradcam_of_the_original():
    z = arrays('gradcam.npz')
    got = weigh_attention(z['attn'], z['attn_grad'])
    close(got[0].unflatten(-1, (4, 4)), z['gradcam'])
    right = weigh_attention(z['attn'], z['attn_grad'], -1) # the gradient is of a loss
    assert torch.equal((right > 0) & (got > 0), torch.zeros_like(got, dtype=torch.bool)) or (right - got).abs().max() > 0


def test_saved_without_twins_and_queues(asked, tmp_path):
    from safetensors import safe_open
    method, batch = asked
    folder = save_pretrained(method, tmp_path/'m')
    with safe_open(str(folder/'model.safetensors'), 'pt') as f: names = list(f.keys())
    assert names and not [n for n in names if n.startswith(method.unsaved)]
    again = from_pretrained(folder)
    torch.testing.assert_close(again.match(again.read_images(batch['images']), again.read_texts(batch['tokens'])),
                               method.match(method.read_images(batch['images']), method.read_texts(batch['tokens'])))
    for k, v in again.student.state_dict().items(): assert torch.equal(v, again.teacher.state_dict()[k])


# ------------------------------------------------------------------------------------------------ bad input

def test_bad_input(chest):
    method, batch = a_batch(chest)
    method.train()
    with pytest.raises(DataError, match='images without a report: .+'): method({k: v for k, v in batch.items() if k != 'tokens'})
    with pytest.raises(DataError, match='without words'): method.encode_text([''])
    long = {k: torch.cat([v] * 3, -1) for k, v in batch['tokens'].items()}
    with pytest.raises(ValueError, match='120 tokens, but this model reads 64'): method({**batch, 'tokens': long})
    with pytest.raises(ValueError, match='captions'): method({k: v for k, v in batch.items() if k != 'masked'})
    with pytest.raises(ValueError, match='one text a sample'): method({**batch, 'tokens': {k: torch.cat([v] * 2, 1) for k, v in batch['tokens'].items()}})
    with pytest.raises(ValueError, match='sentence'): method({**batch, 'tokens': {k: v for k, v in batch['tokens'].items() if k != 'sentence'}})
    with pytest.raises(ValueError, match='at least two'): method(slice_batch(batch, 0, 1))
    with pytest.raises(ValueError, match='a queue of 50 rows'): a_batch(chest, queue=50)[0].train()(batch)
    empty = {**batch['tokens'], 'sentence': torch.zeros_like(batch['tokens']['sentence'])}
    with pytest.raises(DataError, match='without sentences'): method({**batch, 'tokens': empty})
    larger = build_wordpiece([f'word{i} ' * 2 for i in range(2000)], 1500)
    with pytest.raises(ValueError, match='tokens, the text encoder'): XVL(method.config, larger)
    with pytest.raises(ValueError, match='no patches'): new_method('xvl', 'smoke-2022', ['a b'], image_encoder='resnet-tiny')
    with pytest.raises(ValueError, match='cannot enter a network of width 64'): new_method('xvl', 'smoke-2022', ['a b'], text_width=64)


def test_a_batch_whose_reports_are_all_alike(chest):
    "Nothing is left to draw: the least alike is taken, the loss stays finite; without a fallback to likeness any stranger."
    for fallback in ('least_alike', 'unfiltered'):
        method, batch = a_batch(chest, fallback=fallback, duplicates='negatives')
        same = {**batch, 'tokens': {k: v[:1].expand_as(v).contiguous() for k, v in batch['tokens'].items()}, 'text_group': batch['text_group'][:1].expand_as(batch['text_group']).contiguous()}
        method.train()
        f = method.encode(same)
        assert (likeness(f['report'], f['report']) > .95).all()
        out = method.losses(f, same, LATE)
        out['loss'].backward()
        assert torch.isfinite(out['loss']) and all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_nothing_is_hidden(chest):
    "A batch without a hidden word has no word loss, and a gradient all the same."
    method, batch = a_batch(chest)
    bare = {**batch, 'masked': {k: batch['tokens'][k] for k in ('input_ids', 'attention_mask')}, 'word_labels': torch.full_like(batch['word_labels'], -100)}
    out = method.train()(bare)
    assert out['mlm'] == 0
    out['loss'].backward()


def test_equal_reports_are_no_negatives_where_the_recipe_says_so(chest):
    method, batch = a_batch(chest, duplicates='positives')
    batch['text_group'][1] = batch['text_group'][0]
    own = method.same_reports(batch, slice(None))
    assert own[0, 1] and own[1, 0] and own.sum() == 8 and own.shape == (6, 54)
    method.after_step({'image_teacher': torch.zeros(6, 16), 'text_teacher': torch.zeros(6, 16), 'report': torch.zeros(6, 128)}, batch, StepState())
    assert method.same_reports(batch, slice(None)).sum() == 16
    assert a_batch(chest, duplicates='negatives')[0].group_queue is None


def test_recipes_of_the_originals_schedule():
    "The reference's rate, as the original's script executed it."
    from medvl.train.optim import lr_scale
    from medvl.train.staircase import staircase
    for name, units in (('reference', 2), ('reference-2022', 5)):
        t = recipe('xvl', name).train
        assert t['schedule'] == 'staircase' and t['warmup'] == units * 100
        for step in (0, 99, 100, 650, 700, 1500, 3000):
            assert lr_scale(step, t['epochs'] * 700, t['warmup'], t['schedule'], t['floor'], 700) == staircase(step, 700, t['epochs'], units, .1, t['floor'])


def settings_in(name, start):
    "A dict of settings that an experiment holds, read from its source."
    code = '\n'.join(''.join(c['source']) for c in json.loads((Path(__file__).parents[2]/'nbs'/'experiments'/f'{name}.ipynb').read_text())['cells'])
    text = code[code.index(start) + len(start):]
    return {k.arg: ast.literal_eval(k.value) for k in ast.parse(text[:text.index(')') + 1]).body[0].value.keywords}


def test_every_row_of_the_originals_configurations():
    "Section 5 of the specification: batch, rates, decay and epochs of each task, and its warming in epochs or in units of 100 steps."
    path = SHARED/'specs'/'xvl.md'
    if not path.exists(): pytest.skip('specification absent')
    text = path.read_text()
    rows = {r[0]: r[1:] for r in re.findall(r'^\| ([\w ]+) \| (\d+)/1 \| ([\d.e-]+)→([\d.e-]+)[^|]*\| ([.\d]+) \| (\d+)/(\d+) \|', text[text.index('## 5. Configs'):], re.M)}
    ours = {'Pretrain': recipe('xvl', 'paper').train, 'V1 Pretrain': recipe('xvl', 'paper-2022').train, 'Retrieval': recipe('xvl', 'retrieval').train,
            'Detection': recipe('error_detector', 'paper').train, 'Generation': recipe('writer', 'paper').train, 'VQA': recipe('answerer', 'paper').train,
            'Classification': settings_in('e35_finetune', "'xvl': "), 'correction': settings_in('e51_correct', "'xvl': ")}
    assert rows.keys() == ours.keys()
    for name, (batch, lr, least, decay, epochs, warm) in rows.items():
        t = ours[name]
        assert (t['batch_size'], t['epochs'], t['weight_decay']) == (int(batch), int(epochs), float(decay)), name
        assert (t['lr'], t['lr'] * t['floor']) == pytest.approx((float(lr), float(least))), name
        assert t['warmup'] == int(warm) * 100 or t['warmup'] == pytest.approx(int(warm) / int(epochs), abs=.01), name
    for name, queue in (('paper', 40960), ('paper-2022', 49152), ('retrieval-2022', 49152)):
        c = resolve(config_from_dict(XVLConfig, recipe('xvl', name).config))
        assert (c.queue, c.temperature, c.momentum, c.alpha) == (queue, .07, .995, .4), name


def test_a_run_and_a_saved_model_of_the_other_variant(chest, tmp_path):
    "A run does not go on as the other variant, and saved weights do not open as it; nothing is overwritten."
    fitted(tmp_path/'run', chest, 'smoke', epochs=1)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'run').rglob('*') if p.is_file()}
    with pytest.raises(DataError, match='variant'): fitted(tmp_path/'run', chest, 'smoke-2022', epochs=1)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path/'run').rglob('*') if p.is_file()}
    folder = save_pretrained(a_batch(chest)[0], tmp_path/'m')
    config = json.loads((folder/CONFIG).read_text())
    (folder/CONFIG).write_text(json.dumps({**config, 'config': {**config['config'], 'variant': '2022', 'image_encoder': 'vit-tiny', 'text_width': 128}}))
    with pytest.raises(DataError): from_pretrained(folder)


# ------------------------------------------------------------------------------------------------ small ones

@pytest.mark.parametrize('variant', SMOKES)
def test_what_stands_for_a_text(chest, variant):
    first, batch = a_batch(chest, variant, text_pool='cls')
    mean, _ = a_batch(chest, variant, text_pool='mean')
    mean.load_state_dict(first.state_dict())
    with torch.no_grad(): a, b = (m.eval().read_texts(['the heart is large', 'no effusion']) for m in (first, mean))
    words = b['words'][..., None].float()
    assert torch.equal(a['states'][:, 1:], b['states'][:, 1:])
    close((a['states'] * words).sum(1) / words.sum(1), b['pooled'])
    with pytest.raises(ValueError, match='stands for a text'): a_batch(chest, variant, text_pool='first')


def test_searches_come_first(chest):
    method, batch = a_batch(chest, align_epochs=2)
    def terms(epoch):
        given = {**batch, 'epoch': epoch}
        return set(method.losses(method.encode(given), given, StepState(epoch=epoch, epoch_steps=1)))
    method.train()
    early, later = terms(1), terms(2)
    assert later - early == {'itm', 'itm_accuracy', 'mlm'} and 'itc' in early
    method.eval()
    with torch.no_grad(): assert {'itm_auroc', 'mlm'} <= terms(0) # validation tells all terms from the beginning
# ------------------------------------------------------------------------------------------------ words of a report

def test_every_word_has_the_map_of_its_tokens(asked):
    "A map a word as it was typed; the mean over its tokens, whatever stands between; words that are not read have none."
    method, batch = asked
    images, texts = batch['images'][:2], ['The HEART is normal, (no effusion).  Lungs: clear!', 'No mass.']
    for how in ('attention', 'gradcam'):
        maps, words = method.word_maps(images, texts, how)
        assert [[w for w, *_ in ws] for ws in words] == [['The', 'HEART', 'is', 'normal', 'no', 'effusion', 'Lungs', 'clear'], ['No', 'mass']]
        assert all(t[a:b] == w for t, ws in zip(texts, words) for w, a, b in ws) and maps.shape[:2] == (2, 8) and not maps[1, 2:].any()
        of_tokens, text = method.token_maps(images, texts, how)
        ids = method.tokenizer.convert_ids_to_tokens(text['ids'][0])
        at = [k for k, s in enumerate(method.vocabulary.spans(texts[0])) if s == words[0][1][1:]] or [k for k, s in enumerate(method.vocabulary.spans(texts[0])) if s and s[0] >= 4 and s[1] <= 9]
        mean = of_tokens[0, at].mean(0)
        torch.testing.assert_close(maps[0, 1], mean / mean.sum() if how == 'attention' else mean, rtol=1e-4, atol=1e-8)
        assert ''.join(ids[k].removeprefix('##') for k in at) in ('heart', '[UNK]')
    long = 'The lungs are clear and nothing is seen. ' * 20 + 'Effusion.'
    assert len(method.word_maps(images[:1], [long])[1][0]) < 65


def test_hidden_words_are_filled_in_with_and_without_the_image(asked):
    "log_prob is that of the tokens, all hidden at once; the probe of every protocol runs on it."
    from medvl.evaluate.protocols.word_probe import probe_words, word_table
    method, batch = asked
    text = 'The heart is normal. No effusion.'
    read = method.read_images(batch['images'][:1])
    found = method.fill_mask(read, [(text, (4, 9))])
    tokens = method.vocabulary.cut([text])
    at = [k for k, s in enumerate(method.vocabulary.spans(text)) if s and 4 <= s[0] < 9]
    ids = tokens['input_ids'].clone()
    tokens['input_ids'][0, at] = method.tokenizer.mask_token_id
    said = method.word_logits(read, tokens)[0].log_softmax(-1)
    torch.testing.assert_close(found['log_prob'][0], sum(said[k, ids[0, k]] for k in at))
    alone = method.fill_mask(None, [(text, (4, 9))] * 2)
    assert len(alone['guess']) == 2 and alone['log_prob'][0] == alone['log_prob'][1] != found['log_prob'][0]
    lost = method.fill_mask(None, [('The lungs are clear. ' * 40, (800, 805))])
    assert lost['guess'] == [None] and lost['log_prob'].isnan().all()
    probe = probe_words(method, batch['images'][:3, 0], [text, 'The lungs are clear. ' * 40, 'No mass.'], ['a', 'b', 'c'])
    assert probe.groupby('seen').size().nunique() == 1 and (probe.row == 1).sum() < 3 * 160 and probe.guess.notna().all()
    assert len(word_table(probe, n_boot=32))


def test_words_are_grounded_and_explained(asked, chest):
    from medvl.attribute.attribute import Target, attribute
    from medvl.attribute.grounding import ground_words
    from medvl.attribute.similarity import similarity_map
    method, batch = asked
    scores = ground_words(method, chest, limit=3)
    assert {'word', 'another word', 'centre'} <= set(scores.map_of)
    for how in ('word_attention', 'word_gradcam'):
        a = attribute(method, batch['images'][0, 0, 0], Target('word', 'heart'), how, report='The heart is normal.')
        assert a.map.shape == (4, 4) and (a.map >= 0).all() and a.map.any()
    with pytest.raises(ValueError, match='no word of this report'): attribute(method, batch['images'][0, 0, 0], Target('word', 'lung'), 'word_attention', report='No mass.')
    with pytest.raises(ValueError, match='lies behind'): attribute(method, batch['images'][0, 0, 0], Target('word', 'last'), 'word_attention', report='The heart is normal. ' * 40 + 'Last.')
    by_gradient = attribute(method, batch['images'][0, 0, 0], 'the heart is large', 'gradcam')
    assert by_gradient.map.abs().max() > 0 and by_gradient.map.ndim == 2
    cells = similarity_map(method, batch['images'][:2, 0], 'the heart is large')
    torch.testing.assert_close(cells, (torch.nn.functional.normalize(method.project_image(method.read_images(batch['images'][:2])['regions']), dim=-1)
                                       @ torch.nn.functional.normalize(method.project_text(['the heart is large'])[0], dim=0)).unflatten(1, (4, 4)))


# ------------------------------------------------------------------------------------------------ fine-tuning for retrieval

def test_a_trained_model_goes_on_for_retrieval(chest, tmp_path):
    "Weights and vocabulary stay, the losses are those of the recipe, twins and queues begin anew, and weights are kept by recall on validation patients."
    from medvl.core.config import config_from_dict
    from medvl.evaluate.protocols.match_retrieval import retrieval_validation
    from medvl.methods.recipes import continued
    from medvl.train.loop import train
    from medvl.train.settings import TrainConfig
    for name, tuned in (('smoke', 'retrieval'), ('smoke-2022', 'retrieval-2022')):
        method, data, augment = made(chest, name)
        named = recipe('xvl', tuned)
        method.image_queue.rows.fill_(.5)
        other = continued(method, **{k: named.config[k] for k in named.tuned})
        assert other.config.mlm_weight == 0 and other.config.duplicates == 'positives' and other.config.in_modal == 'none' and other.group_queue is not None
        for k, v in method.student.state_dict().items(): assert torch.equal(v, other.student.state_dict()[k]), k
        assert other.tokenizer.get_vocab() == method.tokenizer.get_vocab() and not torch.equal(other.image_queue.rows, method.image_queue.rows)
    other = continued(made(chest)[0], **{k: recipe('xvl', 'retrieval').config[k] for k in recipe('xvl', 'retrieval').tuned})
    settings_ = config_from_dict(TrainConfig, {**recipe('xvl', 'retrieval').train, 'batch_size': 6, 'epochs': 2, 'warmup': 1, 'valid_samples': 6, 'precision': 'fp32', 'lr': 1e-3})
    data, augment = made(chest)[1:]
    valid = splits_of(chest, needed=('train', 'valid'))
    judge = retrieval_validation(valid['valid'])
    result = train(other.train(), data, settings_, tmp_path/'run', valid=None, transform=augment, validate=judge)
    best = from_pretrained(result.best)
    assert result.best_value == pytest.approx(judge(best, None)['valid_recall']) and 0 <= result.best_value <= 1
    with pytest.raises(ValueError, match='no_such'): continued(other, no_such=1)
