"""EfficientNet against the reference's numbers, against a second plain implementation, and its own promises."""
import json
from pathlib import Path

import numpy as np
import plain_efficientnet as plain
import pytest
import torch
from golden import golden

from medvl.models.efficientnet import EFFICIENTNETS, EfficientNet, StaticConv2d, drop_connect, frozen_statistics

FIXTURE = Path(__file__).parents[1] / 'fixtures' / 'efficientnet_formula.npz'
G = 'mammoclip/'


def near(a, b, rtol=1e-4, atol=1e-5):
    "Compare with a tolerance relative to the value and to the tensor's own scale."
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    scale = b.abs().max().item()
    torch.testing.assert_close(a.detach(), b, rtol=rtol, atol=atol * max(1.0, scale))


def near_scale(a, b, rtol=1e-4):
    "Compare relative to the tensor's norm and largest value: twelve values a channel make batch statistics amplify float32's own rounding."
    a, b = torch.as_tensor(a, dtype=torch.float64).detach(), torch.as_tensor(b, dtype=torch.float64)
    assert (a - b).norm() <= rtol * b.norm() and (a - b).abs().max() <= rtol * b.abs().max()


def meta(name, **k):
    with torch.device('meta'): return EfficientNet(name, **k)


def arch_rows(net):
    return [[i, p['kernel'], p['stride'], p['expand'], p['channels_in'], p['channels_out'], b._se_reduce.out_channels]
            for i, (p, b) in enumerate(zip(net.plan, net._blocks))]


@pytest.mark.parametrize('b', ['b2', 'b5'])
def test_architecture_and_keys_are_the_originals(b):
    arch, net = json.loads(golden(f'{G}arch_{b}.json').read_text()), meta(f'efficientnet-{b}')
    assert arch_rows(net) == arch['rows']
    assert (net._conv_stem.out_channels, net.num_features) == (arch['stem_out'], arch['head_out'])
    c = net.config
    assert (c.dropout, c.drop_connect, c.bn_eps) == (arch['dropout'], arch['drop_connect'], arch['bn_eps'])
    assert c.bn_momentum == pytest.approx(arch['bn_momentum'])
    keys = json.loads(golden(f'{G}ckpt_keys_{b}.json').read_text())['state_dict_order']
    theirs = [(k[len('image_encoder.'):], shape, dtype) for k, shape, dtype in keys if k.startswith('image_encoder.')]
    assert [(k, list(v.shape), str(v.dtype)[6:]) for k, v in net.state_dict().items()] == theirs


@pytest.mark.parametrize('b', ['b2', 'b5'])
@pytest.mark.parametrize('padding', ['clip', 'detector'])
def test_static_paddings_are_the_originals(b, padding):
    theirs = json.loads(golden(f'{G}static_padding.json').read_text())[f'{padding}_{b}']
    net = meta(f'efficientnet-{b}', padding=padding)
    ours = [[n, m.kernel_size[0], m.stride[0], list(m.static_padding)] for n, m in net.named_modules()
            if isinstance(m, StaticConv2d) and m.kernel_size[0] > 1]
    assert ours == theirs


@pytest.fixture(scope='module')
def b2():
    net = EfficientNet('efficientnet-b2')
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in
                         torch.load(golden(f'{G}b2_image_encoder_fp16.pt'), weights_only=True).items()})
    return net


@torch.no_grad()
def test_b2_eval_every_block(b2):
    z, seen = np.load(golden(f'{G}b2_eval_1x3x96x64.npz')), {}
    b2.eval()
    hooks = [blk.register_forward_hook(lambda m, i, o, k=k: seen.__setitem__(f'block{k:02d}', o)) for k, blk in enumerate(b2._blocks)]
    try: maps = b2.endpoints(torch.from_numpy(z['x']))
    finally:
        for h in hooks: h.remove()
    for k in seen: near(seen[k], z[k])
    for k in maps: near(maps[k], z[k])
    near(b2.pool(maps['reduction_6']), z['pooled'])
    near(b2.feature_maps(torch.from_numpy(z['x'])), z['raw'])
    assert len(seen) == 23 and len(maps) == 6


def test_b2_train_gradients_and_statistics(b2):
    z = np.load(golden(f'{G}b2_train_2x3x96x64.npz'))
    net = EfficientNet('efficientnet-b2', dropout=0, drop_connect=0)
    net.load_state_dict(b2.state_dict())
    x = torch.from_numpy(z['x']).requires_grad_()
    pooled = net.train()(x)
    (pooled * torch.from_numpy(z['w'])).sum().backward()
    near_scale(pooled, z['pooled']); near_scale(x.grad, z['grad_x'])
    params, state = dict(net.named_parameters()), net.state_dict()
    for k in z.files:
        if k.startswith('grad__'): near_scale(params[k[5:]].grad, z[k])
        if k.endswith('_after'): near(state[k[:-6]], z[k])


@torch.no_grad()
def test_b2_formula_golden():
    z, net = np.load(golden(f'{G}b2_formula_1x3x96x64.npz')), EfficientNet('efficientnet-b2').eval()
    net.load_state_dict(plain.formula_weights(net.state_dict()))
    maps = net.endpoints(torch.from_numpy(z['x']))
    for k in maps: near(maps[k], z[k])
    near(net(torch.from_numpy(z['x'])), z['pooled'])


@pytest.mark.parametrize('p', ['0.1', '0.5'])
def test_drop_connect_golden(p):
    z = np.load(golden(f'{G}drop_connect.npz'))
    x, u = torch.from_numpy(z['x']), torch.from_numpy(z[f'p{p}_uniform'])
    near(drop_connect(x, float(p), True, u), z[f'p{p}_train'], 1e-6, 1e-7)
    assert torch.equal(drop_connect(x, float(p), False), torch.from_numpy(z[f'p{p}_eval']))


@torch.no_grad()
@pytest.mark.parametrize('name', ['efficientnet-b2', 'efficientnet-tiny', 'efficientnet-lite0'])
def test_formula_fixture_of_our_own(name):
    z, net = np.load(FIXTURE), EfficientNet(name).eval()
    net.load_state_dict(plain.formula_weights(net.state_dict()))
    x = torch.sin(.05 * torch.arange(64 * 48)).view(1, 1, 64, 48)
    maps = net.endpoints(x)
    near(net(x), z[f'{name}_pooled'])
    near(torch.stack([m.square().mean() for m in maps.values()]), z[f'{name}_power'])


SIZES = [('efficientnet-b2', 1.1, 1.2, 260), ('efficientnet-b0', 1., 1., 224), ('efficientnet-lite0', 1., 1., 224), ('efficientnet-tiny', .35, .35, 256)]


@pytest.mark.parametrize('name,width,depth,size', SIZES)
@pytest.mark.parametrize('hw', [(64, 48), (75, 50)])
@pytest.mark.parametrize('padding', ['clip', 'detector'])
def test_plain_implementation_agrees_in_training(name, width, depth, size, hw, padding):
    torch.manual_seed(0)
    net = EfficientNet(name, dropout=0, drop_connect=0, padding=padding).double().train()
    sd = {k: v.detach().clone().requires_grad_(v.is_floating_point() and 'running' not in k) for k, v in net.state_dict().items()}
    x = torch.randn(2, 1, *hw, dtype=torch.float64)
    pooled, maps = plain.forward(sd, x.expand(-1, 3, -1, -1), width, depth, size, True, 'lite' in name, net.config.bn_momentum, padding == 'clip')
    ours = net(x)
    near(ours, pooled.detach(), 1e-9, 1e-10)
    ours.square().sum().backward(); pooled.square().sum().backward()
    for k, p in net.named_parameters(): near(p.grad, sd[k].grad, 1e-7, 1e-8)
    for k, v in net.state_dict().items():
        if 'running' in k: near(v, sd[k], 1e-9, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_one_grey_channel_is_three_equal_ones(layout):
    net, x = EfficientNet('efficientnet-b2').eval().to(memory_format=layout), torch.randn(2, 1, 96, 64)
    near(net(x.contiguous(memory_format=layout)), net(x.expand(-1, 3, -1, -1).contiguous(memory_format=layout)))


@pytest.mark.parametrize('blocks', [True, (0, 2, 5)])
def test_checkpointing_is_exact_with_random_layers(blocks):
    def run(checkpointing):
        torch.manual_seed(3)
        net = EfficientNet('efficientnet-tiny', checkpointing=checkpointing, drop_connect=.5).double().train()
        x = torch.randn(4, 1, 64, 64, dtype=torch.float64)
        torch.manual_seed(4)
        y = net(x); y.square().sum().backward()
        return y.detach(), [p.grad for p in net.parameters()], list(net.buffers())
    a, b = run(False), run(blocks)
    assert torch.equal(a[0], b[0])
    for u, v in zip(a[1] + a[2], b[1] + b[2]): torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12)


def test_frozen_statistics_keeps_buffers_and_output():
    net, x = EfficientNet('efficientnet-tiny', dropout=0, drop_connect=0).train(), torch.randn(3, 1, 64, 64)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_statistics(net): y = net(x)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(y, net(x)) and net._bn0.num_batches_tracked == 1 and net._bn0.momentum == .1


def test_drop_connect_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    assert drop_connect(torch.ones(20000, 1, 1, 1), .3).mean().item() == pytest.approx(1, abs=.02)
    net = meta('efficientnet-b5')
    assert [b.drop for b in net._blocks] == pytest.approx([.2 * i / 39 for i in range(39)])


def test_eval_is_deterministic_and_train_is_not():
    net, x = EfficientNet('efficientnet-tiny'), torch.randn(4, 1, 64, 64)
    assert torch.equal(net.eval()(x), net(x)) and not torch.equal(net.train()(x), net(x))


@pytest.mark.parametrize('call,words', [(lambda: EfficientNet('efficientnet-b9'), 'b'), (lambda: EfficientNet('efficientnet-tiny', padding='same'), 'clip'),
                                        (lambda: EfficientNet('efficientnet-tiny').eval().feature_maps(torch.zeros(1, 1, 64, 64), 9), 'level')])
def test_wrong_names_are_refused_with_the_right_ones(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_every_member_of_the_family_has_its_width():
    assert {n: meta(n).num_features for n in EFFICIENTNETS} == {
        'efficientnet-b0': 1280, 'efficientnet-b1': 1280, 'efficientnet-b2': 1408, 'efficientnet-b3': 1536, 'efficientnet-b4': 1792,
        'efficientnet-b5': 2048, 'efficientnet-b6': 2304, 'efficientnet-b7': 2560, 'efficientnet-lite0': 1280, 'efficientnet-tiny': 448}
