"""The causal test of heat maps: pairs that differ where they may, scores of planted maps, what is not asked; and what cannot be explained."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from medvl.api import Model, explain
from medvl.attribute.attribute import EXPLANATIONS, attribute
from medvl.attribute.causal import (side_knowledge, PLACES, CausalSystem, causal_knowledge, causal_lines, causal_pairs, causal_rows, causal_table, change_score, draw_patients, founded_ways, grown, map_mass,
                                    mass_fall, shortcut_knowledge, side_rows)
from medvl.attribute.evidence import CARD, believed_way, read_card, record_bench, record_causal
from medvl.attribute.fusion_flow import fused_relevance
from medvl.attribute.sanity import sanity_bench, sanity_lines
from medvl.attribute.targets import Explanation, Target
from medvl.core.errors import DataError
from medvl.data.phantom.breast_anatomy import PhantomConfig
from medvl.data.phantom.breast_exam import phantom_exam
from medvl.data.phantom.chest_anatomy import FINDINGS, ChestConfig
from medvl.data.phantom.counterfactual import counterfactual, marked_picture
from medvl.methods.recipes import new_method
from medvl.methods.supervised import Supervised, SupervisedConfig

CHEST, BREAST = ChestConfig(size=(96, 96), difficulty='easy'), PhantomConfig(size=(96, 64), difficulty='easy')


@pytest.fixture(scope='module')
def films(): return draw_patients('chest', 60, CHEST)


@pytest.fixture(scope='module')
def exams(): return draw_patients('breast', 12, BREAST)


@pytest.fixture(scope='module')
def system():
    torch.manual_seed(0)
    return CausalSystem('net', Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule', 'opacity'))).eval(), 'resize_v1', (96, 96), 'chest')


def made(exams, config, label, change):
    "The pairs that can be made, with their images."
    for e in exams:
        for side in ('',) if config is CHEST else ('L', 'R'):
            try: pair = counterfactual(e, change, label, config, side)
            except DataError: continue
            yield e, side, pair


@pytest.mark.parametrize('label', FINDINGS)
@pytest.mark.parametrize('change', PLACES)
def test_a_film_differs_in_its_finding_alone(films, label, change):
    count = 0
    for e, _, pair in made(films[:40], CHEST, label, change):
        (a, b), (old, new), support = pair.images(), pair.masks(), pair.support['']
        assert a is e.pixels and not (a != b)[~support].any(), 'another pixel changed'
        assert (a != b)[old | new].any() and old.any() and new.any() == (change != 'removed')
        if label not in ('cardiomegaly', 'oedema', 'device'): assert support[~grown(old | new, 14)].sum() == 0, 'the support reaches far from the finding'
        assert pair.after.truth.labels[label] == int(change != 'removed') and pair.after.truth.patient_id == e.truth.patient_id
        others = [f for f in e.truth.findings if f.label != label]
        assert [f for f in pair.after.truth.findings if f.label != label] == others
        if change == 'mirrored': assert {f.side for f in pair.after.truth.findings if f.label == label} != {f.side for f in e.truth.findings if f.label == label}
        count += 1
    possible = {'removed': FINDINGS, 'shrunk': [f for f in FINDINGS if f != 'device'], 'moved': ('opacity', 'nodule', 'atelectasis'),
                'mirrored': ('opacity', 'nodule', 'atelectasis', 'effusion', 'pneumothorax')}[change]
    assert (count > 0) == (label in possible)


@pytest.mark.parametrize('label', ['mass', 'suspicious_calcification'])
@pytest.mark.parametrize('change', PLACES)
def test_a_breast_differs_in_its_lesion_alone(exams, label, change):
    count = 0
    for _, side, pair in made(exams, BREAST, label, change):
        other = 'R' if side == 'L' else 'L'
        for key, support in pair.support.items():
            a, b = pair.images(key)
            assert not (a != b)[~support].any()
            if key[0] == other and change != 'mirrored': assert a is b and not support.any()
            old, new = pair.masks(key)
            assert not support[~grown(old | new, 12)].any()
        assert pair.after.truth.breasts[side].labels[label] == int(change in ('moved', 'shrunk'))
        if change == 'mirrored': assert pair.after.truth.breasts[other].labels[label] == 1
        count += 1
    assert count > 0


def test_a_marker_is_burned_in_and_nothing_else(films, exams):
    film, exam = counterfactual(films[0], 'marked', 'nodule', CHEST), counterfactual(exams[0], 'marked', 'mass', BREAST, 'L')
    for pair, key in ((film, ''), (exam, ('L', 'CC')), (exam, ('L', 'MLO'))):
        a, b = pair.images(key)
        assert (b[pair.support[key]] == 255).all() and pair.support[key].sum() > 10 and not (a != b)[~pair.support[key]].any()
    assert not exam.support['R', 'CC'].any() and film.after.truth is film.before.truth
    assert marked_picture(np.zeros((96, 96), np.uint16))[0].max() == 4095


@pytest.mark.parametrize('error, message, ask', [
    (ValueError, 'Did you mean', lambda f: counterfactual(f, 'remove', 'nodule', CHEST)), (ValueError, 'Did you mean', lambda f: counterfactual(f, 'removed', 'noduls', CHEST)),
    (ValueError, 'this configuration', lambda f: counterfactual(f, 'removed', 'nodule', ChestConfig(size=(96, 96)))),
    (ValueError, 'side', lambda f: counterfactual(phantom_exam(0, 0, BREAST), 'removed', 'mass', BREAST, 'X')),
    (ValueError, 'kind of phantom', lambda f: draw_patients('leg', 2, CHEST))])
def test_what_cannot_be_changed(films, error, message, ask):
    with pytest.raises(error, match=message): ask(films[0])


def test_scores_by_hand():
    here, there = (np.zeros((30, 30), bool) for _ in range(2))
    here[4:9, 4:9] = True; there[20:25, 20:25] = True
    on = lambda m, v=1.: np.where(grown(m), v, 0.)
    assert mass_fall(on(here), on(here, .5), here) == pytest.approx(1/3) and mass_fall(on(here)*0, on(here)*0, here) == 0
    assert change_score('moved', on(here), on(there), here, there) == 1 and change_score('moved', on(there), on(here), here, there) == -1
    assert change_score('removed', on(here) + 1, on(here)*0 + .25, here, here & False) == pytest.approx((2 - .25)/2.25 - .75/1.25)
    assert change_score('marked', on(there)*0, on(there), there, there) == 1
    assert change_score('mirrored', on(here), 0*on(here), here, here, images=(0*on(here), on(here))) == 1 # it went to the other breast
    faint = np.random.default_rng(0).random((30, 30))
    for c in ('removed', 'moved'): assert change_score(c, faint, .1*faint, here, there) == pytest.approx(0) # the whole map grew faint
    assert (map_mass(np.array([[-1., 3.]])) == [[0, 3]]).all() and (map_mass(np.array([[-1., 3.]]), False) == [[0, 4]]).all()


@pytest.mark.parametrize('bad, message', [
    (lambda m, e: change_score('removed', m, m, e, e), 'empty mask'), (lambda m, e: change_score('removed', m, m, e[:4], e), 'must be the same'),
    (lambda m, e: change_score('lost', m, m, ~e, e), 'Did you mean|There are'), (lambda m, e: change_score('shrunk', m, m, ~e, ~e), 'did not shrink'),
    (lambda m, e: map_mass(np.full((2, 2), np.nan)), 'not finite')])
def test_maps_and_masks_that_are_none(bad, message):
    with pytest.raises(ValueError, match=message): bad(np.ones((8, 8)), np.zeros((8, 8), bool))


@pytest.mark.parametrize('value', [0., 1., -2.])
def test_a_map_of_one_value_scores_nothing(value):
    here = np.zeros((12, 12), bool); here[2:5, 2:5] = True
    flat = map_mass(np.full((12, 12), value))
    assert change_score('removed', flat, flat, here, here & False) == 0 == change_score('moved', flat, flat, here, here[::-1, ::-1])


def planted(monkeypatch, pairs):
    "Three ways: one knows the finding, one is blind, one follows its contrary as well."
    truth = {x.tobytes(): m for p in pairs for x, m in zip(p.images, p.masks)}
    at = lambda x: torch.from_numpy(grown(truth[x[0, 0].to(torch.uint8).cpu().numpy().tobytes()])*1.)
    ways = {'knows': lambda m, x, t, level, **o: (at(x) if not str(t.value).startswith('no ') else 0*at(x), {}), 'blind': lambda m, x, t, level, **o: (torch.linspace(0, 1, x.numel()).view(x.shape[2:]), {}),
            'deaf': lambda m, x, t, level, **o: (at(x), {})}
    for name, draw in ways.items(): monkeypatch.setitem(EXPLANATIONS, name, Explanation(draw, ('class', 'sentence'), 'planted'))
    return {n: (n, -1, {}) for n in ways}


def test_one_table(films, system, monkeypatch):
    pairs = causal_pairs(system, films, 'nodule', CHEST, 6)
    assert len({p.patient for p in pairs}) == 6 and {p.change for p in pairs} <= set(PLACES) and len(pairs) > 10
    rows, lost = causal_rows(system, 'nodule', pairs, {**planted(monkeypatch, pairs), 'rollout': ('rollout', -1, {})})
    assert 'on a ViT' in lost['rollout'] and set(lost) == {'rollout'}
    table = causal_table(pd.DataFrame(rows), 100)
    assert {'value', 'low', 'high', 'n', 'patients', 'unit'} <= set(table)
    verdict = founded_ways(table).set_index('explanation')
    assert verdict.causal['knows'] > .9 and verdict.causal['blind'] == 0
    assert not verdict.founded.any() # there is no untrained network: nothing is founded
    known = causal_knowledge(system, films, ['nodule', 'opacity'], knows=2., n_boot=30)
    assert not known.asked.any() and all('below 2' in w for w in known.why)
    lines = causal_lines(table, known)
    assert sum('not asked' in str(v) for v in lines['asked for']) == 2 and lines.loc[('net', 'knows'), 'causal'].startswith('1.00')


def test_founded_beside_the_untrained(films, system, monkeypatch):
    pairs, ways = causal_pairs(system, films, 'nodule', CHEST, 8), None
    ways = planted(monkeypatch, pairs)
    own, rng = (lambda m, x, t, level, **o: (truth_of(m, x, t, level)[0] + .1*float(rng.random()), {})), np.random.default_rng(0)
    truth_of = EXPLANATIONS['knows'].draw
    other = Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule', 'opacity'))).eval()
    monkeypatch.setitem(EXPLANATIONS, 'knows', Explanation(lambda m, x, t, level, **o: own(m, x, t, level) if m is system.method else (torch.ones(4, 4), {}), ('class',), 'planted'))
    whole = CausalSystem('net', system.method, 'resize_v1', (96, 96), 'chest', other)
    verdict = founded_ways(causal_table(pd.DataFrame(causal_rows(whole, 'nodule', pairs, {'knows': ways['knows'], 'deaf': ways['deaf']})[0]), 200)).set_index('explanation')
    assert verdict.founded['knows'] and not verdict.founded['deaf'] # its untrained self follows as well: not of the network


def test_a_negated_sentence(films, monkeypatch):
    method = new_method('clip', 'smoke', ['There is a nodule.', 'No nodule.']).eval()
    reads = CausalSystem('clip', method, 'resize_v1', (96, 96), 'chest')
    pairs = causal_pairs(reads, films, 'nodule', CHEST, 4)
    table = causal_table(pd.DataFrame(causal_rows(reads, 'nodule', pairs, planted(monkeypatch, pairs))[0]), 50).set_index(['explanation', 'metric']).value
    assert table['knows', 'negated'] > .9 and table['deaf', 'negated'] == 0 == table['blind', 'negated']
    assert side_rows(reads, 'nodule', films, {}, knows=1.1)[0] == [] and 'below' in side_rows(reads, 'nodule', films, {}, knows=1.1)[1]
    rows, why = side_rows(reads, 'nodule', films, {'gradcam': ('gradcam', -1, {})}, 2, knows=0)
    assert why == '' and {'other side', 'side negated'} <= {r['test'] for r in rows} <= {'other side', 'side negated', 'flipped'}
    assert len({r['patient_id'] for r in rows if r['test'] == 'other side'}) == 2
    assert side_rows(CausalSystem('net', Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule',))), 'resize_v1', (96, 96), 'chest'), 'nodule', films, {})[1] == 'it has no class and no sentence of a side'


def test_a_system_without_the_score_is_not_asked(films):
    age = CausalSystem('age', new_method('proxy', 'smoke').eval(), 'resize_v1', (96, 96), 'chest')
    known = causal_knowledge(age, films, ['nodule'], n_boot=20)
    assert not known.asked.item() and 'encode_image' in known.why.item()
    with pytest.raises(DataError, match='all or in none'): causal_knowledge(age, films[:1], ['nodule'])


def test_a_shortcut_is_known_only_where_it_moves_the_score(films, system):
    class Letter(Supervised):
        def logits(self, images, present=None): return (images.float()[:, 0, -16:].amax((1, 2)) > 250).float()[:, None].expand(-1, 2)*4 - 2
    letter = CausalSystem('letter', Letter(SupervisedConfig(image_encoder='resnet-tiny', labels=('nodule', 'opacity'))).eval(), 'resize_v1', (96, 96), 'chest')
    assert shortcut_knowledge(letter, films, 'nodule', n_boot=20).asked.item()
    none = CausalSystem('none', system.method, 'resize_v1', (96, 96), 'chest')
    monkey = shortcut_knowledge(none, films[:20], 'nodule', knows=1.01, n_boot=20)
    assert not monkey.asked.item() and 'does not move' in monkey.why.item()


def test_breasts_go_through_their_crop(exams):
    torch.manual_seed(0)
    net = Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('mass',))).eval()
    reads = CausalSystem('breast', net, 'mammo_clip_v1', (96, 64), 'breast')
    pairs = causal_pairs(reads, exams, 'mass', BREAST, 8)
    assert pairs and all(p.images.shape == (2, 96, 64) and p.masks[0].any() for p in pairs)
    assert any(p.beside is not None for p in pairs if p.change == 'mirrored')
    rows, lost = causal_rows(reads, 'mass', pairs, {'gradcam': ('gradcam', -1, {})})
    assert not lost and all(np.isfinite(r['score']) and abs(r['score']) <= 2 for r in rows)


def test_the_record_decides_what_explain_draws(tmp_path, films, system):
    model = Model(system.method, 'resize_v1', (96, 96))
    plain = explain(model, films[0].pixels, 'nodule')
    assert 'gradcam' in plain.by and 'not known' in plain.why and 0 <= plain.score <= 1 and plain.heat.shape == (96, 96)
    folder = model.save_pretrained(tmp_path/'model')
    verdict = pd.DataFrame([dict(explanation='occlusion', causal=.4, low=.3, high=.5, n=9, patients=5, minus_brightness=.1, minus_untrained=.1, founded=True),
                            dict(explanation='gradcam@image_encoder.layer3.0', causal=.6, low=.5, high=.7, n=9, patients=5, minus_brightness=.2, minus_untrained=.2, founded=True)])
    record_causal(folder, verdict, pd.DataFrame([dict(finding='nodule', auroc=.9)]), 'chest phantom')
    told = explain(Model(system.method, 'resize_v1', (96, 96), card=read_card(folder)), films[0].pixels, 'opacity')
    assert told.by.startswith('gradcam@image_encoder.layer3.0') and 'Best founded of 2 ways' in told.why and told.why in told.notes
    placed = pd.DataFrame([dict(method='occlusion', value=.8, control='centre', minus_control=.1, low=.05, high=.2, images=9, patients=5, founded=True),
                           dict(method='gradcam@image_encoder.layer3.0', value=.6, control='centre', minus_control=-.1, low=-.2, high=-.05, images=9, patients=5, founded=False)])
    record_bench(folder, placed, pd.DataFrame([dict(finding='nodule', value=.9)]), '5 test patients')
    twice = explain(Model(system.method, 'resize_v1', (96, 96), card=read_card(folder)), films[0].pixels, 'opacity')
    assert twice.by.startswith('occlusion') and twice.why.startswith('Founded twice, best of 2 ways') and 'followed its cause by 0.60, but was not founded there' in twice.why
    record_bench(folder, placed.assign(founded=False), pd.DataFrame([dict(finding='nodule', value=.9)]), '5 test patients')
    once = explain(Model(system.method, 'resize_v1', (96, 96), card=read_card(folder)), films[0].pixels, 'opacity')
    assert once.by.startswith('gradcam@image_encoder.layer3.0') and 'Best founded of 2 ways' in once.why and 'pixel AUROC 0.60, -0.10' in once.why
    record_causal(folder, verdict.assign(founded=False), pd.DataFrame(columns=['finding', 'auroc']), 'chest phantom')
    none = explain(Model(system.method, 'resize_v1', (96, 96), card=read_card(folder)), films[0].pixels, 'nodule')
    assert none.by == plain.by and 'not founded' in none.why
    assert explain(model, films[0].pixels, 'nodule', how='saliency').why == 'This way was chosen by hand.'
    with pytest.raises(ValueError, match='way of explaining'): explain(model, films[0].pixels, 'nodule', how='salience')
    with pytest.raises(ValueError, match='class'): explain(model, films[0].pixels, 'a spiculated mass')
    (folder/CARD).write_text(json.dumps({'causal': {'ways': [{'explanation': 3}]}}))
    with pytest.raises(DataError, match='damaged'): believed_way(read_card(folder))


def test_sanity_of_every_way(films, system):
    images = np.stack([f.pixels for f in films[:3]])
    before = {k: v.clone() for k, v in system.method.state_dict().items()}
    table = sanity_bench(system.method, images, ['a', 'b', 'c'], 'nodule', {'gradcam': ('gradcam', -1, {}), 'saliency': ('saliency', -1, {})}, system.method, 2, 20)
    assert all(torch.equal(v, before[k]) for k, v in system.method.state_dict().items())
    assert set(table.check) == {'cascade', 'independent', 'random labels'} and set(sanity_lines(table).explanation) == {'gradcam', 'saliency'}
    own = table[(table.check == 'random labels') & (table.step == 1) & (table.metric == 'spearman')]
    assert np.allclose(own.value, 1) # the same network draws the same
    cascade, alone = (table[(table.check == c) & (table.step == 1)].set_index(['method', 'metric']).value for c in ('cascade', 'independent'))
    assert np.allclose(cascade, alone) # the first stage alone is the first step of the cascade


def test_relevance_of_words_is_not_negative_and_follows_the_answer():
    texts = ['The heart is large.', 'No mass is seen.']
    for name in ('smoke', 'smoke-2022'):
        m = new_method('xvl', name, texts).eval()
        x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))*255
        maps, odds = fused_relevance(m, x, texts[0])
        assert (maps >= 0).all() and maps.max() > 0 and all(p.grad is None for p in m.parameters())
        whole = attribute(m, x, Target('sentence', texts[0]), 'word_relevance')
        torch.testing.assert_close(whole.map, maps[0])
        with torch.no_grad(): m.matching['text'].weight.zero_()
        assert not fused_relevance(m, x, texts[0])[0].any() # a constant answer has no causes
    with pytest.raises(TypeError, match='has none'): attribute(new_method('clip', 'smoke', texts), x, Target('word', 'heart'), 'word_relevance', report=texts[0])


def test_sides_by_class(monkeypatch):
    "A way that shows the asked side flips; one that shows the finding whatever is asked, and one that shows nothing, do not."
    exams = draw_patients('chest', 40, ChestConfig(size=(96, 96), difficulty='easy', p_effusion=1, p_device=0))
    class Sides(Supervised):
        "Reads the side off the brightness of the lower corners."
        def logits(self, images, present=None):
            x = images.float()[:, 0, 60:78]
            return torch.stack([x[:, :, 60:85].mean((1, 2)), x[:, :, 11:36].mean((1, 2))], 1)/20
    method = Sides(SupervisedConfig(image_encoder='resnet-tiny', labels=('left_effusion', 'right_effusion'))).eval()
    knower = CausalSystem('sides', method, 'resize_v1', (96, 96), 'chest')
    table = side_knowledge(knower, 'effusion', exams, .7, n_boot=50)
    assert table.asked.item() and table.auroc.item() > .7 and table.finding.item() == 'effusion, left against right'
    assert knower.side_targets('effusion')['left'][0].value == 'left_effusion' and knower.side_targets('nodule') == {}
    assert 'no class' in side_knowledge(knower, 'nodule', exams).why.item()
    where = {e.pixels.tobytes(): {s: np.any([m for f, m in zip(e.truth.findings, e.masks) if f.label == 'effusion' and f.side == s], axis=0) | np.zeros(e.pixels.shape, bool)
                                  for s in 'LR'} for e in exams}
    def side(method, images, target, level): return torch.from_numpy(where[bytes(images[0, 0].byte().numpy())][target.value[0].upper()]*1.), {}
    def both(method, images, target, level): return torch.from_numpy(np.logical_or(*where[bytes(images[0, 0].byte().numpy())].values())*1.), {}
    def wrong(method, images, target, level): return torch.from_numpy(where[bytes(images[0, 0].byte().numpy())]['RL'[target.value[0] == 'r']]*1.), {}
    def none(method, images, target, level): return torch.zeros(96, 96), {}
    for f in (side, both, wrong, none): monkeypatch.setitem(EXPLANATIONS, f.__name__, Explanation(f, ('class',), 'planted'))
    rows, why = side_rows(knower, 'effusion', exams, {n: (n, -1, {}) for n in ('side', 'both', 'wrong', 'none')}, 6, .7, 0)
    found = pd.DataFrame(rows).groupby(['explanation', 'test']).score.mean()
    assert why == '' and set(pd.DataFrame(rows).test) == {'other side', 'flipped'}
    assert found['side', 'other side'] == 1 == found['side', 'flipped'] and found['wrong', 'other side'] == -1 == found['wrong', 'flipped']
    for dull in ('both', 'none'): assert found[dull, 'other side'] == 0 == found[dull, 'flipped']
    lines = causal_table(pd.DataFrame(rows), 50)
    assert {'other side', 'flipped'} <= set(lines.metric)
