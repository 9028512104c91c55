"""A method small enough to be explained by hand: an encoder that is not linear in its map, texts on axes of the space."""
from dataclasses import dataclass

import torch
from torch import nn

from medvl.methods.base import Method


@dataclass
class TinyConfig: channels: int = 5


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stem, self.act1 = nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh()
        self.conv, self.act2, self.mix = nn.Conv2d(4, channels, 3, 2, 1), nn.SiLU(), nn.Linear(channels, channels)

    def feature_maps(self, x, level=-1): return self.act2(self.conv(self.act1(self.stem(x))))

    def forward(self, x): # not linear in the map
        maps = self.feature_maps(x)
        return self.mix(maps.amax((2, 3)) + maps.mean((2, 3)))


class Tiny(Method):
    config_class = TinyConfig

    def __init__(self, config=None):
        super().__init__(config)
        torch.manual_seed(3)
        self.image_encoder, self.image_projection, self.drop = Encoder(self.config.channels), nn.Linear(self.config.channels, 6), nn.Dropout(.5)

    def feature_maps(self, images, level=-1): return self.image_encoder.feature_maps(images.float() / 255)
    def project_image(self, features): return self.image_projection(features)
    def encode_image(self, images, present=None, views=None): return nn.functional.normalize(self.drop(self.image_projection(self.image_encoder(images.float() / 255))), dim=1)
    def project_text(self, texts): return self.drop(torch.stack([torch.eye(6)[len(t) % 6] + .1 * torch.eye(6)[0] for t in texts]))
