"""The detector of mistakes: X-VL's answers before training, frozen parts that rest, planted mistakes that are learnt; bad input."""
import pytest
import torch

from medvl.core.errors import DataError
from medvl.data.phantom.chest_prepared import prepared_chest_phantom
from medvl.data.samples.captioned import CaptionConfig, CaptionDataset
from medvl.data.samples.erroneous import ErroneousConfig, ErroneousDataset
from medvl.methods.base import StepState, from_pretrained, save_pretrained
from medvl.methods.error_detector import ErrorDetectorConfig, check_detector, new_error_detector
from medvl.methods.recipes import new_method

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory): return prepared_chest_phantom(tmp_path_factory.mktemp('d')/'p', n=16, size=(64, 64))


def samples(prepared, method, **options):
    return ErroneousDataset(prepared, method.tokenizer, ErroneousConfig(sections=('impression',), max_length=64, kinds=method.config.kinds, **options))


@pytest.mark.parametrize('recipe', ['smoke', 'smoke-2022'])
def test_it_begins_as_xvl(prepared, recipe, tmp_path):
    xvl = new_method('xvl', recipe, prepared.manifest.report).eval()
    detector = new_error_detector(xvl, ('location', 'mismatch')).eval()
    x, texts = torch.as_tensor(prepared.image(0).copy())[None, None], ['Small effusion.', 'Normal chest.']
    with torch.no_grad():
        want, got = (m.match(m.read_images(x), m.read_texts(texts)) for m in (xvl, detector))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(detector.encode_text(texts), xvl.encode_text(texts))
        again = from_pretrained(save_pretrained(detector, tmp_path/'m'))
        torch.testing.assert_close(again.match(again.read_images(x), again.read_texts(texts)), want)
    assert not any(k.startswith(('teacher', 'image_queue')) for k in detector.state_dict())


def test_a_wrong_word_is_learnt(prepared):
    "One kind, twenty steps on the same eight samples: the loss falls, and the doubt points the right way."
    method = new_method('error_detector', 'smoke', prepared.manifest.report, kinds=('mismatch', 'severity'))
    data = samples(prepared, method)
    batch = data.collate([data[0, i] for i in range(8)])
    assert 0 < (batch['error_kind'] > 0).sum() < 8
    optimizer, seen = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3), []
    method.train()
    for step in range(25):
        out = method(batch, StepState(step=step))
        optimizer.zero_grad(); out['loss'].backward(); optimizer.step()
        seen.append(float(out['error'].detach()))
    method.eval()
    with torch.no_grad(): assert seen[-1] < seen[0] - .2 and method(batch)['error_auroc'] > .9


def test_frozen_encoders_rest(prepared):
    method = new_method('error_detector', 'smoke', prepared.manifest.report, frozen_encoders=True)
    data = samples(prepared, method)
    method.train()
    method(data.collate([data[0, i] for i in range(4)]))['loss'].backward()
    moved = {n.split('.')[0] for n, p in method.named_parameters() if p.grad is not None}
    assert moved == {'reader', 'matching', 'kinds'} and not method.image_encoder.training
    assert all(p.grad is None for p in method.reader.text.parameters())


def test_without_kinds(prepared):
    method = new_method('error_detector', 'smoke', prepared.manifest.report, kind_weight=0.)
    data = samples(prepared, method)
    out = method(data.collate([data[0, i] for i in range(4)]))
    assert 'kind' not in out and torch.equal(out['loss'], out['error'])
    with pytest.raises(ValueError, match='kind_weight'): method.suspect({}, {})


def test_bad_input(prepared):
    for change, said in ((dict(kinds=('side',)), 'location'), (dict(kinds=()), 'at least one'), (dict(kinds=('severity',) * 2), 'each once'), (dict(kind_weight=-1.), 'negative')):
        with pytest.raises(ValueError, match=said): check_detector(ErrorDetectorConfig(**change))
    method = new_method('error_detector', 'smoke', prepared.manifest.report)
    captions = CaptionDataset(prepared, method.tokenizer, CaptionConfig(max_length=64))
    with pytest.raises(DataError, match='reports_with_errors'): method(captions.collate([captions[0, i] for i in range(2)]))
    with pytest.raises(TypeError, match='ErrorDetector'): new_error_detector(method)
    read, text = method.read_images(torch.zeros(2, 1, 64, 64)), method.read_texts(['a b c'])
    with pytest.raises(ValueError, match='one text an image'): method.suspect(read, text)
