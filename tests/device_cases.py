"""Every method with a few samples that it can be trained on, for the tests on the pretend accelerator."""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from medvl.data.augment.breast_versions import Augment, AugmentConfig
from medvl.data.batch import collate
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.samples.boxes import DetectionAugment, detection_dataset
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
from medvl.data.samples.chest import ChestImageDataset, ChestReportConfig, ChestReportDataset
from medvl.data.samples.targets import TargetImages
from medvl.methods.base import build
from medvl.methods.chest_presets import CHEST_METHODS, chest_preset, chest_transform, new_chest_method
from medvl.methods.classifier import new_classifier
from medvl.methods.presets import new_mammoclip, preset
from medvl.methods.retinanet import RetinaNet, RetinaNetConfig
from medvl.methods.segmenter import segmenter_from
from medvl.methods.yolo import yolo_from

PRETRAINED = ('mammoclip', *CHEST_METHODS)
HEADS = ('classifier', 'retinanet', 'segmenter', 'unet', 'yolo')
TRAINED = (*PRETRAINED, *HEADS)


@lru_cache
def breasts(folder): return prepared_phantom(Path(folder)/'breasts', 8, (64, 48))


@lru_cache
def chests(folder): return prepared_chest_phantom(Path(folder)/'chests', 12, (64, 64))


class Dense:
    "Noise with a bright square: its box and its mask."
    names = ('opacity',)
    def __init__(self, kind, n=12): self.kind, self.n = kind, n
    def __len__(self): return self.n

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([index, 0])
        image, mask = rng.normal(80, 15, (64, 64)), np.zeros((64, 64), np.uint8)
        y, x = (int(v) for v in rng.integers(2, 38, 2))
        mask[y:y + 20, x:x + 20] = 1
        out = dict(images=[np.clip(image + 90 * mask, 0, 255).astype(np.uint8)], sample_id=f's{index}', patient_id=f'p{index}', index=index, epoch=epoch)
        if self.kind == 'masks': return {**out, 'masks': mask[None]}
        return {**out, 'boxes': [np.array([[x, y, x + 20, y + 20]], np.float32)], 'box_labels': [['opacity']]}

    def collate(self, samples): return collate(samples)


def case(name, folder):
    "(method, training samples, transform or None) of a method's name; nothing is on the device yet."
    torch.manual_seed(0)
    if name == 'mammoclip':
        data = breasts(folder)
        method = new_mammoclip('smoke', data.manifest.report)
        return method, BreastTextDataset(data, method.tokenizer, BreastTextConfig(**preset('smoke').text)), Augment(AugmentConfig())
    if name in CHEST_METHODS: return chest_case(name, chests(folder), folder)
    if name == 'classifier':
        data = breasts(folder)
        return new_classifier('efficientnet-tiny', ('mass',), frozen=False), TargetImages(data, ('mass',)), Augment(AugmentConfig())
    if name == 'retinanet':
        data = breasts(folder)
        method = RetinaNet(RetinaNetConfig(image_encoder='efficientnet-tiny', pyramid_width=8, head_width=8, anchor_size=2.0, drop_connect=0.0, classes=('mass',)))
        return method, detection_dataset(data, ('mass',)), DetectionAugment()
    if name == 'yolo': return yolo_from('resnet-tiny', 'opacity', frozen=False), Dense('boxes'), None
    return segmenter_from('resnet-tiny', 'opacity', 'unet' if name == 'unet' else 'linear', frozen=False), Dense('masks'), None


def chest_case(name, data, folder):
    named, labels = chest_preset(name, 'smoke'), tuple(data.labels)
    method = new_chest_method(name, 'smoke', [r for r in data.manifest.report if isinstance(r, str)], **(dict(labels=labels) if name == 'supervised' else dict(probe=labels)))
    if named.text is None: return method, ChestImageDataset(data, labels, train=True), chest_transform(named)
    words = ChestReportConfig(**{**named.text, 'labels': labels})
    return method, ChestReportDataset(data, method.tokenizer, words, train=True, cache=Path(folder)/f'tokens-{name}'), chest_transform(named)


def initialised(): return build('initialised', {'seed': 0})
