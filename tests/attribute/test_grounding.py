"""Maps of words, scored on boxes and masks; and the widget that shows them."""
import re

import numpy as np
import pandas as pd
import pytest
import torch

from medvl.attribute.grounding import TERMS, ground_words, grounding_table, map_of_span, score_word_maps, term_places
from medvl.core.errors import DataError
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.show.words import draw_word_maps, stretched, word_widget


@pytest.fixture(scope='module')
def films(tmp_path_factory): return prepared_chest_phantom(tmp_path_factory.mktemp('films'), n=16, size=(64, 64))


def spans(text): return [(m[0], *m.span()) for m in re.finditer(r'\w+', text)]


def perfect(places, on='term'):
    "Maps that light up in the boxes for the term (or, turned around, for all other words)."
    def maker(images, texts):
        words, maps = [spans(t) for t in texts], np.zeros((len(texts), 60, 64, 64), np.float32)
        for k, p in enumerate(places.itertuples()):
            for j, (_, a, b) in enumerate(words[k]):
                if (a < p.end and b > p.start) == (on == 'term'):
                    for x0, y0, x1, y1 in p.boxes.astype(int): maps[k, j, y0:y1, x0:x1] = 1
        return torch.from_numpy(maps), words
    return maker


def test_a_perfect_map_is_perfect_and_its_opposite_is_not(films):
    places = term_places(films)
    table = grounding_table(ground_words(None, films, maker=perfect(places), batch_size=999), n_boot=64).set_index(['map_of', 'metric'])
    assert table.value['word', 'pointing'] == 1 and table.value['word', 'energy'] > .97
    for other in ('another word', 'centre', 'brightness', 'random'): assert table.gain[other, 'energy'] > .5
    turned = grounding_table(ground_words(None, films, maker=perfect(places, 'others'), batch_size=999), n_boot=64).set_index(['map_of', 'metric'])
    assert turned.gain['another word', 'pointing'] < 0 and turned.value['another word', 'pointing'] == 1
    by = grounding_table(ground_words(None, films, maker=perfect(places), batch_size=999), ('term',), ('pointing',), n_boot=64)
    assert set(by.term) == set(places.term) and by[by.map_of == 'word'].value.eq(1).all()


def test_a_flat_map_scores_chance(films):
    flat = lambda images, texts: (torch.ones(len(texts), 60, 4, 4), [spans(t) for t in texts])
    s = ground_words(None, films, maker=flat).query("map_of == 'word'")
    np.testing.assert_allclose(s.pointing, s.chance)
    np.testing.assert_allclose(s.energy, s.chance)


def test_masks_are_the_truth_where_they_are_asked_for(films):
    places = term_places(films)
    boxes, masks = (ground_words(None, films, truth=t, maker=perfect(places), batch_size=999).query("map_of == 'word'") for t in ('boxes', 'masks'))
    assert (masks.chance < boxes.chance).any() and (masks.chance <= boxes.chance + 1e-9).all()


def test_words_come_from_the_sentence_that_states_the_finding(films):
    places = term_places(films)
    for p in places.itertuples():
        assert re.fullmatch(TERMS[p.term], p.text[p.start:p.end], re.I) and p.text in set(films.sentences.sentence[films.sentences.label == p.term])
    report = term_places(films, text='report')
    assert set(report.text) <= set(films.manifest.report) and not places.duplicated(['image_id', 'term']).any()
    with pytest.raises(DataError, match='Add to `terms`'): term_places(films, {'cyst': 'cyst'})
    with pytest.raises(ValueError, match="'report'"): term_places(films, text='reports')


def test_parts_of_words_and_words_that_are_cut_off():
    maps = np.stack([np.full((2, 2), v) for v in (1., 2., 3.)])
    words = [('pleu', 0, 4), ('##ral', 4, 7), ('effusion', 8, 16)]
    assert map_of_span(maps, words, 0, 7).mean() == 1.5 and map_of_span(maps, words, 0, 16).mean() == 2 and map_of_span(maps, words, 17, 20) is None
    place = pd.DataFrame([dict(i=0, image_id='a', patient_id='p', term='fluid', text='', start=17, end=20, boxes=np.array([[0, 0, 1, 1.]]))])
    assert not len(score_word_maps(maps[None], [words], place, np.zeros((1, 4, 4))))
    with pytest.raises(ValueError, match='1 maps, 2 lists'): score_word_maps(maps[None], [words] * 2, place, np.zeros((1, 4, 4)))


def test_refusals(films):
    silent = lambda images, texts: (torch.ones(len(texts), 1, 4, 4), [[] for _ in texts])
    with pytest.raises(DataError, match='behind what the method reads'): ground_words(None, films, maker=silent)
    with pytest.raises(TypeError, match='needs word_maps'): ground_words(torch.nn.Linear(1, 1), films)
    with pytest.raises(ValueError, match='maker of maps'): ground_words(None, films)
    with pytest.raises(ValueError, match='truth'): ground_words(None, films, truth='lesions', maker=silent)


def test_a_click_draws_the_word_and_another_takes_it_away():
    image, maps = np.arange(64.).reshape(8, 8), np.random.default_rng(0).random((3, 4, 4))
    box = word_widget(image, ['a', 'b', 'b'], maps, boxes=[(1, 1, 4, 4, 'x')])
    buttons, picture = box.children[0].children, box.children[1]
    plain = picture.value
    buttons[2].value = True
    third = picture.value
    buttons[1].value = True # the second "b" comes up
    assert [b.value for b in buttons] == [False, True, False] and len({plain, third, picture.value}) == 3
    buttons[1].value = False
    assert picture.value == plain
    for bad, why in ((maps[:2], 'one map'), (maps * np.nan, 'not finite'), (maps[0], 'one map')):
        with pytest.raises(ValueError, match=why): draw_word_maps(image, ['a', 'b', 'c'], bad)
    assert stretched(maps[0], (16, 8)).shape == (16, 8)
