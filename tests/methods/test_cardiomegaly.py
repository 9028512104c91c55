"""The methods of the cardiomegaly question against the originals' numbers: age proxy, ResNet-101, autoencoder, masked loss, frozen layers, scores; and what fine-tuning promises."""
import copy
import json

import numpy as np
import pytest
import torch
from golden import golden
from torch import nn

from medvl.core.errors import DataError
from medvl.data.phantom.heart_ratio import heart_phantom
from medvl.evaluate.metrics.confusion import batch_mean_auroc, confusion_of, confusion_scores, contradictions, counts_behind, two_logit_scores
from medvl.evaluate.protocols.finetune import BALANCINGS, FinetuneConfig, Monitor, Repeated, assert_moved, balanced_training, finetune, last_stage, with_new_head
from medvl.evaluate.stats.covariates import covariate_control, stratified_auroc
from medvl.evaluate.stats.prevalence import moved_prior, predictive_values, taught_prior, value_at
from medvl.evaluate.stats.scored import Scored
from medvl.evaluate.stats.selection import splits_of
from medvl.losses.classification import classification_loss, focal_ce
from medvl.losses.masked_error import bright, error_sums, hidden_patches, known_error, masked_error
from medvl.methods.base import StepState, build
from medvl.methods.dual_autoencoder import DualAutoencoder, DualAutoencoderConfig
from medvl.methods.parts.image import new_image_method
from medvl.models.autoencoder import AutoencoderEncoder, autoencoder_weights
from medvl.models.densenet import DenseNet, load_densenet
from medvl.models.resnet import ResNet, load_resnet
from medvl.models.vision import build_image_encoder


def arrays(name): return np.load(golden(f'cardiomegaly/{name}.npz'))
def told(name): return json.loads(golden(f'cardiomegaly/{name}.json').read_text())


def formula(shape, salt, scale, offset):
    "The value formula of the goldens' README, rounded to float32."
    i, m = np.arange(int(np.prod(shape)), dtype=np.uint64), np.uint64(0xFFFFFFFF)
    h = (i * np.uint64(2654435761) + np.uint64(salt) * np.uint64(2246822519) + np.uint64(374761393)) & m
    h ^= h >> np.uint64(16); h = h * np.uint64(0x85EBCA6B) & m
    h ^= h >> np.uint64(13); h = h * np.uint64(0xC2B2AE35) & m
    h ^= h >> np.uint64(16)
    return torch.tensor((offset + scale * ((h.astype(np.float64) + .5) / 2**31 - 1)).reshape(shape).astype(np.float32))


def test_the_formula():
    assert formula((4,), 1, 1., 0.).tolist() == pytest.approx([-0.28002970409579575, 0.44722016085870564, 0.22323765675537288, 0.5394071952905506])


# ------------------------------------------------------------------------------------------------ the age proxy

def test_age_proxy_is_the_originals():
    z = arrays('age_proxy')
    m = new_image_method('proxy', image_encoder='resnet-tiny', age_output='sigmoid', age_error='mse')
    logits, years = torch.tensor(z['logits'], requires_grad=True), torch.tensor(z['age_years'], dtype=torch.float32)[:, None]
    np.testing.assert_allclose(m.years(logits).detach() / 89, z['pred'], atol=1e-6)
    np.testing.assert_allclose(years[:, 0] / 89, z['target'], atol=1e-7)
    out = m.losses({'age': logits}, {'targets': years}, StepState())
    assert out["loss"].item() == pytest.approx(float(z["loss"]), abs=1e-6) == pytest.approx(float(z["val_loss"]), abs=1e-6)
    out['loss'].backward()
    np.testing.assert_allclose(logits.grad, z['grad_logits'], atol=1e-6)
    one = m.losses({'age': logits[:1]}, {'targets': years[:1]}, StepState())['loss']
    assert float(one) == pytest.approx(float(z['batch_of_one_loss']), abs=1e-6)
    assert float(out['age_mae']) == pytest.approx(float(np.abs(89 * z['pred'] - z['age_years']).mean()), abs=1e-4)


def test_resnet_101_with_one_output_is_the_originals():
    z, w = arrays('resnet101_age'), told('resnet101_weights')
    base, weights = w['age_base'], {}
    for k, (name, shape, scale, offset) in enumerate(w['weights']): weights[name] = formula(shape, base + k, scale, offset)
    stem = weights['conv1.weight']
    assert stem.shape[1] == 1 # of one channel: as three whose sum it is
    weights['conv1.weight'] = stem.repeat(1, 3, 1, 1).double() / 3
    m = new_image_method('proxy', image_encoder='resnet-101', age_output='sigmoid', image_mean=0., image_std=1.).double().eval()
    load_resnet(m.image_encoder, {k: v for k, v in weights.items() if not k.startswith('fc.')})
    with torch.no_grad():
        m.heads['age'].weight.copy_(weights['fc.weight']); m.heads['age'].bias.copy_(weights['fc.bias'])
        x = torch.tensor(z['input_u8']).double()
        np.testing.assert_allclose(m.heads['age'](m.image_features(x)), z['f64/eval_logits'], atol=1e-9)
        maps = m.image_encoder.stages(x / 255)
        np.testing.assert_allclose(maps['conv5'][:, 0], z['f64/eval/layer4_channel0_map'], atol=1e-9)
        for ours, theirs in zip(('conv2', 'conv3', 'conv4', 'conv5'), ('layer1', 'layer2', 'layer3', 'layer4')):
            v = maps[ours]
            np.testing.assert_allclose([v.mean(), v.std(correction=0), v.abs().max()],
                                       z[f'f64/eval/{theirs}_mean_std_absmax'], atol=1e-9)
        np.testing.assert_allclose(m.image_encoder(x / 255)[:, :64], z['f64/eval/pooled_first64'], atol=1e-9)


def test_sizes_of_proxies_and_frozen_layers_are_the_originals():
    t = told('proxy_and_freeze')
    with torch.device('meta'): encoder = ResNet('resnet-101')
    stem = 2 * 64 * 49 # our stem keeps three channels
    for task, units in (('age', 1), ('sex', 2)):
        m = new_image_method('proxy', image_encoder='resnet-tiny', tasks=(task,))
        assert list(t['proxy'][task]['head'][0]) == [units, 2048] and m.heads[task].weight.shape[0] == units
        assert sum(p.numel() for p in encoder.parameters()) - stem + units * 2049 == t['proxy'][task]['total_parameters']
    want = t['finetune']['age']
    c = with_new_head(ResNet('resnet-101'), 'cardiomegaly', 'last')
    open_now = [n.removeprefix('image_encoder.') for n, p in c.named_parameters() if p.requires_grad and n.startswith('image_encoder.')]
    assert open_now == [n for n in want['trainable'] if not n.startswith('fc.')]
    assert [n for n, p in c.image_encoder.named_parameters() if not p.requires_grad] == want['frozen']
    trained = sum(p.numel() for p in c.parameters() if p.requires_grad)
    assert trained + 2049 == want['trainable_parameters'] # their head has two outputs, ours one
    c.train()
    before = {n: b.clone() for n, b in c.image_encoder.named_buffers() if n.endswith('running_mean')}
    c(dict(images=torch.rand(2, 1, 1, 64, 64) * 255, labels=torch.ones(2, 1), sample_id=['a', 'b']))
    moved = [n for n, b in c.image_encoder.named_buffers() if n in before and not torch.equal(b, before[n])]
    assert len(before) == want['batchnorm_layers'] and all(n.startswith('layer4.') for n in moved) and len(moved) == 10
    assert want['frozen_batchnorm_layers_whose_running_mean_moved_in_one_train_forward'] == 94 # the original's mistake


# ------------------------------------------------------------------------------------------------ the autoencoder

@pytest.mark.parametrize('case', ['fractional', 'ones', 'one_image_all_zero', 'weighted_1_44'])
def test_masked_loss_is_the_originals(case):
    z = arrays('recon_loss')
    g = lambda k: torch.tensor(z[f'{case}/{k}'])
    found, logits = g('xhat').requires_grad_(), g('logits').requires_grad_()
    recon = masked_error(error_sums(found, g('x'), g('mask')))
    m = DualAutoencoder(DualAutoencoderConfig(image_encoder='autoencoder-tiny', positive=44. if case.startswith('weighted') else 1.))
    batch, features = {'labels': g('y').float()[:, None]}, {'logits': logits, 'sums': error_sums(found, g('x'), g('mask'))}
    out = m.train().losses(features, batch, StepState())
    assert recon.dtype == torch.float64
    for key, value in (('recon', recon), ('ce', out['ce']), ('total', out['loss'])): assert float(value) == pytest.approx(float(z[f'{case}/{key}']), abs=1e-6), key
    out['loss'].backward()
    np.testing.assert_allclose(found.grad, g('grad_xhat'), atol=1e-6)
    np.testing.assert_allclose(logits.grad, g('grad_logits'), atol=1e-6)
    assert float(m.eval().losses(features, batch, StepState())['ce']) == pytest.approx(float(z[f'{case}/val_loss']), abs=1e-6)
    accuracy = confusion_scores(confusion_of(g('y'), logits[:, 1].detach() > logits[:, 0].detach()))['accuracy']
    assert accuracy == pytest.approx(float(z[f'{case}/train_f1']), abs=1e-6) # their F1


def test_an_empty_mask():
    assert told('recon_loss')['all_zero_mask_recon'] == 'nan'
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    sums = error_sums(x, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert torch.isnan(masked_error(sums, 'nan'))
    loss = masked_error(sums)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def original(name):
    "The autoencoder of a golden case, and its batch."
    t, z = told('autoencoder')[name], arrays('image_pipeline')
    m = DualAutoencoder(DualAutoencoderConfig(positive=44. if name.startswith('aeW') else 1.), AutoencoderEncoder(t['hidden_dim'], 160))
    weights = autoencoder_weights({w['name']: formula(w['shape'], w['salt'], w['scale'], w['offset']) for w in t['weights'] if 'tied_to' not in w})
    counters = {k: v for k, v in m.state_dict().items() if k.endswith('num_batches_tracked')}
    m.load_state_dict({**weights, **counters})
    images = torch.tensor(np.stack([z[f'{n}/eq_resized160_u8'] for n in t['inputs']]))[:, None, None]
    masks = torch.tensor(np.stack([z[f'{n}/mask_resized160'] for n in t['inputs']]))[:, None]
    return t, m, dict(images=images, masks=masks, labels=torch.tensor(t['labels'], dtype=torch.float32)[:, None], sample_id=['a', 'b'])


@pytest.mark.parametrize('name', ['ae_h32', 'aeW_h32', 'ae_h1024'])
def test_autoencoder_is_the_originals(name):
    t, m, batch = original(name)
    z = arrays('autoencoder')
    count = lambda x: sum(p.numel() for p in x.parameters())
    assert count(m) == t['total_parameters'] and count(m.classifier) == t['classifier_parameters']
    assert count(m.image_encoder.to_latent) + count(m.decoder.from_latent) == t['bottleneck_parameters']
    for mode in ('eval', 'train'):
        n = copy.deepcopy(m).train(mode == 'train')
        x = n.image_side.scaled(batch['images'])
        latent = n.image_encoder(x)
        drawn, logits = n.decoder(latent), n.classifier(latent)
        g = lambda k, mode=mode: z[f'{name}/{mode}/{k}']
        np.testing.assert_allclose(latent.detach(), g('z'), atol=1e-4)
        np.testing.assert_allclose(logits.detach(), g('logits'), atol=1e-4)
        np.testing.assert_allclose(drawn.detach()[:, 0, ::4, ::4], g('recon_stride4'), atol=1e-4)
        np.testing.assert_allclose(drawn.detach()[:, 0, 72:88, 72:88], g('recon_crop_rows72_88_cols72_88'), atol=1e-4)
    n = copy.deepcopy(m).train()
    out = n(batch)
    for ours, theirs in (('loss', 'total_loss'), ('recon', 'recon_loss'), ('ce', 'ce')): assert float(out[ours]) == pytest.approx(float(z[f'{name}/train/{theirs}']), abs=1e-4)
    out['loss'].backward()
    grads = autoencoder_weights(dict.fromkeys(t['parameter_order']))
    named = dict(n.named_parameters())
    for key, l2 in zip(grads, z[f'{name}/train/grad_l2']):
        dead = key.endswith('.bias') and named[key].ndim == 1 and f'{key.rsplit(".", 2)[0]}.{int(key.rsplit(".", 2)[1]) + 1}.running_mean' in n.state_dict() if key.rsplit('.', 2)[1].isdigit() else False
        if not dead: assert float(named[key].grad.double().norm()) == pytest.approx(float(l2), rel=1e-3, abs=1e-6), key # a bias before BatchNorm has none
    for key in ('stem.0.weight', 'out.6.weight', 'classifier.5.weight'):
        np.testing.assert_allclose(named[next(iter(autoencoder_weights({key: 0})))].grad, z[f'{name}/train/grad/{key}'], rtol=2e-3, atol=1e-5)
    state = n.state_dict()
    for key in [k for k in z.files if k.startswith(f'{name}/train/buffers_after/')]:
        ours = next(iter(autoencoder_weights({key.split('/', 3)[3]: 0})))
        np.testing.assert_allclose(state[ours], z[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['ae_h32', 'aeW_h32'])
def test_three_steps_are_the_originals(name):
    t, m, batch = original(name)
    z, losses = arrays('autoencoder'), []
    m.train()
    optimiser = torch.optim.SGD(m.parameters(), lr=t['lr_used_here'], momentum=.9, weight_decay=5e-4)
    for _ in range(3):
        out = m(batch)
        optimiser.zero_grad(); out['loss'].backward(); optimiser.step()
        losses.append([float(out[k]) for k in ('loss', 'recon', 'ce')])
    np.testing.assert_allclose(losses, z[f'{name}/steps/total_recon_ce'], atol=2e-4)
    for key in ('stem.0.weight', 'out.6.weight', 'classifier.5.weight', 'classifier.5.bias'):
        if f'{name}/steps/param_after/{key}' in z.files:
            np.testing.assert_allclose(dict(m.named_parameters())[next(iter(autoencoder_weights({key: 0})))].detach(), z[f'{name}/steps/param_after/{key}'], atol=1e-4)


# ------------------------------------------------------------------------------------------------ scores

def test_scores_are_the_originals():
    z, cases = arrays('classification_metrics'), told('classification_metrics')
    for name, want in cases.items():
        found = two_logit_scores(z[f'{name}/logits'], z[f'{name}/y'])
        a, also = want['as_computed'], want['also']
        for ours, theirs in (('auroc', 'auc'), ('sensitivity', 'sensitivity'), ('specificity', 'specificity'), ('accuracy', 'f1_column'), ('mcc', 'mcc'), ('balanced_accuracy', 'balanced_accuracy')):
            assert found[ours] == pytest.approx(a[theirs], abs=1e-12), (name, ours)
        for key in ('accuracy', 'f1_positive', 'average_precision'): assert found[key] == pytest.approx(also[key], abs=1e-12), (name, key)
        c = confusion_of(z[f'{name}/y'], z[f'{name}/pred'] == 1)
        assert tuple(c) == tuple(also[k] for k in ('tp', 'fp', 'tn', 'fn'))


def test_a_mean_over_batches_is_not_the_auroc():
    z, t = arrays('batchwise_auc'), told('batchwise_auc')
    p = torch.tensor(z['logits']).softmax(1)[:, 1].numpy()
    mean, empty = batch_mean_auroc(p, z['y'], t['batch_size'])
    assert mean == pytest.approx(t['weighted_mean_of_batches'], abs=1e-6) and empty == 0
    assert mean == pytest.approx(t['logged']['test_auc'], abs=1e-5)
    assert two_logit_scores(z['logits'], z['y'])['auroc'] == pytest.approx(t['auc_exact_over_all'], abs=1e-12)
    assert batch_mean_auroc([.1, .2, .3, .9], [0, 0, 0, 1], 2) == (1., 1) # a batch of one class


def test_the_published_table_contradicts_itself():
    t, found = told('table2'), {}
    p, n = t['test_set']['positive'], t['test_set']['negative']
    for row in t['rows']:
        pub = row['published']
        c = counts_behind(pub['sensitivity'], pub['specificity'], p, n)
        assert tuple(c) == tuple(row['counts_300_300'][k] for k in ('tp', 'fp', 'tn', 'fn')), row['model']
        s = confusion_scores(c)
        for key in ('accuracy', 'f1_positive', 'mcc', 'balanced_accuracy'): assert s[key] == pytest.approx(row['recomputed'][key], abs=1e-12)
        asked = dict(sensitivity=pub['sensitivity'], specificity=pub['specificity'], mcc=pub['mcc'], accuracy=pub['f1_column'], f1_positive=pub['f1_column'])
        ok = contradictions(asked, p, n).set_index('metric').ok
        found[row['model']] = [k for k in ('mcc', 'accuracy', 'f1_positive') if not ok[k]]
    assert 'mcc' in found['ResNet101 weighted loss'] and 'mcc' in found['ResNet101 over-sampled']
    assert 'accuracy' in found['DenseNet121'] and 'f1_positive' not in found['DenseNet121'] # F1 in one row, accuracy in the others
    assert 'accuracy' not in found['autoencoder dual loss'] and 'f1_positive' in found['autoencoder dual loss']


# ------------------------------------------------------------------------------------------------ losses, networks

def test_hidden_patches_do_not_depend_on_the_batch():
    whole = hidden_patches(torch.arange(50), 7, (6, 5), .4, 3)
    assert (whole.flatten(1).sum(1) == 12).all()
    assert torch.equal(hidden_patches(torch.tensor([41, 3]), 7, (6, 5), .4, 3), whole[[41, 3]])
    assert not torch.equal(hidden_patches(torch.arange(50), 8, (6, 5), .4, 3), whole)
    assert len({tuple(w.flatten().tolist()) for w in whole}) > 45
    far = hidden_patches(torch.tensor([2**40, 2**40 + 1]), 10**6, (6, 5), .4, 3)
    assert (far.flatten(1).sum(1) == 12).all()


def test_nothing_hidden_and_everything_nan():
    m = new_image_method('reconstruction', image_encoder='resnet-tiny', hidden=0.)
    batch = dict(images=torch.randint(0, 256, (2, 1, 1, 40, 40), dtype=torch.uint8), index=torch.arange(2), epoch=0, sample_id=['a', 'b'])
    assert torch.isfinite(m(batch)['loss'])
    p = new_image_method('proxy', image_encoder='resnet-tiny', tasks=('age', 'sex')).train()
    nothing = {**batch, 'targets': torch.full((2, 2), float('nan'))}
    out = p(nothing)
    out['loss'].backward()
    assert float(out['loss']) == 0 and all(q.grad is None or (q.grad == 0).all() for q in p.parameters())
    with pytest.raises(ValueError, match='targets'): p({**batch, 'targets': torch.zeros(2, 1)})


def test_losses_against_their_definitions():
    z, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[1., 0.]] * 4 + [[0., 1.]] * 4 + [[float('nan')] * 2])
    torch.testing.assert_close(focal_ce(z, y, 0.), classification_loss(z, y))
    t = z[:8].sigmoid()
    pt = torch.where(y[:8] == 1, t, 1 - t)
    torch.testing.assert_close(focal_ce(z, y, 2.), (-(1 - pt)**2 * pt.log()).mean())
    with pytest.raises(ValueError, match='gamma'): focal_ce(z, y, -1.)
    assert float(known_error(torch.tensor([1., 2.]), torch.tensor([float('nan'), 4.]), 'mae')) == 2
    assert not bright(torch.zeros(1, 1, 3, 3)).any()


def test_densenet_is_a_plain_writing_of_it():
    net = DenseNet('densenet-tiny').eval()
    w, x = net.state_dict(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    f = nn.functional
    bn = lambda x, n: f.batch_norm(x, w[f'features.{n}.running_mean'], w[f'features.{n}.running_var'], w[f'features.{n}.weight'], w[f'features.{n}.bias'])
    h = f.max_pool2d(bn(f.conv2d(x, w['features.conv0.weight'], None, 2, 3), 'norm0').relu(), 3, 2, 1)
    for k in range(1, 5):
        for i in range(1, 3):
            n = f'denseblock{k}.denselayer{i}'
            a = f.conv2d(bn(h, f'{n}.norm1').relu(), w[f'features.{n}.conv1.weight'])
            h = torch.cat([h, f.conv2d(bn(a, f'{n}.norm2').relu(), w[f'features.{n}.conv2.weight'], None, 1, 1)], 1)
        if k < 4: h = f.avg_pool2d(f.conv2d(bn(h, f'transition{k}.norm').relu(), w[f'features.transition{k}.conv.weight']), 2)
    with torch.no_grad(): torch.testing.assert_close(net(x), bn(h, 'norm5').relu().mean((2, 3)))
    again = DenseNet('densenet-tiny', checkpointing=True).train()
    load_densenet(again, w)
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    net121 = torch.device('meta')
    with net121: names = list(DenseNet('densenet-121').state_dict())
    for n in ('features.conv0.weight', 'features.norm0.running_var', 'features.denseblock3.denselayer24.conv2.weight', 'features.transition3.norm.bias', 'features.norm5.weight'): assert n in names
    with pytest.raises(DataError, match='do not fit'): load_densenet(net, {k: v for k, v in w.items() if 'norm5' not in k})


def test_a_stem_of_three_channels_is_summed():
    for name in ('densenet-tiny', 'resnet-tiny'):
        net = build_image_encoder(name).eval()
        grey = torch.rand(1, 1, 64, 64)
        with torch.no_grad(): torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ fine-tuning

@pytest.fixture(scope='module')
def parts(tmp_path_factory): return splits_of(heart_phantom(tmp_path_factory.mktemp('hearts'), 90, (64, 64), difficulty='easy', label_noise=0.), needed=('train', 'valid', 'test'))


QUICK = dict(epochs=2, batch_size=16, lr=3e-3)


@pytest.mark.parametrize('source', ['proxy', 'dual_autoencoder', 'reconstruction', 'mae', 'densenet-tiny'])
def test_every_encoder_is_tuned_by_one_function(source, parts, tmp_path):
    made = {'proxy': lambda: new_image_method('proxy', image_encoder='resnet-tiny', tasks=('sex',)), 'dual_autoencoder': lambda: build('dual_autoencoder', dict(image_encoder='autoencoder-tiny')),
            'reconstruction': lambda: new_image_method('reconstruction', image_encoder='resnet-tiny'),
            'mae': lambda: new_image_method('mae', image_encoder='vit-tiny', side=64, patch=16, image_width=32, image_depth=2, image_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)}
    s = made[source]() if source in made else source
    kept = copy.deepcopy(s.state_dict()) if source in made else None
    for depth in ('probe', 'last', 'whole'):
        f = finetune(s, parts, 'cardiomegaly', FinetuneConfig(depth, train=dict(QUICK, max_steps=3, valid_every=3)), tmp_path/depth, n_boot=20, baseline=False)
        assert f.moved >= 1 and (f.frozen > 0) == (depth != 'whole')
        row = f.result.table.query("metric == 'auroc'").iloc[0]
        assert 0 <= row.low <= row.value <= row.high <= 1 and row.n == len(parts['test'])
    if kept: assert all(torch.equal(v, kept[k]) for k, v in s.state_dict().items()) # the source stays as it is


def test_what_is_asserted_can_fail(parts):
    s = new_image_method('proxy', image_encoder='resnet-tiny', tasks=('age',))
    m = with_new_head(s, 'cardiomegaly', 'last')
    before = {n: v.clone() for n, v in m.state_dict().items()}
    with pytest.raises(AssertionError, match='nothing was learnt'): assert_moved(before, m, s)
    with torch.no_grad(): m.image_encoder.conv1.weight += 1
    with pytest.raises(AssertionError, match='frozen, and moved'): assert_moved(before, m, s)
    m = with_new_head(s, 'cardiomegaly', 'last')
    with torch.no_grad(): m.head.weight.copy_(s.heads['age'].weight); m.image_encoder.bn1.running_mean += 1
    before = {n: v.clone() for n, v in m.state_dict().items()}
    with torch.no_grad(): m.head.bias += 1
    with pytest.raises(AssertionError, match='not replaced'): assert_moved(before, m, s) # the original's sex proxy
    m.image_encoder.bn1.running_mean += 1
    with pytest.raises(AssertionError, match='frozen, and moved'): assert_moved(before, m, s)


def test_the_last_stage_of_every_encoder():
    for n in ('resnet-tiny', 'densenet-tiny', 'efficientnet-tiny', 'autoencoder-tiny'):
        e = build_image_encoder(n)
        m = with_new_head(e, 'x', 'last')
        share = sum(p.numel() for p in m.image_encoder.parameters() if p.requires_grad) / sum(p.numel() for p in e.parameters())
        assert 0 < share < 1 and len(last_stage(e)) >= 1
    with pytest.raises(ValueError, match='layer9'): with_new_head('resnet-tiny', 'x', 'last', unfrozen=('layer9',))


@pytest.mark.parametrize('balancing', BALANCINGS)
def test_balancing_counts_on_training_rows_alone(balancing, parts):
    data, more, share = balanced_training(parts['train'], 'cardiomegaly', balancing, 1)
    y = parts['train'].manifest.label_cardiomegaly
    assert share == pytest.approx(y.mean())
    order = [i for b in data.batches(10, 0) for _, i in b] if balancing == 'sampler' else range(len(data))
    seen = np.array([data[0, i]['labels'][0] for i in order])
    if balancing in ('sampler', 'undersample', 'oversample'): assert abs(seen.mean() - .5) < .06 and not more
    else: assert seen.mean() == pytest.approx(share)
    if balancing == 'undersample': assert len(seen) == 2 * min(y.sum(), (1 - y).sum())
    if balancing == 'oversample': assert len(seen) == 2 * max(y.sum(), (1 - y).sum())
    assert 0 < taught_prior(balancing, share) < 1
    again = balanced_training(parts['train'], 'cardiomegaly', balancing, 1)[0]
    if isinstance(data, Repeated): assert (again.sequence == data.sequence).all() and data.digest == again.digest
    m = with_new_head('resnet-tiny', 'cardiomegaly', **more)
    out = m(data.collate([data[0, i] for i in range(4)]))
    assert torch.isfinite(out['loss'])


def test_a_balanced_model_is_moved_back(parts, tmp_path):
    f = finetune('resnet-tiny', parts, 'cardiomegaly', FinetuneConfig(balancing='class_weight', train=dict(QUICK, epochs=4)), tmp_path/'a', n_boot=20, baseline=False)
    s = f.result.scored['test']['cardiomegaly']
    p = f.probabilities(s.scores)
    assert f.taught == pytest.approx(.5) and (p < s.scores).all() and (np.argsort(p) == np.argsort(s.scores)).all()
    assert f.best == pytest.approx(max(0, f.best)) and f.config.monitor == Monitor()


def test_one_class_and_other_bad_input(parts, tmp_path):
    healthy = lambda p: p.subset((p.manifest.label_cardiomegaly == 0).to_numpy())
    for part in ('train', 'valid'):
        with pytest.raises(DataError, match='no positive'): finetune('resnet-tiny', {**parts, part: healthy(parts[part])}, 'cardiomegaly', folder=tmp_path/'a')
    for wrong in (dict(depth='deep'), dict(balancing='smote'), dict(train=dict(plateau_mode='min'))):
        with pytest.raises(ValueError): finetune('resnet-tiny', parts, 'cardiomegaly', FinetuneConfig(**wrong), tmp_path/'b')
    for metric, mode in (('valid_loss', 'max'), ('valid_auroc', 'min'), ('valid_age_mae', 'max'), ('test_auroc', 'max'), ('valid_auroc', 'up')):
        with pytest.raises(ValueError): Monitor(metric, mode)


def test_a_tuned_run_goes_on(parts, tmp_path):
    c = FinetuneConfig(train=dict(QUICK, epochs=2))
    a = finetune('resnet-tiny', parts, 'cardiomegaly', c, tmp_path/'a', n_boot=20, baseline=False)
    b = finetune('resnet-tiny', parts, 'cardiomegaly', c, tmp_path/'a', n_boot=20, baseline=False)
    assert all(torch.equal(x, y) for x, y in zip(a.method.state_dict().values(), b.method.state_dict().values()))
    with pytest.raises(DataError, match='another run'): finetune('resnet-tiny', parts, 'cardiomegaly', c, tmp_path/'a', seed=1)


# ------------------------------------------------------------------------------------------------ prevalence and covariates

def test_predictive_values_against_counting():
    rng = np.random.default_rng(0)
    n = 400_000
    y = rng.random(n) < .03
    called = np.where(y, rng.random(n) < .8, rng.random(n) < .1)
    ppv, npv = predictive_values(.8, .9, .03)
    assert called[y].sum() / called.sum() == pytest.approx(ppv, abs=.006) and (~called & ~y).sum() / (~called).sum() == pytest.approx(npv, abs=.002)


def test_prior_correction_is_bayes():
    x = np.linspace(-3, 3, 50)
    like = lambda share: share * np.exp(-(x - 1)**2/2) / (share * np.exp(-(x - 1)**2/2) + (1 - share) * np.exp(-x**2/2))
    np.testing.assert_allclose(moved_prior(like(.5), .5, .02), like(.02), rtol=1e-9)
    for wrong in (0, 1, 1.5):
        with pytest.raises(ValueError): moved_prior([.5], wrong, .5)


def test_value_at_has_an_interval_over_patients():
    import pandas as pd
    rng = np.random.default_rng(1)
    y = (rng.random(200) < .4).astype(float)
    s = Scored('x', 'test', y, y + rng.normal(0, .7, 200), pd.DataFrame({'patient_id': np.arange(200).astype(str)}))
    t = value_at(s, .5, .02, 300).set_index('metric')
    assert (t.low < t.value).all() and (t.value < t.high).all() and t.value['ppv_at_0.02'] < .2 < .9 < t.value['npv_at_0.02']


def test_planted_shortcuts_are_found_by_covariates_at_every_strength(tmp_path):
    values = []
    for rho in (0., .5, 1.):
        p = splits_of(heart_phantom(tmp_path/f'{rho}', 160, (64, 64), shortcut='view', rho=rho, age_effect=0., difficulty='easy'), needed=('train', 'test'))
        values.append(covariate_control(p, 'cardiomegaly', (('view',),), n_boot=50).value[0])
        y = p['test'].manifest.label_cardiomegaly.to_numpy()
        s = Scored('cardiomegaly', 'test', y, (p['test'].manifest['view'] == 'AP').to_numpy(float), p['test'].manifest)
        if rho == .5: assert stratified_auroc(s, ('view',), 30)['value'] == .5 # nothing is left of it when the view is held
        if rho == 1:
            with pytest.raises(DataError, match='no stratum'): stratified_auroc(s, ('view',), 30)
    assert values[0] < .68 and values[0] < values[1] < values[2] == 1.


def test_the_published_rows_are_those_of_the_table():
    from medvl.evaluate.protocols.cardiomegaly_published import CARDIO_TEST, cardiomegaly_table
    t, ours = told('table2'), cardiomegaly_table()
    assert tuple(t['test_set'].values()) == CARDIO_TEST and ours.model.tolist() == [r['model'] for r in t['rows']]
    for got, row in zip(ours.itertuples(), t['rows']):
        p = row['published']
        assert (got.auroc, got.sensitivity, got.specificity, got.F1_column, got.mcc) == (p['auc'], p['sensitivity'], p['specificity'], p['f1_column'], p['mcc'])
        assert got.accuracy_recomputed == pytest.approx(row['recomputed']['accuracy']) and got.verdict == 'data absent, not run'
