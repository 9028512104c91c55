"""BERT with cross-attention against the original's numbers, transformers' BERT, and its own promises."""
import numpy as np
import pytest
import torch
from golden import golden

from medvl.core.errors import DataError
from medvl.models.fusion import MODES, FusionBert, KeyValueCache, attention_maps, load_fusion, released_names

close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
normal = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items()}


def weights(z, prefix='w__'): return {k[len(prefix):]: v for k, v in z.items() if k.startswith(prefix)}


def xbert(fusion_layer=2, **options):
    return FusionBert(61, width=24, heads=4, layers=4, fusion_layer=fusion_layer, hidden=40, context=20, positions=32, **options).eval()


@pytest.fixture(scope='module')
def z(): return arrays('xbert_encoder.npz')


@pytest.fixture(scope='module')
def bert(z):
    model = xbert()
    report = load_fusion(model, weights(z))
    assert not report.missing and report.ignored == ['embeddings.position_ids']
    return model


@torch.no_grad()
def test_multi_modal_causal_and_fusion(bert, z):
    close(bert(z['ids'], mask=z['att'], context=z['img'], context_mask=z['img_att']), z['full_out'])
    close(bert(z['ids'], mask=z['att'], context=z['img'], context_mask=z['img_att'], causal=True), z['full_causal_out'])
    close(bert(states=z['embeddings'], mask=z['att'], context=z['img'], context_mask=z['img_att'], mode='fusion'), z['fusion_out'])


@torch.no_grad()
def test_text_only(z):
    model = xbert(fusion_layer=4)
    load_fusion(model, weights(z, 'textonly_w__'))
    close(model(z['ids'], mask=z['att'], mode='text'), z['textonly_out'])


@torch.no_grad()
def test_only_live_layers_are_built_and_the_dead_ones_named(z):
    over = FusionBert(61, width=24, heads=4, layers=2, hidden=40, context=20, reads='states').eval()
    report = load_fusion(over, weights(z), first=2)
    close(over(states=z['embeddings'], mask=z['att'], context=z['img'], context_mask=z['img_att']), z['fusion_out'])
    dead = {k.split('.layer.')[-1].split('.')[0] if '.layer.' in k else k.split('.')[0] for k in report.ignored}
    assert dead == {'0', '1', 'embeddings'} and len(report.loaded) + len(report.ignored) == len(weights(z))


@pytest.mark.parametrize('causal', [False, True])
def test_fused_and_plain_attention_give_the_same_numbers_and_gradients(bert, z, causal):
    def run():
        bert.zero_grad()
        image = z['img'].clone().requires_grad_()
        out = bert(z['ids'], mask=z['att'], context=image, context_mask=z['img_att'], causal=causal)
        (out * z['att'][..., None]).square().sum().backward()
        return [out.detach(), image.grad, *(p.grad.clone() for p in bert.parameters() if p.grad is not None)]
    fused = run()
    with attention_maps(bert, kind='self'), attention_maps(bert) as record: plain = run()
    assert sorted(record.maps) == [2, 3] and sorted(record.gradients) == [2, 3]
    for a, b in zip(fused, plain, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_probe_gives_the_originals_attention_and_gradient():
    z = arrays('gradcam.npz')
    bert = xbert()
    load_fusion(bert, weights(z))
    layer = z['layer'].item()
    with attention_maps(bert, [layer]) as record:
        logits = torch.nn.functional.linear(bert(z['ids'], context=z['img'])[:, 0], z['head_w'], z['head_b'])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1], torch.ones(1))
        loss.backward()
    close(logits, z['logits'])
    close(loss.detach(), z['loss'])
    close(record.maps[layer].detach(), z['attn'])
    close(record.gradients[layer], z['attn_grad'])
    # the original's map: mean over heads of attention times the positive part of the loss' gradient, the class token's column dropped
    cam = (record.maps[layer].detach() * record.gradients[layer].clamp(min=0))[0, :, :, 1:].mean(0).unflatten(-1, (4, 4))
    close(cam, z['gradcam'])


def test_nothing_is_left_behind_when_recording_fails(bert):
    parts = [p for l in bert.layers for p in (l.attention, l.cross) if p is not None]
    with pytest.raises(RuntimeError), attention_maps(bert):
        assert any(p.probe for p in parts)
        raise RuntimeError
    assert not any(p.probe for p in parts)
    with pytest.raises(ValueError, match='no cross-attention'), attention_maps(bert, [0, 2]): pass
    with pytest.raises(ValueError, match='kind of attention'), attention_maps(bert, kind='both'): pass


def test_later_backward_passes_do_not_write_into_a_closed_record(bert, z):
    with attention_maps(bert, [2]) as record: out = bert(z['ids'], context=z['img']).sum()
    out.backward()
    assert record.gradients == {}


@torch.no_grad()
def test_a_list_of_contexts_goes_round(bert, z):
    one, two = z['img'], z['img'].flip(1) + 1
    got = bert(z['ids'], mask=z['att'], context=[one, two])
    text = bert(z['ids'], mask=z['att'], mode='text')
    seen = z['att'][:, None, None].bool()
    want = bert.layers[3](bert.layers[2](text, seen, one), seen, two)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(bert(z['ids'], mask=z['att'], context=[one]), bert(z['ids'], mask=z['att'], context=one))


@torch.no_grad()
@pytest.mark.parametrize('steps', [[1] * 8, [3, 1, 4], [8]])
def test_cache_gives_the_same_states(bert, z, steps):
    whole = bert(z['ids'], mask=z['att'], context=z['img'], context_mask=z['img_att'], causal=True)
    cache, got, at = KeyValueCache(), [], 0
    for n in steps:
        got.append(bert(z['ids'][:, at:at + n], mask=z['att'][:, :at + n], context=z['img'] if not at else None, context_mask=z['img_att'],
                        causal=True, cache=cache))
        at += n
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cache_follows_a_beam(bert, z):
    cache, rows = KeyValueCache(), torch.tensor([2, 0])
    bert(z['ids'][:, :4], context=z['img'], causal=True, cache=cache)
    cache.reorder(rows)
    next_word = bert(z['ids'][rows, 4:5], causal=True, cache=cache)
    torch.testing.assert_close(next_word[:, 0], bert(z['ids'][rows, :5], context=z['img'][rows], causal=True)[:, 4], rtol=1e-5, atol=1e-5)


def test_texts_too_long_empty_or_unseen(bert, z):
    with pytest.raises(ValueError, match='33 tokens, but the network reads 32'): bert(torch.ones(1, 33, dtype=torch.long), context=z['img'][:1])
    assert bert(z['ids'], mask=z['att'] * 0, context=z['img'], context_mask=z['img_att'] * 0).isfinite().all()
    with pytest.raises(ValueError, match='looks at a context'): bert(z['ids'])
    with pytest.raises(ValueError, match='mode'): bert(z['ids'], mode='both')
    with pytest.raises(ValueError, match='no layer'): xbert(fusion_layer=0)(z['ids'], mode='text')
    with pytest.raises(ValueError, match='predicts no words'): bert.logits(normal(1, 24))
    assert len(MODES) == 3


@torch.no_grad()
def test_an_empty_row_does_not_touch_its_neighbours(bert, z):
    mask = z['att'].clone()
    mask[1] = 0
    torch.testing.assert_close(bert(z['ids'], mask=mask, context=z['img'])[::2], bert(z['ids'], mask=z['att'], context=z['img'])[::2])


def test_recomputing_gives_the_same_gradients_with_dropout():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        bert = FusionBert(20, width=16, heads=2, layers=2, hidden=32, head=True, dropout=.3, checkpointing=checkpointing)
        torch.manual_seed(1)
        bert.logits(bert(torch.arange(1, 9).view(2, 4), context=normal(2, 3, 16))).square().mean().backward()
        grads.append(bert.words.weight.grad)
    torch.testing.assert_close(*grads)


# -- files ----------------------------------------------------------------------------------------------------------------

def test_names_go_both_ways():
    model = xbert(head=True)
    names = released_names(model, first=8)
    assert len({*names.values()}) == len(names) == len(model.state_dict())
    file = {names[k]: v for k, v in model.state_dict().items()}
    again = xbert(head=True)
    assert load_fusion(again, file, first=8).complete
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_what_does_not_fit_changes_nothing():
    model = xbert(head=True)
    file = {v: model.state_dict()[k] + 1 for k, v in released_names(model).items()}
    other = xbert(head=True)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    for bad, said in (({k: v for k, v in file.items() if 'layer.3' not in k}, 'missing: layers.3'),
                      (file | {'bert.embeddings.word_embeddings.weight': torch.ones(62, 24)}, 'mismatched'),
                      (file | {'cls.predictions.decoder.weight': torch.ones(61, 24)}, 'table of its own'), ({'a': torch.ones(1)}, 'do not fit')):
        with pytest.raises(DataError, match=said): load_fusion(other, bad)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_transformers_masked_model_predicts_the_same_words():
    from transformers import BertConfig, BertForMaskedLM
    config = BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)
    theirs = BertForMaskedLM(config).eval()
    ours = FusionBert(40, width=24, heads=4, layers=2, fusion_layer=2, hidden=48, positions=16, head=True).eval()
    assert not load_fusion(ours, theirs.state_dict()).missing
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad(): close(ours.logits(ours(ids, mode='text')), theirs(ids).logits)


@pytest.mark.parametrize('probed', [False, True])
def test_half_precision_is_near_and_finite(bert, z, probed):
    "bfloat16 by autocast: masks are made in the type of the scores, and gradients come back in float32."
    from contextlib import nullcontext
    bert.zero_grad()
    want = bert(z['ids'], mask=z['att'], context=z['img'], context_mask=z['img_att'], causal=True).detach()
    with torch.autocast('cpu', dtype=torch.bfloat16), attention_maps(bert) if probed else nullcontext():
        got = bert(z['ids'], mask=z['att'], context=z['img'], context_mask=z['img_att'], causal=True)
        got.float().square().sum().backward()
    torch.testing.assert_close(got.float().detach(), want, rtol=.1, atol=.1)
    grads = [p.grad for p in bert.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
