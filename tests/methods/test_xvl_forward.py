"""One step of each X-VL, composed of our networks and losses, against every intermediate that the originals left."""
import pytest
import torch
import torch.nn.functional as F
from xvl_released import BUFFERS, NAMES_2022, NAMES_2023, arrays, fill, parts_2022, parts_2023, queues, recorded, settings

from medvl.losses.ibot import ibot_loss, teacher_temperature
from medvl.losses.itc import itc_loss
from medvl.losses.itm import itm_loss, likeness, matching_pairs
from medvl.losses.sentence_search import group_rows, sentence_loss
from medvl.losses.words import mlm_loss
from medvl.models.ibot_head import Centre
from medvl.models.momentum import momentum_update

close = lambda a, b: torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)
unit = lambda x: F.normalize(x, dim=-1)


def both(make, names, weights, first=0):
    student, teacher = make(), make().requires_grad_(False)
    used = fill(student, names, weights, first=first) | fill(teacher, names, weights, True, first)
    return student, teacher, used


def after_ema(student, teacher):
    for part in teacher:
        if not part.startswith('matching'): momentum_update(teacher[part], student[part], .995)


# -- 2023 ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def w(): return arrays('head_pretrain_weights_before.npz')


@pytest.fixture(scope='module')
def z(): return arrays('head_pretrain_forward.npz')


@pytest.fixture(scope='module')
def step(w):
    "Student, and the teacher after its step (the original moves it before the teacher pass)."
    student, teacher, used = both(parts_2023, NAMES_2023, w, first=2)
    after_ema(student, teacher)
    return student, teacher, used


def test_every_name_of_a_2023_file_is_used_or_known_to_be_dead(w, step):
    dead = {k for k in w if k not in step[2]} - {*BUFFERS}
    lived = [k for k in dead if not k.endswith('position_ids') and not (
        'fusion_encoder' in k and ('.bert.embeddings.' in k and 'word_embeddings' not in k or '.layer.0.' in k or '.layer.1.' in k))
        and not ('text_encoder' in k and '.cls.' in k)]
    assert not lived and len(step[2]) + len(dead) + len(BUFFERS) == len(w) == 388


@torch.no_grad()
def test_momentum_teacher_follows(step):
    after, teacher = arrays('head_ema_after.npz'), step[1]
    ours = {'visual_encoder_m.cls_token': teacher['image'].cls_token, 'vision_proj_m.weight': teacher['image_projection'].weight,
            'text_encoder_m.bert.embeddings.word_embeddings.weight': teacher['text'].text_encoder.embeddings.word_embeddings.weight,
            'fusion_encoder_m.bert.embeddings.word_embeddings.weight': teacher['fusion'].words.weight, 'text_proj_m.weight': teacher['text_projection'].weight}
    assert {*ours} == {*after}
    for name, value in after.items(): close(ours[name], value)


def features_2023(step, z):
    s, t, _ = step
    ids, mask = z['text_input_ids'], z['text_attention_mask']
    out = dict(image=s['image'].tokens(z['image_aug']), text=s['text'].tokens(ids, mask), mask=mask)
    with torch.no_grad(): out |= dict(image_m=t['image'].tokens(z['image']), text_m=t['text'].tokens(ids, mask))
    for side in ('image', 'text'):
        out[f'{side}_z'] = unit(s[f'{side}_projection'](out[side][:, 0]))
        out[f'{side}_z_m'] = unit(t[f'{side}_projection'](out[f'{side}_m'][:, 0]))
    return out


@torch.no_grad()
def test_2023_features_and_contrast(step, z, w):
    f = features_2023(step, z)
    for ours, theirs in (('image', 'image_embeds'), ('text', 'text_embeds'), ('image_m', 'image_embeds_m'), ('image_z', 'image_feat'), ('text_z', 'text_feat'),
                         ('image_z_m', 'image_feat_m'), ('text_z_m', 'text_feat_m')): close(f[ours], z[theirs])
    close(f['text_m'][:, 0], z['text_sim_m'])
    images, texts = queues(w)
    close(images.rows.T, z['image_queue_before'])
    losses, scores = itc_loss(f['image_z'], f['text_z'], f['image_z_m'], f['text_z_m'], images.rows, texts.rows, z['temp'], z['alpha'].item(), 'hard')
    for name, value in losses.items(): close(value, z[f'loss_{name}'])
    for name, value in scores.items(): close(value, z[f'sim_{name}'])
    images.enqueue(f['image_z_m']), texts.enqueue(f['text_z_m'])
    close(images.rows.T, z['image_queue_after'])
    close(texts.rows.T, z['text_queue_after'])
    assert images.pointer.item() == z['queue_ptr_after'].item()


@torch.no_grad()
def test_2023_sentences_batched_are_those_encoded_one_by_one(step, z):
    "Every sentence of the batch in one pass, padded to the longest."
    teacher, meta = step[1], settings('head_pretrain_meta.json')
    sentences = [[2, *(int(word[1:]) for word in s.split()), 3] for report in meta['split_sentences'] for s in report]
    width = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sentences])
    rows = unit(teacher['text_projection'](teacher['text'](ids, (ids > 0).long())))
    one_by_one = torch.cat([unit(teacher['text_projection'](teacher['text'](torch.tensor([s]), torch.ones(1, len(s), dtype=torch.long)))) for s in sentences])
    torch.testing.assert_close(rows, one_by_one, rtol=1e-5, atol=1e-5)
    grouped, real = group_rows(rows, [len(r) for r in meta['split_sentences']])
    close(grouped, z['text_feat_m_l'])
    assert torch.equal(real, z['text_attention_mask_l_all'].bool())
    close(sentence_loss(z['image_feat'], grouped, real, z['temp']), z['loss_t2i_inMod_l'])


@torch.no_grad()
def test_2023_matching(step, z):
    s, f = step[0], features_2023(step, z)
    refused = likeness(f['text_m'][:, 0], f['text_m'][:, 0]) >= .95
    draw = recorded(z['neg_draws'])
    pairs = matching_pairs(draw(z['sim_t2i'][:, :4], refused), draw(z['sim_i2t'][:, :4], refused))
    assert not list(draw.draws) # all ten draws were used, the two refused ones among them
    texts, images, labels = pairs
    close(f['text'][texts[8:]], z['text_embeds_neg'])
    close(f['image'][images[4:8]], z['image_embeds_neg'])
    fused = s['fusion'](states=f['text'][texts], mask=f['mask'][texts], context=f['image'][images])[:, 0]
    close(fused, z['vl_embeddings'])
    logits = s['matching'](fused)
    close(logits, z['vl_output'])
    assert torch.equal(labels, z['itm_labels'])
    close(itm_loss(logits, labels)[0], z['loss_itm'])


@torch.no_grad()
def test_2023_masked_words(step, z):
    s, t, _ = step
    f, logits = features_2023(step, z), []
    for side, image in ((s, f['image']), (t, f['image_m'])):
        states = side['text'].tokens(z['input_ids'], f['mask'])
        logits.append(side['fusion'].logits(side['fusion'](states=states, mask=f['mask'], context=image)))
    close(logits[0], z['mlm_logits'])
    close(logits[1], z['logits_m'])
    alpha = z['alpha'].item()
    close(mlm_loss(logits[0], z['labels'], logits[1], alpha, 'sequence'), z['loss_mlm'])
    assert mlm_loss(logits[0], z['labels'], logits[1], alpha).item() == pytest.approx(4.6039934, rel=1e-5) # the README's corrected number


def test_2023_whole_step_and_its_gradient(step, z, w):
    "Sum of the losses as the original weighs them, and every student's weight that lives gets a gradient."
    student, teacher, _ = step
    student.zero_grad()
    f = features_2023(step, z)
    images, texts = queues(w)
    itc, scores = itc_loss(f['image_z'], f['text_z'], f['image_z_m'], f['text_z_m'], images.rows, texts.rows, z['temp'], .4, 'hard')
    itc['sentences'] = sentence_loss(f['image_z'], z['text_feat_m_l'], z['text_attention_mask_l_all'], z['temp'])
    ita = sum(itc.values()) / 5
    close(ita.detach(), z['loss_ita'])
    draw, refused = recorded(z['neg_draws']), likeness(f['text_m'][:, 0], f['text_m'][:, 0]) >= .95
    at, ai, labels = matching_pairs(draw(scores['t2i'][:, :4], refused), draw(scores['i2t'][:, :4], refused))
    itm = itm_loss(student['matching'](student['fusion'](states=f['text'][at], mask=f['mask'][at], context=f['image'][ai])[:, 0]), labels)[0]
    logits = student['fusion'].logits(student['fusion'](states=student['text'].tokens(z['input_ids'], f['mask']), mask=f['mask'], context=f['image']))
    total = mlm_loss(logits, z['labels'], z['logits_m'], .4, 'sequence') + ita + 2 * itm
    close(total.detach(), z['total_loss'])
    assert settings('head_pretrain_meta.json')['losses']['ita'] == pytest.approx(ita.item(), rel=1e-4)
    total.backward()
    without = [n for n, p in student.named_parameters() if p.grad is None]
    assert not without and not any(p.grad is not None for p in teacher.parameters())


# -- 2022 ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def w22(): return arrays('v2022_pretrain_weights_before.npz')


@pytest.fixture(scope='module')
def z22(): return arrays('v2022_pretrain_forward.npz')


@pytest.fixture(scope='module')
def step22(w22):
    "Student, the teacher as it was (its image and text tokens are one step behind), the teacher after its step."
    student, before, used = both(parts_2022, NAMES_2022, w22)
    _, after, _ = both(parts_2022, NAMES_2022, w22)
    after_ema(student, after)
    return student, before, after, used


def test_every_name_of_a_2022_file_is_used(w22, step22):
    assert {k for k in w22 if k not in step22[3] and not k.endswith('position_ids')} == {*BUFFERS}


def tokens_22(step, z):
    s, t, new, _ = step
    ids, att = z['text_input_ids'], z['text_attention_mask']
    f = dict(att=att, text=s['text'](ids, mask=att, mode='text'), image=torch.cat([s['image'].tokens(z[f'image_{i}'], z[f'mask_{i}'].bool()) for i in (0, 1)]))
    f |= dict(text_m=t['text'](ids, mask=att, mode='text'), image_m=torch.cat([t['image'].tokens(z[f'image_{i}']) for i in (0, 1)]))
    f['local'] = torch.cat([s['image'].tokens(z[f'image_{i}']) for i in (2, 3)])
    fused = lambda side, image, text: side['text'](states=image, context=text.repeat(2, 1, 1), context_mask=att.repeat(2, 1), mode='fusion')
    return f | dict(fused=fused(s, f['image'], f['text']), fused_m=fused(t, f['image_m'], f['text_m']))


@torch.no_grad()
def test_2022_tokens(step22, z22):
    f = tokens_22(step22, z22)
    for ours, theirs in (('text', 'text_embeds'), ('text_m', 'text_embeds_m'), ('image', 'student_raw'), ('image_m', 'teacher_raw'), ('local', 'student_local_cls'),
                         ('fused', 'student_output_'), ('fused_m', 'teacher_output_')): close(f[ours], z22[theirs])


@torch.no_grad()
def test_2022_image_term(step22, z22):
    s, t, _, _ = step22
    f, epoch, two = tokens_22(step22, z22), z22['epoch'].item(), lambda x: x.unflatten(0, (2, -1))
    heads = dict(student_output_cls=s['head'](f['image'][:, 0]), student_output_patch=s['head'](f['fused'])[1], student_local_cls_=s['head'](f['local'][:, 0]),
                 teacher_output_cls=t['head'](f['image_m'][:, 0]), teacher_output_patch=t['head'](f['fused_m'])[1])
    for name, value in heads.items(): close(value, z22[name])
    masked = torch.stack([z22['mask_0'], z22['mask_1']]).bool().flatten(-2)
    temperatures = teacher_temperature(epoch, end=.04), teacher_temperature(epoch, begin=1)
    assert temperatures == pytest.approx((z22['teacher_temp'][epoch].item(), z22['teacher_temp2'][epoch].item()))
    out = ibot_loss(two(heads['student_output_cls']), two(heads['student_output_patch']), two(heads['teacher_output_cls']), two(heads['teacher_output_patch']), masked,
                    z22['center_before'][0], z22['center2_before'][0, 0], two(heads['student_local_cls_']), temperatures)
    for ours, theirs in (('class', 'ibot_cls_loss'), ('patch', 'ibot_patch_loss'), ('loss', 'loss_ibot')): close(out[ours], z22[theirs])
    for name, key, mean in (('center', 'teacher_output_cls', (0,)), ('center2', 'teacher_output_patch', (0, 1))):
        centre = Centre(24)
        centre.value.copy_(z22[f'{name}_before'].flatten())
        centre.update(heads[key].mean(mean))
        close(centre.value, z22[f'{name}_after'].flatten())


@torch.no_grad()
def test_2022_contrast_matching_and_words(step22, z22, w22):
    s, t, new, _ = step22
    f, att, alpha = tokens_22(step22, z22), z22['text_attention_mask'], z22['alpha'].item()
    image, image_m = f['image'][:3], f['image_m'][:3] # the version of which nothing is hidden
    zs = [unit(s['image_projection'](image[:, 0])), unit(s['text_projection'](f['text'][:, 0])), unit(new['image_projection'](image_m[:, 0])),
          unit(t['text_projection'](f['text_m'][:, 0]))]
    for value, name in zip(zs, ('image_feat', 'text_feat', 'image_feat_m', 'text_feat_m')): close(value, z22[name])
    images, texts = queues(w22)
    losses, scores = itc_loss(*zs, images.rows, texts.rows, z22['temp'], alpha, 'distilled')
    for name, value in losses.items(): close(value, z22[f'loss_{name}'])
    close(sum(losses.values()) / 4, z22['loss_ita'])
    draw, none = recorded(z22['neg_draws']), torch.zeros(3, 3, dtype=torch.bool)
    at, ai, labels = matching_pairs(draw(scores['t2i'][:, :3], none), draw(scores['i2t'][:, :3], none))
    by_text = s['text'](states=f['text'][at], mask=att[at], context=image[ai], mode='fusion')[:, 0]
    by_image = s['text'](states=image[ai], context=f['text'][at], context_mask=att[at], mode='fusion')[:, 0]
    close(by_text, z22['vl_embeddings_t'])
    close(by_image, z22['vl_embeddings_v'])
    assert torch.equal(labels, z22['itm_labels'])
    both_ways = [itm_loss(s['matching_text'](by_text), labels)[0], itm_loss(s['matching_image'](by_image), labels)[0]]
    for value, name in zip([*both_ways, sum(both_ways)], ('loss_itm_t', 'loss_itm_v', 'loss_itm')): close(value, z22[name])
    logits = [side['text'].logits(side['text'](z22['input_ids'], mask=att, context=tokens)) for side, tokens in ((s, image), (new, image_m))]
    close(logits[0], z22['mlm_logits'])
    close(logits[1], z22['logits_m'])
    close(mlm_loss(logits[0], z22['labels'], logits[1], alpha, 'sequence'), z22['loss_mlm'])
    listed = settings('v2022_pretrain_meta.json')
    got = dict(mlm=mlm_loss(logits[0], z22['labels'], logits[1], alpha, 'sequence'), ita=sum(losses.values()) / 4, itm=sum(both_ways), ibot=z22['loss_ibot'])
    assert [got[k].item() for k in listed['order']] == pytest.approx(listed['losses'], rel=1e-4)
