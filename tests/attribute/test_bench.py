"""The bench of heat maps: a planted map on the finding is founded, a blind one is not, and what cannot be asked is said."""
import numpy as np
import pandas as pd
import pytest
import torch

from medvl.attribute import bench
from medvl.attribute.attribute import EXPLANATIONS
from medvl.attribute.bench import CONTROLS, beside_controls, bench_scores, bench_table, control_map
from medvl.attribute.targets import Explanation
from medvl.core.errors import DataError
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.methods.recipes import new_method


@pytest.fixture(scope='module')
def data(tmp_path_factory): return prepared_phantom(tmp_path_factory.mktemp('bench'), 10, (96, 64))


@pytest.fixture(scope='module')
def model(data): return new_method('mammoclip', 'smoke', data.manifest.report).eval()


def planted(monkeypatch, data, labels=('mass',)):
    "Ways of which one knows the truth of the image it is shown, and one gives the same map for all."
    truths = {np.array(data.image(i)).tobytes(): bench.truth_mask(data, i, labels).astype(np.float32) for i in range(len(data))}
    knows = lambda method, images, target, level: (torch.from_numpy(truths[images[0, 0].to(torch.uint8).numpy().tobytes()]), {})
    blind = lambda method, images, target, level: (torch.linspace(0, 1, images[0, 0].numel()).view(images.shape[-2:]), {})
    for name, draw in (('knows', knows), ('blind', blind)): monkeypatch.setitem(EXPLANATIONS, name, Explanation(draw, ('sentence',), 'planted'))
    return {'knows': ('knows', -1, {}), 'blind': ('blind', -1, {}), 'attention': ('rollout', -1, {})}


def test_a_map_that_knows_is_founded_and_a_blind_one_is_not(data, model, monkeypatch):
    scores, lost = bench_scores(model, data, {'mass': (('mass',), 'there is a mass')}, planted(monkeypatch, data))
    assert list(lost) == ['attention'] and 'on a ViT' in lost['attention']
    assert set(scores.method) == {*CONTROLS, 'knows', 'blind', "knows, another's image", "blind, another's image"}
    beside = beside_controls(scores, n_boot=200).set_index(['method', 'control'])
    best = beside.loc['knows'].index[0]
    assert best in CONTROLS and beside.loc['knows', best].founded and not beside.loc['blind', best].founded
    assert beside.loc['knows', "knows, another's image"].difference > .2 # another patient's finding lies elsewhere
    assert beside.loc['blind', "blind, another's image"].difference == 0 # the same map whatever it is shown
    table = bench_table(scores, n_boot=50)
    of = lambda m, k: table[(table.finding == 'all') & (table.method == m) & (table.metric == k)].value.item()
    assert of('knows', 'auroc') == 1 and of('knows', 'energy') == 1 and of('uniform', 'auroc') == .5
    assert of('uniform', 'pointing') == pytest.approx(scores.drop_duplicates('image_id').chance.mean())


def test_curves_of_the_first_images_only(data, model, monkeypatch):
    ways = {'knows': planted(monkeypatch, data)['knows']}
    scores, _ = bench_scores(model, data, {'mass': (('mass',), 'there is a mass')}, ways, images=3, faithful=1, steps=4)
    assert scores.deletion.notna().sum() == 1 + len(CONTROLS) and scores.image_id.nunique() == 3
    assert (scores.insertion - scores.deletion - scores['insertion - deletion']).abs().max() < 1e-9


def test_what_cannot_be_benched(data, model):
    with pytest.raises(DataError, match='no image has a box of bone'): bench_scores(model, data, {'bone': (('bone',), 'bone')}, {})
    with pytest.raises(ValueError, match='control'): control_map('middle', np.zeros((4, 4)))
    one = pd.DataFrame([dict(finding='a', image_id=1, patient_id=1, method='m', kind='way', auroc=.5)])
    with pytest.raises(ValueError, match='measure'): beside_controls(one, 'beauty')


def test_controls_know_no_model():
    image = np.zeros((40, 30), np.uint8); image[10:20, 5:15] = 200
    maps = {k: control_map(k, image, np.random.default_rng(0)) for k in CONTROLS}
    assert all(m.shape == image.shape and np.isfinite(m).all() for m in maps.values())
    assert np.unravel_index(maps['centre'].argmax(), image.shape) in [(19, 14), (20, 15), (19, 15), (20, 14)]
    assert maps['brightness'][15, 10] == pytest.approx(maps['brightness'].max(), rel=.05) and maps['edges'][15, 10] < maps['edges'].max() / 2
