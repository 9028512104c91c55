"""Every way of explaining, relevance of words, sanity and the causal test on the pretend accelerator: the CPU's maps, none left on the wrong device."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_accelerator import DEVICE, Accelerator

from medvl.attribute.attribute import EXPLANATIONS, attribute
from medvl.attribute.causal import CausalSystem, causal_knowledge, causal_pairs, causal_rows, draw_patients, side_rows
from medvl.attribute.mammo_factor import MammoFactor, MammoFactorConfig
from medvl.attribute.sanity import sanity_bench
from medvl.attribute.targets import Target
from medvl.attribute.ways import ATTENTION_WAYS
from medvl.data.phantom.chest_anatomy import ChestConfig
from medvl.methods.recipes import new_method
from medvl.methods.supervised import Supervised, SupervisedConfig

TEXTS = ['The heart is large.', 'No mass is seen.']
QUICK = {'rise': dict(masks=12, cells=4), 'occlusion': dict(window=32, stride=24), 'integrated_gradients': dict(steps=3), 'smoothgrad': dict(samples=2), 'vargrad': dict(samples=2),
         'gradient_shap': dict(samples=2), 'gscorecam': dict(channels=4)}


def net():
    torch.manual_seed(0)
    return Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule', 'opacity'))).eval()


def asked(how):
    "A system that the way explains, what is asked of it, and options."
    sentence, word, report = Target('sentence', TEXTS[0]), Target('word', 'heart'), dict(report=TEXTS[0])
    if how.startswith('word_'): return new_method('xvl', 'smoke-2022', TEXTS).eval(), word, report
    if how in {*ATTENTION_WAYS, 'similarity', 'attention', 'places'}: return new_method('xvl', 'smoke-2022', TEXTS).eval(), sentence, {}
    if how == 'aligned': return new_method('lovt', 'smoke', TEXTS).eval(), sentence, {}
    if how == 'abnormality': return new_method('a2i2', 'smoke', TEXTS).eval(), sentence, {}
    if how == 'factor':
        base = new_method('mammoclip', 'smoke', TEXTS).eval()
        return MammoFactor(MammoFactorConfig({'mass': ['there is a mass']}, grid=(2, 2), width=base.config.dim), base=base).eval(), Target('class', 'mass'), {}
    return net(), Target('class', 'nodule'), QUICK.get(how, {})


@pytest.mark.parametrize('how', sorted(EXPLANATIONS))
def test_a_way_gives_the_cpus_map(how):
    if how == 'deeplift': pytest.importorskip('captum')
    method, target, options = asked(how)
    image = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
    wanted = attribute(method, image, target, how, **options).map
    with Accelerator(): found = attribute(copy.deepcopy(method).to(DEVICE), image, target, how, **options).map
    assert found.device.type == 'cpu' and torch.allclose(found, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max() + 1e-12)), how


@pytest.mark.parametrize('how', ['integrated_gradients', 'input_x_gradient', 'gradient_shap', 'occlusion', 'rise', 'scorecam', 'deeplift'])
def test_a_number_with_its_baseline(how):
    if how == 'deeplift': pytest.importorskip('captum')
    method, image = new_method('proxy', 'smoke').eval(), torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
    ask = lambda m: attribute(m, image, Target('age', 'age'), how, baseline='blur', **QUICK.get(how, {})).map
    wanted = ask(method)
    with Accelerator(): found = ask(copy.deepcopy(method).to(DEVICE))
    assert torch.allclose(found, wanted, rtol=5e-3, atol=2e-3 * float(wanted.abs().max())), how


def test_sides():
    torch.manual_seed(0)
    films = draw_patients('chest', 24, ChestConfig(size=(96, 96), difficulty='easy', p_effusion=1))
    method = Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('left_effusion', 'right_effusion'))).eval()
    ask = lambda m: [r['score'] for r in side_rows(CausalSystem('net', m, 'resize_v1', (96, 96), 'chest'), 'effusion', films, {'saliency': ('saliency', -1, {})}, 2, 0)[0]]
    wanted = ask(method)
    with Accelerator(): found = ask(copy.deepcopy(method).to(DEVICE))
    assert len(wanted) >= 2 and np.allclose(found, wanted, rtol=2e-3, atol=2e-3)


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
