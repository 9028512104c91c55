"""Bright squares as a prepared data set, for the tests of the localized evaluation."""
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medvl.core.paths import write_json
from medvl.core.seed import numpy_rng
from medvl.data.prepared import open_prepared, write_table
from medvl.data.schema import empty
from medvl.data.store import StoreWriter
from medvl.evaluate.localized.run import run_localized
from medvl.evaluate.localized.unit import LocalizedConfig

LABELS = ('atelectasis', 'cardiomegaly', 'effusion', 'infiltrate', 'mass', 'nodule', 'pneumonia', 'pneumothorax')
SMALL = dict(runs=2, max_epochs=3, max_lrs=2, max_batch=8, max_head_warmup=2, min_images=6, width=.06, n_boot=64, cpu=True)


def squares(folder, label='opacity', n=(18, 8, 12), size=64, seed=0, strength=90):
    "A prepared folder of noise images; three of four have a bright square. `label` may be several: they take turns."
    folder, labels = Path(folder), (label,) if isinstance(label, str) else label
    if (folder/'dataset.json').exists(): return open_prepared(folder)
    total, rng = sum(n), numpy_rng('squares', seed)
    boxes, images, masks = [], np.zeros((total, size, size), np.uint8), np.zeros((total, size, size), np.uint8)
    for i in range(total):
        noise = rng.normal(80, 15, (size, size))
        if i % 4 != 3:
            s = int(rng.integers(18, 28)); y, x = (int(v) for v in rng.integers(2, size - s - 2, 2))
            masks[i, y:y + s, x:x + s] = 1
            boxes.append((f'i{i:03d}', labels[len(boxes) % len(labels)], x, y, x + s, y + s, ''))
        images[i] = np.clip(noise + strength * masks[i], 0, 255)
    for name, pixels in (('images', images), ('masks', masks)):
        with StoreWriter(folder/name, total, size, size) as store: sums = [store.write(row, image) for row, image in enumerate(pixels)]
        if name == 'images': image_sums = sums
    base = dict(exam_id='e', laterality='', view='PA', source='made', orig_height=size, orig_width=size, crop_y0=0., crop_x0=0., crop_y1=float(size), crop_x1=float(size), spacing_y=np.nan, spacing_x=np.nan,
                burned_in_text=False, report='', birads='', fold=-1, age=50., pathology='', density='')
    manifest = pd.DataFrame(dict(row=range(total), mask_row=range(total), image_id=[f'i{i:03d}' for i in range(total)], patient_id=[f'p{i // 2:03d}' for i in range(total)],
                                 split=['train'] * n[0] + ['valid'] * n[1] + ['test'] * n[2], pixel_sha256=image_sums, image_sha256=image_sums, **base))
    write_table(manifest, 'manifest', folder)
    write_table(pd.DataFrame(boxes, columns=['image_id', 'label', 'x0', 'y0', 'x1', 'y1', 'severity']), 'boxes', folder)
    write_table(empty('sentences'), 'sentences', folder)
    write_json(folder/'dataset.json', dict(profile='toy', height=size, width=size))
    return open_prepared(folder)


def small(**changes): return LocalizedConfig(**{**SMALL, **changes})


def evaluate(folder, tasks, data, source='resnet-tiny', **changes):
    torch.set_num_threads(1)
    return run_localized(source, tasks, data, folder, small(**changes), model='untrained', phantom=True, split='squares')

