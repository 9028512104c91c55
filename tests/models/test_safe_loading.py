"""What a stranger's file or folder may not do: become gigabytes, be called a checkpoint when it is a web page, open or contact anything outside itself, fail with anything but a DataError."""
import io
import json
import pickle
import shutil
import socket
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import medvl.api as api
from medvl.core.errors import DataError
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.base import from_pretrained, save_pretrained
from medvl.methods.classifier import Classifier, ClassifierConfig
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig, released_config
from medvl.methods.released.mammoclip_files import convert_released, released_state, stored_config
from medvl.models.checkpoints import Checkpoint, load_weights, read_checkpoint
from medvl.models.torch_file import MAX_DEPTH, RestrictedUnpickler, plain_containers


# files ---------------------------------------------------------------------------------------------------------------------------------------
def rebuilt(size, stride, count):
    "A pickle of {'model': {'a': tensor}} whose tensor claims `size` and `stride` on a storage of `count` floats."
    number = lambda n: b'J' + struct.pack('<i', n)
    return (b'\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'
            + number(count) + b'tQK\x00' + number(size) + b'\x85' + number(stride) + b'\x85\x89ccollections\nOrderedDict\n)RtRss.')


def zipped(path, data, storage=b'\0' * 16, **how):
    with zipfile.ZipFile(path, 'w', **how) as z:
        z.writestr('a/data.pkl', data); z.writestr('a/data/0', storage)


def laughs(n=30):
    state = {'a': torch.zeros(1)}
    shared = ['ha']
    for _ in range(n): shared = [shared] * 10
    return {'model': state, 'config': shared}


def bombs(folder):
    "name -> file of at most some kilobytes that would become gigabytes."
    def at(name): return folder/f'{name}.pt'
    zipped(at('stride'), rebuilt(1 << 30, 0, 4))
    zipped(at('reach'), rebuilt(1 << 30, 1, 4))
    zipped(at('memo'), b'\x80\x02}r' + struct.pack('<I', 1 << 31) + b'.')
    zipped(at('array'), b'\x80\x05\x96' + struct.pack('<Q', 1 << 40) + b'.')
    zipped(at('tuples'), b'\x80\x02}K\x01' + b'\x85' * 200_000 + b'K\x01s.')
    zipped(at('copies'), b'\x80\x02(' + b'cbuiltins\nlist\nq\x00(' + b'K\x01' * 60_000 + b'lq\x01\x85R' + b'h\x00h\x01\x85R' * 2000 + b'l.')
    zipped(at('text'), b'\x80\x02cbuiltins\nstr\n]\x85R.')
    zipped(at('zip'), rebuilt(4, 1, 4), b'\0' * 40_000_000, compression=zipfile.ZIP_DEFLATED)
    torch.save(laughs(), at('laughs')); torch.save(laughs(), at('older_laughs'), _use_new_zipfile_serialization=False)
    head = pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    at('older_stride').write_bytes(head + rebuilt(1 << 30, 0, 4).replace(b'tQ', b'NtQ') + pickle.dumps(['0'], 2) + struct.pack('<q', 4) + b'\0' * 16)
    at('older_storage').write_bytes(head + rebuilt(4, 1, 4).replace(b'tQ', b'NtQ') + pickle.dumps(['0'], 2) + struct.pack('<q', 1 << 40) + b'\0' * 16)
    overlapping(at('overlap'))
    return sorted(folder.glob('*.pt'))


def overlapping(path):
    "Many entries of the directory that all point at the same bytes."
    zipped(path, rebuilt(4, 1, 4), b'\0' * 4_000)
    with zipfile.ZipFile(path, 'a') as z:
        first = z.getinfo('a/data/0')
        for i in range(1, 2000):
            again = zipfile.ZipInfo(f'a/data/{i}')
            again.header_offset, again.CRC, again.file_size, again.compress_size = first.header_offset, first.CRC, first.file_size, first.compress_size
            z.filelist.append(again); z.NameToInfo[again.filename] = again
        z._didModify = True


def test_bombs_are_refused_cheaply(tmp_path):
    for path in bombs(tmp_path):
        tracemalloc.start(); begun = time.process_time()
        with pytest.raises(DataError, match=path.name): read_checkpoint(path)
        peak, took = tracemalloc.get_traced_memory()[1], time.process_time() - begun
        tracemalloc.stop()
        assert peak < 120 << 20 and took < 10, f'{path.name}: {peak >> 20} MB, {took:.1f} s'


@pytest.mark.parametrize('new', [True, False])
def test_both_formats_give_the_same_tensors(tmp_path, new):
    base = torch.arange(24.)
    state = {'view': base.view(4, 6).t(), 'tied': base, 'half': base.half(), 'long': base.long(), 'flag': base > 3, 'empty': torch.zeros(0, 2), 'scalar': torch.tensor(2.), 'tail': base[5:],
             'parameter': nn.Parameter(base.clone())}
    torch.save({'model': OrderedDict(state), 'epoch': 3, 'optimizer': {'state': {0: base}, 'param_groups': []}}, tmp_path/'w.pt', _use_new_zipfile_serialization=new)
    got = read_checkpoint(tmp_path/'w.pt')
    assert list(got.weights) == list(state) and got.extra == {'epoch': 3}
    for k, v in state.items(): assert torch.equal(got.weights[k], v) and got.weights[k].dtype == v.dtype, k


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_changed_byte_is_a_data_error_or_harmless(tmp_path, where, value, new):
    path = tmp_path/f'{new}.pt'
    torch.save({'model': {'w': torch.arange(6.), 'n': torch.tensor(3)}, 'epoch': 3, 'config': {'a': [1, 2]}}, path, _use_new_zipfile_serialization=new)
    data = bytearray(path.read_bytes()); data[where % len(data)] = value
    path.write_bytes(data)
    try: read_checkpoint(path)
    except DataError as e: assert path.name in str(e)


@pytest.mark.parametrize('content, says', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n', 'Git LFS pointer'), (b'\n<!DOCTYPE html><html>', 'web page'), (b'<html><body>404', 'web page'),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'XML'), (b'{"message": "Not Found"}', 'message of a server'), (b'', 'empty'),
    (b'\x1f\x8b' + b'0' * 100, 'gzip'), (b'PK\x03\x04' + b'0' * 100, 'truncated'), (b'hello', 'not a torch file')])
@pytest.mark.parametrize('suffix', ['tar', 'pth', 'safetensors'])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, says, suffix):
    (tmp_path/f'b5.{suffix}').write_bytes(content)
    with pytest.raises(DataError, match=f'b5.{suffix}') as e: read_checkpoint(tmp_path/f'b5.{suffix}')
    assert 'weights_only' not in str(e.value)
    if suffix != 'safetensors' or says not in ('truncated', 'not a torch file'): assert says in str(e.value)


def test_safetensors_are_known_by_their_beginning(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.ones(2)}, str(tmp_path/'model.bin'))
    assert torch.equal(read_checkpoint(tmp_path/'model.bin').weights['a'], torch.ones(2))


def test_values_in_a_circle_and_too_deep():
    circle = {}; circle['x'] = [circle]
    with pytest.raises(DataError, match='itself'): plain_containers(circle)
    deep = []
    for _ in range(MAX_DEPTH + 5): deep = [deep]
    with pytest.raises(DataError, match='deep'): plain_containers(deep)
    shared = [1, 2]
    twice = plain_containers({'a': shared, 'b': shared})
    assert twice == {'a': [1, 2], 'b': [1, 2]} and twice['a'] is twice['b']


def test_python_2_and_lightning_names_need_no_import():
    assert RestrictedUnpickler(io.BytesIO(b'c__builtin__\nunicode\n(S"a"\ntR.')).load() == 'a'
    for name in (b'coperator\nattrgetter', b'cpytorch_lightning_evil\nX', b'cmodelsx.y\nZ', b'cposix\nsystem'):
        with pytest.raises(pickle.UnpicklingError, match='asks for'): RestrictedUnpickler(io.BytesIO(name + b'\n.')).load()


# wrappers ------------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
def test_parallel_and_compiled_prefixes_are_taken_off(tmp_path, prefix):
    small = Classifier(ClassifierConfig(labels=('mass',), image_encoder='efficientnet-tiny', frozen=False))
    torch.save({'model': {prefix + k: v for k, v in released_state(small).items()}}, tmp_path/'b.pth')
    found = convert_released(tmp_path/'b.pth', tmp_path/'out', labels='mass')
    assert (found.table.status == 'loaded').all()
    x = torch.randint(0, 255, (1, 1, 64, 64), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(from_pretrained(tmp_path/'out').predict(x), small.eval().predict(x))
    torch.save({prefix + k: v for k, v in nn.Linear(2, 3).state_dict().items()}, tmp_path/'l.pt')
    assert load_weights(nn.Linear(2, 3), tmp_path/'l.pt').complete and load_weights(nn.Linear(2, 3), tmp_path/'l.pt', prefix=prefix).complete


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    torch.save({'module.weight': torch.zeros(2), 'bias': torch.zeros(2)}, tmp_path/'m.pt')
    assert set(read_checkpoint(tmp_path/'m.pt').weights) == {'module.weight', 'bias'}


def test_the_loss_section_of_a_released_file_is_kept():
    config = MammoCLIPConfig(text_encoder='bert-base-clinical-config', label_smoothing=.1, i2i_weight=.7, t2t_weight=.2)
    again = released_config(Checkpoint({}, {'config': stored_config(config)}))
    assert (again.label_smoothing, again.i2i_weight, again.t2t_weight) == (.1, .7, .2)


# folders -------------------------------------------------------------------------------------------------------------------------------------
TOKENIZER = build_wordpiece(['a mass in the left breast', 'no calcification'], size=120)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    method = MammoCLIP(MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', dim=16, text_pretrained=False), TOKENIZER)
    return api.Model(method, size=(64, 64)).save_pretrained(tmp_path_factory.mktemp('saved')/'m')


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    "A copy to damage; any contact fails the test."
    def contact(*a, **k): raise AssertionError(f'something was contacted: {a}')
    monkeypatch.setattr(socket.socket, 'connect', contact); monkeypatch.setattr(socket, 'getaddrinfo', contact)
    return shutil.copytree(saved, tmp_path/'m')


def change(file, *path, value):
    "Change one value of a JSON file."
    tree = json.loads(file.read_text()); place = tree
    for k in path[:-1]: place = place[k]
    place[path[-1]] = value
    file.write_text(json.dumps(tree))


def test_a_sound_folder_opens_without_contact(folder): assert api.load(folder).method.name == 'mammoclip'


@pytest.mark.parametrize('field, value', [('image_encoder', '{here}'), ('image_encoder', 'owner/name'), ('image_encoder', 'decoy'), ('text_encoder', '{here}'), ('text_encoder', 'owner/name'),
                                          ('tokenizer', '{here}/vocab.txt'), ('tokenizer', 'owner/name'), ('image_weights', '{here}/w.pth'), ('text_pretrained', True), ('image_pretrained', True)])
def test_a_configuration_may_not_lead_outside(folder, tmp_path, monkeypatch, field, value):
    (tmp_path/'decoy').mkdir(); monkeypatch.chdir(tmp_path)
    if field == 'text_encoder': shutil.rmtree(folder/'text_encoder')
    change(folder/'config.json', 'config', field, value=value.format(here=tmp_path) if isinstance(value, str) else value)
    with pytest.raises(DataError, match=f'outside.*{field}'): api.load(folder)


def test_code_beside_a_tokenizer_is_not_run(folder, tmp_path):
    target = tmp_path/'ran'
    for part in ('tokenizer', 'text_encoder'):
        (folder/part/'evil.py').write_text(f'open({str(target)!r}, "w")\nclass T: pass\n')
        for name in ('config.json', 'tokenizer_config.json'):
            if (folder/part/name).is_file():
                change(folder/part/name, 'auto_map', value={'AutoConfig': 'evil.T', 'AutoModel': 'evil.T', 'AutoTokenizer': ['evil.T', 'evil.T']})
    try: api.load(folder)
    except DataError: pass
    assert not target.exists()


@pytest.mark.parametrize('damage', [b'', b'{}', b'[]', b'null', b'{"method": ', b'\xff\xfe\x00', b'[' * 20_000, b'{"method": 3, "config": [1]}', None], ids=repr)
def test_every_damaged_file_is_a_data_error(folder, damage):
    for file in sorted(p for p in folder.rglob('*') if p.is_file()):
        kept = file.read_bytes()
        if damage is None: file.unlink()
        else: file.write_bytes(damage)
        try: api.load(folder)
        except DataError as e: assert 'm' in str(e)
        file.write_bytes(kept)
    assert api.load(folder)


@pytest.mark.parametrize('file, path, value', [
    ('config.json', ('config', 'dim'), 10**12), ('config.json', ('config', 'dim'), -3), ('config.json', ('config', 'dim'), float('nan')), ('config.json', ('config', 'dim'), '16'),
    ('text_encoder/config.json', ('hidden_size',), 10**9), ('text_encoder/config.json', ('vocab_size',), 10**11), ('text_encoder/config.json', ('num_hidden_layers',), -1), ('text_encoder/config.json', ('num_hidden_layers',), 10**8),
    ('preprocess.json', ('size',), [10**9, 64]), ('preprocess.json', ('size',), [64, True]), ('preprocess.json', ('size',), [64.5, 64]), ('preprocess.json', ('size',), '64 64'),
    ('preprocess.json', ('size',), None), ('preprocess.json', ('profile',), ['x'])])
def test_stored_numbers_are_bounded(folder, file, path, value):
    change(folder/file, *path, value=value)
    begun = time.process_time()
    with pytest.raises(DataError): api.load(folder)
    assert time.process_time() - begun < 20


def test_asked_for_a_folder_may_lead_outside(folder, tmp_path):
    "The weights still must fit."
    change(folder/'config.json', 'config', 'image_weights', value=str(tmp_path/'none.pth'))
    with pytest.raises(DataError, match='none.pth'): from_pretrained(folder, allow_outside=True)


def test_what_was_saved_before_still_opens(tmp_path):
    method = Classifier(ClassifierConfig(labels=('mass',), image_encoder='efficientnet-tiny'))
    assert from_pretrained(save_pretrained(method, tmp_path/'c')).config.labels == ('mass',)
