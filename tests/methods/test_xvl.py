"""X-VL, both variants: whole steps as the originals', files, two processes, capabilities, bad input."""
import json

import numpy as np
import pytest
import torch
from golden import golden

from medvl.core.errors import DataError
from medvl.losses.itm import RejectionDraws, likeness
from medvl.methods.base import StepState
from medvl.methods.released.xvl_files import export_xvl, file_variant, open_xvl, xvl_state
from medvl.methods.xvl import XVL, XVLConfig, weigh_attention
from medvl.models.momentum import follow

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
    follow(method.teacher, method.student, method.config.momentum)
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
    follow(method.teacher, method.student, method.config.momentum) # `late` stays as the file has it
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
    before, ahead = method.late.state_dict(), {k: v.clone() for k, v in method.teacher.state_dict().items()}
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
