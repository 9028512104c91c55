"""The table of fields: what is declared is collated, sliced, joined, moved and checked; what is not is refused by its name."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.data.batch import (FIELDS, PIXELS, STACKED, VERSIONS, Field, check_batch, collate, declare, join, slice_batch, to_device, without_pixels,
                              words_per_view)


def exam(i, here=(True, True), **more):
    return dict(sample_id=f'e{i}', patient_id=f'p{i}', study_id=f's{i}', index=i, epoch=3, present=np.array(here), view=['CC', 'MLO'], laterality=['L', 'R'],
                images=[np.full((4, 3), 10 * i + j, np.uint8) if p else None for j, p in enumerate(here)], targets=[40. + i, np.nan],
                tokens=[np.arange(2 + i)], question=[np.arange(3), np.arange(5)], answer=[np.arange(1)], labels=np.array([1, np.nan], np.float32), **more)


def exams(*here): return collate([exam(i, h) for i, h in enumerate(here)], pad=7)


def same(a, b):
    assert a.keys() == b.keys()
    for k, v in a.items():
        if isinstance(v, dict): same(v, b[k])
        elif isinstance(v, torch.Tensor): assert v.dtype == b[k].dtype and torch.equal(v.nan_to_num(-9) if v.is_floating_point() else v, b[k].nan_to_num(-9) if v.is_floating_point() else b[k]), k
        else: assert v == b[k], k


def test_every_field_says_what_it_is():
    assert all(f.dtype is None or f.dtype == 'tokens' or isinstance(f.dtype, torch.dtype) for f in FIELDS.values())
    assert {'images', 'augmented', 'masks', 'taps', 'maps'} == set(PIXELS) - {'test-scan'} and {'augmented', 'transforms', 'hidden'} == set(VERSIONS)
    assert STACKED['labels'] == STACKED['targets'] == torch.float32 and STACKED['present'] == torch.bool and 'tokens' not in STACKED


def test_collate_of_everything():
    b = check_batch(exams((True, False), (True, True), (False, True)))
    assert b['rows'].tolist() == [0, 2, 3, 5] and b['present'].dtype == torch.bool and b['epoch'] == 3
    assert b['targets'].dtype == torch.float32 and b['targets'][:, 0].tolist() == [40, 41, 42] and b['targets'][:, 1].isnan().all()
    assert b['question']['input_ids'].shape == (3, 2, 8) and b['answer']['attention_mask'].sum() == 3 and b['tokens']['input_ids'][0, 0, 2] == 7
    assert b['images'][0, 1].max() == 0 and b['images'][2, 1].max() == 21 and b['laterality'][0] == ['L', 'R']
    assert collate([exam(np.int64(1))])['epoch'] == 3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([(True, True), (True, False), (False, True)]), min_size=1, max_size=6), st.data())
def test_rows_stay_right(here, data):
    "However a batch is cut and joined, rows number the present views."
    whole = exams(*here)
    cuts = sorted({0, len(here), *data.draw(st.lists(st.integers(0, len(here)), max_size=3))})
    parts = [check_batch(slice_batch(whole, a, b)) for a, b in zip(cuts, cuts[1:])]
    same(check_batch(join(parts)), whole)
    assert all(p['images'].flatten(0, 1)[p['rows']].flatten(1).amax(1).tolist() == p['images'].flatten(0, 1)[p['present'].flatten()].flatten(1).amax(1).tolist() for p in parts)


def test_undeclared_entries_are_refused_by_name():
    b = exams((True, True))
    for f in (lambda x: collate([{**exam(0), 'lables': [1]}]), lambda x: slice_batch(x, 0, 1), lambda x: to_device(x, 'cpu'), check_batch):
        with pytest.raises(ValueError, match='lables.*Did you mean'): f({**b, 'lables': torch.ones(1)})
    with pytest.raises(ValueError, match='declared already'): declare('labels', Field(torch.int64, 'b'))
    assert declare('labels', FIELDS['labels']) is FIELDS['labels']


def test_a_new_entry_of_unequal_sizes():
    if 'test-curve' not in FIELDS: declare('test-curve', Field(torch.float32, 'b n', pad=-1, what='of a test'))
    b = check_batch(collate([exam(i, **{'test-curve': np.arange(2. + i)}) for i in range(3)]))
    assert b['test-curve'].tolist() == [[0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]]
    parts = [collate([exam(i, **{'test-curve': np.arange(2. + i)})]) for i in range(3)]
    assert torch.equal(join(parts)['test-curve'], b['test-curve'])
    declare('test-scan', Field(torch.uint8, 'b n', pixels=True)) if 'test-scan' not in FIELDS else None
    assert 'test-scan' not in without_pixels({**b, 'test-scan': 0}) and 'test-scan' in without_pixels({**b, 'test-scan': 0}, ('test-scan',))


def test_collate_refusals():
    for bad, message in (({'images': [None, None]}, 'e0 lacks the image'), ({'present': np.array([False, False])}, 'e0 has 2 images'), ({'present': np.array([True])}, 'e0 has 2 images')):
        with pytest.raises(ValueError, match=message): collate([{**exam(0), **bad}])
    bare = exam(1); bare.pop('present')
    with pytest.raises(ValueError, match='e1 has no present'): collate([exam(0), bare])
    with pytest.raises(ValueError, match='e1 have another shape'): collate([exam(0), {**exam(1), 'images': [np.zeros((5, 3), np.uint8)] * 2}])


@pytest.mark.parametrize('name,value,message', [
    ('labels', torch.ones(3), 'axes'), ('labels', torch.ones(2, 2), 'along b'), ('flip', torch.zeros(3, 2, 2), 'torch.bool is declared'),
    ('flip', torch.zeros(3, 1, 2, dtype=torch.bool), 'along v'), ('view', [['CC']] * 2, '2 values for 3'), ('rows', torch.tensor([0]), 'rows'),
    ('tokens', {'input_ids': torch.ones(3, 4, dtype=torch.int64)}, 'input_ids'), ('augmented', [torch.ones(3, 2, 4, 3)], 'axes')])
def test_check_names_what_is_wrong(name, value, message):
    with pytest.raises(ValueError, match=message) as e: check_batch({**exams((True, True), (True, False), (True, True)), name: value})
    assert f'"{name}"' in str(e.value)


def test_words_a_view():
    b = exams((True, True), (True, True))
    assert words_per_view(b) == [['L', 'R']] * 2 and words_per_view({**b, 'laterality': ['L', 'R']}) == [['L', 'L'], ['R', 'R']]
    assert words_per_view({k: v for k, v in {**b, 'laterality': ['L', 'R']}.items() if k != 'view'}) == [['L', 'L'], ['R', 'R']]
