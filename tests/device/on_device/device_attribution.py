"""Every way of explaining, relevance of words, sanity and the causal test on the pretend accelerator: the CPU's maps, none left on the wrong device."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_accelerator import DEVICE, Accelerator

from medvl.attribute.attribute import attribute
from medvl.attribute.causal import CausalSystem, causal_knowledge, causal_pairs, causal_rows, draw_patients
from medvl.attribute.sanity import sanity_bench
from medvl.attribute.targets import Target
from medvl.attribute.ways import ATTENTION_WAYS, WAYS
from medvl.data.phantom.chest_anatomy import ChestConfig
from medvl.methods.recipes import new_method
from medvl.methods.supervised import Supervised, SupervisedConfig

TEXTS = ['The heart is large.', 'No mass is seen.']
RELU = ('guided_backprop', 'deconvolution', 'guided_gradcam')  # need ReLUs that are modules
QUICK = {'rise': dict(masks=12, cells=4), 'occlusion': dict(window=32, stride=24), 'integrated_gradients': dict(steps=3), 'smoothgrad': dict(samples=2), 'vargrad': dict(samples=2),
         'gradient_shap': dict(samples=2), 'gscorecam': dict(channels=4)}


def net():
    torch.manual_seed(0)
    return Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule', 'opacity'))).eval()


@pytest.mark.parametrize('how', sorted(set(WAYS) - set(RELU)))
def test_a_way_gives_the_cpus_map(how):
    if how == 'deeplift': pytest.importorskip('captum')
    method, target = (new_method('xvl', 'smoke-2022', TEXTS).eval(), Target('sentence', TEXTS[0])) if how in ATTENTION_WAYS else (net(), Target('class', 'nodule'))
    image = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
    wanted = attribute(method, image, target, how, **QUICK.get(how, {})).map
    with Accelerator():
        found = attribute(copy.deepcopy(method).to(DEVICE), image, target, how, **QUICK.get(how, {})).map
    assert found.device.type == 'cpu' and torch.allclose(found, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max() + 1e-12)), how


def test_words_follow():
    method = new_method('xvl', 'smoke-2022', TEXTS).eval()
    image = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
    ask = lambda m: attribute(m, image, Target('word', 'heart'), 'word_relevance', report=TEXTS[0]).map
    wanted = ask(method)
    with Accelerator(): found = ask(copy.deepcopy(method).to(DEVICE))
    assert torch.allclose(found, wanted, rtol=2e-3, atol=1e-8)


def test_the_causal_test_and_sanity():
    config = ChestConfig(size=(96, 96), difficulty='easy')
    films, method = draw_patients('chest', 24, config), net()
    system = lambda m: CausalSystem('net', m, 'resize_v1', (96, 96), 'chest', m)
    pairs, ways = causal_pairs(system(method), films, 'nodule', config, 2), {'gradcam': ('gradcam', -1, {}), 'saliency': ('saliency', -1, {})}
    ask = lambda m: (causal_knowledge(system(m), films, ['nodule'], n_boot=20).auroc.item(), pd.DataFrame(causal_rows(system(m), 'nodule', pairs, ways)[0]).score.to_numpy(),
                     sanity_bench(m, np.stack([f.pixels for f in films[:2]]), ['a', 'b'], 'nodule', ways, m, 2, 10).value.to_numpy())
    wanted = ask(method)
    with Accelerator(): found = ask(copy.deepcopy(method).to(DEVICE))
    for a, b in zip(found, wanted): assert np.allclose(a, b, rtol=2e-3, atol=2e-3)
