"""Weights are read whole or refused, and no file gets to run anything."""
import builtins
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvl.core.errors import DataError
from medvl.models.torch_file import RestrictedUnpickler
from medvl.models.checkpoints import compare_weights, load_weights, read_checkpoint


class Runs:
    "Would create a file when unpickled."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def net(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def omegaconf(monkeypatch):
    "A stand-in library whose lists end up inside the checkpoint, as omegaconf's do."
    module = types.ModuleType('omegaconf.listconfig')
    class ListConfig:
        def __init__(self, values): self.__dict__['_content'] = values; self.__dict__['_metadata'] = {'ref_type': typing_any}
        def __getstate__(self): return dict(self.__dict__)
        def __setstate__(self, d): self.__dict__.update(d)
    typing_any = dict
    ListConfig.__module__, ListConfig.__qualname__, module.ListConfig = 'omegaconf.listconfig', 'ListConfig', ListConfig
    monkeypatch.setitem(sys.modules, 'omegaconf', types.ModuleType('omegaconf'))
    monkeypatch.setitem(sys.modules, 'omegaconf.listconfig', module)
    return ListConfig


def released(path, model, config):
    opt = torch.optim.AdamW(model.parameters()); sum(p.sum() for p in model.parameters()).backward(); opt.step()
    torch.save({'model': model.state_dict(), 'optimizer': opt.state_dict(), 'scheduler': {'last_epoch': 3}, 'config': config, 'epoch': 10,
                'train_loss': torch.tensor(1.5), 'lr': np.float64(5e-5)}, path)
    return path


def test_released_layout_with_foreign_objects(tmp_path, omegaconf):
    model = net(); path = released(tmp_path / 'm.tar', model, {'scale': omegaconf([.8, 1.2]), 'name': 'x'})
    with pytest.raises(Exception, match='omegaconf'): torch.load(path, weights_only=True)
    c = read_checkpoint(path)
    assert c.extra['config'] == {'scale': [.8, 1.2], 'name': 'x'} and c.extra['epoch'] == 10 and c.extra['lr'] == 5e-5
    assert set(c.extra) == {'config', 'epoch', 'lr', 'scheduler'}
    assert list(c.weights) == list(model.state_dict()) and all(torch.equal(c.weights[k], v) for k, v in model.state_dict().items())


def test_the_real_omegaconf_where_it_is_installed(tmp_path):
    oc = pytest.importorskip('omegaconf').OmegaConf
    path = released(tmp_path / 'm.tar', net(), {'scale': oc.create([.8, 1.2]), 'deep': oc.create({'a': [1, {'b': None}]})})
    assert read_checkpoint(path).extra['config'] == {'scale': [.8, 1.2], 'deep': {'a': [1, {'b': None}]}}


@pytest.mark.parametrize('layout', ['safetensors', 'plain', 'model', 'state_dict', 'legacy', 'parameters'])
def test_every_layout(tmp_path, layout):
    model, path = net(), tmp_path / ('w.safetensors' if layout == 'safetensors' else 'w.pth')
    state = model.state_dict()
    if layout == 'safetensors': save_file(state, str(path))
    elif layout == 'parameters': torch.save({'model': dict(model.named_parameters()) | dict(model.named_buffers())}, path)
    else: torch.save({layout: state} if layout in ('model', 'state_dict') else state, path, _use_new_zipfile_serialization=layout != 'legacy')
    other = net(); report = load_weights(other, path)
    assert report.complete and len(report.loaded) == 7
    for k, v in other.state_dict().items(): assert torch.equal(v, state[k]), k


def test_views_dtypes_and_empty_tensors(tmp_path):
    base = torch.arange(12.)
    state = {'view': base.view(3, 4).t(), 'half': base.half(), 'bf': base.bfloat16(), 'long': base.long(), 'flag': base > 3, 'empty': torch.zeros(0, 2),
             'scalar': torch.tensor(2.), 'tail': base[5:], 'last': torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)}
    torch.save(state, tmp_path / 'w.pt')
    got = read_checkpoint(tmp_path / 'w.pt').weights
    for k, v in state.items(): assert torch.equal(got[k], v) and got[k].dtype == v.dtype, k


@pytest.mark.parametrize('where', ['model', 'config', 'top', 'legacy'])
def test_malicious_files_run_nothing(tmp_path, where):
    target, path = tmp_path / 'owned', tmp_path / 'evil.tar'
    evil = Runs(target)
    tree = {'model': evil if where == 'model' else net().state_dict(), 'config': evil if where == 'config' else {}}
    torch.save(evil if where == 'top' else tree | {'x': evil} if where == 'legacy' else tree, path, _use_new_zipfile_serialization=where != 'legacy')
    with pytest.raises(DataError, match='mkdir|refused'): read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize('module,name', [('builtins', 'eval'), ('builtins', 'getattr'), ('builtins', '__import__'), ('os', 'system'), ('posix', 'system'),
                                         ('torch', 'load'), ('torch.hub', 'load'), ('numpy', 'load'), ('functools', 'partial'), ('operator', 'attrgetter'),
                                         ('collections', 'OrderedDict.__class__'), ('torch._utils', '_rebuild_device_tensor_from_numpy')])
def test_no_other_name_is_ever_found(module, name):
    payload = b'c' + module.encode() + b'\n' + name.encode() + b'\n.'
    with pytest.raises(pickle.UnpicklingError, match='asks for'): RestrictedUnpickler(io.BytesIO(payload)).load()


def test_stand_ins_have_no_powers(monkeypatch):
    called = []
    monkeypatch.setattr(builtins, '__import__', lambda name, *a, _real=builtins.__import__, **k: (called.append(name), _real(name, *a, **k))[1])
    thing = RestrictedUnpickler(io.BytesIO(b'comegaconf.evil\nRun\n(S"rm"\ntR.')).load()
    assert type(thing).__name__ == 'Run' and 'omegaconf.evil' not in called


@pytest.mark.parametrize('share', [0, .02, .3, .7, .99])
@pytest.mark.parametrize('suffix', ['tar', 'safetensors', 'pth'])
def test_truncated_files(tmp_path, share, suffix):
    whole, path = tmp_path / f'whole.{suffix}', tmp_path / f'torn.{suffix}'
    if suffix == 'safetensors': save_file(net().state_dict(), str(whole))
    else: torch.save({'model': net().state_dict()}, whole, _use_new_zipfile_serialization=suffix == 'tar')
    path.write_bytes(whole.read_bytes()[:int(share * whole.stat().st_size)])
    module = net(); before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(DataError, match='torn'): load_weights(module, path)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / 'w.tar'; torch.save({'model': net().state_dict()}, path)
    with zipfile.ZipFile(path) as z: info = z.getinfo('w/data/0')
    data = bytearray(path.read_bytes()); at = info.header_offset
    data[at + 30 + int.from_bytes(data[at + 26:at + 28], 'little') + int.from_bytes(data[at + 28:at + 30], 'little')] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match='w.tar'): read_checkpoint(path)


def test_tensor_reaching_beyond_its_storage(tmp_path):
    path = tmp_path / 'w.pt'; torch.save({'a': torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as z: members = {n: z.read(n) for n in z.namelist()}
    key = next(n for n in members if n.endswith('data.pkl'))
    members[key] = members[key].replace(b'K\x04\x85', b'K\x7f\x85', 1)  # size 4 -> 127
    with zipfile.ZipFile(path, 'w') as z:
        for n, d in members.items(): z.writestr(n, d)
    with pytest.raises(DataError, match='beyond'): read_checkpoint(path)


@pytest.mark.parametrize('content', [b'', b'not weights', b'PK\x03\x04junk', b'\x80\x02}q\x00.', b'\x89PNG\r\n'])
@pytest.mark.parametrize('suffix', ['.tar', '.safetensors'])
def test_foreign_files(tmp_path, content, suffix):
    path = tmp_path / f'x{suffix}'; path.write_bytes(content)
    with pytest.raises(DataError, match='x'): read_checkpoint(path)
    with pytest.raises(DataError, match='no such file'): read_checkpoint(tmp_path / 'absent.tar')


def test_load_report_names_everything_and_nothing_is_half_loaded():
    module = net(); before = {k: v.clone() for k, v in module.state_dict().items()}
    weights = {k: v + 1 for k, v in before.items()}
    weights['9.extra'] = weights.pop('0.bias'); weights['0.weight'] = torch.zeros(5, 3)
    with pytest.raises(DataError, match='0.bias.*9.extra.*0.weight'): load_weights(module, weights)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    with pytest.warns(UserWarning, match='missing'): report = load_weights(module, weights, strict=False)
    assert (report.missing, report.unexpected, report.mismatched) == (['0.bias'], ['9.extra'], [('0.weight', (5, 3), (4, 3))])
    assert torch.equal(module.state_dict()['1.bias'], before['1.bias'] + 1) and torch.equal(module.state_dict()['0.weight'], before['0.weight'])


def test_prefix_ignore_and_nothing_fitting():
    weights = OrderedDict({f'image_encoder.{k}': v for k, v in net().state_dict().items()}) | {'image_encoder._fc.weight': torch.zeros(2), 'text.x': torch.zeros(1)}
    assert load_weights(net(), weights, prefix='image_encoder.', ignore=('_fc.',)).ignored == ['_fc.weight']
    with pytest.raises(DataError, match='0 tensors'): load_weights(net(), {'x': torch.zeros(1)}, strict=False)
    with pytest.raises(DataError, match='not finite: 0.bias'): load_weights(net(), net().state_dict() | {'0.bias': torch.full((4,), float('inf'))})
    assert compare_weights(net().state_dict(), net().state_dict()).complete


def test_channels_last_modules_keep_their_layout():
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    load_weights(conv, nn.Conv2d(3, 8, 3).state_dict())
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
