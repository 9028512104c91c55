"""Questions: images read once, ranking beside keys made once, what a division gives away, and answers without the image."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from contract import parts_of

import medvl.evaluate.protocols.image_use as image_use_module
from medvl.data.phantom.asked import phantom_questions
from medvl.data.samples.builders import QuestionConfig
from medvl.data.samples.writing import WritingConfig, question_dataset, report_rows, text_form
from medvl.data.text.errors import ErrorGenerator, error_table
from medvl.data.releases.questions import read_slake, read_vqa_rad
from medvl.evaluate.protocols.error_detection import pair_fits
from medvl.evaluate.protocols.generation import BREAST_SCORERS, attribute_f1
from medvl.evaluate.protocols.image_use import answer_task, error_task, generation_task, image_use, retrieval_task, zero_shot_task
from medvl.evaluate.protocols.vqa import accuracy_table, answers_of, ask_questions, frequent_answers, judged_answers, split_verdict
from medvl.evaluate.protocols.zero_shot import Task
from medvl.methods.base import Method
from medvl.methods.recipes import new_method

DATA = Path(os.environ.get('MEDVL_SHARED', Path(__file__).parents[3]/'shared'))/'data'


@pytest.fixture(scope='module')
def chest(tmp_path_factory): return parts_of(str(tmp_path_factory.mktemp('chest')), 'chest', 24, (64, 64))['train']


@pytest.fixture(scope='module')
def asked(chest): return phantom_questions(chest)


def stirred(method, seed=0, by=.08):
    "A method whose answers differ from question to question."
    with torch.no_grad():
        for p in method.parameters(): p += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return method.eval()


@pytest.fixture(scope='module')
def answerer(asked): return stirred(new_method('answerer', 'smoke', [*asked.question, *asked.answer], dropout=0., frozen=True, see_image=True), by=.3)


# asking ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('choose', ['train', 'test', 'written'])
def test_blocks_and_images_read_once_change_nothing(chest, asked, answerer, choose):
    "One question at a time, with its own image, gives the same; so do shuffled questions and blocks of another size."
    data = question_dataset(chest, asked, answerer.tokenizer, QuestionConfig(question_length=40), train=False)
    found = ask_questions(answerer, data, asked, asked, choose, batch_size=7)
    listed = None if choose == 'written' else answers_of(asked)
    at = {name: i for i, name in enumerate(chest.manifest.image_id)}
    image = lambda name: torch.from_numpy(np.array(chest.image(at[name])))[None, None]
    alone = [text_form(answerer.answer(image(r.image_id), [r.question], listed)[0], 'answer') for r in asked.itertuples()]
    assert found.said.tolist() == alone and found.said.nunique() > 1
    mixed = asked.sample(frac=1, random_state=1).reset_index(drop=True)
    data = question_dataset(chest, mixed, answerer.tokenizer, QuestionConfig(question_length=40), train=False)
    again = ask_questions(answerer, data, asked, asked, choose)
    assert again.said.tolist() == alone


def test_each_image_is_read_once(chest, asked, answerer, monkeypatch):
    read = []
    plain = type(answerer).image_context
    monkeypatch.setattr(type(answerer), 'image_context', lambda self, images, *more: (read.append(len(images)) if torch.is_tensor(images) else None, plain(self, images, *more))[1])
    data = question_dataset(chest, asked, answerer.tokenizer, QuestionConfig(question_length=40), train=False)
    ask_questions(answerer, data, asked, asked, batch_size=10_000)
    assert sum(read) == asked.image_id.nunique() < len(asked) / 3


def test_kept_maps_answer_as_pixels_do(chest, asked, answerer):
    own = answerer.keep_maps([chest.image(i) for i in range(len(chest))])
    maps = np.zeros((1 + int(chest.manifest.row.max()), *own.shape[1:]), np.float32) # by their place in the store
    maps[chest.manifest.row.astype(int)] = own
    data = question_dataset(chest, asked, answerer.tokenizer, QuestionConfig(question_length=40), False, maps)
    seen = question_dataset(chest, asked, answerer.tokenizer, QuestionConfig(question_length=40), False)
    a, b = (ask_questions(answerer, d, asked, asked).said for d in (data, seen))
    assert (a == b).mean() > .97 # kept at half precision

    class Deaf(Method):
        def answer(self, images, questions, candidates=None): return ['yes'] * len(questions)
    with pytest.raises(TypeError, match='see'): ask_questions(Deaf(), data, asked, asked)
    assert set(ask_questions(Deaf(), seen, asked, asked).said) == {'yes'} # a method that cannot keep what it has seen is asked all the same


@pytest.mark.parametrize('keep', [0, 3])
def test_ranking_is_that_of_reading_every_answer_whole(chest, asked, answerer, keep):
    "Padded to the longest, one pair at a time, beside a context of its own: the same order and the same log-probabilities."
    listed = [*answers_of(asked), 'a much longer answer than all the others', 'left'][:9]
    listed = list(dict.fromkeys(listed))
    images = torch.stack([torch.from_numpy(np.array(chest.image(i))) for i in range(3)])[:, None]
    said = ['is there a nodule?', 'on which side is the pleural effusion, left or right?', 'why?']
    which, score = answerer.rank(images, said, listed, keep=keep)
    told = answerer.text_batch(listed, 'answer', 32)
    with torch.no_grad():
        seen, there = answerer.context(images, answerer.text_batch(said, 'question', 64))
        for i in range(3):
            logp = answerer.decoder(told['input_ids'], None, seen[i:i + 1].expand(len(listed), -1, -1), there[i:i + 1].expand(len(listed), -1)).log_softmax(-1)
            ids, mask = told['input_ids'][:, 1:], told['attention_mask'][:, 1:]
            each = logp[:, :-1].gather(2, ids[..., None])[..., 0]
            want, first = (each * mask).sum(1), each[:, 0]
            if keep: want = want.masked_fill(~torch.isin(torch.arange(len(listed)), first.topk(keep).indices), -torch.inf)
            order = want.argsort(descending=True)[:len(which[i])]
            assert which[i].tolist() == order.tolist()
            torch.testing.assert_close(score[i], want[order], rtol=1e-4, atol=1e-4)


# what a division gives away ----------------------------------------------------------------------------------------
def test_an_answer_never_seen_in_training_is_counted_and_cannot_be_chosen(chest, asked, answerer):
    test = asked[:6].assign(answer=['a word of its own', *asked.answer[1:6]])
    train = asked[6:]
    assert split_verdict(train, test).number.iloc[3] >= 1
    data = question_dataset(chest, test, answerer.tokenizer, QuestionConfig(question_length=40), False)
    found = ask_questions(answerer, data, test, train)
    assert not found.seen[0] and not found.right[0] and set(found.said) <= set(answers_of(train))
    free = {n: judged_answers(test, s, train) for n, s in frequent_answers(train, test).items()}
    table = accuracy_table({'answerer': found, **free}, n_boot=50)
    assert set(table.by) >= {'answerer', 'most frequent to the likest question', 'answerer - most frequent answer'}
    assert (table.images <= test.image_id.nunique()).all()


def test_the_likest_question_is_found_by_its_words():
    row = lambda i, q, a, closed=True: dict(question_id=str(i), image_id=f'm{i}', patient_id=f'p{i}', question=q, answer=a, closed=closed, kind='k', split='')
    train = pd.DataFrame([row(0, 'is there a nodule?', 'no'), row(1, 'is the heart enlarged?', 'yes'), row(2, 'which side is the effusion on?', 'left', False)])
    test = pd.DataFrame([row(7, 'Is the HEART very enlarged', 'yes'), row(8, 'the effusion is on which side?', 'right', False), row(9, 'quo vadis', 'no')])
    free = frequent_answers(train, test)
    assert list(free['most frequent to the likest question'].values())[:2] == ['yes', 'left']
    assert free['most frequent to the likest question']['9'] in {'yes', 'no', 'left'} # no word in common: defined all the same


@pytest.mark.skipif(not (DATA/'vqa_rad'/'trainset.json').is_file(), reason='VQA-RAD is not here')
def test_vqa_rad_as_handed_over():
    "All test images stand in training by question, none by image; words alone go far only where the images are shared."
    words = {}
    for by, shared, verbatim in (('question', 170, 64), ('image', 0, 35)):
        t = read_vqa_rad(DATA/'vqa_rad', by=by).table
        test, train = t[t.split == 'test'], t[t.split != 'test']
        assert split_verdict(train, test).number.tolist()[:2] == [shared, verbatim] and len(test) == 371
        words[by] = {n: judged_answers(test, s, train).right.mean() for n, s in frequent_answers(train, test).items()}
    assert round(words['question']['most frequent to the question'], 3) == .353
    assert words['question']['most frequent to the likest question'] > .5 > .33 > words['image']['most frequent to the likest question']


@pytest.mark.skipif(not (DATA/'slake'/'train.json').is_file(), reason='SLAKE is not here')
def test_slake_as_handed_over():
    t = read_slake(DATA/'slake', files='listed').table
    found = split_verdict(t[t.split != 'test'], t[t.split == 'test']).number.tolist()
    assert found == [0, 782, 0, 6]


# the audit computes once what it is asked twice --------------------------------------------------------------------
def test_an_audit_that_remembers_says_the_same(chest, asked, answerer, monkeypatch):
    texts = [' '.join(r.split()[:12]) or 'clear' for r in chest.manifest.report]
    xvl, writer = (stirred(new_method(n, 'smoke', chest.manifest.report, **more)) for n, more in (('xvl', {}), ('writer', dict(dropout=0.))))
    place = {name: i for i, name in enumerate(chest.manifest.image_id)}
    errors = error_table(ErrorGenerator(texts, seed=0), texts, ['location', 'severity', 'mismatch'])
    words = [Task(n, ((f'no {n}.',), (f'there is {n}.',)), (n,)) for n in chest.labels]
    def tasks(): return [zero_shot_task(xvl, chest, words), retrieval_task(xvl, texts), error_task(pair_fits(xvl), errors, len(chest)),
                         answer_task(answerer, asked.assign(row=asked.image_id.map(place)), len(chest), answers_of(asked)),
                         generation_task(writer, texts, lambda a, b: [float(len(x) % 7) / 7 for x in a], max_length=6)]
    quick = image_use(tasks(), chest, n_boot=50)
    def every(known, keys, ask): return list(ask(np.arange(len(keys))))
    monkeypatch.setattr(image_use_module, 'asked_once', every)
    slow = image_use(tasks(), chest, n_boot=50)
    pd.testing.assert_frame_equal(quick.table, slow.table, rtol=1e-4, atol=1e-4)
    assert quick.verdicts == slow.verdicts


def test_pairs_are_read_whatever_else_is_asked(chest):
    "A text's fit does not depend on the others, on their order, or on being asked twice."
    xvl = stirred(new_method('xvl', 'smoke', chest.manifest.report))
    texts = ['No effusion.', 'A small nodule in the left upper zone is seen, and nothing else.', 'The heart is enlarged.'] * 50 + [f'Effusion {i}.' for i in range(90)]
    rows = np.arange(len(texts)) % 5
    pixels = np.stack([chest.image(i) for i in range(6)])[:, None]
    found = pair_fits(xvl)(pixels, rows, texts)
    back = pair_fits(xvl)(pixels, rows[::-1], texts[::-1])[::-1]
    np.testing.assert_allclose(found, back, atol=1e-4)
    for j in (0, 1, 2, 3, 151): np.testing.assert_allclose(pair_fits(xvl)(pixels, [rows[j]], [texts[j]])[0], found[j], atol=1e-4)
    np.testing.assert_allclose(pair_fits(xvl)(chest, rows, texts), found, atol=1e-4)
    assert len(pair_fits(xvl)(pixels, [], [])) == 0


# mammograms --------------------------------------------------------------------------------------------------------
def test_reports_of_mammograms_are_scored_by_what_is_acted_on():
    truth = 'Mass in the left breast. No mass on the right. BI-RADS 4: suspicious. BI-RADS 2: benign. ACR density C: heterogeneously dense.'
    flips = {'BI-RADS right': truth.replace('BI-RADS 4', 'BI-RADS 5'), 'density right': truth.replace('density C: heterogeneously', 'density D: extremely'),
             'sides right': truth.replace('left', 'X').replace('right', 'left').replace('X', 'right')}
    for name, said in flips.items():
        values = {n: f([said, truth], [truth, truth]) for n, f in BREAST_SCORERS.items()}
        assert values[name].tolist() == [0., 1.] and attribute_f1([said], [truth])[0] < 1
        assert all(values[n][0] == 1 for n in flips if n != name), (name, values)
    silent = BREAST_SCORERS['density right']([truth], ['No mass.'])
    assert np.isnan(silent[0]) and BREAST_SCORERS['BI-RADS right'](['No mass.'], [truth])[0] == 0


def test_only_what_is_stated_is_kept(tmp_path):
    data = parts_of(str(tmp_path), 'breast', 12, (96, 64))['train']
    every, stated = (report_rows(data, WritingConfig(sections=('impression', 'findings'), stated=s))[0] for s in ('', 'breast'))
    assert len(every) == len(stated)
    for a, b in zip(every, stated):
        assert len(b['answer']) < len(a['answer']) and attribute_f1([b['answer']], [a['answer']])[0] > .9
        assert not any(w in b['answer'].lower() for w in ('archive', 'positioning', 'read by two'))
