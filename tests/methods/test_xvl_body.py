"""X-VL on other parts of the body: mammograms of the phantom, and the abdomens of VQA-RAD."""
import numpy as np
import pandas as pd
import pytest
import torch
from golden import sample

from medvl.attribute.self_attention import head_maps
from medvl.data.augment.makers import new_augment
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.data.prepare.run import prepare
from medvl.data.releases.questions import read_vqa_rad
from medvl.data.samples.builders import Parts, new_samples
from medvl.data.schema import Report, Source, empty
from medvl.evaluate.protocols.match_retrieval import match_retrieval
from medvl.evaluate.protocols.match_zero_shot import match_zero_shot
from medvl.evaluate.protocols.word_probe import probe_words
from medvl.evaluate.stats.selection import splits_of
from medvl.methods.base import StepState
from medvl.methods.recipes import new_method, recipe


def one_step(prepared, name='smoke'):
    "A method of a recipe, one training step on a data set, and its training images."
    r, part = recipe('xvl', name), splits_of(prepared, needed=('train',))['train']
    method = new_method('xvl', name, [t for t in prepared.manifest.report if t], image_size=tuple(prepared.images.shape[1:]))
    data = new_samples('captions', Parts({'train': part}), 'train', method.tokenizer, {**r.sample_options, 'view_names': (), 'sections': ('findings', 'impression')}, True)
    batch = new_augment(r.augment, r.augment_options, r.versions)(data.collate([data[0, i] for i in range(6)]), 0, 0)
    out = method.train()(batch, StepState(step=1))
    out['loss'].backward()
    assert torch.isfinite(out['loss']) and any(p.grad.abs().sum() > 0 for p in method.image_encoder.parameters() if p.grad is not None)
    return method.eval(), part


@pytest.fixture(scope='module')
def mammograms(tmp_path_factory): return prepared_phantom(tmp_path_factory.mktemp('breasts'), 12, (96, 64))


@pytest.mark.parametrize('name', ['smoke', 'smoke-2022'])
def test_mammograms(mammograms, name, tmp_path):
    "Images of another shape, reports of another kind: training, zero-shot by match with mammography's prompts, retrieval, hidden words, maps."
    method, part = one_step(mammograms, name)
    found = match_zero_shot(method, mammograms, 'mammo', split=None, n_boot=16, check=False, baseline=False)
    assert {'mass'} <= {t.lower() for t in found.table.task} and found.table.value.dropna().between(0, 1).all()
    hits = match_retrieval(method, mammograms, top=4, split=None, unit='breast', n_boot=16, check=False, batch=8)
    assert len(hits.moved()) and hits.table.value[hits.table.metric == 'recall@1'].between(0, 1).all()
    rows = np.flatnonzero(mammograms.manifest.report != '')[:4]
    probe = probe_words(method, mammograms.images.read(mammograms.manifest.row.to_numpy()[rows])[:, None], mammograms.manifest.report.iloc[rows].tolist(), ['a', 'b', 'c', 'd'], limit=2)
    assert len(probe) and np.isfinite(probe.log_prob).all()
    if name == 'smoke-2022': assert head_maps(method, torch.zeros(1, 1, 96, 64)).shape[2:] == (6, 4)


def test_abdomens_of_vqa_rad(tmp_path):
    "Real CT slices of the abdomen with what was asked about them as text, from the release's files to a step and a gallery."
    root = sample('vqa_rad/trainset.json').parent
    q = read_vqa_rad(root, organs=('abd',)).table
    q = q[q.image_id.isin(sorted(q.image_id.unique())[:14])]
    said = q.assign(s=q.question.str.rstrip('?. ') + ' ' + q.answer + '.').groupby('image_id').s.apply(lambda s: ' '.join(s.head(3)))
    one = q.drop_duplicates('image_id').set_index('image_id')
    records = pd.DataFrame(dict(image_path=one.image_path, image_id=one.index, patient_id=one.patient_id, exam_id=one.patient_id, laterality='', view='OTHER', source='vqa_rad', split='train',
                                report_text=[said[i] for i in one.index])).reset_index(drop=True)
    report = Report('VQA-RAD')
    report.account_images(records.image_id, records.image_id)
    (tmp_path/'salt.txt').write_text('a salt for tests\n')
    prepared = prepare(Source(records, empty('boxes'), empty('sentences'), report), root, tmp_path/'prepared', profile='letterbox_v1', size=(64, 64), jobs=1, backend='sequential', salt=tmp_path/'salt.txt')
    assert len(prepared) >= 12 and set(q.organ) == {'abd'}
    method, _ = one_step(prepared)
    hits = match_retrieval(method, prepared, top=3, split=None, n_boot=16, check=False, batch=0)
    assert hits.table.candidates.max() == len(set(prepared.manifest.report))
    maps, words = method.word_maps(torch.from_numpy(prepared.images.read([0]))[:, None], [prepared.manifest.report.iloc[0]])
    assert maps.shape[1] == len(words[0]) > 3
