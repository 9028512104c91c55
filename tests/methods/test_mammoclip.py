"""Mammo-CLIP as a whole: keys, goldens, contract, saving, released files, bad input."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import golden

from medvl.core.config import config_dict
from medvl.core.errors import DataError
from medvl.data.text.tokens import build_wordpiece, pad_tokens, tokenise
from medvl.methods import base
from medvl.methods.base import StepState, build, capabilities, from_pretrained, push_to_hub, save_pretrained
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig, from_released, released_config
from medvl.models.scaling import normalise_images
from medvl.models.checkpoints import Checkpoint, read_checkpoint

WORDS = ['a mass in the left breast', 'no mass', 'the breasts are fatty', 'spiculated mass in the upper outer quadrant', 'benign calcification']
TOKENIZER = build_wordpiece(WORDS, size=200)
TINY = MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', dim=16, vocab_size=200)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return MammoCLIP(replace(TINY, **changes), TOKENIZER)


def make_batch(n=4, v=2, t=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    text = [[WORDS[(i + k) % len(WORDS)] for k in range(t)] for i in range(n)]
    ids, mask = pad_tokens(tokenise(TOKENIZER, sum(text, []), 64))
    return {'images': torch.randint(0, 256, (n, v, 1, 64, 64), dtype=torch.uint8, generator=g), 'sample_id': [f'p{i}' for i in range(n)], 'text': text,
            'tokens': {'input_ids': torch.from_numpy(ids).view(n, t, -1), 'attention_mask': torch.from_numpy(mask).view(n, t, -1)},
            'text_group': torch.arange(n).view(n, 1).expand(n, t)}


@pytest.mark.parametrize('b', ['b2', 'b5'])
def test_state_dict_is_the_released_one_key_by_key(b):
    info = json.loads(golden(f'mammoclip/ckpt_keys_{b}.json').read_text())
    config = json.loads(golden(f'mammoclip/config_pre_train_{b}_clip.json').read_text())
    with torch.device('meta'): method = MammoCLIP(released_config(Checkpoint({}, {'config': config})))
    ours = [[k, list(v.shape), str(v.dtype)[6:]] for k, v in method.state_dict().items()]
    assert ours == info['state_dict_order'] and len(ours) == info['n_keys']


def test_normalise_golden():
    z = np.load(golden('mammoclip/normalise.npz'))
    x = torch.from_numpy(z['image_uint8_hwc']).permute(2, 0, 1)[None]
    torch.testing.assert_close(normalise_images(x), torch.from_numpy(z['batch_after_trainer_permute']), rtol=1e-6, atol=1e-6)


def test_embeddings_golden_through_the_method():
    z = np.load(golden('mammoclip/clip_head.npz'))
    class Given(torch.nn.Module):
        num_features = 10
        def forward(self, x): return x.flatten(1)
    class Hidden(torch.nn.Module):
        num_features, max_length = 12, 512
        def __init__(self): super().__init__(); self.text_encoder = torch.nn.Module(); self.text_encoder.config = type('C', (), {'vocab_size': 10 ** 6})
        def forward(self, ids, mask): return torch.from_numpy(z['pool_eos'])
    m = MammoCLIP(replace(TINY, dim=6), TOKENIZER, Given(), Hidden())
    m.load_state_dict({k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith('sd_')}, strict=True)
    m.image_side.scaled = lambda images: torch.from_numpy(z['image_feat'])
    torch.testing.assert_close(m.encode_image(torch.zeros(5, 1, 1, 10)), torch.from_numpy(z['out_image_embeddings']), rtol=1e-5, atol=1e-6)
    got = base.Method.forward  # the contract's forward is the one in use
    assert type(m).forward is got and m.logit_scale.exp().item() == pytest.approx(z['out_logit_scale'].item(), rel=1e-5)
    mask = torch.from_numpy(z['mask'])
    torch.testing.assert_close(torch.nn.functional.normalize(m.project_tokens(mask, mask), dim=-1), torch.from_numpy(z['out_text_embeddings']), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('v,t', [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_any_number_of_views_and_texts(v, t):
    method, batch = make(), make_batch(4, v, t)
    f = method.encode(batch)
    assert f['image'].shape == (4, v, 16) and f['text'].shape == (4, t, 16)
    out = method(batch, StepState())
    out['loss'].backward()
    assert torch.isfinite(out['loss']) and method.logit_scale.grad is not None
    assert all(p.grad is not None for n, p in method.named_parameters())
    assert (out['i2i'] == 0) == (v == 1) and (out['t2t'] == 0) == (t == 1)


def test_chunks_give_the_same_gradient_with_frozen_statistics():
    method, batch = make().double().eval(), make_batch(6)
    def grads(slices):
        method.zero_grad()
        f = [method.encode({k: ({n: x[s] for n, x in v.items()} if k == 'tokens' else v[s]) for k, v in batch.items()}) for s in slices]
        method.losses({k: torch.cat([x[k] for x in f]) for k in f[0]}, batch, StepState())['loss'].backward()
        return [p.grad.clone() for p in method.parameters()]
    for a, b in zip(grads([slice(0, 6)]), grads([slice(0, 2), slice(2, 5), slice(5, 6)])): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_losses_have_no_side_effects_and_after_step_bounds_the_scale():
    method, batch = make(), make_batch()
    f = method.encode(batch); before = {k: v.clone() for k, v in method.state_dict().items()}
    a, b = (method.losses(f, batch, StepState())['loss'] for _ in range(2))
    assert a == b and all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    with torch.no_grad(): method.logit_scale.fill_(9.)
    method.after_step(f, batch, StepState())
    assert method.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)
    free = make(limit_scale=False)
    with torch.no_grad(): free.logit_scale.fill_(6.)
    free.after_step(None, None, None)
    assert free.losses(f, batch, StepState())['scale'].item() == pytest.approx(np.exp(6), rel=1e-5)


def test_single_loss_and_duplicates_reach_the_loss():
    batch = make_batch()
    batch['text_group'] = torch.zeros(4, 2, dtype=torch.long)
    f = make().encode(batch)
    losses = {d: make(duplicates=d).losses(f, batch, StepState()) for d in ('negatives', 'mask', 'positives')}
    assert losses['mask']['i2t'] == 0 and losses['mask']['t2t'] == 0 and losses['mask']['i2i'] == losses['negatives']['i2i'] != 0
    assert losses['positives']['i2t'] != losses['negatives']['i2t']
    single = make(loss='single').losses(f, batch, StepState())
    assert set(single) == {'loss', 'i2t', 't2i', 'scale'} and single['loss'].item() == pytest.approx((.75 * single['i2t'] + .25 * single['t2i']).item(), rel=1e-6)


def test_encode_once_is_the_same_in_eval_and_encodes_less():
    batch = make_batch(6); batch['tokens'] = {k: v[:1].expand(6, -1, -1) for k, v in batch['tokens'].items()}
    a, b = make().eval(), make(encode_once=True).eval(); seen = []
    b.text_encoder.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    torch.testing.assert_close(a.encode(batch)['text'], b.encode(batch)['text'], rtol=1e-5, atol=1e-6)
    assert seen == [2]


def test_capabilities_and_their_shapes():
    m, x = make().eval(), make_batch()['images']
    assert capabilities(m) == ['encode_image', 'encode_text', 'project_image', 'project_text', 'image_features', 'feature_maps']
    with torch.no_grad():
        one, many = m.encode_image(x[:, 0]), m.encode_image(x)
        assert one.shape == many.shape == (4, 16) and one.dtype == torch.float32
        torch.testing.assert_close(many.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(m.encode_image(x[:, :1]), one)
        torch.testing.assert_close(one, m.encode(make_batch())['image'][:, 0], rtol=1e-4, atol=1e-5)
        assert m.image_features(x[:, 0]).shape == (4, 448) and m.feature_maps(x[:, 0]).shape == (4, 448, 2, 2)
        assert m.feature_maps(x[:, 0], level=3).shape[-2:] == (8, 8)
        torch.testing.assert_close(m.encode_text(WORDS, batch_size=2), m.encode_text(WORDS), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.encode_text(['A MASS']), m.encode_text(['a mass']))
        assert m.project_text([]).shape == (0, 16) and m.encode_text('no mass').shape == (1, 16)


def test_brightness_and_contrast_of_the_file_do_not_matter():
    m, x = make().eval(), torch.randint(0, 100, (2, 1, 64, 64)).float()
    with torch.no_grad(): torch.testing.assert_close(m.encode_image(x), m.encode_image(2 * x + 30), rtol=1e-3, atol=1e-4)


def test_bad_samples_are_named():
    m, batch = make(), make_batch()
    batch['tokens']['attention_mask'][2, 1, 2:] = 0
    with pytest.raises(DataError, match='report is empty: p2'): m(batch)
    batch = make_batch(); batch['images'] = batch['images'].float(); batch['images'][1, 0, 0, 0, 0] = float('nan')
    with pytest.raises(DataError, match='image.*not finite: .*p1'): m.eval()(batch)
    for bad in ([''], ['fine', '  '], ['\u200b']):
        with pytest.raises(DataError): m.encode_text(bad)
    with pytest.raises(ValueError, match=r'\(b,1,h,w\)'): m.encode_image(torch.zeros(2, 7, 64, 64))
    constant = make_batch(); constant['images'][:] = 9
    assert torch.isfinite(m(constant)['loss'])


def test_ten_thousand_words_are_cut_not_fatal():
    with torch.no_grad(): assert torch.isfinite(make().eval().encode_text(['mass ' * 10000])).all()


def test_save_and_load_is_exact_and_leaks_no_path(tmp_path):
    m, x = make(), make_batch()['images'][:, 0]
    m(make_batch())['loss'].backward()  # running statistics have moved
    folder = save_pretrained(m, tmp_path / 'a' / 'saved', metrics={'auroc': .7})
    again = from_pretrained(folder)
    assert not again.training and again.config == replace(m.config, text_pretrained=False)
    m.eval()
    with torch.no_grad(): assert torch.equal(m.encode_image(x), again.encode_image(x)) and torch.equal(m.encode_text(WORDS), again.encode_text(WORDS))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in m.state_dict().items())
    save_pretrained(again, folder)  # replacing a saved method is allowed
    assert str(tmp_path) not in ''.join(p.read_text() for p in folder.rglob('*.json'))


def test_local_encoders_are_carried_along(tmp_path):
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    BertModel(BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).save_pretrained(tmp_path / 'bert')
    TOKENIZER.save_pretrained(tmp_path / 'bert')
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16)).save_pretrained(tmp_path / 'vit')
    config = MammoCLIPConfig(image_encoder=str(tmp_path / 'vit'), image_pretrained=True, text_encoder=str(tmp_path / 'bert'), dim=16)
    m, x = MammoCLIP(config).eval(), make_batch()['images'][:, 0]
    folder = save_pretrained(m, tmp_path / 'saved')
    with torch.no_grad(): image, text = m.encode_image(x), m.encode_text(WORDS)
    for gone in ('bert', 'vit'): (tmp_path / gone).rename(tmp_path / f'gone_{gone}')
    stored = (folder / 'config.json').read_text()
    assert str(tmp_path) not in stored and './text_encoder' in stored and './image_encoder' in stored
    again = from_pretrained(folder)
    with torch.no_grad(): assert torch.equal(image, again.encode_image(x)) and torch.equal(text, again.encode_text(WORDS))
    assert from_pretrained(save_pretrained(again, tmp_path / 'second')).config == again.config


def test_damaged_saved_folders(tmp_path):
    folder = save_pretrained(make(), tmp_path / 's')
    weights = (folder / 'model.safetensors').read_bytes()
    for content in (weights[:1000], b''):
        (folder / 'model.safetensors').write_bytes(content)
        with pytest.raises(DataError, match='model.safetensors'): from_pretrained(folder)
    save_pretrained(make(dim=8), tmp_path / 'other')
    (folder / 'model.safetensors').write_bytes((tmp_path / 'other' / 'model.safetensors').read_bytes())
    with pytest.raises(DataError, match='another checksum'): from_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text()); config.pop('weights_sha256')  # as an older folder has none
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(DataError, match='projection'): from_pretrained(folder)
    config = json.loads((folder / 'config.json').read_text()); config['config']['dimm'] = 3
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='dim'): from_pretrained(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(DataError, match='JSON'): from_pretrained(folder)
    with pytest.raises(DataError, match='config.json is missing'): from_pretrained(tmp_path)
    with pytest.raises(DataError, match='no such folder'): from_pretrained(tmp_path / 'nowhere')
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine' / 'thesis.tex').write_text('x')
    with pytest.raises(DataError, match='refusing'): save_pretrained(make(), tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'thesis.tex').exists()


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    folder = save_pretrained(make(0), tmp_path / 's'); old = (folder / 'model.safetensors').read_bytes()
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(base, 'save_file', full)
    with pytest.raises(OSError, match='space'): save_pretrained(make(1), folder)
    assert (folder / 'model.safetensors').read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['s']


def test_push_to_hub_uses_the_hub_client(monkeypatch):
    import huggingface_hub
    calls, files = [], {}
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', lambda self, repo, **k: calls.append((repo, k['private'])))
    def upload(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path
        files.update({p.name: p.stat().st_size for p in Path(folder_path).rglob('*') if p.is_file()})
        files['card'] = (Path(folder_path) / 'README.md').read_text()
        return f'https://huggingface.co/{repo_id}'
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', upload)
    assert push_to_hub(make(), 'lab/mammo').endswith('lab/mammo') and calls == [('lab/mammo', True)]
    assert {'README.md', 'config.json', 'model.safetensors', 'tokenizer.json'} <= set(files) and 'not for diagnosis' in files['card']


def test_from_pretrained_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    folder, asked = save_pretrained(make(), tmp_path / 's'), []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, **k: (asked.append((repo, k['revision'])), str(folder))[1])
    assert from_pretrained('lab/mammo', revision='v1').name == 'mammoclip' and asked == [('lab/mammo', 'v1')]


def test_registry_and_configuration_are_strict():
    assert build('mammoclip', config_dict(TINY), tokenizer=TOKENIZER).config == TINY
    for call, words in ((lambda: build('mamoclip'), 'mammoclip'), (lambda: build('mammoclip', {'temprature': 1.}), 'temperature'),
                        (lambda: MammoCLIP(replace(TINY, loss='multi')), 'multiview'), (lambda: MammoCLIP(replace(TINY, vocab_size=10), TOKENIZER), 'vocab_size'),
                        (lambda: MammoCLIP(TINY).tokenizer, 'tokenizer='), (lambda: make(duplicates='x')(make_batch()), 'mask')):
        with pytest.raises(ValueError, match=words): call()
    with pytest.raises(TypeError, match='MammoCLIPConfig'): MammoCLIP({'dim': 3})


def test_released_file_end_to_end(tmp_path):
    source = make(3)
    config = {'model': {'temperature': .07, 'image_encoder': {'name': 'tf_efficientnetv2-detect'}, 'text_encoder': {'pooling': 'eos'},
                        'projection_head': {'name': 'linear', 'dropout': .1, 'proj_dim': 512}}, 'base': {'text_max_length': 256}}
    weights = source.state_dict() | {'text_encoder.text_encoder.embeddings.position_ids': torch.arange(512)[None]}
    torch.save({'model': weights, 'optimizer': {}, 'config': config, 'epoch': 10, 'train_loss': torch.tensor(1.)}, tmp_path / 'b2.tar')
    c = released_config(read_checkpoint(tmp_path / 'b2.tar'))
    assert (c.image_encoder, c.text_encoder, c.dim, c.limit_scale) == ('efficientnet-b2', 'bert-base-clinical-config', 512, False)
    m = from_released(tmp_path / 'b2.tar', TINY, TOKENIZER)
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in source.state_dict().items()) and not m.training
    torch.save({'model': {k: v for k, v in weights.items() if 'blocks.3' not in k}, 'config': config}, tmp_path / 'less.tar')
    with pytest.raises(DataError, match='missing: image_encoder._blocks.3'): from_released(tmp_path / 'less.tar', TINY, TOKENIZER)
    torch.save({'model': weights, 'config': {}}, tmp_path / 'odd.tar')
    with pytest.raises(DataError, match='no Mammo-CLIP configuration'): from_released(tmp_path / 'odd.tar')


def test_bfloat16_autocast_keeps_embeddings_in_float32():
    m, batch = make(), make_batch()
    with torch.autocast('cpu', torch.bfloat16): f = m.encode(batch); loss = m.losses(f, batch, StepState())['loss']
    assert f['image'].dtype == f['text'].dtype == loss.dtype == torch.float32
    loss.backward(); assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_checkpointing_options_do_not_change_the_step():
    torch.manual_seed(0); batch, out = make_batch(), []
    for on in (False, True):
        m = make(image_checkpointing=on, text_checkpointing=on); torch.manual_seed(5)
        m(batch)['loss'].backward(); out.append([p.grad for p in m.parameters()] + list(m.buffers()))
    for a, b in zip(*out): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item() if a.is_floating_point() else 0)
