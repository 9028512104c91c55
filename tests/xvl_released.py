"""The two published X-VL models in small: how a file's names go to our networks, and which never lived. A draft for methods.released."""
import json

import numpy as np
import torch
from golden import golden
from torch import nn

from medvl.losses.itm import RejectionDraws
from medvl.models.bert_file import load_text
from medvl.models.checkpoints import load_weights
from medvl.models.fusion import FusionBert, load_fusion
from medvl.models.ibot_head import IBOTHead
from medvl.models.queue import FeatureQueue
from medvl.models.text import TextEncoder
from medvl.models.vit import VisionTransformer, load_vit


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items()}


def settings(name): return json.loads(golden(f'xvl/{name}').read_text())


# beginning of the names in a file of the original -> our part; of the twin: the same with `_m` before the dot, except the matching heads
NAMES_2023 = {'visual_encoder.': 'image', 'text_encoder.': 'text', 'fusion_encoder.': 'fusion', 'vision_proj.': 'image_projection',
              'text_proj.': 'text_projection', 'itm_head.': 'matching'}
NAMES_2022 = {'visual_encoder.backbone.': 'image', 'text_encoder.': 'text', 'head.': 'head', 'vision_proj.': 'image_projection',
              'text_proj.': 'text_projection', 'itm_head_t.': 'matching_text', 'itm_head_v.': 'matching_image'}
BUFFERS = ('temp', 'image_queue', 'text_queue', 'queue_ptr') # queues stand with a feature a column
NO_TWIN = ('matching', 'matching_text', 'matching_image')


def twin(prefix): return prefix.replace('.', '_m.', 1)


def _fill(part, module, weights, prefix, first):
    if isinstance(module, VisionTransformer): return load_vit(module, weights, prefix=prefix)
    if isinstance(module, FusionBert): return load_fusion(module, weights, first=first, prefix=prefix)
    if isinstance(module, TextEncoder): return load_text(module, weights, prefix=prefix)
    return load_weights(module, weights, prefix=prefix)


def fill(parts, names, weights, teacher=False, first=0):
    "Fill all parts strictly from a file -> names of the file that were used or stand for something used."
    used = set()
    for prefix, part in names.items():
        if teacher and part in NO_TWIN: continue
        prefix = twin(prefix) if teacher else prefix
        report = _fill(part, parts[part], weights, prefix, first)
        assert report.missing in ([], ['masked_embed'])
        used |= {k for k in weights if k.startswith(prefix)} - {*report.ignored}
    return used


def parts_2023():
    from transformers import BertConfig, BertModel
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40)
    return nn.ModuleDict(dict(
        image=VisionTransformer(image_size=64, width=32, depth=2, heads=4), text=TextEncoder(BertModel(config, add_pooling_layer=False), 'bos'),
        fusion=FusionBert(97, width=32, heads=4, layers=2, hidden=48, reads='states', head=True), image_projection=nn.Linear(32, 16),
        text_projection=nn.Linear(32, 16), matching=nn.Linear(32, 2))).eval()


def parts_2022():
    return nn.ModuleDict(dict(
        image=VisionTransformer(image_size=64, width=32, depth=2, heads=4, masked=True, resizing='offset'),
        text=FusionBert(97, width=32, heads=4, layers=4, fusion_layer=2, hidden=48, positions=40, head=True),
        head=IBOTHead(32, 24, 24, shared=True, hidden=40, bottleneck=12, fixed=False), image_projection=nn.Linear(32, 16),
        text_projection=nn.Linear(32, 16), matching_text=nn.Linear(32, 2), matching_image=nn.Linear(32, 2))).eval()


def queues(weights):
    "The two queues of a file, rows instead of columns."
    out = []
    for name in ('image_queue', 'text_queue'):
        queue = FeatureQueue(weights[name].shape[1], weights[name].shape[0])
        queue.rows.copy_(weights[name].T)
        queue.pointer.copy_(weights['queue_ptr'])
        out.append(queue)
    return out


def recorded(draws): return RejectionDraws(draws=draws.tolist())
