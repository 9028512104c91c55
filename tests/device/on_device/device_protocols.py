"""Protocols, maps and dense heads on the pretend accelerator: nothing mixes devices, and the numbers are the CPU's."""
import numpy as np
import pytest
import torch
from device_cases import breasts, case, chests, initialised
from evaluation import made
from localized import evaluate, squares
from pretend_accelerator import DEVICE, Accelerator, train_on_device

from medvl.attribute.evidence import best_cells, best_channels, phrase_vectors
from medvl.attribute.factor_protocol import FeatureMaps, localise
from medvl.attribute.gradcam import KINDS, grad_cam
from medvl.attribute.mammo_factor import Explainer, MammoFactor, MammoFactorConfig
from medvl.attribute.map_makers import comparison_makers
from medvl.attribute.sanity import cascade, stages_of
from medvl.attribute.sentence_maps import map_kinds, sentence_maps
from medvl.attribute.similarity import similarity_map, text_vector
from medvl.evaluate.analysis.analyse import analyse
from medvl.evaluate.localized.run import load_carrier
from medvl.evaluate.protocols.classification import Validator, classification, predict_images
from medvl.evaluate.protocols.detector import detect, map_validation
from medvl.evaluate.protocols.embeddings import embed
from medvl.evaluate.protocols.export import embed_texts, export_embeddings, read_embeddings
from medvl.evaluate.protocols.label_efficiency import label_efficiency
from medvl.evaluate.protocols.linear_probe import linear_probe
from medvl.evaluate.protocols.retrieval import retrieval_protocol
from medvl.evaluate.protocols.zero_shot import zero_shot
from medvl.methods.classifier import new_classifier
from medvl.methods.presets import new_mammoclip
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

BOOT = dict(n_boot=16, check=False, baseline=False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return str(tmp_path_factory.mktemp('device'))


@pytest.fixture(scope='module')
def data(tmp_path_factory): return made(tmp_path_factory.mktemp('made')/'data', patients=20, size=(64, 48))


@pytest.fixture
def accelerator():
    with Accelerator() as there: yield there


def clip(folder): return new_mammoclip('smoke', breasts(folder).manifest.report).eval()


def both(make, ask):
    "What is asked of a method on the CPU, and of the same on the device."
    here = ask(make())
    with Accelerator(): there = ask(make().to(DEVICE))
    return here, there


# ---- protocols

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_embeddings_are_those_of_the_cpu(folder, data, tmp_path, precision):
    number = iter(range(9))
    here, there = both(lambda: clip(folder), lambda m: embed(m, data, tmp_path/str(next(number)), precision=precision))
    for what in ('image', 'feature'): np.testing.assert_allclose(there.of(data, what), here.of(data, what), atol=.05 if precision == 'bf16' else 1e-5)


def test_export(folder, data, tmp_path, accelerator):
    method = clip(folder).to(DEVICE)
    found = embed(method, data, tmp_path/'cache')
    export_embeddings(found, data, tmp_path/'images.parquet', method)
    back, _ = read_embeddings(tmp_path/'images.parquet', method, data)
    np.testing.assert_array_equal(back.of(data, 'image'), found.of(data, 'image'))
    assert np.isfinite(embed_texts(method, ['no mass', 'mass'], tmp_path)).all()


def test_zero_shot_and_probes(folder, data, tmp_path, accelerator):
    method = clip(folder).to(DEVICE)
    asked = {'mass': (['no mass'], ['mass'])}
    assert len(zero_shot(method, data, asked, folder=tmp_path, **BOOT).scores)
    for device in ('cpu', DEVICE):
        probed = linear_probe(method, data, 'mass', folder=tmp_path, Cs=(.1, 1.), device=device, **BOOT)
        assert np.isfinite(probed.table.value).any()
        many = label_efficiency(method, data, 'mass', fractions=(.5, 1.), seeds=(0, 1), folder=tmp_path, Cs=(.1, 1.), device=device, **BOOT)
        assert len(many.table)


def test_retrieval(folder, tmp_path, accelerator):
    method, data = clip(folder).to(DEVICE), breasts(folder)
    assert len(retrieval_protocol(method, data, split=None, folder=tmp_path, ks=(1, 5), n_boot=16, check=False).units)


def test_classification(folder, data):
    make = lambda: new_classifier('efficientnet-tiny', ('mass',)).eval()
    here, there = both(make, lambda m: predict_images(m, data))
    np.testing.assert_allclose(there, here, atol=1e-5)
    with Accelerator():
        method = make().to(DEVICE)
        assert len(classification(method, data, **BOOT).table)
        assert 'valid_auroc' in Validator(data.subset((data.manifest.split == 'valid').to_numpy()), ('mass',))(method)


def test_detector(folder, accelerator):
    method, _, _ = case('retinanet', folder)
    data = breasts(folder)
    found = detect(method.eval().to(DEVICE), data)
    assert list(found.columns)
    assert set(map_validation(data, ('mass',))(method, None)) == {'valid_map', 'valid_map50'}


@pytest.mark.parametrize('task', [5, 10, 12])
def test_localized(tmp_path, monkeypatch, task):
    "Frozen and fine-tuned heads, boxes and masks: chosen, judged and cached, as the loop trains them on the device."
    train_on_device(monkeypatch)
    found = squares(tmp_path/'squares')
    with Accelerator(): out = evaluate(tmp_path/'out', task, {'covid_rural': found, 'rsna': found}, load_carrier('resnet-tiny').to(DEVICE), runs=1, max_lrs=1)
    assert len(out.done) == 1 and np.isfinite(out.runs.value).all(), out.results.to_dict('records')


def test_analysis(folder, accelerator):
    method, samples, _ = case('clip', folder)
    assert len(analyse(method.eval().to(DEVICE), samples, batch_size=4, n_boot=16).table)


# ---- maps

def image_of(data): return torch.from_numpy(np.array(data.image(0)))[None, None]


@pytest.mark.parametrize('kind', list(KINDS))
def test_grad_cam(folder, kind):
    image = image_of(breasts(folder))
    here, there = both(lambda: clip(folder), lambda m: grad_cam(m, image, 'a mass', kind).float().cpu())
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


def test_similarity_and_makers(folder):
    image, prompts = image_of(breasts(folder)), {'mass': ['mass'], 'calcification': ['calcification']}
    here, there = both(lambda: clip(folder), lambda m: similarity_map(m, image, text_vector(m, ['mass'])[None]).cpu())
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
    with Accelerator():
        for name, maker in comparison_makers(clip(folder).to(DEVICE), breasts(folder), prompts, kinds=tuple(KINDS)).items():
            assert np.isfinite(maker(0, 'mass')).all(), name


def test_mammo_factor_trains_and_draws(folder, tmp_path, monkeypatch, accelerator):
    train_on_device(monkeypatch)
    data, base = breasts(folder), clip(folder).to(DEVICE)
    maps = FeatureMaps(base, data, ['mass'], tmp_path)
    factor = MammoFactor(MammoFactorConfig(prompts={'mass': ['mass']}, grid=(4, 3), width=base.config.dim), base).to(DEVICE)
    train(factor, maps, TrainConfig(epochs=1, batch_size=4, lr=1e-3, warmup=0, trackers=()), tmp_path/'run')
    explainer = Explainer(factor)
    assert explainer.sentence({'images': image_of(data)[None].to(DEVICE)}, 'a mass')[0].device.type == DEVICE.type
    assert len(localise(explainer, maps, baselines=()) if data.boxes.label.eq('mass').any() else [1])


@pytest.mark.parametrize('name', ['lovt', 'clip'])
def test_sentence_maps(name, folder, accelerator):
    method, _, _ = case(name, folder)
    image = torch.from_numpy(np.array(chests(folder).image(0)))[None]
    method.eval().to(DEVICE)
    for kind in map_kinds(method): assert sentence_maps(method, image, ['No effusion.', 'The heart is large.'], kind).shape[0] == 2


def test_evidence(folder, accelerator):
    method, image = clip(folder).to(DEVICE), image_of(breasts(folder))
    vectors = phrase_vectors(method, ['a mass', 'no mass'])
    assert len(best_cells(method, image, vectors)) == 2
    factor = MammoFactor(MammoFactorConfig(prompts={'mass': ['mass']}, grid=(4, 3), width=method.config.dim), method).to(DEVICE)
    assert np.isfinite(best_channels(Explainer(factor), image.to(DEVICE), vectors)).all()


def test_sanity(folder, accelerator):
    method, image = clip(folder).to(DEVICE), image_of(breasts(folder))
    draw = lambda m: grad_cam(m, image, 'a mass').float().cpu().numpy()
    before = draw(method)
    maps = cascade(lambda: draw(method)[0], stages_of(method.image_encoder, n_stages=2))
    assert len(maps) == 3 and np.array_equal(draw(method), before), 'the weights are put back'


def test_the_encoder_that_was_not_trained(accelerator):
    method = initialised().to(DEVICE)
    assert method.image_features(torch.zeros(2, 1, 64, 64, device=DEVICE)).device.type == DEVICE.type
