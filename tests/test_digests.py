"""What a reorganisation must not change: phantoms, augmented batches, the first five losses of every method, against figures stored before it.

Written anew with `python tests/test_digests.py` (only where a change of numbers is meant, and then said in the commit)."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medvl.core.paths import read_jsonl
from medvl.data.augment.breast_versions import Augment, AugmentConfig
from medvl.data.augment.chest_versions import PRESETS, ChestAugment, MultiVersion
from medvl.data.batch import collate
from medvl.data.phantom.breast_exam import phantom_exam
from medvl.data.phantom.chest_film import chest_exam
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
from medvl.data.samples.chest import ChestImageDataset, ChestReportConfig, ChestReportDataset
from medvl.evaluate.stats.selection import splits_of
from medvl.methods.former import CHEST_METHODS, chest_preset, chest_transform, new_chest_method, new_mammoclip, preset
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

STORED = Path(__file__).with_name('fixtures')/'digests.json'


def told(x):
    "Shape and numbers of an array that a different image would hardly have: mean, deviation, a fixed weighting of the flat array."
    x = np.asarray(x, np.float64)
    weights = np.cos(np.arange(x.size) * 0.7)
    return [list(x.shape), float(x.mean()), float(x.std()), float((x.ravel() * weights).sum() / np.sqrt(x.size))]


def phantoms():
    breast = {f'breast {level} {i} {"".join(k)}': told(v.pixels) for level in ('easy', 'medium', 'hard') for i in range(2)
              for k, v in phantom_exam(5, i, difficulty=level, size=(128, 80)).views.items()}
    chest = {f'{name} {level} {i}': told(chest_exam(5, i, difficulty=level, size=(96, 96), **how).pixels)
             for name, how in {'chest': {}, 'chest body': dict(balance='body'), 'heart': dict(heart='ratio'), 'heart body': dict(heart='ratio', balance='body')}.items()
             for level in ('easy', 'medium', 'hard') for i in range(3)}
    return breast | chest


def breast_batch():
    exam = [phantom_exam(5, i, size=(96, 64)) for i in range(4)]
    grey = lambda v: (v.pixels / v.pixels.max() * 255).astype(np.uint8)
    samples = [dict(images=[grey(e.views['L', v]) for v in ('CC', 'MLO')], view=['CC', 'MLO'], laterality='L', patient_id=str(i), sample_id=f'{i}_L', index=i, epoch=1,
                    flip=np.array([[i % 2, 0], [i % 2, 0]], bool)) for i, e in enumerate(exam)]
    return collate(samples)


def chest_batch():
    image = lambda i: (lambda p: (p / p.max() * 255).astype(np.uint8))(chest_exam(5, i, size=(64, 64)).pixels)
    return collate([dict(images=[image(i)], sample_id=str(i), patient_id=str(i), index=i, epoch=1) for i in range(4)])


def augmented():
    out = {}
    for mode in ('random', 'reference', 'none'):
        out[f'breast {mode}'] = told(Augment(AugmentConfig(mode=mode, intensity=.5))(breast_batch(), 3, 1)['images'])
    for name in PRESETS:
        out[f'chest {name}'] = told(ChestAugment(name)(chest_batch(), 3, 1)['images'])
        two = MultiVersion(name, 2)(chest_batch(), 3, 1)
        out |= {f'chest {name} version {k}': told(x) for k, x in enumerate(two['augmented'])} | {f'chest {name} transform {k}': told(x) for k, x in enumerate(two['transforms'])}
    return out


@pytest.fixture(scope='module')
def prepared(tmp_path_factory): return made_prepared(tmp_path_factory.mktemp('digests'))


def made_prepared(folder):
    from medvl.data.phantom.breast_dataset import write_phantom
    from medvl.data.phantom.breast_prepared import public_salt, split_source
    from medvl.data.prepare.run import prepare
    from medvl.data.releases.folder import read_folder
    source = write_phantom(folder/'source', 16, (96, 64), 1, 'medium', progress=False)
    breast = prepare(split_source(read_folder(source), (.6, .2, .2), 1), source, folder/'breast', profile='resize_v1', size=(96, 64), salt=public_salt(folder))
    return {'breast': breast, 'chest': prepared_chest_phantom(folder/'chest', 24, (64, 64), 1)}


def losses(prepared, name, folder):
    "The first five losses of a method, from its smoke configuration."
    if name == 'mammoclip':
        p, data = preset('smoke'), prepared['breast']
        method = new_mammoclip('smoke', [r for r in data.manifest.report if isinstance(r, str)], 0)
        samples, transform = BreastTextDataset(splits_of(data)['train'], method.tokenizer, BreastTextConfig(**p.text), train=True), Augment(AugmentConfig(**p.augment))
    else:
        p, data = chest_preset(name, 'smoke'), prepared['chest']
        labels = tuple(data.labels)
        method = new_chest_method(name, 'smoke', [r for r in data.manifest.report if isinstance(r, str)], 0, **({'labels': labels} if name == 'supervised' else {'probe': labels}))
        part, transform = splits_of(data)['train'], chest_transform(p)
        samples = (ChestImageDataset(part, labels, train=True, seed=0) if p.text is None
                   else ChestReportDataset(part, method.tokenizer, ChestReportConfig(**{**p.text, 'labels': labels}), train=True))
    settings = TrainConfig(**{**p.train, 'max_steps': 5, 'batch_size': 4, 'warmup': 1, 'valid_every': 0, 'trackers': (), 'cpu': True, 'seed': 0})
    train(method, samples, settings, folder, transform=transform)
    return [row['value'] for row in read_jsonl(folder/'metrics.jsonl') if row.get('name') == 'loss'] or [row['loss'] for row in read_jsonl(folder/'metrics.jsonl') if 'loss' in row]


def stored(kind): return json.loads(STORED.read_text())[kind]


def compare(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, values in found.items():
        assert values[0] == wanted[name][0], name
        np.testing.assert_allclose(values[1:], wanted[name][1:], rtol=2e-3, atol=2e-3, err_msg=name)


def test_phantoms_are_those_of_before(): compare(phantoms(), stored('phantoms'))


def test_augmented_batches_are_those_of_before(): compare(augmented(), stored('augmented'))


@pytest.mark.parametrize('name', ['mammoclip', *CHEST_METHODS])
def test_first_losses_are_those_of_before(name, prepared, tmp_path):
    found, wanted = losses(prepared, name, tmp_path), stored('losses')[name]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-3)
    np.testing.assert_allclose(found, wanted, rtol=2e-2) # another processor's rounding grows over five steps


if __name__ == '__main__':
    import tempfile
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temp:
        made = made_prepared(Path(temp))
        out = {'phantoms': phantoms(), 'augmented': augmented(), 'losses': {n: losses(made, n, Path(temp)/n) for n in ['mammoclip', *CHEST_METHODS]}}
    STORED.write_text(json.dumps(out, indent=0))
    sys.stdout.write(f'{STORED}: {", ".join(f"{k} {len(v)}" for k, v in out.items())}\n')
