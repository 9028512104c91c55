"""The bench of heat maps on the pretend accelerator: nothing mixes devices, and the numbers are the CPU's."""
import numpy as np
import pytest
import torch
from device_cases import breasts
from pretend_accelerator import DEVICE, Accelerator

from medvl.attribute.attribute import attribute
from medvl.attribute.bench import bench_scores, tuned_rules
from medvl.attribute.chexlocalize import heat_segmentation
from medvl.attribute.faithfulness import change_curves, square_changes, unexplained
from medvl.attribute.gradcam import grad_cams
from medvl.attribute.masking import occlusion, rise, rise_masks, score_cam
from medvl.attribute.phrases import ask_phrases, own_phrases, phrase_scores
from medvl.attribute.targets import Target, score_of
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.methods.presets import new_mammoclip

WAYS = {'gradcam': ('gradcam', -1, {}), 'scorecam': ('scorecam', -1, {}), 'saliency': ('saliency', -1, {}), 'occlusion': ('occlusion', -1, dict(window=16, stride=16)), 'rise': ('rise', -1, dict(masks=8))}
MASS = {'mass': (('mass',), Target('sentence', 'there is a mass'))}


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return str(tmp_path_factory.mktemp('device'))


def clip(data): return new_mammoclip('smoke', data.manifest.report).eval()


def test_the_bench(folder):
    data = breasts(folder)
    def ask(method):
        rules = tuned_rules(method, data, MASS, WAYS, 1)
        return bench_scores(method, data, MASS, WAYS, method, images=1, faithful=1, steps=3, absent=1, noisy=2, baselines=('blur', 'road'), tuned=rules)
    here, lost = ask(clip(data))
    with Accelerator(): there, lost_there = ask(clip(data).to(DEVICE))
    assert lost == lost_there == {} and list(here.method) == list(there.method)
    for m in ('auroc', 'strength', 'insertion - deletion', 'insertion - deletion (road)'):
        np.testing.assert_allclose(here[m].to_numpy(float), there[m].to_numpy(float), rtol=2e-3, atol=2e-4, err_msg=m)


def test_curves_masks_and_many_maps(folder):
    data = breasts(folder)
    image = torch.from_numpy(np.array(data.image(0)))[None].float()
    def ask(method, x):
        score = score_of(method, Target('sentence', 'there is a mass'))
        maps = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0)).to(x.device)
        heats = torch.rand(2, *x.shape[-2:], generator=torch.Generator().manual_seed(1)).to(x.device)
        return [change_curves(score, x, heats, k, b, 3, chunk=2)[2] for k in ('deletion', 'insertion') for b in ('zero', 'road')] + [
            unexplained(score, x, heats, square_changes(x, 3)), occlusion(score, x, 16, 16).cpu().numpy(), rise(score, x, rise_masks(tuple(x.shape[-2:]), 4)).cpu().numpy(),
            score_cam(score, x, maps)[0].cpu().numpy(), grad_cams(method, x[None].repeat(3, 1, 1, 1), ['a mass', 'no mass'], chunk=2).detach().cpu().numpy()]
    here = ask(clip(data), image)
    with Accelerator(): there = ask(clip(data).to(DEVICE), image.to(DEVICE))
    for a, b in zip(here, there): np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3) # an untrained cosine changes by 1e-4 under a square: shares of that are ill-conditioned


def test_phrases_and_regions(tmp_path):
    films = prepared_chest_phantom(tmp_path, n=8, size=(64, 64))
    phrases = own_phrases(films, 4)
    def ask(method): return ask_phrases(films, phrases, lambda image, phrase: attribute(method, torch.from_numpy(image), phrase, 'gradcam').map)
    here = ask(clip(films))
    with Accelerator(): there = ask(clip(films).to(DEVICE))
    np.testing.assert_allclose(phrase_scores(here, phrases, (64, 64)).cnr.to_numpy(float), phrase_scores(there, phrases, (64, 64)).cnr.to_numpy(float), rtol=2e-2, atol=2e-3)
    with Accelerator(): assert heat_segmentation(torch.eye(4).to(DEVICE), (8, 8)).dtype == bool
