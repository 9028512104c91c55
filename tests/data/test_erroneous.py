"""Samples whose report may be wrong: labels that agree with the text, draws that depend on the key alone, pairs to be put right; bad input."""
import pytest

from medvl.data.batch import check_batch
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.samples.erroneous import ErroneousConfig, ErroneousDataset, correction_rows
from medvl.data.samples.writing import WritingConfig, WritingDataset
from medvl.data.text.tokens import build_wordpiece


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    prepared = prepared_chest_phantom(tmp_path_factory.mktemp('d')/'p', n=16, size=(64, 64))
    return prepared, build_wordpiece(prepared.manifest.report, 500)


def made(data, train=True, **options): return ErroneousDataset(*data, ErroneousConfig(sections=('impression',), max_length=96, **options), train)


def test_the_label_says_what_the_text_is(data):
    samples = made(data)
    kinds = set()
    for epoch in range(3):
        for i in range(len(samples)):
            s, r = samples[epoch, i], samples.record(epoch, i)
            assert (s['error_kind'] > 0) == r.changed and (not r.changed or samples.config.kinds[s['error_kind'] - 1] == r.kind)
            right = {w.lower() for t in samples.rows[i]['sentences'] for w in t.replace('.', '').replace(',', '').split()}
            if not r.changed: assert {w for t in s['sentences'] for w in t.replace('.', '').split()} <= right
            kinds.add(s['error_kind'])
    assert 0 in kinds and len(kinds) > 3
    check_batch(samples.collate([samples[0, i] for i in range(4)]))


def test_draws(data):
    a, b = made(data), made(data)
    same = lambda x, y, e, f: [x[e, i]['text'] for i in range(len(x))] == [y[f, i]['text'] for i in range(len(y))]
    assert same(a, b, 0, 0) and not same(a, a, 0, 1) and not same(a, made(data, seed=1), 0, 0)
    valid = made(data, train=False)
    assert same(valid, valid, 0, 5) and valid.digest == made(data, train=False).digest != a.digest
    assert all(made(data, probability=0.)[0, i]['error_kind'] == 0 for i in range(5))
    assert sum(made(data, probability=1.)[0, i]['error_kind'] > 0 for i in range(len(a))) == len(a)


def test_findings_are_those_of_the_data(data):
    samples, told = made(data), made(data, labels=())
    assert samples.generator.findings != told.generator.findings and samples.findings(samples.rows[0]) <= set(data[0].labels)


def test_pairs_to_be_put_right(data):
    samples = made(data)
    rows = correction_rows(samples, 2)
    assert len(rows) == 2*len(samples) and len({r['sample_id'] for r in rows}) == len(rows)
    changed = [r for r in rows if r['question'] != r['answer']]
    assert 0 < len(changed) < len(rows)
    written = WritingDataset(data[0], rows, data[1], WritingConfig(question_form='caption', answer_form='caption', question_length=96, answer_length=96))
    batch = check_batch(written.collate([written[0, i] for i in range(4)]))
    assert batch['question']['input_ids'].shape[0] == batch['answer']['input_ids'].shape[0] == 4


def test_bad_options(data):
    with pytest.raises(ValueError, match='location'): made(data, kinds=('locaton',))
    with pytest.raises(ValueError, match='no kinds'): made(data, kinds=())
    with pytest.raises(ValueError, match='finding'): made(data, touched='findings')
    with pytest.raises(ValueError, match='probability'): made(data, probability=1.5)[0, 0]
