"""Maps of places: made of real boxes, scored on real boxes of other images, without a radiograph."""
import numpy as np
import pandas as pd
import pytest
from golden import sample

from medvl.attribute.bench import control_map
from medvl.attribute.place_priors import box_phrases, place_priors, prior_scores
from medvl.core.errors import DataError
from medvl.data.releases.chestx_det import read_det_file

FRAME, SIZE = (1024, 1024), (64, 64)


def phrases(name, absent=0, most=None):
    table, names = read_det_file(sample(f'grounding/{name}'))
    names = names[:most]
    return box_phrases(table, names, FRAME, SIZE, absent=absent)


@pytest.mark.parametrize('train, test, findings', [('chestx_det/ChestX_Det_train.json', 'chestx_det/ChestX_Det_test.json', 13), ('chestx_det10/train.json', 'chestx_det10/test.json', 10)])
def test_the_name_of_a_finding_tells_where_its_real_boxes_lie(train, test, findings):
    learnt, sought = phrases(train), phrases(test, 5, 150)
    assert not set(learnt.image_id) & set(sought.image_id) and learnt.label.nunique() == sought.label.nunique() == findings
    priors = place_priors(learnt, SIZE)
    assert set(priors) == {*learnt.label, 'all'} and all(0 <= m.min() and m.max() <= 1 and m.shape == SIZE for m in priors.values())
    assert (sought.boxes.map(len) == 0).sum() == 5 * findings and sought.phrase[0] == sought.label[0].replace('_', ' ')
    scores = prior_scores(sought, {'prior': lambda p: priors[p.label], 'centre': lambda p: control_map('centre', np.zeros(SIZE))}, SIZE)
    own = scores[scores.regions != 'none'].groupby('map_of')
    assert own.cnr.mean()['prior'] > own.cnr.mean()['centre'] + .5 and own.auroc.mean()['prior'] > .8 > own.auroc.mean()['centre'] and not scores.missing.any()
    quiet = scores[scores.regions == 'none']
    assert quiet.alarm.notna().all() and quiet[['cnr', 'pointing', 'auroc']].isna().all(axis=None)


def test_counted_by_hand():
    boxes = pd.DataFrame([(1, 'a', 0, 0, 4, 8), (1, 'a', 4, 0, 8, 8), (2, 'a', 0, 0, 4, 8), (3, 'b', 0, 0, 8, 8), (9, 'b', 0, 0, 1, 1)], columns=['image_id', 'label', 'x0', 'y0', 'x1', 'y1'])
    asked = box_phrases(boxes, [1, 2, 3], (8, 8), (4, 4), {'1': 'p', '2': 'p', '3': 'q'})
    assert asked.patient_id.tolist() == ['p', 'p', 'q'] and asked.i.tolist() == [0, 1, 2] and asked.boxes.map(len).tolist() == [2, 1, 1] # image 9 is not of this set
    priors = place_priors(asked, (4, 4))
    assert (priors['a'][:, :2] == 1).all() and (priors['a'][:, 2:] == .5).all() and (priors['b'] == 1).all() and priors['all'][0, 3] == .75
    wide = prior_scores(asked, {'small': lambda p: priors[p.label][::2, ::2], 'none': lambda p: None}, (4, 4))
    assert wide[wide.map_of == 'none'].missing.all() and wide[wide.map_of == 'none'].cnr.eq(0).all() and wide[wide.map_of == 'none'].auroc.isna().all()
    assert wide.auroc[1] == 1 and np.isnan(wide.auroc[2]) or wide.auroc[2] in (None, .5) # a box that fills the image has no outside
    dot = box_phrases(pd.DataFrame([(1, 'a', 3.1, 3.1, 3.3, 3.3)], columns=boxes.columns), [1], (8, 8), (4, 4)) # no pixel's centre lies in it
    assert prior_scores(dot, {'centre': lambda p: control_map('centre', np.zeros((4, 4)))}, (4, 4))[['cnr', 'pointing', 'miou', 'auroc']].isna().all(axis=None)
    with pytest.raises(DataError, match='no box lies on these images'): box_phrases(boxes, ['x'], (8, 8), (4, 4))
    with pytest.raises(DataError, match='no phrase has a box'): place_priors(asked.assign(boxes=[np.zeros((0, 4))] * 3), (4, 4))
    one, other = (box_phrases(boxes, range(1, 200), (8, 8), (4, 4), absent=3, seed=s).image_id.tolist() for s in (0, 1))
    assert one != other and one == box_phrases(boxes, range(1, 200), (8, 8), (4, 4), absent=3).image_id.tolist()
