"""One step of A2I2 on the pretend accelerator: nothing on the wrong device, one wait (how many words the longest report has), the CPU's numbers."""
import numpy as np
import torch
from pretend_accelerator import DEVICE, WAITS, Accelerator

import medvl.data.samples.exam  # noqa: F401, declares keywords
from medvl.core.later import checks_collected
from medvl.data.batch import collate, to_device
from medvl.data.text.tokens import build_wordpiece
from medvl.methods.a2i2 import A2I2, A2I2Config

REPORTS = ['suspicious mass in the left breast', 'no mass', 'calcification in the right breast']
TOKENIZER = build_wordpiece(REPORTS, size=80)


def model(**more):
    torch.manual_seed(0)
    return A2I2(A2I2Config(**more, image_encoder='resnet-tiny', text_encoder='tiny', text_pretrained=False, decoder_width=.125, decoder_channels=1, max_length=24, airlight='border', other_breast='left_out'), TOKENIZER).eval()


def batch():
    rng = np.random.default_rng(0)
    here = [(True,) * 4, (True, True, False, True), (False, True, True, True)]
    return collate([dict(images=[rng.integers(0, 256, (64, 64), dtype=np.uint8) if p else None for p in h], present=np.array(h), view=['CC', 'MLO'] * 2, laterality=list('LLRR'), patient_id=f'p{i}',
                         sample_id=f'e{i}', index=i, epoch=0, text_group=[i], keywords=t.split(), tokens=[np.array(TOKENIZER(t)['input_ids'], np.int32)]) for i, (h, t) in enumerate(zip(here, REPORTS, strict=True))])


def test_a_step_waits_once_and_is_the_cpus():
    one, data = model(), batch()
    wanted = one(data)
    wanted['loss'].backward()
    with Accelerator():
        there, moved = model().to(DEVICE), to_device(data, DEVICE)
        there(moved) # which pieces begin words is told once
        before = len(WAITS)
        with checks_collected() as checks: found = there(moved)
        found['loss'].backward()
        waits = WAITS[before:]
        assert checks and len(waits) <= 1, waits
        for k, v in wanted.items(): assert abs(found[k].item() - v.item()) < 1e-3 * max(1, abs(v.item())), k
        torch.testing.assert_close(there.views.local_head.weight.grad.cpu(), one.views.local_head.weight.grad, rtol=1e-3, atol=1e-4)
        assert there.enhance(moved['images']).device.type == torch.device(DEVICE).type
        assert there.word_maps(moved['images'][:, 1], REPORTS)[0].device.type == torch.device(DEVICE).type


def test_what_it_is_asked_for_is_the_cpus():
    "Zero-shot, maps and features; two encoders and views for themselves: the same numbers there."
    for more in ({}, dict(share_views=False, pairing='view')):
        one, data = model(**more), batch()
        asked = lambda m, d: dict(match=m.match(m.read_images(d['images'], d['present'], d['view']), m.read_texts(REPORTS)), maps=m.abnormality_maps(d['images'][:, 1]),
                                  features=m.image_features(d['images'], d['present']), image=m.encode_image(d['images'], d['present'], d['view']), text=m.encode_text(REPORTS))
        wanted, loss = asked(one, data), one(data)['loss']
        with Accelerator():
            there, moved = model(**more).to(DEVICE), to_device(data, DEVICE)
            found = asked(there, moved)
            for k, v in wanted.items():
                assert found[k].device.type == torch.device(DEVICE).type, k
                torch.testing.assert_close(found[k].cpu(), v, rtol=1e-3, atol=1e-4)
            assert abs(there(moved)['loss'].item() - loss.item()) < 1e-3*abs(loss.item())
