"""Scores of written reports: golden numbers, planted errors, bad input, agreement with radiologists."""
import json
import re

import numpy as np
import pandas as pd
import pytest

from medvl.core.errors import DataError
from medvl.evaluate.text.agreement import (agreement_table, radjudge_table, ranked_as, raters_tau, read_radpref, tau_estimate,
                                           token_f1, weighted_tau)
from medvl.evaluate.text.finding_score import compare_findings, finding_score
from medvl.evaluate.text.finding_table import finding_pattern, report_findings
from medvl.evaluate.text.label_scores import (breast_attribute_f1, crimson_arithmetic, entity_f1, f1_of_counts, label_crimson,
                                              label_indicators, paired_reports)
from medvl.evaluate.text.meteor import meteor, porter_stem
from medvl.evaluate.text.ngrams import bleu_counts, bleu_of_counts, cider, clean_words, common_subsequence, rouge_l
from medvl.evaluate.text.rexrank import external_scores, read_rexrank, write_rexrank
from medvl.evaluate.text.score_reports import (REPORT_METRICS, WORD_METRICS, metric_cards, metrics_of, report_baselines,
                                               report_language, report_values, score_reports, score_systems)
from golden import golden, sample

CHEST = 'There is a small left pleural effusion. The heart is enlarged. No pneumothorax.'
CHEST_ERRORS = {'dropped': 'The heart is enlarged. No pneumothorax.',
                'negated': 'There is no left pleural effusion. The heart is enlarged. No pneumothorax.',
                'side': CHEST.replace('left', 'right')}
BREAST = 'Scattered fibroglandular densities. A mass in the upper outer quadrant of the left breast. BI-RADS 4.'
BREAST_ERRORS = {'dropped': 'Scattered fibroglandular densities. BI-RADS 4.', 'negated': BREAST.replace('A mass', 'No mass'),
                 'side': BREAST.replace('left', 'right')}
OTHERS = ['Clear lungs. Normal heart size.', 'Right lower lobe pneumonia. No effusion.']


# golden numbers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('references, key', [('references', 'single_ref'), ('multi_references', 'multi_ref')])
def test_caption_metrics_are_those_of_the_original(references, key):
    told = json.loads(golden('xvl/caption_metrics.json').read_text())
    refs, said, want = told[references], told['hypotheses'], told[key]
    counts = bleu_counts(refs, said)
    np.testing.assert_allclose(bleu_of_counts(counts.sum(0)), want['bleu'], rtol=1e-10)
    np.testing.assert_allclose(bleu_of_counts(counts).T, want['bleu_per_sample'], rtol=1e-8)
    np.testing.assert_allclose(rouge_l(refs, said), want['rouge_per_sample'], rtol=1e-12)
    np.testing.assert_allclose(rouge_l(refs, said).mean(), want['rouge_l'], rtol=1e-12)
    np.testing.assert_allclose(cider(refs, said), want['cider_per_sample'], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(cider(refs, said).mean(), want['cider'], rtol=1e-10)


def test_a_corpus_of_one_report_is_that_of_the_original():
    told = json.loads(golden('xvl/caption_metrics.json').read_text())
    refs, said = told['references'][:1], told['hypotheses'][:1]
    np.testing.assert_allclose(bleu_of_counts(bleu_counts(refs, said))[0], told['single_pair_corpus']['bleu'], rtol=1e-10)
    assert cider(refs, said)[0] == told['single_pair_corpus']['cider'] == 0


def test_cider_takes_frequencies_from_elsewhere():
    assert cider(['left effusion seen'], ['left effusion seen'], documents=['left effusion seen', 'no disease'])[0] > 5


def test_meteor_and_stems_are_those_of_nltk():
    pytest.importorskip('nltk', reason='nltk is not installed: METEOR is compared with it where it is')
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score

    class NoSynonyms:
        def synsets(self, word): return []
    stemmer = PorterStemmer(mode='MARTIN_EXTENSIONS')
    words = 'effusions caresses ponies opacities atelectatic relational hopping controlling agreed sky happy generalizations'.split()
    assert [porter_stem(w) for w in words] == [stemmer.stem(w) for w in words]
    for a, b in ((CHEST, v) for v in (*CHEST_ERRORS.values(), 'the effusions on the left are small', '')):
        want = single_meteor_score(a.lower().split(), b.lower().split(), stemmer=stemmer, wordnet=NoSynonyms())
        assert abs(meteor([a], [b])[0] - want) < 1e-12


def test_porter_examples_of_the_paper():
    pairs = dict(caresses='caress', ponies='poni', cats='cat', feed='feed', agreed='agre', plastered='plaster', motoring='motor',
                 sing='sing', conflated='conflat', troubled='troubl', sized='size', hopping='hop', falling='fall', filing='file',
                 happy='happi', sky='sky', relational='relat', conditional='condit', digitizer='digit', triplicate='triplic',
                 hopefulness='hope', revival='reviv', adjustment='adjust', adoption='adopt', probate='probat', rate='rate',
                 controll='control', roll='roll')
    assert {w: porter_stem(w) for w in pairs} == pairs


@pytest.mark.parametrize('a, b', [('', 'a'), ('a b', 'a b'), ('a b c', 'c b a'), ('a a b', 'a b a b')])
def test_common_subsequence(a, b):
    def slow(x, y):
        if not x or not y: return 0
        return slow(x[1:], y[1:]) + 1 if x[0] == y[0] else max(slow(x[1:], y), slow(x, y[1:]))
    assert common_subsequence(a.split(), b.split()) == slow(a.split(), b.split())


def test_crimson_is_that_of_its_authors():
    # (correct, false, missed, total) -> worked out with the published rule
    assert crimson_arithmetic(1, 0, .5, 1.5) == pytest.approx(2/3)
    assert crimson_arithmetic(0, 0, 0, 0) == 1
    assert crimson_arithmetic(0, 1, 0, 0) == -.5 and crimson_arithmetic(0, .25, 0, 0) == -.2
    assert crimson_arithmetic(.5, 2, 1, 1.5) == pytest.approx(-1.5/2.5)
    assert crimson_arithmetic(0, 0, 1, 1) == 0
    assert -1 < crimson_arithmetic(0, 100, 1, 1) < -.98


# planted errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', list(REPORT_METRICS))
@pytest.mark.parametrize('error', ['dropped', 'negated', 'side'])
def test_every_metric_falls_or_says_that_it_is_blind(name, error):
    m = REPORT_METRICS[name]
    true, said = (BREAST, BREAST_ERRORS[error]) if m.modality == 'breast' else (CHEST, CHEST_ERRORS[error])
    refs = [true, *OTHERS]
    right, wrong = (score_reports(refs, [first, *OTHERS], [1, 2, 3], [name], m.modality if m.modality != 'any' else 'chest',
                                  n_boot=0).value[0] for first in (true, said))
    assert m.low <= wrong <= right <= m.high + 1e-9
    assert wrong == right if error in m.blind else wrong < right - 1e-4


def test_word_metrics_prefer_a_wrong_side_to_other_words_and_findings_do_not():
    other_words, side = 'Left-sided pleural fluid of small amount, cardiomegaly, no pneumothorax.', CHEST_ERRORS['side']
    for name in (*WORD_METRICS, 'METEOR'):
        a, b = (score_reports([CHEST, *OTHERS], [t, *OTHERS], [1, 2, 3], [name], n_boot=0).value[0] for t in (side, other_words))
        assert a > b, name
    for score in (finding_score, entity_f1, label_crimson): assert score(CHEST, side) < score(CHEST, other_words)


def test_finding_score_weighs_as_a_clinician_would():
    true = 'Moderate left pneumothorax. Tortuous aorta.'
    missing_minor, missing_urgent = finding_score(true, 'Moderate left pneumothorax.'), finding_score(true, 'Tortuous aorta.')
    assert missing_urgent < .6 < .85 < missing_minor < 1
    assert finding_score(true, true + ' Heart size is normal. No effusion.') == pytest.approx(1)
    assert finding_score('Clear lungs.', 'No acute disease.') == 1
    assert finding_score('Clear lungs.', 'Large pneumothorax.') < finding_score('Clear lungs.', 'Minimal atelectasis.') < 1
    assert finding_score('3 cm mass.', '2.8 cm mass.') > finding_score('3 cm mass.', '1 cm mass.')
    assert finding_score('Tortuous aorta.', 'Clear lungs.', age=80) > finding_score('Tortuous aorta.', 'Clear lungs.', age=30)
    c = compare_findings(true, 'Small right pneumothorax. Cardiomegaly.')
    assert {e for *_, errors in c.matched for e in errors} == {'side', 'degree'}
    assert [f.name for f, _ in c.missed] == ['tortuous aorta'] and [f.name for f, _ in c.false] == ['cardiomegaly']
    assert '<script>' not in compare_findings('<script> effusion', 'left effusion')._repr_html_()


@pytest.mark.parametrize('text, names', [
    ('No pneumothorax, pleural effusion, or consolidation.', []), ('No pneumothorax, small left effusion.', ['effusion']),
    ('The heart is normal in size with clear lungs.', []), ('Interval removal of the endotracheal tube.', []),
    ('The patient has a history of pneumonia.', []), ('CT chest is recommended to exclude a mass.', []),
    ('The pneumothorax has resolved.', []), ('Right mainstem bronchus intubation.', ['malpositioned device', 'endotracheal tube']),
    ('Effusion. Left effusion, unchanged.', ['effusion']), ('Heart size is at the upper limits of normal.', ['borderline heart']),
    ('Elevation of the right hemidiaphragm.', ['elevated diaphragm'])])
def test_findings_of_sentences(text, names): assert [f.name for f in report_findings(text)] == names


def test_finding_table_names_are_unique_and_kin_are_known():
    from medvl.evaluate.text.finding_score import KIN
    names = [n for *_, n in finding_pattern()[1]]
    assert len(names) == len(set(names)) and {n for pair in KIN for n in pair} <= set(names)


def test_label_f1_against_sklearn():
    from sklearn.metrics import f1_score
    refs, said = [CHEST, *OTHERS, 'Possible pneumonia. Mild edema.'], [*OTHERS, CHEST, 'Pneumonia.']
    for way in ('zeros', 'ones', 'status'):
        true, pred = (label_indicators(t, uncertain=way) for t in (refs, said))
        counts = (true & pred).sum(0), pred.sum(0), true.sum(0)
        seen = (true | pred).any(0)
        for average in ('micro', 'macro'):
            assert f1_of_counts(*counts, average) == pytest.approx(f1_score(true[:, seen], pred[:, seen], average=average))
    with pytest.raises(ValueError, match='average'): f1_of_counts(*counts, 'mean')
    with pytest.raises(ValueError, match='label'): label_indicators(refs, ['Effusoin'])


# bad input ----------------------------------------------------------------------------------------------------------------

def test_lists_that_do_not_fit():
    with pytest.raises(DataError, match='2 references and 1 candidates'): paired_reports(['a', 'b'], ['a'])
    with pytest.raises(DataError, match='number 1'): score_reports(['a', None], ['b', 'c'], [1, 2])
    with pytest.raises(DataError, match='no report'): score_reports([], [], [])
    with pytest.raises(DataError, match='patients'): score_reports(['a'], ['a'], [1, 2])
    with pytest.raises(DataError, match=r'\[report\]'): score_reports('Effusion.', ['Effusion.'], [1])
    for f in (bleu_counts, rouge_l, cider, meteor):
        with pytest.raises(DataError, match='empty'): f(['a', ''], ['a', 'b'])
        with pytest.raises(DataError, match='2 references and 1'): f(['a', 'b'], ['a'])


def test_one_report_one_word_and_no_report():
    one = score_reports(['Effusion'], ['Effusion'], ['p'], n_boot=50)
    assert one.set_index('metric').value['CIDEr'] == 0 and 'idf' in one.set_index('metric').note['CIDEr']
    assert one.set_index('metric').value['finding score'] == 1 and one.low.isna().all()
    assert one.value.notna().sum() == len(one) and (one.query("metric != 'CIDEr' and not metric.str.startswith('BLEU')").value > .4).all()
    none = score_reports([CHEST, *OTHERS], ['', None, float('nan')], [1, 2, 3], n_boot=50).set_index('metric').value
    assert (none[[*WORD_METRICS, 'METEOR', 'label F1 micro-14']] < 1e-5).all()


def test_labels_nobody_has_are_not_computable():
    t = score_reports(['Scoliosis.'], ['Scoliosis.'], [1], ['label F1 micro-5'], n_boot=10)
    assert np.isnan(t.value[0]) and 'not computable' in t.note[0]
    assert report_values('label F1 micro-5', ['Scoliosis.'], ['Scoliosis.'])[0] == 1


def test_other_languages_are_refused_where_english_is_read():
    german = 'Das Herz ist nicht vergrößert. Kein Erguss, die Lunge ist frei.'
    with pytest.raises(DataError, match=r'number 1 \(de\)'): score_reports([CHEST, german], [CHEST, german], [1, 2])
    t = score_reports([CHEST, german], [CHEST, german], [1, 2], WORD_METRICS, n_boot=0)
    assert (t[t.metric.str.startswith('BLEU')].value > .99).all()
    assert report_language('Overall as before as before.') == 'en' and report_language('心影不大') == 'other'
    assert finding_score(CHEST, german) < .6  # a candidate in another language is a report without findings


def test_metrics_and_modalities():
    with pytest.raises(ValueError, match='BLEU-5'): metrics_of(['BLEU-5'])
    with pytest.raises(ValueError, match='reads chest reports'): score_reports([BREAST], [BREAST], [1], ['entity F1'], 'breast')
    with pytest.raises(ValueError, match='brain'): score_reports([BREAST], [BREAST], [1], modality='brain')
    cards = metric_cards()
    assert set(cards.references) == {'raw', 'cleaned'} and cards.range.notna().all() and (cards.better == 'high').all()
    assert set(score_reports([BREAST], [BREAST], [1], modality='breast', n_boot=0).modality) == {'any', 'breast'}


# table and baselines -----------------------------------------------------------------------------------------------------

def test_intervals_are_over_patients():
    refs, said = [CHEST, CHEST, *OTHERS]*3, [CHEST, CHEST, *reversed(OTHERS)]*3
    rows, one = (score_reports(refs, said, p, ['ROUGE-L'], n_boot=400).iloc[0] for p in (range(12), ['a']*12))
    assert rows.low < rows.value < rows.high and np.isnan(one.low) and 'one patient' in one.note
    again = score_reports(refs, said, range(12), ['ROUGE-L'], n_boot=400).iloc[0]
    assert (again.low, again.high) == (rows.low, rows.high)
    wide = score_reports(refs*4, said*4, np.tile(np.arange(12), 4), ['ROUGE-L'], n_boot=400).iloc[0]
    assert wide.low == pytest.approx(rows.low) and wide.value == pytest.approx(rows.value)  # copies of a patient add nothing
    mean = np.mean(rouge_l([clean_words(t) for t in refs], [clean_words(t) for t in said]))
    assert rows.value == pytest.approx(mean)


def test_baselines():
    training = ['A b.', 'A  b.', 'C.', '']
    base = report_baselines(training, 3, np.eye(3, 4), np.eye(4)[[2, 0, 1, 3]])
    assert base['commonest report'] == ['A b.']*3 and base["nearest neighbour's report"] == ['A  b.', 'C.', 'A b.']
    assert base['random training report'] == report_baselines(training, 3)['random training report']
    assert '' not in base['random training report']
    with pytest.raises(DataError, match='nothing to say'): report_baselines(['', ' '], 2)
    with pytest.raises(DataError, match='features of both'): report_baselines(training, 3, np.eye(3))
    with pytest.raises(DataError, match='for 3 and 4 reports'): report_baselines(training, 3, np.eye(2), np.eye(4))
    table = score_systems([CHEST, *OTHERS], {'mine': [CHEST, *OTHERS]}, [1, 2, 3], [CHEST], n_boot=0, metrics=['ROUGE-L'])
    assert list(table.system) == ['mine', 'commonest report', 'random training report'] and table.value[0] == 1
    with pytest.raises(DataError, match='name of a baseline'):
        score_systems([CHEST], {'commonest report': [CHEST]}, [1], [CHEST], n_boot=0)


# agreement ----------------------------------------------------------------------------------------------------------------

def test_tau_of_resamples_is_that_of_repeated_rows():
    from scipy.stats import kendalltau
    rng = np.random.default_rng(0)
    a, b, w = rng.integers(0, 5, 40), rng.integers(0, 5, 40), rng.integers(0, 3, (4, 40))
    for row, tau in zip(w, weighted_tau(a, b, w)): assert tau == pytest.approx(kendalltau(np.repeat(a, row), np.repeat(b, row))[0], abs=1e-6)
    assert np.isnan(tau_estimate([1, 1], [1, 2], [1, 2], n_boot=10).value)
    with pytest.raises(DataError, match='2 scores'): tau_estimate([1, 2], [1], [1, 2])


def test_rankings():
    assert ranked_as('C1 = C2', {'C1': .5, 'C2': .54}) and not ranked_as('C1 = C2', {'C1': .5, 'C2': .6})
    assert not ranked_as(['C1 > C2', 'C2 > C3'], {'C1': 3, 'C2': 2, 'C3': 2}) and ranked_as('C2 < C1', {'C1': 1, 'C2': 0})
    with pytest.raises(DataError, match='better'): ranked_as('C1 better C2', {'C1': 1, 'C2': 0})


def test_finding_score_agrees_with_radiologists():
    rated = read_radpref(sample('report_eval/radpref'))
    scores = [finding_score(r.reference, r.text, r.age, r.indication) for r in rated.itertuples()]
    words = [token_f1(r.reference, r.text) for r in rated.itertuples()]
    table = agreement_table(rated, {'finding score': scores, 'token-set F1': words}, n_boot=500).set_index('metric')
    assert table.value['finding score'] >= .55 and table.low['finding score'] > .43
    assert table.value['finding score'] > table.value['token-set F1'] + .1
    assert raters_tau(rated, n_boot=0).value.between(.75, .81).all() and len(rated) == 160


def test_finding_score_ranks_as_radjudge():
    file = sample('report_eval/radjudge_ranking_tests.json')
    ours, words = radjudge_table(file, finding_score), radjudge_table(file, token_f1)
    assert len(ours) == 30 and ours.right.sum() >= 20 and words.right.sum() <= 6


def test_no_real_report_is_taken_for_another_language():
    table = pd.read_csv(sample('reports/openi_reports.csv')).fillna('')
    assert {report_language(t) for t in table.findings[:500]} == {'en'}


# ReXrank ------------------------------------------------------------------------------------------------------------------

def test_rexrank_is_read_and_written_without_loss(tmp_path):
    file = sample('report_eval/ReXRank_IUXray_test.json')
    table = read_rexrank(file)
    write_rexrank(table, tmp_path/'again.json')
    assert json.loads((tmp_path/'again.json').read_text()) == json.loads(file.read_text())
    write_rexrank(table, tmp_path/'out.json', table.section_impression.tolist())
    out = json.loads((tmp_path/'out.json').read_text())
    assert all(v['model_prediction'] == v['section_impression'] for v in out.values())


def test_rexrank_keeps_null_apart_from_absent(tmp_path):
    data = {'a': {'report': 'x', 'context': None}, 'b': {'report': 'y', 'n': 3, 'deep': {'k': [1]}}}
    (tmp_path/'f.json').write_text(json.dumps(data))
    write_rexrank(read_rexrank(tmp_path/'f.json'), tmp_path/'g.json')
    assert json.loads((tmp_path/'g.json').read_text()) == data


@pytest.mark.parametrize('text, why', [('[1]', 'one object'), ('{"a": 1}', 'one object'), ('no', 'no JSON'),
                                       ('{"a": {"context": "x"}}', 'none of')])
def test_what_is_no_rexrank_list(tmp_path, text, why):
    (tmp_path/'f.json').write_text(text)
    with pytest.raises(DataError, match=why): read_rexrank(tmp_path/'f.json')


def test_scores_of_absent_packages_are_said():
    told = external_scores([CHEST], [CHEST], metrics={'theirs': ('no_such_package_here', None)})
    assert np.isnan(told.value[0]) and re.search('not installed', told.note[0])
    with pytest.raises(ValueError, match='GREEN'): external_scores([CHEST], [CHEST], ['GREEN'])


def test_breast_reports():
    assert breast_attribute_f1(BREAST, BREAST) == 1 > max(breast_attribute_f1(BREAST, t) for t in BREAST_ERRORS.values())


def test_a_decoder_that_repeats_itself_is_scored_in_time():
    import time
    start = time.process_time()
    for text in ('effusion '*1500, 'pulmonary '*1500, 'no '*3000, 'a'*10000): assert 0 <= finding_score(CHEST, text) < 1
    assert time.process_time() - start < 20
    assert [f.name for f in report_findings('Effusion, CT is recommended, cardiomegaly.')] == ['effusion', 'cardiomegaly']
