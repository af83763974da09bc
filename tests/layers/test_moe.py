"""Experts by the layouts that checkpoints have, split over ranks or shared whole: all give what one rank computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")

from shoal.attention.registry import create_attention_backend  # noqa: E402
from shoal.distributed.parallel_dims import ParallelDims  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.layers.context import BuildContext  # noqa: E402
from shoal.layers.moe import ExpertNames, RoutedExperts, clamped_swiglu, expert_activation  # noqa: E402
from shoal.quantization.base import ExpertsMethod, ExpertsSpec  # noqa: E402
from shoal.quantization.stacked_experts import StackedExperts  # noqa: E402
from shoal.quantization.unquantized import Unquantized  # noqa: E402

E, H, W, K = 5, 24, 16, 2
LAYOUTS = {
    "each": ExpertNames(),
    "each, gate and up as one": ExpertNames(gate_up=("gate_up",)),
    "stacked": ExpertNames(gate_up=("gate_up_proj",), is_stacked=True),
    "stacked and transposed": ExpertNames(gate_up=("gate_up_proj",), is_stacked=True, is_transposed=True),
}


class Stacked(Unquantized):
    """What a GPU has, in the interpreter."""

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        return StackedExperts(spec)


def whole_weights() -> tuple[torch.Tensor, ...]:
    """gate, up [E, W, H], down [E, H, W] and their biases."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(E, W, H), (E, W, H), (E, H, W), (E, W), (E, W), (E, H)]
    return tuple(torch.randn(shape, generator=generator) * 0.3 for shape in shapes)


def checkpoint(names: ExpertNames, interleaved: bool, bias: bool) -> dict[str, torch.Tensor]:
    gate, up, down, gate_bias, up_bias, down_bias = whole_weights()
    both = torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
    both_bias = (
        torch.stack([gate_bias, up_bias], 2).flatten(1, 2) if interleaved else torch.cat([gate_bias, up_bias], 1)
    )
    matrices = {names.down: (down, down_bias)}
    if len(names.gate_up) == 2:
        matrices |= {names.gate_up[0]: (gate, gate_bias), names.gate_up[1]: (up, up_bias)}
    else:
        matrices[names.gate_up[0]] = (both, both_bias)
    found = {}
    for name, (weight, added) in matrices.items():
        if names.is_stacked:
            found[f"x.{name}"] = weight.mT.contiguous() if names.is_transposed else weight
            found[f"x.{name}_bias"] = added
            continue
        for expert in range(E):
            found[f"x.{expert}.{name}.weight"], found[f"x.{expert}.{name}.bias"] = weight[expert], added[expert]
    return {name: tensor for name, tensor in found.items() if bias or not name.endswith("bias")}


def reference(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, clamped: bool, bias: bool) -> torch.Tensor:
    gate, up, down, gate_bias, up_bias, down_bias = whole_weights()
    output = torch.zeros_like(x)
    for row in range(len(x)):
        for weight, expert in zip(weights[row], ids[row], strict=True):
            g = gate[expert] @ x[row] + gate_bias[expert] * bias
            u = up[expert] @ x[row] + up_bias[expert] * bias
            if clamped:
                g, u = g.clamp(max=0.8), u.clamp(-0.8, 0.8)
                hidden = (u + 1) * g * torch.sigmoid(1.7 * g)
            else:
                hidden = F.silu(g) * u
            output[row] += weight * (down[expert] @ hidden + down_bias[expert] * bias)
    return output


def compute(
    rank: int, size: int, scheme: Unquantized, names: ExpertNames, clamped: bool, bias: bool, by_expert: bool
) -> torch.Tensor:
    """A rank's summand: the interpreter knows one thread only, so ranks come one after the other."""
    context = BuildContext(
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention_backend=create_attention_backend("torch_paged"),
        quantization=scheme,
        parallel=ParallelDims(tensor_size=size, rank=rank, expert_parallel=by_expert),
    )
    activation = expert_activation(context, "silu")
    if clamped:
        activation = clamped_swiglu(context, alpha=1.7, limit=0.8, interleaved=True)
    layer = RoutedExperts(
        context, "x", num_experts=E, hidden_size=H, intermediate_size=W, activation=activation, names=names,
        interleaved=clamped, bias=bias,
    )  # fmt: skip
    stored = checkpoint(names, clamped, bias)
    read = set()
    for tensor in layer.checkpoint_tensors():
        assert stored[tensor.name].shape == tensor.shape, tensor.name
        tensor.destination.copy_(stored[tensor.name][tensor.index])
        read.add(tensor.name)
    for name in stored.keys() - read:
        assert {name, name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]} & layer.elsewhere, name
    layer.process_after_load()
    assert layer.leaves_sum == (size > 1)
    return layer(*inputs())


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    x, weights = torch.randn(7, H, generator=generator), torch.rand(7, K, generator=generator)
    return x, weights, torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(7)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "clamped"), [(Unquantized, False), (Unquantized, True), (Stacked, True)])
def test_every_layout_on_every_rank(layout: str, bias: bool, scheme: type[Unquantized], clamped: bool) -> None:
    names = LAYOUTS[layout]
    if clamped and len(names.gate_up) == 2:
        pytest.skip("gate and up by turns are one matrix")
    expected = reference(*inputs(), clamped, bias)
    for size, by_expert in ((1, False), (2, False), (2, True)):
        options = (size, scheme(), names, clamped, bias, by_expert)
        found = torch.stack([compute(rank, *options) for rank in range(size)]).sum(0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_deterministic_experts_with_biases_are_not_split() -> None:
    context = BuildContext(
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention_backend=create_attention_backend("deterministic"),
        deterministic=True,
        parallel=ParallelDims(tensor_size=2),
    )
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": W}
    with pytest.raises(ConfigError, match="does not split experts with biases over 2 ranks; --enable-expert-parallel"):
        RoutedExperts(context, "x", **sizes, activation=expert_activation(context, "silu"), bias=True)
