"""BERT's pre-training against the numbers of the EHR original: losses, gradients and whole trainings; size; resume; the folder that it leaves."""
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from golden import golden
from training import contents

from medvl.core.errors import DataError
from medvl.data.releases.ehr_codes import CodedPatient, CodeSequences, CodeVocabulary
from medvl.data.samples.text_pairs import MaskConfig, TextPairs
from medvl.data.text.tokens import build_wordpiece
from medvl.losses.next_sentence import next_sentence_loss
from medvl.methods.base import StepState, from_pretrained, save_pretrained
from medvl.methods.bert_pretraining import ORIGINAL, BertPretraining, BertPretrainingConfig
from medvl.train.loop import train
from medvl.train.optim import lr_scale, make_optimizer, set_lr
from medvl.train.settings import TrainConfig


def v(n, salt):
    "The value formula of the golden README."
    mask = 0xFFFFFFFF
    h = (np.arange(n, dtype=np.uint64) * 2654435761 + salt * 2246822519 + 374761393) & mask
    h ^= h >> np.uint64(16); h = h * 0x85EBCA6B & mask; h ^= h >> np.uint64(13); h = h * 0xC2B2AE35 & mask; h ^= h >> np.uint64(16)
    return (h + .5) / 2.0**31 - 1


def formula_bert(config, weights, pair, dtype=torch.float64):
    c = config
    method = BertPretraining(BertPretrainingConfig(c['vocab'], c['hidden'], c['layers'], c['heads'], c['intermediate'], c['positions'], c['types'], 0., pair))
    own = method.network.state_dict()
    with torch.no_grad():
        for w in weights:
            if 'tied_to' in w: continue
            own[w['name']].copy_(torch.from_numpy((w['offset'] + w['scale'] * v(int(np.prod(w['shape'])), w['salt'])).reshape(w['shape']).astype(np.float32)))
    return method.to(dtype)


def batch_of(arrays):
    t = lambda k: torch.from_numpy(arrays[k].astype(np.int64))
    out = {'masked': {'input_ids': t('input_ids')[:, None], 'attention_mask': t('attention_mask')[:, None]}, 'segments': t('token_type_ids')[:, None], 'word_labels': t('labels')[:, None],
           'sample_id': [str(i) for i in range(len(arrays['labels']))]}
    return {**out, **({'pair': t('long_stay_label').flatten()} if 'long_stay_label' in arrays else {})}


@pytest.mark.parametrize('case', ['mlm', 'mlm_p15', 'mlm_nsp'])
def test_losses_logits_and_gradients_are_the_originals(case):
    told, z, d = json.loads(golden('cardiomegaly/bert_tiny.json').read_text())[case], np.load(golden('cardiomegaly/bert_tiny.npz')), np.load(golden('cardiomegaly/ehr_dataset.npz'))
    source, pair = told['batch_from'], case == 'mlm_nsp'
    stem = f'{source["case"]}/seed{source["seed"]}/'
    batch = batch_of({k.removeprefix(stem): d[k][source['rows']] for k in d.files if k.startswith(stem)})
    method = formula_bert(told['config'], told['weights'], pair).eval()
    features = method.encode(batch)
    losses = method.losses(features, batch, StepState())
    want = {k.removeprefix(f'{case}/f64/'): z[k] for k in z.files if k.startswith(f'{case}/f64/')}
    close = lambda a, b: np.testing.assert_allclose(a.detach().numpy(), b, rtol=0, atol=1e-10)
    close(losses['loss'], want['loss']); close(losses['mlm'], want['loss_mlm'])
    close(features['words'], want['last_hidden'])
    logits = method.network.cls(features['words'], features['whole']) if pair else (method.network.cls(features['words']),)
    close(logits[0], want['mlm_logits'])
    if pair: close(logits[1], want['seq_logits']); close(losses['pair'], want['loss_long_stay'])
    assert float(losses['guessed']) == pytest.approx(float(want['mlm_accuracy_pooled_tokens']), abs=1e-6)
    losses['loss'].backward()
    parameters = dict(method.network.named_parameters())
    for name in (k for k in want if k.startswith('grad/')): close(parameters[name.removeprefix('grad/')].grad, want[name])
    close(torch.stack([parameters[n].grad.norm() for n in told['parameter_order']]), want['grad_l2'])
    single = formula_bert(told['config'], told['weights'], pair, torch.float32).eval()
    assert single(batch)['loss'].item() == pytest.approx(float(z[f'{case}/f32/loss']), rel=1e-5)


@pytest.mark.parametrize('case', ['mlm', 'mlm_nsp'])
def test_whole_trainings_are_the_originals(case):
    "Two epochs with the old AdamW and a linear fall: losses, rates and weights."
    told, z = json.loads(golden('cardiomegaly/training_trace.json').read_text())[case], np.load(golden('cardiomegaly/training_trace.npz'))
    base, pair = told['weights_base'], told['kind'] == 'nsp'
    listed = json.loads(golden('cardiomegaly/bert_tiny.json').read_text())[case]['weights'] # the same names, shapes and salts
    assert listed[0]['salt'] == base
    method = formula_bert(told['config'], listed, pair, torch.float32).eval()
    optimizer = make_optimizer(method, told['lr'], 0., 'adamw_reference', no_decay=())
    arrays, losses, rates, n = {k.removeprefix(f'{case}/batches/'): z[k] for k in z.files if k.startswith(f'{case}/batches/')}, [], [], told['batch']
    for step in range(len(z[f'{case}/losses'])):
        at = step * n % len(arrays['labels'])
        batch = batch_of({k: a[at:at + n] for k, a in arrays.items()})
        rates.append(set_lr(optimizer, lr_scale(step, told['total_steps'], 0, 'linear')))
        optimizer.zero_grad()
        loss = method(batch)['loss']
        loss.backward(); optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(rates, z[f'{case}/lrs'], rtol=1e-9)
    np.testing.assert_allclose(losses, z[f'{case}/losses'], rtol=0, atol=1e-4)
    own = method.network.state_dict()
    for k in (k for k in z.files if k.startswith(f'{case}/param_after/')): np.testing.assert_allclose(own[k.split('param_after/')[1]], z[k], rtol=0, atol=1e-4)


def test_the_originals_model_has_its_size():
    facts = json.loads(golden('cardiomegaly/ehr_facts.json').read_text())
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device('meta'): one, two = (BertPretraining(BertPretrainingConfig(**{**ORIGINAL, 'pair': pair})) for pair in (False, True))
    want = facts['parameters']
    assert (count(one), count(two)) == (want['masked_lm'], want['masked_lm_plus_pair_head'])
    assert one.network.bert.embeddings.word_embeddings.weight.numel() == want['word_embeddings'] and count(one.network.bert.encoder) == want['encoder']


def test_the_originals_rate_is_0_for_nine_tenths_of_its_steps_and_ours_is_not():
    facts, runs = json.loads(golden('cardiomegaly/ehr_facts.json').read_text())['dynamic_script'], json.loads(golden('cardiomegaly/scripts_and_resume.json').read_text())
    assert facts['steps_with_nonzero_lr'] * 10 == facts['steps_in_all']
    told = runs['dynamic_10_blocks_of_2_epochs']
    lr, setup, steps = told['run']['lr_used'], told['setup'], len(told['run']['lr_used'])
    theirs = [setup['base_lr'] * lr_scale(min(s, setup['schedule_steps']), setup['schedule_steps'], 0, 'linear') for s in range(steps)]
    np.testing.assert_allclose(theirs, lr, rtol=1e-9, atol=1e-15)
    assert sum(x > 0 for x in lr) == 8 and steps == 80
    assert all(lr_scale(s, steps, 0, 'linear') > 0 for s in range(steps)), 'one horizon over all blocks'
    for name in ('fixed_3_epochs_workers0', 'fixed_3_epochs_workers2'):
        run, setup = runs[name]['first_run'], runs[name]['setup']
        np.testing.assert_allclose(run['lr_used'], [setup['base_lr'] * max(0, 1 - s / setup['schedule_steps']) for s in range(len(run['lr_used']))], rtol=1e-9, atol=1e-15)
    cut = runs['interrupted_and_resumed']
    assert len(set(cut['resumed_run']['lr_used'])) == 1, 'the original resumes with a frozen rate'
    assert cut['checkpoint']['step_index'] + 1 == 7 % setup['steps_per_epoch'] or cut['checkpoint']['step_index'] == 2


# ---- ours

TEXTS = [f'FINDINGS: The {a} is {b}. IMPRESSION: {c} {a}.' for a in ('heart', 'lung', 'hilum', 'pleura') for b, c in (('enlarged', 'abnormal'), ('clear', 'normal'), ('dense', 'odd'))]


def text_data(**how):
    t = build_wordpiece(TEXTS, 200)
    return t, TextPairs([(f's{i}', f'p{i}', x) for i, x in enumerate(TEXTS)], t, MaskConfig(max_length=32, **how))


def code_data(**how):
    rng = np.random.default_rng(0)
    patients = [CodedPatient(f'p{i}', (int(rng.integers(1, 14)),), tuple(f'c{c}' for c in rng.integers(0, 40, 12)), tuple(sorted(rng.integers(1, 5, 12).tolist()))) for i in range(12)]
    words = CodeVocabulary(patients)
    return words, CodeSequences(patients, words, MaskConfig(max_length=32, **how))


def tiny(words, seed=0, segments=8, **changes):
    torch.manual_seed(seed)
    return BertPretraining(BertPretrainingConfig(**{**dict(vocab_size=len(words), width=16, layers=1, heads=2, inner=16, positions=32, segments=segments), **changes}), words if hasattr(words, 'mask_token_id') else None)


SETTINGS = dict(epochs=4, batch_size=4, lr=1e-3, schedule='linear', warmup=1, optimizer='adamw_reference', trackers=(), cpu=True, save_every=2, valid_every=4)


def fit(make, folder, killed=None, seed=0, **changes):
    words, data = make(remask_every=2)
    def judge(method, state):
        if killed and state.step >= killed: os.kill(os.getpid(), signal.SIGKILL)
        return {'valid_loss': 1 / (1 + state.step)}
    return train(tiny(words, seed), data, TrainConfig(**{**SETTINGS, **changes}), folder, validate=judge)


@pytest.mark.parametrize('make', [text_data, code_data])
def test_killed_in_a_block_it_goes_on_to_the_same_bits(make, tmp_path):
    "Blocks of two epochs of three steps: killed at step 8, in the second block; masks, rate and weights are those of a run that was not."
    fit(make, tmp_path/'whole')
    child = multiprocessing.get_context('fork').Process(target=fit, args=(make, tmp_path/'cut', 8))
    child.start(); child.join(120)
    assert child.exitcode == -signal.SIGKILL
    fit(make, tmp_path/'cut', seed=1)
    (files, rows), (other, others) = contents(tmp_path/'whole'), contents(tmp_path/'cut')
    assert files == other and rows == others
    rates = [r['lr'] for r in rows if r['kind'] == 'train']
    assert len(rates) == 12 and min(rates) > 0 and rates[1:] == sorted(rates[1:], reverse=True), 'one fall over all blocks, above 0 to the end'


def test_another_corpus_or_mask_is_refused_on_resume(tmp_path):
    fit(text_data, tmp_path, max_steps=4)
    words, data = text_data(remask_every=2)
    data.rows = data.rows[:-1]
    with pytest.raises(DataError, match='data'): train(tiny(words), data, TrainConfig(**{**SETTINGS, 'max_steps': 4}), tmp_path, validate=lambda m, s: {'valid_loss': 1.})
    with pytest.raises(DataError, match='data'): train(tiny(words), text_data(mode='static')[1], TrainConfig(**{**SETTINGS, 'max_steps': 4}), tmp_path, validate=lambda m, s: {'valid_loss': 1.})


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_trains(precision, tmp_path):
    result = fit(text_data, tmp_path, precision=precision, epochs=6, lr=5e-3)
    assert np.isfinite(result.history.loss.dropna()).all() and result.history.loss.dropna().iloc[-1] < result.history.loss.dropna().iloc[0]


def test_a_batch_in_which_nothing_is_masked_has_a_loss():
    words, data = text_data()
    batch = data.collate([data[0, i] for i in range(3)])
    method = tiny(words).eval()
    none = method({**batch, 'word_labels': torch.full_like(batch['word_labels'], -100)})
    assert float(none['mlm']) == 0 and torch.isfinite(none['loss'])
    assert float(next_sentence_loss(torch.zeros(2, 2), torch.full((2,), -100))) == 0


@pytest.mark.parametrize('change, says', [({'vocab_size': 20}, 'token'), ({'segments': 2}, 'segment'), ({'positions': 8}, 'positions')])
def test_what_no_embedding_has_is_refused(change, says):
    words, data = code_data()
    with pytest.raises(DataError, match=says): tiny(words, **change)(data.collate([data[0, i] for i in range(4)]))


def test_the_encoder_is_a_folder_that_other_methods_take(tmp_path):
    from medvl.methods.recipes import new_method
    words, _ = text_data()
    method = tiny(words, segments=2, positions=64)
    folder = method.save_encoder(tmp_path/'encoder')
    for name in ('mammoclip', 'lovt', 'xvl'):
        other = new_method(name, 'smoke', TEXTS, tokenizer=words, text_encoder=str(folder), text_pretrained=True)
        inside = other.state_dict()
        key = next(k for k in inside if k.endswith('embeddings.word_embeddings.weight'))
        assert torch.equal(inside[key], method.network.bert.embeddings.word_embeddings.weight), name


def test_saved_and_opened(tmp_path):
    words, data = text_data()
    method, batch = tiny(words).eval(), data.collate([data[0, i] for i in range(3)])
    save_pretrained(method, tmp_path/'m')
    again = from_pretrained(tmp_path/'m')
    assert torch.equal(again(batch)['loss'], method(batch)['loss']) and len(again.tokenizer) == len(words)
    codes, _ = code_data()
    save_pretrained(tiny(codes), tmp_path/'c')
    assert from_pretrained(tmp_path/'c').tokenizer is None


class Told(BertPretraining):
    "Answers with given logits."
    def token_logits(self, features): return features['words'], features.get('whole')


@pytest.mark.parametrize('case', ['mlm', 'mlm_nsp'])
def test_shares_of_guessed_words_are_pooled_and_the_originals_are_not(case):
    "Its log averages over sequences, and sums one batch too many in its first window: an accuracy of 1.25 is in the file."
    told, z = json.loads(golden('cardiomegaly/engine_metrics.json').read_text())[case], np.load(golden('cardiomegaly/engine_metrics.npz'))
    logits, masked, pair = torch.tensor(z[f'{case}/logits']), torch.tensor(z[f'{case}/masked']), case == 'mlm_nsp'
    labels = torch.where(masked, torch.tensor(z[f'{case}/labels']), -100)
    m, theirs = Told(BertPretrainingConfig(vocab_size=logits.shape[-1], width=8, layers=1, heads=2, inner=8, positions=16, pair=pair)), []
    for k in range(told['batches']):
        features, batch = {'words': logits[k]}, {'word_labels': labels[k][:, None]}
        if pair: features['whole'], batch['pair'] = torch.tensor(z[f'{case}/long_stay_logits'][k]), torch.tensor(z[f'{case}/long_stay_label'][k]).flatten()
        found, extra = m.losses(features, batch, StepState()), told['extra_not_in_original_per_batch'][k]
        assert int((labels[k] != -100).sum()) == extra['targets'] and float(found['guessed']) == pytest.approx(extra['pooled_accuracy'], abs=1e-6)
        asked = labels[k] != -100
        top = (logits[k][asked].topk(5, -1).indices == labels[k][asked][:, None]).float()
        for n in (3, 5): assert float(top[:, :n].any(1).float().mean()) == pytest.approx(extra[f'pooled_top{n}'], abs=1e-6)
        right = (logits[k].argmax(-1) == labels[k]) & asked
        theirs.append(float(np.mean([float(r.sum() / a.sum()) for r, a in zip(right, asked) if a.any()])))
        assert theirs[-1] == pytest.approx(told['per_batch'][k]['mlm_accuracy'], abs=1e-6)
        if pair: assert float((features['whole'].argmax(-1) == batch['pair']).float().mean()) == pytest.approx(told['per_batch'][k]['long_stay_accuracy'], abs=1e-6)
    n = told['measure_every']
    first = next(v for name, v, _ in told['written_scalars'] if name == 'mlm_accuracy')
    assert first == pytest.approx(sum(theirs[:n + 1]) / n, abs=1e-6)
    assert pair == (first > 1) # which no accuracy is
