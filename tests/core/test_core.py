"""The core room: files that survive crashes, keyed randomness, strict configurations."""
import errno
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.config import config_dict, config_from_dict
from medvl.core.paths import append_jsonl, atomic_path, digest, read_json, read_jsonl, write_json
from medvl.core.provenance import provenance
from medvl.core.seed import key_of, numpy_rng, torch_generator


def test_kill_during_write_keeps_the_old_file(tmp_path):
    path = tmp_path/'a.json'
    write_json(path, {'old': 1})
    code = f"""
import os, signal
from medvl.core.paths import atomic_path
with atomic_path({str(path)!r}) as t:
    t.write_text('{{"new":')
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert read_json(path) == {'old': 1}


def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'a.json'
    write_json(path, {'old': 1})

    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): write_json(path, {'new': 1})
    monkeypatch.undo()
    assert read_json(path) == {'old': 1} and [p.name for p in tmp_path.iterdir()] == ['a.json']


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=10)


@given(json_values)
@settings(max_examples=50, deadline=None)
def test_json_round_trip_and_digest(tmp_path_factory, value):
    path = tmp_path_factory.mktemp('j')/'v.json'
    try: write_json(path, value)
    except UnicodeEncodeError: return  # lone surrogates are no text
    assert read_json(path) == value and digest(read_json(path)) == digest(value)


@given(st.integers(0, 80))
@settings(max_examples=40, deadline=None)
def test_torn_line_is_dropped(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp('l')/'log.jsonl'
    for i in range(3): append_jsonl(path, {'step': i, 'name': 'x}y'})
    raw = path.read_bytes()
    path.write_bytes(raw[:max(0, len(raw) - cut % 25)])
    rows = read_jsonl(path)
    assert [r['step'] for r in rows] == list(range(len(rows))) and len(rows) >= 2


def test_corrupt_line_is_an_error(tmp_path):
    (tmp_path/'l').write_text('{"a": 1}\n{"a": nonsense}\n{"a": 2}\n')
    with pytest.raises(ValueError, match='line 2'): read_jsonl(tmp_path/'l')


@given(st.lists(st.integers() | st.text(max_size=5) | st.floats(allow_nan=False), max_size=4))
@settings(max_examples=50, deadline=None)
def test_keys_are_stable_and_separate(parts):
    assert key_of(*parts) == key_of(*parts) and key_of(*parts) != key_of(*parts, 0) and 0 <= key_of(*parts) < 2**63


def test_keys_do_not_depend_on_the_process():
    code = 'from medvl.core.seed import *; print(key_of(1, "a", (2, 3.5)), numpy_rng(1, 2).integers(1 << 40), torch_generator(3).initial_seed())'
    runs = {subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONHASHSEED': s}, capture_output=True, text=True).stdout for s in '01'}
    assert runs == {f'{key_of(1, "a", (2, 3.5))} {numpy_rng(1, 2).integers(1 << 40)} {torch_generator(3).initial_seed()}\n'}


@dataclass
class Settings:
    lr: float = 1e-4
    names: tuple[str, ...] = ('a',)
    size: int|None = None


def test_config_round_trip_and_refusals():
    s = Settings(2.0, ('x', 'y'), 3)
    assert config_from_dict(Settings, config_dict(s)) == s
    with pytest.raises(ValueError, match="Did you mean 'names'"): config_from_dict(Settings, {'nmes': []})
    for bad in ({'lr': '1'}, {'size': True}, {'size': 1.5}, {'names': 'xy'}, {'names': [1]}):
        with pytest.raises(TypeError): config_from_dict(Settings, bad)


def test_provenance_names_what_matters(tmp_path):
    (tmp_path/'in').write_text('x')
    record = provenance([tmp_path/'in'], {'train': 1})
    assert record['versions']['torch'] and len(record['commit'] or 'x' * 40) == 40 and record['inputs'][0]['name'] == 'in'
    with pytest.raises(FileNotFoundError): provenance([tmp_path/'absent'])


def test_atomic_folder_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path/'run') as t:
        t.mkdir(); (t/'x').write_text('1'); raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_seeding_leaves_nothing_behind():
    "`torch.manual_seed` queues a traceback for every device that is not there; a training seeds at every step."
    import torch
    from medvl.core.seed import key_of, seed_torch
    before = len(torch.cuda._queued_calls)
    for step in range(50): seed_torch(3, 'step', step)
    assert len(torch.cuda._queued_calls) == before
    drawn = torch.rand(5)
    torch.manual_seed(key_of(3, 'step', 49))
    assert torch.equal(drawn, torch.rand(5))
