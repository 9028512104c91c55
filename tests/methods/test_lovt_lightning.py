"""Checkpoints of LoVT's own code, written as PyTorch Lightning 1.4.9 writes them: configuration objects, callbacks keyed by class, buffers and online classifiers; opened strictly, nothing imported, nothing run."""
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import pytest
import torch

from medvl.core.errors import DataError
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.clip import CLIP, CLIPConfig
from medvl.methods.convirt import ConVIRT, ConVIRTConfig
from medvl.methods.lovt import LoVT, LoVTConfig
from medvl.methods.released.lovt_files import PATHS, from_lovt, lovt_config
from medvl.models.checkpoints import read_checkpoint

WORDS = ['Small left effusion.', 'The heart is large.', 'No pneumothorax.']
TOKENIZER = build_wordpiece(WORDS, size=90)
SMALL = dict(image_encoder='resnet-tiny', text_encoder='tiny', dim=16, hidden=24, vocab_size=90, legacy_padded_mean=True, legacy_padded_norm=True, frozen_layers=0)
ENCODER = dict(backbone_model=['pytorch/vision:v0.6.0', 'resnet50'], region_feature_layer='conv5', global_feature_layer='local', global_aggregator='avgpool_attention')
REPORTS = dict(language_encoder='emilyalsentzer/Bio_ClinicalBERT', max_length=512, freeze_embeddings=True, freeze_encoder_layers=6, global_aggregator='avgpool_attention', global_from_local=True,
               local_from='sentences', sentence_aggregator='max')
LOCAL = dict(objective_type='local_intra_sample_contrastive', similarity_temperature=.3, negatives_from_same_modality=False, smooth_lambda=1.)
STORED = dict(
    encoder_a=ENCODER, encoder_b=REPORTS, d_z=16, d_hidden=24, projection_norm='batch', attention_sim='scaled_dot_product', l_weights_a='from_aggregation', l_weights_b='from_aggregation',
    g_alignment=dict(objective_type='global_nce', similarity_temperature=.1, negatives_from_same_modality=False),
    ll_alignments_a={'0': LOCAL | dict(distance_threshold=.5, smooth_weights=True, threshold_type='relative')},
    ll_alignments_b={'0': LOCAL | dict(distance_threshold=0, smooth_weights=False, threshold_type='absolute')},
    loss_weights=dict(global_a2b=.75, global_b2a=.25, local_a_l2att=.375, local_a_att2l=.375, local_b_l2att=.375, local_b_att2l=.375))
NO_LOCAL = dict(ll_alignments_a={}, ll_alignments_b={}, l_weights_a=None, l_weights_b=None, loss_weights=dict(global_a2b=.75, global_b2a=.25))
KINDS = {'lovt': (LoVT, LoVTConfig, {}), 'clip': (CLIP, CLIPConfig, NO_LOCAL | dict(encoder_b=REPORTS | dict(global_aggregator='max', global_from_local=False))),
         'convirt': (ConVIRT, ConVIRTConfig, NO_LOCAL | dict(encoder_a=ENCODER | dict(global_aggregator='avg'), projection_norm=None,
                                                             encoder_b=REPORTS | dict(global_aggregator='max', global_from_local=False)))}


@dataclass
class BiModalModelConfig:
    "Fields of the original's configuration, with its kinds of annotation (a pickled `Dict[str, Any]` calls operator.getitem)."
    encoder_a: Any = None
    encoder_b: Any = None
    d_z: int = 512
    d_zg: Optional[int] = None
    d_hidden: int = 2048
    projection_norm: Optional[str] = 'batch'
    attention_sim: str = 'scaled_dot_product'
    attention_prob_dropout_prob: float = 0.
    attended_dropout_prob: float = 0.
    projection_dropout_prob: float = 0.
    attention_norm: Optional[str] = 'batch'
    symmetric_attention: bool = True
    project_attention_keys: bool = True
    project_attention_values: bool = True
    project_attention_outputs: bool = True
    attention_temperature: float = 1.0
    attention_temperature_trainable: bool = False
    l_weights_a: Optional[str] = None
    l_weights_b: Optional[str] = None
    l_weights_stop_grad: bool = True
    ll_alignments_a: Dict[str, Any] = field(default_factory=dict)
    ll_alignments_b: Dict[str, Any] = field(default_factory=dict)
    g_alignment: Optional[Any] = None
    loss_weights: Dict[str, float] = field(default_factory=dict)
    component_loaded_from_checkpoint: List[str] = field(default_factory=lambda: ['model_a', 'model_b'])


class AttributeDict(dict):
    "What Lightning keeps hyper-parameters in."


class ModelCheckpoint: pass
class EarlyStopping: pass


@contextmanager
def foreign():
    "While a file is written, the classes live where the original and Lightning have them; when it is read those modules are gone."
    homes = {BiModalModelConfig: 'models.pretraining.pretraining_utils', AttributeDict: 'pytorch_lightning.utilities.parsing',
             ModelCheckpoint: 'pytorch_lightning.callbacks.model_checkpoint', EarlyStopping: 'pytorch_lightning.callbacks.early_stopping'}
    with pytest.MonkeyPatch.context() as m:
        for cls, home in homes.items():
            parts = home.split('.')
            for i in range(1, len(parts) + 1):
                name = '.'.join(parts[:i])
                if name not in sys.modules: m.setitem(sys.modules, name, types.ModuleType(name))
            setattr(sys.modules[home], cls.__name__, cls)
            m.setattr(cls, '__module__', home)
        yield
    assert not any(name.split('.')[0] in ('models', 'pytorch_lightning') for name in sys.modules)


def weights_of(method, kind):
    "The method's tensors under the original's names, with all that such a file holds beside."
    state = {}
    for k, v in method.state_dict().items():
        part = next(p for p in PATHS if k.startswith(p + '.'))
        state[PATHS[part] + k[len(part) + 1:]] = v[..., None] if part in ('region_projection', 'sentence_projection') and v.dim() == 2 else v
    state['model_b.encoder.language_model.embeddings.position_ids'] = torch.arange(512)[None]
    state |= {f'model_b.encoder.language_model.pooler.dense.{k}': torch.zeros(3) for k in ('weight', 'bias')}
    for name in ('scan', 'report'): state |= {f'chexpert_bin_{name}.classifier.weight': torch.zeros(14, 8), f'chexpert_bin_{name}.classifier.bias': torch.zeros(14)}
    if kind == 'lovt': return state | {f'loss_module.ll_alignments_{s}.0.{b}': torch.ones(3, 3) for s in 'ab' for b in ('pos_weights', 'negatives_mask')}
    unused = {f'model_{s}.project_local.projection_{w}.{k}': torch.zeros(2, 2, 1) for s in 'ab' for w in ('before', 'after') for k in ('weight', 'bias')}
    return state | unused | {f'll_attention.{m}_projection.{k}': torch.zeros(2, 2) for m in ('key', 'value', 'output') for k in ('weight', 'bias')}


def lightning(path, method, kind, **changes):
    "Write a file as Lightning 1.4.9 would."
    omegaconf = pytest.importorskip('omegaconf', reason='omegaconf (extra `oracles`) writes the configuration objects of the original')
    _, _, stored = KINDS[kind]
    with foreign(): config = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(BiModalModelConfig), STORED | stored | changes)
    optimiser = torch.optim.Adam(method.parameters(), lr=1e-4)
    tree = {'epoch': 3, 'global_step': 400, 'pytorch-lightning_version': '1.4.9', 'state_dict': weights_of(method, kind),
            'callbacks': {ModelCheckpoint: {'monitor': 'val/total_loss', 'best_model_score': torch.tensor(2.5), 'best_model_path': 'x.ckpt'},
                          EarlyStopping: {'wait_count': 2, 'patience': 10, 'best_score': torch.tensor(2.5)}},
            'optimizer_states': [optimiser.state_dict()], 'lr_schedulers': [{'T_max': 100, '_last_lr': [1e-4], 'base_lrs': [1e-4]}], 'native_amp_scaling_state': {'scale': 65536.},
            'hparams_name': 'kwargs', 'hyper_parameters': AttributeDict(config=config, dataset='mimic-cxr_ap-pa_find-impr', num_workers=20)}
    with foreign(): torch.save(tree, path)


def small(kind):
    torch.manual_seed(1)
    cls, config, _ = KINDS[kind]
    norm = {'projection_norm': 'none'} if kind == 'convirt' else {}
    return cls(config(**SMALL | norm), TOKENIZER).eval()


@pytest.mark.parametrize('kind', KINDS)
def test_a_lightning_file_opens_from_itself_alone(kind, tmp_path):
    method = small(kind)
    lightning(tmp_path/'last.ckpt', method, kind)
    again, report = from_lovt(tmp_path/'last.ckpt', None, TOKENIZER, image_encoder='resnet-tiny', text_encoder='tiny', vocab_size=90, frozen_layers=0)
    assert type(again) is KINDS[kind][0] and report.complete and len(report.loaded) == len(method.state_dict())
    images = torch.randint(0, 255, (2, 1, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), method.encode_image(images)) and torch.equal(again.encode_text(WORDS), method.encode_text(WORDS))
    left = {k.split('.')[0] for k in report.ignored}
    assert {'chexpert_bin_scan', 'chexpert_bin_report'} <= left and any('pooler' in k for k in report.ignored)
    if kind != 'lovt': assert 'll_attention' in left and any('project_local' in k for k in report.ignored)


def test_the_configuration_is_read(tmp_path):
    "What the original's experiment files say becomes our defaults, which are the paper's."
    lightning(tmp_path/'last.ckpt', small('lovt'), 'lovt', d_z=512, d_hidden=2048)
    config = lovt_config(read_checkpoint(tmp_path/'last.ckpt'))
    paper = LoVTConfig(text_encoder='bert-base-clinical-config', tokenizer=config.tokenizer, legacy_padded_mean=True, legacy_padded_norm=True, frozen_layers=6)
    assert config == paper
    extra = read_checkpoint(tmp_path/'last.ckpt').extra
    assert extra['callbacks']['EarlyStopping']['patience'] == 10 and 'optimizer_states' not in extra and extra['hyper_parameters']['num_workers'] == 20


@pytest.mark.parametrize('change, says', [(dict(encoder_a=ENCODER | dict(concat_global_with_regions=True)), 'concat_global_with_regions'), (dict(d_zg=8), 'd_zg'),
                                          (dict(ll_alignments_a={'0': dict(objective_type='local_mean')}), 'll_alignments_a'), (dict(encoder_b={}), 'no configuration'),
                                          (dict(ll_alignments_a={'0': LOCAL | dict(distance_threshold=1.5, smooth_weights=True, threshold_type='absolute')}), 'threshold_type')])
def test_what_is_not_known_is_said(change, says, tmp_path):
    lightning(tmp_path/'last.ckpt', small('lovt'), 'lovt', **change)
    with pytest.raises(DataError, match=says): from_lovt(tmp_path/'last.ckpt', None, TOKENIZER)


OPTIONS = dict(
    encoder_a=ENCODER | dict(region_feature_layer='conv4', add_region_pos_encodings=True, input_size=[64, 64]),
    encoder_b=REPORTS | dict(sentence_aggregator='avgpool_attention', sentence_encoding_mode='independent'), projection_dropout_prob=.1, attended_dropout_prob=.2, l_weights_stop_grad=False,
    project_attention_values=False, attention_temperature_trainable=True, g_alignment=dict(objective_type='global_predictor', d_hidden=20),
    ll_alignments_a={'0': LOCAL | dict(distance_threshold=.5, smooth_weights=False, threshold_type='relative', temperature_trainable=True), '1': dict(objective_type='local_mse')},
    ll_alignments_b={'0': dict(objective_type='local_predictor', d_hidden=20)},
    loss_weights=dict(global_a2b=.75, global_b2a=.25, local_a_0_l2att=.5, local_a_0_att2l=.25, local_a_1_l2att=.1, local_a_1_att2l=.1, local_b_l2att=.3, local_b_att2l=.2))


def test_a_file_with_the_options_of_the_original_opens(tmp_path):
    "Learnt temperatures, predictors, positions and a pool of tokens have tensors of their own; weights differ between directions; the losses come out as the file's configuration weighs them."
    pytest.importorskip('omegaconf', reason='omegaconf (extra `oracles`) writes the configuration objects of the original')
    changes = dict(image_encoder='resnet-tiny', text_encoder='tiny', vocab_size=90, frozen_layers=0)
    torch.manual_seed(1)
    probe = small('lovt')
    lightning(tmp_path/'plain.ckpt', probe, 'lovt', **OPTIONS)
    config = lovt_config(read_checkpoint(tmp_path/'plain.ckpt'))
    assert (config.region_stage, config.region_grid, config.sentence_pool, config.sentence_encoding) == ('conv4', (4, 4), 'attention', 'independent')
    assert (config.projection_dropout, config.attended_dropout, config.weights_gradient, config.attention_values, config.attention_keys) == (.1, .2, True, False, True)
    assert (config.global_objective, config.predictor_hidden, config.predictor_stop, config.learn_local_temperature, config.trainable_temperature) == ('predictor', 20, False, True, True)
    method = LoVT(LoVTConfig(**{**vars(config), **changes, 'tokenizer': ''}), TOKENIZER).eval()
    for p in method.parameters(): p.data += .01 * torch.randn_like(p)
    names = {'log_temperature': '', 'region_positions': 'model_a.encoder.region_pos_embeddings', 'alignment.log_temperature': 'll_attention._temperature',
             'objectives.regions.0.log_temperature': 'loss_module.ll_alignments_a.0._temperature'}
    heads = {'image_predictor.': 'loss_module.g_alignment.predictor_1.', 'text_predictor.': 'loss_module.g_alignment.predictor_2.', 'sentence_pool.': 'model_b.encoder.sentence_aggregator.',
             'objectives.sentences.0.local_predictor.': 'loss_module.ll_alignments_b.0.predictor_a.', 'objectives.sentences.0.attended_predictor.': 'loss_module.ll_alignments_b.0.predictor_b.'}
    state = method.state_dict()
    special = {k: names.get(k) or next(t + k[len(o):] for o, t in heads.items() if k.startswith(o)) for k in state if k in names or k.startswith(tuple(heads))}
    assert set(names) - {'log_temperature'} <= set(special) and len(special) > 30

    class Rest:
        def state_dict(self): return {k: v for k, v in state.items() if k not in special}
        def parameters(self): return method.parameters()
    lightning(tmp_path/'last.ckpt', Rest(), 'lovt', **OPTIONS)
    file = read_checkpoint(tmp_path/'last.ckpt')
    file.weights |= {t: state[k][..., None] if k.startswith('objectives') and state[k].dim() == 2 else state[k] for k, t in special.items()}
    again, report = from_lovt(file, None, TOKENIZER, **changes)
    assert report.complete and len(report.loaded) == len(state)
    images, tokens = torch.randint(0, 255, (3, 1, 1, 64, 64), dtype=torch.uint8), {k: v.unsqueeze(1) for k, v in method.token_batch([WORDS, WORDS[:1], WORDS[1:]]).items()}
    batch = {'images': images, 'tokens': tokens, 'sample_id': list('abc')}
    with torch.no_grad():
        out, want = again.eval()(batch), method(batch)
        for k in want: assert torch.equal(out[k], want[k]), k
    total = .75 * out['i2t'] + .25 * out['t2i'] + .5 * out['regions_0_l2att'] + .25 * out['regions_0_att2l'] + .1 * (out['regions_1_l2att'] + out['regions_1_att2l']) + .3 * out['sentences_l2att'] + .2 * out['sentences_att2l']
    torch.testing.assert_close(out['loss'], total)


def test_a_tensor_too_many_or_too_few_is_refused(tmp_path):
    method = small('clip')
    lightning(tmp_path/'a.ckpt', method, 'clip')
    good = read_checkpoint(tmp_path/'a.ckpt')
    for name, drop, says in (('model_a.surprise.weight', '', 'surprise'), ('', 'model_a.project_global.norm.bias', 'image_projection.norm.bias'),
                             ('', 'model_a.encoder.global_aggregator.attention.in_proj_weight', 'image_pool is not found')):
        weights = {k: v for k, v in good.weights.items() if k != drop} | ({name: torch.zeros(1)} if name else {})
        good.weights, kept = weights, good.weights
        with pytest.raises(DataError, match=says): from_lovt(good, method.config, TOKENIZER)
        good.weights = kept


def test_a_compiled_or_parallel_model_opens_too(tmp_path):
    method = small('lovt')
    torch.save({'state_dict': {f'_orig_mod.{k}': v for k, v in weights_of(method, 'lovt').items()}}, tmp_path/'c.ckpt')
    again, report = from_lovt(tmp_path/'c.ckpt', method.config, TOKENIZER)
    assert report.complete
