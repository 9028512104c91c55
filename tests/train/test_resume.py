"""Kill at any moment, start again with other workers: the bits are those of the run that was never killed."""
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import Breasts, Pairs, contents, run, settings, small, tiny_mammoclip

from medvl.core.errors import DataError
from medvl.core.paths import read_json, read_jsonl, sha256_file, write_json
from medvl.train.checkpoint import TornCheckpoint, checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from medvl.train.loop import train

fork = multiprocessing.get_context('fork')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    run(folder)
    return contents(folder)


def kill_after(folder, lines, **changes):
    "Start a process, kill it with SIGKILL once the metrics have so many lines; give whether it was still running."
    child = fork.Process(target=run, args=(folder,), kwargs=changes)
    child.start()
    while child.is_alive() and len(read_jsonl(Path(folder)/'metrics.jsonl')) < lines: time.sleep(0.001)
    time.sleep(random.Random(lines).random() * 0.01)
    alive = child.is_alive()
    if alive: os.kill(child.pid, signal.SIGKILL)
    child.join()
    return alive


def test_killed_many_times_with_changing_workers(tmp_path, whole):
    "A dozen kills at random moments, 0 and 2 loader workers in turn: same weights, moments, averages, best weights and metrics."
    killed, draw = 0, random.Random(3)
    for attempt in range(12):
        known = len(read_jsonl(tmp_path/'metrics.jsonl'))
        killed += kill_after(tmp_path, known + draw.randint(-2, 6), workers=2 * (attempt % 4 == 1))
    assert killed >= 6
    run(tmp_path, method=small(seed=99), workers=1)
    files, rows = contents(tmp_path)
    assert files == whole[0] and len(files) == 5
    assert rows == whole[1]
    steps = [r['step'] for r in rows if r['kind'] == 'train']
    assert steps == list(range(1, 19))


@pytest.mark.parametrize('call', ['os.replace', 'save_file', 'checksums', 'rmtree'])
def test_killed_inside_a_checkpoint(tmp_path, whole, call):
    "Death at the worst places: between files, before and during renames, while old ones are removed."
    def dies():
        import medvl.train.checkpoint as module
        count = [0]
        def deadly(real, at):
            def f(*args, **kwargs):
                count[0] += 1
                if count[0] == at: os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return f
        if call == 'os.replace': os.replace = deadly(os.replace, 14)
        elif call == 'rmtree': module.shutil.rmtree = deadly(shutil.rmtree, 3)
        elif call == 'save_file': module.save_file = deadly(module.save_file, 8)
        else: module.sha256_file = deadly(sha256_file, 7)
        run(tmp_path)
    child = fork.Process(target=dies)
    child.start(); child.join()
    assert child.exitcode == -signal.SIGKILL
    run(tmp_path)
    assert contents(tmp_path) == whole
    assert not [p for p in tmp_path.rglob('.*') if p.name.endswith(('.tmp', '.old'))]


def test_a_real_process_killed(tmp_path, whole):
    "The same through the command line: a fresh interpreter, and a fresh one after the kill."
    command = [sys.executable, str(Path(__file__).parents[1]/'training.py'), str(tmp_path), '{"workers": 2}']
    child = subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while child.poll() is None and len(read_jsonl(tmp_path/'metrics.jsonl')) < 7: time.sleep(0.002)
    child.kill(); child.wait()
    before = len(read_jsonl(tmp_path/'metrics.jsonl'))
    assert 7 <= before < len(whole[1])
    run(tmp_path)
    assert contents(tmp_path) == whole


def test_mammoclip_with_augmentation(tmp_path):
    "The real system, dropout and drop-connect and GradCache on, augmentation keyed by sample, two workers after the kill."
    from medvl.data.augment.breast_versions import Augment
    def go(folder, **changes):
        kwargs = dict(epochs=2, batch_size=8, accumulate=1, chunk_size=4, save_every=1, lr=1e-3, warmup=0, valid_every=2)
        return run(folder, tiny_mammoclip(drop_connect=0.3, dropout=0.2), Breasts(), Breasts(6), transform=Augment(), **{**kwargs, **changes})
    go(tmp_path/'a')
    def dies(folder):
        train(tiny_mammoclip(drop_connect=0.3, dropout=0.2), Breasts(), settings(epochs=2, batch_size=8, accumulate=1, chunk_size=4, save_every=1, lr=1e-3, warmup=0,
              valid_every=2), folder, Breasts(6), Augment(), lambda m, s: os.kill(os.getpid(), signal.SIGKILL))
    child = fork.Process(target=dies, args=(tmp_path/'b',))
    child.start(); child.join()
    assert child.exitcode == -signal.SIGKILL and [p.name for p in checkpoints(tmp_path/'b'/'checkpoints')] == ['step-00000001']
    go(tmp_path/'b', workers=2)
    assert contents(tmp_path/'a') == contents(tmp_path/'b')


def test_sigterm_saves_and_stops(tmp_path, whole):
    "A cluster's SIGTERM lets the step finish, saves, and leaves a run that goes on exactly."
    def ask(method, state):
        if state.step == 5: os.kill(os.getpid(), signal.SIGTERM)
        return {}
    with pytest.raises(KeyboardInterrupt, match='SIGTERM after step 5 of 18'): run(tmp_path, validate=ask, save_every=100)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert checkpoints(tmp_path/'checkpoints')[0].name == 'step-00000005'
    run(tmp_path)
    files, rows = contents(tmp_path)
    assert files == whole[0] and rows == whole[1]


# Damaged checkpoints

def damaged(folder, how):
    newest = checkpoints(folder/'checkpoints')[0]
    file = newest/'model.safetensors'
    if how == 'truncated': os.truncate(file, file.stat().st_size // 2)
    elif how == 'empty': file.write_bytes(b'')
    elif how == 'missing': file.unlink()
    elif how == 'bit': data = bytearray(file.read_bytes()); data[-1] ^= 4; file.write_bytes(data)
    elif how == 'no checksums': (newest/'checksums.json').unlink()
    elif how == 'torn json': os.truncate(newest/'checksums.json', 20)
    elif how == 'state': (newest/'state.json').write_text((newest/'state.json').read_text().replace('"bad": 0', '"bad": 1').replace('"stopped"', '"Stopped"'))
    return newest


@pytest.mark.parametrize('how', ['truncated', 'empty', 'missing', 'bit', 'no checksums', 'torn json', 'state'])
def test_damaged_checkpoint_is_passed_over(tmp_path, whole, how, capsys):
    run(tmp_path)
    newest = damaged(tmp_path, how)
    with pytest.raises(TornCheckpoint): load_checkpoint(newest)
    run(tmp_path)
    assert 'damaged checkpoint passed over' in capsys.readouterr().err
    assert contents(tmp_path) == whole


def test_all_checkpoints_damaged(tmp_path):
    run(tmp_path, keep_last=1, keep_best=False)
    damaged(tmp_path, 'truncated')
    with pytest.raises(TornCheckpoint, match='none of the 1 checkpoints is whole'): run(tmp_path, keep_last=1, keep_best=False)


def test_malicious_checkpoint_runs_no_code(tmp_path):
    "A pickle in the place of the weights, with a right checksum, is refused by its format and never executed."
    import pickle
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/executed',)
    folder = save_checkpoint(tmp_path, 5, {'model': {'w': torch.zeros(2)}}, {})
    (folder/'model.safetensors').write_bytes(pickle.dumps(Evil()))
    listed = read_json(folder/'checksums.json')
    listed['model.safetensors'] = {'bytes': (folder/'model.safetensors').stat().st_size, 'sha256': sha256_file(folder/'model.safetensors')}
    write_json(folder/'checksums.json', listed)
    with pytest.raises(TornCheckpoint, match='not safetensors'): load_checkpoint(folder)
    assert not (tmp_path/'executed').exists()


def test_disk_full(tmp_path):
    "A file-size limit stands for the full disk: a clear error, the earlier checkpoint whole, no leftovers; with room again the run goes on."
    run(tmp_path/'whole', save_every=6)
    def fills(queue):
        import medvl.train.loop as loop
        real = loop.save_checkpoint
        def limited(root, step, tensors, state):
            if step >= 12: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return real(root, step, tensors, state)
        loop.save_checkpoint = limited
        try: run(tmp_path/'run', save_every=6)
        except OSError as e: queue.put(str(e))
    queue = fork.Queue()
    child = fork.Process(target=fills, args=(queue,))
    child.start(); message = queue.get(timeout=30); child.join()
    assert 'the disk is full: the checkpoint of step 12 needs' in message and 'step-00000006 is intact' in message
    assert latest_checkpoint(tmp_path/'run'/'checkpoints')[2]['step'] == 6
    assert not list((tmp_path/'run'/'checkpoints').glob('.*'))
    run(tmp_path/'run', save_every=6)
    assert contents(tmp_path/'run') == contents(tmp_path/'whole')


# Another run in the folder

@pytest.mark.parametrize('changes,named', [
    (dict(lr=1e-3), r'train\.lr: 0\.03 -> 0\.001'), (dict(seed=5), r'train\.seed: 0 -> 5'), (dict(epochs=7), r'train\.epochs: 6 -> 7'),
    (dict(data=Pairs(50)), 'data: '), (dict(valid=Pairs(25)), 'valid_data: '), (dict(method=small(width=8)), r'method\.width: 16 -> 8'),
    (dict(transform=len), "transform: None -> ")])
def test_another_run_is_refused(tmp_path_factory, changes, named):
    folder = tmp_path_factory.getbasetemp()/'refused'
    if not folder.exists(): run(folder)
    before = contents(folder)
    with pytest.raises(DataError, match=named): run(folder, **changes)
    assert contents(folder) == before


def test_resume_false_refuses_a_used_folder(tmp_path):
    run(tmp_path)
    with pytest.raises(DataError, match='holds a run already'): run(tmp_path, resume=False)


def test_finished_run_is_returned(tmp_path):
    _, first = run(tmp_path)
    method, again = run(tmp_path, method=small(seed=3))
    assert again.step == first.step == 18 and again.stopped == 'finished' and again.best_value == first.best_value
    assert torch.equal(method.text_encoder.weight, run(tmp_path)[0].text_encoder.weight)


def test_constant_schedule_can_be_prolonged(tmp_path):
    run(tmp_path/'long', schedule='constant')
    run(tmp_path/'short', schedule='constant', epochs=3)
    run(tmp_path/'short', schedule='constant')
    a, b = (load_checkpoint(checkpoints(tmp_path/x/'checkpoints')[0])[0] for x in ('long', 'short'))
    assert all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


def test_other_machine_is_said(tmp_path):
    run(tmp_path, epochs=1, schedule='constant')
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match='not to the bit'): run(tmp_path, epochs=2, schedule='constant')
    finally: torch.set_num_threads(1)


PLATEAU = dict(schedule='plateau', warmup=0, optimizer='adam', lr=3e-1, head_warmup=3, head_lr=1e-2, plateau_patience=0, valid_every=2, save_every=2, epochs=8)


def test_plateau_and_head_warm_up_resume_exactly(tmp_path):
    "Killed again and again: the plateau's memory is in the checkpoint, so rates and weights are those of the run that never died."
    run(tmp_path/'whole', **PLATEAU)
    files, rows = contents(tmp_path/'whole')
    rates = [r['lr'] for r in rows if r['kind'] == 'train']
    assert rates[:3] == [1e-2] * 3 and rates[3] == pytest.approx(3e-1)
    assert rates[-1] < 3e-1 / 3, 'the rate must really fall'
    killed = sum(kill_after(tmp_path/'cut', 6 * attempt + 5, **PLATEAU) for attempt in range(6))
    assert killed >= 3
    run(tmp_path/'cut', method=small(seed=99), **PLATEAU)
    assert contents(tmp_path/'cut') == (files, rows)


def test_plateau_needs_validation_and_its_metric(tmp_path):
    with pytest.raises(ValueError, match='needs validation'): run(tmp_path/'a', valid=None, **PLATEAU)
    with pytest.raises(ValueError, match='valid_los'): run(tmp_path/'b', plateau_monitor='valid_los', **PLATEAU)
    with pytest.raises(ValueError, match='head_warmup=30'): run(tmp_path/'c', **{**PLATEAU, 'head_warmup': 30, 'epochs': 2})
