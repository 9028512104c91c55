"""Mistakes made in reports: the original's numbers, words found as words, records that know their place, and bad input."""
import csv
import json

import numpy as np
import pytest
from golden import golden, sample

from medvl.core.errors import DataError
from medvl.data.text.errors import (
    BALANCES, ERROR_KINDS, PAPER_ERRORS, SEVEN_ERRORS, ErrorGenerator, WordBalance, draw_error, error_table, error_words, sentence_spans, word_edits, wrong_sentence)
from medvl.data.text.original_errors import EXTENT_WORDS, LOCATION_WORDS, OriginalErrors, swap_blank_words

# ------------------------------------------------------------------------------------------------ the original's numbers

@pytest.fixture(scope='module')
def openi(): return json.loads(golden('xvl/error_generator_openi.json').read_text())


@pytest.fixture(scope='module')
def rows(openi):
    "(texts, labels) of all 287 rows: texts as the goldens leave them; labels from the shared table, and, of rows held out, whether they are normal."
    runs = openi['openi_seed777']
    abnormal = [not r['changed'] for r in runs['FP_p1.0']['rows']]
    texts = [f['error'] if ill else o['error'] for ill, f, o in zip(abnormal, runs['FP_p1.0']['rows'], runs['O_p1.0']['rows'])]
    with open(sample('openi_images/studies.csv')) as f:
        known = {int(r['uid']): r['test_selected_label'] for r in csv.DictReader(f) if r['in_test_selected'] == '1'}
    labels = [known.get(r['id'], f'held out {r["id"]}' if ill else "'No Finding'") for ill, r in zip(abnormal, runs['FP_p1.0']['rows'])]
    return texts, labels


def test_words_between_blanks_are_the_originals(openi):
    assert len(openi['deterministic']) > 100
    for r in openi['deterministic']:
        for variant in ('mimic', 'openi'):
            assert swap_blank_words(r['input'], LOCATION_WORDS[variant]) == r[f'{variant}_location']
            assert swap_blank_words(r['input'], EXTENT_WORDS) == r[f'{variant}_extent']


@pytest.mark.parametrize('run', ['O_p1.0', 'O_p0.5', 'FP_p1.0', 'FP_p0.5', 'FN_p1.0', 'FN_p0.5', 'L_p1.0', 'E_p0.5'])
def test_openi_rows_are_the_originals(openi, rows, run):
    code, p = run.split('_p')
    texts, want = rows[0], openi['openi_seed777'][run]
    make = OriginalErrors(*rows, probability=float(p))
    got = [make(i, code) for i in range(len(texts))]
    assert [int(g != t) for g, t in zip(got, texts)] == [r['changed'] for r in want['rows']]
    if 'error' in want['rows'][0]: assert got == [r['error'] for r in want['rows']]


@pytest.mark.parametrize('code', ['C', 'M'])
def test_openi_rows_that_depend_on_labels(openi, rows, code):
    "Labels of held-out rows are not here: where the original drew on, they are those of the row that it refused; at most a few have to be found out so."
    texts, labels = rows[0], list(rows[1])
    want, found = [r['error'] for r in openi['openi_seed777'][f'{code}_p1.0']['rows']], 0
    for _ in range(20):
        make, drawn = OriginalErrors(texts, labels, probability=1.), []
        plain = make.other
        make.other = lambda fits, plain=plain, drawn=drawn: drawn.append(plain(fits)) or drawn[-1]
        wrong = next((i for i in range(len(texts)) if make(i, code) != want[i]), None)
        if wrong is None: break
        held = [i for i in (wrong, drawn[-1]) if labels[i].startswith('held out')]
        assert held, f'row {wrong}: the original differs, and its labels are known'
        other = drawn[-1] if held[0] == wrong else wrong
        labels = [labels[other] if l == labels[held[0]] else l for l in labels]
        found += 1
    assert wrong is None and found <= 8


def test_fn_without_the_slip_leaves_normal_reports(rows):
    make = OriginalErrors(*rows, probability=1., builtin_id=False)
    assert sum(make(i, 'FN') != t for i, t in enumerate(rows[0])) == 161


def test_mimic_is_the_originals():
    d = json.loads(golden('xvl/error_generator_mimic_synthetic.json').read_text())
    texts, labels = list(d['pair']), list(d['pair'].values())
    names = dict(omission='O', confusion='C')
    for code, want in d['results'].items():
        if code not in ('FP', 'FN', 'L', 'E', 'omission', 'confusion'): continue
        make = OriginalErrors(texts, labels, 'mimic', 1., d['seed'])
        one = make.wrong if code in names else make
        assert [one(texts.index(r['input']), names.get(code, code)) for r in want] == [r['output'] for r in want], code
    make = OriginalErrors(texts, labels, 'mimic', 1., d['seed'])
    for r in d['results']['mismatch_draws']:
        assert [make.wrong(texts.index(r['input']), 'M') for _ in r['outputs']] == r['outputs']


# ------------------------------------------------------------------------------------------------ ours

CORPUS = ['The heart is normal. The lungs are clear.', 'Large right pneumothorax. The heart is normal.', 'Small left pleural effusion. Mild cardiomegaly.',
          'Normal chest.', 'Atelectasis at the left base, with a 12 mm nodule.', 'Severe edema. No pneumothorax.']


def test_words_are_found_as_words():
    words = error_words()['location']
    swapped = lambda t: [t[a:b] for a, b, _ in word_edits(t, words, np.random.default_rng(0))]
    assert swapped('Left-sided effusion, LEFT; left.') == ['Left', 'LEFT', 'left']
    assert not swapped('leftover; right away; upper limits of normal; central venous line; lateral view')
    edits = word_edits('LEFT Left left', words, np.random.default_rng(0))
    assert [e[2] for e in edits] == ['RIGHT', 'Right', 'right']


@pytest.mark.parametrize('kind', ERROR_KINDS)
def test_records_know_their_place(kind):
    rules = 'breast' if kind in ('birads', 'density') else 'chest'
    corpus = ['Scattered fibroglandular densities. BI-RADS 2.', 'Heterogeneously dense (ACR c). Left mass. BI-RADS: 4A.'] if rules == 'breast' else CORPUS
    make, changed = ErrorGenerator(corpus, rules=rules), 0
    for i, text in enumerate(corpus):
        r = make(text, kind, 3, i)
        assert r.kind == kind and r.original == text and bool(r.note) != r.changed
        if not r.changed: assert r.text == text and r.span == (); continue
        a, b = r.span
        assert r.text != text and text == r.text[:a] + r.was + r.text[b:] # the record undoes itself
        changed += 1
    assert changed


def test_draws_are_keyed():
    make, other = ErrorGenerator(CORPUS), ErrorGenerator(CORPUS, seed=1)
    pick = lambda g, epoch: [draw_error(g, t, epoch, i, kinds=SEVEN_ERRORS, probability=.9, insist=True).text for i, t in enumerate(CORPUS)]
    assert pick(make, 0) == pick(make, 0) == pick(ErrorGenerator(CORPUS), 0)
    assert pick(make, 0) != pick(make, 1) and pick(make, 0) != pick(other, 0)


def test_share_of_mistakes():
    make = ErrorGenerator(CORPUS)
    drawn = [draw_error(make, CORPUS[2], e, 0, probability=.25) for e in range(400)]
    meant = [r for r in drawn if r.kind]
    assert 70 < len(meant) < 130 and {r.kind for r in meant} == set(PAPER_ERRORS)
    assert not any(r.changed for r in drawn if r.kind == 'false_positive') # the report is abnormal
    assert all(draw_error(make, CORPUS[2], e, 0, probability=1., insist=True).changed for e in range(40))


def test_one_word_or_all():
    text = 'Left upper opacity. Left effusion.'
    one, every = ErrorGenerator(CORPUS)(text, 'location'), ErrorGenerator(CORPUS, reach='all')(text, 'location')
    assert every.text == 'Right lower opacity. Right effusion.' and sum(a != b for a, b in zip(one.text.split(), text.split())) == 1
    assert wrong_sentence(every) == -1 and wrong_sentence(one) in (0, 1)


def test_mismatch_and_confusion_have_nothing_in_common():
    make = ErrorGenerator(CORPUS, sentences='finding')
    for e in range(20):
        for i, text in enumerate(CORPUS):
            m = make(text, 'mismatch', e, i)
            assert m.changed and not make.findings_of(m.text) & make.findings_of(text)
            c = make(text, 'confusion', e, i)
            if c.changed: assert not make.findings_of(c.text[slice(*c.span)]) & make.findings_of(text)


def test_findings_can_be_given():
    make = ErrorGenerator(['a b c.', 'd e f.', 'g h i.'], [(), {'Edema'}, {'Edema', 'Nodule'}])
    assert make('a b c.', 'false_positive').changed and make('d e f.', 'false_negative').text == 'a b c.' and make('d e f.', 'mismatch').text == 'a b c.'


def test_sentences_of_typed_text():
    text = ' FINDINGS:  Heart is 1.5 cm larger.\n\nNo effusion; no mass!  Dr. Who saw it'
    assert [' '.join(text[a:b].split()) for a, b in sentence_spans(text)] == ['FINDINGS: Heart is 1.5 cm larger.', 'No effusion; no mass!', 'Dr. Who saw it']


# ------------------------------------------------------------------------------------------------ bad input

def test_unknown_kind():
    make = ErrorGenerator(CORPUS)
    with pytest.raises(ValueError, match='location'): make(CORPUS[0], 'locatoin')
    with pytest.raises(ValueError, match='omission'): draw_error(make, CORPUS[0], kinds=('omision',), probability=1.)
    with pytest.raises(ValueError, match='no kinds'): draw_error(make, CORPUS[0], kinds=())
    with pytest.raises(ValueError, match='probability'): draw_error(make, CORPUS[0], probability=2.)
    with pytest.raises(ValueError, match='reach'): ErrorGenerator(CORPUS, reach='each')
    with pytest.raises(ValueError, match='sets of findings'): ErrorGenerator(CORPUS, [()])


@pytest.mark.parametrize('corpus', [[], ['Fine.', ''], ['Fine.', None]])
def test_empty_reports(corpus):
    with pytest.raises(DataError, match='without reports|empty'): ErrorGenerator(corpus)


def test_empty_text():
    with pytest.raises(DataError, match='empty'): ErrorGenerator(CORPUS)('  ', 'location')


@pytest.mark.parametrize('text', ['Pneumothorax', 'Normal', 'x', '.', '12'])
def test_a_report_of_one_word(text):
    for kind in ERROR_KINDS:
        r = ErrorGenerator(CORPUS)(text, kind)
        assert r.changed == (r.text != text) and bool(r.note) != r.changed
    assert not ErrorGenerator(CORPUS)(text, 'omission').changed


def test_a_corpus_of_one_report():
    for text in CORPUS:
        table = error_table(ErrorGenerator([text]), [text], ERROR_KINDS).set_index('kind')
        for kind in ('false_positive', 'false_negative', 'mismatch', 'confusion', 'insertion'): assert not table.changed[kind] and table.note[kind]


def test_no_reports_no_rows(): assert list(error_table(ErrorGenerator(CORPUS), []).columns)[:3] == ['row', 'kind', 'text']


# ------------------------------------------------------------------------------------------------ words that do not betray themselves

def told_by_words(corpus, balance, kind='severity'):
    "AUROC of a detector that has read half of the reports and is asked about the other half, exchanged ones against the same reports as they were."
    from sklearn.metrics import roc_auc_score

    from medvl.evaluate.protocols.error_detection import text_detector
    made = error_table(ErrorGenerator(corpus, [set()] * len(corpus), balance=balance), corpus, [kind])
    made = made[made.changed]
    taught, asked = made[made.row % 2 == 0], made[made.row % 2 == 1]
    ask = text_detector([*taught.original, *taught.text], [False] * len(taught) + [True] * len(taught))
    both = [*asked.original, *asked.text]
    return roc_auc_score([0] * len(asked) + [1] * len(asked), -ask(None, None, both)), len(made)


def test_balanced_words_do_not_betray_themselves():
    "Small is said four times as often as large, nodules are never large: read alone, the table's exchanges are found, balanced ones are not."
    rng = np.random.default_rng(0)
    corpus = [('Small' if small else 'Large') + f' {side} effusion.' for small, side in zip(rng.random(600) < .8, rng.choice(['left', 'right'], 600))]
    corpus += [f'Small {side} nodule.' for side in rng.choice(['left', 'right'], 200)]
    (table, n), (word, m), (place, k) = (told_by_words(corpus, b) for b in BALANCES)
    assert table > .75 and n == 800, table
    assert word < table and m < n
    assert abs(place - .5) < .08 and 150 < k < 400, (place, k)


def test_a_balance_makes_as_many_exchanges_one_way_as_the_other():
    from collections import Counter
    corpus = ['Mild oedema.'] * 300 + ['Severe oedema.'] * 100 + ['Moderate oedema.'] * 50
    ways, balance = Counter(), WordBalance(corpus, error_words()['severity'])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for t in corpus: ways.update((t.split()[0], new) for _, _, new in balance.edits(t, rng))
    for a, b in (('Mild', 'Severe'), ('Mild', 'Moderate'), ('Moderate', 'Severe')):
        assert ways[a, b] > 300 and abs(ways[a, b] - ways[b, a]) < .12 * (ways[a, b] + ways[b, a]), (a, b, ways)


def test_a_balance_that_nobody_knows_and_a_report_that_the_corpus_does_not_hold():
    with pytest.raises(ValueError, match='balance.*neighbours'): ErrorGenerator(['Small effusion.'], balance='neighbour')
    make = ErrorGenerator(['Small effusion.', 'Large effusion.'], balance='neighbours')
    assert make('Small pneumothorax.', 'severity').note == 'no such word, or the exchange would be told from its words alone'
    assert {make('Small effusion.', 'severity', i).text for i in range(9)} == {'Large effusion.'}
    assert make('Small effusion.', 'omission').note # other kinds are as they were
