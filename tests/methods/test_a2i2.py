"""A2I2 as a method: hostile input, terms switched off, one exam alone, files of the original, and it learns."""
import copy

import numpy as np
import pytest
import torch
from golden import golden

import medvl.data.samples.exam  # noqa: F401, declares keywords
from medvl.attribute.attribute import Target, attribute
from medvl.core.errors import DataError
from medvl.data.batch import collate, present_rows
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.a2i2 import ABLATIONS, A2I2, A2I2Config, reference_options
from medvl.methods.base import StepState
from medvl.methods.classifier import new_classifier
from medvl.methods.released.a2i2_files import LEFT_OUT, PARTS, a2i2_state, export_a2i2, open_a2i2, our_name
from medvl.methods.segmenter import segmenter_from
from medvl.train.hill import hill
from medvl.train.optim import lr_scale

REPORTS = ['suspicious mass in the left breast', 'no mass', 'calcification in the right breast', 'benign']
TOKENIZER = build_wordpiece(REPORTS, size=80)
TINY = dict(image_encoder='resnet-tiny', text_encoder='tiny', text_pretrained=False, decoder_width=.125, decoder_channels=1, max_length=24)


def model(**changes):
    torch.manual_seed(0)
    return A2I2(A2I2Config(**{**TINY, **changes}), TOKENIZER)


def sample(i, present=(True,) * 4, keywords=None, report=None, names=('CC', 'MLO') * 2, sides='LLRR'):
    rng = np.random.default_rng(i)
    text = REPORTS[i % 4] if report is None else report
    return dict(images=[rng.integers(0, 256, (64, 64), dtype=np.uint8) if p else None for p in present], present=np.array(present), view=list(names), laterality=list(sides),
                patient_id=f'p{i}', study_id=f's{i}', sample_id=f'e{i}', index=i, epoch=0, text_group=[i % 4], keywords=REPORTS[i % 4].split() if keywords is None else keywords,
                tokens=[np.array(TOKENIZER(text)['input_ids'], np.int32)])


def exams(n=4, **options): return collate([sample(i, **options) for i in range(n)])


def losses(method, batch): return {k: float(v.detach()) for k, v in method(batch).items()}


def test_a_single_exam_has_nothing_to_be_told_from():
    one = losses(model(), exams(1))
    assert one['global_i2t'] == one['local_t2i'] == one['rank'] == 0 and np.isfinite(one['loss'])
    assert model().least_batch == 2 and model(**ABLATIONS['intra_rec']['config']).least_batch == 1


def test_no_keyword_at_all_ties():
    assert losses(model(), exams(keywords=[]))['rank'] == 0
    assert losses(model(), exams())['rank'] > 0
    bare = {k: v for k, v in exams().items() if k != 'keywords'}
    assert losses(model(), bare)['rank'] == 0


def test_a_report_without_words_is_named():
    batch = collate([sample(0), sample(1, report=''), sample(2)])
    with pytest.raises(DataError, match='empty: e1'): model()(batch)


def test_one_breast_and_other_projections():
    two = exams(present=(True, True), names=('CC', 'MLO'), sides='LL')
    assert np.isfinite(losses(model(), two)['intra'])
    odd = exams(present=(True,) * 3, names=('CC', 'ML', 'XCCL'), sides='LLL')
    assert losses(model(), odd)['intra'] == 0 # no pair at all


@pytest.mark.parametrize('fill', [0, 255])
def test_a_missing_view_changes_no_number(fill):
    batch = exams(present=(True, True, False, True))
    images = batch['images'].clone()
    images[:, 2] = fill
    a, b = model(), model()
    for m, x in ((a, batch['images']), (b, images)):
        torch.manual_seed(1) # of dropout
        m({**batch, 'images': x})['loss'].backward()
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True): assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    for (name, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True): assert torch.equal(p, q), name


def test_the_same_patients_other_breast_may_be_left_out():
    batch = exams()
    assert losses(model(other_breast='left_out'), batch)['intra'] < losses(model(), batch)['intra']


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_leave_out_what_they_say(name):
    told = losses(model(**ABLATIONS[name]['config']), exams())
    gone = {'no_rec': 'reconstruction', 'no_inter': 'global_i2t', 'no_rank': 'rank', 'no_intra': 'intra', 'inter_rec': 'rank', 'intra_rec': 'local_i2t', 'reference_6': 'rank', 'rank_rec': 'intra', 'global_only': 'local_i2t', 'local_only': 'global_i2t'}[name]
    assert gone not in told and np.isfinite(told['loss'])


def test_the_weights_are_the_papers():
    t = losses(model(), exams())
    assert t['loss'] == pytest.approx(t['global_i2t'] + t['global_t2i'] + t['local_i2t'] + t['local_t2i'] + .001 * t['rank'] + .001 * t['intra'] + t['reconstruction'] + .005 * t['roughness'], rel=1e-5)


def test_airlight():
    batch = exams()
    found = {a: losses(model(airlight=a), batch)['reconstruction'] for a in (1., 0., 'border', 'exam')}
    assert found['exam'] == found[1.] and len(set(found.values())) == 3
    given = {**batch, 'airlight': torch.tensor([0., 0., 0., 0.])}
    assert losses(model(airlight='exam'), given)['reconstruction'] == pytest.approx(found[0.], rel=1e-6)
    for wrong in (1.5, -.1, 'sky'):
        with pytest.raises(ValueError, match='airlight'): model(airlight=wrong)


def test_chunks_are_the_whole():
    from medvl.train.gradcache import backward_batch
    batch, grads = exams(), []
    for size in (None, 2):
        m = model().eval()
        backward_batch(m, batch, StepState(), size)
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    top = max(float(g.abs().max()) for g in grads[0].values())
    for n, g in grads[0].items(): assert float((g - grads[1][n]).abs().max()) < 1e-4 * top, n


def test_the_reference_runs():
    m = model(**{**reference_options(), 'airlight': -1.})
    assert m.views.mlo_encoder is not None and np.isfinite(losses(m, exams())['loss'])
    same = copy.deepcopy(m.eval())
    same.views.mlo_encoder.load_state_dict(same.views.encoder.state_dict())
    batch = exams()
    with torch.no_grad():
        both = same.encode_image(batch['images'], batch['present'], batch['view'])
        torch.testing.assert_close(both, same.encode_image(batch['images'], batch['present'])) # equal encoders: words do not matter
        assert not torch.allclose(both, m.encode_image(batch['images'], batch['present'], batch['view']), atol=1e-4)


def test_a_view_of_another_size_is_refused():
    odd = sample(1)
    odd['images'][2] = np.zeros((32, 64), np.uint8)
    with pytest.raises(ValueError, match='e1'): collate([sample(0), odd])
    with pytest.raises(DataError, match='multiples of 32'): model()({**exams(), 'images': torch.zeros(4, 4, 1, 48, 64)})


# ------------------------------------------------------------------------------------------------ files of the original

def test_files_there_and_back(tmp_path):
    m = model(share_views=False).eval()
    path = export_a2i2(m, tmp_path/'a.ckpt')
    stored = torch.load(path, weights_only=True)
    assert set(stored) >= {'state_dict', 'hyper_parameters', 'epoch'} and all(k.startswith('VSWL.') for k in stored['state_dict'])
    opened = open_a2i2(path, TOKENIZER, text_heads=2)
    assert not opened.shared and opened.told['attention_temperature'] == 4
    for k, v in m.state_dict().items(): assert torch.equal(v, opened.method.state_dict()[k]), k
    bare = {k.removeprefix('VSWL.'): v for k, v in stored['state_dict'].items()} # the prefix that its loader expects cut off
    assert torch.equal(open_a2i2(bare, text_heads=2).method.views.global_head.weight, m.views.global_head.weight)


def test_files_are_read_strictly(tmp_path):
    state = a2i2_state(model())
    with pytest.raises(DataError, match='extra'): open_a2i2({**state, 'VSWL.img_decoder2.extra': torch.ones(1)}, text_heads=2)
    for gone in ('VSWL.img_encoder_cc.global_embedder.bias', 'VSWL.text_encoder.model.encoder.layer.1.output.dense.bias'):
        with pytest.raises(DataError, match='bias'): open_a2i2({k: v for k, v in state.items() if k != gone}, text_heads=2)
    with pytest.raises(DataError): open_a2i2({**state, 'VSWL.img_encoder_cc.local_embedder.weight': torch.ones(3, 3, 1, 1)}, text_heads=2)


def test_a_file_that_would_run_code_does_not(tmp_path):
    ran = tmp_path/'ran'

    class Evil:
        def __reduce__(self): return (open, (str(ran), 'w'))
    torch.save({'state_dict': a2i2_state(model()), 'hyper_parameters': Evil()}, tmp_path/'evil.ckpt')
    try: open_a2i2(tmp_path/'evil.ckpt', text_heads=2)
    except DataError: pass
    assert not ran.exists()


def test_every_name_has_a_place():
    assert all(our_name(f'VSWL.{p}x') is not None for p in PARTS) and our_name('VSWL.text_encoder.model.embeddings.position_ids') == '' and len(LEFT_OUT) == 2
    assert our_name('optimizer.state') is None


# ------------------------------------------------------------------------------------------------ the schedule

def test_hill_is_the_originals():
    import json
    told = json.loads(golden('a2i2/warmup_lambda.json').read_text())['warmup_lambda_epoch_0_30']
    assert [.01 * hill(e) for e in range(31)] == pytest.approx(told, rel=1e-9)
    assert lr_scale(25, 400, 0, 'hill', epoch_steps=10) == pytest.approx(.7)


# ------------------------------------------------------------------------------------------------ it learns

def test_pairs_are_learnt():
    "Eight exams learnt by heart: both searches fall far below a guess among eight."
    batch = collate([{**sample(i), 'text_group': [i]} | {'tokens': [np.array(TOKENIZER(f'{REPORTS[i % 4]} {REPORTS[i // 2 % 4]}')['input_ids'], np.int32)]} for i in range(6)])
    m = model(reconstruction_weight=0.)
    for module in m.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.
    optimiser = torch.optim.Adam(m.parameters(), 2e-3)
    first = losses(m, batch)
    for _ in range(25):
        optimiser.zero_grad()
        m(batch)['loss'].backward()
        optimiser.step()
    last = losses(m, batch)
    guess = np.log(6)
    assert last['global_i2t'] < .6 * guess < first['global_i2t'] and last['local_i2t'] < .8 * first['local_i2t']
    assert torch.equal(present_rows(batch['present']), batch['rows'])


def test_its_encoder_goes_into_a_classifier_and_a_unet_as_it_was():
    "Pixels are scaled as in pre-training, so the first features are the pre-trained ones; views are averaged."
    method, batch = model().eval(), exams(2)
    with torch.no_grad():
        wanted = method.image_features(batch['images'], batch['present'])
        tuned = new_classifier(method, 'mass', frozen=False).eval()
        torch.testing.assert_close(tuned.image_features(batch['images'], batch['present']), wanted)
        unet = segmenter_from(method, ['mass'], 'unet', width=.25).eval()
        torch.testing.assert_close(unet.image_features(batch['images'][:, 0]), method.image_features(batch['images'][:, 0]))
        assert unet.predict(batch['images'][:, 0]).shape[1] == 1
    tuned.train()
    loss = tuned({**batch, 'labels': torch.tensor([[1.], [0.]])})['loss']
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.image_encoder.parameters())


def test_views_for_themselves():
    "With one view an exam both pairings are one; with four, a view has its exam's other views not against it."
    one = exams(4, present=(True, False, False, False))
    torch.manual_seed(0); first = model().eval()
    torch.manual_seed(0); second = model(pairing='view').eval()
    a, b = losses(first, one), losses(second, one)
    for k in ('global_i2t', 'global_t2i', 'local_i2t', 'local_t2i'): assert a[k] == pytest.approx(b[k], abs=1e-5)
    whole = exams(4)
    found = losses(second, whole)
    assert found['global_gain'] == pytest.approx(losses(first, whole)['global_gain'], abs=1e-5) # judged as exams
    f = second.encode(whole)
    s, here = second.similarities(f)['global'], f['here'].bool()
    by_hand = [torch.stack([s[i, v, i], *(s[i, v, j] for j in range(4) if j != i for _ in range(int(here[j].sum())))])
               for i in range(4) for v in range(4) if here[i, v]]
    wanted = torch.stack([r.logsumexp(0) - r[0] for r in by_hand]).mean()
    assert found['global_i2t'] == pytest.approx(float(wanted.detach()), abs=1e-4)
    with pytest.raises(ValueError, match='pairing'): model(pairing='views')


def test_words_know_one_kind_of_map():
    method, images = model().eval(), torch.zeros(1, 1, 64, 64)
    assert attribute(method, images[0], Target('word', 'mass'), 'word_attention', report='a mass is seen').map.shape == (4, 4)
    with pytest.raises(ValueError, match='attention of its words'): method.word_maps(images, ['a mass'], 'gradcam')
