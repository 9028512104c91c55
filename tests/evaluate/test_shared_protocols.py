"""Protocols and validation that two gloo processes share are those of one process."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from evaluation import Grey, made
from localized import squares
from training import Pairs, Small, run

from medvl.core.errors import DataError
from medvl.data.samples.dense import DenseDataset
from medvl.evaluate.localized.detection import find_boxes
from medvl.evaluate.metrics.segmentation import count_dataset
from medvl.evaluate.protocols.classification import Validator, predict_images
from medvl.evaluate.protocols.detector import detect
from medvl.evaluate.protocols.embeddings import embed
from medvl.evaluate.protocols.linear_probe import linear_probe
from medvl.evaluate.protocols.zero_shot import zero_shot
from medvl.methods.base import StepState
from medvl.methods.classifier import new_classifier
from medvl.methods.retinanet import RetinaNet, RetinaNetConfig
from medvl.methods.segmenter import segmenter_from
from medvl.methods.yolo import yolo_from
from medvl.train.distributed import joined, launch, own_batches
from medvl.train.validation import validation_loss


@pytest.fixture(scope='module')
def data(tmp_path_factory): return made(tmp_path_factory.mktemp('made')/'data', patients=15)


@pytest.fixture(scope='module')
def marked(tmp_path_factory): return squares(tmp_path_factory.mktemp('squares')/'data', n=(4, 4, 5))


class Counting(Grey):
    "Says how many images this process has read."
    def image_features(self, images):
        self.read = getattr(self, 'read', 0) + len(images)
        return super().image_features(images)


def test_batches_are_those_of_one_process():
    whole = own_batches(11, 2)
    assert whole == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert sum(launch(lambda: own_batches(11, 2), processes=3), []) == whole
    assert sum(launch(lambda: own_batches(1, 2)), []) == [[0]] and own_batches(0, 2) == []


def test_embeddings(data, tmp_path):
    one = embed(Counting(), data, tmp_path/'one', batch_size=4)
    def work():
        method = Counting()
        found = embed(method, data, tmp_path/'two', batch_size=4)
        again = embed(Counting(), data, tmp_path/'two', batch_size=4)
        return {k: np.array(v) for k, v in found.arrays.items()}, method.read, again.ids.tolist()
    for arrays, read, ids in launch(work):
        for k, v in one.arrays.items(): np.testing.assert_array_equal(arrays[k], v)
        assert len(data) / 2 - 4 <= read <= len(data) / 2 + 5, 'each reads its half (and one image to know the width)'
        assert ids == one.ids.tolist()
    files = lambda p: sorted(f.name for f in p.rglob('*') if f.is_file())
    assert files(tmp_path/'one') == files(tmp_path/'two')


def test_a_bad_image_stops_both_and_what_was_done_is_kept(data, tmp_path):
    with pytest.raises(Exception, match='not finite'): launch(lambda: len(embed(Grey(nan_at=9 if dist.get_rank() else None), data, tmp_path, batch_size=4, what='feature')))
    assert len(embed(Grey(), data, tmp_path, batch_size=4, what='feature')) == len(data)


def test_zero_shot_and_probe(data, tmp_path):
    def both(folder):
        options = dict(folder=folder, n_boot=16, check=False, baseline=False)
        asked = zero_shot(Grey(), data, {'mass': ('no mass', 'mass')}, **options).table
        return asked.to_json(), linear_probe(Grey(), data, 'mass', Cs=(.1, 1.), **options).table.to_json()
    one = both(tmp_path/'one')
    assert launch(lambda: both(tmp_path/'two')) == [one, one]


def test_predictions(tmp_path):
    data = made(tmp_path/'made', patients=15, size=(64, 48))
    method = new_classifier('efficientnet-tiny', ('mass',)).eval()
    valid = data.subset((data.manifest.split == 'valid').to_numpy())
    ask = lambda: (predict_images(method, data, 7), Validator(valid, ('mass',))(method))
    one, shares = ask(), launch(ask)
    for found, scores in shares:
        np.testing.assert_array_equal(found, one[0])
        assert scores == one[1]


def test_dense_answers(marked):
    masks, boxes = DenseDataset(marked, 'opacity'), DenseDataset(marked, 'opacity', 'boxes')
    segmenter, yolo = segmenter_from('resnet-tiny', 'opacity').eval(), yolo_from('resnet-tiny', 'opacity').eval()
    retinanet = RetinaNet(RetinaNetConfig(image_encoder='efficientnet-tiny', pyramid_width=8, head_width=8, classes=('opacity',))).eval()
    ask = lambda: (count_dataset(segmenter, masks, batch_size=3).counts, *find_boxes(yolo, boxes, batch_size=3), detect(retinanet, marked, 3))
    one, shares = ask(), launch(ask)
    for found in shares:
        np.testing.assert_array_equal(found[0], one[0])
        for a, b in zip(found[1:], one[1:]): pd.testing.assert_frame_equal(a, b)


class Whole(Small):
    "A method that cannot be chunked: its validation loss is one of batches."
    chunkable = False


def whole():
    torch.manual_seed(0)
    return Whole()


def test_validation_of_a_method_that_cannot_be_chunked():
    method, valid = whole(), Pairs(23, seed=1)
    ask = lambda: validation_loss(method, valid, StepState(), 4, 12)
    one = ask()
    assert launch(ask) == [one, one]
    with pytest.raises(Exception, match='sample p003'): launch(lambda: validation_loss(method, Pairs(23, nan=3), StepState(), 4, 12))


def test_validate_is_called_in_every_process(tmp_path):
    def validate(method, state): return {'valid_rows': float(sum(joined(lambda: [len(b) for b in own_batches(9, 2)])))}
    def work(): return run(tmp_path, whole(), chunk_size=None, accumulate=1, max_steps=2, warmup=0, batch_size=4, validate=validate)[1].history.valid_rows.dropna().tolist()
    assert launch(work) == [[9.0], [9.0]]


def test_an_error_in_one_is_an_error_in_all():
    def work():
        def compute():
            if dist.get_rank(): raise OSError('the disk is gone')
            return [1]
        try: joined(compute)
        except (OSError, DataError) as e: return type(e).__name__, str(e)
    assert launch(work) == [('DataError', 'process 1 stopped: OSError: the disk is gone'), ('OSError', 'the disk is gone')]
