"""Text encoders out of larger files and folders of an unknown kind."""
import json

import pytest
import torch

from medvl.core.errors import DataError
from medvl.models.bert_file import load_text, open_text_encoder
from medvl.models.text import build_text_encoder


def tiny(seed=0):
    torch.manual_seed(seed)
    return build_text_encoder('tiny', 'bos', vocab_size=50).eval()


def folder(path, encoder, file='pytorch_model.bin', **settings):
    (path/'config.json').write_text(json.dumps({**encoder.text_encoder.config.to_dict(), 'model_type': 'cxr-bert', 'architectures': ['CXRBertModel'],
                                                'projection_size': 128, **settings}))
    weights = {f'bert.{k}': v.contiguous() for k, v in encoder.text_encoder.state_dict().items()} | {
        'cls.predictions.bias': torch.ones(50), 'cls_projection_head.LayerNorm.weight': torch.ones(4)}
    if file.endswith('bin'): torch.save(weights, path/file)
    else:
        from safetensors.torch import save_file
        save_file(weights, path/file)
    return path


@pytest.mark.parametrize('file', ['pytorch_model.bin', 'model.safetensors'])
def test_a_folder_of_cxr_berts_layout(tmp_path, file):
    want = tiny()
    encoder, report = open_text_encoder(folder(tmp_path, want, file))
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    with torch.no_grad(): torch.testing.assert_close(encoder.eval()(ids, (ids > 0).long()), want(ids, (ids > 0).long()))
    assert sorted(report.ignored) == ['cls.predictions.bias', 'cls_projection_head.LayerNorm.weight'] and report.complete


def test_a_folder_that_transformers_knows(tmp_path):
    want = tiny()
    want.text_encoder.save_pretrained(tmp_path)
    encoder, report = open_text_encoder(tmp_path)
    assert report is None and torch.equal(encoder.text_encoder.embeddings.word_embeddings.weight, want.text_encoder.embeddings.word_embeddings.weight)


def test_configuration_only_and_what_is_wrong(tmp_path):
    encoder, report = open_text_encoder(folder(tmp_path, tiny()), pretrained=False)
    assert report is None and encoder.num_features == 128
    (tmp_path/'pytorch_model.bin').unlink()
    with pytest.raises(DataError, match='no weights'): open_text_encoder(tmp_path)
    (tmp_path/'config.json').write_text('{')
    with pytest.raises(DataError, match='not JSON'): open_text_encoder(tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": "odd"}')
    with pytest.raises(DataError, match='lacks vocab_size'): open_text_encoder(tmp_path)


def test_a_file_with_less_or_more_than_the_encoder():
    good = tiny()
    weights = {f'text_encoder.bert.{k}': v for k, v in good.text_encoder.state_dict().items()}
    for bad, said in (({k: v for k, v in weights.items() if 'layer.1' not in k}, 'missing'), (weights | {'text_encoder.bert.more': torch.ones(1)}, 'unexpected: more'),
                      ({'a': torch.ones(1)}, 'do not fit')):
        other = tiny(1)
        before = other.text_encoder.embeddings.word_embeddings.weight.clone()
        with pytest.raises(DataError, match=said): load_text(other, bad, prefix='text_encoder.')
        assert torch.equal(before, other.text_encoder.embeddings.word_embeddings.weight)
