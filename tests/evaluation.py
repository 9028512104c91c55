"""Small prepared data sets and methods for the tests of evaluation; run as a script it embeds in a process of its own."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from medvl.core.paths import write_json
from medvl.core.seed import torch_generator
from medvl.data.prepared import open_prepared, write_table
from medvl.data.schema import empty
from medvl.data.store import StoreWriter
from medvl.evaluate.protocols.embeddings import Embeddings, embed
from medvl.methods.base import Method


def made(folder, patients=60, seed=0, split=('train', 'train', 'train', 'valid', 'test'), name='p', size=(16, 12)):
    "A prepared folder of noise images; four images a patient; the mean grey carries `mass`."
    rng, n = np.random.default_rng(seed), patients * 4
    has = np.repeat(rng.random(patients) < .4, 4).astype(float)
    rare = np.repeat(np.arange(patients) % 7 == 0, 4).astype(float)
    base = dict(exam_id='e', orig_height=size[0], orig_width=size[1], crop_y0=0., crop_x0=0., crop_y1=16., crop_x1=12., spacing_y=np.nan, spacing_x=np.nan,
                burned_in_text=False, mask_row=-1, report='', birads='', fold=-1)
    with StoreWriter(folder / 'images', n, *size) as w:
        sums = [w.write(i, np.clip(rng.normal(100 + 15 * has[i], 30, size) + 10 * rng.normal(), 0, 255).astype(np.uint8)) for i in range(n)]
    manifest = pd.DataFrame({
        'row': range(n), 'image_id': [f'{name}i{i}' for i in range(n)], 'patient_id': [f'{name}{i // 4}' for i in range(n)], 'image_sha256': sums, 'pixel_sha256': sums,
        'laterality': np.tile(list('LLRR'), patients), 'view': np.tile(['CC', 'MLO'], 2 * patients), 'source': 'made', 'age': np.repeat(rng.uniform(35, 80, patients), 4),
        'pathology': np.repeat(rng.choice(['malignant', 'benign', ''], patients), 4), 'density': np.repeat(rng.choice(list('ABCD'), patients), 4),
        'split': np.repeat(np.array(split)[np.arange(patients) % len(split)], 4), 'label_mass': np.where(rng.random(n) < .1, np.nan, has), 'label_calcification': rare, **base})
    write_table(manifest, 'manifest', folder)
    for kind in ('boxes', 'sentences'): write_table(empty(kind), kind, folder)
    write_json(folder / 'dataset.json', {})
    return open_prepared(folder)


def made_embeddings(data, seed=0, width=24):
    "Vectors in which two numbers carry `mass` and one the density."
    rng, m = np.random.default_rng(seed), data.manifest
    x = rng.normal(size=(len(m), width))
    x[:, :2] += np.nan_to_num(m.label_mass.to_numpy())[:, None]
    x[:, 2] += m.density.map(dict(A=0, B=1, C=2, D=3)).to_numpy()
    return Embeddings(m.image_id.to_numpy(), dict(feature=(5 * x + 3).astype(np.float32), image=x.astype(np.float32)), dict(method='made'))


class Grey(Method):
    "Knows grey levels and the word 'no'; counts its calls; may die or fail."
    name = 'grey'

    def __init__(self, seed=0, die_after=None, nan_at=None):
        super().__init__()
        self.calls, self.die_after, self.nan_at = 0, die_after, nan_at
        self.register_buffer('w', torch.randn(16 * 12, 6, generator=torch_generator('grey', seed)))
        self.drop, self.anchor = nn.Dropout(.5), nn.Parameter(torch.zeros(1))

    def image_features(self, images):
        if self.die_after is not None and self.calls >= self.die_after: import os; import signal; os.kill(os.getpid(), signal.SIGKILL)
        out = self.drop(images.float().flatten(1) / 255 @ self.w)
        if self.nan_at is not None and self.calls <= self.nan_at < self.calls + len(images): out[self.nan_at - self.calls] = float('nan')
        self.calls += len(images)
        return out

    def encode_image(self, images):
        grey = (images.float().mean((1, 2, 3)) - 105) / 20
        return nn.functional.normalize(torch.stack([grey, torch.ones_like(grey)], 1), dim=1)

    def project_text(self, texts): return torch.tensor([[-2., 2] if t.startswith('no') else [1., 1] for t in texts])

    def encode_text(self, texts): return nn.functional.normalize(self.project_text(texts), dim=1)


if __name__ == '__main__':
    data, cache, die = open_prepared(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    embed(Grey(die_after=die or None), data, cache, batch_size=4, what='feature')
