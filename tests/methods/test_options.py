"""What the originals of LoVT and Mammo-CLIP can express beyond their published runs: each option with its shape, its gradient, its default, its golden numbers, its refusals, and saved and opened again."""
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import golden
from torch import nn

from medvl.core.config import config_from_dict
from medvl.data.text.sentences import SentenceTokens
from medvl.data.text.tokens import build_wordpiece
from medvl.losses.local import place_weights
from medvl.methods.base import StepState, from_pretrained, save_pretrained
from medvl.methods.classifier import new_classifier
from medvl.methods.convirt import ConVIRT, ConVIRTConfig
from medvl.methods.lovt import LOVT_OPTIONS, LoVT, LoVTConfig
from medvl.methods.mammoclip import MAMMOCLIP_OPTIONS, MammoCLIP, MammoCLIPConfig, released_config
from medvl.methods.parts.local_heads import LocalObjective, read_objective
from medvl.methods.segmenter import Segmenter, SegmenterConfig, segmenter_from
from medvl.models.alignment import CrossAttention
from medvl.models.checkpoints import Checkpoint
from medvl.models.pooling import AttentionPool, GeM, pool_sentences, sentence_tokens, separate_sentences
from medvl.models.projection import Projection
from medvl.models.unet import LinearHead, MLPHead, PlainUNet
from medvl.train.gradcache import backward_batch

EXACT = dict(rtol=1e-9, atol=1e-11)
SENTENCES = ['Small left effusion.', 'The heart is large.', 'No pneumothorax.', 'Right basal opacity.', 'Lines and tubes are unchanged.', 'No acute process.']
TOKENIZER = build_wordpiece(SENTENCES, size=150)
TINY = dict(image_encoder='resnet-tiny', text_encoder='tiny', dim=16, hidden=24, predictor_hidden=20)
REPORTS = [[SENTENCES[(i + k) % 6] for k in range(1 + i % 4)] for i in range(6)]
BOTH = dict(region_weight=.375, sentence_weight=.375)


def arrays(name):
    z = np.load(golden(f'lovt/{name}'))
    return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}


def close(a, b, **tol): torch.testing.assert_close(a, b, check_dtype=False, **(tol or EXACT))


def make(**changes):
    torch.manual_seed(0)
    return LoVT(LoVTConfig(**{**TINY, **changes}), TOKENIZER)


def batch_of(reports=REPORTS, dtype=torch.uint8, size=64):
    g, tokens = torch.Generator().manual_seed(3), SentenceTokens(TOKENIZER).batch(reports)
    return {'images': torch.randint(0, 256, (len(reports), 1, 1, size, size), dtype=torch.uint8, generator=g).to(dtype), 'sample_id': [f's{i}' for i in range(len(reports))],
            'tokens': {k: torch.from_numpy(v).unsqueeze(1) for k, v in tokens.items()}, 'text_group': torch.arange(len(reports)).view(-1, 1)}


def filled(module, like):
    "The same weights, where both have them."
    module.load_state_dict({**module.state_dict(), **{k: v for k, v in like.state_dict().items() if k in module.state_dict()}})
    return module


# --- LoVT: option -> (a value that changes something, fields that it needs, a value that must change nothing or None, a wrong value, what the refusal says)
LOVT = {
    'region_stage': ('conv4', {}, 'conv5', 'conv7', "Did you mean 'conv"),
    'global_stage': ('conv4', {}, ('conv5', dict(weigh_places=False)), 'conv7', "Did you mean 'conv"),
    'region_grid': ((2, 2), {}, None, (7,), 'rows and columns'),
    'join_global': (True, {}, None, None, None),
    'sentence_pool': ('attention', {}, None, 'avg', 'sentence_pool'),
    'sentence_encoding': ('independent', {}, None, 'alone', 'sentence_encoding'),
    'text_places': ('tokens', {}, None, 'words', "text_places 'words'"),
    'projection_dropout': (.5, {}, None, 1., 'projection_dropout=1.0 must be in 0..1'),
    'global_objective': ('predictor', {}, None, 'predict', "Did you mean 'predictor'"),
    'predictor_hidden': (8, dict(global_objective='predictor'), None, None, None),
    'predictor_stop': (False, dict(region_objectives=('predictor',)), None, None, None),
    'learn_temperature': (True, {}, True, (True, dict(global_objective='mse')), 'no temperature'),
    'region_objectives': (('contrastive', 'mse:weight=0.5'), {}, ('contrastive:temperature=0.3,radius=0.5,decay=1,positives=spatial',), ('mse', 'msee'), "Did you mean 'mse'"),
    'sentence_objectives': (('predictor',), {}, ('contrastive', 'predictor:weight=0'), ('contrastive:radius=-1',), 'radius=-1'),
    'learn_local_temperature': (True, {}, True, None, None),
    'weights_gradient': (True, {}, True, None, None),
    'sentence_unit': ('report', dict(sentence_radius=.3), 'max_length', 'words', "sentence_unit 'words'"),
    'attention_keys': (False, {}, None, None, None),
    'attention_values': (False, {}, None, None, None),
    'attention_outputs': (False, {}, None, None, None),
    'attended_dropout': (.5, {}, None, 1., 'output_dropout of the cross-attention must be in 0..1'),
}
DROPOUTS = ('projection_dropout', 'attended_dropout')


def test_every_option_of_the_table_is_tried_and_is_off_by_default():
    assert set(LOVT) == set(LOVT_OPTIONS) <= {f.name for f in fields(LoVTConfig)}
    assert set(MAMMOCLIP_OPTIONS) <= {f.name for f in fields(MammoCLIPConfig)}


@pytest.mark.parametrize('name', list(LOVT))
def test_a_lovt_option_trains_saves_and_is_refused_by_name(tmp_path, name):
    value, more, _, wrong, told = LOVT[name]
    method, plain, batch = make(**{name: value}, **more).train(), make(**more).train(), batch_of()
    out = method(batch)
    out['loss'].backward()
    assert out['loss'].isfinite() and all(v.isfinite() for v in out.values())
    dead = [n for n, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    above = 'image_encoder.layer4.' if name == 'region_stage' else 'nothing'  # what no loss reads learns nothing
    assert not [n for n in dead if 'pooler' not in n and not n.startswith(above) and not n.endswith(('position_embeddings.weight', 'in_proj_bias'))], dead
    method.eval(), plain.eval()
    if name in DROPOUTS + ('predictor_stop', 'weights_gradient', 'learn_temperature', 'learn_local_temperature'):
        assert set(plain.state_dict()) <= set(method.state_dict())
    if name not in DROPOUTS + ('predictor_stop', 'weights_gradient', 'learn_temperature', 'learn_local_temperature', 'predictor_hidden'):
        with torch.no_grad(): assert method(batch)['loss'] != filled_loss(method, plain, batch), 'the option changes something'
    with torch.no_grad(): before = method(batch)['loss']
    again = from_pretrained(save_pretrained(method, tmp_path / 'saved'))
    with torch.no_grad(): assert again.config == replace(method.config, text_pretrained=False) and torch.equal(again(batch)['loss'], before)
    assert all(not isinstance(v, dict) for v in json.loads((tmp_path / 'saved/config.json').read_text())['config'].values()), 'flat'
    if told:
        wrong, beside = wrong if isinstance(wrong, tuple) and len(wrong) == 2 and isinstance(wrong[1], dict) else (wrong, {})
        with pytest.raises(ValueError, match=told): make(**{name: wrong}, **beside)


def filled_loss(method, plain, batch):
    "The loss of the method without the option, with the weights that it shares with the method where their shapes agree."
    own = plain.state_dict()
    plain.load_state_dict({**own, **{k: v for k, v in method.state_dict().items() if k in own and own[k].shape == v.shape}})
    return plain(batch)['loss']


@pytest.mark.parametrize('name', [n for n, v in LOVT.items() if v[2] is not None])
def test_a_lovt_option_at_its_default_value_is_the_default(name):
    "Said another way, or not yet trained, an option gives the same loss and the same gradients of what both have."
    _, _, same, _, _ = LOVT[name]
    same, more = same if isinstance(same, tuple) and len(same) == 2 and isinstance(same[1], dict) else (same, {})
    batch = batch_of(dtype=torch.float64)
    a, b = make(**more).double().train(), make(**{name: same}, **more).double().train()
    filled(b, a)
    for m in (a, b):
        torch.manual_seed(0)
        m.found = m(batch)['loss']
        m.found.backward()
    close(b.found, a.found, rtol=1e-7, atol=0)  # a learnt temperature is the exponential of a float32 logarithm
    theirs = dict(b.named_parameters())
    for n, p in a.named_parameters():
        if name == 'weights_gradient' and 'pool' in n or p.grad is None: continue
        if name == 'weights_gradient' and n.startswith(('image_encoder', 'text_encoder')): continue
        close(theirs[n].grad, p.grad, rtol=1e-5, atol=1e-8)


def test_all_options_at_once_can_be_cut_into_chunks():
    changes = dict(region_stage='conv4', global_stage='conv5', region_grid=(4, 4), join_global=True, sentence_pool='attention', sentence_encoding='independent', text_places='tokens',
                   text_over='tokens', region_objectives=('contrastive', 'predictor:l2att=0.5'), sentence_objectives=('mse', 'contrastive:temperature=0.1'), learn_temperature=True,
                   learn_local_temperature=True, weights_gradient=True, sentence_unit='report', sentence_radius=.2, attention_keys=False, symmetric=True)
    method, batch = make(**changes).double().eval(), batch_of(dtype=torch.float64)
    loss = method(batch)['loss']
    loss.backward()
    whole = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    out = backward_batch(method, batch, StepState(), 2)
    assert out.losses['loss'].item() == pytest.approx(loss.item(), abs=1e-12)
    for n, p in method.named_parameters():
        if n in whole: assert (p.grad - whole[n]).abs().max() <= 1e-10 * max(1., whole[n].abs().max()), n


def test_a_configuration_of_before_opens(tmp_path):
    method, batch = make().eval(), batch_of()
    folder = save_pretrained(method, tmp_path / 'old')
    stored = json.loads((folder / 'config.json').read_text())
    for name in LOVT_OPTIONS: stored['config'].pop(name)
    (folder / 'config.json').write_text(json.dumps(stored))
    again = from_pretrained(folder)
    with torch.no_grad(): assert torch.equal(again(batch)['loss'], method(batch)['loss'])
    assert config_from_dict(LoVTConfig, {'sentence_radius': 0}) == LoVTConfig()


# --- the image side of LoVT

def test_regions_and_image_vector_come_from_the_stages_that_are_named():
    method, images = make(region_stage='conv4', global_stage='conv3', join_global=True, image_pool='mean', weigh_places=False).eval(), batch_of()['images']
    with torch.no_grad():
        read, stages = method.read_images(images), method.image_encoder.stages(method.image_side.scaled(images))
        close(read['regions'], stages['conv4'].flatten(2).mT), close(read['pooled'], stages['conv3'].mean((2, 3)))
        assert read['grid'] == (4, 4) and read['weights'] is None
        close(method.joined(read)[:, 3], torch.cat([read['regions'][:, 3], read['pooled']], 1))
        assert method.regions(images).shape == (6, 16, 16) and method.encode_image(images).shape == (6, 16)
    assert method.region_projection.projection_before.in_features == 64 + 32
    with pytest.raises(ValueError, match='conv5'): make(region_stage='input')
    probe = make(global_stage='conv4', probe=('effusion',), weigh_places=False)
    assert probe.probe.in_features == 64


def test_positions_are_added_as_the_original_adds_them():
    method, images = make(region_grid=(2, 2)).eval(), batch_of()['images']
    with torch.no_grad():
        maps = method.feature_maps(images)
        close(method.read_images(images)['regions'], ((maps + method.region_positions) / math.sqrt(2)).flatten(2).mT, rtol=1e-6, atol=1e-7)
        with pytest.raises(ValueError, match='3×3 regions; positions were learnt for 2×2'): method.read_images(batch_of(size=96)['images'])
    with pytest.raises(ValueError, match=r'\(7, 7\)'): make(region_grid=(0, 2))


def test_convirt_promises_a_linear_map_only_where_there_is_one():
    torch.manual_seed(0)
    plain, placed = (ConVIRT(ConVIRTConfig(**{**TINY, **c}), TOKENIZER).eval() for c in ({}, dict(region_grid=(2, 2))))
    assert plain.project_image(torch.zeros(1, 4, 128)).shape == (1, 4, 16)
    with pytest.raises(ValueError, match='region_grid'): placed.project_image(torch.zeros(1, 4, 128))


# --- the text side of LoVT

def test_pools_of_sentences_by_loops():
    torch.manual_seed(0)
    hidden, sentence = torch.randn(3, 9, 16).double(), torch.tensor([[0, 1, 1, 1, 2, 2, 3, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2, 2, 0, 0]])
    attention = AttentionPool(16).double()
    ways = {'max': lambda x: x.amax(0), 'mean': lambda x: x.mean(0), 'first': lambda x: x[0], attention: lambda x: attention(x[None])[0][0]}
    for how, by_hand in ways.items():
        found, mask = pool_sentences(hidden, sentence, how=how)
        assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
        for i in range(3):
            for s in range(1, 4): close(found[i, s - 1], by_hand(hidden[i, sentence[i] == s]) if (sentence[i] == s).any() else torch.zeros(16).double())
        assert pool_sentences(hidden, sentence, 5, how)[0].shape == (3, 5, 16)
        assert pool_sentences(hidden, torch.zeros_like(sentence), how=how)[0].shape == (3, 0, 16)
    close(pool_sentences(hidden, sentence, how='mean', legacy_padded_mean=True)[0][2, 0], hidden[2, 1:3].sum(0) / 4)
    leaf = hidden.clone().requires_grad_()
    sentence_tokens(leaf, sentence)[0].sum().backward()
    assert torch.equal(leaf.grad, (sentence > 0).unsqueeze(-1).expand_as(leaf).double())
    with pytest.raises(ValueError, match='pooling of sentences'): pool_sentences(hidden, sentence, how='avg')


def test_sentences_read_alone_are_the_sentences_read_alone():
    method = make(sentence_encoding='independent', sentence_pool='first').eval()
    tokens = method.token_batch(REPORTS)
    with torch.no_grad():
        read = method.read_texts(tokens)
        for i, report in enumerate(REPORTS):
            for s, text in enumerate(report):
                ids = torch.tensor([TOKENIZER(text)['input_ids']])
                close(read['sentences'][i, s], method.text_encoder.tokens(ids, torch.ones_like(ids))[0, 0], rtol=1e-4, atol=1e-5)
        assert read['mask'].sum(1).tolist() == [len(r) for r in REPORTS]
    rows, real = separate_sentences(*(tokens[k] for k in ('input_ids', 'attention_mask', 'sentence')))
    assert rows[real.any(-1)][:, 0].unique().tolist() == [TOKENIZER.cls_token_id] and (real.sum(-1)[real.any(-1)] > 2).all()
    with torch.no_grad():
        alone, beside = (make(sentence_encoding='independent').eval().read_texts(method.token_batch(r))['sentences'][0, 0] for r in ([REPORTS[2][:1]], [REPORTS[2]]))
    close(alone, beside, rtol=1e-5, atol=1e-6)


def test_tokens_are_the_places_where_they_are_asked_for():
    method, batch = make(text_places='tokens', text_over='tokens').eval(), batch_of()
    with torch.no_grad():
        read, out = method.read_texts(batch['tokens']), method.encode(batch)
        words = (batch['tokens']['sentence'][:, 0] > 0)
        assert torch.equal(read['mask'], words) and torch.equal(out['mask'], words) and out['sentence_weights'].shape == words.shape
        maps, real = method.attention_maps(batch['images'], REPORTS)
        assert maps.shape[:2] == words.shape and torch.equal(real, words)
        close(maps.sum((2, 3)), words.float(), rtol=1e-5, atol=1e-5)
    assert make(text_places='tokens').eval().read_texts(batch['tokens'])['weights'] is None, 'the pool over sentences says nothing about tokens'


# --- objectives

def plain_config(**changes): return replace(LoVTConfig(dim=32, predictor_hidden=20, legacy_padded_norm=True), **changes)


def predictors(z, prefix, names):
    return {f'{ours}.{k[len(f"{prefix}.{theirs}."):]}': v.squeeze(-1) if v.dim() == 3 else v for theirs, ours in names.items() for k, v in z.items() if k.startswith(f'{prefix}.{theirs}.')}


def test_local_objectives_golden():
    "Contrastive, squared difference and predictor as objectives of the configuration, against the original's numbers."
    z = arrays('local_report.npz')
    positives = torch.eye(10, dtype=torch.float64)
    run = lambda text, **c: LocalObjective(read_objective(text), plain_config(**c)).double()
    give = (z['zl_b'], z['zl_a2b'], positives, z['mask'], z['weights'])
    for text, name in (('contrastive', 'default'), ('contrastive:same_modality=true', 'same_modality_negatives')):
        found = run(text)(*give)
        for k in found: close(found[k], z[f'{name}/loss_{k}'])
    for k, v in run('contrastive')(*give[:4]).items(): close(v, z[f'no_weights/loss_{k}'])
    for v in run('mse')(*give).values(): close(v, z['local_mse/loss'])
    for stop in (True, False):
        guess = run('predictor', predictor_stop=stop).train()
        guess.load_state_dict({k.replace('local_predictor/param/', ''): v for k, v in predictors({k.replace('param/', 'param.'): v for k, v in z.items()}, 'local_predictor/param',
                                                                                                 {'predictor_a': 'local_predictor', 'predictor_b': 'attended_predictor'}).items()})
        a, b = z['zl_b'].clone().requires_grad_(), z['zl_a2b'].clone().requires_grad_()
        found = guess(a, b, positives, z['mask'], z['weights'])
        for k in found: close(found[k], z[f'local_predictor/loss_{k}'])
        grads = torch.autograd.grad(found['l2att'], (a, b), allow_unused=True)
        assert (grads[1] is None) == stop, 'the target learns only where the original lets it'
    learnt = run('contrastive', learn_local_temperature=True)
    found = learnt(*give)
    close(found['l2att'], z['default/loss_l2att'], rtol=1e-6, atol=0)
    found['l2att'].backward()
    assert learnt.log_temperature.grad.abs() > 0


def test_local_image_objective_golden():
    "Radius, decay, temperature and constant as options of an objective."
    z, variants = arrays('local_image.npz'), json.loads(golden('lovt/local_image_variants.json').read_text())
    method = make(dim=32)
    texts = {'default': 'contrastive', 'no_smooth': 'contrastive:positives=uniform', 'same_modality_negatives': 'contrastive:same_modality=true', 'normalized_by_num_negatives': 'contrastive:count=49',
             'no_weights': 'contrastive'}
    assert set(texts) <= set(variants)
    for name, text in texts.items():
        o = LocalObjective(read_objective(text), method.config).double()
        found = o(z['zl_a'], z['zl_b2a'], method.local.positives((7, 7), z['zl_a'], o.objective), None, None if name == 'no_weights' else z['weights'])
        for k in found: assert abs(found[k] - z[f'{name}/loss_{k}']) < 2e-6, 'exact distances: the sixth decimal'


def test_global_objectives_golden():
    z = arrays('global_other.npz')
    features = {'image': z['zg_a'], 'text': z['zg_b']}
    make_one = lambda **c: make(dim=12, predictor_hidden=20, i2t_weight=.75, t2i_weight=.25, **c).double().train()
    mse = make_one(global_objective='mse').global_losses(features, {})
    close(mse['i2t'], z['mse_loss']), close(mse['loss'], z['mse_loss'])
    guess = make_one(global_objective='predictor')
    for ours, theirs in (('image_predictor', 'predictor_1'), ('text_predictor', 'predictor_2')):
        getattr(guess, ours).load_state_dict({k[len(f'predictor_param/{theirs}.'):]: v for k, v in z.items() if k.startswith(f'predictor_param/{theirs}.')})
    found = guess.global_losses(features, {})
    close(found['i2t'], z['predictor_loss_a2b']), close(found['t2i'], z['predictor_loss_b2a'])
    nce = make_one(learn_temperature=True, temperature=.2, same_modality=True)
    assert nce.log_temperature.item() == pytest.approx(z['nce_trainable_log_tau'].item(), rel=1e-6)
    nce.log_temperature.data = z['nce_trainable_log_tau'].clone()
    found = nce.global_losses(features, {})
    close(found['i2t'], z['nce_trainable_tau0_2_loss_a2b']), close(found['t2i'], z['nce_trainable_tau0_2_loss_b2a'])
    found['loss'].backward()
    close(nce.log_temperature.grad, z['nce_trainable_grad_log_tau'])
    assert found['temperature'].item() == pytest.approx(.2, rel=1e-6) and make().temperature == .1


def test_several_objectives_are_told_one_by_one():
    batch = batch_of()
    out = make(region_objectives=('contrastive', 'mse:weight=0.5,att2l=0', 'predictor:weight=2'), sentence_objectives=('mse',), **BOTH).train()(batch)
    want = .75 * out['i2t'] + .25 * out['t2i'] + .375 * (out['regions_0_l2att'] + out['regions_0_att2l'] + .5 * out['regions_1_l2att'] + 2 * (out['regions_2_l2att'] + out['regions_2_att2l'])
                                                         + out['sentences_l2att'] + out['sentences_att2l'])
    close(out['loss'], want, rtol=1e-5, atol=1e-6)
    assert 'regions_l2att' not in out and 'sentences_0_l2att' not in out
    assert read_objective('mse: weight = 2').weight == 2 and read_objective('contrastive:same_modality=True').same_modality is True
    for text, told in (('mse:weight', "weight=''"), ('mse:weight=x', "weight='x'"), ('contrastive:positives=near', 'positives'), ('contrastive:temperature=0', 'must be positive'),
                       ('contrastive:same_modality=2', 'wrong type'), ('contrastive:radious=1', "Did you mean 'radius'")):
        with pytest.raises(ValueError, match=told): read_objective(text)
    for bad in ((), 'contrastive'):
        with pytest.raises(ValueError, match='region_objectives='): make(region_objectives=bad)


def test_the_radius_of_sentences_in_three_units():
    mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    like, heads = torch.zeros(1), lambda **c: make(**c).local
    near = lambda **c: heads(**c).sentence_positives(mask, like) > 0
    assert torch.equal(near(sentence_radius=1), near(sentence_radius=1 / 512, sentence_unit='max_length'))
    own = near(sentence_radius=1 / 3, sentence_unit='report')
    assert own.shape == (3, 6, 6) and own[0, 0].sum() == 3 and own[1, 0].sum() == 2 and own[2, 0].sum() == 1
    z = torch.randn(3, 6, 16).double(), torch.randn(3, 6, 16).double()
    o, local = LocalObjective(read_objective('contrastive'), LoVTConfig()), heads(sentence_radius=1 / 3, sentence_unit='report')
    whole = o(*z, local.sentence_positives(mask, z[0]), mask)['l2att']
    each = [o(*(x[i:i + 1, :n] for x in z), local.sentence_positives(torch.ones(1, n, dtype=torch.bool), z[0]))['l2att'] for i, n in enumerate((6, 3, 1))]
    close(whole, torch.stack(each).mean())


def test_weights_of_places_learn_only_where_they_are_told_to():
    for on in (False, True):
        method = make(weights_gradient=on, i2t_weight=0., t2i_weight=0.).train()
        method(batch_of())['loss'].backward()
        grad = method.image_pool.attention.in_proj_weight.grad
        assert (grad is not None and grad.abs().sum() > 0) == on
    w = torch.rand(2, 3, requires_grad=True)
    assert not place_weights(w, None, torch.ones(2, 3)).requires_grad and place_weights(w, None, torch.ones(2, 3), True).requires_grad


# --- projections and attention

def test_a_projection_with_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    m, x = Projection(8, 4, 64, 'none', dropout=.5), torch.randn(5, 8)
    assert not torch.equal(m(x), m(x)) and torch.equal(m.eval()(x), m.projection_after(F.relu(m.projection_before(x))))
    many = torch.stack([m.train()(x) for _ in range(2000)]).mean(0)
    assert (many - m.eval()(x)).abs().max() < .2, 'right in the mean'
    none = Projection(8, 4, 64, 'none').train()
    state = torch.get_rng_state()
    none(x)
    assert torch.equal(torch.get_rng_state(), state), 'without dropout nothing is drawn'
    with pytest.raises(ValueError, match='0..1'): Projection(8, dropout=1.)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('kind', ['keys', 'values', 'outputs'])
def test_a_map_left_out_is_the_identity(kind, symmetric):
    torch.manual_seed(0)
    a, b, mask = torch.randn(2, 6, 8).double(), torch.randn(2, 4, 8).double(), torch.tensor([[True] * 4, [True, True, False, False]])
    without, full = CrossAttention(8, symmetric=symmetric, norm='none', **{kind: False}).double(), CrossAttention(8, symmetric=symmetric, norm='none').double()
    words = {'keys': ('key', 'query'), 'values': ('value',), 'outputs': ('output',)}[kind]
    state = full.state_dict()
    for k in state:
        if k.startswith(words): state[k] = torch.eye(8).double() if k.endswith('weight') else torch.zeros(8).double()
    full.load_state_dict({**state, **{k: v for k, v in without.state_dict().items()}})
    assert not any(k.startswith(words) for k in without.state_dict())
    for k, v in full(a, b, mask).items(): close(without(a, b, mask)[k], v)


def test_attended_vectors_drop_out_before_their_norm():
    torch.manual_seed(0)
    m, a, b = CrossAttention(16, norm='none', output_dropout=.5), torch.randn(2, 9, 16), torch.randn(2, 4, 16)
    out = m(a, b)
    assert .3 < (out['regions'] == 0).float().mean() < .7 and torch.equal(m.eval()(a, b)['regions'], m(a, b)['regions'])


# --- segmentation

BOXES = {'images': torch.randint(0, 256, (2, 1, 1, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), 'masks': torch.zeros(2, 1, 64, 96, dtype=torch.uint8), 'sample_id': ['a', 'b']}
BOXES['masks'][:, :, 10:40, 20:60] = 1
SEGMENTERS = {'mlp': dict(head='mlp', hidden=8, head_dropout=.2, head_norm=True), 'stage': dict(head='linear', stage='conv3', head_norm=True), 'unet': dict(image_encoder='unet-tiny', head='linear', stage='up4', frozen=False),
              'unet mlp': dict(image_encoder='unet-tiny', head='mlp', stage='up2', frozen=False, hidden=8)}


@pytest.mark.parametrize('name', list(SEGMENTERS))
def test_segmenter_options_train_save_and_keep_features(tmp_path, name):
    torch.manual_seed(0)
    options = {'image_encoder': 'resnet-tiny', **SEGMENTERS[name]}
    method = segmenter_from(options.pop('image_encoder'), 'disc', **options).train()
    method(BOXES)['loss'].backward()
    learns = [(n, p) for n, p in method.named_parameters() if p.requires_grad and not (name == 'unet mlp' and n.startswith(('image_encoder.ups.2', 'image_encoder.ups.3')))]
    assert learns and all(p.grad is not None and p.grad.isfinite().all() for n, p in learns)
    method.eval()
    assert method.predict(BOXES['images']).shape == (2, 1, 64, 96) and method.image_features(BOXES['images']).shape == (2, method.image_encoder.num_features)
    again = from_pretrained(save_pretrained(method, tmp_path / 'seg'))
    assert again.config == method.config and torch.equal(again.predict(BOXES['images']), method.predict(BOXES['images']))
    if method.config.frozen:
        kept = {**BOXES, 'taps': method.features(BOXES['images'])}
        with torch.no_grad(): close(method.encode(kept)['logits'], method.encode(BOXES)['logits'], rtol=1e-5, atol=1e-6)
        assert not any(p.requires_grad for p in method.image_encoder.parameters())


def test_segmenter_options_are_refused_by_name():
    base = dict(classes=('a',), image_encoder='resnet-tiny')
    for changes, told in ((dict(head='mlpp'), "Did you mean 'mlp'"), (dict(stage='conv9'), 'has no stage conv9'), (dict(head='unet', head_norm=True), 'reads all stages'), (dict(head_dropout=1.), 'head_dropout=1.0'),
                          (dict(head='mlp', hidden=0), 'hidden=0'), (dict(image_encoder='unet-tiny', head='unet'), 'no stage')):
        with pytest.raises(ValueError, match=told): Segmenter(SegmenterConfig(**{**base, **changes}))
    assert list(Segmenter(SegmenterConfig(**base)).head.state_dict()) == ['classifier.weight', 'classifier.bias'], 'the default head is stored as before'


def test_heads_by_hand():
    torch.manual_seed(0)
    maps, channels = {'conv4': torch.randn(3, 8, 4, 6).double()}, {'conv4': 8}
    m = MLPHead(channels, 2, 'conv4', norm_before=True, hidden=5).double().eval()
    x = m.norm(m.project(m.norm_before(maps['conv4']))).relu()
    close(m(maps, (8, 12)), F.interpolate(m.classifier(x), (8, 12), mode='bilinear'))
    assert m.project.bias is None and MLPHead(channels, 2, 'conv4').project.out_channels == 512
    some = LinearHead(channels, 1, 'conv4', dropout=.5).double()
    assert not torch.equal(some(maps, (4, 6)), some(maps, (4, 6))) and torch.equal(some.eval()(maps, (4, 6)), some.classifier(maps['conv4']))


def test_the_plain_unet_by_hand():
    torch.manual_seed(0)
    net = PlainUNet('unet-tiny').double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, .5, 2)
    sd, x = net.state_dict(), torch.randn(2, 1, 32, 48).double()

    def double(x, key, at):
        for conv, bn in ((at, at + 1), (at + 3, at + 4)):
            x = F.conv2d(x, sd[f'{key}.{conv}.weight'], sd[f'{key}.{conv}.bias'], padding=1)
            x = F.batch_norm(x, *(sd[f'{key}.{bn}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias'))).relu()
        return x
    seen = [double(x.expand(-1, 3, -1, -1), 'conv', 0)]
    for i in range(4): seen.append(double(F.max_pool2d(seen[-1], 2), f'downs.{i}', 1))
    maps, y = net.stages(x), seen[-1]
    for name, m in zip(('conv', 'down1', 'down2', 'down3', 'down4'), seen): close(maps[name], m)
    for i in range(4):
        y = F.conv_transpose2d(y, sd[f'ups.{i}.up.weight'], sd[f'ups.{i}.up.bias'], stride=2)
        y = double(torch.cat([y, seen[3 - i]], 1), f'ups.{i}.mix', 0)
        close(maps[f'up{i + 1}'], y)
    close(net(x), seen[-1].mean((2, 3))), close(net.feature_maps(x, 'up4'), y)
    assert {k: v.shape[1] for k, v in maps.items() if k != 'input'} == net.stage_channels and net.num_features == seen[-1].shape[1]


def test_the_plain_unet_recomputes_exactly():
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        net = PlainUNet('unet-tiny', checkpointing=on).double().train()
        x = torch.randn(2, 1, 32, 32).double()
        net.stages(x)['up4'].square().sum().backward()
        results.append([*(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results): close(a, b)
    with pytest.raises(ValueError, match="Did you mean 'unet'"): PlainUNet('unett')
    with pytest.raises(ValueError, match='up4'): net.feature_maps(x, 'up9')


def test_lovt_learns_on_a_unet_with_regions_of_its_decoder(tmp_path):
    method, batch = make(image_encoder='unet-tiny', region_stage='up1', global_stage='last').train(), batch_of()
    method(batch)['loss'].backward()
    moved = [n for n, p in method.image_encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any(n.startswith('ups.0') for n in moved) and not any(n.startswith('ups.1') for n in moved)
    method.eval()
    assert method.read_images(batch['images'])['grid'] == (8, 8)
    again = from_pretrained(save_pretrained(method, tmp_path / 'unet'))
    with torch.no_grad(): assert torch.equal(again(batch)['loss'], method(batch)['loss'])
    head = segmenter_from(again, 'disc', stage='up4')
    assert head.predict(BOXES['images']).shape == (2, 1, 64, 96)


# --- Mammo-CLIP

SMALL = dict(image_encoder='efficientnet-tiny', text_encoder='tiny', dim=16, vocab_size=150)


def mammo(**changes):
    torch.manual_seed(0)
    return MammoCLIP(MammoCLIPConfig(**{**SMALL, **changes}), TOKENIZER)


def exams(n=4):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (n, 2, 7), generator=g)
    return {'images': torch.randint(0, 256, (n, 2, 1, 64, 64), dtype=torch.uint8, generator=g), 'tokens': {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}, 'sample_id': list('abcd')[:n]}


MAMMO = {'gem': dict(image_pooling='gem'), 'learnt gem': dict(image_pooling='gem', gem_power=4., learn_gem=True), 'resnet gem': dict(image_encoder='resnet-tiny', image_pooling='gem', learn_gem=True),
         'no projection': dict(image_encoder='resnet-tiny', projection='none'), 'no temperature': dict(temperature=None), 'fixed temperature': dict(learn_temperature=False),
         'all': dict(image_encoder='resnet-tiny', image_pooling='gem', learn_gem=True, projection='none', temperature=None)}


@pytest.mark.parametrize('name', list(MAMMO))
def test_a_mammoclip_option_trains_saves_and_changes_something(tmp_path, name):
    method, batch = mammo(**MAMMO[name]).train(), exams()
    out = method(batch)
    out['loss'].backward()
    dead = [n for n, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [n for n in dead if 'pooler' not in n and 'key.bias' not in n and not n.endswith('position_embeddings.weight')], dead
    method.after_step({}, batch, StepState())
    method.eval()
    with torch.no_grad(): before = method(batch)['loss']
    again = from_pretrained(save_pretrained(method, tmp_path / 'm'))
    with torch.no_grad(): assert torch.equal(again(batch)['loss'], before) and torch.equal(again.encode_text(['no effusion']), method.encode_text(['no effusion']))
    assert again.config == replace(method.config, text_pretrained=False) and again.encode_image(batch['images']).shape == (4, method.config.dim)
    plain = mammo(**{k: v for k, v in MAMMO[name].items() if k == 'image_encoder'}).eval()
    if name != 'fixed temperature':
        with torch.no_grad(): assert plain(batch)['loss'] != before


def test_gem_is_the_originals_and_one_is_the_mean():
    torch.manual_seed(0)
    maps = torch.rand(3, 5, 6, 4) * 2 - .5
    for p in (1., 3., 7.5): close(GeM(p)(maps), F.avg_pool2d(maps.clamp(min=1e-6).pow(p), (6, 4)).pow(1 / p).flatten(1), rtol=1e-5, atol=1e-6)
    method, mean = mammo(image_pooling='gem', gem_power=1.).eval(), mammo().eval()
    images = exams()['images'][:, 0]
    with torch.no_grad():
        maps = method.feature_maps(images)
        close(method.image_features(images), maps.clamp(min=1e-6).mean((2, 3)), rtol=1e-5, atol=1e-6)
        close(method.image_encoder.pool(maps.relu()), mean.image_encoder.pool(maps.relu()), rtol=1e-4, atol=1e-5)
    assert GeM(3.)(torch.full((1, 1, 2, 2), 2.).half()).dtype == torch.float32
    assert set(method.state_dict()) == set(mean.state_dict()) and mammo(image_pooling='gem', learn_gem=True).image_encoder.gem.p.shape == (1,)
    for changes, told in ((dict(image_pooling='gemm'), "Did you mean 'gem'"), (dict(image_pooling='gem', gem_power=0.), 'positive')):
        with pytest.raises(ValueError, match=told): mammo(**changes)


def test_a_classifier_keeps_the_pool_of_its_encoder(tmp_path):
    method, images = mammo(image_pooling='gem', gem_power=2., learn_gem=True).eval(), exams()['images'][:, 0]
    method.image_encoder.gem.p.data.fill_(5.)
    head = new_classifier(method, 'mass').eval()
    with torch.no_grad(): close(head.image_features(images), method.image_features(images), rtol=0, atol=0)
    again = from_pretrained(save_pretrained(head, tmp_path / 'c'))
    with torch.no_grad(): assert torch.equal(again.predict(images), head.predict(images))


def test_without_a_projection_the_space_is_the_encoders_own():
    method = mammo(image_encoder='resnet-tiny', projection='none').eval()
    images = exams()['images'][:, 0]
    with torch.no_grad(): close(method.encode_image(images), F.normalize(method.image_features(images), dim=-1), rtol=1e-5, atol=1e-6)
    assert method.config.dim == 128 and not any('projection' in k for k in method.state_dict())
    with pytest.raises(ValueError, match="projection='none' needs encoders of one size, not"): mammo(projection='none')
    with pytest.raises(ValueError, match='linear'): mammo(projection='lineer')


def test_temperatures_that_nobody_learns():
    batch = exams()
    none, one, fixed, learnt = (mammo(**c).eval() for c in (dict(temperature=None), dict(temperature=1 / math.e, learn_temperature=False), dict(learn_temperature=False), {}))
    for m in (one, fixed, learnt): filled(m, none)
    with torch.no_grad():
        close(none(batch)['loss'], one(batch)['loss'], rtol=1e-6, atol=1e-6), close(fixed(batch)['loss'], learnt(batch)['loss'], rtol=0, atol=0)
        assert none(batch)['scale'].item() == pytest.approx(math.e), "the original's scale without a temperature is exp(1)"
    for m in (none, fixed): assert 'logit_scale' not in m.state_dict() and not any(n == 'logit_scale' for n, _ in m.named_parameters())
    assert 'logit_scale' in learnt.state_dict()
    for bad in (0., -1.):
        with pytest.raises(ValueError, match='temperature must be positive'): mammo(temperature=bad)


@pytest.mark.parametrize('name', ['b2_clip', 'b5_clip', 'b5_w_vindr_clip'])
def test_the_stored_configurations_golden(name):
    "All three configurations of the release translate; without projection head or temperature they mean the options."
    files = {'b2_clip': 'config_pre_train_b2_clip.json', 'b5_clip': 'config_pre_train_b5_clip.json', 'b5_w_vindr_clip': 'config_pre_train_b5_w_vindr_clip.json'}
    stored = json.loads(golden(f'mammoclip/{files[name]}').read_text())
    stored = stored.get('config', stored)
    found = released_config(Checkpoint({}, {'config': stored}))
    assert found.image_encoder == f'efficientnet-{name[:2]}' and (found.projection, found.temperature, found.dim) == ('linear', .07, 512)
    bare = {**stored, 'model': {k: v for k, v in stored['model'].items() if k not in ('projection_head', 'temperature')}}
    found = released_config(Checkpoint({}, {'config': bare}))
    assert (found.projection, found.temperature) == ('none', None)


def test_a_configuration_of_mammoclip_of_before_opens(tmp_path):
    method = mammo().eval()
    folder = save_pretrained(method, tmp_path / 'old')
    stored = json.loads((folder / 'config.json').read_text())
    for name in ('gem_power', 'learn_gem', 'learn_temperature'): stored['config'].pop(name)
    (folder / 'config.json').write_text(json.dumps(stored))
    with torch.no_grad(): assert torch.equal(from_pretrained(folder)(exams())['loss'], method(exams())['loss'])


def test_resnet_152_fits_mammoclip():
    with torch.device('meta'): method = MammoCLIP(MammoCLIPConfig(image_encoder='resnet-152', text_encoder='bert-base-clinical-config'))
    assert method.image_encoder.num_features == 2048 and method.image_projection.projection.in_features == 2048
    assert sum(p.numel() for p in method.image_encoder.parameters()) == 58_143_808
