"""The vision transformer against the original's numbers, transformers' network, and its own promises."""
import numpy as np
import pytest
import torch
from golden import golden

from medvl.core.errors import DataError
from medvl.models.momentum import momentum_update, teacher_of
from medvl.models.vit import RESIZINGS, VITS, VisionTransformer, load_vit, pool_patches, resize_positions, vit_weights


@pytest.fixture(scope='module')
def z(): return {k: torch.from_numpy(v) for k, v in np.load(golden('xvl/ibot_vit.npz')).items()}


@pytest.fixture(scope='module')
def vit(z):
    model = VisionTransformer(image_size=64, width=24, depth=2, heads=3, masked=True, resizing='offset').eval()
    report = load_vit(model, {k[3:]: v for k, v in z.items() if k.startswith('w__')})
    assert report.complete and not report.ignored
    return model


close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
normal = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_tokens_masked_or_not(vit, z):
    close(vit.tokens(z['img']), z['tokens'])
    close(vit.tokens(z['img'], z['mask'].bool()), z['tokens_masked'])
    close(vit(z['img']), z['cls_only'])


@torch.no_grad()
def test_last_attention_and_layers(vit, z):
    close(vit.last_attention(z['img']), z['last_attn'])
    for i, tokens in enumerate(vit.intermediate_layers(z['img'], 2)): close(tokens, z[f'inter_n2_{i}'])


@torch.no_grad()
def test_both_rules_of_resizing(vit, z):
    close(resize_positions(vit.pos_embed, (4, 4), (6, 6), 'offset'), z['pos96'])
    close(resize_positions(vit.pos_embed, (4, 4), (6, 6), 'size'), z['pos_resized_ckpt_to_6x6'])
    assert not torch.allclose(z['pos96'], z['pos_resized_ckpt_to_6x6'], atol=1e-4)
    close(vit.tokens(z['img96']), z['tokens96'])
    close(vit.tokens(z['img32']), z['tokens32'])


def test_patches_are_pooled_as_the_original_did():
    z = np.load(golden('xvl/patch_pooling.npz'))
    close(pool_patches(torch.from_numpy(z['x'])), torch.from_numpy(z['y']))


@torch.no_grad()
def test_fused_and_plain_attention_give_the_same(vit):
    x = normal(2, 3, 80, 48)
    plain = vit.embed(x)
    for block in vit.blocks: plain, maps = block.attend(plain, maps=True)
    torch.testing.assert_close(vit.norm(plain), vit.tokens(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps, vit.last_attention(x), rtol=1e-5, atol=1e-6)


def test_fused_and_plain_gradients_are_the_same(vit):
    x, grads = normal(2, 3, 64, 64), []
    for maps in (False, True):
        vit.zero_grad()
        t = vit.embed(x)
        for block in vit.blocks: t = block.attend(t, maps)[0]
        vit.norm(t).square().sum().backward()
        grads.append([p.grad.clone() for n, p in vit.named_parameters() if n != 'masked_embed'])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (9, 2)])
@pytest.mark.parametrize('rule', RESIZINGS)
def test_any_grid(grid, rule):
    vit = VisionTransformer(image_size=(32, 48), patch=8, width=16, depth=1, heads=2, resizing=rule, masked=True)
    x = normal(2, 1, 8 * grid[0] + 3, 8 * grid[1])
    masked = torch.zeros(2, *grid, dtype=torch.bool)
    masked[0, 0, 0] = True
    assert vit.tokens(x, masked).shape == (2, 1 + grid[0] * grid[1], 16)
    assert vit.feature_maps(x).shape == (2, 16, *grid)


def test_every_size_and_what_it_counts():
    assert list(VITS) == ['vit-tiny', 'vit-small', 'vit-base', 'vit-large']
    with torch.device('meta'): counts = [sum(p.numel() for p in VisionTransformer(name).parameters()) for name in VITS]
    assert counts == [5_524_416, 21_665_664, 85_798_656, 303_301_632] # timm's, num_classes=0


def test_dropping_paths_grows_with_depth_and_rests_in_evaluation():
    vit = VisionTransformer(image_size=32, width=16, depth=3, heads=2, drop_path=.2)
    assert [b.drop_path for b in vit.blocks] == pytest.approx([0, .1, .2])
    x = normal(4, 1, 32, 32)
    assert not torch.equal(vit(x), vit(x)) and torch.equal(vit.eval()(x), vit(x))


def test_recomputing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vit = VisionTransformer(image_size=32, width=16, depth=2, heads=2, drop_path=.3, checkpointing=checkpointing)
        torch.manual_seed(1)
        vit(normal(4, 1, 32, 32)).square().sum().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


# -- files of others -----------------------------------------------------------------------------------------------------

def small(**options): return VisionTransformer(image_size=64, width=32, depth=2, heads=4, **options).eval()


def theirs(tmp_path, kind):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=64, layer_norm_eps=1e-6)
    model = (ViTModel(config, use_mask_token=True) if kind == 'model' else ViTForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path/'model.safetensors'


@torch.no_grad()
@pytest.mark.parametrize('kind', ['model', 'classifier'])
def test_transformers_in_memory_and_on_disk(tmp_path, kind):
    model, file = theirs(tmp_path, kind)
    x, body = normal(2, 3, 64, 64), model if kind == 'model' else model.vit
    for source in (file, model.state_dict()):
        ours = small(masked=True)
        report = load_vit(ours, source)
        close(ours.tokens(x), body(x).last_hidden_state)
        assert report.missing == ([] if kind == 'model' else ['masked_embed'])
        assert sorted(report.ignored) == [f'{"pooler.dense" if kind == "model" else "classifier"}.{p}' for p in ('bias', 'weight')]


def test_ibot_checkpoint_as_it_is_written(tmp_path):
    "{'student': DataParallel's names, 'teacher': …} with heads; the part and the beginning of the names are taken off."
    student, teacher = small(masked=True), small()
    torch.save({'student': {f'module.backbone.{k}': v for k, v in student.state_dict().items()} | {'module.head.mlp.0.bias': torch.ones(3)},
                'teacher': {f'backbone.{k}': v for k, v in teacher.state_dict().items()}, 'epoch': 3}, tmp_path/'c.pth')
    for part, source in (('student', student), ('teacher', teacher)):
        ours = small(masked=True)
        report = load_vit(ours, tmp_path/'c.pth', part)
        assert torch.equal(ours.blocks[1].mlp['fc2'].weight, source.blocks[1].mlp['fc2'].weight)
        assert report.missing == ([] if part == 'student' else ['masked_embed'])
        assert report.ignored == (['head.mlp.0.bias'] if part == 'student' else [])
    report = load_vit(small(), tmp_path/'c.pth', 'student')
    assert sorted(report.ignored) == ['head.mlp.0.bias', 'masked_embed']


def test_what_does_not_fit_is_said_and_nothing_is_changed():
    good = small().state_dict()
    for weights, said in ((good | {'blocks.0.ls1.gamma': torch.ones(32)}, 'ls1.gamma'), (good | {'reg_token': torch.ones(1, 4, 32)}, 'reg_token'),
                          ({k: v for k, v in good.items() if k != 'norm.bias'}, 'missing: norm.bias'),
                          (good | {'blocks.1.attn.proj.bias': torch.ones(31)}, 'mismatched'), ({'a.b': torch.ones(2)}, 'no class token'),
                          (good | {'pos_embed': torch.ones(1, 1 + 6, 32)}, 'no square')):
        ours = small()
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        with pytest.raises(DataError, match=said): load_vit(ours, weights)
        assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_positions_of_a_file_that_are_no_square():
    wide = VisionTransformer(image_size=(32, 48), width=32, depth=2, heads=4)
    ours = small()
    load_vit(ours, wide.state_dict(), grid=(2, 3))
    torch.testing.assert_close(ours.pos_embed, resize_positions(wide.pos_embed, (2, 3), (4, 4)))


def test_a_teacher_follows_a_student_that_hides_patches():
    student = small(masked=True)
    teacher = teacher_of(student)
    with torch.no_grad(): student.cls_token += 1
    momentum_update(teacher, student, .9)
    torch.testing.assert_close(teacher.cls_token, student.cls_token - .9)
    assert len(vit_weights(teacher.state_dict())[0]) == len(teacher.state_dict())


def test_half_precision_is_near_and_finite():
    ours, x = small(masked=True), normal(2, 1, 48, 80)
    masked = normal(2, 3, 5, seed=1) > 0
    want = ours.tokens(x, masked).detach()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got, maps = ours.tokens(x, masked), ours.last_attention(x)
        got.float().square().sum().backward()
    torch.testing.assert_close(got.float().detach(), want, rtol=.1, atol=.1)
    assert maps.isfinite().all() and all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)
