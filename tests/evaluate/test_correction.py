"""Reports put right: gains over doing nothing, harm to right ones, planted correctors; bad input."""
import numpy as np
import pytest

from medvl.core.errors import DataError
from medvl.data.text.errors import ErrorGenerator, error_table
from medvl.evaluate.protocols.correction import NOTHING, correction, exactly, writes_corrections
from medvl.methods.base import Method

REPORTS = [f'{s} effusion. Heart is {h}.' for s in ('Left', 'Right') for h in ('normal', 'large', 'small', 'enlarged')]
FILMS = np.zeros((8, 1, 4, 4), np.uint8)
WHO = [f'p{i}' for i in range(8)]


@pytest.fixture(scope='module')
def errors(): return error_table(ErrorGenerator(REPORTS), REPORTS, ('location', 'omission'))


def by_row(images, rows, texts): return [REPORTS[r].upper() for r in rows]
def as_it_is(images, rows, texts): return texts
def nothing_but_normal(images, rows, texts): return ['Normal.'] * len(texts)


def test_planted_correctors(errors):
    found = correction(dict(knows=by_row, idle=as_it_is, ruins=nothing_but_normal), FILMS, errors, WHO, {'length': lambda a, b: [-abs(len(x) - len(y)) for x, y in zip(a, b)]}, n_boot=50)
    t, g = (x.set_index(['kind', 'corrector', 'metric']) for x in (found.table, found.gains))
    assert t.value['all', 'knows', 'restored'] == 1 and t.value['all', NOTHING, 'restored'] == 0 and t.value['none', NOTHING, 'restored'] == 1
    assert g.value['all', 'idle', 'restored'] == 0 and not g.better['all', 'idle', 'restored'] and g.better['all', 'knows', 'restored']
    assert g.value['none', 'ruins', 'restored'] == -1 and g.value['none', 'knows', 'restored'] == 0
    assert t.value['location', NOTHING, 'length'] == pytest.approx(np.mean([-abs(len(r.text) - len(r.original)) for r in errors[errors.changed & (errors.kind == 'location')].itertuples()]))
    assert 'doing nothing' in repr(found) and len(found.texts) == errors.changed.sum() + 8
    less = correction(dict(knows=by_row), FILMS, errors, WHO, sound=False, n_boot=20)
    assert set(less.table.kind) == {'location', 'omission', 'all'} - ({'omission'} - set(errors.kind[errors.changed]))


def test_bad_correctors(errors):
    with pytest.raises(ValueError, match='doing nothing'): correction({NOTHING: as_it_is}, FILMS, errors, WHO)
    with pytest.raises(DataError, match='7 answers|answers'): correction(dict(short=lambda i, r, t: t[1:]), FILMS, errors, WHO)
    with pytest.raises(DataError, match='NoneType'): correction(dict(none=lambda i, r, t: [None] * len(t)), FILMS, errors, WHO)
    with pytest.raises(DataError, match='no number'): correction({}, FILMS, errors, WHO, {'nan': lambda a, b: [np.nan] * len(a)})
    with pytest.raises(DataError, match='empty'): correction({}, FILMS, errors.assign(original=''), WHO)
    with pytest.raises(ValueError, match='3 patients'): correction({}, FILMS, errors, WHO[:3])
    with pytest.raises(TypeError, match='generate'): writes_corrections(Method())
    assert exactly([''], ['Normal.']).tolist() == [0.]
