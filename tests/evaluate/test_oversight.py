"""Finding mistakes, and whether a model looks at its image: planted models that see, or do not, are told apart; plain loops; bad input."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from medvl.core.errors import DataError
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.text.errors import ErrorGenerator, error_table
from medvl.evaluate.protocols.error_detection import error_detection, pair_fits, sentence_doubts, text_detector, wrong_sentences
from medvl.evaluate.protocols.image_use import (
    SHOWN, ImageTask, answer_task, boxes_elsewhere, error_task, generation_task, image_use, paint_over, retrieval_task, same_label_rows,
    shown_images, verdict_on, zero_shot_task)
from medvl.evaluate.protocols.zero_shot import Task
from medvl.methods.base import Method

torch.set_num_threads(1)
SIDES = {'left': 0, 'right': 1}


class Planted(Method):
    "Reads which half of the image is bright, and what a text says of sides; a blind one sees nothing but answers all the same."
    name = 'planted'

    def __init__(self, blind=False):
        super().__init__()
        self.blind, self.anchor = blind, nn.Parameter(torch.zeros(1))

    def bright(self, images):
        x = images.float()
        x = x[..., x.shape[-1] // 2:].mean((-3, -2, -1)) - x[..., :x.shape[-1] // 2].mean((-3, -2, -1))
        return 0 * x + .2 if self.blind else x / 20

    def read_images(self, images): return {'bright': self.bright(images)}

    def read_texts(self, texts):
        words = [t.lower().split() for t in texts]
        return {'says': torch.tensor([float(w.count('right') - w.count('left')) for w in words]), 'long': torch.tensor([float(len(w)) for w in words])}

    def match(self, images, texts): return images['bright'][:, None] * texts['says'] - .01 * texts['long']
    def encode_image(self, images, present=None, views=None): return nn.functional.normalize(torch.stack([self.bright(images), torch.ones(len(images))], 1), dim=1)
    def encode_text(self, texts): return nn.functional.normalize(torch.stack([self.read_texts(texts)['says'], torch.full((len(texts),), .3)], 1), dim=1)
    def answer(self, images, questions, candidates=None): return ['right' if b > 0 else 'left' for b in self.bright(images)]
    def generate(self, images, prompt=None): return [f'{a} effusion.' for a in self.answer(images, None)]


class Films:
    "Sixty films, the ill half of each bright, as a prepared data set has them."
    def __init__(self, n=60):
        rng, self.images = np.random.default_rng(0), []
        self.side = rng.integers(0, 2, n)
        for s in self.side:
            x = rng.normal(90, 10, (24, 24))
            x[6:18, 14 * s + 1:14 * s + 9] += 60
            self.images.append(x.clip(0, 255).astype(np.uint8))
        boxes = [dict(image_id=f'i{k}', label='effusion', x0=14. * s + 1, y0=6., x1=14. * s + 9, y1=18.) for k, s in enumerate(self.side) if k % 3]
        self.boxes = pd.DataFrame(boxes)
        self.manifest = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], patient_id=[f'p{k}' for k in range(n)], label_right=self.side.astype(float), label_left=1. - self.side))
        self.manifest['report'] = [f'{"left right".split()[s]} effusion. Heart is normal. No {w}.' for s, w in zip(self.side, ['mass', 'nodule', 'fracture', 'oedema'] * n)]

    def __len__(self): return len(self.images)

    def image(self, i): return self.images[i]


@pytest.fixture(scope='module')
def films(): return Films()


@pytest.fixture(scope='module')
def errors(films):
    reports = films.manifest.report.tolist()
    return error_table(ErrorGenerator(reports), reports, ('location', 'omission'))


def pixels(films): return np.stack(films.images)[:, None]


# ------------------------------------------------------------------------------------------------ which report

def test_fits_are_those_of_a_plain_loop(films):
    method, texts, rows = Planted(), ['left', 'right side', 'no', 'left'], [3, 0, 0, 59]
    for score in ('match', 'cosine'):
        got = pair_fits(method, score, 7)(pixels(films), rows, texts)
        for g, i, t in zip(got, rows, texts):
            x = torch.as_tensor(pixels(films)[i:i + 1])
            want = method.match(method.read_images(x), method.read_texts([t])) if score == 'match' else method.encode_image(x) @ method.encode_text([t]).T
            assert g == pytest.approx(float(want.detach()), abs=1e-6)


@pytest.mark.parametrize('against', ['all', 'paired'])
def test_auroc_by_kind_is_scikit_learns(films, errors, against):
    found = error_detection({'match': pair_fits(Planted())}, pixels(films), errors, films.manifest.patient_id, against, n_boot=50)
    for kind in ('location', 'omission', 'all'):
        s = found.scores[~found.scores.wrong | (found.scores.kind == kind) | (kind == 'all')]
        if against == 'paired': s = s[s.row.isin(s.row[s.wrong])]
        r = found.table[found.table.kind == kind].iloc[0]
        assert r.value == pytest.approx(roc_auc_score(s.wrong, -s.match)) and r.n == len(s) and r.n_positive == s.wrong.sum()
    location = found.table[found.table.kind == 'location'].iloc[0]
    assert location.value > .99 and location.low > .9


def test_a_looking_detector_beats_text_and_cosine_a_blind_one_does_not(films, errors):
    made = errors[errors.changed]
    reports = films.manifest.report.tolist()
    alone = text_detector([*reports, *made.text], [False] * len(reports) + [True] * len(made))
    for blind in (False, True):
        found = error_detection({'match': pair_fits(Planted(blind)), 'text only': alone}, pixels(films), errors, films.manifest.patient_id, n_boot=200)
        d = found.differences[found.differences.kind == 'location'].iloc[0]
        assert (d.low > .2) is not blind and d.high > d.low
        assert set(found.wide().columns) == {'match', 'text only', 'mistakes'} and 'AUROC' in repr(found)


def test_which_sentence(films, errors):
    who = films.manifest.patient_id
    for how in ('alone', 'without'):
        t = wrong_sentences({'match': pair_fits(Planted()), 'blind': pair_fits(Planted(True))}, pixels(films), errors, who, how, n_boot=100).set_index(['kind', 'detector'])
        assert t.value['location', 'match'] == 1. and t.better_than_chance['location', 'match'] and t.chance['location', 'match'] == pytest.approx(1 / 3)
        assert t.value['location', 'blind'] < .9
    doubts = sentence_doubts(pair_fits(Planted()), pixels(films), [0], ['Normal.'], 'without')
    assert [d.tolist() for d in doubts] == [[0.]]


def test_bad_tables(films, errors):
    ask, who = {'match': pair_fits(Planted())}, films.manifest.patient_id
    x = pixels(films)
    with pytest.raises(DataError, match='kind'): error_detection(ask, x, errors.drop(columns='kind'), who)
    with pytest.raises(DataError, match='no report was changed'): error_detection(ask, x, errors.assign(changed=False), who)
    with pytest.raises(DataError, match='60 images'): error_detection(ask, x, errors.assign(row=60), who)
    with pytest.raises(DataError, match='original.*empty'): error_detection(ask, x, errors.assign(original=' '), who)
    with pytest.raises(ValueError, match='paired'): error_detection(ask, x, errors, who, 'pairs')
    with pytest.raises(ValueError, match='no detector'): error_detection({}, x, errors, who)
    with pytest.raises(ValueError, match='59 patients'): error_detection(ask, x, errors, who[1:])
    with pytest.raises(DataError, match='not a number'): error_detection({'nan': lambda i, r, t: np.full(len(t), np.nan)}, x, errors, who)
    with pytest.raises(DataError, match='sentence'): wrong_sentences(ask, x, errors.assign(sentence=-1), who)
    with pytest.raises(ValueError, match='without'): sentence_doubts(ask['match'], x, [0], ['a b.'], 'with')
    with pytest.raises(DataError, match='correct and wrong'): text_detector(['a', 'b'], [True, True])
    with pytest.raises(TypeError, match='match'): pair_fits(Method())
    with pytest.raises(ValueError, match='cosine'): pair_fits(Planted(), 'cosines')


def test_one_patient_has_no_interval(films, errors):
    one = errors[errors.row == 0]
    found = error_detection({'match': pair_fits(Planted())}, pixels(films)[:1], one, ['p'], n_boot=20)
    assert 'one patient' in found.table.note.iloc[0]


# ------------------------------------------------------------------------------------------------ does it look

def tasks_of(method, films, errors):
    side = Task('right', (('left',), ('right',)), ('right',))
    questions = pd.DataFrame(dict(row=range(len(films)), question='which side?', answer=['left' if s == 0 else 'right' for s in films.side]))
    words = lambda said, true: np.array([len(set(a.split()) & set(b.split())) / len(set(a.split())) for a, b in zip(said, true)])
    return [*(zero_shot_task(method, films, side, s) for s in ('match', 'cosine')), retrieval_task(method, films.manifest.report.tolist()),
            error_task(pair_fits(method), errors[errors.kind == 'location'], len(films)), answer_task(method, questions, len(films)),
            generation_task(method, films.manifest.report.tolist(), words)]


@pytest.mark.parametrize('blind', [False, True])
def test_planted_models_are_named(films, errors, blind):
    use = image_use(tasks_of(Planted(blind), films, errors), films, n_boot=400)
    assert set(use.verdicts.values()) == {'blind' if blind else 'looks'}, use.wide().to_string()
    assert set(use.table.task) == {'zero-shot by match', 'zero-shot by cosine', 'retrieval by match', 'error detection', 'questions', 'generation'}
    nothing = use.table[use.table.shown.isin(('text_only', 'blank'))]
    if blind: assert (nothing['drop'].abs() <= .02).all() and ((nothing.drop_low <= 0) & (nothing.drop_high >= 0)).all()
    else:
        assert (nothing['drop'] > .02).all() and (nothing.drop_low > 0).all()
        assert (use.lesions.low[use.lesions.task != 'generation'] > 0).all() # the lesion's place counts, another does not
        same = use.table[(use.table.shown == 'same_labels') & (use.table.task != 'retrieval by match')]
        assert (same['drop'].abs() < .1).all() # it knows the side alone: another patient's film of the same side will do
    assert all(k in repr(use) for k in ('verdict', 'lesion_hidden'))


def test_a_better_than_chance_blind_model_is_still_blind(films):
    right = films.side.astype(float)
    use = image_use([ImageTask('always right', lambda x: right)], films, n_boot=100)
    assert use.verdicts == {'always right': 'blind'}


def test_too_few_patients_decide_nothing():
    few = Films(4)
    use = image_use([ImageTask('sides', lambda x: (Planted().bright(torch.as_tensor(x)).numpy() > 0) == few.side)], few, n_boot=100)
    assert use.verdicts['sides'] in ('not decided', 'looks')
    assert verdict_on({'blank': dict(drop=.3, drop_low=-.1, drop_high=.6)}) == 'not decided'
    assert verdict_on({'blank': dict(drop=.01, drop_low=-.1, drop_high=.1)}) == 'blind'
    assert verdict_on({'blank': dict(drop=.01, drop_low=.005, drop_high=.1)}) == 'not decided'
    assert verdict_on({}) == 'not decided'


def test_what_is_shown(films):
    own = pixels(films)
    for kind in SHOWN:
        x, other = shown_images(films, kind)
        assert x.shape == own.shape and x.dtype == own.dtype and ((x != own).any((1, 2, 3)) <= other).all()
    assert len(np.unique(shown_images(films, 'blank')[0])) == 1 and (np.ptp(shown_images(films, 'text_only')[0], axis=0) == 0).all()
    x, other = shown_images(films, 'same_labels')
    assert other.all() and all((x[i] == own[films.side == films.side[i]]).all((1, 2, 3)).any() for i in range(5))
    x, other = shown_images(films, 'lesion_hidden')
    assert other.tolist() == [bool(k % 3) for k in range(60)] # an image without a finding stays, and is counted as such
    assert abs(x[1, 0, 6:18].astype(float).mean() - 90) < 10


def test_painting():
    x = np.full((10, 10), 50, np.uint8)
    x[3:6, 3:6] = 200
    assert (paint_over(x, [[3, 3, 6, 6]]) == 50).all() and (paint_over(x, np.zeros((0, 4))) == x).all()
    assert (paint_over(x, [[-5, -5, 50, 50]]) == 50).all() # all of it: the median of the image
    there = boxes_elsewhere([[3, 3, 6, 6]], (10, 10), np.random.default_rng(0))
    assert there.shape == (1, 4) and there[0, 2] - there[0, 0] == 3
    assert boxes_elsewhere([[0, 0, 10, 10]], (10, 10), np.random.default_rng(0)) is None
    assert same_label_rows(np.array([[1.], [np.nan], [1.]]), ['a', 'b', 'c']).tolist() == [2, -1, 0]


def test_images_without_boxes_and_labels(films):
    bare = Films(12)
    bare.boxes, bare.manifest = bare.boxes[:0], bare.manifest[['image_id', 'patient_id']]
    use = image_use([ImageTask('sides', lambda x: (Planted().bright(torch.as_tensor(x)).numpy() > 0) == bare.side)], bare, n_boot=50)
    assert set(use.table.shown) == {'right', 'text_only', 'blank'} and not len(use.lesions)


def test_bad_questions(films, errors):
    with pytest.raises(ValueError, match='blank'): image_use([ImageTask('a', len)], films, ('blnk',))
    with pytest.raises(ValueError, match='no task'): image_use([], films)
    with pytest.raises(ValueError, match='one name'): image_use([ImageTask('a', len)] * 2, films)
    with pytest.raises(ValueError, match='gave'): image_use([ImageTask('a', lambda x: np.zeros(3))], films)
    with pytest.raises(DataError, match='nothing was asked'): image_use([ImageTask('a', lambda x: np.full(len(x), np.nan))], films)
    with pytest.raises(DataError, match='both answers'): zero_shot_task(Planted(), films, Task('none', (('a',), ('b',)), ('none',)))
    with pytest.raises(DataError, match='one report'): retrieval_task(Planted(), ['same'] * 60)
    with pytest.raises(DataError, match='no questions'): answer_task(Planted(), pd.DataFrame(columns=['row', 'question', 'answer']), 60)
    with pytest.raises(DataError, match='answer'): answer_task(Planted(), pd.DataFrame(dict(row=[0], question=['?'])), 60)
    with pytest.raises(DataError, match='reference is empty'): generation_task(Planted(), ['', ' '], len)
    with pytest.raises(TypeError, match='generate'): generation_task(Method(), ['a'], len)
    with pytest.raises(TypeError, match='answer'): answer_task(Method(), pd.DataFrame(), 60)


def test_on_a_prepared_phantom(tmp_path):
    part = prepared_chest_phantom(tmp_path/'p', n=12, size=(64, 64))
    use = image_use([retrieval_task(Planted(), part.manifest.report.tolist())], part, n_boot=20)
    assert set(use.table.shown) <= set(SHOWN) and (use.table.patients <= 12).all()


def test_sentences_without_words_are_not_asked(films):
    "The 1. of a list has nothing that could be wrong."
    asked = []
    def ask(images, rows, texts): asked.extend(texts); return np.zeros(len(texts))
    doubts, = sentence_doubts(ask, pixels(films), [0], ['No mass. 12. Left effusion.'])
    assert asked == ['No mass.', 'Left effusion.'] and doubts.tolist() == [0., -np.inf, 0.]
