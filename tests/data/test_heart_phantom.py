"""Chest phantoms whose label is the cardiothoracic ratio: what is drawn is what is said, age and sex act on it, shortcuts are as strict as asked, histograms know nothing, and older phantoms stay as they were."""
import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from medvl.core.errors import DataError
from medvl.data.phantom.chest_anatomy import LIMIT, ChestConfig, healthy_chest
from medvl.data.phantom.chest_film import balanced_chest, chest_exam, chest_truth, write_chest_phantom
from medvl.data.phantom.heart_ratio import heart_histogram, heart_phantom, ratio_baseline, ratio_table
from medvl.data.phantom.populations import new_phantom
from medvl.data.provenance_control import LINE_CLUES, clue_table

RATIO = ChestConfig(heart='ratio')
QUIET = dict(p_opacity=0., p_effusion=0., p_pneumothorax=0., p_atelectasis=0., p_nodule=0., p_oedema=0., p_device=0.)


def truths(n, config): return [chest_truth(4, i, config) for i in range(n)]


def test_the_masks_measure_what_was_drawn():
    found = [chest_exam(4, i, RATIO, size=(160, 160)) for i in range(12)]
    true, seen = np.array([e.truth.ratio for e in found]), np.array([e.ratio for e in found])
    assert np.abs(true - seen).max() < .03 and np.ptp(true) > .1
    for e in found: # a finding with the heart as its mask exactly where the ratio is above the limit
        large = [f for f in e.truth.findings if f.label == 'cardiomegaly']
        assert bool(large) == (e.truth.ratio > LIMIT)
        if large: assert (e.mask('cardiomegaly') == e.heart).all()


def test_the_label_is_the_ratio_but_for_its_noise():
    for noise in (0., .1, 1.):
        t = truths(600, ChestConfig(heart='ratio', label_noise=noise))
        wrong = np.mean([x.labels['cardiomegaly'] != (x.ratio > LIMIT) for x in t])
        assert abs(wrong - noise) < .04 and (noise not in (0, 1) or wrong == noise)


def test_age_and_sex_act_on_the_heart():
    t = truths(1500, RATIO)
    age, ratio, women = (np.array([getattr(x, k) if k != 'sex' else x.sex == 'F' for x in t], float) for k in ('age', 'ratio', 'sex'))
    slope = np.linalg.lstsq(np.c_[age, women, np.ones(len(t))], ratio, rcond=None)[0]
    assert .0008 < slope[0] < .0014 and .004 < slope[1] < .02
    unfold = np.array([x.anatomy.unfold for x in t])
    assert np.corrcoef(age, unfold)[0, 1] > .8
    flat = truths(600, ChestConfig(heart='ratio', age_effect=0.))
    assert abs(np.corrcoef([x.age for x in flat], [x.ratio for x in flat])[0, 1]) < .1


def test_age_moves_the_picture_and_nothing_else_of_the_patient():
    a, b = (chest_exam(4, 3, ChestConfig(heart='ratio', age_effect=e), size=(96, 96)) for e in (0., 2.))
    assert a.truth.age == b.truth.age and a.truth.anatomy.width == b.truth.anatomy.width and (a.pixels != b.pixels).any()


@pytest.mark.parametrize('shortcut', ['view', 'pacemaker', 'portable'])
def test_shortcuts_are_as_strict_as_asked(shortcut):
    for rho, low, high in ((0., .45, .55), (.6, .75, .85), (1., 1., 1.)):
        t = truths(200 if rho == 1 else 800, ChestConfig(heart='ratio', shortcut=shortcut, rho=rho)) # shares are estimated; what always holds, not
        agree = np.mean([x.cue == x.labels['cardiomegaly'] for x in t])
        assert low <= agree <= high, (rho, agree)
        if shortcut == 'view': assert all((x.view == 'AP') == x.cue for x in t)
        if shortcut == 'pacemaker': assert all(any(f.kind == 'pacemaker' for f in x.findings) == x.cue for x in t)


def test_the_portable_letter_lies_outside_the_lungs():
    changed = 0
    for i in range(8):
        a, b = (chest_exam(4, i, ChestConfig(heart='ratio', shortcut=s, **r), size=(160, 160)) for s, r in (('portable', dict(rho=1.)), ('', {})))
        different = a.pixels != b.pixels
        changed += different.any()
        assert different.any() == a.truth.cue and not different[a.heart | a.lungs['R'] | a.lungs['L']].any()
    assert changed


def test_tables(tmp_path):
    d = heart_phantom(tmp_path/'a', 60, (64, 64), shortcut='portable', rho=1.)
    h = ratio_table(tmp_path/'a')
    assert set(h.index) == set(d.manifest.image_id) and (h.cue == h.cardiomegaly).all() and not {'ratio', 'measured_ratio', 'cue'} & set(d.manifest)
    b = ratio_baseline(h).set_index('score')
    assert b.auroc['measured_ratio'] > .8 and (b.low <= b.auroc).all() and (b.auroc <= b.high).all()
    assert b.auroc['measured_ratio'] > b.auroc['sex']
    with pytest.raises(DataError, match='both kinds'): ratio_baseline(h.assign(cardiomegaly=1))
    new_phantom('chest', tmp_path/'b', 24, (64, 64))
    with pytest.raises(DataError, match="heart='ratio'"): ratio_table(tmp_path/'b')
    assert new_phantom('heart', tmp_path/'c', 24, (64, 64)).manifest.label_cardiomegaly.notna().all()


def test_folders_of_before_are_still_opened(tmp_path):
    write_chest_phantom(tmp_path/'a', 8, (64, 64))
    assert not {'heart', 'rho', 'shortcut'} & set(json.loads((tmp_path/'a'/'phantom.json').read_text())['config'])
    write_chest_phantom(tmp_path/'a', 8, (64, 64))
    with pytest.raises(DataError, match='config'): write_chest_phantom(tmp_path/'a', 8, (64, 64), heart='ratio')


@pytest.mark.parametrize('wrong', [dict(heart='real'), dict(shortcut='name'), dict(rho=.5), dict(shortcut='view', rho=1.2), dict(label_noise=-.1)])
def test_what_cannot_be_drawn(wrong):
    with pytest.raises(ValueError): ChestConfig(**wrong)


@pytest.fixture(scope='module')
def hearts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hearts')
    return folder, heart_phantom(folder, 160, (64, 64), 2, label_noise=0.)


def test_the_histogram_does_not_tell_the_label(hearts):
    row = heart_histogram(hearts[0]).iloc[0]
    assert row.label == 'cardiomegaly' and row.auroc < .65, row # 160 patients: the interval is wide; the figure of 1,200 stands in RESULTS


def test_the_border_does_not_tell_the_size_of_the_heart(hearts):
    "Balanced in the whole body, a larger heart made the neck darker: a rank correlation of -.34 with the upper border (900 hearts)."
    clues, ratio = clue_table(hearts[1]), ratio_table(hearts[0]).loc[hearts[1].manifest.image_id].ratio
    for name in LINE_CLUES: assert abs(spearmanr(clues[name], ratio)[0]) < .25, name # 160 patients: an error of .08


def test_what_is_balanced_around_a_heart():
    e = chest_exam(3, 1, RATIO, size=(96, 96))
    rng = np.random.default_rng(0)
    drawn = healthy_chest(rng, rng, e.truth.anatomy, (96, 96), 'PA', True)
    box, chest = balanced_chest(drawn), drawn['lungs']['R'] | drawn['lungs']['L'] | drawn['heart']
    assert box[8:-8][chest[8:-8]].mean() > .9 and not box[:5].any() and not box[:, :5].any()
