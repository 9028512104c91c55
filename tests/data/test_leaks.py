"The leak check: what it finds, whom it does not accuse, and what it survives."
import json
import os

import cv2
import numpy as np
import pandas as pd
import pytest
from test_splits import dataset

from medvl.data.phantom.chest_film import chest_exam
from medvl.data.leaks import LeakReport, check_leaks, near_pairs, stored_thumbnails
from medvl.data.likeness import Looks, stripes, thumbnail, thumbnails, turned_descriptor, turned_image, windows
from medvl.data.phantom.breast_exam import phantom_exam


def rotated(x, degrees):
    h, w = x.shape
    return cv2.warpAffine(x, cv2.getRotationMatrix2D((w/2 - .5, h/2 - .5), degrees, 1), (w, h))


def moved(x, fy, fx): return cv2.warpAffine(x, np.float32([[1, 0, round(fx*x.shape[1])], [0, 1, round(fy*x.shape[0])]]), x.shape[::-1])


def marked(x):
    x = x.copy()
    cv2.putText(x, 'R CC', (4, 24), cv2.FONT_HERSHEY_SIMPLEX, .6, 255, 2)
    return x


def gamma(x, g): return np.round(255*(x/255.)**g).astype(np.uint8)


CHANGES = {'same': lambda x: x} | {f'turn {k}': lambda x, k=k: turned_image(x, k) for k in range(1, 8)} | {
    'inverted': lambda x: 255 - x, 'gamma .5': lambda x: gamma(x, .5), 'gamma 2': lambda x: gamma(x, 2), 'CLAHE': lambda x: cv2.createCLAHE(2, (8, 8)).apply(x),
    'crop': lambda x: x[round(.1*len(x)):, :-round(.1*x.shape[1])], 'crop all round': lambda x: x[len(x)//20:-(len(x)//20), x.shape[1]//20:-(x.shape[1]//20)],
    'shift': lambda x: moved(x, .1, -.05), 'rotation': lambda x: rotated(x, 3), 'half': lambda x: cv2.resize(x, None, fx=.5, fy=.5, interpolation=cv2.INTER_AREA),
    'jpeg': lambda x: cv2.imdecode(cv2.imencode('.jpg', x, [1, 10])[1], 0), 'marker': marked, 'mirrored and inverted': lambda x: 255 - x[:, ::-1]}


def breasts(n):
    "One view of each of n women."
    return [phantom_exam(3, i, size=(256, 160), difficulty='easy').views['L', 'CC'].pixels for i in range(n)]


def chests(n): return [chest_exam(3, i).pixels for i in range(n)]


@pytest.fixture(scope='module', params=['breasts', 'chests'])
def originals(request): return dict(breasts=breasts, chests=chests)[request.param](16)


def test_each_change_is_found_and_no_stranger_is_accused(originals):
    left = thumbnails(originals)
    made = [(name, i, change(np.ascontiguousarray(originals[i]))) for k, (name, change) in enumerate(CHANGES.items()) for i in ((k % 16), (k + 7) % 16)]
    found = near_pairs(left, thumbnails([x for *_, x in made]))
    true = {(i, k) for k, (_, i, _) in enumerate(made)}
    pairs = set(zip(found.a, found.b))
    assert not pairs - true                                            # nobody else
    missed = [made[k][0] for i, k in sorted(true - pairs)]
    assert len(missed) <= 1, missed                                    # of 40


def test_strangers_and_patients(originals):
    left, right = thumbnails(originals[:8]), thumbnails(originals[8:])
    assert len(near_pairs(left, right)) == 0
    again = near_pairs(left, left)
    assert set(zip(again.a, again.b)) == {(i, i) for i in range(8)} and (again.agreement > .95).all()
    assert len(near_pairs(left, left, list('abcdefgh'), list('abcdefgh'))) == 0   # the patient's leak, if any
    assert len(near_pairs(left[:0], right)) == len(near_pairs(left, right[:0])) == len(near_pairs(np.zeros_like(left), right)) == 0


@pytest.mark.parametrize('turn', range(8))
def test_a_turn_permutes_the_descriptor(turn):
    image = thumbnail(breasts(1)[0])
    np.testing.assert_allclose(windows(stripes(turned_image(image, turn)))[0], turned_descriptor(windows(stripes(image))[0], turn), atol=2e-3)
    np.testing.assert_allclose(stripes(255 - image), stripes(image), atol=1e-3)


def test_what_is_not_a_number_or_deep():
    x = breasts(1)[0]
    for y in (x.astype(np.uint16)*257, x/255.): assert np.abs(thumbnail(y).astype(int) - thumbnail(x)).max() <= 2
    assert not thumbnail(np.full((9, 9), 7)).any() and len(Looks(np.zeros((2, 128, 128), np.uint8))) == 2


def test_equal_copies_do_not_explode():
    "Equal pictures are one to compare and one line; nearly equal ones give a few lines an image, not a line a pair."
    x = breasts(2)
    left, right = np.repeat(thumbnails(x[:1]), 3000, 0), np.repeat(thumbnails([gamma(x[0], .8)]), 2000, 0)
    found = near_pairs(left, right)
    assert found.pairs.tolist() == [6_000_000]
    mixed = near_pairs(left[:3], right[:2], ['a', 'a', 'b'], ['a', 'b'])
    assert mixed.pairs.tolist() == [3] and (mixed.a[0], mixed.b[0]) in {(0, 1), (1, 1), (2, 0)}
    rng = np.random.default_rng(0)
    noisy = thumbnails([np.clip(x[0] + rng.normal(0, 2, x[0].shape), 0, 255).astype(np.uint8) for _ in range(60)])
    found = near_pairs(noisy[:30], noisy[30:])
    assert set(found.a) == set(found.b) == set(range(30)) and len(found) <= 4*60


def test_the_cache_is_used_only_when_sound(tmp_path):
    data = dataset(tmp_path/'d', breasts(4), list('abcd'), ['train', 'train', 'test', 'test'])
    first, path = stored_thumbnails(data), tmp_path/'d'/'thumbnails.npz'
    whole = path.read_bytes()
    for damage in (b'', b'PK\x03\x04 not a zip', whole[:len(whole)//2], whole[:200] + bytes(200) + whole[400:], b'\x93NUMPY'):
        path.write_bytes(damage)
        np.testing.assert_array_equal(stored_thumbnails(data), first)
        assert path.read_bytes() == whole or len(path.read_bytes()) == len(whole)   # written anew
    np.savez(path, thumbs=first.astype(np.float16)[:, :32, :32], digest=data.images.digest)   # of the former version
    np.testing.assert_array_equal(stored_thumbnails(data), first)
    np.savez(path, thumbs=np.array([{}], object), digest=f'looks-2:{data.images.digest}')
    np.testing.assert_array_equal(stored_thumbnails(data), first)


@pytest.mark.parametrize('problem', ['read-only', 'full', 'a folder'])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, problem):
    data = dataset(tmp_path/'d', breasts(2), list('ab'), ['train', 'test'])
    def refuse(*a, **k): raise OSError({'read-only': 30, 'full': 28}.get(problem, 21), os.strerror(30))
    if problem == 'a folder': (tmp_path/'d'/'thumbnails.npz'/'x').mkdir(parents=True)
    else: monkeypatch.setattr(np, 'savez', refuse)
    assert not check_leaks(data) and stored_thumbnails(data).shape == (2, 128, 128)
    assert {p.name for p in (tmp_path/'d').glob('*thumb*')} <= ({'thumbnails.npz'} if problem == 'a folder' else set())   # nothing half-written


def test_html_of_the_report():
    "Names are text, never markup; holes in the table are empty."
    rows = [dict(kind='patient', image_a='<script>alert(1)</script>', split_a='train&', image_b='"><img src=x>', split_b=np.nan, detail=None), dict(kind=np.nan)]
    page = LeakReport(pd.DataFrame(rows), dict(images={'<b>': 1, float('nan'): 2}, by=['patient'], sees='<i>'))._repr_html_()
    assert '<script' not in page and '<img' not in page and '<b>' not in page and '<i>' not in page and '&lt;script&gt;' in page and 'nan</td>' not in page.lower()
    clean = LeakReport(pd.DataFrame(columns=['kind']), dict(images={'<u>': 1}, by=['<s>']))._repr_html_()
    assert '<u>' not in clean and '<s>' not in clean


def test_the_report_says_what_it_sees(tmp_path):
    data = dataset(tmp_path/'d', breasts(2), list('ab'), ['train', 'test'])
    assert 'b35_leaks' in check_leaks(data)._repr_html_() and 'b35_leaks' not in check_leaks(data, by=('patient',))._repr_html_()
    assert len(check_leaks(data).checked['sees'].split('. ')) <= 3


def test_the_pairs_of_a_store_are_kept(tmp_path, monkeypatch):
    "The same question is compared once; other sides, patients, rows or limits are another question; damage is compared again."
    import medvl.data.leaks as leaks
    same = breasts(3)
    data = dataset(tmp_path/'d', [*same, same[0]], list('abcd'), ['train', 'train', 'test', 'test'])
    asked, compared = [], leaks._compared
    monkeypatch.setattr(leaks, '_compared', lambda *a: asked.append(a[2:]) or compared(*a))
    first = check_leaks(data, by=('near_duplicate',))
    assert len(first.pairs) == 1 and len(asked) == 1
    assert check_leaks(data, by=('near_duplicate',)).pairs.equals(first.pairs) and len(asked) == 1
    assert not check_leaks(data, ['train', 'train', 'test', ''], by=('near_duplicate',)) and len(asked) == 2
    check_leaks(data, by=('near_duplicate',), limit=.99); check_leaks(data, by=('near_duplicate',), mirror=False)
    assert len(asked) == 4
    part = data.subset(np.array([True, False, True, True]))
    assert len(check_leaks(part, by=('near_duplicate',)).pairs) == 1 and len(asked) == 5
    data.manifest.loc[3, 'patient_id'] = 'a'   # one patient's own pair is none
    assert not check_leaks(data, by=('near_duplicate',)) and len(asked) == 6
    path = tmp_path/'d'/'near_pairs.json'
    for damage in (b'', b'{', b'[1]', b'{"a": [[1, 2]]}', path.read_bytes()[:-9]):
        path.write_bytes(damage)
        assert not check_leaks(data, by=('near_duplicate',))
    assert len(asked) == 11
    for k in range(12): check_leaks(data, by=('near_duplicate',), limit=.5 + k/100)
    assert len(json.loads(path.read_bytes())) == leaks.ANSWERS
