"""Mammo-FActOR: the mathematics against the original's numbers."""
import numpy as np
import pytest
import torch
from golden import golden

from medvl.losses.mapping import mapping_loss


@pytest.fixture(scope='module')
def g():
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden('mammoclip/mammo_factor.npz')).items()}


def regions(g, kind): return g[f'{kind}_region_proj_embs'].view(3, 6, -1, 8)


@pytest.mark.parametrize('i', range(3))
def test_golden_loss_and_gradient_per_attribute(g, i):
    "The reference's interleaved layout, kept only as input here, gives the reference's loss and gradient."
    z = regions(g, 'perattr').clone().requires_grad_()
    t = torch.stack([g['attr_mass'], g['attr_calc']])
    loss = mapping_loss(z, t, g[f'perattr_labels{i}'].float(), positives='one')
    assert loss.item() == pytest.approx(g[f'perattr_loss{i}'].item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(z.grad.view(18, 2, 8), g[f'perattr_grad_region{i}'], rtol=1e-4, atol=1e-6)


def mapper_of(g, kind, heads, layout):
    from medvl.attribute.mammo_factor import RegionMapper
    m = RegionMapper(grid=(4, 3), width=8, heads=heads, layout=layout)
    m.load_state_dict({k.split('_sd_')[1]: v for k, v in g.items() if k.startswith(f'{kind}_sd_')}, strict=True)
    return m


def test_golden_heads_in_both_layouts(g):
    raw = g['raw']
    with torch.no_grad():
        fixed, reference = mapper_of(g, 'perattr', 2, 'stacked')(raw), mapper_of(g, 'perattr', 2, 'reference')(raw)
        shared = mapper_of(g, 'oneproj', 1, 'stacked')(raw)
    torch.testing.assert_close(fixed.transpose(1, 2), g['perattr_head_outputs'], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fixed.reshape(18, 2, 8), g['perattr_fixed_region_proj_embs'], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference.reshape(18, 2, 8), g['perattr_region_proj_embs'], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.reshape(18, 1, 8), g['oneproj_region_proj_embs'], rtol=1e-5, atol=1e-6)


def test_golden_fixed_and_shared_losses(g):
    t = torch.stack([g['attr_mass'], g['attr_calc']])
    fixed = mapping_loss(regions(g, 'perattr_fixed'), t, g['perattr_labels0'].float(), positives='one')
    assert fixed.item() == pytest.approx(g['perattr_fixed_loss0'].item(), rel=1e-5)
    for i in (0, 2):  # oneproj_loss1 is a broadcasting mistake of the reference
        z = regions(g, 'oneproj').clone().requires_grad_()
        loss = mapping_loss(z, t, g[f'oneproj_labels{i}'].float(), positives='one')
        assert loss.item() == pytest.approx(g[f'oneproj_loss{i}'].item(), rel=1e-5)
        loss.backward()
        torch.testing.assert_close(z.grad.view(18, 1, 8), g[f'oneproj_grad_region{i}'], rtol=1e-4, atol=1e-6)
