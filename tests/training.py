"""Small methods and data for the tests of the training loop; run as a script it is one training process."""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medvl.data.batch import Field, collate, declare
from medvl.methods.base import Method, register
from medvl.train.loop import train
from medvl.train.settings import TrainConfig


declare('words', Field(torch.float32, 'b d', what='a toy report'))


@dataclass
class SmallConfig:
    width: int = 16
    drop: float = 0.2


@register
class Small(Method):
    "Two small encoders with BatchNorm and dropout, and an InfoNCE loss."
    name, config_class, gathered, chunkable = 'test-small', SmallConfig, ('image', 'text'), True

    def __init__(self, config=None):
        super().__init__(config)
        w = self.config.width
        self.image_encoder = nn.Sequential(nn.Linear(8, w), nn.BatchNorm1d(w), nn.ReLU(), nn.Dropout(self.config.drop), nn.Linear(w, 6))
        self.text_encoder, self.scale = nn.Linear(4, 6), nn.Parameter(torch.tensor(1.5))

    def encode(self, batch):
        kind = self.text_encoder.weight.dtype
        return {'image': F.normalize(self.image_encoder(batch['images'].to(kind)), dim=-1), 'text': F.normalize(self.text_encoder(batch['words'].to(kind)), dim=-1)}

    def losses(self, features, batch, state):
        logits = self.scale.exp() * features['image'] @ features['text'].T
        target = torch.arange(len(logits), device=logits.device)
        i2t, t2i = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
        return {'loss': (i2t + t2i) / 2, 'i2t': i2t, 't2i': t2i}


class Pairs:
    "n pairs of a noisy image and its words, keyed by (epoch, sample)."
    def __init__(self, n=48, seed=0, nan=None, empty=None, broken=None):
        self.map = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
        self.n, self.seed, self.nan, self.empty, self.broken = n, seed, nan, empty, broken

    def __len__(self): return self.n

    def __getitem__(self, key):
        epoch, index = key
        if index == self.broken: raise OSError('image_17.png is truncated')
        words = torch.randn(4, generator=torch.Generator().manual_seed(self.seed * 1000 + index))
        image = words @ self.map + 0.5 * torch.randn(8, generator=torch.Generator().manual_seed(10 ** 6 * (epoch + 1) + index))
        return {'sample_id': f'p{index:03d}', 'images': image * (float('nan') if index == self.nan else 1), 'words': words,
                'text': ['  ' if index == self.empty else 'No mass.'], 'epoch': epoch}

    def collate(self, samples):
        rule = {'epoch': lambda v: v[0], 'sample_id': list, 'text': list}
        return {k: rule.get(k, torch.stack)([s[k] for s in samples]) for k in samples[0]}


SETTINGS = dict(epochs=6, batch_size=8, chunk_size=4, accumulate=2, lr=3e-2, warmup=2, trackers=(), ema=0.9, clip=1.0, save_every=2, valid_every=5, cpu=True)


def settings(**changes): return TrainConfig(**{**SETTINGS, **changes})


def small(seed=0, **config):
    torch.manual_seed(seed)
    return Small(SmallConfig(**config))


def run(folder, method=None, data=None, valid=Pairs(24, seed=1), transform=None, validate=None, resume=True, **changes):
    method = method or small()
    return method, train(method, data or Pairs(), settings(**changes), folder, valid, transform, validate, resume)


def tiny_mammoclip(seed=0, **changes):
    "The real system with its smallest encoders."
    from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig
    torch.manual_seed(seed)
    return MammoCLIP(MammoCLIPConfig(**{**dict(image_encoder='efficientnet-tiny', text_encoder='tiny', vocab_size=40, dim=16, duplicates='mask'), **changes}))


class Breasts:
    "Samples in the form of the batch contract: two views, two texts, flips, groups."
    def __init__(self, n=16): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([index, epoch])
        kind = index % 5
        image = lambda: np.clip(rng.normal(60 + 30 * kind, 40, (48, 32)), 0, 255).astype(np.uint8)
        tokens = [np.r_[2, 5 + kind, rng.integers(10, 40, rng.integers(2, 9)), 3].astype(np.int32) for _ in range(2)]
        return dict(images=[image(), image()], view=['CC', 'MLO'], laterality='L', patient_id=str(index), sample_id=f'p{index}_L', index=index, epoch=epoch,
                    tokens=tokens, text=['no mass', 'benign'], text_group=np.array([index // 2] * 2), flip=np.zeros((2, 2), bool))


def breasts_batch(n=6, double=True):
    batch = collate([Breasts()[0, i] for i in range(n)])
    return {**batch, 'images': batch['images'].double()} if double else batch


def quiet(method):
    "Freeze BatchNorm and switch every random layer off, keeping the losses in training mode."
    method.train()
    for child in method.children(): child.eval()
    return method


def gradients(method): return {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}


def contents(folder):
    "All bits of the newest checkpoint's tensors, of the best and the last weights, and the metrics without their timing."
    import hashlib

    from safetensors.torch import load_file

    from medvl.core.paths import read_jsonl
    from medvl.train.checkpoint import checkpoints
    newest = checkpoints(Path(folder)/'checkpoints')[0]
    bits = lambda p: {k: (str(v.dtype), tuple(v.shape), hashlib.sha256(v.numpy().tobytes()).hexdigest()) for k, v in load_file(p).items()}
    files = {f'{p.parent.name}/{p.name}': bits(p) for f in (newest, Path(folder)/'best', Path(folder)/'last') for p in sorted(f.glob('*.safetensors'))}
    rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in read_jsonl(Path(folder)/'metrics.jsonl')]
    return files, rows


if __name__ == '__main__':
    os.environ['MEDVL_PROGRESS'] = '0'
    torch.set_num_threads(1)
    run(sys.argv[1], **json.loads(sys.argv[2]))
