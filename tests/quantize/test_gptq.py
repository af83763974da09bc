"""GPTQ against its definition, written out: eliminate one input after the other from the inverse Hessian."""

from __future__ import annotations

import pytest
import torch

from shoal.quantize.gptq import quantize_gptq
from shoal.quantize.grid import find_grid, round_to_nearest
from shoal.quantize.packing import dense_of, pack_awq, pack_gptq
from shoal.quantize.pruning import prune_mask


def made(num_outputs: int = 24, num_inputs: int = 192, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5 + torch.eye(num_inputs)
    x = torch.randn(600, num_inputs, generator=generator) @ mixing
    x *= torch.linspace(0.2, 3, num_inputs)[torch.randperm(num_inputs, generator=generator)]
    return weight, x.t() @ x


def error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    change = dense - weight
    return float(torch.trace(change @ hessian @ change.t()))


def written_out(weight: torch.Tensor, hessian: torch.Tensor, bits: int, size: int, symmetric: bool, damp: float):
    """OBQ's rule, in float64: w_rest -= (w_i - q_i) / [H⁻¹]_ii · [H⁻¹]_i,rest, then H⁻¹ without input i."""
    left, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)
    integers = torch.zeros_like(weight, dtype=torch.uint8)
    for index in range(weight.shape[1]):
        if index % size == 0:
            grid = find_grid(left[:, index : index + size].float(), bits, symmetric)
        integer = grid.integers(left[:, index : index + 1].float())
        integers[:, index] = integer[:, 0].to(torch.uint8)
        change = (left[:, index] - grid.values(integer)[:, 0].double()) / inverse[index, index]
        left -= change[:, None] * inverse[index]
        inverse = inverse - torch.outer(inverse[:, index], inverse[index]) / inverse[index, index]
    return integers


@pytest.mark.parametrize(("size", "symmetric", "bits"), [(32, True, 4), (96, False, 4), (192, True, 4), (64, False, 8)])
def test_it_is_the_rule_of_the_paper(size, symmetric, bits):
    weight, hessian = made()
    found = quantize_gptq(
        weight, hessian, bits=bits, group_size=size, symmetric=symmetric, desc_act=False, damp=0.01
    ).integers
    expected = written_out(weight, hessian, bits, size, symmetric, 0.01)
    # Where a number lies in the middle between two, fp32 and fp64 may go different ways, and what follows with them.
    assert (found != expected).float().mean() < 0.02
    assert (found.int() - expected.int()).abs().max() <= (1 if bits == 4 else 3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_it_is_better_than_rounding_to_nearest(symmetric, desc_act):
    weight, hessian = made(seed=1)
    nearest = round_to_nearest(weight, 4, 64, symmetric).values()
    found = quantize_gptq(weight, hessian, bits=4, group_size=64, symmetric=symmetric, desc_act=desc_act, damp=0.01)
    assert error(weight, found.values(), hessian) < 0.6 * error(weight, nearest, hessian)
    if desc_act:
        largest = int(hessian.diagonal().argmax())
        assert found.groups[largest] == 0 and sorted(found.groups.tolist()) == [n // 64 for n in range(192)]


def test_masked_weights_are_zero_and_the_others_make_up_for_them():
    weight, hessian = made(seed=2)
    mask = prune_mask(weight, 0.5, two_of_four=True)
    assert mask is not None and bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all())
    found = quantize_gptq(
        weight, hessian, bits=4, group_size=64, symmetric=False, desc_act=True, damp=0.01, mask=mask
    ).values()
    assert bool((found[mask] == 0).all())
    nearest = round_to_nearest(weight, 4, 64, False, mask).values()
    assert bool((nearest[mask] == 0).all())
    assert error(weight, found, hessian) < 0.8 * error(weight, nearest, hessian)


def test_a_share_of_each_output_is_pruned_by_magnitude():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    assert prune_mask(weight, 0.5, two_of_four=False).tolist() == [
        [False, True, False, True], [True, True, False, False],
    ]  # fmt: skip
    assert prune_mask(weight, 0.01, two_of_four=False) is None


def test_inputs_that_are_always_zero_do_no_harm():
    weight, hessian = made(seed=3)
    hessian[5], hessian[:, 5] = 0, 0
    found = quantize_gptq(weight, hessian, bits=4, group_size=64, symmetric=True, desc_act=False, damp=0.01)
    assert bool(found.values().isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_matrices_stand_for_the_same_numbers(symmetric):
    weight, hessian = made(seed=4)
    found = quantize_gptq(weight, hessian, bits=4, group_size=32, symmetric=symmetric, desc_act=True, damp=0.01)
    assert torch.equal(dense_of(pack_gptq(found), 4), found.values())
    rounded = round_to_nearest(weight, 4, 32, symmetric)
    assert torch.equal(dense_of(pack_awq(rounded), 4), rounded.values())
    wide = round_to_nearest(weight, 8, 32, symmetric)
    assert torch.equal(dense_of(pack_gptq(wide), 8), wide.values())
