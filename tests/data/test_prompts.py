"""Image-label pre-training: sentences from findings, the table of breasts, samples, mixtures."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden
from releases import vindr

from medvl.core.errors import DataError
from medvl.data.augment.breast_versions import Augment, AugmentConfig
from medvl.data.samples.breast import BreastTextDataset
from medvl.data.balanced import Mixture, mixture_counts
from medvl.data.samples.findings import FindingConfig, FindingDataset, finding_breasts, paper_findings
from medvl.data.releases.finding_table import finding_labels, finding_table, four_lists, read_finding_table, read_lists, vindr_findings, write_finding_table
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.prepared import Prepared
from medvl.data.text.prompts import FINDINGS, IN_VIEW, NORMAL, SLOTS, bank_counts, check_bank, choose_sentences, prompt_bank, write_report
from medvl.data.text.sides import swap_sides, swap_vertical
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig
from medvl.train.loop import train
from medvl.train.settings import TrainConfig


class Pythons:
    "The original's draws: Python's own generator; its order is thrown away by a set."
    def __init__(self, seed): self.random = random.Random(seed)
    def integers(self, n): return self.random.choice(range(n))
    def permutation(self, n): return np.arange(n)


def cases():
    stored = json.loads(golden('mammoclip/text.json').read_text())['prompts']
    return stored['bank'], stored['cases']


def test_golden_reports():
    bank, stored = cases()
    for case in stored:
        assert sorted(write_report(case['findings'], bank).split()) == case['deterministic_sorted']
        assert sorted(write_report(case['findings'], bank, Pythons(123)).split()) == case['random_seed123_sorted']


def test_golden_counts_of_positive_sentences():
    theirs = json.loads(golden('mammoclip/text.json').read_text())['prompt_counts']['prompts.json']
    ours = bank_counts(prompt_bank())
    assert set(ours) == set(theirs)
    for f, slots in theirs.items():
        assert (ours[f]['pos_right'], ours[f]['pos_left']) == (slots['pos_right'], slots['pos_left']), f


def test_the_published_notebooks_lists_are_read():
    stored = json.loads(golden('mammoclip/text.json').read_text())['vindr_notebook_roundtrip']
    lists, mended = read_lists(str(stored['CC_FINDING_neg_sorted']))
    assert mended and lists[1] == ['Mass', 'Skin Thickening'] and len(lists[3]) == 8 and not set(lists[1]) & set(lists[3])
    assert write_report(lists, prompt_bank())


@pytest.mark.parametrize('view', ['', 'CC', 'MLO'])
@pytest.mark.parametrize('detail', ['full', 'plain', 'many'])
def test_every_sentence_names_its_own_side_only(view, detail):
    bank = check_bank(prompt_bank(view, detail), (*FINDINGS, NORMAL))
    for finding, slots in bank.items():
        for slot in SLOTS:
            assert len(set(slots[slot])) == len(slots[slot]), (finding, slot)
            side = slot.split('_')[1]
            for s in slots[slot]: assert side in s.split() and {'left': 'right', 'right': 'left'}[side] not in s.split()
        for sign in ('pos', 'neg'): # mirrored, the left bank is the right bank
            assert [swap_sides(s) for s in slots[f'{sign}_left']] == list(slots[f'{sign}_right'])


def test_the_words_of_a_view_stay_in_it_upside_down():
    for view, words in (('CC', {'upper', 'lower'}), ('MLO', {'inner', 'outer'})):
        for slots in prompt_bank(view).values():
            for group in slots.values():
                known = set(group)
                for s in group: assert not words & set(s.split()) and swap_vertical(s) in known
    assert set(IN_VIEW) == {'CC', 'MLO'}


def test_reports_do_not_depend_on_the_process():
    code = ("from medvl.data.text.prompts import *; from medvl.core.seed import numpy_rng; f=[['Mass','Asymmetry'],[],['Skin Thickening','Nipple Retraction'],[]];"
            "print(write_report(f, prompt_bank()), [write_report(f, prompt_bank('CC'), numpy_rng(i)) for i in range(3)])")
    outs = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': h}, capture_output=True, text=True,
                           check=True).stdout for h in '07'}
    assert len(outs) == 1


@pytest.mark.parametrize('findings,match', [([['Mas'], [], [], []], 'Mass'), ([[], [], []], 'four lists'),
                                            ("[['Mass'],[],[],[]]", 'four lists'), (['Mass', [], [], []], 'four lists')])
def test_bad_findings(findings, match):
    with pytest.raises(DataError, match=match): choose_sentences(findings, prompt_bank(), name='p/L')


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp('vindr'); breast, finding = vindr()
    keep = breast.study_id.isin(finding.study_id[:30]) | (breast.index < 160)
    breast, finding = breast[keep], finding[finding.image_id.isin(breast.image_id[keep])]
    breast.to_csv(folder/'breast-level_annotations.csv', index=False); finding.to_csv(folder/'finding_annotations.csv', index=False)
    return folder, breast, finding


def test_table_of_breasts_from_raw_annotations(release, tmp_path):
    folder, breast, finding = release
    table = vindr_findings(folder)
    assert len(table) == len(breast)//2 and set(table.fold) <= {0, 1} and (table.view.map(tuple) == ('CC', 'MLO')).all()
    names = finding.groupby('image_id').finding_categories.agg(lambda c: {n for t in c for n in json.loads(t.replace("'", '"'))} - {NORMAL})
    for row in table.itertuples():
        for view in ('CC', 'MLO'):
            want, (right, left, no_right, no_left) = names[getattr(row, view)[0]], getattr(row, f'{view}_FINDING')
            mine, other = (right + no_right, left + no_left) if row.laterality == 'R' else (left + no_left, right + no_right)
            assert other == [] and set(right + left) == (want or {NORMAL}) and set(mine) - {NORMAL} == set(FINDINGS)
            assert write_report(getattr(row, f'{view}_FINDING'), prompt_bank(view))
    again = read_finding_table(write_finding_table(table, tmp_path/'t.csv'))
    assert all(again[c].tolist() == table[c].tolist() for c in table)
    labels = finding_labels(again)
    assert labels.label_mass.sum() == names.map(lambda n: 'Mass' in n).sum() and len(labels) == len(breast) and not labels.isna().any().any()


@pytest.mark.parametrize('cell,match', [("[['Mass'], [], []]", '3 lists'), ("__import__('os').mkdir('x')", 'no list'),
                                        ("[['Mas'], [], [], []]", 'Mass'), ('', 'no list'),
                                        ('[' * 5000, 'no list'), ("[[1], [], [], []]", 'no text')])
def test_lists_are_read_safely(tmp_path, cell, match):
    pd.DataFrame({'patient_id': ['a', 'b'], 'laterality': 'L', 'CC_FINDING': ["[[], ['Mass'], [], []]", cell],
                  'MLO_FINDING': '[[], [], [], []]'}).to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(DataError, match=match) as e: read_finding_table(tmp_path/'t.csv')
    assert e.value.row == 1 and e.value.column == 'CC_FINDING' and 't.csv' in str(e.value)


def test_unstated_labels_are_neither_present_nor_absent():
    df = pd.DataFrame({'image_id': ['a', 'b'], 'patient_id': 'p', 'laterality': 'R', 'view': ['CC', 'MLO'], 'split': 'train',
                       'label_mass': [0., np.nan], 'label_asymmetry': [np.nan, 0.]})
    row = finding_table(df).iloc[0]
    assert row.CC_FINDING == [[], [], ['Mass'], []] and row.MLO_FINDING == [[], [], ['Asymmetry'], []] and row.cc_findings == []
    assert four_lists([], ['Mass'], 'L') == [[], [NORMAL], [], ['Mass']]
    with pytest.raises(DataError, match='split'): finding_table(df.assign(split=['train', 'test']))
    with pytest.raises(DataError, match='none of the labels'): finding_table(df[['image_id', 'patient_id', 'laterality', 'view',
                                                                                 'split']].assign(label_cancer=1))


@pytest.fixture(scope='module')
def phantom(tmp_path_factory): return prepared_phantom(tmp_path_factory.mktemp('phantom'), 8, (64, 48), seed=4)


@pytest.fixture(scope='module')
def tokenizer(phantom):
    return build_wordpiece([s for slots in prompt_bank().values() for group in slots.values() for s in group] + list(phantom.manifest.report), 900)


def test_samples_say_what_the_labels_say(phantom, tokenizer):
    data = FindingDataset(phantom, tokenizer, FindingConfig(detail='plain'))
    m = phantom.manifest
    for epoch in range(3):
        for i, row in enumerate(data.rows):
            s = data[(epoch, i)]
            for view, text in zip(s['view'], s['text']):
                here = m[(m.patient_id == row['patient_id']) & (m.laterality == row['laterality']) & (m['view'] == view)]
                mirrored, side = s['flip'][0, 0], {'L': 'left', 'R': 'right'}[s['laterality']]
                assert ({'left': 'right', 'right': 'left'}[side] if mirrored else side) in text and (s['flip'][0] == s['flip'][1]).all()
                if (here.label_mass == 1).any(): assert ' mass' in text.replace('no mass', '').replace('free of mass', '')
                elif (here.label_suspicious_calcification == 1).any(): assert 'no mass' in text or 'free of mass' in text or 'mass' in text and 'no ' in text
                else: assert not text.startswith('a mass')


def test_texts_follow_their_views(phantom, tokenizer):
    bank = {f: {s: (f'{f} {s} seen',) for s in SLOTS} for f in FINDINGS} | {NORMAL: {s: ('nothing',) for s in SLOTS}}
    m = phantom.manifest.copy()
    m['label_mass'] = np.float32(m['view'] == 'CC'); m['label_suspicious_calcification'] = np.float32(m['view'] == 'MLO')
    data = FindingDataset(Prepared(phantom.folder, phantom.info, phantom.images, phantom.masks, m, phantom.boxes, phantom.sentences),
                          tokenizer, bank=bank)
    orders = set()
    for e in range(4):
        s = data[(e, 0)]; orders.add(tuple(s['view']))
        for v, t in zip(s['view'], s['text']): assert ('mass pos' if v == 'CC' else 'calcification pos') in t
    assert orders == {('CC', 'MLO'), ('MLO', 'CC')}


def test_paper_options_and_bounded_negatives(phantom, tokenizer):
    data = FindingDataset(phantom, tokenizer, paper_findings())
    assert any((data[(e, 0)]['flip'][0] != data[(e, 0)]['flip'][1]).any() for e in range(8))
    assert '.' not in data[0]['text'][0]
    few = FindingDataset(phantom, tokenizer, FindingConfig(negatives=0, detail='plain'))
    assert all(len(few[i]['text'][0].split('.')) <= 3 for i in range(len(few)))
    mixed = FindingDataset(phantom, tokenizer, FindingConfig(laterality='no_flip'))
    assert not any(mixed[(e, i)]['flip'][:, 0].any() for e in range(3) for i in range(len(mixed)))


def test_equal_findings_share_a_group(phantom, tokenizer):
    rows, _ = finding_breasts(phantom, FindingConfig())
    for a in rows:
        for b in rows: assert (a['group'] == b['group']) == (a['findings'] == b['findings'])


def test_bad_banks_and_options(phantom, tokenizer):
    with pytest.raises(DataError, match='no token'): FindingDataset(phantom, tokenizer, bank={f: dict.fromkeys(SLOTS, ()) for f in (*FINDINGS, NORMAL)})
    with pytest.raises(DataError, match='Mass'): FindingDataset(phantom, tokenizer, bank={NORMAL: dict.fromkeys(SLOTS, ('fine',))})
    with pytest.raises(DataError, match='view'): FindingDataset(phantom, tokenizer, FindingConfig(view_names=('LM',)))
    with pytest.raises(DataError, match='none of the labels'): FindingDataset(phantom, tokenizer, FindingConfig(findings=('Nipple Retraction',)))
    with pytest.raises(IndexError, match='no sample'): FindingDataset(phantom, tokenizer)[99]


def test_a_mixture_trains_and_is_balanced(phantom, tokenizer, tmp_path):
    labels = FindingDataset(phantom, tokenizer, FindingConfig(negatives=2))
    both = Mixture({'reports': BreastTextDataset(phantom, tokenizer), 'labels': labels}, 'equal', seed=3)
    method = MammoCLIP(MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', text_pretrained=False, dim=16,
                                       duplicates='mask'), tokenizer)
    result = train(method, both, TrainConfig(max_steps=2, batch_size=8, lr=1e-3, warmup=0), tmp_path/'run',
                   transform=Augment(AugmentConfig(mode='none')))
    losses = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert result is not None and all(np.isfinite(row['loss']) for row in losses if 'loss' in row)
    batch = both.collate([both[(1, i)] for i in range(len(both))])
    assert batch['source'].count('reports') == batch['source'].count('labels') == 16 and batch['index'].tolist() == list(range(32))
    assert isinstance(batch['tokens']['input_ids'], torch.Tensor) and batch['text_group'].shape == (32, 2)


@pytest.mark.parametrize('sizes,balance', [((3, 10), 'equal'), ((3, 10), (1, 3)), ((7, 2, 4), (0, 1, 1)), ((5, 5), None)])
def test_balance_and_coverage(sizes, balance):
    counts = mixture_counts(sizes, balance)
    assert sum(counts) == sum(sizes) and (balance != 'equal' or max(counts) - min(counts) <= 1)
    mix = Mixture.__new__(Mixture)
    mix.sources, mix.counts, mix.starts, mix.seed, mix.balance, mix._orders = [range(n) for n in sizes], counts, np.cumsum([0, *counts]), 0, balance, {}
    for k, n in enumerate(sizes):
        visits = [mix.place(e, i)[1:] for e in range(6) for i in range(len(mix)) if mix.place(e, i)[0] == k]
        assert len(set(visits)) == len(visits) == 6*counts[k]
        for turn in range(6*counts[k]//n): assert sorted(item for t, item in visits if t == turn) == list(range(n))


def test_sources_of_another_form_are_refused(phantom, tokenizer):
    reports = BreastTextDataset(phantom, tokenizer)
    for other, what in ((FindingDataset(phantom, tokenizer, FindingConfig(texts=1)), 'texts'),
                        (FindingDataset(phantom, build_wordpiece(['a mass on the left', *'right']), FindingConfig()), 'tokeniser'),
                        (FindingDataset(phantom, tokenizer, train=False), 'way to draw')):
        with pytest.raises(ValueError, match=what): Mixture({'r': reports, 'l': other})
