"""Second wordings: what a diagnosis rests on stays; back-translation is keyed, kept and resumable."""
import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.core.errors import DataError
from medvl.data.text import backtranslate
from medvl.data.text.wording import augment_reports, report_key, with_wording
from medvl.data.text.backtranslate import BackTranslateConfig, BackTranslator, Translator, toy_translator
from medvl.data.samples.breast import BreastTextConfig, BreastTextDataset
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.prepared import open_prepared
from medvl.data.text.reports import birads_of, density_of, split_sections
from medvl.data.text.rewrite import SYNONYMS, RewriteConfig, Rewriter, facts, rewrite, same_facts, sentence_pieces, turn_sentence
from medvl.data.text.sides import names_side
from medvl.data.text.tokens import build_wordpiece

LEAD = ['There is', 'There are', 'No', 'A', 'We see', 'Multiple', 'Bilateral', 'On the left there is no', 'There is no',
        'In the right breast there is']
THING = ['irregular mass', 'suspicious calcifications', 'large lymph node', 'skin thickening', 'evidence of malignancy',
         'clustered microcalcifications', 'focal asymmetry with round margins']
WHERE = ['', 'in the left breast', 'in the upper outer quadrant of the right breast', 'at 2 o\'clock', 'on the left', 'behind the nipple',
         'and no mass on the right', 'L CC', 'in both breasts']
TAIL = ['', 'is seen', 'are noted', 'measuring 3.5 cm', ', approximately 12 mm', 'is unchanged compared to the prior examination',
        ', BI-RADS 4', 'is not present', 'without distortion']
SENTENCE = st.tuples(*(st.sampled_from(x) for x in (LEAD, THING, WHERE, TAIL)),
                     st.sampled_from('.;!')).map(lambda t: re.sub(r' +([,.;!])', r'\1', ' '.join(t)))
HEADS = ['', 'FINDINGS: ', 'IMPRESSION: ', '\nIMPRESSION:\n']
REPORT = st.lists(st.tuples(st.sampled_from(HEADS), SENTENCE, st.sampled_from([' ', '\n', '  '])).map(''.join), min_size=1,
                  max_size=5).map(''.join)


def independent(text):
    "The same promises, checked by other code than the rewriter's."
    words = re.findall(r"[a-z']+|\d+(?:\.\d+)?", text.lower())
    return ([w for w in words if w in ('left', 'right', 'both', 'bilateral')],
            [w for w in words if w in ('no', 'not', 'without', 'cannot', 'never')],
            re.findall(r'\d+(?:[.,]\d+)?', text), birads_of(text), density_of(text), names_side(text), names_side(text, vertical=True),
            list(split_sections(text)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(REPORT, st.integers(0, 1000))
def test_side_negation_numbers_and_birads_never_change(report, seed):
    out = rewrite(report, RewriteConfig(strength=1.0, turn=1.0, seed=seed))
    assert independent(out) == independent(report)
    assert out == rewrite(report, RewriteConfig(strength=1.0, turn=1.0, seed=seed))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=200), st.integers(0, 9))
def test_any_text_survives(text, seed):
    out = rewrite(text, RewriteConfig(seed=seed))
    assert same_facts(text, out) and ''.join(p for p, _ in sentence_pieces(text)) == text
    assert re.findall(r'\d', text) == re.findall(r'\d', out)


def test_it_does_reword():
    texts = ['There is an irregular mass in the left breast.',
             'Clustered calcifications are seen adjacent to the scar, approximately 4 mm.', 'Biopsy is recommended.']
    for t in texts: assert len({rewrite(t, RewriteConfig(seed=s)) for s in range(12)}) > 1, t
    assert {turn_sentence('No mass is seen on the right.',
                          types.SimpleNamespace(integers=lambda n, i=i: min(i, n - 1))) for i in range(3)} == {
        'There is no mass on the right.', 'No mass is seen on the right.', 'On the right there is no mass.'}


@pytest.mark.parametrize('text', ['No mass and no calcification is seen in the left breast.',
                                  'There is a mass, which is benign, in the left breast.', 'There is no mass but a calcification.'])
def test_sentences_of_several_clauses_are_not_turned(text):
    for i in range(6): assert turn_sentence(text, types.SimpleNamespace(integers=lambda n, i=i: min(i, n - 1))) == text


def test_synonyms_hold_no_fact_and_no_phrase_twice():
    seen = [p for g in SYNONYMS for p in g]
    assert len(set(seen)) == len(seen)
    for group in SYNONYMS:
        for phrase in group: assert not any(facts(phrase).values()), phrase


def test_a_long_text_takes_no_time():
    for text in ('there is no ' + 'in the left breast '*3000, 'no '*20000, 'in the , there is a '*3000,
                 'n'*60000): assert same_facts(text, rewrite(text))


TEXTS = ['There is an irregular mass in the left breast.', 'Biopsy is recommended.', 'Skin is normal.', 'The nipple is normal.',
         'Images are archived.', 'Double read.', 'Result sent.']


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return str(toy_translator(root/'en-it', TEXTS, 1)), str(toy_translator(root/'it-en', TEXTS, 2))


def config(models, **changes): return BackTranslateConfig(*models, **{**dict(num_beams=2, max_tokens=12, batch_size=2), **changes})


class Counted(Translator):
    calls, limit = 0, 99
    def __call__(self, *args):
        Counted.calls += 1
        if Counted.calls > Counted.limit: raise KeyboardInterrupt
        return super().__call__(*args)


def test_back_translation_goes_on_where_it_was_stopped(models, tmp_path, monkeypatch):
    monkeypatch.setattr(backtranslate, 'Translator', Counted)
    reports = ['FINDINGS: ' + ' '.join(TEXTS[:4]), 'IMPRESSION: ' + ' '.join(TEXTS[4:])]
    Counted.calls, Counted.limit = 0, 99
    whole = BackTranslator(tmp_path/'a', config(models, keep_facts=False), 'cpu')(reports)
    every = Counted.calls
    assert every == 8 and [list(split_sections(r)) for r in whole] == [['findings'], ['impression']] and whole != reports
    Counted.calls, Counted.limit = 0, 5
    with pytest.raises(KeyboardInterrupt): BackTranslator(tmp_path/'b', config(models, keep_facts=False), 'cpu')(reports)
    stopped = BackTranslator(tmp_path/'b', config(models, keep_facts=False), 'cpu')
    with open(stopped.path, 'a') as f: f.write('{"sentences": [["Skin is nor') # killed while writing
    Counted.calls, Counted.limit = 0, 99
    assert BackTranslator(tmp_path/'b', config(models, keep_facts=False), 'cpu')(reports) == whole and Counted.calls == every - 4
    Counted.calls = 0
    assert BackTranslator(tmp_path/'b', config(models, keep_facts=False), 'cpu')(reports) == whole and Counted.calls == 0


def test_facts_are_kept_and_options_have_their_own_cache(models, tmp_path):
    kept = BackTranslator(tmp_path, config(models), 'cpu')
    out = kept([TEXTS[0] + ' ' + TEXTS[1]])[0]
    assert 'left' in out and same_facts(TEXTS[0], TEXTS[0]) and facts(out)['side'] == ('left',)
    free = BackTranslator(tmp_path, config(models, keep_facts=False))
    assert free.path == kept.path and free.digest != kept.digest and free([TEXTS[0] + ' ' + TEXTS[1]])[0] != out and free.models is None
    assert BackTranslator(tmp_path, config(models, temperature=1.0)).path != kept.path
    assert BackTranslator(tmp_path, config((models[1], models[0]))).path != kept.path


def test_sampling_is_keyed_and_leaves_torch_alone(models, tmp_path):
    state = torch.get_rng_state()
    greedy = config(models, keep_facts=False, do_sample=False, num_beams=1)
    a, b = (BackTranslator(tmp_path/x, config(models, keep_facts=False), 'cpu')(TEXTS) for x in 'ab')
    assert a == b and torch.equal(state, torch.get_rng_state())
    assert BackTranslator(tmp_path/'c', config(models, keep_facts=False, seed=1), 'cpu')(TEXTS) != a
    assert BackTranslator(tmp_path/'d', greedy, 'cpu')(TEXTS) == BackTranslator(tmp_path/'e', greedy, 'cpu')(TEXTS)


def test_long_sentences_empty_reports_and_bad_models(models, tmp_path):
    writer = BackTranslator(tmp_path, config(models, max_tokens=8, keep_facts=False), 'cpu')
    long = ' '.join(['the mass is']*20) + '.'
    assert writer(['', None, long, '1 2 3', 'FINDINGS:']) == ['', '', long, '1 2 3', 'FINDINGS:']
    with pytest.raises(DataError, match='no folder'): BackTranslator(tmp_path, config((str(tmp_path/'none'), models[1])))(['A mass.'])
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='cannot be loaded'): BackTranslator(tmp_path, config((str(tmp_path/'empty'), models[1])))(['A mass.'])
    with pytest.raises(ValueError, match='batch_size'): BackTranslator(tmp_path, config(models, batch_size=0))


@pytest.fixture(scope='module')
def phantom(tmp_path_factory): return prepared_phantom(tmp_path_factory.mktemp('phantom'), 4, (48, 32), seed=1)


def test_wordings_lie_beside_the_data(phantom, models, tmp_path):
    before = open_prepared(phantom.folder).digest
    augment_reports(phantom, Rewriter(), 'rules')
    augment_reports(phantom, BackTranslator(tmp_path, config(models, num_beams=1, batch_size=64), 'cpu'), 'italian', tmp_path)
    assert open_prepared(phantom.folder).digest == before
    both = with_wording(phantom, 'rules')
    assert both.manifest.report_augmented.tolist() == Rewriter()(phantom.manifest.report.tolist()) and both.digest != phantom.digest
    assert (with_wording(phantom, 'italian', tmp_path).manifest.report_augmented != '').all()
    tokenizer = build_wordpiece([*both.manifest.report, *both.manifest.report_augmented], 800)
    data = BreastTextDataset(both, tokenizer, BreastTextConfig(augmented=1.0, slot='report', flip_horizontal=0, flip_vertical=0))
    assert all(len(set(data[i]['text'])) == 2 for i in range(len(data))) # the report and its wording, in random order


def test_wordings_are_made_once_and_belong_to_their_reports(phantom, tmp_path):
    calls = []
    def writer(reports): calls.extend(reports); return [r.upper() for r in reports]
    writer.digest = 'one'
    part = phantom.subset(phantom.manifest.patient_id == phantom.manifest.patient_id[0])
    augment_reports(part, writer, 'x', tmp_path); first = len(calls)
    augment_reports(phantom, writer, 'x', tmp_path)
    assert first == part.manifest.report.nunique() and len(calls) == phantom.manifest.report.nunique()
    writer.digest = 'two'; augment_reports(phantom, writer, 'x', tmp_path)
    assert len(calls) == 2*phantom.manifest.report.nunique()
    other = part.subset([0]); other.manifest['report'] = 'Another report.'
    with pytest.raises(DataError, match='reports are others'): with_wording(other, 'x', tmp_path)
    other.manifest['report'] = ''
    with pytest.raises(DataError, match='no report'): augment_reports(other, writer, 'y', tmp_path)
    with pytest.raises(DataError, match='must be text'): augment_reports(phantom, lambda rs: [None]*len(rs), 'y', tmp_path)
    with pytest.raises(DataError, match='one text a report'): augment_reports(phantom, lambda rs: rs[1:], 'y', tmp_path)
    assert report_key('a') != report_key('b') and not (tmp_path/'y.parquet').exists()
