"""ResNet against a second, plain writing of it; its weights from files; pooling heads' image side."""
import pytest
import torch
from plain_resnet import forward as plain
from plain_resnet import make
from safetensors.torch import save_file

from medvl.core.errors import DataError
from medvl.models.resnet import RESNETS, STAGES, ResNet, load_resnet
from medvl.models.scaling import scale_images
from medvl.models.vision import build_image_encoder

PARAMETERS = {'resnet-18': 11_176_512, 'resnet-34': 21_284_672, 'resnet-50': 23_508_032, 'resnet-101': 42_500_160, 'resnet-152': 58_143_808}


def images(n=2, h=64, w=48, channels=3, dtype=torch.float32): return torch.randn(n, channels, h, w, generator=torch.Generator().manual_seed(1), dtype=dtype)


def close(a, b, tol=1e-5):
    "Relative to the size of the whole tensor: a network's errors add up."
    assert a.shape == b.shape and (a - b).norm() <= tol * b.norm(), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize('name', list(PARAMETERS))
def test_sizes_and_names_are_torchvisions(name):
    with torch.device('meta'): net = ResNet(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    with torch.device('meta'): assert list(net.state_dict()) == [k for k in _names(name)]


def _names(name):
    "The order of torchvision's file: convolutions and norms as they are made, the way around at the end of a block."
    from plain_resnet import LAYERS
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    yield 'conv1.weight'
    yield from (f'bn1.{b}' for b in bn)
    deep = name in ('resnet-50', 'resnet-101', 'resnet-152')
    for k, n in enumerate(LAYERS[name], 1):
        for i in range(n):
            for j in range(1, 4 if deep else 3):
                yield f'layer{k}.{i}.conv{j}.weight'
                yield from (f'layer{k}.{i}.bn{j}.{b}' for b in bn)
            if i == 0 and (k > 1 or deep):
                yield f'layer{k}.{i}.downsample.0.weight'
                yield from (f'layer{k}.{i}.downsample.1.{b}' for b in bn)


@pytest.mark.parametrize('name', ['resnet-tiny', 'resnet-18', 'resnet-50'])
@pytest.mark.parametrize('training', [False, True])
def test_forward_and_backward_equal_the_plain_network(tmp_path, name, training):
    sd = make(name)
    torch.save(sd, tmp_path / 'r.pth')
    net = build_image_encoder(name, weights=tmp_path / 'r.pth').train(training)
    x = images()
    leaves = {k: v.clone().requires_grad_(not k.endswith(('running_mean', 'running_var', 'tracked'))) for k, v in sd.items()}
    feature, maps = plain(leaves, x, training)
    ours = net.stages(x)
    close(net.pool(ours['conv5']), feature)
    for s, m in zip(STAGES[1:], maps): close(ours[s], m)
    feature.square().sum().backward()
    net.zero_grad()
    net.pool(ours['conv5']).square().sum().backward()
    for k, p in net.named_parameters(): close(p.grad, leaves[k].grad)
    for k, b in net.named_buffers():
        if not k.endswith('tracked'): close(b, leaves[k])


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_one_channel_is_three_equal_ones(dtype, tol):
    torch.manual_seed(0)
    net = ResNet('resnet-18').to(dtype).eval()
    x = images(channels=1, dtype=dtype)
    a, b = net.conv1(x), net.conv1(x.expand(-1, 3, -1, -1))
    close(a, b, tol)
    close(net(x), net(x.expand(-1, 3, -1, -1)), tol)
    net(x).sum().backward()
    assert (net.conv1.weight.grad.abs().sum((0, 2, 3)) > 0).all()


def test_stages_levels_and_odd_sizes():
    net = ResNet('resnet-tiny').eval()
    x = images(1, 65, 47, 1)
    maps = net.stages(x)
    assert [m.shape[-2:] for m in maps.values()] == [(65, 47), (33, 24), (17, 12), (9, 6), (5, 3), (3, 2)]
    assert {k: maps[k].shape[1] for k in net.stage_channels} == net.stage_channels and net.num_features == 128
    for i, s in enumerate(STAGES): assert torch.equal(net.feature_maps(x, i), maps[s]) and torch.equal(net.feature_maps(x, s), maps[s])
    assert torch.equal(net.feature_maps(x), maps['conv5']) and torch.equal(net(x), maps['conv5'].mean((2, 3)))
    with pytest.raises(ValueError, match="Did you mean 'conv5'"): net.feature_maps(x, 'conv6')
    with pytest.raises(ValueError, match=r'\(1, 2, 8, 8\)'): net(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match='resnet-50'): ResNet('resnet-5')


@pytest.mark.parametrize('name,on', [('resnet-tiny', True), ('resnet-18', ('conv2', 'conv5'))])
def test_checkpointing_and_layout_change_nothing(name, on):
    torch.manual_seed(0)
    a, b = ResNet(name).double(), ResNet(name, checkpointing=on).double() # float32 would add 2e-5 of rounding
    b.load_state_dict(a.state_dict())
    b.to(memory_format=torch.channels_last)
    x = images(3, channels=1, dtype=torch.float64)
    for net in (a, b): net.train()(x).square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters()): close(p.grad, q.grad, 1e-10)
    for p, q in zip(a.buffers(), b.buffers()): torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert b.stages(x)['conv4'].is_contiguous(memory_format=torch.channels_last)


def test_blocks_start_as_identity_on_request():
    net = ResNet('resnet-50', zero_init=True)
    block, x = net.layer1[1].eval(), images(1, 8, 8, 256).relu()
    assert torch.equal(block(x), x) and not torch.equal(ResNet('resnet-50').layer1[1].eval()(x), x)


def test_old_prefixed_and_safe_files(tmp_path):
    sd, net = make('resnet-tiny'), ResNet('resnet-tiny')
    old = {k: v for k, v in sd.items() if not k.endswith('tracked')}
    torch.save(old, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    report = load_resnet(net, tmp_path / 'old.pth')
    assert report.complete and report.ignored == ['fc.weight', 'fc.bias'] and torch.equal(net.layer3[0].conv1.weight, sd['layer3.0.conv1.weight'])
    torch.save({'state_dict': {f'module.{k}': v for k, v in sd.items()}, 'epoch': 3}, tmp_path / 'wrapped.tar')
    assert load_resnet(net, tmp_path / 'wrapped.tar', prefix='module.').complete and net.bn1.num_batches_tracked == 7
    save_file(sd, tmp_path / 's.safetensors')
    assert load_resnet(net, tmp_path / 's.safetensors').complete
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for bad, match in (({**sd, 'layer1.0.conv1.weight': torch.zeros(1)}, 'mismatched'), ({k: v for k, v in sd.items() if k != 'bn1.bias'}, 'missing: bn1.bias'),
                       ({**sd, 'extra': torch.zeros(1)}, 'unexpected: extra'), ({**sd, 'bn1.bias': sd['bn1.bias'] * float('nan')}, 'not finite'),
                       ({f'module.{k}': v for k, v in sd.items()}, 'prefix')):
        with pytest.raises(DataError, match=match): load_resnet(net, bad)
    torch.save({'conv1.weight': print}, tmp_path / 'evil.pth')
    with pytest.raises(DataError): load_resnet(net, tmp_path / 'evil.pth')
    (tmp_path / 'torn.pth').write_bytes((tmp_path / 'old.pth').read_bytes()[:5000])
    with pytest.raises(DataError): load_resnet(net, tmp_path / 'torn.pth')
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_by_name():
    for name in RESNETS:
        with torch.device('meta'): assert build_image_encoder(name).name == name
    with pytest.raises(DataError, match='pretrained=False'): build_image_encoder('resnet-50', pretrained=True)
    with pytest.raises(ValueError, match="Did you mean 'resnet-50'"): build_image_encoder('resnet_50')
    assert build_image_encoder('resnet-tiny', checkpointing=True, zero_init=True).checkpointing


def test_scaling_of_images():
    x = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(scale_images(x, .4, .2), torch.tensor([[-2., -1., 3.]]))
    assert scale_images(x.double()).dtype == torch.float64 and scale_images(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match='positive'): scale_images(x, .5, 0)
