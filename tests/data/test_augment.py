"""Augmentation: matrices of the original, exactness where nothing happens, independence of the batch, boxes that follow pixels."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import golden
from medvl.data.augment.breast_versions import Augment, AugmentConfig, alpha_to_rms, draw, elastic_field
from medvl.data.augment.transform import Version, affine_matrix, flip_matrix, map_boxes, map_points, sampling_grid, warp
from medvl.core.seed import numpy_rng

quick = settings(max_examples=50, deadline=None)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def batch_of(images, index=None, flip=None, epoch=0):
    b = len(images)
    return dict(images=images, index=torch.arange(b) if index is None else torch.as_tensor(index), epoch=epoch,
                flip=torch.zeros(b, images.shape[1], 2, dtype=torch.bool) if flip is None else flip)


def noise(*shape, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# the original's constants
def test_reference_matrices_golden():
    for case in json.loads(golden('mammoclip/augment_spec.json').read_text())['affine_matrix_samples_152x91']:
        scale = case['scale']['x'], case['scale']['y']
        np.testing.assert_allclose(affine_matrix(152, 91, 20, (.1, .1), scale, (20, 20)), case['matrix'], atol=1e-10)


def test_affine_matrix_by_the_library_s_formula():
    "The form in which scikit-image documents its AffineTransform, written out: the same matrix by other arithmetic (no golden file needed)."
    def documented(sx, sy, rotation, shear, tx=0.0, ty=0.0):
        return np.array([[sx*np.cos(rotation), -sy*(np.cos(rotation)*np.tan(shear) + np.sin(rotation)), tx],
                         [sx*np.sin(rotation), -sy*(np.sin(rotation)*np.tan(shear) - np.cos(rotation)), ty], [0, 0, 1]])
    move, rng = lambda x, y: documented(1, 1, 0, 0, x, y), np.random.default_rng(0)
    for _ in range(20):
        h, w = rng.integers(10, 200, 2)
        r, kx, ky = np.deg2rad(rng.uniform(-30, 30, 3))
        (sx, sy), (tx, ty) = rng.uniform(.7, 1.3, 2), rng.uniform(-.2, .2, 2)
        quarter = documented(1, 1, np.pi/2, 0)
        want = (move(w/2 - .5, h/2 - .5) @ documented(sx, sy, -r, -kx, tx*w, ty*h) @ quarter @ documented(1, 1, 0, -ky) @ np.linalg.inv(quarter)
                @ move(.5 - w/2, .5 - h/2))
        got = affine_matrix(h, w, *np.rad2deg([r]), (tx, ty), (sx, sy), np.rad2deg([kx, ky]))
        np.testing.assert_allclose(got, want, atol=1e-9)


def test_reference_mode_draws_constants():
    "Whatever the key, undoing the drawn scale leaves the one constant map."
    config = AugmentConfig(mode='reference', affine=1, elastic=0, rotate=0, shear=0, translate=0)
    seen = set()
    for i in range(20):
        m = draw(config, (0, 0, i, 0), 152, 91).matrix
        shear_y = np.array([[1, 0], [-np.tan(np.deg2rad(20)), 1]]) # the scales can be read off, since rotation and shears are known
        a = np.deg2rad(-20)
        before = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ np.array([[1, np.tan(np.deg2rad(20))], [0, 1]])
        scale = np.linalg.inv(before) @ m[:2, :2] @ np.linalg.inv(shear_y)
        np.testing.assert_allclose(scale, np.diag(np.diag(scale)), atol=1e-12)
        assert ((np.diag(scale) >= .8) & (np.diag(scale) <= 1.2)).all()
        seen.add(tuple(np.diag(scale).round(6)))
    assert len(seen) == 20


def test_reference_probabilities_and_size_of_elastic():
    draws = [draw(AugmentConfig(mode='reference'), (0, 0, i, 0), 152, 91) for i in range(400)]
    elastic = [d.field for d in draws if d.field is not None]
    assert 160 < len(elastic) < 240 and 60 < sum(d.exact is not None for d in draws) < 140 # a half; a quarter untouched
    assert np.sqrt(np.mean([(f**2).mean() for f in elastic])) == pytest.approx(alpha_to_rms(10, 15), rel=.1)
    assert alpha_to_rms(10, 15) == pytest.approx(0.1086, abs=1e-3)


def test_alpha_to_rms_against_the_plain_way():
    "Blur white noise at full resolution, as albumentations does, and measure."
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(0)
    got = np.std([gaussian_filter(rng.uniform(-1, 1, (300, 300)), 4, mode='wrap')*30 for _ in range(5)])
    assert got == pytest.approx(alpha_to_rms(30, 4), rel=.03)


def test_elastic_field_has_the_smoothness_asked_for():
    "Correlation at a distance of 2 sigma is exp(-1) for a Gaussian-blurred field."
    fields = np.stack([elastic_field(numpy_rng(i), 400, 400, 3.0, 20.0) for i in range(60)]) # grid step 10: 4 cells = 2 sigma
    assert fields.std() == pytest.approx(3, rel=.05)
    assert (fields[..., 4:]*fields[..., :-4]).mean()/fields.var() == pytest.approx(np.exp(-1), abs=.08)


# exactness
@quick
@given(sizes, st.booleans(), st.booleans())
def test_flip_twice_is_identity(size, horizontal, vertical):
    image = noise(1, 1, *size)
    d = [Version(flip_matrix(*size, horizontal, vertical), exact=(horizontal, vertical))]
    once = warp(image, d)
    assert warp(once, d).equal(image.float())
    assert once.equal(image.flip([dim for dim, on in ((-1, horizontal), (-2, vertical)) if on]).float())
    resampled = warp(image, [Version(flip_matrix(*size, horizontal, vertical))]) # the same through the interpolation
    assert (resampled - once).abs().max() < 2e-2


@quick
@given(sizes, st.integers(0, 9))
def test_identity_is_exact(size, seed):
    images = noise(2, 2, 1, *size, seed=seed)
    out = Augment(affine=0, elastic=0)(batch_of(images), seed)
    assert out['images'].dtype == torch.float32 and out['images'].equal(images.float())
    assert out['transforms'].equal(torch.eye(3).expand(2, 2, 3, 3))


def test_none_mode_executes_flips():
    images = noise(2, 2, 1, 9, 7)
    flip = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    out = Augment(mode='none', affine=1, elastic=1)(batch_of(images, flip=flip))['images']
    for i in range(2):
        for j in range(2):
            want = images[i, j].flip([dim for dim, on in zip((-1, -2), flip[i, j].tolist()) if on])
            assert out[i, j].equal(want.float())


def test_against_opencv():
    cv2 = pytest.importorskip('cv2')
    yy, xx = np.mgrid[:120, :80]
    image = (127 + 60*np.sin(xx/9) + 60*np.cos(yy/13)).astype(np.uint8)
    for i in range(8):
        m = draw(AugmentConfig(affine=1, elastic=0), (3, 0, i, 0), 120, 80, (i % 2, i//2 % 2)).matrix
        want = cv2.warpAffine(image.astype(np.float32), m[:2], (80, 120), flags=cv2.INTER_LINEAR)
        got = warp(torch.from_numpy(image)[None, None], [Version(m)])[0, 0].numpy()
        inside = cv2.erode(cv2.warpAffine(np.ones_like(image), m[:2], (80, 120), flags=cv2.INTER_NEAREST), np.ones((5, 5)))
        assert np.abs(got - want)[inside == 1].max() < 1.5 # opencv rounds its weights to 1/32 pixel


def test_elastic_against_a_loop():
    "Every pixel looked up by hand."
    image, d = noise(1, 1, 23, 17), draw(AugmentConfig(affine=1, elastic=1, elastic_rms=.05, elastic_sigma=.2), (0, 0, 4, 0), 23, 17)
    gh, gw = d.field.shape[1:]
    inverse, got = np.linalg.inv(d.matrix), warp(image, [d])[0, 0].numpy()
    padded = np.zeros((25, 19)); padded[1:-1, 1:-1] = image[0, 0].numpy()
    def bilinear(a, y, x):
        i, j = min(int(y), a.shape[0] - 2), min(int(x), a.shape[1] - 2)
        return np.array([1 - (y - i), y - i]) @ a[i:i + 2, j:j + 2] @ np.array([1 - (x - j), x - j])
    for y in range(23):
        for x in range(17):
            dx, dy = (bilinear(f, y*(gh - 1)/22, x*(gw - 1)/16) for f in d.field)
            u, v, _ = inverse @ (x + dx, y + dy, 1)
            want = bilinear(padded, v + 1, u + 1) if -1 < u < 17 and -1 < v < 23 else 0
            assert abs(got[y, x] - want) < .05


# keys
@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True), st.integers(1, 7), st.integers(0, 3), st.integers(0, 3))
def test_independent_of_batch_and_chunk(index, chunk, seed, epoch):
    images = noise(51, 2, 1, 24, 16)
    augment = lambda i, chunk: Augment(chunk=chunk, intensity=.5)(batch_of(images[i], i, epoch=epoch), seed)
    whole = augment(index, chunk)
    for k, i in enumerate(index):
        alone = augment([i], 1)
        assert alone['images'][0].equal(whole['images'][k]) and alone['transforms'][0].equal(whole['transforms'][k])


def test_keys_differ():
    d = lambda *key: draw(AugmentConfig(affine=1), key, 30, 20).matrix.tolist()
    assert d(0, 0, 0, 0) == d(0, 0, 0, 0)
    assert len({str(d(*key)) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}) == 5


def test_global_state_is_not_touched():
    torch.manual_seed(1); np.random.seed(1)
    a, b = torch.rand(1), np.random.rand()
    torch.manual_seed(1); np.random.seed(1)
    Augment(affine=1, elastic=1, intensity=1)(batch_of(noise(2, 1, 1, 20, 12)))
    assert torch.rand(1).equal(a) and np.random.rand() == b


def test_random_ranges():
    "Angles, scales, shears and shifts cover their ranges, both signs, and no more."
    config = AugmentConfig(affine=1, elastic=0, shear=0, translate=0)
    m = np.stack([draw(config, (0, 0, i, 0), 30, 20).matrix for i in range(500)])
    angle, scale = np.rad2deg(np.arctan2(-m[:, 1, 0], m[:, 0, 0])), np.hypot(m[:, 0, :2], m[:, 1, :2])
    assert -20 <= angle.min() < -18 and 18 < angle.max() <= 20
    assert .8 <= scale.min() < .82 and 1.18 < scale.max() <= 1.2 and abs(np.corrcoef(scale.T)[0, 1]) < .2
    config = AugmentConfig(affine=1, elastic=0, shear=0, rotate=0, scale=(1, 1))
    shift = np.stack([draw(config, (0, 0, i, 0), 30, 20).matrix[:2, 2] for i in range(500)])/(20, 30)
    assert -.1 <= shift.min() < -.095 and .095 < shift.max() <= .1
    together = draw(AugmentConfig(affine=1, shear=0, scale_per_axis=False), (0, 0, 1, 0), 30, 20).matrix
    assert np.hypot(*together[:2, 0]) == pytest.approx(np.hypot(*together[:2, 1]))


# boxes and masks
@quick
@given(st.integers(0, 500), st.tuples(st.integers(8, 40), st.integers(8, 40)), st.booleans(), st.booleans())
def test_boxes_follow_pixels(key, corner, horizontal, vertical):
    h, w, (y, x) = 64, 56, corner
    box = [x, y, x + 10, y + 8]
    image = torch.zeros(1, 1, h, w); image[..., y:y + 8, x:x + 10] = 255
    d = draw(AugmentConfig(affine=1, elastic=0), (0, 0, key, 0), h, w, (horizontal, vertical))
    out, ((x0, y0, x1, y1),), kept = warp(image, [d])[0, 0].numpy(), *map_boxes([box], d.matrix, h, w)
    lit = np.argwhere(out > 127)
    if kept[0] == 1:
        assert len(lit)
        assert y0 - 1 <= lit[:, 0].min() and lit[:, 0].max() <= y1 and x0 - 1 <= lit[:, 1].min() and lit[:, 1].max() <= x1
        top, left, bottom, right = lit[:, 0].min(), lit[:, 1].min(), lit[:, 0].max() + 1, lit[:, 1].max() + 1
        assert max(abs(top - y0), abs(left - x0), abs(bottom - y1), abs(right - x1)) < 4 # corners are thinned by the interpolation
        centre = map_points([[x + 4.5, y + 3.5]], d.matrix)[0]
        assert np.abs(lit[:, ::-1].mean(0) - centre).max() < .6


def test_boxes_edges_and_cuts():
    assert map_boxes([[0, 0, 7, 9]], flip_matrix(9, 7, True, True), 9, 7)[0].tolist() == [[0, 0, 7, 9]]
    moved, kept = map_boxes([[0, 0, 4, 4], [4, 4, 6, 6]], affine_matrix(8, 8, translate=(-.25, 0)), 8, 8)
    np.testing.assert_allclose(moved, [[0, 0, 2, 4], [2, 4, 4, 6]])
    np.testing.assert_allclose(kept, [.5, 1])
    moved, kept = map_boxes([[0, 0, 1, 1]], affine_matrix(8, 8, translate=(-.5, 0)), 8, 8)
    assert kept[0] == 0 and map_boxes(np.zeros((0, 4)), np.eye(3), 8, 8)[0].shape == (0, 4)


def test_batch_boxes_and_masks():
    images = torch.zeros(1, 1, 1, 32, 24, dtype=torch.uint8); images[..., 4:10, 3:9] = 200
    mask = (images[0, 0, 0] > 0).numpy().astype(np.uint8)
    batch = batch_of(images, flip=torch.tensor([[[True, False]]])) | dict(boxes=[[np.array([[3, 4, 9, 10]], np.float32)]], masks=[[mask]])
    out = Augment(mode='none')(batch)
    assert out['boxes'][0][0].tolist() == [[15, 4, 21, 10]]
    assert (out['masks'][0][0] == mask[:, ::-1]).all() and ((out['images'][0, 0, 0] > 0).numpy() == mask[:, ::-1]).all()
    out = Augment(affine=1, elastic=1)(batch)
    agree = ((out['images'][0, 0, 0] > 100).numpy() == out['masks'][0][0]).mean()
    assert agree > .97 and set(np.unique(out['masks'][0][0])) <= {0, 1}
    assert Augment(mode='none')(batch_of(images) | dict(masks=[[None]], boxes=[[np.zeros((0, 4))]]))['masks'] == [[None]]


def test_tone_and_fill():
    images = noise(3, 1, 1, 12, 10)
    out = Augment(affine=0, elastic=0, intensity=1)(batch_of(images))['images']
    assert not out.equal(images.float()) and out.min() >= 0 and out.max() <= 255
    order = lambda x: x.flatten(1).argsort(dim=1, stable=True)
    gamma = Augment(affine=0, elastic=0, intensity=1, brightness=0, contrast=0)(batch_of(images))['images']
    assert (torch.gather(gamma.flatten(1), 1, order(images)).diff() >= -1e-3).all() # a change of tone keeps the order of greys
    filled = Augment(affine=1, elastic=0, fill=9.0, scale=(.5, .5))(batch_of(noise(1, 1, 1, 40, 40)*0 + 9))['images']
    assert (filled - 9).abs().max() < 1e-4


def test_wrong_mode_is_named():
    with pytest.raises(ValueError, match="'reference'"): Augment(mode='referense')(batch_of(noise(1, 1, 1, 8, 8)))


def test_extra_memory_is_that_of_a_chunk(monkeypatch):
    seen = []
    monkeypatch.setattr('medvl.data.augment.transform.sampling_grid', lambda draws, h, w, device: (seen.append(len(draws)), sampling_grid(draws, h, w, device))[1])
    Augment(affine=1, elastic=1, chunk=3)(batch_of(noise(10, 2, 1, 16, 8)))
    assert max(seen) <= 3 and sum(seen) == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_same_on_a_gpu():
    images, augment = noise(6, 2, 1, 200, 120), Augment(intensity=.5)
    a, b = augment(batch_of(images)), augment({k: v.cuda() if torch.is_tensor(v) else v for k, v in batch_of(images).items()})
    assert a['transforms'].equal(b['transforms'].cpu())
    assert (a['images'] - b['images'].cpu()).abs().mean() < .02
