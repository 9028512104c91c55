"""Queues, DINO's and iBOT's heads, centres: the original's numbers and their promises."""
import numpy as np
import pytest
import torch
from golden import golden

from medvl.models.checkpoints import load_weights
from medvl.models.ibot_head import NORMS, Centre, DINOHead, IBOTHead, Prototypes
from medvl.models.queue import FeatureQueue, IndexQueue, check_queue

close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def arrays(name): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden(f'xvl/{name}')).items()}


@pytest.fixture(scope='module')
def heads(): return arrays('heads.npz')


@torch.no_grad()
@pytest.mark.parametrize('kind', ['unshared', 'shared'])
def test_ibot_heads(heads, kind):
    head = IBOTHead(16, 20, 24 if kind == 'unshared' else 20, kind == 'shared', hidden=18, bottleneck=10)
    assert load_weights(head, {k[len(kind) + 4:]: v for k, v in heads.items() if k.startswith(f'{kind}_w__')}).complete
    of_class, of_patches = head(heads['x_tokens'])
    close(of_class, heads[f'{kind}_cls'])
    close(of_patches, heads[f'{kind}_patch'])
    close(head(heads['x_2d']), heads[f'{kind}_2d'])


@torch.no_grad()
def test_dino_head_with_batch_norm(heads):
    head = DINOHead(16, 20, hidden=18, bottleneck=10, norm='batch', act='relu').train()
    assert load_weights(head, {k[8:]: v for k, v in heads.items() if k.startswith('dino_w__')}).complete
    close(head(heads['x_2d']), heads['dino_out_train_bn'])


def test_norms_and_gradients_of_heads():
    for norm in ('none', 'batch', 'layer'):
        head = IBOTHead(8, 6, 6, hidden=5, bottleneck=4, norm=norm)
        a, b = head(torch.randn(3, 4, 8))
        (a.square().sum() + b.square().sum()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in head.parameters())
    assert {'none', 'batch', 'sync_batch', 'layer'} == set(NORMS)
    with pytest.raises(ValueError, match='norm'): DINOHead(8, norm='None ')
    with pytest.raises(ValueError, match='activation'): DINOHead(8, act='silu')


def test_prototypes_are_torchs_weight_norm():
    from torch.nn.utils.parametrizations import weight_norm
    theirs, ours = weight_norm(torch.nn.Linear(4, 6, bias=False)), Prototypes(4, 6, fixed=False)
    with torch.no_grad():
        ours.weight_v.copy_(theirs.parametrizations.weight.original1)
        ours.weight_g.copy_(theirs.parametrizations.weight.original0)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_centre_follows_and_resets():
    centre = Centre(2, .5)
    centre.update(torch.tensor([2., 4.]))
    centre.update(torch.tensor([2., 4.]))
    assert centre.value.tolist() == [1.5, 3.]
    again = Centre(2)
    again.load_state_dict(centre.state_dict())
    assert again.value.tolist() == [1.5, 3.]
    centre.reset()
    assert centre.value.tolist() == [0., 0.]


@pytest.mark.parametrize('name', ['head_pretrain_forward.npz', 'finetune_itc_idx_queue.npz'])
def test_the_originals_queues(name):
    z = arrays(name)
    for kind in ('image', 'text'):
        before, after = z[f'{kind}_queue_before'], z[f'{kind}_queue_after']
        queue = FeatureQueue(before.shape[1], before.shape[0])
        queue.rows.copy_(before.T)
        queue.enqueue(z[f'{kind}_feat_m'])
        close(queue.rows.T, after)
        assert queue.pointer.item() == z['queue_ptr_after'].item()
    if 'idx' in z:
        index = IndexQueue(24)
        index.rows.copy_(z['idx_queue_before'][0])
        assert torch.equal(index.same(z['idx'], z['idx']).float(), z['pos_idx'])
        index.enqueue(z['idx'])
        assert torch.equal(index.rows, z['idx_queue_after'][0])


def test_a_queue_goes_round_and_forgets_the_oldest():
    queue, index = FeatureQueue(6, 2), IndexQueue(6)
    for i in range(5):
        queue.enqueue(torch.full((3, 2), float(i)))
        index.enqueue(torch.full((3,), i))
    assert queue.rows[:, 1].tolist() == [4, 4, 4, 3, 3, 3] == index.rows.tolist()
    assert queue.pointer.item() == 3 == index.pointer.item()


def test_queues_start_alike_by_seed_and_apart_by_name():
    a, b = FeatureQueue(8, 4, 1), FeatureQueue(8, 4, 1)
    assert torch.equal(a.rows, b.rows) and not torch.equal(a.rows, FeatureQueue(8, 4, 2).rows)
    assert not torch.equal(a.rows, FeatureQueue(8, 4, 1, 'text').rows)
    before = torch.rand(1, generator=torch.manual_seed(3))
    torch.manual_seed(3)
    FeatureQueue(8, 4)
    assert torch.equal(torch.rand(1), before) # no draw of the global generator


def test_sizes_that_whole_batches_do_not_fill():
    check_queue(40960, 10 * 4)
    with pytest.raises(ValueError, match='40944 or 40992'): check_queue(40950, 48)
    with pytest.raises(ValueError, match='batches of 64 .* to 64 or 128'): check_queue(48, 64)
    with pytest.raises(ValueError, match='holds nothing'): FeatureQueue(0, 4)
    queue = FeatureQueue(6, 2)
    rows = queue.rows.clone()
    with pytest.raises(ValueError, match='batches of 4'): queue.enqueue(torch.ones(4, 2))
    assert torch.equal(rows, queue.rows)
