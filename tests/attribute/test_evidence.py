"""`explain` says when nothing matches, what the model was trained on and how well it points."""
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from medvl.api import Model, load, zero_shot
from medvl.attribute.evidence import CARD, THINGS, card_text, match_of, match_text, pointing_rows, read_card, trained_on, unrelated
from medvl.attribute.localisation import localisation_table
from medvl.attribute.mammo_factor import MammoFactor, MammoFactorConfig
from medvl.core.errors import DataError
from medvl.data.phantom.breast_exam import phantom_exam
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.methods.classifier import new_classifier
from medvl.methods.recipes import new_method


@pytest.fixture(scope='module')
def exam(): return phantom_exam(0, 3)


@pytest.fixture(scope='module')
def method(exam): return new_method('mammoclip', 'smoke', [b.report for b in exam.truth.breasts.values()])


def test_unrelated_phrases_have_the_length_of_the_sentence():
    assert len(set(THINGS)) == 60
    for sentence in ('banana', 'a mass', 'there is a spiculated mass in the upper outer quadrant of the left breast'):
        phrases = unrelated(sentence)
        assert len(set(phrases)) == 60 and {len(p.split()) for p in phrases} == {len(sentence.split())} and sentence not in phrases
    assert max(len(p.split()) for p in unrelated('word ' * 90)) <= 18


def test_calibration():
    "A sentence that is one more unrelated phrase matches in at most 5 % of cases, whatever the scale of the cosines."
    rng = np.random.default_rng(0)
    for scale, shift in ((1, 0), (1e-3, .97), (50, -3)):
        share = np.mean([match_of(v[0], v[1:])['matches'] for v in scale * rng.normal(size=(4000, 61)) + shift])
        assert .03 < share < .06
    assert match_of(1., np.arange(60) / 61) == {'p': pytest.approx(1 / 61), 'as_alike': 0, 'phrases': 60, 'matches': True}
    assert match_of(.5, np.full(60, .5))['matches'] is None and 'cannot be said' in match_text('x', match_of(.5, np.full(60, .5)))


class Steered(torch.nn.Module):
    "Answers as told: the map of an image knows one direction; texts with a known word point there, others anywhere."
    def __init__(self, method, word):
        super().__init__()
        self.inner, self.word = method, word
        self.name = 'steered'

    device = torch.device('cpu')
    def feature_maps(self, images, level=-1): return torch.ones(len(images), 16, 4, 3)
    def project_image(self, features): return features
    def project_text(self, texts):
        rows = [torch.ones(16) if self.word in t else torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, t)) + 7)) for t in texts]
        return torch.stack(rows)


def test_a_known_word_matches_and_a_banana_does_not(exam, method):
    model = Model(Steered(method, 'mass'), size=(128, 80))
    view = exam.views['L', 'MLO'].pixels
    known, banana = model.explain(view, 'a spiculated mass'), model.explain(view, 'banana')
    assert known.match['matches'] is True and known.match['as_alike'] == 0 and '“a spiculated mass” matches' in known.notes[0]
    assert banana.match['matches'] is False and banana.notes[0].startswith('Nothing here matches “banana”: ')
    assert banana.notes[1].startswith('Never put to the causal test') and banana.notes[2:] == ['What it was trained on is not recorded.', 'How well it points was never measured.'] and banana.notes[0] in repr(banana)
    for answer, images in ((known, 2), (banana, 1)): # no map is drawn where nothing matches
        fig = answer.figure()
        assert sum(bool(ax.images) for ax in fig.axes) == images and answer.notes[2] in fig._supxlabel.get_text().replace('\n', ' ')
        plt.close(fig)


def test_an_untrained_model_matches_nothing_most_of_the_time(exam):
    "Twelve initial weights, everyday words that are not among the phrases."
    view, found = exam.views['R', 'CC'].pixels, []
    for seed in range(4):
        model = Model(new_method('mammoclip', 'smoke', [b.report for b in exam.truth.breasts.values()], seed=seed), size=(128, 80))
        found += [model.explain(view, word).match['matches'] for word in ('banana', 'a wooden chair', 'keys')]
    assert found.count(True) <= 3


def test_mappers_are_asked_through_their_heads(exam, method):
    prompts = {'mass': ['there is a mass'], 'calcification': ['there are calcifications']}
    maps = method.feature_maps(torch.zeros(1, 1, 128, 80))
    factor = MammoFactor(MammoFactorConfig(prompts=prompts, grid=tuple(maps.shape[-2:]), width=method.project_text(['mass']).shape[1]), base=method)
    answer = Model(factor, size=(128, 80)).explain(exam.views['L', 'CC'].pixels, 'banana')
    assert answer.by.startswith('Mammo-FActOR, head of') and 0 < answer.match['p'] <= 1 and answer.match['phrases'] == 60


def test_a_sentence_is_explained_against_its_contrary(exam, method):
    model, view = Model(method, size=(128, 80)), exam.views['L', 'CC'].pixels
    alone, pair = model.explain(view, 'there is a mass'), model.explain(view, 'there is a mass', against='there is no mass')
    cosines = zero_shot(model, view, ['there is a mass', 'there is no mass'], scale=1000.)
    assert alone.nearer == () and 'against' not in alone.notes[0] and alone.by.startswith('similarity map')
    assert pair.by == 'similarity, sentence minus its contrary' and not np.allclose(pair.heat, alone.heat)
    nearest = cosines.idxmax()
    assert f'nearer to “{nearest}”' in pair.notes[0] and pair.notes[0].startswith(alone.notes[0]) and (pair.nearer[0] > pair.nearer[1]) == (nearest == 'there is a mass')
    fig = pair.figure()
    assert fig._suptitle.get_text() == '“there is a mass” against “there is no mass”'
    plt.close(fig)
    for said in ((.2, .1), (.1, .2)): # drawn where the sentence is the nearer one, whatever unrelated phrases say
        one = replace(pair, nearer=said, match={**pair.match, 'matches': False})
        fig = one.figure()
        drawn = len(fig.axes[1].images)
        plt.close(fig)
        assert bool(drawn) == (said[0] > said[1]) == (not one.empty)
    assert replace(alone, match={**alone.match, 'matches': False}).empty == 'nothing\nmatches'
    by_hand = model.explain(view, 'there is a mass', how='gradcam', against='there is no mass')
    assert by_hand.by == 'gradcam, sentence minus its contrary' and by_hand.why == 'This way was chosen by hand.'
    with pytest.raises(ValueError, match='contrary is empty'): model.explain(view, 'a mass', against=' ')
    with pytest.raises(ValueError, match='only a sentence'): Model(new_classifier(method, ('mass',)), size=(128, 80)).explain(view, 'mass', against='no mass')


def test_the_card_travels_with_the_model(method, exam, tmp_path):
    scores = pd.DataFrame([dict(method=m, attribute='mass', patient_id=i // 2, image_id=i, pointing=float(i < n)) for m, n in (('mammo_factor', 9), ('random', 1)) for i in range(24)])
    table = localisation_table(scores, metrics=('pointing',), n_boot=64)
    card = {'trained_on': '568 images of 142 patients (phantom)', 'pointing': pointing_rows(table, 'mammo_factor', 'phantom')}
    again = load(Model(method, size=(128, 80), card=card).save_pretrained(tmp_path/'model'))
    assert again.card == card == read_card(tmp_path/'model')
    notes = again.explain(exam.views['L', 'CC'].pixels, 'a mass').notes
    assert notes[1].startswith('Never put to the causal test') and notes[2] == 'Trained on 568 images of 142 patients (phantom).'
    assert notes[3].startswith('Hottest point in the box: mass 0.38 (') and notes[3].endswith('random 0.04.')
    assert not load(Model(method, size=(128, 80)).save_pretrained(tmp_path/'plain')).card and not (tmp_path/'plain'/CARD).exists()


@pytest.mark.parametrize('content', ['[]', '{"pointing": 3}', '{', '"x"'])
def test_a_card_that_is_none(content, tmp_path):
    (tmp_path/CARD).write_text(content)
    with pytest.raises((DataError, ValueError)): read_card(tmp_path)
    assert len(card_text({'pointing': [{'value': 'high'}, 3, {'attribute': 'x' * 999, 'value': .5}], 'trained_on': 'y' * 9999})[0]) < 230


def test_experiments_say_what_they_trained_on(tmp_path):
    data = prepared_phantom(tmp_path/'data', 6, (96, 64))
    line = trained_on(data.subset((data.manifest.split == 'train').to_numpy()))
    assert ' images of ' in line and ' patients' in line
    from pathlib import Path
    for name in ('e10_pretrain', 'e40_mammo_factor'):
        source = '\n'.join(''.join(c['source']) for c in json.loads((Path(__file__).parents[2]/'nbs'/'experiments'/f'{name}.ipynb').read_text())['cells'] if c['cell_type'] == 'code')
        assert "card={'trained_on'" in source or "card = {'trained_on'" in source, name
    assert 'pointing_rows(' in source
