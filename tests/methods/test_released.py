"""Released files: told apart, read without running code, loaded to the last tensor, converted and written back."""
import json
import sys
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from golden import golden

from medvl.core.errors import DataError
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.base import from_pretrained
from medvl.methods.classifier import Classifier, ClassifierConfig
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig
from medvl.methods.released.mammoclip_files import RECORD, convert_released, export_released, kind_of_method, open_released, released_state, stored_config
from medvl.methods.retinanet import RetinaNet, reference_config
from medvl.models.checkpoints import Checkpoint, read_checkpoint
from medvl.models.released import encoder_of, kind_of, weight_table

TOKENIZER = build_wordpiece(['a mass in the left breast', 'no suspicious calcification on the right'])
TINY = MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', text_pretrained=False, dim=8)


@pytest.fixture
def listconfig(monkeypatch):
    "omegaconf's list, from the library where it is installed, else a class of its name and form."
    try: from omegaconf import OmegaConf
    except ImportError:
        class ListConfig:
            def __init__(self, values): self.__dict__.update(_content=values, _metadata={'ref_type': list, 'flags': {}}, _parent=None)
            def __getstate__(self): return dict(self.__dict__)
        ListConfig.__module__, ListConfig.__qualname__ = 'omegaconf.listconfig', 'ListConfig'
        module = types.ModuleType('omegaconf.listconfig'); module.ListConfig = ListConfig
        monkeypatch.setitem(sys.modules, 'omegaconf', types.ModuleType('omegaconf'))
        monkeypatch.setitem(sys.modules, 'omegaconf.listconfig', module)
        return ListConfig
    return OmegaConf.create


def layout(b): return [(k, tuple(s), getattr(torch, d)) for k, s, d in json.loads(golden(f'mammoclip/ckpt_keys_{b}.json').read_text())['state_dict_order']]


def meta(b):
    "The released layout without memory."
    return OrderedDict((k, torch.empty(s, dtype=d, device='meta')) for k, s, d in layout(b))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    m = MammoCLIP(MammoCLIPConfig(**{**vars(TINY), **changes}), TOKENIZER)
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p)*.01)
    return m.eval()


def tree(method, listconfig, **changes):
    config = stored_config(method.config)
    config['transform'] = {'train': {'transform': {'affine_scale': listconfig([.8, 1.2])}}}
    return {'model': OrderedDict(method.state_dict()), 'optimizer': {'state': {}, 'param_groups': [{'lr': 5e-5}]},
            'scheduler': {'last_epoch': 9}, 'config': config,
            'epoch': 10, 'train_loss': torch.tensor(1.5)} | changes


@pytest.mark.parametrize('b', ['b2', 'b5'])
def test_the_released_layouts_are_ours_key_by_key(b):
    weights = meta(b)
    assert (kind_of(weights), encoder_of(weights)) == ('pretraining', f'efficientnet-{b}')
    with torch.device('meta'): method = MammoCLIP(MammoCLIPConfig(image_encoder=f'efficientnet-{b}',
                                                                  text_encoder='bert-base-clinical-config', text_pretrained=False))
    table = weight_table(released_state(method), weights)
    assert (table.status == 'loaded').all() and list(released_state(method)) == list(weights) and len(table) == {'b2': 710, 'b5': 1056}[b]
    assert [v.dtype for v in released_state(method).values()] == [v.dtype for v in weights.values()]
    head = {'classifier.classification_head.weight': torch.empty(1, weights['image_encoder._conv_head.weight'].shape[0], device='meta'),
            'classifier.classification_head.bias': torch.empty(1, device='meta')}
    part = {k: v for k, v in weights.items() if k.startswith('image_encoder.')} | head
    assert (kind_of(part), encoder_of(part)) == ('classifier', f'efficientnet-{b}')
    with torch.device('meta'): classifier = Classifier(ClassifierConfig(image_encoder=f'efficientnet-{b}'))
    assert list(released_state(classifier)) == list(part) and (weight_table(released_state(classifier), part).status == 'loaded').all()


@pytest.mark.parametrize('b', ['b2', 'b5'])
def test_detector_layout(b):
    order = json.loads(golden('mammoclip/retinanet_head_keys.json').read_text())['keys_in_order']
    with torch.device('meta'): state = released_state(RetinaNet(reference_config(image_encoder=f'efficientnet-{b}')))
    assert list(state)[:len(order)] == order and [k[13:] for k in state if k.startswith('efficientnet.')] == [k[14:] for k in meta(b) if k.startswith('image_encoder.')]
    assert (kind_of(state), encoder_of(state)) == ('detector', f'efficientnet-{b}')


def test_converted_b2_gives_the_golden_features(tmp_path, listconfig):
    encoder = {k: v.float() if v.is_floating_point() else v for k, v in torch.load(golden('mammoclip/b2_image_encoder_fp16.pt'),
                                                                                   weights_only=True).items()}
    many = torch.full((30_000_000,), .01)  # one storage for all of BERT, so that the file stays small
    def value(k, s, d): return encoder[k[14:]] if k.startswith('image_encoder.') else many[:np.prod(s, dtype=int)].view(s) if d == torch.float32 else torch.zeros(s, dtype=d)
    config = json.loads(golden('mammoclip/config_pre_train_b2_clip.json').read_text())
    config['transform']['train']['transform']['affine_scale'] = listconfig([.8, 1.2])
    torch.save({'model': OrderedDict((k, value(k, s, d)) for k, s, d in layout('b2')), 'config': config, 'epoch': 10,
                'train_loss': torch.tensor(1.)}, tmp_path/'b2-model-best-epoch-10.tar')
    with pytest.raises(Exception, match='omegaconf'): torch.load(tmp_path/'b2-model-best-epoch-10.tar', weights_only=True)
    found = open_released(tmp_path/'b2-model-best-epoch-10.tar')
    assert found.kind == 'pretraining' and (found.table.status == 'loaded').all() and len(found.table) == 710 and found.extra['config']['transform']['train']['transform']['affine_scale'] == [.8, 1.2]
    for name in ('b2_eval_1x3x96x64', ):
        z = np.load(golden(f'mammoclip/{name}.npz'))
        with torch.no_grad(): features = found.method.image_encoder(torch.from_numpy(z['x']))
        np.testing.assert_allclose(features.numpy(), z['pooled'], rtol=1e-4, atol=1e-5)


def test_there_and_back_again(tmp_path, listconfig):
    source = small()
    weights = source.state_dict()
    shuffled = OrderedDict((k, weights[k]) for k in sorted(weights)) | {'text_encoder.text_encoder.embeddings.position_ids': torch.arange(512)[None]}
    torch.save(tree(source, listconfig, model=shuffled), tmp_path/'m.tar')
    found = convert_released(tmp_path/'m.tar', tmp_path/'ours', config=TINY, tokenizer=TOKENIZER)
    assert dict(found.table.status.value_counts()) == {'loaded': len(weights), 'spare': 1}
    again = from_pretrained(tmp_path/'ours')
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in weights.items())
    x = torch.randint(0, 255, (2, 1, 64, 48), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(again.encode_image(x),
                                             source.encode_image(x)) and torch.equal(again.encode_text(['a mass']),
                                                                                     source.encode_text(['a mass']))
    export_released(tmp_path/'ours', tmp_path/'back.tar')
    one, two = read_checkpoint(tmp_path/'m.tar'), read_checkpoint(tmp_path/'back.tar')
    assert list(one.weights) == list(two.weights) and all(torch.equal(v, two.weights[k]) and v.dtype == two.weights[k].dtype for k, v in one.weights.items())
    assert one.extra == two.extra and isinstance(two.extra['config']['transform']['train']['transform']['affine_scale'], list)
    plain = torch.load(tmp_path/'back.tar', weights_only=True) # what we write needs no foreign class
    assert list(plain['model']) == list(shuffled) and plain['epoch'] == 10


def test_a_method_trained_here_is_written_in_the_originals_words(tmp_path):
    m = small(1, image_encoder='efficientnet-b2')
    export_released(m, tmp_path/'new.tar')
    stored = torch.load(tmp_path/'new.tar', weights_only=True)
    assert stored['config']['model']['image_encoder']['name'] == 'tf_efficientnetv2-detect' and list(stored['model']) == list(m.state_dict())
    assert stored['config']['model']['projection_head']['proj_dim'] == 8
    found = open_released(tmp_path/'new.tar', config=m.config, tokenizer=TOKENIZER)
    assert all(torch.equal(v, found.method.state_dict()[k]) for k, v in m.state_dict().items())
    with pytest.raises(TypeError, match='no counterpart'): kind_of_method(torch.nn.Linear(1, 1))


@pytest.mark.parametrize('outputs,labels,classes', [(1, 'mass', ()), (4, (), ('A', 'B', 'C', 'D')), (1, (), ())])
def test_classifier(tmp_path, outputs, labels, classes):
    m = Classifier(ClassifierConfig(labels=('density',) if classes else ('mass',), classes=classes,
                                    image_encoder='efficientnet-tiny')).eval()
    torch.save({'model': m.state_dict(), 'predictions': np.random.default_rng(0).random((7, outputs)), 'epoch': 3,
                'auroc': np.float64(.83)}, tmp_path/'c.pth')
    found = convert_released(tmp_path/'c.pth', tmp_path/'ours', labels=labels)
    assert found.kind == 'classifier' and found.extra['auroc'] == .83 and found.extra['predictions'].shape == (7, outputs) and found.method.config.classes == classes
    x = torch.randint(0, 255, (3, 1, 64, 48), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(from_pretrained(tmp_path/'ours').predict(x), m.predict(x))
    export_released(tmp_path/'ours', tmp_path/'back.pth')
    assert list(torch.load(tmp_path/'back.pth', weights_only=True)['model']) == list(m.state_dict())
    with pytest.raises(ValueError, match='outputs'): open_released(tmp_path/'c.pth', ('a', 'b'))


def test_detector(tmp_path):
    m = RetinaNet(reference_config(classes=('mass', 'suspicious_calcification'), image_encoder='efficientnet-tiny', pyramid_width=8,
                                   head_width=12)).eval()
    state = OrderedDict(released_state(m)) | {'efficientnet._fc.weight': torch.ones(3, 2), 'efficientnet._fc.bias': torch.zeros(3)}
    torch.save({'state_dict': state}, tmp_path/'d.pth')
    found = convert_released(tmp_path/'d.pth', tmp_path/'ours', labels=('mass', 'suspicious_calcification'))
    assert found.kind == 'detector' and found.method.config.padding == 'detector' and (found.table.status == 'spare').sum() == 2
    again = from_pretrained(tmp_path/'ours').state_dict()
    assert all(torch.equal(v, again[k]) for k, v in m.state_dict().items())
    export_released(tmp_path/'ours', tmp_path/'back.pth')
    back = torch.load(tmp_path/'back.pth', weights_only=True)['state_dict']
    assert list(back) == list(state) and all(torch.equal(back[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match='2 classes'): open_released(tmp_path/'d.pth', 'mass')


def test_another_architecture_and_other_bad_files(tmp_path, listconfig):
    weights = small().state_dict()
    wrong = {'config': stored_config(MammoCLIPConfig(image_encoder='efficientnet-b5'))}
    with pytest.raises(DataError, match='efficientnet-b5.*efficientnet-tiny'): open_released(Checkpoint(dict(weights), wrong, 'm.tar'))
    with pytest.raises(DataError, match='no Mammo-CLIP configuration'): open_released(Checkpoint(dict(weights), {}, 'm.tar'))
    with pytest.raises(DataError, match='no EfficientNet that is known'): open_released(Checkpoint({k: v for k, v in weights.items() if '_blocks.9.' not in k}, {}, 'm.tar'), config=TINY)
    with pytest.raises(DataError, match='no weights of Mammo-CLIP'): open_released(Checkpoint({'conv1.weight': torch.zeros(1)}, {}, 'resnet.pth'))
    with pytest.raises(DataError, match='no such file'): open_released(tmp_path/'absent.tar')
    for change, match in ((lambda w: w.pop('image_projection.projection.bias'), 'missing image_projection'),
                          (lambda w: w.update(more=torch.zeros(1)), 'unexpected more'),
                          (lambda w: w.update({'text_projection.projection.bias': torch.zeros(3)}),
                           r'shape text_projection.projection.bias \(3,\) for \(8,\)'),
                          (lambda w: w.update({'logit_scale': torch.tensor(float('nan'))}), 'not finite: logit_scale')):
        w = dict(weights); change(w)
        with pytest.raises(DataError, match=match): open_released(Checkpoint(w, {}, 'm.tar'), config=TINY, tokenizer=TOKENIZER)
    w = dict(weights); w.pop('image_projection.projection.bias')
    with pytest.warns(UserWarning, match='missing'): part = open_released(Checkpoint(w, {}, 'm.tar'), config=TINY, tokenizer=TOKENIZER,
                                                                          strict=False)
    assert (part.table.status == 'missing').sum() == 1 and (part.table.status == 'loaded').sum() == len(weights) - 1


def test_no_code_of_the_file_runs(tmp_path):
    import os
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    torch.save({'model': small().state_dict(), 'config': Evil()}, tmp_path/'evil.tar')
    with pytest.raises(DataError, match='mkdir'): open_released(tmp_path/'evil.tar')
    torch.save({'model': small().state_dict(), 'predictions': np.array([Evil()], object)}, tmp_path/'evil.pth')
    with pytest.raises(DataError, match='refused'): open_released(tmp_path/'evil.pth')
    assert not (tmp_path/'owned').exists()


def test_a_folder_without_tokenizer_says_so(tmp_path, listconfig):
    torch.save(tree(small(), listconfig), tmp_path/'m.tar')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        convert_released(tmp_path/'m.tar', tmp_path/'ours', config=MammoCLIPConfig(**{**vars(TINY), 'vocab_size': len(TOKENIZER)}))
    assert any('no tokenizer' in str(w.message) for w in seen) and (tmp_path/'ours'/RECORD).is_file()


def test_the_command_converts_and_goes_back(tmp_path):
    from typer.testing import CliRunner

    from medvl.commands import app
    m = Classifier(ClassifierConfig(labels=('mass',), image_encoder='efficientnet-tiny'))
    torch.save({'model': m.state_dict(), 'epoch': 3}, tmp_path/'c.pth')
    done = CliRunner().invoke(app, ['convert', str(tmp_path/'c.pth'), str(tmp_path/'ours'), '-l', 'mass'])
    assert done.exit_code == 0 and f'{len(m.state_dict())} loaded' in done.output, done.output
    assert from_pretrained(tmp_path/'ours').config.labels == ('mass',)
    assert CliRunner().invoke(app, ['convert', '--back', str(tmp_path/'ours'), str(tmp_path/'back.pth')]).exit_code == 0
    assert list(read_checkpoint(tmp_path/'back.pth').weights) == list(m.state_dict())
    done = CliRunner().invoke(app, ['convert', str(tmp_path/'no.tar'), str(tmp_path/'x')])
    assert done.exit_code == 2 and 'no such file' in done.output  # one line, as every command says it
