"""Phrases with no, one or many regions: the published numbers by a plain loop, and answers that are missing."""
import numpy as np
import pandas as pd
import pytest

from medvl.attribute.phrases import ask_phrases, box_phrase_scores, own_phrases, phrase_scores, phrase_table, phrases_on
from medvl.core.errors import DataError
from medvl.data.phantom.chest_prepared import prepared_chest_phantom


def table(*boxes): return pd.DataFrame([dict(i=0, image_id=f'i{k}', patient_id=f'p{k // 2}', label='effusion', phrase=f'phrase {k}', boxes=np.array(b, float).reshape(-1, 4)) for k, b in enumerate(boxes)])


THREE = table([[2, 3, 8, 9]], [[1, 1, 5, 5], [10, 10, 15, 14]], [])


def test_the_numbers_by_a_plain_loop():
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((16, 20)) for _ in range(3)]
    scores = phrase_scores(maps, THREE, (16, 20), unit='raw')
    for k in (0, 1):
        inside = np.zeros((16, 20), bool)
        for x0, y0, x1, y1 in THREE.boxes[k].astype(int): inside[y0:y1, x0:x1] = True
        m = maps[k].astype(np.float32).astype(float)
        cnr = (m[inside].mean() - m[~inside].mean()) / np.sqrt(m[inside].var() + m[~inside].var())
        ious = [((m > t) & inside).sum() / ((m > t) | inside).sum() for t in (.1, .2, .3, .4, .5)]
        assert scores.cnr[k] == pytest.approx(cnr, abs=1e-6) and scores.cnr_absolute[k] == pytest.approx(abs(cnr), abs=1e-6)
        assert scores.miou[k] == pytest.approx(np.mean(ious), abs=1e-9) and scores['iou@0.3'][k] == pytest.approx(ious[2], abs=1e-9)
        assert scores.pointing[k] == inside.ravel()[m.argmax()]
    assert scores.regions.tolist() == ['one', 'several', 'none'] and np.isnan(scores.cnr[2]) and scores.alarm[2] == pytest.approx((maps[2] > .3).mean())
    shares = phrase_scores([3 * m + 7 for m in maps], THREE, (16, 20)) # shares of the range do not depend on the scale
    np.testing.assert_allclose(shares.miou[:2], phrase_scores(maps, THREE, (16, 20)).miou[:2])


def test_a_missing_answer_never_takes_the_last_one():
    there = np.zeros((16, 20)); there[3:9, 2:8] = 1
    same = table(*[[[2, 3, 8, 9]]] * 4)
    scores = phrase_scores({0: there, 2: None}, same, (16, 20))
    assert scores.missing.tolist() == [False, True, True, True] and scores.miou.tolist() == [1, 0, 0, 0] and scores.pointing.tolist() == [1, 0, 0, 0] and scores.cnr.tolist()[1:] == [0, 0, 0]
    boxes = box_phrase_scores({0: same.boxes[0], 2: None}, same, (16, 20))
    assert boxes.f1.tolist() == [1, 0, 0, 0] and boxes.overlap.tolist() == [1, 0, 0, 0] and boxes.boxes.tolist() == [1, 0, 0, 0]
    quiet = box_phrase_scores({0: [], 1: None}, table([], [], []), (16, 20))
    assert quiet.left_alone.tolist() == [1, 0, 0] # nothing drawn is an answer, no answer is none
    assert phrase_table(scores, n_boot=20).set_index(['regions', 'metric']).missing['named', 'miou'] == 3


def test_several_boxes_are_matched_once():
    two = table([[0, 0, 4, 4], [10, 10, 14, 14]])
    f1 = lambda boxes: box_phrase_scores({0: boxes}, two, (16, 20)).f1[0]
    assert f1([[0, 0, 4, 4]]) == pytest.approx(2 / 3) and f1([[0, 0, 4, 4], [0, 0, 4, 4]]) == pytest.approx(1 / 2) and f1([[0, 0, 4, 4], [10, 10, 14, 14]]) == 1


def test_odd_maps():
    flat = phrase_scores([np.zeros((4, 4)), np.ones((4, 4)), np.full((4, 4), 2.)], THREE, (16, 20))
    assert flat.cnr[:2].tolist() == [0, 0] and flat.miou[:2].tolist() == [0, 0] and flat.alarm[2] == 0
    assert flat.pointing[0] == pytest.approx(36 / 320) # chance, not luck
    with pytest.raises(ValueError, match='not finite'): phrase_scores([np.full((4, 4), np.nan)], THREE, (16, 20))
    with pytest.raises(ValueError, match='unit'): phrase_scores([], THREE, (16, 20), unit='share')


def test_phrases_on_prepared_images(tmp_path):
    films = prepared_chest_phantom(tmp_path, n=8, size=(64, 96))
    r = films.manifest.iloc[2]
    given = pd.DataFrame([dict(image_id=r.image_id, label='x', phrase='y', boxes=np.array([[0, 0, r.orig_width / 2, r.orig_height]], float), height=r.orig_height, width=r.orig_width),
                          dict(image_id='elsewhere', label='x', phrase='y', boxes=np.zeros((0, 4)), height=9, width=9)])
    if (r.crop_y0, r.crop_x0, r.crop_y1, r.crop_x1) == (0, 0, r.orig_height, r.orig_width):
        on = phrases_on(films, given)
        assert len(on) == 1 and on.boxes[0].tolist() == [[0, 0, 48, 64]] and on.i.tolist() == [2]
    with pytest.raises(DataError, match='boxes are drawn on'): phrases_on(films, given.assign(height=5))
    with pytest.raises(DataError, match='was prepared'): phrases_on(films, given.iloc[1:])
    own = own_phrases(films)
    assert {len(b) > 0 for b in own.boxes} == {True, False} # some name something on their image, some name nothing
    asked = ask_phrases(films, own.head(3), lambda image, phrase: None if phrase == own.phrase[1] else image)
    assert asked[1] is None and asked[0].shape == (64, 96)
    bare = films.subset([0]); bare.sentences = bare.sentences[:0]
    with pytest.raises(DataError, match='no sentences'): own_phrases(bare)
