"""Codes of patients: the original's samples to the bit, its pickle, OMOP and MIMIC tables, odd patients; masks by share, block and sample."""
import json
import pickle

import numpy as np
import pytest
from golden import golden, sample

from medvl.core.errors import DataError
from medvl.data.releases.ehr_codes import (CodedPatient, CodeSequences, CodeVocabulary, SPECIAL_CODES, read_mimic_codes, read_omop_codes, reference_ehr_sample)
from medvl.data.samples.text_pairs import MaskConfig, TextPairs, mask_block, report_pair
from medvl.data.text.tokens import build_wordpiece
from medvl.models.ehr_pickle import read_ehr_pickle


def patient_of(row):
    "A patient of the golden file, whose lists may be odd: built past the check where the original took it."
    return CodedPatient(str(row[0][0]), tuple(row[1]), tuple(row[3]), tuple(row[4]))


@pytest.mark.parametrize('case', ['tiny_p15', 'tiny_p50', 'real_size'])
def test_samples_are_the_originals(case):
    z, told = np.load(golden('cardiomegaly/ehr_dataset.npz')), json.loads(golden('cardiomegaly/ehr_dataset.json').read_text())[case]
    compared = 0
    for seed in told['seeds']:
        for i, row in enumerate(told['patients']):
            ours = reference_ehr_sample(patient_of(row), i + seed, told['L'], told['vocab'], told['p'], told['mask_id'])
            for name, key in (('input_ids',) * 2, ('labels',) * 2, ('attention_mask',) * 2, ('token_type_ids',) * 2, ('selected',) * 2, ('long_stay', 'long_stay_label')):
                np.testing.assert_array_equal(ours[name].numpy(), z[f'{case}/seed{seed}/{key}'][i], err_msg=f'{seed} {i} {name}')
                compared += 1
    assert compared == 6 * len(told['seeds']) * len(told['patients'])


def test_the_originals_facts():
    facts = json.loads(golden('cardiomegaly/ehr_dataset.json').read_text())['facts']
    assert facts['ignore_label'] == -100 and facts['mask_id'] == 103 and facts['selection_statistics_seed0']['last_token_selected'] == 0
    row = CodedPatient('x', (1,), tuple(range(200, 230)), (1,) * 30)
    assert facts['mask_of_sample_i_seed_s_plus_1_equals_mask_of_sample_i_plus_1_seed_s'] # seeds are added: so it is here
    a, b = (reference_ehr_sample(row, s, 32, 300) for s in (4 + 1, 5 + 0))
    assert a['selected'].equal(b['selected'])
    for odd, codes, stays in (('no_codes', (), (1,)), ('no_visits', (5,), ())):
        assert facts['errors'][odd] == 'ValueError'
        with pytest.raises(ValueError): CodedPatient('x', stays, codes, (1,) * len(codes))
    with pytest.raises(ValueError, match='no code but 0'): reference_ehr_sample(CodedPatient('x', (1,), (0, 0), (1, 1)), 0, 8)


# ---- ours

def people(n=60, length=40, seed=0):
    rng = np.random.default_rng(seed)
    return [CodedPatient(f'p{i}', (int(rng.integers(0, 12)), 1), tuple(f'c{c}' for c in rng.integers(0, 300, length)), tuple(sorted(rng.integers(1, 6, length).tolist()))) for i in range(n)]


def test_masking_shares_over_a_hundred_thousand_tokens():
    patients = people(80, 120)
    data = CodeSequences(patients, CodeVocabulary(patients))
    special, count = set(range(len(SPECIAL_CODES))), dict(tokens=0, chosen=0, hidden=0, kept=0, swapped=0)
    for epoch in range(14):
        for i in range(len(data)):
            s, ids = data[epoch, i], data.sequences[i][0]
            asked, read = s['word_labels'][0] != -100, s['masked'][0]
            assert not special & set(ids[asked].tolist()) and (read[~asked] == ids[~asked]).all() and (s['word_labels'][0][asked] == ids[asked]).all()
            assert not (special - {4}) & set(read[asked].tolist()), 'a special token is swapped in'
            count['tokens'] += int((ids > 4).sum()); count['chosen'] += int(asked.sum())
            count['hidden'] += int((read[asked] == 4).sum()); count['kept'] += int((read[asked] == ids[asked]).sum())
    swapped = count['chosen'] - count['hidden'] - count['kept']
    assert count['tokens'] > 1e5
    assert abs(count['chosen'] / count['tokens'] - .15) < .003
    for n, share in ((count['hidden'], .8), (swapped, .1), (count['kept'], .1)): assert abs(n / count['chosen'] - share) < .01


def test_masks_follow_seed_block_and_sample_alone():
    patients = people(6)
    words = CodeVocabulary(patients)
    def read(patients=patients, train=True, **how): return CodeSequences(patients, words, MaskConfig(**how), train)
    same = lambda a, b: np.array_equal(a['masked'][0], b['masked'][0])
    d = read(remask_every=3)
    assert same(d[0, 2], d[2, 2]) and not same(d[2, 2], d[3, 2]) and same(d[3, 2], d[5, 2])
    assert same(read(mode='static')[0, 2], read(mode='static')[99, 2])
    assert same(read(train=False)[7, 2], read()[0, 2])
    assert not same(read(seed=1)[0, 2], read()[0, 2])
    assert same(read(patients[::-1])[0, 3], read()[0, 2]), 'the order of the corpus has no say'
    assert [mask_block(MaskConfig(remask_every=20), e) for e in (19, 20, 199)] == [0, 1, 9]
    # the original's slip: block b+1 of sample i is block b of sample i+1
    alike = [CodedPatient(str(i), (1,), patients[0].codes, patients[0].visits) for i in range(4)]
    assert not same(read(alike)[1, 0], read(alike)[0, 1])


def test_one_code_has_one_target_and_unknown_codes_are_named():
    known = CodeVocabulary(people(4))
    lone = CodedPatient('lone', (3,), ('c7',), (1,))
    s = CodeSequences([lone], CodeVocabulary([lone]))[0, 0]
    assert (s['word_labels'] != -100).sum() == 1
    strange = CodedPatient('zoe', (3,), (known.words[0], 'Z99'), (1, 1))
    with pytest.raises(DataError, match="'Z99' of patient zoe"): CodeSequences([strange], known, strict=True)
    assert CodeSequences([strange], known).sequences[0][0].tolist() == [2, 5, 1, 3]
    with pytest.raises(DataError, match='no patient'): CodeSequences([], known)


@pytest.mark.parametrize('stays, codes, visits, says', [((1,), ('a', 'b'), (2, 1), 'fall'), ((1,), ('a', 'b'), (1,), '1 visit numbers for 2 codes'), ((1,), (), (), 'no codes'),
                                                      ((), ('a',), (1,), 'no visits'), ((1,), ('a',), (0,), 'below 1')])
def test_odd_patients_are_refused_by_name(stays, codes, visits, says):
    with pytest.raises(DataError, match=f'patient odd has.*{says}'): CodedPatient('odd', stays, codes, visits)


def test_visits_are_segments_and_long_sequences_keep_their_beginning():
    p = CodedPatient('p', (8,), ('a', 'b', 'c', 'd'), (1, 1, 3, 9))
    words = CodeVocabulary([p])
    ids, segments = CodeSequences([p], words, visits=5).sequences[0]
    a, b, c, d = words.encode('abcd')
    assert ids.tolist() == [2, a, b, 3, c, 3, d, 3] and segments.tolist() == [1, 1, 1, 1, 3, 3, 4, 4] and p.long_stay == 1
    assert CodeSequences(people(2, 100), CodeVocabulary(people(2, 100)), MaskConfig(max_length=16))[0, 0]['masked'][0].shape == (16,)


# ---- files

def test_the_originals_pickle_is_read_and_nothing_is_run(tmp_path):
    rows = [[[1], [9, 5], [67, 196], [63, 31, 28], [1, 1, 2]], [[2], [3], [0], [4], [1]]]
    file = tmp_path/'patients.pkl'
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps(rows, protocol))
        read = read_ehr_pickle(file)
        assert [(p.patient_id, p.codes, p.visits, p.long_stay) for p in read] == [('1', (63, 31, 28), (1, 1, 2), 1), ('2', (4,), (1,), 0)]
    class Harm:
        def __reduce__(self): return open, (str(tmp_path/'harm'), 'w')
    for wrong, says in (([Harm()], 'no list of patients'), ({}, 'dict'), ([[[1], [1], [1], [1]]], 'row 0'), ([[[1], [1], [1], ['x'], [1]]], 'row 0'), ([*rows, [[3], [1], [0], [5, 6], [2, 1]]], 'row 2')):
        file.write_bytes(pickle.dumps(wrong))
        with pytest.raises(DataError, match=says): read_ehr_pickle(file)
    assert not (tmp_path/'harm').exists()
    file.write_bytes(pickle.dumps(rows)[:-9])
    with pytest.raises(DataError, match='no list of patients'): read_ehr_pickle(file)


@pytest.mark.parametrize('folder, read, least', [('ehr/omop_demo', read_omop_codes, 5), ('ehr/mimic3_demo', read_mimic_codes, 70)])
def test_the_demo_tables_become_patients(folder, read, least):
    patients = read(sample(folder))
    assert len(patients) >= least and len({p.patient_id for p in patients}) == len(patients)
    data = CodeSequences(patients, CodeVocabulary(patients))
    batch = data.collate([data[0, i] for i in range(min(4, len(data)))])
    assert batch['masked']['input_ids'].shape == batch['segments'].shape == batch['word_labels'].shape
    assert {p.long_stay for p in patients} == {0, 1} or 'omop' in folder


def test_every_code_with_a_visit_is_kept():
    import pandas as pd
    folder = sample('ehr/mimic3_demo')
    visits = set(pd.read_csv(folder/'ADMISSIONS.csv', dtype=str).hadm_id)
    wanted = sum(int((t.hadm_id.isin(visits) & t[c].notna()).sum()) for n, c in (('DIAGNOSES_ICD', 'icd9_code'), ('PROCEDURES_ICD', 'icd9_code'), ('PRESCRIPTIONS', 'drug'))
                 for t in [pd.read_csv(folder/f'{n}.csv', dtype=str)])
    assert sum(len(p.codes) for p in read_mimic_codes(folder)) == wanted


def test_absent_tables_and_columns_are_named(tmp_path):
    with pytest.raises(DataError, match='ADMISSIONS'): read_mimic_codes(tmp_path)
    (tmp_path/'ADMISSIONS.csv').write_text('subject_id,hadm_id,admittime,dischtime\n1,2,2100-01-01,2100-01-02\n')
    with pytest.raises(DataError, match='no table of codes'): read_mimic_codes(tmp_path)
    (tmp_path/'DIAGNOSES_ICD.csv').write_text('hadm_id,seq_num\n2,1\n')
    with pytest.raises(DataError, match='icd9_code'): read_mimic_codes(tmp_path)


# ---- pairs of texts

TEXTS = ['FINDINGS: The heart is enlarged. IMPRESSION: Cardiomegaly.', 'FINDINGS: Clear lungs. IMPRESSION: Normal chest.', 'FINDINGS: There is an effusion. IMPRESSION: Pleural effusion.']


def test_reports_are_cut_at_the_impression_or_in_half():
    assert [part.strip(' .') for part in report_pair(TEXTS[0])] == ['The heart is enlarged', 'Cardiomegaly']
    assert report_pair('One. Two. Three.')[1].startswith('Three') and report_pair('One sentence.') == ('', '')


def test_pairs_say_whether_the_second_part_is_a_strangers():
    t = build_wordpiece(TEXTS, 200)
    data = TextPairs([(i, i, x) for i, x in enumerate(TEXTS)], t, MaskConfig(probability=0., max_length=64))
    seconds = [t.decode(r[3]) for r in data.rows]
    for epoch in range(40):
        for i in range(3):
            s = data.sequence(i, epoch)
            second = t.decode(s['ids'][s['segments'] == 1][:-1])
            assert (second == seconds[i]) == (s['pair'] == 0) and second in seconds
            assert s['ids'][0] == t.cls_token_id and (s['ids'] == t.sep_token_id).sum() == 2
    for length in (8, 9, 12): assert all(len(TextPairs([(i, i, x) for i, x in enumerate(TEXTS)], t, MaskConfig(max_length=length))[e, i]['masked'][0]) <= length for i in range(3) for e in range(4))


def test_another_corpus_is_another_digest():
    t = build_wordpiece(TEXTS, 200)
    of = lambda texts, **how: TextPairs([(i, i, x) for i, x in enumerate(texts)], t, MaskConfig(**how)).digest()
    assert len({of(TEXTS), of(TEXTS[:2]), of(TEXTS[::-1]), of(TEXTS, seed=1), of(TEXTS, mode='static')}) == 5 and of(TEXTS) == of(TEXTS)
