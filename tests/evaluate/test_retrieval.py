"""Retrieval between images and reports, prompt sets, and embedding files that know their model."""
from itertools import permutations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation import Grey, made, made_embeddings

from medvl.core.errors import DataError
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.prepared import subset
from medvl.evaluate.stats.bootstrap import BLOCK, interval, patient_counts
from medvl.evaluate.protocols.embeddings import Embeddings, embed
from medvl.evaluate.protocols.export import embed_texts, export_embeddings, file_facts, read_embeddings, read_texts, refuse_other_model
from medvl.evaluate.protocols.retrieval import DIRECTIONS, chance_recall, recall_table, retrieval_protocol, texts_of_units
from medvl.evaluate.protocols.zero_shot import TASKS, bank_tasks, zero_shot
from medvl.methods.base import Method, from_pretrained, save_pretrained
from medvl.methods.recipes import new_method


class Words(Method):
    "Knows three sentences by heart."
    name = 'words'
    known = {'mass.': [1., 0, 0], 'calcifications.': [0, 1., 0], 'normal.': [0, 0, 1.]}

    def encode_image(self, images): raise AssertionError('the vectors are given')

    def encode_text(self, texts): return torch.tensor([self.known[t] for t in texts])


@pytest.fixture
def reported(tmp_path):
    "Five patients of two breasts with two images; reports: mass, calcifications, normal, normal, none."
    data = made(tmp_path / 'd', patients=5, split=('test',))
    reports = ['Mass.', 'Calcifications.', 'Normal.', 'NORMAL. ', '']
    data.manifest['report'] = np.repeat(reports, 4)
    return data


def vectors(data, of_patient): # a list of five rows
    return Embeddings(data.manifest.image_id.to_numpy(), {'image': np.repeat(np.array(of_patient, np.float32), 4, axis=0)})


RIGHT = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 1, 1]]


def value(table, task, metric): return table[(table.task == task) & (table.metric == metric)].value.item()


@pytest.mark.parametrize('n, m, k', [(6, 1, 1), (6, 2, 3), (5, 3, 2), (5, 4, 3), (4, 4, 1), (5, 1, 9)])
def test_chance_equals_all_orders(n, m, k):
    orders = np.array(list(permutations(range(n)))) < m
    assert chance_recall(n, np.array([m]), k)[0] == pytest.approx(orders[:, :k].any(1).mean(), abs=1e-12)
    table = recall_table(np.ones(2), np.full(2, m), n, ['a', 'b'], (k,), n_boot=64).set_index('metric')
    assert table.chance['mean_rank'] == pytest.approx((orders.argmax(1) + 1).mean())


def test_duplicates_of_a_report_are_matches(reported, tmp_path):
    r = retrieval_protocol(Words(), reported, embeddings=vectors(reported, RIGHT), folder=tmp_path, n_boot=64, check=False)
    assert sorted(r.texts) == ['calcifications.', 'mass.', 'normal.'] and r.left_out == {'no report': 2} and len(r.units) == 8
    assert all(value(r.table, d, 'recall@1') == 1 for d in DIRECTIONS)
    asked = r.ranks[r.ranks.direction == DIRECTIONS[1]]
    assert len(asked) == 4 and sorted(asked.matches) == [2, 2, 4, 4]
    # one "normal" patient looks like a mass: its image misses (a tie would count as a miss too), her report still finds the other one
    wrong = [*RIGHT[:3], [1, 0, .1], RIGHT[4]]
    r = retrieval_protocol(Words(), reported, embeddings=vectors(reported, wrong), folder=tmp_path, n_boot=64, check=False)
    assert value(r.table, DIRECTIONS[0], 'recall@1') == 6 / 8 and value(r.table, DIRECTIONS[1], 'recall@1') == 1
    assert value(r.table, DIRECTIONS[0], 'mean_rank') == (6 * 1 + 2 * 2) / 8


def test_unique_reports_and_units(reported, tmp_path):
    options = dict(embeddings=vectors(reported, RIGHT), folder=tmp_path, n_boot=64, check=False)
    r = retrieval_protocol(Words(), reported, reports='unique', **options)
    assert r.left_out == {'no report': 2, 'the report of several exams': 4} and len(r.texts) == 2
    images = retrieval_protocol(Words(), reported, unit='image', **options)
    assert len(images.units) == 16 and set(images.table.unit) == {'image'} and set(images.table.patients) == {4}
    with pytest.raises(ValueError, match="Did you mean 'breast'"): retrieval_protocol(Words(), reported, unit='breasts', **options)


def test_order_of_rows_does_not_matter(reported, tmp_path):
    rng = np.random.default_rng(0)
    e = Embeddings(reported.manifest.image_id.to_numpy(), {'image': rng.normal(size=(20, 3)).astype(np.float32)})
    options = dict(embeddings=e, folder=tmp_path, n_boot=64, check=False)
    a, b = (retrieval_protocol(Words(), d, **options).table for d in (reported, subset(reported, rng.permutation(20))))
    pd.testing.assert_frame_equal(a[['task', 'metric', 'value', 'low', 'high', 'chance', 'n']], b[['task', 'metric', 'value', 'low', 'high', 'chance', 'n']])


def test_interval_equals_drawing_rows():
    rng = np.random.default_rng(1)
    patients, ranks = np.repeat(np.arange(12), rng.integers(1, 5, 12)), None
    ranks = rng.integers(1, 20, len(patients))
    table = recall_table(ranks, np.ones(len(ranks)), 20, patients, (5,), n_boot=128).set_index('metric')
    counts = np.concatenate([patient_counts(12, b, 0, BLOCK) for b in range(2)], axis=1)[:, :128].astype(int)
    plain = [np.mean(np.concatenate([np.repeat(ranks[patients == p] <= 5, c) for p, c in enumerate(column)])) for column in counts.T]
    assert (table.low['recall@5'], table.high['recall@5']) == pytest.approx(interval(np.mean(ranks <= 5), np.array(plain)), abs=1e-9)


def test_too_few_reports_and_other_models(reported, tmp_path):
    options = dict(folder=tmp_path, check=False)
    silent = subset(reported, reported.manifest.report.isin(['', 'Mass.']).to_numpy())
    with pytest.raises(DataError, match='1 distinct reports'): retrieval_protocol(Words(), silent, embeddings=vectors(reported, RIGHT), **options)
    other = Embeddings(reported.manifest.image_id.to_numpy(), vectors(reported, RIGHT).arrays, {'weights': 'f' * 64, 'method': 'x'})
    with pytest.raises(DataError, match='another model: x with weights ffff'): retrieval_protocol(Words(), reported, embeddings=other, **options)
    assert texts_of_units(reported.manifest, 'exam')[1].text.tolist() == ['mass.', 'calcifications.', 'normal.', 'normal.', '']


# ------------------------------------------------------------------------------------------------ prompts

def test_prompt_sets():
    first = {name: [p for t in tasks for c in t.prompts for p in c] for name, tasks in TASKS.items()}
    assert first['rsna'] == ['no malignancy', 'malignancy'] and first['rsna_cancer'] == ['no cancer', 'cancer']
    assert first['vindr'][:4] == ['no mass', 'mass', 'no suspicious calcification', 'suspicious calcification'] and len(first['vindr']) == 8
    assert len(TASKS['findings']) == 10 and all(t.prompts[0][0] == f'no {t.prompts[1][0]}' for t in TASKS['findings'])
    m = pd.DataFrame({'birads': ['1', '4b', 'BI-RADS 5', '0', '3']})
    assert TASKS['birads'][0].truth(m).tolist()[:3] == [0, 3, 4] and np.isnan(TASKS['birads'][0].truth(m)[3])
    assert TASKS['birads'][1].truth(m).tolist()[:3] == [0, 1, 1] and np.isnan(TASKS['birads'][1].truth(m)[3:]).all()
    for t in bank_tasks(): assert not set(t.prompts[0]) & set(t.prompts[1]), 'a sentence cannot mean both'


def test_zero_shot_refuses_embeddings_of_another_model(tmp_path):
    data = made(tmp_path / 'd', patients=12)
    e = embed(Grey(0), data, tmp_path, what='image')
    zero_shot(Grey(0), data, {'mass': ('no mass', 'mass')}, embeddings=e, n_boot=16, check=False)
    with pytest.raises(DataError, match='another model'): zero_shot(Grey(1), data, {'mass': ('no mass', 'mass')}, embeddings=e, n_boot=16, check=False)


# ------------------------------------------------------------------------------------------------ embedding files

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('e')
    data = prepared_phantom(folder / 'phantom', 5, (96, 64))
    method = new_method('mammoclip', 'smoke', data.manifest.report)
    e = embed(method, data, folder / 'cache')
    return folder, data, method, e, export_embeddings(e, data, folder / 'e.parquet', method)


def test_round_trip_and_provenance(exported):
    folder, data, method, e, file = exported
    back, frame = read_embeddings(file, method, data)
    for k in ('image', 'feature'): np.testing.assert_array_equal(back.of(data, k), e.of(data, k))
    facts = file_facts(file)
    assert facts['weights'] == e.facts['weights'] and facts['preprocessing'] == {'profile': 'mammo_clip_v1', 'height': 96, 'width': 64}
    assert facts['provenance']['versions']['torch'] and facts['dataset'] == data.digest and 'report' not in frame
    plain = pd.read_parquet(file) # any tool reads it
    np.testing.assert_array_equal(np.stack(plain.image), e.of(data))


def test_saved_and_loaded_model_is_the_same(exported, tmp_path):
    _, data, method, _, file = exported
    save_pretrained(method, tmp_path / 'm')
    read_embeddings(file, from_pretrained(tmp_path / 'm'), data)


def test_another_model_is_refused(exported):
    _, data, method, _, file = exported
    other = new_method('mammoclip', 'smoke', data.manifest.report, seed=1)
    with pytest.raises(DataError, match='made by another model') as e: read_embeddings(file, other)
    assert e.value.file == str(file)
    with pytest.raises(DataError, match='another model'): export_embeddings(exported[3], data, file.with_name('x.parquet'), other)
    facts = file_facts(file)
    with pytest.raises(DataError, match='reads differently.*pooling'): refuse_other_model({**facts, 'settings': {**facts['settings'], 'pooling': 'eos'}}, method)
    with pytest.raises(DataError, match='another tokenizer'): refuse_other_model({**facts, 'tokenizer': '0' * 64}, method)


def test_other_pixels_and_sizes_are_refused(exported, tmp_path):
    _, data, _, _, file = exported
    changed = subset(data, np.arange(len(data)))
    changed.manifest.loc[3, 'pixel_sha256'] = '0' * 64
    with pytest.raises(DataError, match='has other pixels now \\(1 in all\\)'): read_embeddings(file, prepared=changed)
    changed.info = {**data.info, 'profile': 'other'}
    with pytest.raises(DataError, match="prepared as .*mammo_clip_v1.*these are .*other"): read_embeddings(file, prepared=changed)


def test_damage_is_noticed(exported, tmp_path):
    file, bad = exported[4], tmp_path / 'bad.parquet'
    table = pq.read_table(file)
    x = np.stack(table['image'].to_pylist()).astype(np.float32)
    x[2, 0] += 1e-3
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    pq.write_table(table.set_column(table.schema.get_field_index('image'), 'image', column).replace_schema_metadata(table.schema.metadata), bad)
    with pytest.raises(DataError, match='differ from what was exported'): read_embeddings(bad)
    bad.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match='not a readable Parquet file'): read_embeddings(bad)
    pd.DataFrame({'a': [1]}).to_parquet(bad)
    with pytest.raises(DataError, match='no embeddings of medvl'): read_embeddings(bad)
    with pytest.raises(DataError, match='no such file'): read_embeddings(tmp_path / 'absent.parquet')


def test_what_may_not_be_written(exported, tmp_path):
    data = made(tmp_path / 'd', patients=3)
    e = made_embeddings(data)
    e.arrays['image'][4, 2] = np.nan
    with pytest.raises(DataError, match='not finite') as error: export_embeddings(e, data, tmp_path / 'x.parquet')
    assert error.value.row == 4 and not (tmp_path / 'x.parquet').exists()


def test_sentences(exported, tmp_path):
    method = exported[2]
    method.train()
    a = embed_texts(method, ['no mass', 'mass', 'mass'], tmp_path)
    assert method.training and np.allclose(np.linalg.norm(a, axis=1), 1) and (a[1] == a[2]).all()
    np.testing.assert_array_equal(embed_texts(method, ['no mass', 'mass'], tmp_path), a[:2])
    (file,) = tmp_path.glob('texts-*.parquet')
    assert read_texts(file, method)[0] == ['no mass', 'mass']
    with pytest.raises(DataError, match='embeddings of texts, not of images'): read_embeddings(file)


@pytest.mark.parametrize('text', ['', '   ', '\u200b\u0000', None])
def test_prompt_without_a_token(exported, text, tmp_path):
    with pytest.raises(DataError, match='has no token'): embed_texts(exported[2], ['mass', text], tmp_path)
    if text is not None:
        with pytest.raises(ValueError, match='no token|non-empty prompt'): zero_shot(exported[2], exported[1], {'mass': ('no mass', text)}, embeddings=exported[3], check=False)
