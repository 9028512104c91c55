"""What seven datasets, two augmentations and two phantoms share: the dataset contract, draws by key, flips that agree with the words, one way to a prepared phantom."""
import pickle
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medvl.core.seed import numpy_rng
from medvl.data.augment.breast_versions import Augment, AugmentConfig
from medvl.data.augment.chest_versions import PRESETS, ChestAugment, MultiVersion, transform_of
from medvl.data.augment.transform import Transform, decided_flips
from medvl.data.balanced import Balanced, Mixture
from medvl.data.batch import slice_batch
from medvl.data.phantom.blocks import bounds, ellipse, shadows
from medvl.data.phantom.kinds import phantom_kind, phantom_kinds, prepared_phantom
from medvl.data.samples.base import Samples, read_key
from medvl.data.samples.boxes import DetectionAugment, detection_dataset
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset, ImageDataset
from medvl.data.samples.breast import paper_options
from medvl.data.samples.chest import ChestImageDataset, ChestReportConfig, ChestReportDataset
from medvl.data.samples.dense import DenseDataset
from medvl.data.samples.findings import FindingDataset
from medvl.data.samples.targets import TargetImages
from medvl.data.splits import carve_valid, choose_share
from medvl.data.text.sides import flip_text, names_side
from medvl.data.text.tokens import build_wordpiece


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp('kinds')
    return {kind: prepared_phantom(place/kind, 10, (64, 64), kind=kind) for kind in ('breast', 'chest')}


@pytest.fixture(scope='module')
def datasets(prepared):
    breast, chest = prepared['breast'], prepared['chest']
    tokenizer = build_wordpiece([*breast.manifest.report, *chest.manifest.report, 'left right upper lower inner outer'], 400)
    out = {'reports': BreastTextDataset(breast, tokenizer, BreastTextConfig(bucket=True)), 'findings': FindingDataset(breast, tokenizer),
           'paper': BreastTextDataset(breast, tokenizer, paper_options()),
           'images': ImageDataset(breast, train=True, boxes=True, masks=True), 'targets': TargetImages(breast, 'density', 'ABCD', True),
           'detection': detection_dataset(breast, ('mass',), train=True), 'studies': ChestReportDataset(chest, tokenizer, ChestReportConfig(bucket=True)),
           'chests': ChestImageDataset(chest, train=True), 'dense': DenseDataset(chest, 'opacity', 'boxes', True, flip_horizontal=0.5)}
    out['mixture'] = Mixture({'reports': out['findings'], 'again': out['findings']}, 'equal')
    out['balanced'] = Balanced(out['images'], 'mass')
    return out


NAMES = ('reports', 'findings', 'paper', 'images', 'targets', 'detection', 'studies', 'chests', 'dense', 'mixture', 'balanced')


# datasets
@pytest.mark.parametrize('name', NAMES)
def test_dataset_contract(datasets, name):
    "len, [(epoch, i)], collate, lengths, digest, allows_empty_text: the same sample for the same key, in any process, and nothing else is asked."
    data = datasets[name]
    n, again = len(data), pickle.loads(pickle.dumps(data)) # noqa: S301 (our own bytes)
    batch, twice = (d.collate([d[3, i] for i in range(n)]) for d in (data, again))
    assert batch['images'].equal(twice['images']) and batch['flip'].equal(twice['flip']) and batch.get('text') == twice.get('text')
    assert batch['index'].tolist() == list(range(n)) and batch['epoch'] == 3 and len(set(batch['sample_id'])) <= n and all(isinstance(p, str) for p in (*batch['patient_id'], *batch['study_id']))
    assert isinstance(data.digest, str) and data.digest == again.digest and data.allows_empty_text is (name == 'paper')
    assert data.lengths is None or np.shape(data.lengths) == (n,)
    assert (data.lengths is not None) == (name in ('reports', 'studies'))
    with pytest.raises(IndexError, match=f'among {n}'): data[n]
    assert data[-1]['sample_id'] == data[0, n - 1]['sample_id'] and name in ('mixture', 'balanced') or isinstance(data, Samples)
    if name != 'mixture': assert f'{n} ' in repr(data)


def test_flips_of_images_are_drawn_once(datasets):
    "A dataset that flips in one direction draws what one that flips in two draws for that direction."
    rng = lambda e, i: numpy_rng('sample', 0, e, i).random(2)
    for e in range(3):
        for i in range(6):
            assert datasets['images'][e, i]['flip'].tolist() == [(rng(e, i) < 0.5).tolist()]
            assert datasets['chests'][e, i]['flip'].tolist() == [[bool(rng(e, i)[0] < 0.5), False]]


def test_shares_and_read_key(prepared):
    chest = prepared['chest']
    half, whole = (ChestImageDataset(chest, fraction=f, seed=2) for f in (0.5, 1.0))
    here = choose_share(chest.manifest.patient_id.tolist(), 0.5, 'patient', 2)
    assert [r['image_id'] for r in half.rows] == chest.manifest.image_id[here].tolist() and len(half) == 5 and len(whole) == 10
    assert np.array_equal(half.values, whole.values[here], equal_nan=True) # labels go with their images
    assert read_key(-1, 4) == (0, 3) and read_key((7, 0), 4) == (7, 0)


def test_a_dataset_of_your_own():
    class Twice(Samples):
        def sample(self, epoch, index): return self.entries(epoch, index, self.rows[index], [(index, 'PA')]*2, np.zeros((2, 2), bool))
    made = SimpleNamespace(images=np.zeros((3, 4, 4), np.uint8), digest='made')
    data = Twice(made, [dict(image_id=f'i{k}', patient_id='p') for k in range(3)], True)
    assert data.collate([data[0, k] for k in range(3)])['images'].shape == (3, 2, 1, 4, 4) and data[0]['sample_id'] == 'i0'
    with pytest.raises(NotImplementedError, match='Samples'): Samples(made, data.rows, True)[0]


def test_valid_part_is_carved_out_of_train():
    who = pd.DataFrame({'patient_id': np.repeat([f'p{i}' for i in range(30)], 2)})
    split = pd.Series(['train']*40 + ['test']*20)
    carved = carve_valid(who, split, 0.25, seed=1)
    assert (carved[40:] == 'test').all() and 0 < (carved == 'valid').sum() < 30 and carved.groupby(who.patient_id).nunique().max() == 1
    assert carve_valid(who, carved, 0.25).equals(carved) and carve_valid(who[:2], split[:2], 0.9).equals(split[:2]) # one patient stays in train


# versions
RECIPES = {**{name: name for name in PRESETS}, 'mammoclip': AugmentConfig(affine=1.0, elastic=1.0)}


def picture_batch(b=6, v=1, **more):
    images = torch.from_numpy(numpy_rng('pictures').integers(0, 256, (b, v, 1, 40, 32), dtype=np.uint8))
    return dict(images=images, index=torch.arange(b), epoch=0, sample_id=[f's{i}' for i in range(b)], **more)


def mirrored(transforms): return (transforms[..., :2, :2].double().det() < 0).tolist()


@pytest.mark.parametrize('recipe', list(RECIPES))
def test_versions_turn_only_with_their_words(recipe):
    "Several versions of a sample with words are mirrored where its `flip` says so, all alike, and nowhere else."
    flip = torch.tensor([[[i % 2 == 0, False]] for i in range(6)])
    told = picture_batch(flip=flip, text=[['left']]*6)
    for transforms in MultiVersion(RECIPES[recipe])(told)['transforms']: assert mirrored(transforms) == [[i % 2 == 0] for i in range(6)]
    undecided = {k: v for k, v in told.items() if k != 'flip'}
    for entry in ('text', 'tokens', 'sentences', 'question', 'answer'):
        worded = {k: v for k, v in undecided.items() if k != 'text'} | {entry: [['left']]*6}
        for transforms in MultiVersion(RECIPES[recipe])(worded)['transforms']: assert not np.any(mirrored(transforms))
    assert decided_flips(told, True).tolist() == flip.tolist()


def test_versions_without_words_draw_their_own():
    found = MultiVersion('simclr')(picture_batch(40, flip=torch.zeros(40, 1, 2, dtype=torch.bool)))['transforms']
    first, second = (np.ravel(mirrored(t)) for t in found)
    assert 8 < first.sum() < 32 and (first != second).any()


def test_words_of_a_dataset_agree_with_every_version(datasets):
    "From the report to the version: where a version is mirrored, the sample's words are those of the mirrored breast or chest."
    for name in ('reports', 'findings', 'studies'):
        data = datasets[name]
        swapped = 0
        for epoch in range(4):
            batch = data.collate([data[epoch, i] for i in range(len(data))])
            for transforms in MultiVersion('lovt', 2)(batch)['transforms']:
                turned = np.array(mirrored(transforms))[:, 0]
                upside = batch['flip'][:, 0].numpy()
                assert (turned == (upside[:, 0] ^ upside[:, 1])).all() # a determinant tells one flip from two
                for i in np.flatnonzero(upside[:, 0]):
                    row = data.rows[i]
                    typed = ' '.join(row.get('reports') or row.get('sentences') or [])
                    words = ' '.join(batch['text'][i])
                    if name == 'findings': typed = f"{ {'L': 'left', 'R': 'right'}[row['laterality']] } breast"
                    for side in ('left', 'right'):
                        if side in words.lower(): assert side in flip_text(typed, True, bool(upside[i, 1])).lower(), (name, words)
                    swapped += names_side(words)
        assert swapped > 0


@pytest.mark.parametrize('recipe', list(RECIPES))
def test_draws_depend_on_seed_epoch_sample_view_and_version(recipe):
    make, batch = MultiVersion(RECIPES[recipe], 2), picture_batch(4, 2)
    whole = make(batch, seed=1)
    part = make(slice_batch(batch, 2, 4), seed=1)
    for a, b in zip(whole['augmented'], part['augmented']): assert a[2:].equal(b)
    if recipe in ('none', 'flip'): return
    draws = {tuple(m.flatten().tolist()) for found in (whole, make(batch, seed=2), make(batch, seed=1, epoch=5)) for t in found['transforms'] for m in t.flatten(0, 1)}
    assert len(draws) == 3*2*4*2


def test_one_version_is_the_first_of_several():
    for recipe in RECIPES.values():
        one = transform_of(recipe)(picture_batch(), seed=3)
        assert MultiVersion(recipe, 2)(picture_batch(), seed=3)['augmented'][0].equal(one['images'])


def test_vertical_flips_reach_every_recipe():
    "A breast turned upside down, whose words say so, is turned by a chest's recipe as well, with its box and its mask."
    batch = picture_batch(2, flip=torch.tensor([[[False, True]], [[True, True]]]), text=[['lower']]*2, boxes=[[np.array([[2, 3, 8, 9]], np.float32)]]*2,
                          masks=torch.zeros(2, 1, 40, 32, dtype=torch.uint8))
    batch['masks'][:, :, 3:9, 2:8] = 1
    for transform in (ChestAugment('none'), Augment(mode='none'), DetectionAugment(mode='none')):
        out = transform(batch)
        assert out['images'][0, 0].equal(batch['images'][0, 0].float().flip(-2)) and out['images'][1, 0].equal(batch['images'][1, 0].float().flip((-1, -2)))
        assert out['masks'][0].equal(batch['masks'][0].flip(-2)) and out['boxes'][0][0].tolist() == [[2, 31, 8, 37]] and isinstance(transform, Transform)


# phantoms
def test_kinds_are_found_and_refused(prepared, tmp_path):
    assert phantom_kinds() == ['breast', 'chest'] and phantom_kind('chest').size == (224, 224)
    assert len(prepared['breast']) == 40 and len(prepared['chest']) == 10 and prepared['chest'].info['settings']['mask_bits']
    with pytest.raises(ValueError, match='chest'): prepared_phantom(tmp_path, 2, kind='knee')


def test_blocks():
    assert ellipse(3.0, 0.0, 3.0, 1.0, 1.0, 0.0) == 1 == ellipse(0.0, 3.0, 3.0, 1.0, 0.0, 1.0) # turned by a right angle
    rng = numpy_rng('shadows')
    found = [list(shadows(rng, 4, lambda: (0.0, 1.0), (6, 14), (2, 5))) for _ in range(200)]
    assert abs(np.mean([len(f) for f in found]) - 4) < 0.5 and all(6 <= a <= 14 and 2 <= b <= 5 for f in found for _, _, a, b, _ in f)
    assert bounds(np.pad(np.ones((2, 3), bool), ((1, 4), (2, 2)))).tolist() == [2, 1, 5, 3]
