"""What writes: around the encoder of any method, its losses, prompts, bad input, and that it learns to look."""
from types import SimpleNamespace

import contract
import numpy as np
import pytest
import torch
from contract import parts_of

from medvl.core.errors import DataError
from medvl.data.batch import check_batch, collate
from medvl.data.phantom.asked import image_truth, phantom_questions
from medvl.data.samples.writing import FORMS, WritingConfig, WritingDataset, question_dataset, report_dataset, text_form, spaced, written
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.answerer import answerer_from
from medvl.methods.base import CAPABILITIES, StepState, from_pretrained, require, save_pretrained
from medvl.methods.parts.writing import WriteConfig, check_write, search_of
from medvl.methods.recipes import method_names, new_method, recipe
from medvl.methods.writer import Writer, writer_from

SOURCES = [n for n in method_names() if n not in ('writer', 'answerer', 'mammo_factor')]


@pytest.fixture(scope='module')
def chest(tmp_path_factory): return parts_of(str(tmp_path_factory.mktemp('chest')), 'chest', 24, (64, 64))['train']


@pytest.fixture(scope='module')
def writer(chest): return new_method('writer', 'smoke', chest.manifest.report).eval()


def pixels(data, n=3): return torch.stack([torch.from_numpy(np.array(data.image(i))) for i in range(n)])[:, None]


# -- around any encoder -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, key', [*((n, 'smoke') for n in SOURCES), ('xvl', 'smoke-2022')])
def test_any_image_method_can_write_and_answer(name, key, chest, tmp_path):
    "Its maps stay what they were; with and without a text beside the image; saved and opened."
    source = new_method(name, key, [r for r in chest.manifest.report])
    if not callable(getattr(getattr(source, 'image_encoder', None), 'feature_maps', None)): pytest.skip(f'{name} has no image encoder with maps')
    own = None if getattr(source, 'tokenizer', None) is not None else build_wordpiece(chest.manifest.report, 300)
    images = pixels(chest)
    side = getattr(source.eval(), 'image_side', None) # X-VL's `feature_maps` are its tokens; the encoder is what is lent
    want = side.maps(images, -1) if side is not None else source.feature_maps(images)
    for make, prompt in ((writer_from, None), (answerer_from, ['is it large?'] * 3)):
        made = make(source, own, recipe='smoke').eval()
        torch.testing.assert_close(made.feature_maps(images), want, rtol=1e-4, atol=1e-5)
        texts = made.generate(images, prompt, max_length=6, min_length=1)
        assert len(texts) == 3
        again = from_pretrained(save_pretrained(made, tmp_path/make.__name__))
        assert again.generate(images, prompt, max_length=6, min_length=1) == texts


def test_xvl_lends_its_layers(chest):
    "Reading layers, looking layers, head and word table of both years; the states of its fusion are those of our reader."
    for key in ('smoke', 'smoke-2022'):
        xvl, images = new_method('xvl', key, chest.manifest.report, text_pool='cls').eval(), pixels(chest) # a mean in the first place is not lent
        made = writer_from(xvl, recipe='smoke').eval()
        fuser = xvl.reader.fuser
        for a, b in zip(fuser.layers[fuser.fusion_layer:], made.decoder.fusion.layers[made.decoder.fusion.fusion_layer:]):
            torch.testing.assert_close(a.state_dict(), b.state_dict())
        torch.testing.assert_close(made.decoder.fusion.words.weight, fuser.words.weight)
        asks = writer_from(xvl, recipe='smoke', prompted=True, question_form='caption').eval()
        text = asks.text_batch(['The heart is enlarged.', 'No effusion.', 'Clear.'], 'caption', 32)
        with torch.no_grad():
            theirs = xvl.reader.fuse(xvl.reader.states(text['input_ids'], text['attention_mask']), text['attention_mask'], xvl.read_images(images)['tokens'])
            ours = asks.context(images, text)[0]
        there = text['attention_mask'].bool()
        torch.testing.assert_close(ours[there], theirs[there], rtol=1e-4, atol=1e-4)


def test_views_of_an_examination(tmp_path):
    "A view that is missing counts for nothing, in vectors, loss, gradient and text."
    data = parts_of(str(tmp_path), 'breast', 16, (96, 64))['train']
    named = recipe('writer', 'small-mammography')
    method = new_method('writer', 'small-mammography', data.manifest.report, text_width=32, text_hidden=32, fusion_hidden=32, image_width=32, dropout=0.)
    exams = report_dataset(data, method.tokenizer, WritingConfig(**named.sample_options), train=False)
    batch = check_batch(exams.collate([exams[i] for i in range(4)]))
    assert batch['images'].shape[1] == 4 and set(batch['view'][0]) == set(named.config['views'])
    stirred = contract.stirred(method)
    contract.check_present(stirred, batch)
    contract.check_chunked(stirred, batch)
    here = torch.tensor([[True, True, False, True]] * 2)
    say = lambda fill: method.eval().generate(torch.where(here[:, :, None, None, None], batch['images'][:2], fill), present=here, views=batch['view'][:2], max_length=8)
    assert say(0) == say(255)


# -- losses -------------------------------------------------------------------------------------------------------------------

def test_the_loss_is_that_of_next_words(writer, chest):
    "Padding changes nothing; smoothing is the mean over all words; over texts it is the sum."
    data = report_dataset(chest, writer.tokenizer, WritingConfig(sections=('impression',)), train=False)
    batch = data.collate([data[i] for i in range(3)])
    ids, mask = writer.wanted(batch)
    with torch.no_grad():
        seen, _ = writer.context(batch['images'], None)
        logp = writer.decoder(ids, mask, seen).log_softmax(-1)
        each = [sum(-logp[i, t, ids[i, t + 1]] for t in range(int(mask[i].sum()) - 1)) for i in range(3)]
        f = writer.encode(batch)
        wide = {k: torch.nn.functional.pad(v, (0, 8)) for k, v in batch['answer'].items()}
        again = writer.encode({**batch, 'answer': wide})
    torch.testing.assert_close(f['word_loss'], torch.stack(each), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again['word_loss'], f['word_loss'], rtol=1e-4, atol=1e-4)
    assert f['asked'].tolist() == (mask.sum(1) - 1).tolist()
    smooth = Writer(WriteConfig(**{**vars(writer.config), 'smoothing': .2}), writer.tokenizer).eval()
    smooth.load_state_dict(writer.state_dict())
    with torch.no_grad():
        flat = torch.stack([sum(-logp[i, t].mean() for t in range(int(mask[i].sum()) - 1)) for i in range(3)])
        torch.testing.assert_close(smooth.encode(batch)['word_loss'], .8 * f['word_loss'] + .2 * flat, rtol=1e-4, atol=1e-3)


def test_reports_for_pretraining_are_read_too(writer, chest):
    from medvl.data.samples.captioned import CaptionConfig, CaptionDataset
    data = CaptionDataset(chest, writer.tokenizer, CaptionConfig(order='report', max_length=48), train=False)
    assert torch.isfinite(writer(data.collate([data[0], data[1]]))['loss'])


# -- bad input ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, says', [(dict(min_length=9, max_length=4), 'must fit'), (dict(how='bean'), 'beam'), (dict(beams=0), 'beams=0'),
                                           (dict(beam=2), "'beams'"), (dict(top_p=0.), 'top_p'), (dict(temperature=-1.), 'temperature')])
def test_searches_that_cannot_be(writer, chest, changes, says):
    with pytest.raises(ValueError, match=says): writer.generate(pixels(chest), **changes)


@pytest.mark.parametrize('changes', [dict(loss_over='sentences'), dict(answer_form='capton'), dict(max_length=999), dict(smoothing=1.), dict(prompted=True, frozen_text=True),
                                     dict(image_scaling='none'), dict(beams=0)])
def test_configurations_that_cannot_be(changes):
    with pytest.raises(ValueError): check_write(WriteConfig(**changes))


def test_what_cannot_write_says_so(chest):
    with pytest.raises(TypeError, match='generate'): require(new_method('simclr', 'smoke'), 'generate', by='this')
    with pytest.raises(TypeError, match='no image encoder'): writer_from(SimpleNamespace())
    with pytest.raises(ValueError, match='brings no tokenizer'): new_method('writer', 'smoke', ['a'], tokenizer=None) and Writer(WriteConfig(**vars(new_method('writer', 'smoke', ['no mass']).config))).tokenizer
    with pytest.raises(ValueError, match="'source'"): writer_from(new_method('simclr', 'smoke'), words='sorce')


def test_empty_and_odd_images(writer):
    assert writer.generate(torch.zeros(0, 1, 64, 64)) == []
    for image in (torch.zeros(1, 1, 64, 64), torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)): # nothing in it: a text all the same
        assert writer.generate(image, max_length=6, min_length=3)[0]
    with pytest.raises(ValueError, match='images must be'): writer.generate(torch.zeros(2, 64, 64))
    spoilt = torch.full((2, 1, 1, 64, 64), 100.)
    spoilt[1] = torch.nan
    tokens = {'input_ids': torch.tensor([[[2, 9, 3]]] * 2), 'attention_mask': torch.ones(2, 1, 3, dtype=torch.long)}
    with pytest.raises(DataError, match='not finite: b'): writer.eval()({'images': spoilt, 'sample_id': ['a', 'b'], 'answer': tokens})


def test_prompts(writer, chest):
    images = pixels(chest)
    assert all(t.startswith('no effusion') for t in writer.generate(images, 'No effusion', max_length=9))
    with pytest.raises(ValueError, match='2 prompts for 3 images'): writer.generate(images, ['a', 'b'])
    with pytest.raises(DataError, match='no token'): writer.generate(images, ['', 'a', 'a'])
    asks = new_method('writer', 'smoke', chest.manifest.report, prompted=True)
    with pytest.raises(DataError, match='reads a text'): asks.generate(images)
    with pytest.raises(ValueError, match='one sample'): next(writer.stream_text(images))
    with pytest.raises(ValueError, match='settles'): next(writer.stream_text(images[:1], how='beam'))
    assert writer.generate(images, how='sample', seed=1, max_length=9) == writer.generate(images, how='sample', seed=1, max_length=9, batch_size=2)


def test_texts_of_one_word_and_of_none(chest):
    words = build_wordpiece(['normal.', 'is there a mass?', 'yes'], 60)
    rows = [dict(sample_id='a', patient_id='p', images=[(0, 'PA')], answer='Normal.'), dict(sample_id='b', patient_id='p', images=[(0, 'PA')], answer=' . ')]
    with pytest.warns(UserWarning, match='no words'): data = WritingDataset(chest, rows, words)
    assert len(data) == 1 and written(words, data[0]['answer'][0]) == 'normal.'
    method = new_method('writer', 'smoke', tokenizer=words)
    assert torch.isfinite(method(data.collate([data[0]]))['loss'])
    with pytest.raises(DataError, match='nothing to write'): WritingDataset(chest, rows[1:], words)


def test_questions_that_cannot_be_answered(chest):
    table = phantom_questions(chest)
    method, images = new_method('answerer', 'smoke', [*table.question, *table.answer]), pixels(chest)
    said = ['is there a nodule?'] * 3
    for bad in ([], [['yes'], [], ['no']]):
        with pytest.raises(ValueError, match='without candidates'): method.answer(images, said, bad)
    with pytest.raises(ValueError, match='2 lists'): method.answer(images, said, [['yes'], ['no']])
    with pytest.raises(ValueError, match='2 questions for 3'): method.answer(images, said[:2])
    assert method.answer(images[:0], []) == []
    never = method.answer(images, said, ['a word that no training answer has', 'no']) # defined: ranked by its pieces
    assert set(never) <= {'a word that no training answer has', 'no'}
    assert method.answer(images, said, ['No.', 'YES']) == [{'no': 'No.', 'yes': 'YES'}[a] for a in method.answer(images, said, ['no', 'yes'])]


# -- questions of a phantom ---------------------------------------------------------------------------------------------------

def test_phantom_questions_are_balanced_and_true(chest):
    table = phantom_questions(chest)
    yes = table[table.kind == 'presence'].answer.value_counts(normalize=True)
    assert .35 < yes['yes'] < .65 and table.question_id.is_unique
    at = {i: k for k, i in enumerate(chest.manifest.image_id)}
    for r in table.itertuples():
        kind, name = r.question_id.split('-')[1:]
        if kind == 'presence': assert (chest.manifest[f'label_{name}'][at[r.image_id]] == 1) == (r.answer == 'yes')
    left = chest.boxes.label == 'effusion'
    for i in range(len(chest)): # the right lung lies on the left of the picture
        side = image_truth(chest, i).get(('side', 'effusion'))
        own = chest.boxes[left & (chest.boxes.image_id == chest.manifest.image_id[i])]
        if side in ('left', 'right'): assert ((own.x0 + own.x1) / 2 > 32).all() == (side == 'left')


def test_mirrored_samples_change_sides(chest):
    table = phantom_questions(chest, kinds=('side',))
    words = build_wordpiece([*table.question, 'left right both'], 120)
    with_flip = question_dataset(chest, table, words, WritingConfig(answer_form='answer', flip_horizontal=1.))
    fixed = question_dataset(chest, table, words, train=False)
    swap = {'left': 'right', 'right': 'left', 'both': 'both'}
    for i in range(len(fixed)): assert written(words, with_flip[0, i]['answer'][0]) == swap[written(words, fixed[0, i]['answer'][0])]


@pytest.mark.parametrize('text, want', [('no mass . 1 . 5 cm', 'no mass. 1.5 cm'), ('bi - rads 4 : suspicious', 'bi-rads 4: suspicious'), ('', '')])
def test_tidy(text, want): assert spaced(text) == want


def test_forms_are_their_own_form():
    for f in FORMS:
        once = text_form('The  HEART is normal, 1.5 cm; no (acute) effusion.', f)
        assert text_form(once, f) == once and once


# -- learning -----------------------------------------------------------------------------------------------------------------

def spot(i):
    "An image whose bright spot is on one side, and the word for it."
    rng, left = np.random.default_rng([i, 3]), i % 2
    image = rng.normal(90, 12, (32, 32))
    y, x = rng.integers(4, 20), 3 if left else 21
    image[y:y + 8, x:x + 8] += 110
    return image.clip(0, 255).astype(np.uint8), 'left' if left else 'right'


def spots(numbers, words):
    row = lambda i: dict(images=[spot(i)[0]], sample_id=str(i), question=[np.array(words(('where is it?', 'is it small?')[i % 3 == 0]).input_ids)],
                         answer=[np.array(words(spot(i)[1] if i % 3 else 'no').input_ids)])
    return collate([row(i) for i in numbers])


@pytest.mark.parametrize('see_image', [False, True])
def test_an_answerer_learns_to_look_and_a_blind_one_cannot(see_image):
    words = build_wordpiece(['where is it?', 'is it small?', 'left right no'], 60)
    right = {}
    for blind in (False, True):
        method = new_method('answerer', 'smoke', tokenizer=words, image_size=(32, 32), dropout=0., see_image=see_image, blind=blind)
        optimiser = torch.optim.AdamW(method.train().parameters(), 3e-3)
        for step in range(60):
            loss = method(spots(range(32 * step + 500, 32 * step + 532), words), StepState(step, 60))['loss']
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        images = torch.stack([torch.from_numpy(spot(i)[0]) for i in range(40)])[:, None]
        found = method.answer(images, ['where is it?'] * 40, ['left', 'right', 'no'])
        right[blind] = np.mean([f == spot(i)[1] for i, f in enumerate(found)])
        assert method.answer(images[:4], ['is it small?'] * 4) == ['no'] * 4
    assert right[False] > .9 and right[True] < .7


def test_capabilities_are_declared():
    assert CAPABILITIES['generate'] == '(images, prompt=None)' and CAPABILITIES['answer'] == '(images, questions, candidates=None)'
    assert search_of(WriteConfig()).beams == 3
