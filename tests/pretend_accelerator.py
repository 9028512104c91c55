"""A pretend accelerator for machines without a GPU: tensors say they are on `pretend:0`, compute on the CPU, and refuse what a GPU refuses.

    with Accelerator() as accelerator:
        method.to(DEVICE)
        ...
    accelerator.waits # Counter of the lines that waited for the device

Refused: an operation on tensors of two devices, `.numpy()` of a device tensor, the generator of another device. Counted: every wait for the device (`.item()`, `.tolist()`,
`bool(t)`, `.cpu()`, indexing by a mask, `nonzero`, and copies from pageable memory that block), under the line of the code that caused it. Random draws have a state of their own, as on a GPU:
`torch.manual_seed` sets it, `torch.random.fork_rng` keeps it. Autocast casts the operations that matter here. No kernel, no memory limit and no overlap are pretended.
"""
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'pretend'
aten = torch.ops.aten
WAITS = [] # (operation, 'file:line') of every wait, in order
ROOT = str(Path(__file__).resolve().parents[1])
LIVE = [] # contexts that are open: without one there is no device to find
DRAWS = torch.Generator() # the device's own random state
PRETENDING = set() # addresses of the generators that were made for the device


class PretendModule:
    "What torch asks of a device's module; it says 'no device' outside `Accelerator()`."
    def is_available(self): return bool(LIVE)
    def is_initialized(self): return True
    def _is_in_bad_fork(self): return False
    def device_count(self): return int(bool(LIVE))
    def current_device(self): return 0
    def set_device(self, device): pass
    def synchronize(self, device=None): _wait('synchronize')
    def manual_seed(self, seed): DRAWS.manual_seed(int(seed))
    def manual_seed_all(self, seed): DRAWS.manual_seed(int(seed))
    def get_rng_state(self, device=None): return DRAWS.get_state()
    def set_rng_state(self, state, device=None): DRAWS.set_state(state)
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=PretendModule())
DEVICE = torch.device(f'{NAME}:0')


def _place():
    "The line that asked: the innermost one of this project, else the innermost outside torch."
    frame, outside = sys._getframe(2), None
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(ROOT) and 'site-packages' not in file: return f'{os.path.relpath(file, ROOT)}:{frame.f_lineno}'
        if outside is None and f'{os.sep}torch{os.sep}' not in file and file != __file__: outside = f'{os.path.basename(file)}:{frame.f_lineno}'
        frame = frame.f_back
    return outside or '?'


def _wait(what): WAITS.append((str(what), _place()))


def _no_numpy(): raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")


class OnDevice(torch.Tensor):
    "A tensor on the pretend device, around one on the CPU."
    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                                                  device=DEVICE, requires_grad=False)
        out._inner = inner
        return out

    def __tensor_flatten__(self): return ['_inner'], None
    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride): return OnDevice(inner['_inner'])
    def tolist(self):
        _wait('tolist')
        return self._inner.tolist()
    def numpy(self, *args, **kwargs): _no_numpy()
    def __array__(self, *args, **kwargs): _no_numpy()
    def __repr__(self, *args, **kwargs): return f'OnDevice({self._inner})'
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})


class OnGenerator(torch.Generator):
    "A generator that knows that it was made for the pretend device."
    def __new__(cls, device='cpu'):
        out = super().__new__(cls, device='cpu')
        if torch.device(device).type == NAME: PRETENDING.add(out._cdata)
        return out
    def __del__(self): PRETENDING.discard(self._cdata)


INTO = {aten.copy_.default, aten.index_put_.default, aten._index_put_impl_.default} # the device of the first argument counts
MIXED = {aten.index.Tensor, aten.index_put.default, aten._to_copy.default, *INTO} # CPU indices and copies are allowed
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default, aten.unique_dim.default,
         aten.unique_consecutive.default, aten.bincount.default, aten.repeat_interleave.Tensor}


def _on(x): return isinstance(x, OnDevice)
def _inner(x): return x._inner if _on(x) else x
def _wrap(x): return OnDevice(x) if isinstance(x, torch.Tensor) and not _on(x) else x


def _leaves(tree, found):
    "What lies in the lists, tuples and dictionaries of an operation's arguments."
    if type(tree) in (list, tuple):
        for x in tree: _leaves(x, found)
    elif type(tree) is dict: _leaves(list(tree.values()), found)
    else: found.append(tree)
    return found


def _each(do, tree):
    "The same tree with every leaf changed; torch's own way, several times as slow, where a tree is of another kind."
    if isinstance(tree, torch.Tensor): return do(tree)
    if type(tree) is list: return [_each(do, x) for x in tree]
    if type(tree) is tuple: return tuple([_each(do, x) for x in tree])
    if type(tree) is dict: return {k: _each(do, x) for k, x in tree.items()}
    return tree_map(do, tree) if isinstance(tree, (list, tuple, dict)) else do(tree)


def _by_mask(func, args):
    "Whether an index is a mask, whose ones must be counted first (a single value is filled in without counting)."
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default): return False
    if func is not aten.index.Tensor and args[2].numel() == 1: return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) and _on(i) for i in args[1])


def _waits(func, args, kwargs, wanted):
    "Whether a GPU would make the process wait for it here."
    if func in READS or _by_mask(func, args): return True
    if func is aten._to_copy.default:
        from_cpu = not _on(args[0])
        return (not from_cpu and wanted == 'cpu') or (from_cpu and wanted == NAME and not kwargs.get('non_blocking'))
    if func is aten.copy_.default and _on(args[0]) != _on(args[1]):
        blocks = not (args[2] if len(args) > 2 else kwargs.get('non_blocking', False))
        return blocks or not _on(args[0])
    return False


def _call(func, args, kwargs, drawn):
    "Run the operation on the CPU; draws on the device come from its own state."
    if not drawn: return func(*args, **kwargs)
    state = torch.get_rng_state()
    torch.set_rng_state(DRAWS.get_state())
    try: return func(*args, **kwargs)
    finally:
        DRAWS.set_state(torch.get_rng_state())
        torch.set_rng_state(state)


def _run(func, args, kwargs):
    leaves = _leaves((args, kwargs), [])
    devices = [x for x in leaves if _on(x)]
    wanted = None if kwargs.get('device') is None else torch.device(kwargs['device']).type
    if devices and func not in MIXED and any(isinstance(x, torch.Tensor) and not _on(x) and x.dim() for x in leaves):
        raise RuntimeError(f'Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! (when checking {func})')
    to_device = wanted == NAME or (wanted is None and bool(devices))
    if func in INTO or func is aten.index.Tensor: to_device = _on(args[0])
    generators = [x for x in leaves if isinstance(x, torch._C.Generator)]
    if any((g._cdata in PRETENDING) != to_device for g in generators):
        raise RuntimeError(f"Expected a '{NAME if to_device else 'cpu'}' device type for generator, but found the other (when checking {func})")
    if (devices or to_device) and _waits(func, args, kwargs, wanted): _wait(func)
    plain_args, plain = _each(_inner, (args, kwargs))
    if wanted == NAME: plain['device'] = torch.device('cpu')
    if 'pin_memory' in plain: plain['pin_memory'] = False
    drawn = to_device and torch.Tag.nondeterministic_seeded in func.tags and not generators
    out = _call(func, plain_args, plain, drawn)
    if func is aten._local_scalar_dense.default: return out
    if args and _on(args[0]) and out is args[0]._inner: return args[0] # in place: the same object again
    return _each(_wrap, out) if to_device else out


class Accelerator(TorchDispatchMode):
    "Within this context the device can be found; `waits` counts the places that waited for it."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

    def __enter__(self):
        LIVE.append(self)
        self.start = len(WAITS)
        self.swap, self.generator = torch.__future__.get_swap_module_params_on_conversion(), torch.Generator
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch.Generator = OnGenerator
        return super().__enter__()

    def __exit__(self, *error):
        LIVE.remove(self)
        torch.Generator = self.generator
        torch.__future__.set_swap_module_params_on_conversion(self.swap)
        return super().__exit__(*error)

    @property
    def waits(self): return Counter(f'{place} {what}' for what, place in WAITS[self.start:])

    def forget(self):
        "Count from here."
        self.start = len(WAITS)


# Operations that reach the backend without passing the mode (made inside C++): the same rule
_fallbacks = torch.library.Library('_', 'IMPL')
_fallbacks.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), 'PrivateUse1')
_fallbacks.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
_made = torch.library.Library('aten', 'IMPL')
_made.impl('empty_strided', lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: OnDevice(torch.empty_strided(size, stride, dtype=dtype)), 'PrivateUse1')


def _copy_from(self, target, non_blocking=False):
    if _on(self) != _on(target) and not (non_blocking and _on(target)): _wait('copy')
    _inner(target).copy_(_inner(self))
    return target


_made.impl('_copy_from', _copy_from, 'PrivateUse1')

HALF = ('linear', 'conv1d', 'conv2d', 'conv3d', 'conv_transpose2d', 'convolution', 'matmul', 'mm', 'bmm', 'addmm', 'baddbmm', 'scaled_dot_product_attention')
FULL = ('layer_norm', 'group_norm', 'softmax.int', 'log_softmax.int', 'nll_loss', 'mse_loss', 'l1_loss', 'smooth_l1_loss', 'binary_cross_entropy_with_logits', 'cosine_similarity',
        'exp', 'log', 'pow.Tensor_Scalar', 'sum', 'sum.dim_IntList', 'cumsum', 'norm.ScalarOpt_dim', 'logsumexp')


def _autocast(name, half):
    op = getattr(aten, name.split('.')[0])
    op = getattr(op, name.split('.')[1] if '.' in name else op.overloads()[0] if 'default' not in op.overloads() else 'default')
    def cast(x):
        if not isinstance(x, torch.Tensor) or not _on(x) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16): return x
        return x.to(torch.get_autocast_dtype(NAME) if half else torch.float32)
    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*_each(cast, args), **_each(cast, kwargs))
    _made.impl(name, kernel, 'AutocastPrivateUse1')


for _name in HALF: _autocast(_name, True)
for _name in FULL: _autocast(_name, False)


class Elsewhere:
    "Stands for accelerate's object, and names the pretend device."
    device = DEVICE
    def __init__(self, plain): self.plain = plain
    def __getattr__(self, name): return getattr(self.plain, name)


def train_on_device(monkeypatch):
    "Let every training loop compute on the pretend device."
    from medvl.train import step
    plain = step.make_accelerator
    monkeypatch.setattr(step, 'make_accelerator', lambda config, folder: Elsewhere(plain(config, folder)))
