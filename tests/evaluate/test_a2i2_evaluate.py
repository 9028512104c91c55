"""Zero-shot scores, normalisations and mask metrics of A2I2 against the numbers of the original (golden/a2i2)."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden

from medvl.attribute.abnormality import score_maps, truth_masks
from medvl.evaluate.metrics.overlap import TIOU, batch_tiou, best_threshold, mask_overlap, tiou_table
from medvl.evaluate.protocols.exam_zero_shot import class_scores, normalised, over_present, softmax_rows
from medvl.losses.region_words import global_similarity, local_similarity, word_attention


def arrays(name):
    z = np.load(golden(f'a2i2/{name}'))
    return {k: z[k] for k in z.files}


def near(a, b): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_zero_shot():
    a = arrays('zero_shot.npz')
    t = {k: torch.from_numpy(v) for k, v in a.items()}
    lengths = [int(n) for n in a['cap_lens']]
    both_global = global_similarity(t['img_g'][:, None], t['txt_g'], 1.)[:, 0]
    near(both_global, a['global_sim'])
    words = t['txt_l'].mT[:, 1:] # without [CLS]
    mask = torch.arange(words.shape[1]) < torch.tensor(lengths)[:, None]
    local = local_similarity(t['img_l'].flatten(2).mT, words, mask, (4., 5., 1.), 'max')
    near(local, a['local_sim'])
    near((local + both_global) / 2, a['both'])
    for i, n in enumerate(lengths):
        if f'attn_{i}' not in a: continue
        maps, _ = word_attention(t['img_l'].flatten(2).mT, words[i:i + 1, :n].expand(8, -1, -1))
        near(maps.unflatten(2, (4, 4)), a[f'attn_{i}'])
    classes = class_scores(a['both'], {'present': [0, 1, 2], 'absent': [3, 4]})
    near(classes, a['class_sim_two_classes_prompts_012_34'])
    near(normalised(classes, 'standard'), a['class_sim_norm'])
    near(normalised(classes, 'range'), a['class_sim_standardize'])
    probability = softmax_rows(normalised(classes, 'standard'))
    near(over_present(probability.reshape(2, 4, 2), np.ones((2, 4), bool)), a['zeroshot_exam_prob_mean_over_4_views'])


def test_masks():
    a = arrays('seg_metrics.npz')
    truth = a['truth'] > .5
    one = mask_overlap(a['prob'] > .5, truth, 'agree')
    near(one.dice.mean(), a['seg_dice'])
    near(one.iou.mean(), a['seg_iou'])
    near(batch_tiou([one.iou.to_numpy()]) * a['seg_counts'][0], a['seg_TIOU_counts'][0])
    from_maps = mask_overlap(a['pretrain_input_M'] < .5, truth, 'agree') # small is abnormal
    near(from_maps.dice.mean(), a['pretrain_dice_Mlt05'])
    near(from_maps.iou.mean(), a['pretrain_iou'])
    near(batch_tiou([from_maps.iou.to_numpy()]), a['pretrain_TIOU'][0])
    single = mask_overlap(a['prob'] > .5, truth, 'zero')
    near(single.iou, a['single_iou'])
    near(single.dice, a['single_dice'])


def test_tiou_counts_images_not_batches():
    table = tiou_table([.05, .95, np.nan], ['a', 'b', 'c'], n_boot=50)
    assert table.value.tolist() == [.5] * len(TIOU) and table.n.eq(2).all() and table.patients.eq(2).all()
    assert batch_tiou([[.05, .95]]).tolist() == [1] * 5 + [0] * 2
    assert tiou_table([np.nan], ['a']).value.isna().all()


def test_a_threshold_needs_a_mask():
    with pytest.raises(ValueError, match='no validation image has a mask'): best_threshold(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool))


def test_masks_of_the_labels_alone():
    "A mask that holds two findings counts only where the wanted one is."
    mask = np.array([[0, 1], [2, 3]], np.uint8) # bit 0: mass, bit 1: calcification
    data = SimpleNamespace(info={'settings': {'mask_bits': ['mass', 'calcification']}}, masks=mask[None],
                           manifest=pd.DataFrame({'image_id': ['a'], 'patient_id': ['p']}), mask=lambda i: mask,
                           image=lambda i: np.zeros((2, 2), np.uint8))
    data.boxes = pd.DataFrame([['a', 'mass', 0, 0, 2, 2]], columns=['image_id', 'label', 'x0', 'y0', 'x1', 'y1'])
    assert truth_masks(data, ['mass']).tolist() == [[[False, True], [False, True]]]
    assert truth_masks(data, ['calcification']).tolist() == [[[False, False], [True, True]]]
    assert truth_masks(data).sum() == 3
    heat = np.array([[[0, 0], [1., 0]]]) # points at the calcification
    found = score_maps({'m': heat}, data, ['mass'], 'masks').set_index('method').pointing
    assert found['m'] == 0
    with pytest.raises(ValueError, match='class of the masks'): truth_masks(data, ['node'])
