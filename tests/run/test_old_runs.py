"""Runs, models, scripts and numbers of before issue 9 go on: made here, and put back into the form they had (`ADDED`: what has come since, compared with files that the code of before wrote)."""
import copy
import warnings
from dataclasses import fields, replace

import contract
import pytest
import torch

from medvl.core.errors import DataError
from medvl.core.paths import read_json, sha256_file, write_json
from medvl.data.balanced import Mixture
from medvl.data.samples.builders import Parts, new_samples
from medvl.methods.base import CONFIG, from_pretrained, save_pretrained
from medvl.methods.recipes import recipe
from medvl.train.checkpoint import CHECKSUMS, STATE, checkpoints

GLOBAL = ('global_objective', 'global_stage', 'learn_temperature', 'predictor_hidden', 'predictor_stop', 'projection_dropout', 'region_grid', 'region_stage',
          'sentence_encoding', 'sentence_pool', 'text_places')
ADDED = {'mammoclip': ('gem_power', 'learn_gem', 'learn_temperature'), 'classifier': ('gem_power', 'learn_gem'), 'clip': GLOBAL, 'convirt': GLOBAL,
         'lovt': (*GLOBAL, 'attended_dropout', 'attention_keys', 'attention_outputs', 'attention_values', 'join_global', 'learn_local_temperature', 'region_objectives',
                  'sentence_objectives', 'sentence_unit', 'weights_gradient'),
         'segmenter': ('head_dropout', 'head_norm', 'hidden', 'stage')}
SETTINGS_ADDED = ('clip_each', 'clip_names', 'plateau_mode')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder, kept = tmp_path_factory.mktemp('cases'), {}
    def of(name):
        if name not in kept: kept[name] = contract.new_case(folder, name)
        method, *rest = kept[name]
        return copy.deepcopy(method), *rest
    of.folder = folder
    return of


def without(stored, names):
    assert set(names) <= set(stored), set(names) - set(stored)
    return {k: v for k, v in stored.items() if k not in names}


def as_before(folder, name):
    "Take from a run's checkpoints what the code of before did not write."
    for point in checkpoints(folder/'checkpoints'):
        state = read_json(point/STATE)
        run = state['run']
        run['method'], run['train'] = without(run['method'], ADDED.get(name, ())), without(run['train'], SETTINGS_ADDED)
        if run['train']['plateau_monitor'] == 'valid_auroc': run['train']['plateau_monitor'] = 'valid_auroc_missed'
        write_json(point/STATE, state)
        sums = read_json(point/CHECKSUMS)
        sums[STATE] = {'bytes': (point/STATE).stat().st_size, 'sha256': sha256_file(point/STATE)}
        write_json(point/CHECKSUMS, sums)


PLATEAU = dict(schedule='plateau', plateau_monitor='valid_auroc', plateau_mode='max', warmup=0)


@pytest.mark.parametrize('name', ['mammoclip', 'lovt', 'clip', 'byol', 'supervised', 'classifier', 'segmenter'])
def test_a_half_finished_run_goes_on(name, made, tmp_path):
    "To the bits of a run that was never killed."
    method, data, transform = made(name)
    changes, make = PLATEAU if name == 'supervised' else {}, lambda: copy.deepcopy(method)
    contract.train_small(make, data, transform, tmp_path/'whole', 3, **changes)
    contract.killed_run(make, data, transform, tmp_path/'cut', **changes)
    as_before(tmp_path/'cut', name)
    contract.train_small(make, data, transform, tmp_path/'cut', 3, **changes)
    contract.check_same_end(tmp_path/'whole', tmp_path/'cut')


def test_what_has_come_since_counts_where_it_is_used(made, tmp_path):
    "An old run had none of it: with it, the run is another one. So is a run whose own settings differ."
    method, data, transform = made('clip')
    contract.killed_run(lambda: copy.deepcopy(method), data, transform, tmp_path)
    as_before(tmp_path, 'clip')
    for changes, says in ((dict(projection_dropout=.1), 'projection_dropout: 0.0 -> 0.1'), (dict(temperature=.2), 'temperature: 0.1 -> 0.2')):
        other = copy.deepcopy(method)
        other.config = replace(other.config, **changes)
        with pytest.raises(DataError, match=f'another run: method.{says}'): contract.train_small(lambda other=other: other, data, transform, tmp_path, 3)


@pytest.mark.parametrize('name', sorted(ADDED))
def test_a_model_of_before_opens(name, made, tmp_path):
    "Its configuration lacks what has come since, and it says what it said."
    method, data, transform = made(name)
    batch = contract.new_batch(data, transform)
    save_pretrained(contract.stirred(method), tmp_path/'m')
    stored = read_json(tmp_path/'m'/CONFIG)
    write_json(tmp_path/'m'/CONFIG, {**stored, 'config': without(stored['config'], ADDED[name])})
    contract.same(contract.told(method, batch), contract.told(from_pretrained(tmp_path/'m'), batch), name)


def test_the_validation_of_a_mixture_is_that_of_before(made):
    "Every sample once, in one order, whatever the shares and the seed of training: the experiment `pretrain_labels` made it so."
    method = made('mammoclip')[0]
    parts = contract.parts_of(str(made.folder), 'breast', 16, recipe('mammoclip', 'smoke').size)
    source, options = Parts(parts, parts), {**recipe('mammoclip', 'smoke').sample_options, 'seed': 3, 'labels_share': .2}
    valid, training = (new_samples('mixture', source, part, method.tokenizer, options, part == 'train') for part in ('valid', 'train'))
    before = Mixture(dict(zip(valid.names, valid.sources)))
    assert valid.digest == before.digest and valid.counts == [len(s) for s in valid.sources] and valid.balance is None
    assert training.balance == pytest.approx((.8, .2)) and training.seed == 3


def test_a_script_of_before_finds_what_it_imports():
    "What the notebook e15 of before did, which stands in every sweep that was made with it: an ablation, by `replace`."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        from medvl.methods.chest_presets import chest_preset, chest_transform, new_chest_method
        from medvl.methods.lovt import ABLATIONS
        from medvl.methods.presets import new_mammoclip, preset
    named, other = chest_preset('lovt', 'smoke'), ABLATIONS['no_g']
    changed = replace(named, about='x', model={**named.model, **other.model}, text={**named.text, **other.text}, train={**named.train})
    assert {f.name for f in fields(named)} >= {'size', 'views', 'view_options', 'versions', 'keep', 'own_words'} and callable(chest_transform(changed, blur=0.0))
    method = new_chest_method('lovt', 'smoke', ['No mass.'], 1, **changed.model)
    assert (method.config.i2t_weight, method.config.t2i_weight) == (0, 0) and replace(preset('smoke'), size=(64, 64)).size == (64, 64)
    assert isinstance(new_mammoclip('smoke', ['No mass.']), torch.nn.Module)
