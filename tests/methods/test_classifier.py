"""Classification: frozen is frozen, the loss is its formula, balanced draws resume, folds keep apart, bad input says so, and the sweep is its parts."""
import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import made, made_embeddings

from medvl.core.errors import DataError
from medvl.core.paths import read_jsonl
from medvl.data.balanced import Balanced, BalancedBatches, balanced_order, groups_of, reference_shares, shares_of
from medvl.data.folds import check_folds, each_fold, fold_parts, training_share, with_folds, with_split, with_validation
from medvl.data.samples.targets import CLASSES, TargetImages, check_targets, label_values, positive_weights, target_matrix, with_labels
from medvl.evaluate.protocols.classification import Validator, classification, out_of_fold, predict_images, scored_predictions
from medvl.evaluate.protocols.label_efficiency import label_efficiency, plot_label_efficiency
from medvl.evaluate.protocols.linear_probe import linear_probe
from medvl.evaluate.metrics.curves import auroc
from medvl.evaluate.stats.scored import LeakError
from medvl.methods.base import from_pretrained, save_pretrained
from medvl.methods.classifier import Classifier, ClassifierConfig, load_encoder, new_classifier
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig
from medvl.models.checkpoints import read_checkpoint
from medvl.train.gradcache import backward_batch
from medvl.methods.base import StepState
from medvl.train.loop import train
from medvl.train.settings import TrainConfig

TINY = dict(image_encoder='efficientnet-tiny')
TRAIN = dict(batch_size=8, lr=1e-2, warmup=0, trackers=(), cpu=True)


@pytest.fixture(scope='module')
def data(tmp_path_factory): return made(tmp_path_factory.mktemp('made') / 'data', patients=40, size=(64, 40))


@pytest.fixture(scope='module')
def clip(): return MammoCLIP(MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', vocab_size=50, dim=16)).eval()


def part(data, name): return data.subset((data.manifest.split == name).to_numpy())


def encoder_of(method): return {k: v.clone() for k, v in method.image_encoder.state_dict().items()}


def changed(method, before): return {k.rsplit('.', 1)[-1] for k, v in method.image_encoder.state_dict().items() if not torch.equal(v, before[k])}


# ------------------------------------------------------------------------------------------------ the method

@pytest.mark.parametrize('options, moved', [({}, set()), ({'live': True}, {'running_mean', 'running_var', 'num_batches_tracked'}),
                                            ({'frozen': False}, {'running_mean', 'running_var', 'num_batches_tracked', 'weight', 'bias'})])
def test_frozen_is_frozen_in_the_loop(data, clip, tmp_path, options, moved):
    method = new_classifier(clip, ('mass', 'calcification'), dropout=.5, **options)
    before, head = encoder_of(method), method.head.weight.clone()
    result = train(method, TargetImages(part(data, 'train'), method.config.labels, train=True), TrainConfig(max_steps=3, **TRAIN), tmp_path)
    assert result.step == 3 and not torch.equal(head, method.head.weight)
    assert changed(method, before) == moved


def test_frozen_features_are_those_of_evaluation(data, clip):
    images = torch.from_numpy(np.stack([data.images[i] for i in range(6)]))[:, None]
    frozen, live = (new_classifier(clip, 'mass', dropout=.5, live=live).train() for live in (False, True))
    torch.testing.assert_close(frozen.image_features(images), clip.image_features(images), rtol=0, atol=0)  # no dropout, no batch statistics
    assert not torch.allclose(live.image_features(images), clip.image_features(images), atol=1e-3)
    live.eval(); live.train(False)
    assert not any(m.training for m in live.modules())


def test_weighted_loss_is_its_formula():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(20, 3)) * 3, rng.choice([0., 1., np.nan], (20, 3))
    w = (15.573306, 37.296729, .25)
    method = Classifier(ClassifierConfig(labels=('a', 'b', 'c'), pos_weight=w, **TINY))
    got = method.losses({'logits': torch.tensor(z)}, {'labels': torch.tensor(y, dtype=torch.float32)}, None)
    p = 1 / (1 + np.exp(-z))
    each = -(np.array(w) * y * np.log(p) + (1 - y) * np.log(1 - p))
    assert got['loss'].item() == pytest.approx(np.nanmean(each), rel=1e-6)
    assert got['stated'].item() == pytest.approx((~np.isnan(y)).mean())
    original = Classifier(ClassifierConfig(labels=('a', 'b', 'c'), pos_weight=w, unlabelled='negative', **TINY))
    each = -(np.array(w) * np.nan_to_num(y) * np.log(p) + (1 - np.nan_to_num(y)) * np.log(1 - p))
    assert original.losses({'logits': torch.tensor(z)}, {'labels': torch.tensor(y)}, None)['loss'].item() == pytest.approx(each.mean(), rel=1e-6)


def test_class_loss_is_cross_entropy_over_stated_rows():
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(9, 4)), np.array([0, 1, 2, 3, np.nan, 1, 1, np.nan, 3.])
    method = Classifier(ClassifierConfig(labels=('density',), classes=tuple('ABCD'), **TINY))
    loss = method.losses({'logits': torch.tensor(z, requires_grad=True)}, {'labels': torch.tensor(y[:, None])}, None)['loss']
    rows = np.flatnonzero(~np.isnan(y))
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert loss.item() == pytest.approx(-log_p[rows, y[rows].astype(int)].mean(), rel=1e-9)
    none = torch.tensor(z, requires_grad=True)
    method.losses({'logits': none}, {'labels': torch.full((9, 1), float('nan'))}, None)['loss'].backward()
    assert none.grad.abs().sum() == 0


def test_chunks_give_the_gradient_of_the_whole_batch(data):
    method = new_classifier('efficientnet-tiny', ('mass', 'calcification'), frozen=False, pos_weight=(3., 5.), dropout=0., drop_connect=0.).eval()
    set_ = TargetImages(part(data, 'train'), method.config.labels)
    from medvl.data.batch import collate
    batch, found = collate([set_[i] for i in range(8)]), []
    for chunk in (None, 3):
        method.zero_grad()
        backward_batch(method, batch, StepState(), chunk)
        found.append([p.grad.clone() for p in method.parameters()])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fine_tuning_learns_what_is_there(data, tmp_path):
    "The mean grey carries `mass` (of the noise images), but images are min-max scaled; brightness patches are what is left to learn."
    images = torch.zeros(24, 1, 1, 64, 40)
    y = torch.tensor([1., 0.] * 12)[:, None]
    images[:, :, :, 12:26, 10:24] = 255.
    images[1::2] = images[1::2].roll(24, -2)
    method = new_classifier('efficientnet-tiny', 'mass', frozen=False, dropout=0., drop_connect=0., bn_momentum=.3)
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    for _ in range(15):
        method.train(); optimiser.zero_grad()
        method({'images': images, 'labels': y})['loss'].backward()
        optimiser.step()
    assert auroc(y[:, 0].numpy(), method.eval().predict(images)[:, 0].detach().numpy()) == 1.0


def test_saved_classifiers_come_back(data, clip, tmp_path):
    for method in (new_classifier(clip, ('mass', 'calcification'), pos_weight=(2., 3.)), new_classifier(clip, 'density', 'ABCD', frozen=False)):
        again = from_pretrained(save_pretrained(method.eval(), tmp_path / method.config.labels[0]))
        x = torch.from_numpy(np.asarray(data.images[0]))[None, None]
        assert again.config == method.config and torch.equal(again.predict(x), method.predict(x))


def test_another_architecture_is_refused(clip, tmp_path):
    torch.save({'model': clip.state_dict()}, tmp_path / 'clip.tar')
    method = new_classifier('efficientnet-tiny', 'mass', seed=3)
    report = load_encoder(method, tmp_path / 'clip.tar')
    assert report.complete and not changed(method, encoder_of(clip))
    other = new_classifier('efficientnet-lite0', 'mass')
    before = encoder_of(other)
    with pytest.raises(DataError, match='not the weights of efficientnet-lite0.*mismatched'): load_encoder(other, tmp_path / 'clip.tar')
    assert not changed(other, before)
    with pytest.raises(DataError, match='not the weights of efficientnet-lite0'): new_classifier(clip, 'mass', image_encoder='efficientnet-lite0')
    torch.save({'model': {'text_encoder.x': torch.zeros(2)}}, tmp_path / 'text.tar')
    with pytest.raises(DataError, match='0 tensors loaded'): load_encoder(method, read_checkpoint(tmp_path / 'text.tar'))
    with pytest.raises(TypeError, match='no image encoder'): new_classifier(torch.nn.Linear(2, 2), 'mass')


@pytest.mark.parametrize('fields, message', [(dict(labels=()), 'at least one'), (dict(labels=('a', 'a')), 'each once'), (dict(labels=('a', 'b'), classes=('x', 'y')), 'one column'),
                                             (dict(classes=('x',)), 'two different'), (dict(pos_weight=(1., 2.)), 'one positive number'), (dict(pos_weight=(0.,)), 'one positive number'),
                                             (dict(live=True, frozen=False), 'frozen encoder'), (dict(unlabelled='drop'), 'unlabelled')])
def test_settings_that_contradict(fields, message):
    with pytest.raises(ValueError, match=message): Classifier(ClassifierConfig(**{**TINY, **fields}))


# ------------------------------------------------------------------------------------------------ targets

def test_weights_of_the_original():
    "Formula against the numbers in the original's code (spec 1.11)."
    vindr = pd.DataFrame({'label_mass': [1] * 989 + [0] * 15402, 'label_calc': [1] * 428 + [0] * 15963})
    assert positive_weights(vindr, ('mass', 'calc')) == pytest.approx((15.573306, 37.296729), abs=1e-6)
    n, positive = (13682, 13612, 13646, 13766), (294, 284, 292, 288)
    rsna = pd.concat([pd.DataFrame({'fold': k, 'label_cancer': [1] * p + [0] * (m - p)}) for k, (m, p) in enumerate(zip(n, positive))])
    found = [positive_weights(rsna[rsna.fold != k], 'cancer')[0] for k in range(4)]
    assert found == pytest.approx([46.4815, 46.0183, 46.4134, 46.0575], abs=5e-5)
    assert positive_weights(rsna, 'cancer', limit=10.) == (10.,)


def test_weights_count_stated_rows_only():
    m = pd.DataFrame({'label_mass': [1, 0, 0, np.nan, np.nan, 0]})
    assert positive_weights(m, 'mass') == (3.,)
    with pytest.raises(DataError, match='no positive among the 4 training images'): positive_weights(m.assign(label_mass=m.label_mass * 0), 'mass')
    with pytest.raises(DataError, match='no negative'): positive_weights(m.assign(label_mass=m.label_mass * 0 + 1), 'mass')


def test_any_column_is_a_label(data):
    m = data.manifest.assign(implant=['yes', 'no', None, 'TRUE'] * (len(data) // 4))
    assert np.array_equal(label_values(m, 'implant')[:4], [1, 0, np.nan, 1], equal_nan=True)
    with pytest.raises(DataError, match="'implant'"): label_values(m, 'implnt')
    with pytest.raises(DataError, match='neither 1 nor 0'): label_values(m, 'density')
    with pytest.raises(DataError, match='none of the classes A, B'): target_matrix(m, 'density', 'AB')
    with pytest.raises(ValueError, match='exactly one with classes'): target_matrix(m, ('density', 'mass'), 'ABCD')
    sets = [TargetImages(data, 'density', 'ABCD'), TargetImages(data, 'density', 'DCBA'), TargetImages(data, ('mass',))]
    assert len({s.digest for s in sets}) == 3 and sets[0][3]['labels'] == 3 - sets[1][3]['labels']


def test_labels_of_a_table(data, tmp_path):
    table = pd.DataFrame({'image_id': data.manifest.image_id[::-1], 'second_read': ['1', '0', ''] * 53 + ['1']})
    table.to_csv(tmp_path / 't.csv', index=False)
    out = with_labels(data, tmp_path / 't.csv')
    want = table.set_index('image_id').second_read.reindex(data.manifest.image_id).replace({'': np.nan}).astype(float).to_numpy()
    assert np.array_equal(out.manifest.label_second_read, want, equal_nan=True) and 'second_read' in out.labels and 'second_read' not in data.labels
    assert out.digest != data.digest
    with pytest.raises(DataError, match='contradict'): with_labels(data, pd.concat([table, table.assign(second_read='1')]))
    with pytest.raises(DataError, match='no image_id of the table'): with_labels(data, table.assign(image_id='nobody').drop_duplicates('image_id'))
    with pytest.raises(DataError, match='image_id'): with_labels(data, table.rename(columns={'image_id': 'imageid'}))


def test_one_class_is_said_before_training(data):
    train_, valid = part(data, 'train'), part(data, 'valid')
    assert list(check_targets({'train': train_, 'valid': valid}, ('mass', 'density')[:1]).part) == ['train', 'valid']
    nobody = with_split(valid, label_mass=np.zeros(len(valid), np.float32))
    with pytest.raises(DataError, match='mass: no positive among the 32 valid images'): check_targets({'train': train_, 'valid': nobody}, 'mass')
    with pytest.raises(DataError, match='no positive among the 32 validation'): Validator(nobody, ('mass',))
    with pytest.raises(DataError, match='one class only'): check_targets({'train': with_split(train_, density='A')}, 'density', CLASSES['density'])
    with pytest.raises(DataError, match='all of one group'): groups_of(nobody.manifest, 'mass')


# ------------------------------------------------------------------------------------------------ balanced sampling

CODES = np.array([0] * 93 + [1] * 5 + [-1] * 4)


def test_even_draws_have_exact_shares_and_equal_counts():
    shares = shares_of(CODES)
    run = [balanced_order(CODES, shares, 96, seed=2, epoch=e) for e in range(10)]
    for order in run:
        assert [int((CODES[order[i:i + 8]] == 1).sum()) for i in range(0, 96, 8)] == [4] * 12
    count = np.bincount(np.concatenate(run), minlength=len(CODES))
    assert count[-4:].sum() == 0 and np.ptp(count[:93]) <= 1 and np.ptp(count[93:98]) <= 1
    assert not np.array_equal(run[0], run[1]) and not np.array_equal(run[0], balanced_order(CODES, shares, 96, seed=3, epoch=0))


@pytest.mark.parametrize('shares', [(.5, .5), (.75, .25), (.9, .1), (1 / 3, 2 / 3)])
def test_every_stretch_has_its_share(shares):
    order = CODES[balanced_order(CODES, shares_of(CODES, shares=shares), 400, 0, 0)]
    assert np.abs(np.cumsum(order == 1) - shares[1] * np.arange(1, 401)).max() <= 1


def test_weighted_draws_have_the_shares_on_average():
    shares = reference_shares(CODES, [0] * 90 + [1] * 10)
    assert shares == pytest.approx([93 / 90 / (93 / 90 + .5), .5 / (93 / 90 + .5)])
    drawn = CODES[np.concatenate([balanced_order(CODES, shares, 500, 1, e, 'weighted') for e in range(20)])]
    assert set(drawn) == {0, 1} and (drawn == 1).mean() == pytest.approx(shares[1], abs=4 * np.sqrt(shares[1] * shares[0] / 10_000))


@pytest.mark.parametrize('how', ['even', 'weighted'])
def test_ranks_and_resume(how):
    make = lambda size, **kw: list(BalancedBatches(CODES, size, seed=4, epoch=3, how=how, **kw))
    whole = make(8)
    assert [sum(parts, []) for parts in zip(*[make(2, rank=r, world=4) for r in range(4)])] == whole
    assert make(8, start_step=5) == whole[5:] and len(whole) == 98 // 8


def test_balanced_run_resumes_to_the_same_weights(data, clip, tmp_path):
    def run(folder, steps):
        method = new_classifier(clip, 'calcification')
        set_ = Balanced(TargetImages(part(data, 'train'), 'calcification', train=True), 'calcification')
        config = TrainConfig(max_steps=steps, schedule='constant', save_every=2, **TRAIN)
        train(method, set_, config, folder)
        return method.head.weight.detach()
    whole, _ = run(tmp_path / 'a', 6), run(tmp_path / 'b', 4)
    assert torch.equal(run(tmp_path / 'b', 6), whole)
    plain = new_classifier(clip, 'calcification')
    with pytest.raises(DataError, match='holds another run'):
        train(plain, TargetImages(part(data, 'train'), 'calcification', train=True), TrainConfig(max_steps=6, schedule='constant', save_every=2, **TRAIN), tmp_path / 'b')
    assert len(read_jsonl(tmp_path / 'b' / 'metrics.jsonl')) == 6


def test_what_cannot_be_balanced(data):
    with pytest.raises(DataError, match="'calcification'"): Balanced(TargetImages(data, 'mass'), 'calcificaton')
    with pytest.raises(ValueError, match='no shares'): shares_of(CODES, shares=(1.,))
    with pytest.raises(ValueError, match='power'): shares_of(CODES, power=2.)
    with pytest.raises(ValueError, match='every group'): reference_shares([0, 1], [0, 0])
    with pytest.raises(ValueError, match="'even'"): BalancedBatches(CODES, 8, how='evn')


# ------------------------------------------------------------------------------------------------ folds

def test_folds_are_three_different_ones(data):
    folded = with_folds(data, 4, ('label_calcification',))
    judged = []
    for k, parts in each_fold(folded):
        who = {name: set(p.manifest.patient_id) for name, p in parts.items()}
        assert not (who['train'] & who['valid'] or who['train'] & who['test'] or who['valid'] & who['test'])
        assert set(parts['test'].manifest.fold) == {k} and all(set(p.manifest.split) == {name} for name, p in parts.items())
        judged += list(who['test'])
    assert sorted(judged) == sorted(data.manifest.patient_id.unique())
    paper = fold_parts(folded, scheme='paper')
    assert {n: sorted(set(p.manifest.fold)) for n, p in paper.items()} == {'train': [1, 2], 'valid': [0]}  # nothing is left to judge on
    with pytest.raises(DataError, match="split 'test'"): classification(new_classifier('efficientnet-tiny', 'mass'), paper, n_boot=0)
    with pytest.raises(DataError, match='is in 4 folds'): check_folds(data.manifest.assign(fold=np.arange(len(data)) % 4))
    with pytest.raises(ValueError, match='separate'): fold_parts(folded, scheme='seperate')


def test_shares_are_nested_and_by_patient(data):
    parts = {s: part(data, s) for s in ('train', 'valid', 'test')}
    before, last = len(parts['valid']), set()
    for f in (.1, .3, .6, 1.):
        out = training_share(parts, f, ('label_mass',), seed=3)
        now = set(out['train'].manifest.patient_id)
        assert last < now and len(out['valid']) == before and len(out['train']) == 4 * len(now)
        last = now
    assert last == set(parts['train'].manifest.patient_id)


def test_validation_is_cut_from_training(data):
    two = with_split(data, split=data.manifest.split.replace('valid', 'train'))
    three = with_validation(two, .2)
    assert (three.manifest.split == 'valid').any() and ((three.manifest.split == 'test') == (data.manifest.split == 'test')).all()
    assert three.manifest.groupby('patient_id').split.nunique().max() == 1


# ------------------------------------------------------------------------------------------------ the protocol

def test_scores_of_images_breasts_and_patients(data, clip):
    method, test = new_classifier(clip, ('mass', 'calcification')), part(data, 'test')
    p = predict_images(method, test, batch_size=7)
    for unit, keys in (('image', ['image_id']), ('breast', ['patient_id', 'laterality']), ('patient', ['patient_id'])):
        found = scored_predictions(method, test, 'test', unit)['calcification']
        frame = test.manifest.assign(p=p[:, 1]).groupby(keys, sort=False).agg(p=('p', 'mean'), y=('label_calcification', 'max'))
        np.testing.assert_allclose(found.scores, frame.p, rtol=1e-4); np.testing.assert_array_equal(found.labels, frame.y)
    with pytest.raises(LeakError): scored_predictions(method, test, 'valid')
    with pytest.raises(TypeError, match='predict'): predict_images(clip, test)
    with pytest.raises(ValueError, match='precision'): predict_images(method, test, precision='fp23')


def test_thresholds_come_from_validation_and_leaks_stop(data, clip):
    method = new_classifier(clip, 'mass')
    result = classification(method, data, n_boot=20, by=())
    valid = scored_predictions(method, part(data, 'valid'), 'valid')['mass']
    assert set(result.evaluation.thresholds[('mass', 'youden')].__dict__) and result.evaluation.thresholds[('mass', 'youden')].value in valid.scores
    assert set(result.table.split) == {'test'} and result.table.set_index('metric').value['auroc'] == pytest.approx(
        auroc(result.scored['test']['mass'].labels[~np.isnan(result.scored['test']['mass'].labels)], result.scored['test']['mass'].scores[~np.isnan(result.scored['test']['mass'].labels)]))
    split = data.manifest.split.copy(); split[0] = 'test' if split[0] != 'test' else 'train'
    with pytest.raises(DataError, match='leak'): classification(method, with_split(data, split=split), n_boot=0)


def test_training_chooses_by_validation_auroc(data, clip, tmp_path):
    train_, valid = part(data, 'train'), part(data, 'valid')
    method = new_classifier(clip, ('mass', 'calcification'), pos_weight=positive_weights(train_.manifest, ('mass', 'calcification')))
    validator = Validator(valid, method.config.labels, unit='breast')
    result = train(method, TargetImages(train_, method.config.labels), TrainConfig(epochs=2, monitor=validator.monitor, mode='max', **TRAIN), tmp_path, validate=validator)
    best = from_pretrained(tmp_path / 'best')
    assert validator(best)['valid_auroc'] == pytest.approx(result.best_value, abs=1e-6)


def test_folds_pool_to_every_patient_once(data, clip):
    method, folded = new_classifier(clip, 'calcification'), with_folds(data, 4, ('label_calcification',))
    results = {k: classification(method, parts, n_boot=0, by=(), check=False) for k, parts in each_fold(folded)}
    pooled, own = out_of_fold(results, ('auroc',), n_boot=0)
    p, y = predict_images(method, data)[:, 0], data.manifest.label_calcification.to_numpy()
    assert pooled.table.value.iloc[0] == pytest.approx(auroc(y, p), abs=1e-6) and len(own) == 4
    with pytest.raises(DataError, match='judged by 2 folds'): out_of_fold({0: results[0], 1: results[0]})


# ------------------------------------------------------------------------------------------------ label efficiency

def test_the_sweep_is_its_probes(data):
    e = made_embeddings(data)
    e.facts.clear()
    parts = {s: part(data, s) for s in ('train', 'valid', 'test')}
    options = dict(labels=['mass', 'calcification', 'density'], fractions=(.25, 1.), seeds=(0, 1), embeddings=e, check=False)
    method = new_classifier('efficientnet-tiny', 'mass')
    sweep, one = label_efficiency(method, parts, n_boot=50, **options), linear_probe(method, parts, n_boot=50, by=(), **options)
    key = ['task', 'metric', 'fraction', 'seed']
    both = sweep.table[sweep.table.value.notna()].merge(one.table[one.table.rule.isna()], on=key, suffixes=('', '_one'))
    assert len(both) == 3 * 2 * 3 and {'auroc', 'average_precision', 'class_accuracy', 'class_macro_f1'} == set(both.metric)
    for c in ('value', 'low', 'high', 'C', 'train_patients'): np.testing.assert_allclose(both[c], both[f'{c}_one'], atol=1e-9)
    curve = sweep.curve.set_index(['task', 'metric', 'fraction'])
    values = both[(both.task == 'mass') & (both.metric == 'auroc') & (both.fraction == .25)].value
    row = curve.loc['mass', 'auroc', .25]
    assert (row['mean'], row.least, row.most) == pytest.approx((values.mean(), values.min(), values.max())) and row.low < row['mean'] < row.high
    assert len(plot_label_efficiency(sweep.curve).axes) == 3
    assert sweep.curve.query("task == 'mass' and metric == 'auroc' and fraction == 1").fits.item() == 1


def test_a_subset_with_one_class_is_a_row_not_a_crash(data):
    rare = with_split(data, label_mass=(data.manifest.patient_id.isin(['p1', 'p6', 'p3', 'p4', 'p8', 'p9'])).astype(np.float32))
    e = made_embeddings(rare)
    e.facts.clear()
    sweep = label_efficiency(new_classifier('efficientnet-tiny', 'mass'), rare, 'mass', (.05, 1.), (0, 1, 2), embeddings=e, n_boot=10, check=False)
    low = sweep.table[sweep.table.fraction == .05]
    assert low.value.isna().all() and low.note.str.contains('one class only').all() and 'not computable' in repr(sweep)
    assert sweep.curve.set_index('fraction').fits.to_dict() == {.05: 0, 1.: 1}


def test_embeddings_of_another_model_are_refused(data, clip, tmp_path):
    from medvl.evaluate.protocols.embeddings import embed
    e = embed(clip, data, tmp_path, what='feature')
    other = new_classifier('efficientnet-tiny', 'mass', seed=9)
    with pytest.raises(DataError, match='another model|other weights'): label_efficiency(other, data, 'mass', embeddings=e, check=False)
    with pytest.raises(ValueError, match="'mass'"): label_efficiency(clip, data, 'mas', embeddings=e, check=False)
