"""The lines of nbs/guides work as they are written: each is read from the guide and run, with this machine for every host."""
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medvl.core.paths import read_json, read_jsonl
from medvl.core.run import Run, run_folders
from medvl.data.prepare.run import prepare
from medvl.data.releases.folder import read_folder
from medvl.data.source_split import split_source
from medvl.run.parameters import RefusedError
from medvl.run.runner import run_experiment
from medvl.run.sweep import plan_sweep

REPO = Path(__file__).resolve().parents[2]
GUIDE = (REPO/'nbs'/'guides'/'gpu_and_cluster.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', GUIDE, re.M | re.S)


def lines(word): return [line for _, block in BLOCKS for line in block.splitlines() if word in line]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with `prepared`, and a bin/ in which `medvl` and `torchrun` are this environment's."
    base = tmp_path_factory.mktemp('cluster')
    salt = base/'salt.txt'
    salt.write_text('a salt for tests\n')
    prepare(split_source(read_folder(REPO/'data_csv'), seed=0), REPO/'data_csv', base/'prepared', size=(48, 32), jobs=1, salt=salt)
    (base/'bin').mkdir()
    for name, module in (('medvl', 'medvl.commands'), ('torchrun', 'torch.distributed.run')):
        run = f'{sys.executable} -c "from medvl.commands import main; main()"' if name == 'medvl' else f'{sys.executable} -m {module}'
        (base/'bin'/name).write_text(f'#!/bin/bash\nexec {run} "$@"\n')
        (base/'bin'/name).chmod(0o755)
    return base


def environment(place, **more):
    return {**os.environ, 'PATH': f'{place/"bin"}{os.pathsep}{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1', 'MEDVL_SALT': str(place/'salt.txt'), 'MEDVL_OUTPUTS': str(place/'outputs'),
            'PYTHONPATH': os.pathsep.join([str(REPO), os.environ.get('PYTHONPATH', '')]), **more}


def start(place, line, **more):
    return subprocess.Popen(['bash', '-c', line], cwd=place, env=environment(place, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(processes, seconds=400):
    said = [(p.communicate(timeout=seconds)[0], p.returncode) for p in processes]
    assert [code for _, code in said] == [0]*len(said), '\n'.join(text[-1500:] for text, _ in said)
    return [text for text, _ in said]


def here(line, place, port): # the guide's names, on this machine, small
    return (line.replace('node0:29500', f'127.0.0.1:{port}').replace('node0', '127.0.0.1').replace('29500', str(port)).replace('/shared/', f'{place}/shared/')
            .replace('config=b5', 'config=smoke -p batch_size=4').replace('--processes 8', '--processes 1'))


def test_processes_is_one_command(place):
    line, = [x for x in lines('--processes 8') if 'hosts' not in x]
    said, = ended([start(place, here(line, place, 0).replace('--processes 1', '--processes 2'))])
    run = Run(run_folders(place/'outputs')[-1])
    assert run.params['processes'] == 2 and 'done:' in said and (run.folder/'training'/'best'/'config.json').exists() and 'medvl-mammoclip' in os.listdir(run.folder/'training'/'tensorboard')


def test_two_hosts_one_command_each(place):
    both, port = [x for x in lines('-p hosts=2')], free_port()
    assert len(both) == 2 and [re.search(r'-p host=(\d)', x)[1] for x in both] == ['0', '1']
    ended([start(place, here(x, place, port), MEDVL_OUTPUTS=str(place/f'host{k}')) for k, x in enumerate(both)])
    runs = [Run(run_folders(place/f'host{k}')[-1]) for k in range(2)]
    a, b = ((r.folder/'model'/'config.json') for r in runs)
    assert read_json(a)['weights_sha256'] == read_json(b)['weights_sha256'] and not (runs[1].folder/'training'/'best').exists()
    assert len(list((place/'shared'/'run1'/'checkpoints').iterdir())) >= 1


def test_the_slurm_script(place):
    "srun starts the line once a node, with its number; scontrol names the nodes."
    script, = [block for kind, block in BLOCKS if kind == 'bash']
    port, names = free_port(), ' '.join(['localhost']*2)
    for name, text in (('scontrol', 'printf "127.0.0.1\\n127.0.0.1\\n"'), ('srun', 'for k in 0 1; do SLURM_NODEID=$k MEDVL_OUTPUTS=$PWD/slurm$k "$@" & pids="$pids $!"; done; for p in $pids; do wait $p || exit 1; done')):
        (place/'bin'/name).write_text(f'#!/bin/bash\n{text}\n')
        (place/'bin'/name).chmod(0o755)
    path = place/'pretrain.sbatch'
    path.write_text(here(script, place, port).replace('/shared/run1', '/shared/slurm'))
    ended([start(place, f'bash {path}', SLURM_JOB_NODELIST=names, SLURM_NNODES='2')])
    assert all(Run(run_folders(place/f'slurm{k}')[-1]).state == 'done' for k in range(2))


def test_torchrun_with_the_script_of_the_guide(place):
    script, = [block for kind, block in BLOCKS if kind == 'python']
    (place/'together.py').write_text(script)
    one, *two = lines('torchrun --')
    port = free_port()
    assert len(two) == 2
    ended([start(place, one.replace('torchrun ', f'torchrun --master-port {free_port()} '))])
    ended([start(place, here(x, place, port)) for x in two])
    from safetensors.torch import load_file
    a, b = (load_file(place/r/'last'/'model.safetensors') if (place/r/'last'/'model.safetensors').exists() else load_file(next((place/r/'last').glob('*.safetensors'))) for r in ('run1', 'run2'))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a) # two nodes of one process are two processes, to the bit


def test_submitit_would_ask_for_what_the_guide_says(place, tmp_path):
    "A dry run: what stands behind -o becomes lines of the batch script; nothing is submitted."
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string
    line, = lines('--backend slurm')
    told = dict(x.split('=') for x in re.findall(r'-o (\S+)', line))
    told = {k: int(v) if v.isdigit() else v for k, v in told.items()}
    shared = SlurmExecutor._equivalence_dict() # submitit's names -> sbatch's
    params = {shared.get(k, k.removeprefix('slurm_')): v for k, v in told.items()}
    if 'mem' in params: params['mem'] = f'{params["mem"]}GB'
    text = _make_sbatch_string(command='medvl', folder=tmp_path, **params)
    assert '#SBATCH --partition=gpu' in text and '#SBATCH --gpus-per-node=1' in text and '#SBATCH --mem=64GB' in text and '#SBATCH --time=600' in text
    axes = dict(x.split('=') for x in re.findall(r'-g (\S+)', line))
    folder = plan_sweep('pretrain', {k: v.split(',') for k, v in axes.items()}, dict(data=str(place/'prepared')), outputs=tmp_path/'out')
    assert folder.name.startswith('sweep-pretrain') and any(folder.iterdir())


def test_every_line_of_medvl_is_known(place, monkeypatch):
    "The other lines at least parse: no option and no parameter is mistyped."
    monkeypatch.chdir(place)
    from medvl.run.parameters import check_parameters, parse_assignments
    from medvl.run.runner import experiments
    for line in lines('medvl run pretrain'):
        words = shlex.split(line.split("srun bash -c '")[-1].rstrip("'"))
        given = parse_assignments([w for flag, w in zip(words, words[1:]) if flag == '-p'])
        check_parameters(experiments()['pretrain'], {k: 'prepared' if k == 'data' else '0' if str(v).startswith('$') and k == 'host' else '2' if str(v) == '$SLURM_NNODES' else v for k, v in given.items()})


def test_a_run_goes_on_with_other_processes(place):
    "Killed in the middle with two, it goes on with one; the run says so, in its journal and in its folder."
    p = start(place, 'exec medvl run pretrain -p data=prepared -p batch_size=4 -p max_steps=60 -p save_every=1 --processes 2', MEDVL_OUTPUTS=str(place/'resumed'))
    end = time.monotonic() + 300
    while not (made := list((place/'resumed').glob('*/training/checkpoints/step-*'))) and p.poll() is None and time.monotonic() < end: time.sleep(.2)
    p.terminate()
    said = p.communicate(timeout=60)[0]
    assert made and p.returncode == 143, said[-2000:]
    run, = (Run(f) for f in run_folders(place/'resumed'))
    assert run.state == 'killed'
    with pytest.raises(RefusedError, match='need a run of their own'): run_experiment(resume=run.folder, params=dict(lr=1e-3))
    again = run_experiment(resume=run.folder, params=dict(processes=1), report=False)
    told = read_jsonl(run.folder/'training'/'inexact.jsonl')
    assert len(told) == 1 and told[0]['processes'] == [2, 1] and again.params['processes'] == 1 and again.state == 'done'
    notes = [e['text'] for e in read_jsonl(run.folder/'journal.jsonl') if e['event'] == 'note']
    assert any('processes = 1 instead of 2' in n for n in notes) and any(n.startswith('Inexact: from step') for n in notes)


def test_the_file_of_groups_and_its_lines(place):
    "The file in the guide is the file beside it; its lines make the tables that it says, those not yet run are named."
    guide = (REPO/'nbs'/'guides'/'command_line.md').read_text()
    block, = re.findall(r'^```csv\n(.*?)^```', guide, re.M | re.S)
    assert block == (REPO/'nbs'/'guides'/'runs_paper.csv').read_text()
    here = place/'groups'
    here.mkdir()
    (here/'runs_paper.csv').write_text(block)
    (here/'prepared').symlink_to(place/'prepared')
    from medvl.api import Model
    from medvl.methods.recipes import new_method
    Model(new_method('mammoclip', 'smoke', ['a mass in the left breast']), size=(48, 32)).save_pretrained(here/'outputs'/'pretrain-1'/'model')
    said = [line for line in guide.splitlines() if line.startswith('medvl ') and ('--groups' in line or line.startswith('medvl run zero_shot    -p data='))]
    asked, shown = said[:2], said[2:]
    assert len(asked) == len(shown) == 2
    for line in asked: ended([subprocess.Popen(['bash', '-c', line], cwd=here, env=environment(place, MEDVL_OUTPUTS=str(here/'outputs')), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)])
    tables = ended([subprocess.Popen(['bash', '-c', line], cwd=here, env=environment(place, MEDVL_OUTPUTS=str(here/'outputs')), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for line in shown])
    for text in tables: assert re.search(r'untrained \(baseline\)  0\.\d{3} \(', text) and re.search(r'pre-trained +0\.\d{3} \(.*\)  [+-]0\.\d{3} \(.*\), patients', text), text
    assert "medvl: missing: row 2: there is no run 'linear_probe model='." in tables[0]
