"""Networks of A2I2 against the numbers of the original (golden/a2i2)."""
import json

import numpy as np
import torch
from golden import golden
from torch import nn

from medvl.models.guided_filter import difference, guided_filter, remove_veil, shown
from medvl.models.heads import unit
from medvl.models.shuffle_decoder import ShuffleBlock
from medvl.models.unet import UpBlock, double_conv
from medvl.models.word_states import add_layers, counted_words, join_pieces, number_words, sentence_vector


def arrays(name):
    z = np.load(golden(f'a2i2/{name}'))
    return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files if z[k].dtype.kind in 'fiub'}


def near(a, b, rtol=1e-4, atol=1e-5): torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def filled(module, a, prefix, names=()):
    "A module with the original's weights; `names`: (beginning of theirs, ours)."
    state = {k[len(prefix):]: v for k, v in a.items() if k.startswith(prefix)}
    for theirs, ours in names: state = {k.replace(theirs, ours): v for k, v in state.items()}
    module.load_state_dict(state)
    return module.eval()


def test_blocks():
    a = arrays('decoder_unet_blocks.npz')
    with torch.no_grad():
        near(filled(ShuffleBlock(6, 4), a, 'decblk__')(a['decblk_x']), a['decblk_y'])
        up = filled(UpBlock(10, 5, 8) if a['upblk__upsample.weight'].shape[1] == 8 else ThinUp(10, 7, 5, 8), a, 'upblk__', (('upsample', 'up'), ('conv_block_1.conv', 'mix.0'), ('conv_block_1.bn', 'mix.1'), ('conv_block_2.conv', 'mix.3'), ('conv_block_2.bn', 'mix.4')))
        near(up(a['upblk_up'], a['upblk_down']), a['upblk_y'])
        bridge = filled(double_conv(5, 6), a, 'bridge__bridge.', (('0.conv', '0'), ('0.bn', '1'), ('1.conv', '3'), ('1.bn', '4')))
        near(bridge(a['bridge_x']), a['bridge_y'])


class ThinUp(UpBlock):
    "An UpBlock whose transposed convolution has a width of its own, as the original's has."
    def __init__(self, channels_in, between, skip, channels_out):
        super().__init__(channels_in, skip, channels_out)
        self.up, self.mix = nn.ConvTranspose2d(channels_in, between, 2, stride=2), double_conv(between + skip, channels_out)


def test_image_embeddings():
    a = arrays('image_embed.npz')
    near(unit(torch.nn.functional.linear(a['global_feat'], a['Wg'], a['bg'])), a['global_emb'])
    near(unit(torch.nn.functional.conv2d(a['local_feat'], a['Wl']).movedim(1, -1)).movedim(-1, 1), a['local_emb'])


def test_words():
    a, told = arrays('text_aggregate.npz'), json.loads(golden('a2i2/text_aggregate.json').read_text())
    ids, states = a['ids'].long(), a['hidden_states'][-4:]
    starts = torch.tensor([not w.startswith('##') for w in told['vocab']])
    mask = ids != told['vocab'].index('[PAD]')
    words = number_words(ids, mask, starts)
    assert counted_words(words, 10).sum(1).tolist() == told['cap_lens_used_in_local_loss']
    for row, number, aggregated, pieces in zip(ids, words, told['sents_aggregated'], told['sents_not_aggregated'], strict=True):
        assert [told['vocab'][i] for i in row] == pieces
        joined = [''.join(told['vocab'][i].removeprefix('##') for i in row[number == k]) for k in range(1, int(number.max()) + 1)]
        assert joined == [w for w in aggregated if w != '[PAD]']
    for how in ('sum', 'mean'):
        joined = join_pieces(add_layers(list(states), how), words)
        near(joined.mT, a[f'{how}_norm0_words'])
        near(sentence_vector(joined, words, over=10), a[f'{how}_norm0_sent'])
        near(unit(sentence_vector(joined, words)), a[f'{how}_norm1_sent']) # lengths of padding or not: one direction
        there = words.amax(1, keepdim=True) > torch.arange(10)
        near(unit(joined)[there], a[f'{how}_norm1_words'].mT[there]) # theirs are NaN where no word is
    near(join_pieces(states[0], words).mT, a['mlp1'])
    near(join_pieces(states[3], words).mT, a['mlp2'])
    alone = torch.arange(1, 11).expand(3, 10) # every piece for itself
    near(join_pieces(add_layers(list(states)), alone).mT, a['noagg_words'])
    near(sentence_vector(add_layers(list(states)), alone, over=10), a['noagg_sent'])


def test_guided_filter_and_pictures():
    a = arrays('visualise.npz')
    t = guided_filter(a['images'], a['M'], 50, 1e-4).clamp(.1, 1)
    near(t, a['t_guided_r50_eps1e4'], 1e-4, 1e-4)
    enhanced, again = remove_veil(a['images'], a['M'], a['ato'])
    near(again, t)
    near(enhanced, a['post_raw'], 1e-3, 1e-3)
    near(shown(enhanced, -1), a['post_saved'], 1e-3, 1e-3)
    near(difference(a['images'], enhanced, -1) * 2 - .5, a['sub_saved'], 1e-3, 1e-3) # the original's scale is twice ours, so that it leaves 0..1
    near(1 - a['M'], a['one_minus_M'])
    assert torch.equal((a['M'] < .58).float(), a['transM'].float())
