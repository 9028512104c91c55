"""Tokenisers from any place, cutting and padding, and a cache that survives damage and company."""
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import sample
from medvl.core.errors import DataError
from medvl.data.text.tokens import (SPECIAL, TokenCache, build_wordpiece, load_tokenizer, pad_tokens, read_vocab, tokenise, tokenizer_digest, wordpiece)

TEXTS = ['no mass in the left breast.', 'irregular mass, bi-rads 4a.', 'stable 3.5 cm mass. no change.', 'calcification', 'naïve wall']


@pytest.fixture(scope='module')
def tiny(): return build_wordpiece(TEXTS, 90)


@pytest.fixture(scope='module')
def cased(): return load_tokenizer(sample('tokenizer/bert-base-cased-vocab.txt'))


def test_bioclinicalbert_vocabulary(cased):
    assert len(cased) == 28996 and (cased.pad_token_id, cased.unk_token_id, cased.cls_token_id, cased.sep_token_id) == (0, 100, 101, 102)
    assert cased.convert_ids_to_tokens(cased('bi-rads 4a, 3.5 cm').input_ids) == ['[CLS]', 'bi', '-', 'r', '##ads', '4', '##a', ',', '3', '.', '5', 'cm', '[SEP]']
    assert cased('Mass').input_ids != cased('mass').input_ids # the case is kept …
    lower = load_tokenizer(sample('tokenizer/bert-base-cased-vocab.txt'), lower_case=True) # … unless asked otherwise
    assert lower('Mass').input_ids == lower('mass').input_ids == cased('mass').input_ids
    uncased = load_tokenizer(sample('tokenizer/bert-base-uncased-vocab.txt'))
    assert len(uncased) == 30522 and uncased('MASS').input_ids == uncased('mass').input_ids


def test_against_a_plain_wordpiece(cased):
    "Longest-match-first, written out."
    vocab = cased.get_vocab()
    def pieces(word):
        out, start = [], 0
        while start < len(word):
            end = next((e for e in range(len(word), start, -1) if ('##' if start else '') + word[start:e] in vocab), None)
            if end is None: return ['[UNK]']
            out.append(('##' if start else '') + word[start:end])
            start = end
        return out
    for word in ('mammographic', 'spiculated', 'calcifications', 'retroareolar', 'birads', 'xyzzy'):
        assert cased.tokenize(word) == pieces(word)


def test_category_survives(cased):
    from medvl.data.text.reports import normalise
    for category in '0123456':
        for spelling in ('BI-RADS {}', 'BIRADS: {}.', 'BI-RADS® {}'):
            assert category in cased.convert_ids_to_tokens(tokenise(cased, [normalise(spelling.format(category))])[0].tolist())


@pytest.mark.parametrize('content, message', [('[PAD]\n[UNK]\n', 'lacks'), ('\n'.join([*SPECIAL, 'a', 'a']), 'row 6')])
def test_bad_vocabularies(tmp_path, content, message):
    path = tmp_path/'vocab.txt'
    path.write_text(content)
    with pytest.raises(DataError, match=message): load_tokenizer(path)
    path.write_bytes(b'\xff\xfe\x00binary')
    with pytest.raises(DataError, match='UTF-8'): read_vocab(path)


def test_missing_ones(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError): load_tokenizer(tmp_path/'none')
    with pytest.raises(FileNotFoundError): load_tokenizer('./vocab.txt')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='build_wordpiece'): load_tokenizer('medvl-tests/no-such-tokeniser')


def test_folder_forms(tmp_path, tiny):
    tiny.save_pretrained(tmp_path/'saved')
    assert load_tokenizer(tmp_path/'saved')(TEXTS[1]).input_ids == tiny(TEXTS[1]).input_ids
    (tmp_path/'bare').mkdir()
    vocab = sorted(tiny.get_vocab(), key=tiny.get_vocab().get)
    (tmp_path/'bare'/'vocab.txt').write_text('\n'.join(vocab) + '\n', encoding='utf-8')
    assert load_tokenizer(tmp_path/'bare', lower_case=True)(TEXTS[1]).input_ids == tiny(TEXTS[1]).input_ids
    assert load_tokenizer(tiny) is tiny


def test_built_the_same_in_every_process(tiny):
    code = 'import json,sys; from medvl.data.text.tokens import build_wordpiece; print(json.dumps(build_wordpiece(json.loads(sys.argv[1]), 90).get_vocab(), sort_keys=True))'
    out = subprocess.run([sys.executable, '-c', code, json.dumps(TEXTS[::-1])], capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': '77'}).stdout
    assert json.loads(out.splitlines()[-1]) == tiny.get_vocab()


def test_built_reads_all_its_texts(tiny):
    for text in TEXTS: assert tiny.unk_token_id not in tiny(text).input_ids
    for nothing in ([], ['', ' ']):
        with pytest.raises(ValueError, match='no word|have none'): build_wordpiece(nothing)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.sampled_from([1, 4, 8]))
def test_padding(lengths, multiple):
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    ids, mask = pad_tokens(rows, pad=0, multiple=multiple)
    assert ids.dtype == mask.dtype == np.int64 and ids.shape == mask.shape
    assert ids.shape[1] % multiple == 0 and max(lengths) <= ids.shape[1] < max(lengths) + multiple
    assert mask.sum(1).tolist() == lengths and all((ids[i, :n] == rows[i]).all() and not ids[i, n:].any() for i, n in enumerate(lengths))


def test_cut_keeps_sep(tiny):
    row = tokenise(tiny, ['mass ' * 10_000], max_length=256)[0]
    assert len(row) == 256 and row[0] == tiny.cls_token_id and row[-1] == tiny.sep_token_id and row.dtype == np.int32
    assert tokenise(tiny, []) == []
    with pytest.raises(DataError, match='patient 9'): tokenise(tiny, ['mass', '\t'], names=['a', 'patient 9'])
    with pytest.raises(ValueError, match='no room'): tokenise(tiny, ['mass'], max_length=2)
    with pytest.raises(ValueError, match='does not fit'): pad_tokens([np.arange(9)], width=8)


def same(a, b): return [r.tolist() for r in a] == [r.tolist() for r in b]


def test_cache_grows_and_reloads(tmp_path, tiny):
    cache = TokenCache(tiny, tmp_path)
    cache(TEXTS[:2]); cache.save(); cache(TEXTS[1:4]); cache.save(); cache.save()
    again = TokenCache(tiny, tmp_path)
    assert len(again) == 4 and len(list(tmp_path.glob('*/shard-*'))) == 2
    assert same(again(TEXTS), tokenise(tiny, TEXTS)) and len(again.new) == 1
    assert len(TokenCache(tiny, tmp_path, max_length=16)) == 0 # another length
    assert len(TokenCache(build_wordpiece(TEXTS, 91), tmp_path)) in (0, 4) # another vocabulary, unless the texts gave the same one
    assert len(TokenCache(wordpiece(tiny.get_vocab(), lower_case=False), tmp_path)) == 0 # another treatment of case


def test_cache_digest_is_of_behaviour(tiny):
    before = tokenizer_digest(tiny)
    tiny(TEXTS, padding=True, truncation=True, max_length=6)
    assert tokenizer_digest(tiny) == before == tokenizer_digest(wordpiece(tiny.get_vocab()))


def test_cache_damage(tmp_path, tiny):
    cache = TokenCache(tiny, tmp_path)
    cache(TEXTS); cache.save()
    file = next(tmp_path.glob('*/shard-*/ids.npy'))
    data = bytearray(file.read_bytes()); data[-3] ^= 255
    file.write_bytes(data)
    with pytest.warns(UserWarning, match='damaged'): again = TokenCache(tiny, tmp_path)
    assert len(again) == 0 and same(again(TEXTS), tokenise(tiny, TEXTS))
    file.write_bytes(data[:20])
    with pytest.warns(UserWarning, match='damaged'): TokenCache(tiny, tmp_path)


def test_cache_two_writers_and_pickle(tmp_path, tiny):
    a, b = TokenCache(tiny, tmp_path), TokenCache(tiny, tmp_path)
    a(TEXTS[:3]); b(TEXTS[:3]); b(TEXTS[3:]); a.save(); b.save()
    assert len(TokenCache(tiny, tmp_path)) == len(TEXTS)
    a(TEXTS)
    c = pickle.loads(pickle.dumps(a)) # noqa: S301
    assert same(c(TEXTS), a(TEXTS)) and len(c.new) == len(a.new)
    memory = TokenCache(tiny); memory(TEXTS); memory.save()
    assert len(pickle.loads(pickle.dumps(memory))) == len(TEXTS) # noqa: S301
