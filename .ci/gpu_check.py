"""Everything that only a GPU can tell, in one command of at most eight minutes: `make gpu-check`. Developer tool; medvl does not import it.

    python .ci/gpu_check.py                       # the table, and outputs/gpu_check.json
    python .ci/gpu_check.py --device cpu --methods simclr    # the same code, tiny, on the CPU (a test runs this)

Checked: each method trains, is killed (SIGKILL) and goes on to the same bits; compiled steps agree with plain ones and what they gain; the cells marked `#| gpu` of the benchmarks;
memory, and images a second beside what the card's memory and arithmetic allow. Exit status 0: all of it holds; 1: something does not; 2: there is no GPU.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
SECONDS = 460 # of the eight minutes; what does not fit is said to be left out
COMPILED = ('mammoclip', 'lovt', 'simclr')
# images a second of a training step on an H100 (798 TFLOP/s, 3.0 TB/s): memory traffic fused, unfused, arithmetic; computed, see b40
CEILINGS = {'efficientnet-b5': (388, 124, 2071), 'efficientnet-b2': (917, 290, 7400), 'resnet-50': (25_000, None, 32_500)}
H100 = (3.0e12, 798e12) # bytes and operations a second that those figures assume


def settings(device, **changes):
    from medvl.train.settings import TrainConfig
    return TrainConfig(**{**dict(epochs=1000, max_steps=6, batch_size=4, lr=1e-3, warmup=0, clip=1.0, ema=.9, precision='bf16', trackers=(), save_every=2, cpu=device == 'cpu'), **changes})


def trained(name, folder, run, device, kill_at=None, **changes):
    "Train a method for a few steps, or go on with it; with kill_at the process ends itself after that step."
    import torch
    from device_cases import case

    from medvl.train import loop as loop_module
    method, data, transform = case(name, folder)
    plain = loop_module.one_step
    def one_step(loop, batches):
        out = plain(loop, batches)
        if kill_at and loop.step == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return out
    loop_module.one_step = one_step
    try: result = loop_module.train(method, data, settings(device, **changes), Path(folder)/run, transform=transform)
    finally: loop_module.one_step = plain
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device == 'cuda' else float('nan')
    return method, result, peak


def same_bits(a, b):
    import torch
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def resume_row(name, folder, device):
    "A run that was killed ends with the bits of one that was not."
    began = time.perf_counter()
    command = [sys.executable, __file__, '--child', name, '--folder', folder, '--device', device]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if child.returncode != -signal.SIGKILL: raise RuntimeError(f'the child was to be killed, but ended with {child.returncode}: {child.stderr[-300:]}')
    whole, result, peak = trained(name, folder, f'{name}-whole', device)
    resumed, again, _ = trained(name, folder, f'{name}-cut', device)
    bits = same_bits(whole, resumed) and list(result.history.loss) == list(again.history.loss)
    return dict(check='train, kill, resume', what=name, ok=bits, value='same bits' if bits else 'other bits', loss=float(result.history.loss.iloc[-1]), peak_MiB=peak,
                seconds=time.perf_counter() - began)


def compile_row(name, folder, device):
    "A compiled step agrees with the plain one, and its time."
    import numpy as np
    how = 'default' if device == 'cuda' else 'eager'
    found = {}
    for mode in ('', how):
        _, result, _ = trained(name, folder, f'{name}-compile-{mode or "off"}', device, compile=mode, precision='fp32', max_steps=8, save_every=100, deterministic=False)
        found[mode] = result.history.loss.to_numpy(), float(np.median(result.history.seconds.iloc[4:]))
    apart = float(np.abs(found[how][0][0] - found[''][0][0]) / max(abs(found[''][0][0]), 1e-9))
    return dict(check=f'compile={how}', what=name, ok=apart < 1e-3, value=f'{found[""][1] / found[how][1]:.2f} x the plain speed', difference=apart)


def gpu_cells(path, device):
    "Run a benchmark's parameters, imports and `#| gpu` cells; the table they leave is called `gpu`."
    nb, space = json.loads(Path(path).read_text()), {}
    cells = [(''.join(c['source']), c['metadata'].get('tags', [])) for c in nb['cells'] if c['cell_type'] == 'code']
    first = next(i for i, (_, tags) in enumerate(cells) if 'parameters' in tags)
    wanted = [cells[first][0], cells[first + 1][0], *(s for s, _ in cells if s.lstrip().startswith('#| gpu'))]
    for source in wanted:
        exec(compile(source, str(path), 'exec'), space)
    return space.get('gpu')


def bandwidth(device, gib=4):
    "Bytes a second of a copy, and operations a second of a bf16 product, of this card."
    import torch
    n = int(gib * 2 ** 30) if device == 'cuda' else 2 ** 22
    a, b = torch.empty(n, dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    side = 8192 if device == 'cuda' else 256
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    def rate(work, amount, times=10):
        sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
        work(); sync(); began = time.perf_counter()
        for _ in range(times): work()
        sync()
        return amount * times / (time.perf_counter() - began)
    return rate(lambda: b.copy_(a), 2 * n), rate(lambda: x @ x, 2 * side ** 3)


def speed_rows(table, card):
    "Images a second beside the ceilings of field.md, scaled to the card by its own bandwidth and arithmetic."
    rows = []
    for r in (table.to_dict('records') if table is not None else []):
        fused, unfused, flops = CEILINGS.get(r['name'], (None,) * 3)
        top = min(fused * card[0] / H100[0], flops * card[1] / H100[1]) if fused else 0
        rate = r['images_per_second']
        rows.append(dict(check='images a second', what=f'{r["name"]}, batch {r["batch"]}, {"compiled" if r.get("compiled") else "plain"}', ok=rate > 0,
                         value=f'{rate:.0f} of at most {top:.0f} ({100 * rate / top:.0f} %)' if top else f'{rate:.0f}', peak_MiB=1024 * r['peak_GiB'],
                         unfused_bound=unfused and unfused * card[0] / H100[0]))
    return rows


def resnet_rows(device):
    "A ResNet-50 at 224, the encoder of the chest methods."
    import pandas as pd
    import torch

    from medvl.models.resnet import ResNet
    name, n, side = ('resnet-50', 128, 224) if device == 'cuda' else ('resnet-tiny', 2, 32)
    rows = []
    for compiled in (False, True) if device == 'cuda' else (False,):
        net = ResNet(name).to(device, memory_format=torch.channels_last).train()
        run, x = torch.compile(net) if compiled else net, torch.randn(n, 1, side, side, device=device)
        sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
        def one(run=run, x=x, net=net):
            with torch.autocast(device, torch.bfloat16): loss = run(x).float().square().mean()
            loss.backward(); net.zero_grad(set_to_none=True)
        if device == 'cuda': torch.cuda.reset_peak_memory_stats()
        for _ in range(3): one()
        sync(); began = time.perf_counter()
        for _ in range(10): one()
        sync()
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device == 'cuda' else float('nan')
        rows.append(dict(name=name, batch=n, compiled=compiled, images_per_second=10 * n / (time.perf_counter() - began), peak_GiB=peak))
    return pd.DataFrame(rows)


class Report:
    "Rows as they come, a deadline, and what went wrong in one line."
    def __init__(self, seconds): self.rows, self.end = [], time.monotonic() + seconds
    def add(self, check, what, make):
        if time.monotonic() > self.end: self.rows.append(dict(check=check, what=what, ok=None, value='left out: no time')); return
        try: found = make()
        except Exception as e:
            traceback.print_exc()
            found = dict(check=check, what=what, ok=False, value=f'{type(e).__name__}: {str(e)[:120]}')
        self.rows += found if isinstance(found, list) else [found]
        print(f'{check}, {what}: {"ok" if all(r["ok"] for r in (found if isinstance(found, list) else [found])) else "NOT ok"}', flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument('--device', default=os.environ.get('DEVICE') or 'cuda', choices=('cuda', 'cpu'))
    arguments.add_argument('--methods', default='')
    arguments.add_argument('--out', default=str(ROOT/'outputs'/'gpu_check.json'))
    arguments.add_argument('--child')
    arguments.add_argument('--folder')
    asked = arguments.parse_args()
    os.environ.setdefault('MEDVL_PROGRESS', '0')
    import pandas as pd
    import torch
    if asked.device == 'cpu': torch.set_num_threads(1)
    if asked.child:
        trained(asked.child, asked.folder, f'{asked.child}-cut', asked.device, kill_at=5)
        return 0
    if asked.device == 'cuda' and not torch.cuda.is_available():
        print('gpu-check: no GPU here, nothing checked (DEVICE=cpu runs the same code, tiny, on the CPU)')
        return 2
    from device_cases import PRETRAINED, TRAINED
    methods = asked.methods.split(',') if asked.methods else list(TRAINED)
    card = torch.cuda.get_device_name() if asked.device == 'cuda' else 'CPU, tiny: no figure means anything'
    report, began = Report(SECONDS), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rates = bandwidth(asked.device)
        for name in methods: report.add('train, kill, resume', name, lambda name=name: resume_row(name, folder, asked.device))
        for name in [m for m in COMPILED if m in methods and m in PRETRAINED]: report.add('compile', name, lambda name=name: compile_row(name, folder, asked.device))
        report.add('images a second', 'resnet', lambda: speed_rows(resnet_rows(asked.device), rates))
        for path in sorted((ROOT/'nbs'/'benchmarks').glob('b*.ipynb')):
            if '#| gpu' in path.read_text(): report.add('benchmark', path.stem, lambda path=path: speed_rows(gpu_cells(path, asked.device), rates)
                                                        or dict(check='benchmark', what=path.stem, ok=True, value='ran'))
    table = pd.DataFrame(report.rows)
    print(f'\n{card}: {rates[0] / 1e12:.2f} TB/s, {rates[1] / 1e12:.0f} TFLOP/s in bf16, torch {torch.__version__}; {time.monotonic() - began:.0f} s')
    print(table.to_string(index=False, na_rep='', float_format='%.3g'))
    Path(asked.out).parent.mkdir(parents=True, exist_ok=True)
    facts = dict(card=card, torch=torch.__version__, bytes_a_second=rates[0], operations_a_second=rates[1])
    Path(asked.out).write_text(json.dumps({**facts, 'rows': json.loads(table.to_json(orient='records'))}, indent=1))
    return int(any(r['ok'] is False for r in report.rows))


if __name__ == '__main__': sys.exit(main())
