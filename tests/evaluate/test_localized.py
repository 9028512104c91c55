"""The 18 tasks as the specification has them; runs that differ; chosen on validation; killed and resumed; cached features; published numbers."""
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from golden import SHARED, golden
from localized import LABELS, evaluate, small, squares

from medvl.core.errors import DataError
from medvl.core.paths import read_jsonl
from medvl.evaluate.localized.run import load_carrier, choose_lr, head_maker, read_localized
from medvl.evaluate.localized.tasks import ABSENT, TASKS, select_tasks, share_rows, task_parts
from medvl.evaluate.localized.unit import LocalizedConfig, changed_settings, final_units, run_unit, unit_config, unit_data
from medvl.evaluate.localized.published import ABLATIONS, LOCALIZED_REMARKS, PUBLISHED_MODELS, beside_published, published_localized, ranks_among_published
from medvl.evaluate.localized.compare import paired_differences, ranks, t_interval, verdict_of
from medvl.evaluate.localized.taps import Taps

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('squares')
    return {'rsna': squares(root/'opacity'), 'covid_rural': squares(root/'opacity'), 'siim': squares(root/'siim', 'pneumothorax'), 'object_cxr': squares(root/'object', 'foreign_object'), 'nih': squares(root/'nih', LABELS, n=(18, 12, 12))}


@pytest.fixture(scope='module')
def source(): return load_carrier('resnet-tiny')


# ---- the tasks


def test_tasks_are_the_specifications():
    "Every cell of the table in section 2.1."
    path = SHARED/'specs'/'lovt.md'
    if not path.exists(): pytest.skip('specification absent')
    rows = re.findall(r'^\| (\d+) \| (\w+)[^|]*\| ([^|]+) \| ([^|]+) \| (\d+) \| ([^|]+) \| (\d+) \| (\d+) \| (\d*) ?\| ([^|]+) \|', path.read_text(), re.M)
    assert len(rows) == 18
    for t, (number, key, head, where, batch, lrs, epochs, patience, warm, metric) in zip(TASKS, rows):
        assert (t.number, t.key, t.batch, t.epochs, t.patience, t.head_warmup) == (int(number), key, int(batch), int(epochs), int(patience), int(warm or 0))
        assert t.lrs == tuple(float(x) for x in lrs.replace('fixed', '').split(','))
        assert t.frozen == ('frozen' in head) and t.head == {'Y': 'yolo', 'l': 'linear', 'U': 'unet'}[head[0]]
        assert t.fraction == (.01 if where.startswith(('1 %', 'RSNA 1 %')) else .1 if '10 %' in where and '100' not in where else 1.)
        assert {'mAP': 'mAP', 'fROC': 'froc', 'opacity Dice': 'dice', 'Dice': 'dice', 'mean Dice of 8 classes': 'avg_dice'}[metric.strip()] == t.metric


def test_tasks_and_metrics_are_those_of_the_published_tables():
    headline = json.loads(golden('lovt/headline_results.json').read_text())
    assert [t.key for t in TASKS] == headline['tasks'] and [t.metric for t in TASKS] == headline['metric']
    assert sum(len(t.lrs) for t in TASKS if len(t.lrs) > 1) == 46


def test_published_splits_give_the_papers_numbers_of_images():
    assert [len(share_rows(np.arange(n), f)) for n, f in ((16010, .01), (16010, .1), (5337, .1), (133, 1.), (588, 1.))] == [160, 1601, 534, 133, 588]


def test_first_rows_of_rsna_hold_the_published_positives():
    path = SHARED/'data'/'tables'/'cxr'/'RSNA-Pneunomia-Detection'
    if not path.exists(): pytest.skip('published splits absent')
    train, valid = (pd.read_csv(path/f'{n}.csv', keep_default_na=False) for n in ('train', 'validation'))
    positive = lambda df, f: int((df.boxes.iloc[share_rows(df.ID, f)] != '').sum())
    assert (positive(train, .01), positive(train, .1), positive(train, 1.), positive(valid, .1)) == (36, 360, 3584, 132)


def test_shares_are_nested_by_patient_and_seeded():
    who = np.repeat([f'p{i}' for i in range(50)], 3)
    shares = [set(share_rows(who, f, 'nested', 4)) for f in (.02, .1, .5, 1.)]
    assert all(a < b for a, b in zip(shares, shares[1:]))
    assert all(set(who[list(s)]).isdisjoint(set(np.delete(who, list(s)))) for s in shares[:3])
    assert share_rows(who, .1, 'nested', 4).tolist() != share_rows(who, .1, 'nested', 5).tolist()
    for wrong in (0, 1.1, -1):
        with pytest.raises(ValueError, match='fraction'): share_rows(who, wrong)


def test_parts_of_a_task(data):
    parts = task_parts(select_tasks(2)[0], data['rsna'])
    assert {k: len(v) for k, v in parts.items()} == {'train': 2, 'valid': 1, 'test': 12}
    assert parts['train'].manifest.image_id.tolist() == ['i000', 'i001']
    with pytest.raises(DataError, match="split 'valid'"): task_parts(TASKS[0], data['rsna'].subset(np.arange(18)))


@pytest.mark.parametrize('wrong', ['rsna_froozen_1', '19', 0])
def test_unknown_tasks_are_refused(wrong):
    with pytest.raises(ValueError, match='localized task'): select_tasks(wrong)


# ---- the protocol as settings


def test_protocol_as_settings():
    for t in TASKS:
        c = unit_config(t, t.lrs[0], 1, LocalizedConfig(), 20000)
        assert (c.optimizer, c.weight_decay, c.no_decay, c.schedule, c.plateau_patience, c.plateau_factor) == ('adam', 1e-6, (), 'plateau', 3, .5)
        assert (c.plateau_monitor, c.mode, c.min_delta, c.early_stop, c.head_warmup, c.head_lr) == ('valid_loss', 'max', 1e-5, t.patience, t.head_warmup, 1e-3)
        assert (c.epochs, c.batch_size, c.valid_every) == (t.epochs, t.batch, 0)
    assert changed_settings(LocalizedConfig()) == '' and 'max_epochs 3' in changed_settings(small())


# ---- runs


@pytest.fixture(scope='module')
def first(data, tmp_path_factory):
    "One evaluation of two tasks, with three runs each."
    folder = tmp_path_factory.mktemp('first')
    tasks = ['rsna_seg_linear_100', 'covid_unet_finetune', 'nih_seg_linear']
    return folder, evaluate(folder, tasks, {k: data[k] for k in ('rsna', 'covid_rural')}, runs=3, max_epochs=4)


def test_table(first):
    folder, found = first
    assert found.results.status.tolist() == ['done', 'done', ABSENT]
    done = found.done
    assert (done.runs == 3).all() and done.phantom.all() and (done.changed != '').all()
    for row in done.itertuples():
        values = found.runs.value[found.runs.task == row.task]
        mean, sd = values.mean(), values.std(ddof=1)
        assert (row.value, row.low, row.high) == pytest.approx((mean, mean - 4.302653 * sd / 3 ** .5, mean + 4.302653 * sd / 3 ** .5)) # t of 2 degrees
        assert row.low_patients <= row.value <= row.high_patients
    again = read_localized(folder)
    pd.testing.assert_frame_equal(again.results, found.results)
    assert {'results.csv', 'runs.csv', 'runs.parquet', 'tuning.csv', 'localized.json'} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob('*/*/training/checkpoints')) and list(folder.glob('*/*/training/metrics.jsonl'))


def test_runs_really_differ(first, data, source):
    "Other heads, another order, other results: the original's five runs repeated each other."
    folder, found = first
    for task, group in found.runs.groupby('task'):
        curves = {tuple(r['loss'] for r in read_jsonl(folder/task/u/'training'/'metrics.jsonl') if r['kind'] == 'train') for u in group.unit}
        assert group.seed.nunique() == len(curves) == 3, task
    assert found.runs[found.runs.task == 'covid_unet_finetune'].value.nunique() == 3
    task, config = select_tasks(9)[0], small()
    units = final_units(task, 1e-2, replace(config, runs=5))
    make = head_maker(source, data['rsna'], config)
    heads = [make(task, seed=u.seed) for u in units]
    assert len({h.head.classifier.weight.sum().item() for h in heads}) == 5
    assert len({h.image_encoder.layer4[0].conv1.weight.sum().item() for h in heads}) == 1
    from medvl.train.feed import RunBatches
    orders = [tuple(RunBatches(unit_data(task, data['rsna'], config)['train'], unit_config(task, 1e-2, u.seed, config, 18)))[0] for u in units]
    assert len({str(o) for o in orders}) == 5


def test_choice_of_the_learning_rate():
    task = select_tasks(9)[0]
    tried = [dict(lr=lr, valid=v) for lr, v in zip(task.lrs, (.1, .4, .4, .2))]
    assert choose_lr(task, tried) == task.lrs[1], 'the first of equals'
    assert choose_lr(select_tasks(5)[0], []) == 1e-3


def test_tuning_picks_the_best_validation_metric(first):
    _, found = first
    for task, tried in found.tuning.groupby('task', sort=False):
        chosen = found.runs.lr[found.runs.task == task].unique().tolist()
        assert len(tried) == 2 and len(chosen) == 1 and tried.valid[tried.lr == chosen[0]].item() == tried.valid.max()
        assert 'value' not in tried or tried.value.isna().all()


def test_test_images_change_nothing_but_the_test(first, data, tmp_path):
    "The same run with other test images: everything that is chosen stays the same."
    _, found = first
    turned = squares(tmp_path/'turned', seed=0)
    other = squares(tmp_path/'other', seed=1)
    keep = {k: (other if k == 'test' else turned) for k in ('train', 'valid', 'test')}
    task, config = select_tasks(9)[0], small(runs=1, max_epochs=4)
    sets = {k: unit_data(task, p, config)[k] for k, p in keep.items()}
    make = head_maker(load_carrier('resnet-tiny'), turned, config)
    unit = final_units(task, float(found.runs.lr[found.runs.task == task.key].iloc[0]), config)[0]
    result = run_unit(unit, lambda t, w: make(t, w, unit.seed), sets, tmp_path/'unit', config)
    same = found.runs[(found.runs.task == task.key) & (found.runs.run == 0)].iloc[0]
    assert (result['valid'], result['best_step']) == pytest.approx((same.valid, same.best_step), rel=2e-3)
    assert result['value'] != pytest.approx(same.value, abs=1e-3)


class Untouchable:
    "A test set that must not be read."
    def __len__(self): return 4
    def __getitem__(self, key): raise AssertionError('a test image was read')


def test_tuning_never_reads_test_images(data, source, tmp_path):
    from medvl.evaluate.localized.unit import tuning_units
    task, config = select_tasks(9)[0], small()
    sets = {**unit_data(task, data['rsna'], config), 'test': Untouchable()}
    unit = tuning_units(task, config)[0]
    make = head_maker(source, data['rsna'], config)
    assert 'value' not in run_unit(unit, lambda t, w: make(t, w, unit.seed), sets, tmp_path/'a', config)
    final = final_units(task, 1e-2, config)[0]
    with pytest.raises(Exception, match='a test image was read'): run_unit(final, lambda t, w: make(t, w, 0), sets, tmp_path/'b', config)
    assert not (tmp_path/'b'/'result.json').exists()


def test_cached_features_give_the_same(data, tmp_path):
    kwargs = dict(tasks=['rsna_seg_linear_100', 'rsna_frozen_100'], data={k: data[k] for k in ('rsna', 'covid_rural')})
    cached, asked = evaluate(tmp_path/'a', **kwargs, features='float32', runs=1, max_lrs=1), evaluate(tmp_path/'b', **kwargs, features_gb=0, runs=1, max_lrs=1)
    assert (tmp_path/'a'/'features').exists() and not (tmp_path/'b'/'features').exists()
    np.testing.assert_allclose(cached.runs.valid, asked.runs.valid, rtol=1e-3)
    np.testing.assert_allclose(cached.runs.value, asked.runs.value, rtol=1e-3, atol=1e-4)
    assert len(list((tmp_path/'a'/'features').iterdir())) == 1, 'one cache for one encoder and data set, whatever the heads'


def test_torn_and_foreign_caches(tmp_path):
    taps = Taps(tmp_path/'t', 'k', {'conv5': (4, 2, 2)}, 10, 'float32')
    values = {'conv5': np.arange(48, dtype=np.float32).reshape(3, 4, 2, 2)}
    taps.write(np.array([1, 5, 7]), values)
    again = Taps(tmp_path/'t', 'k', {'conv5': (4, 2, 2)}, 10, 'float32')
    assert again.missing([1, 2, 5, 7]).tolist() == [2]
    torch.testing.assert_close(again.read([7, 1])['conv5'].numpy(), values['conv5'][[2, 0]])
    with open(tmp_path/'t'/'conv5.npy', 'r+b') as f: f.seek(-3 * 64 + 5, 2); f.write(b'\x55')
    assert 7 in Taps(tmp_path/'t', 'k', {'conv5': (4, 2, 2)}, 10, 'float32').missing([1, 5, 7])
    for wrong in (dict(key='x'), dict(rows=11), dict(kind='float16')):
        with pytest.raises(DataError, match='Choose another folder'): Taps(tmp_path/'t', **{**dict(key='k', shapes={'conv5': (4, 2, 2)}, rows=10, kind='float32'), **wrong})
    with pytest.raises(ValueError, match='float16'): Taps(tmp_path/'u', 'k', {}, 1, 'float8')


# ---- killed and resumed


fork = multiprocessing.get_context('fork')


def finished(folder): return sorted(str(p.relative_to(folder)) for p in folder.glob('*/*/result.json'))


def test_killed_and_resumed(data, first, tmp_path):
    "Killed with SIGKILL three times, at other stages each time: the same table; what was finished was not started again."
    _, whole = first
    tasks, kills, sets = ['rsna_seg_linear_100', 'covid_unet_finetune'], 0, {'rsna': data['rsna'].folder, 'covid_rural': data['rsna'].folder}
    for wanted in (1, 4, 7):
        child = fork.Process(target=evaluate, args=(tmp_path/'cut', tasks, sets), kwargs=dict(runs=3, max_epochs=4))
        child.start()
        while child.is_alive() and len(finished(tmp_path/'cut')) < wanted: time.sleep(.02)
        time.sleep(.03 * wanted)
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL); kills += 1
        child.join()
    assert kills >= 2
    found = evaluate(tmp_path/'cut', tasks, {'rsna': data['rsna'], 'covid_rural': data['rsna']}, runs=3, max_epochs=4)
    plain = lambda e: e.runs.drop(columns='seconds').reset_index(drop=True)
    pd.testing.assert_frame_equal(plain(found), plain(whole))
    pd.testing.assert_frame_equal(found.results, whole.results[:2], check_dtype=False)
    for path in (tmp_path/'cut').glob('*/journal.jsonl'):
        events = [(e['event'], e['unit']) for e in read_jsonl(path)]
        units = {u for _, u in events}
        for u in units:
            own = [e for e, n in events if n == u]
            assert own.count('end') == 1 and own[-1] == 'end' and own.count('start') <= 3, (u, own)


def test_another_evaluation_is_refused(first, data):
    folder, _ = first
    before = finished(folder)
    with pytest.raises(DataError, match='another config'): evaluate(folder, ['rsna_seg_linear_100'], {'rsna': data['rsna']}, runs=3, max_epochs=2)
    with pytest.raises(DataError, match='another encoder'): evaluate(folder, ['rsna_seg_linear_100'], {'rsna': data['rsna']}, source='resnet-18', runs=3, max_epochs=4)
    with pytest.raises(DataError, match='another data'): evaluate(folder, ['rsna_seg_linear_100'], {'rsna': data['rsna'].subset(np.arange(30))}, runs=3, max_epochs=4)
    assert finished(folder) == before


def test_a_folder_grows(data, tmp_path):
    "Another call with another task and another data set: the table has both, and nothing of the first is lost."
    kwargs = dict(max_lrs=1, max_epochs=1)
    one = evaluate(tmp_path, ['rsna_seg_linear_100', 'nih_seg_linear'], {'rsna': data['rsna']}, runs=1, **kwargs)
    both = evaluate(tmp_path, ['nih_seg_linear'], {'nih': data['nih']}, runs=2, **kwargs)
    assert one.results.status.tolist() == ['done', ABSENT] and both.results.status.tolist() == ['1 of 2 runs', 'done']
    pd.testing.assert_frame_equal(one.runs.dropna(axis=1), both.runs[:1].dropna(axis=1), check_dtype=False)


def test_a_task_that_fails_does_not_stop_the_others(data, tmp_path):
    whole = data['rsna']
    without = whole.subset(np.flatnonzero((whole.manifest.split != 'test') | ~whole.manifest.image_id.isin(whole.boxes.image_id)))
    found = evaluate(tmp_path, ['rsna_seg_linear_100', 'covid_linear'], {'rsna': without, 'covid_rural': whole}, runs=1, max_lrs=1, max_epochs=1)
    assert [s.split(':')[0] for s in found.results.status] == ['failed', 'done'] and 'no image shows opacity' in found.results.status[0]
    with pytest.raises(ValueError, match='data set of the localized tasks'): evaluate(tmp_path/'b', 'all', {'rnsa': whole})
    assert evaluate(tmp_path/'c', 'all', {}).results.status.eq(ABSENT).all()


def test_head_warm_up_and_decay(data, tmp_path, source):
    "The head learns at 1e-3 for the warm-up, then all at the tuned rate (that the rate falls on a plateau: test_resume)."
    task, config = select_tasks('covid_unet_finetune')[0], small(max_epochs=5, max_head_warmup=4, keep=True)
    unit = final_units(task, 1e-4, config)[0]
    make = head_maker(source, data['covid_rural'], config)
    run_unit(unit, lambda t, w: make(t, w, unit.seed), unit_data(task, data['covid_rural'], config), tmp_path/'u', config)
    rows = [r for r in read_jsonl(tmp_path/'u'/'training'/'metrics.jsonl') if r['kind'] == 'train']
    assert [r['lr'] for r in rows[:4]] == pytest.approx([1e-3] * 4) and rows[4]['lr'] == pytest.approx(1e-4)
    assert (tmp_path/'u'/'training'/'best').exists() and not (tmp_path/'u'/'training'/'checkpoints').exists()


@pytest.mark.parametrize('key', ['rsna_finetune_1', 'pneumothorax_unet_frozen_100', 'object_frozen_100', 'nih_seg_linear'])
def test_every_kind_of_task_runs(key, data, tmp_path):
    task = select_tasks(key)[0]
    found = evaluate(tmp_path, key, {task.dataset: data[task.dataset]}, runs=1, max_lrs=1, max_epochs=2)
    row = found.results.iloc[0]
    assert row.status == 'done' and 0 <= row.value <= 1 and row.metric == task.metric
    draws = found.draws[key]
    ends = np.nanquantile(draws, [.025, .975]) if np.ptp(draws) else [np.nan, np.nan] # resamples that all agree make no interval
    assert len(draws) == 64 and [row.low_patients, row.high_patients] == pytest.approx(ends, nan_ok=True)


# ---- published numbers, ranks


def test_published_numbers_are_the_goldens():
    headline = json.loads(golden('lovt/headline_results.json').read_text())
    table = published_localized().set_index(['model', 'task'])
    assert [m.replace(' ', '_') for m in PUBLISHED_MODELS] == list(headline['models'])
    for model, cells in headline['models'].items():
        for task, (mean, half) in cells.items():
            row = table.loc[(model.replace('_', ' '), task)]
            assert (100 * row.value, 100 * (row.high - row.value)) == pytest.approx((mean, half), abs=1e-9)
    names = {'no local losses': 'ablation_no_l', 'no weights': 'ablation_noweight', 'no image-local loss': 'ablation_no_l_scan', 'one sentence, attention (CLIP 30)': 'ablation_g_single_sent_att',
             'ConVIRT, schedule of LoVT': 'ablation_convirt_lr', 'no weights, no attention pooling': 'ablation_noweight_no_att', 'no spatial smoothing': 'ablation_no_spatial',
             'global losses only': 'ablation_g_only', 'no report-local loss': 'ablation_no_l_report', 'no global losses': 'ablation_no_g', 'LoVT 30': 'LoVT_30', 'LoVT 100': 'LoVT_100'}
    stored = headline['rsna_frozen_10_from_csv_including_ablations']
    assert {names[k]: v for k, v in ABLATIONS.items()} == {k: (v['mAP'], v['ci95'], v['distinct_runs_of_5']) for k, v in stored.items()}


def test_published_runs_support_the_remarks():
    tasks, count = json.loads(golden('lovt/published_runs.json').read_text())['tasks'], {True: [0, 0], False: [0, 0]}
    for key, models in tasks.items():
        detection = select_tasks(key)[0].kind == 'detection'
        for runs in models.values():
            values = next(iter(runs['runs'].values()))
            count[detection][0] += len(set(values)) < len(values); count[detection][1] += 1
    assert count == {True: [80, 121], False: [9, 140]}
    assert '80 of 121' in LOCALIZED_REMARKS['runs'] and '9 of 140' in LOCALIZED_REMARKS['runs']
    values = tasks['rsna_frozen_10']['LoVT_30']['runs']['mAP']
    mean, low, high, sd = t_interval(values)
    row = published_localized(models=['LoVT 30']).set_index('task').loc['rsna_frozen_10']
    assert mean == pytest.approx(row.value, abs=6e-4) and 1.96 * sd / 5 ** .5 == pytest.approx(row.high - row.value, abs=6e-4)


def test_phantoms_stand_alone(first):
    _, found = first
    for lay in (beside_published, ranks_among_published):
        with pytest.raises(DataError, match='chest phantom'): lay(found.results)
    real = found.results.assign(phantom=False)
    table = beside_published(real)
    assert (table.verdict[[1, 18]] == ABSENT).all()
    assert all(word in table.verdict[9] for word in ('not the same protocol', 'size 64', 'resnet-tiny', 'runs 3', 'max_epochs 4', '18 training and 12 test images instead of 16010 and 5337'))


def test_ours_are_ranked_among_the_published_on_the_tasks_they_ran():
    ours = pd.DataFrame(dict(task=['covid_linear', 'nih_seg_linear', 'rsna_frozen_10'], model='LoVT 30', value=[.9, .0, np.nan], phantom=False))
    found = ranks_among_published(ours)
    assert len(found) == 17 and found.ours.sum() == 1 and 'rsna_frozen_10' not in found
    assert found.loc['LoVT 30 (ours)', ['covid_linear', 'nih_seg_linear', 'first']].tolist() == [1, 17, 1]
    assert found.loc['LoVT 30', 'covid_linear'] == 2 and len(ranks_among_published(ours, ['Random'])) == 2
    with pytest.raises(DataError, match='none of the tasks'): ranks_among_published(ours.iloc[2:])


def test_ranks_share_ties_and_ask_for_complete_tasks():
    table = pd.DataFrame(dict(task=['a', 'a', 'b', 'b', 'c'], model=['x', 'y', 'x', 'y', 'x'], value=[1, 1, .2, .3, .9]))
    found = ranks(table)
    assert found.loc['y', ['a', 'b', 'average', 'first']].tolist() == [1.5, 1, 1.25, 2] and 'c' not in found
    with pytest.raises(DataError, match='no task'): ranks(table.iloc[[0, 4]].assign(model=['y', 'z']))


def test_paired_differences_of_two_evaluations(first, data, tmp_path):
    folder, found = first
    other = evaluate(tmp_path, ['rsna_seg_linear_100'], {'rsna': data['rsna']}, runs=3, max_epochs=2)
    table = paired_differences(found.runs, other.runs, found.draws, other.draws)
    assert table.task.tolist() == ['rsna_seg_linear_100'] and table.runs.tolist() == [3]
    a, b = (e.runs[e.runs.task == 'rsna_seg_linear_100'].set_index('run').value for e in (found, other))
    mean, low, high, _ = t_interval(a - b)
    assert table[['difference', 'low_seeds', 'high_seeds']].iloc[0].tolist() == pytest.approx([mean, low, high])
    same = paired_differences(found.runs, found.runs, found.draws, found.draws)
    assert (same.difference == 0).all() and same[['low_seeds', 'high_patients']].isna().all().all() and verdict_of(same)['p_sign'] == 1 # no interval of no width
    assert verdict_of(same)['clear_better'] == verdict_of(same)['clear_worse'] == 0
    with pytest.raises(DataError, match='draws of patients'): paired_differences(found.runs, other.runs, found.draws, {k: v[:5] for k, v in other.draws.items()})
    with pytest.raises(DataError, match='share no task'): paired_differences(found.runs, other.runs.assign(task='x'))


def test_t_interval():
    assert t_interval([1, 2, 3, 4, 5])[:3] == pytest.approx((3, 3 - 2.776445 * 2.5 ** .5 / 5 ** .5, 3 + 2.776445 * 2.5 ** .5 / 5 ** .5))
    assert np.isnan(t_interval([1.])[1]) and np.isnan(t_interval([])[0]) and t_interval([.5, .5])[0] == .5 and np.isnan(t_interval([.5, .5])[1])
