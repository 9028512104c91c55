"""ResNet written a second time, the plain way: one function over a state dictionary. It shares no code with medvl."""
import torch
import torch.nn.functional as F

LAYERS = {'resnet-18': (2, 2, 2, 2), 'resnet-34': (3, 4, 6, 3), 'resnet-50': (3, 4, 6, 3), 'resnet-101': (3, 4, 23, 3), 'resnet-152': (3, 8, 36, 3), 'resnet-tiny': (1, 1, 1, 1)}


def make(name, seed=0, dtype=torch.float32):
    "A random state dictionary with torchvision's names, classifier included."
    g, deep, base = torch.Generator().manual_seed(seed), name in ('resnet-50', 'resnet-101', 'resnet-152'), 16 if name == 'resnet-tiny' else 64
    sd = {}

    def conv(key, out, into, k): sd[key + '.weight'] = torch.randn(out, into, k, k, generator=g, dtype=dtype) * (2 / (into * k * k)) ** .5

    def bn(key, n):
        sd[key + '.weight'] = torch.rand(n, generator=g, dtype=dtype) * .4 + .3
        sd[key + '.bias'] = torch.randn(n, generator=g, dtype=dtype) * .1
        sd[key + '.running_mean'] = torch.randn(n, generator=g, dtype=dtype) * .1
        sd[key + '.running_var'] = torch.rand(n, generator=g, dtype=dtype) + .5
        sd[key + '.num_batches_tracked'] = torch.tensor(7)
    conv('conv1', base, 3, 7)
    bn('bn1', base)
    into = base
    for k, n in enumerate(LAYERS[name]):
        w = base * 2 ** k
        out = 4 * w if deep else w
        for i in range(n):
            p = f'layer{k + 1}.{i}.'
            sizes = ((w, into, 1), (w, w, 3), (out, w, 1)) if deep else ((w, into, 3), (w, w, 3))
            for j, (a, b, c) in enumerate(sizes, 1):
                conv(f'{p}conv{j}', a, b, c)
                bn(f'{p}bn{j}', a)
            if i == 0 and (k or out != into):
                conv(p + 'downsample.0', out, into, 1)
                bn(p + 'downsample.1', out)
            into = out
    sd['fc.weight'], sd['fc.bias'] = torch.randn(1000, into, generator=g, dtype=dtype), torch.zeros(1000, dtype=dtype)
    return sd


def forward(sd, x, training=False):
    "Run it; `sd` is updated in place by batch statistics in training. Returns the pooled feature and the five maps."
    def bn(x, key): return F.batch_norm(x, sd[key + '.running_mean'], sd[key + '.running_var'], sd[key + '.weight'], sd[key + '.bias'], training, .1, 1e-5)
    x = bn(F.conv2d(x, sd['conv1.weight'], stride=2, padding=3), 'bn1').relu()
    maps = [x]
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for k in range(1, 5):
        i = 0
        while f'layer{k}.{i}.conv1.weight' in sd:
            p, stride, identity = f'layer{k}.{i}.', 2 if k > 1 and i == 0 else 1, x
            deep = p + 'conv3.weight' in sd
            if deep:
                y = bn(F.conv2d(x, sd[p + 'conv1.weight']), p + 'bn1').relu()
                y = bn(F.conv2d(y, sd[p + 'conv2.weight'], stride=stride, padding=1), p + 'bn2').relu()
                y = bn(F.conv2d(y, sd[p + 'conv3.weight']), p + 'bn3')
            else:
                y = bn(F.conv2d(x, sd[p + 'conv1.weight'], stride=stride, padding=1), p + 'bn1').relu()
                y = bn(F.conv2d(y, sd[p + 'conv2.weight'], padding=1), p + 'bn2')
            if p + 'downsample.0.weight' in sd: identity = bn(F.conv2d(x, sd[p + 'downsample.0.weight'], stride=stride), p + 'downsample.1')
            x, i = (y + identity).relu(), i + 1
        maps.append(x)
    return F.adaptive_avg_pool2d(x, 1).flatten(1), maps
