"""ALBEF's, iBOT's and X-VL's schedules and clipping, against the originals' numbers."""
import json

import numpy as np
import pytest
import torch
from golden import golden

from medvl.train.clip_each import clip_each
from medvl.train.staircase import albef_cosine, ibot_cosine, staircase


@pytest.mark.parametrize('name', ['pretrain', 'generation', 'pretrain_2022'])
def test_albefs_cosine(name):
    z = json.loads(golden('xvl/lr_schedules.json').read_text())[name]
    c = z['config']
    value = lambda t: c['lr'] * albef_cosine(t, c['epochs'], c['warmup_epochs'], c['warmup_lr'] / c['lr'], c['min_lr'] / c['lr'])
    assert [value(t) for t in range(len(z['lr_after_step_t']))] == pytest.approx(z['lr_after_step_t'], rel=1e-9)
    # how the script used it: every 100 iterations of the first epoch, then once an epoch with the warm-up added
    run = dict(epoch_steps=1000, epochs=c['epochs'], warmup=c['warmup_epochs'], start=c['warmup_lr'] / c['lr'], floor=c['min_lr'] / c['lr'])
    lr = z['lr_before_any_step']
    for step in range(1000 * c['epochs']):
        epoch, i = divmod(step, 1000)
        if epoch == 0 and i % 100 == 0 and i <= c['warmup_epochs'] * 100: lr = z['lr_after_step_t'][i // 100]
        if epoch > 0 and i == 0: lr = z['lr_after_step_t'][epoch + c['warmup_epochs']]
        if step % 37 == 0 or i in (0, 99, 100, 101): assert c['lr'] * staircase(step, **run) == pytest.approx(lr, rel=1e-9), step


def test_ibots_cosines():
    z = np.load(golden('xvl/schedules_clip.npz'))
    ours = [ibot_cosine(s, 50, .995, 1.) for s in range(50)]
    np.testing.assert_allclose(ours, z['momentum_cosine_0995_to_1_5ep_10it'], rtol=1e-9)
    np.testing.assert_allclose([ibot_cosine(s, 40, 5e-4, 1e-6, 10) for s in range(40)], z['lr_cosine_warm1'], rtol=1e-9, atol=1e-15)


def test_clipping_each():
    z = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden('xvl/schedules_clip.npz')).items()}
    parameters = [torch.nn.Parameter(torch.zeros_like(z[f'grad_{n}'])) for n in 'wb']
    for p, n in zip(parameters, 'wb'): p.grad = z[f'grad_{n}'].clone()
    norms = clip_each(parameters, z['clip'].item())
    torch.testing.assert_close(norms.double(), z['norms'], rtol=1e-5, atol=1e-7)
    for p, n in zip(parameters, 'wb'): torch.testing.assert_close(p.grad, z[f'clipped_{n}'])
    with pytest.raises(ValueError, match='positive'): clip_each(parameters, float('nan'))


def test_short_epochs_end_their_warm_up_early():
    "An epoch of 50 steps never reaches the second stair; the next epoch goes on with the cosine."
    run = dict(epoch_steps=50, epochs=4, warmup=2, start=.1, floor=.1)
    assert {staircase(s, **run) for s in range(50)} == {.1} and staircase(50, **run) == albef_cosine(3, 4, 2, .1, .1)
    with pytest.raises(ValueError, match='epoch_steps'): staircase(0, 0, 1)
