"""Whose vocabulary, in which case: folders read as transformers reads them, and texts that a tokeniser does not know."""
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, BertTokenizerFast, RobertaConfig, RobertaModel

from golden import sample
from medvl.core.errors import DataError
from medvl.data.text.tokens import SPECIAL, UNKNOWN_LIMIT, TokenCache, build_wordpiece, fit_tokenizer, load_tokenizer, lower_cases, pad_tokens, tokenise, unknown_share, wordpiece
from medvl.methods.mammoclip import MammoCLIP, MammoCLIPConfig
from medvl.models.text import TextEncoder, build_text_encoder

WORDS = [*SPECIAL, 'the', 'The', 'lungs', 'no', 'No', 'naive', 'naïve', 'Normal', 'normal', 'chest', '.', '##s', 'n', 'N', 'o', '##o', '影', '像']
TEXTS = ['The lungs. No naïve chest.', 'NORMAL Naïve chests', '影像 no [MASK] xyzzy', 'n. O']
BERT = {'model_type': 'bert', 'vocab_size': len(WORDS)}


def make(folder, config=None, tokenizer_config=None, fast=None, vocab=True, special=None, added=None):
    "A folder as models are given out: any of its files may be absent."
    folder.mkdir(parents=True)
    files = {'config.json': config, 'tokenizer_config.json': tokenizer_config, 'special_tokens_map.json': special, 'added_tokens.json': added}
    for name, content in files.items():
        if content is not None: (folder/name).write_text(json.dumps(content))
    if vocab: (folder/'vocab.txt').write_text('\n'.join(WORDS) + '\n', encoding='utf-8')
    if fast is not None: wordpiece({w: i for i, w in enumerate(WORDS)}, lower_case=fast).backend_tokenizer.save(str(folder/'tokenizer.json'))
    return folder


FOLDERS = { # layout: is it read in small letters
    'config only': (dict(config=BERT), True), 'bert-base-uncased': (dict(config=BERT), True), 'bert-base-cased': (dict(config=BERT), True),
    'empty tokenizer_config': (dict(config=BERT, tokenizer_config={}), True), 'cased': (dict(config=BERT, tokenizer_config={'do_lower_case': False}), False),
    'uncased': (dict(config=BERT, tokenizer_config={'do_lower_case': True}), True), 'strip_accents': (dict(config=BERT, tokenizer_config={'do_lower_case': False, 'strip_accents': True}), False),
    'keep accents': (dict(config=BERT, tokenizer_config={'do_lower_case': True, 'strip_accents': False}), True),
    'do_basic_tokenize': (dict(config=BERT, tokenizer_config={'do_lower_case': False, 'do_basic_tokenize': False}), False),
    'chinese': (dict(config=BERT, tokenizer_config={'tokenize_chinese_chars': False}), True), 'named class': (dict(config=BERT, tokenizer_config={'do_lower_case': False, 'tokenizer_class': 'BertTokenizerFast'}), False),
    'class without config': (dict(tokenizer_config={'do_lower_case': False, 'tokenizer_class': 'BertTokenizer'}), False), 'both files': (dict(config=BERT, fast=False, tokenizer_config={'do_lower_case': False}), False),
    'tokenizer.json, uncased': (dict(config=BERT, vocab=False, fast=True), True), 'tokenizer.json, cased, says so': (dict(config=BERT, vocab=False, fast=False, tokenizer_config={'do_lower_case': False}), False),
    'tokenizer.json, cased': (dict(config=BERT, vocab=False, fast=False), True), 'tokenizer.json alone, cased': (dict(vocab=False, fast=False), False), 'tokenizer.json alone': (dict(vocab=False, fast=True), True),
    'special tokens': (dict(config=BERT, special={'unk_token': '[UNK]', 'pad_token': '[PAD]'}), True), 'distilbert': (dict(config={'model_type': 'distilbert'}), True),
    'Bio_ClinicalBERT': (dict(config={**BERT, 'hidden_act': 'gelu', 'max_position_embeddings': 512}), True), # vocab.txt of a cased BERT, read in small letters
    'added': (dict(config=BERT, added={'spiculated': len(WORDS)}, tokenizer_config={'do_lower_case': True}), True)}


@pytest.mark.parametrize('name', FOLDERS)
@pytest.mark.filterwarnings('ignore:The tokeniser of')
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, name):
    layout, lower = FOLDERS[name]
    folder = make(tmp_path/name, **layout)
    ours, hub = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    texts = [*TEXTS, 'a spiculated chest']
    assert ours(texts).input_ids == hub(texts).input_ids and lower_cases(ours) == lower and ours.get_vocab() == hub.get_vocab()
    if layout.get('config', {}).get('model_type') == 'bert':
        for kind in (BertTokenizer, BertTokenizerFast): assert ours(texts).input_ids == kind.from_pretrained(str(folder), local_files_only=True)(texts).input_ids


@pytest.mark.parametrize('layout, lower', [(dict(), True), (dict(tokenizer_config={'do_lower_case': False}), False), (dict(config={'vocab_size': 21, 'hidden_size': 8}), True)])
def test_a_folder_without_a_kind_of_model(tmp_path, layout, lower):
    "AutoTokenizer gives up there; its BERT class does not."
    folder = make(tmp_path/'model', **layout)
    with pytest.raises(ValueError, match='backend'): AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours = load_tokenizer(folder)
    assert ours(TEXTS).input_ids == BertTokenizer.from_pretrained(str(folder))(TEXTS).input_ids and lower_cases(ours) == lower


def test_contradictions_are_told_and_can_be_changed(tmp_path):
    with pytest.warns(UserWarning, match="name 'bert-base-cased' says the opposite. lower_case=False"): read = load_tokenizer(make(tmp_path/'bert-base-cased', config=BERT))
    assert lower_cases(read)
    with pytest.warns(UserWarning, match='tokenizer.json says the opposite'): load_tokenizer(make(tmp_path/'b', config=BERT, vocab=False, fast=False))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_tokenizer(make(tmp_path/'bert-base-uncased', config=BERT))
        for name in ('b', 'bert-base-cased'):
            for lower in (True, False): assert lower_cases(load_tokenizer(tmp_path/name, lower_case=lower)) == lower


def test_a_bare_vocabulary(tmp_path):
    "Its name, then the folder around it, then the rule of transformers."
    for name, lower in (('my-uncased-vocab.txt', True), ('bert-base-cased-vocab.txt', False), ('words.txt', True), ('bert-base-cased/vocab.txt', False), ('bert-base-uncased/vocab.txt', True), ('b/vocab.txt', True)):
        path = tmp_path/name
        path.parent.mkdir(exist_ok=True)
        path.write_text('\n'.join(WORDS), encoding='utf-8')
        assert lower_cases(load_tokenizer(path)) == lower, name
        assert [lower_cases(load_tokenizer(path, lower_case=x)) for x in (True, False)] == [True, False]
    (tmp_path/'b'/'tokenizer_config.json').write_text('{"do_lower_case": false}')
    assert not lower_cases(load_tokenizer(tmp_path/'b'/'vocab.txt'))


@pytest.mark.parametrize('lower', [True, False])
def test_what_is_saved_is_read_again(tmp_path, lower):
    tokenizer = build_wordpiece([*TEXTS, 'A Mass'], 90, lower_case=lower)
    tokenizer.save_pretrained(tmp_path/'uncased-or-cased')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The tokeniser of') # the folder's name
        again = load_tokenizer(tmp_path/'uncased-or-cased')
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids and lower_cases(again) == lower


def test_byte_pairs(tmp_path):
    "RoBERTa's kind: no [UNK], other special tokens, capitals kept."
    from tokenizers.pre_tokenizers import ByteLevel
    pieces = ['<s>', '<pad>', '</s>', '<unk>', '<mask>', *sorted(ByteLevel.alphabet()), 'ma', 'ss']
    folder = tmp_path/'roberta'
    folder.mkdir()
    (folder/'vocab.json').write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder/'merges.txt').write_text('#version: 0.2\nm a\ns s\n')
    (folder/'config.json').write_text('{"model_type": "roberta"}')
    ours = load_tokenizer(folder)
    assert ours(TEXTS).input_ids == AutoTokenizer.from_pretrained(str(folder))(TEXTS).input_ids and not lower_cases(ours) and ours.pad_token_id == 1
    assert ours.decode(ours('Mass 影', add_special_tokens=False).input_ids) == 'Mass 影' and unknown_share(ours, tokenise(ours, TEXTS)) == 0
    assert pad_tokens(tokenise(ours, ['ma', 'mass mass']), ours.pad_token_id)[0][0, -1] == 1


# no vocabulary
def test_weights_without_a_vocabulary_are_refused(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path/'weights-only')
    with pytest.raises(DataError, match='no vocabulary'): load_tokenizer(tmp_path/'weights-only')
    method = MammoCLIP(MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder=str(tmp_path/'weights-only')))
    with pytest.raises(DataError, match='no vocabulary'): method.encode_text(['no mass', 'a spiculated mass'])
    (tmp_path/'weights-only'/'tokenizer_config.json').write_text('{"do_lower_case": true}') # half of the files
    with pytest.raises(DataError, match='no vocabulary'): load_tokenizer(tmp_path/'weights-only')


def test_a_vocabulary_without_words_is_refused(tmp_path):
    folder = make(tmp_path/'a', config={'model_type': 'roberta'}) # a vocab.txt is no vocabulary for it
    with pytest.raises(DataError, match='special pieces and no word'): load_tokenizer(folder)
    (folder/'vocab.txt').write_text('\n'.join(SPECIAL))
    with pytest.raises(DataError, match='no word'): load_tokenizer(folder/'vocab.txt')
    (folder/'config.json').write_text(json.dumps(BERT))
    with pytest.raises(DataError, match='no word'): load_tokenizer(folder)
    (folder/'vocab.txt').write_text('[PAD]\nno\nmass')
    with pytest.raises(DataError, match='lacks'): load_tokenizer(folder)
    (folder/'tokenizer.json').write_text('{"half":')
    with pytest.raises(DataError, match='cannot be read'): load_tokenizer(folder)


# words that it does not know
def test_unknown_words_are_refused(tmp_path):
    tokenizer = wordpiece({w: i for i, w in enumerate(WORDS)})
    rows = tokenizer(['the lungs xyzzy qwert']).input_ids
    assert unknown_share(tokenizer, rows) == 0.5 and unknown_share(tokenizer, []) == 0
    unknown, known = ['spiculated mass, BI-RADS 5'] * 20, ['the lungs. no normal chest.'] * 20
    for cut in (lambda texts: tokenise(tokenizer, texts), TokenCache(tokenizer, tmp_path)):
        with pytest.raises(DataError, match=r'almost none of the words.*100% of'): cut(unknown + [f'spiculated{i} wall' for i in range(60)])
    assert len(tokenise(tokenizer, ['spiculated mass'])) == 1 # too few to judge by
    with pytest.warns(UserWarning, match='does not know many words'): tokenise(tokenizer, known + ['spiculated mass'] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tokenise(tokenizer, known)
    assert 0 < UNKNOWN_LIMIT < 1


def test_a_tokenizer_of_another_model():
    tokenizer = build_wordpiece(TEXTS, 90)
    with pytest.raises(ValueError, match='tokens, the text encoder 20'): fit_tokenizer(tokenizer, 20)
    with pytest.warns(UserWarning, match='another model'): fit_tokenizer(tokenizer, 30522)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fit_tokenizer(tokenizer, 128) is tokenizer
    with pytest.raises(ValueError, match='tokens, the text encoder 20'): MammoCLIP(MammoCLIPConfig(image_encoder='efficientnet-tiny', text_encoder='tiny', vocab_size=20), tokenizer)


def test_positions_that_are_for_words():
    roberta = TextEncoder(RobertaModel(RobertaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=34), add_pooling_layer=False)).eval()
    assert roberta.max_length == 32 and build_text_encoder('tiny', vocab_size=20).max_length == 512
    ids, mask = torch.full((1, 32), 7), torch.ones(1, 32, dtype=torch.long)
    assert torch.isfinite(roberta(ids, mask)).all()
    with pytest.raises(ValueError, match='33 tokens, but the text encoder reads 32'): roberta(torch.full((1, 33), 7), torch.ones(1, 33, dtype=torch.long))


@pytest.mark.parametrize('name', ['cased', 'uncased'])
def test_real_vocabularies_know_real_reports(name):
    d = pd.read_csv(sample('reports/openi_reports.csv'), dtype=str, keep_default_na=False)
    tokenizer = load_tokenizer(sample(f'tokenizer/bert-base-{name}-vocab.txt'))
    rows = tokenise(tokenizer, [t for t in d.findings[:400] if t.strip()])
    assert unknown_share(tokenizer, rows) < 0.001 and np.mean([len(r) for r in rows]) > 20
