"""EfficientNet written a second time, the plain way: one function over a state dictionary. It shares no code with medvl."""
import math

import torch
import torch.nn.functional as F


class Swish(torch.autograd.Function):
    "x * sigmoid(x), storing x and recomputing the sigmoid, as the published port does."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * (s * (1 + ctx.saved_tensors[0] * (1 - s)))


ARCH = [(1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320)]


def filters(n, width):
    n *= width
    m = max(8, int(n + 4) // 8 * 8)
    return m if m >= .9 * n else m + 8


def same_conv(x, w, stride, nominal, bias=None, groups=1):
    k = w.shape[-1]
    total = max((math.ceil(nominal / stride) - 1) * stride + k - nominal, 0)
    x = F.pad(x, [total // 2, total - total // 2] * 2)
    return F.conv2d(x, w, bias, stride, groups=groups)


def forward(sd, x, width, depth, nominal, training=False, lite=False, momentum=.01, chained=True):
    "Run an EfficientNet without random layers; `sd` is updated in place by batch statistics in training."
    act = F.relu6 if lite else Swish.apply

    def bn(x, name):
        return F.batch_norm(x, sd[name + '.running_mean'], sd[name + '.running_var'], sd[name + '.weight'], sd[name + '.bias'], training, momentum, 1e-3)
    maps, n, i = [], nominal, 0
    x = act(bn(same_conv(x, sd['_conv_stem.weight'], 2, n), '_bn0'))
    n = math.ceil(n / 2)
    for repeats, _k, s, e, ci, co in ARCH:
        ci, co = filters(ci, width), filters(co, width)
        for r in range(math.ceil(depth * repeats)):
            p, stride, cin, skip = f'_blocks.{i}.', 1 if r else s, co if r else ci, x
            if stride == 2: maps.append(x)
            if e != 1: x = act(bn(F.conv2d(x, sd[p + '_expand_conv.weight']), p + '_bn0'))
            x = same_conv(x, sd[p + '_depthwise_conv.weight'], stride, n if chained else nominal, groups=x.shape[1])
            x = act(bn(x, p + '_bn1'))
            if not lite:
                z = act(F.conv2d(F.adaptive_avg_pool2d(x, 1), sd[p + '_se_reduce.weight'], sd[p + '_se_reduce.bias']))
                x = torch.sigmoid(F.conv2d(z, sd[p + '_se_expand.weight'], sd[p + '_se_expand.bias'])) * x
            x = bn(F.conv2d(x, sd[p + '_project_conv.weight']), p + '_bn2')
            if stride == 1 and cin == co: x = x + skip
            n, i = math.ceil(n / stride), i + 1
    maps.append(x)
    maps.append(act(bn(F.conv2d(x, sd['_conv_head.weight']), '_bn1')))
    return F.adaptive_avg_pool2d(maps[-1], 1).flatten(1), maps


def formula_weights(state):
    "Fill a state dictionary by a formula, so that outputs can be compared without a file of weights."
    out = {}
    for i, (name, t) in enumerate(state.items()):
        s = torch.sin(0.7 * torch.arange(t.numel(), dtype=torch.float64) + i).view(t.shape)
        if name.endswith('num_batches_tracked'): out[name] = t.clone(); continue
        if t.dim() >= 2: v = math.sqrt(2 / (t.numel() / t.shape[0])) * s
        elif name.endswith('running_var'): v = 1 + .5 * s ** 2
        elif name.endswith('running_mean') or name.endswith('bias'): v = .1 * s
        else: v = 1 + .1 * s
        out[name] = v.float()
    return out
