"""Muon: updates are nearly orthogonal, parts are independent matrices, and it descends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.training.muon import ADAMW_RMS, BlockMuon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonal(matrices).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * result).sum() > 0.9 * (result.norm() * (left @ right).norm())


def stepped(weight: Tensor, gradient: Tensor, parts: tuple[int, tuple[int, ...]] | None) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    BlockMuon([{"params": [parameter], "parts": parts}], lr=0.1, weight_decay=0.01).step()
    return parameter.detach()


@pytest.mark.parametrize(("dim", "sizes"), [(0, (8, 8)), (1, (4, 4, 12)), (1, (20,))])
def test_parts_are_stepped_as_matrices_of_their_own(dim: int, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(16, 20), torch.randn(16, 20)
    together = stepped(weight, gradient, (dim, sizes))
    pairs = zip(weight.split(sizes, dim), gradient.split(sizes, dim), strict=True)
    alone = torch.cat([stepped(part, part_gradient, None) for part, part_gradient in pairs], dim)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)


def test_update_has_the_size_of_adamws() -> None:
    torch.manual_seed(0)
    change = stepped(torch.zeros(64, 256), torch.randn(64, 256), None) / 0.1
    assert abs(change.square().mean().sqrt() - ADAMW_RMS) < 0.05


def test_it_descends_and_leaves_alone_what_has_no_gradient() -> None:
    torch.manual_seed(0)
    wanted, weight, other = torch.randn(16, 16), nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.ones(4, 4))
    optimizer = BlockMuon([{"params": [weight, other]}], lr=0.3, weight_decay=0.0)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 100)
        optimizer.zero_grad()
        (weight - wanted).square().mean().backward()
        optimizer.step()
    assert (weight - wanted).square().mean() < 0.05 * wanted.square().mean()
    assert torch.equal(other, torch.ones(4, 4))
