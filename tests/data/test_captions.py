"""X-VL's text rules against the original's, and keyed orders of sentences."""
import json
import random

import pytest
from golden import golden

from medvl.data.text.captions import caption_sentences, one_spelling, pre_caption, pre_question, shuffle_sentences


def test_text_rules_are_the_originals():
    stored = json.loads(golden('xvl/text_normalise.json').read_text())
    for t in stored['text']:
        caption = pre_caption(t['input'])
        assert caption == t['pre_caption'] and pre_caption(t['input'], 5) == t['pre_caption_max5']
        assert pre_question(t['input'], 50) == t['pre_question_50'] and pre_question(t['input'], 3) == t['pre_question_3']
        assert caption_sentences(caption) == t['split_of_pre_caption']
        assert shuffle_sentences(caption, rng=random.Random(3)) == t['shuffle_seed3_of_pre_caption']
    assert len(stored['text']) > 10 and all(one_spelling(k) == v for k, v in stored['post_process'].items())


def test_order_is_a_function_of_its_key():
    caption = '. '.join(f'sentence {i}' for i in range(8))
    orders = {shuffle_sentences(caption, 0, e, 5) for e in range(20)}
    assert len(orders) > 10 and shuffle_sentences(caption, 0, 3, 5) == shuffle_sentences(caption, 0, 3, 5) != shuffle_sentences(caption, 0, 3, 6)
    assert all(sorted(caption_sentences(o)) == sorted(caption_sentences(caption)) for o in orders)


@pytest.mark.parametrize('nothing', ['', None, float('nan'), ' \n', '..'])
def test_no_words(nothing):
    assert caption_sentences(pre_caption(nothing)) == [] and shuffle_sentences(pre_caption(nothing), 1) in ('.',)
