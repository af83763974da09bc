"""Routing and products of experts: against fp64, in the interpreter and on a GPU, where rows also keep their bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.kernels.moe_routing import order_pairs, softmax_top_k  # noqa: E402
from shoal.layers.routing import SoftmaxTopK, top_k  # noqa: E402
from shoal.quantization.base import ExpertActivation, ExpertsMethod, ExpertsSpec  # noqa: E402
from shoal.quantization.grouped_experts import FEW_ROWS  # noqa: E402
from shoal.quantization.stacked_experts import StackedExperts  # noqa: E402

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")]
TYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up[..., ::2].clamp(max=1.5), gate_up[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def gelu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


ACTIVATIONS = {
    "silu": ExpertActivation(apply=silu, kind="silu"),
    "clamped": ExpertActivation(apply=clamped, kind="clamped", alpha=1.7, limit=1.5),
    "gelu": ExpertActivation(apply=gelu),
}


def make_experts(
    dtype: torch.dtype,
    *,
    num_experts: int = 5,
    sizes: tuple[int, int] = (64, 48),
    activation: str = "silu",
    bias: bool = False,
    deterministic: bool = False,
) -> StackedExperts:
    hidden_size, width = sizes
    method = StackedExperts(
        ExpertsSpec(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=width,
            activation=ACTIVATIONS[activation],
            dtype=dtype,
            device=DEVICE,
            interleaved=activation == "clamped",
            gate_up_bias=bias,
            down_bias=bias,
            deterministic=deterministic,
        )
    )
    generator = torch.Generator().manual_seed(1)
    for found in method.tensors():
        data = found.tensor.data
        data.copy_(torch.randn(data.shape, generator=generator) * data.shape[-1] ** -0.5)
    method.process_after_load()
    return method


def inputs(num_rows: int, num_chosen: int, method: ExpertsMethod, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, weights, ids; some ids are of other ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, method.spec.hidden_size, generator=generator).to(DEVICE, method.spec.dtype)
    weights = torch.rand(num_rows, num_chosen, generator=generator).to(DEVICE)
    ids = torch.stack([torch.randperm(method.spec.num_experts + 1, generator=generator) - 1 for _ in range(num_rows)])
    return x, weights, ids[:, :num_chosen].to(DEVICE, torch.int32)


def expected_pairs(method: StackedExperts, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """fp64 [T, k, H]."""
    spec = method.spec
    rows = []
    for row, chosen in zip(x.double(), ids.tolist(), strict=True):
        outputs = []
        for expert in chosen:
            if expert < 0:
                outputs.append(torch.zeros(spec.hidden_size, dtype=torch.float64, device=x.device))
                continue
            gate_up = method.gate_up.weight[expert].double() @ row
            if method.gate_up.bias is not None:
                gate_up = gate_up + method.gate_up.bias[expert].double()
            output = method.down.weight[expert].double() @ spec.activation.apply(gate_up)
            outputs.append(output if method.down.bias is None else output + method.down.bias[expert].double())
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("activation", "bias"), [("silu", False), ("silu", True), ("clamped", True), ("gelu", False)])
@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, 13, pytest.param(90, marks=ON_GPU)])
def test_experts_give_what_they_should(dtype: torch.dtype, activation: str, bias: bool, num_rows: int) -> None:
    method = make_experts(dtype, activation=activation, bias=bias, sizes=(40, 24))
    x, weights, ids = inputs(num_rows, 3, method)
    pairs = expected_pairs(method, x, ids)
    found = method.apply(x, weights, ids)
    assert found.dtype is dtype
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), (pairs * weights.double()[..., None]).sum(1), **tolerance)
    counts = torch.bincount(ids.flatten() + 1, minlength=6)[1:]
    assert torch.equal(method.tokens, counts)
    torch.testing.assert_close(method.apply_pairs(x, ids).double(), pairs, **tolerance)
    assert torch.equal(method.tokens, 2 * counts)


@pytest.mark.parametrize(("num_rows", "num_experts", "block"), [(1, 3, 16), (7, 40, 16), (300, 6, 16), (700, 3, 64)])
def test_pairs_by_expert(num_rows: int, num_experts: int, block: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(-1, num_experts, (num_rows, 2), generator=generator).to(DEVICE)
    tokens = torch.ones(num_experts, dtype=torch.int64, device=DEVICE)
    order = order_pairs(ids, tokens, block)
    flat = ids.flatten().tolist()
    found: dict[int, list[int]] = {expert: [] for expert in range(num_experts)}
    blocks = zip(order.experts.tolist(), order.starts.tolist(), order.counts.tolist(), strict=True)
    for expert, start, count in blocks:
        if expert >= 0:
            assert 0 < count <= block
            found[expert] += order.pairs[start : start + count].tolist()
    for expert, pairs in found.items():
        assert pairs == [pair for pair, chosen in enumerate(flat) if chosen == expert]
        assert int(tokens[expert]) == 1 + len(pairs)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 2), (60, 4), (128, 8)])
def test_softmax_top_k(num_experts: int, num_chosen: int, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(40, num_experts, generator=generator) * 3
    weights, ids = softmax_top_k(logits.to(DEVICE), num_chosen, normalize, scale=2.5)
    plain, plain_ids = SoftmaxTopK(num_chosen, normalize=normalize, scale=2.5)(logits)
    assert torch.equal(ids.cpu().long(), plain_ids)
    torch.testing.assert_close(weights.cpu(), plain, atol=1e-6, rtol=1e-5)
    shares, _ = logits.double().softmax(-1).topk(num_chosen)
    shares = shares / shares.sum(-1, keepdim=True) if normalize else shares
    torch.testing.assert_close(plain.double(), shares * 2.5, atol=1e-6, rtol=1e-5)


def test_of_equal_logits_the_lowest_id_comes_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0], [0.0] * 6])
    expected = [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert top_k(logits, 4)[1].tolist() == expected
    weights, ids = softmax_top_k(logits.to(DEVICE), 4, True)
    assert ids.tolist() == expected
    torch.testing.assert_close(weights[1].cpu(), torch.full((4,), 0.25))


def test_rows_of_nan_choose_experts_that_exist() -> None:
    _, ids = softmax_top_k(torch.full((3, 5), float("nan"), device=DEVICE), 2, True)
    assert ids.min() >= 0 and ids.max() < 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_deterministic_rows_keep_their_bits_in_any_batch(dtype: torch.dtype) -> None:
    method = make_experts(dtype, num_experts=6, sizes=(1024, 384), deterministic=True)
    x, weights, ids = inputs(900, 3, method)
    x = x * torch.randn_like(x).exp()  # many magnitudes: another order of sums would show
    whole = method.apply(x, weights, ids)
    pairs = method.apply_pairs(x, ids)
    for first, count in [(0, 1), (899, 1), (17, 2), (5, 8), (100, 16), (3, 31), (40, 100), (1, 400)]:
        own = slice(first, first + count)
        assert torch.equal(method.apply(x[own], weights[own], ids[own]), whole[own]), (first, count)
        assert torch.equal(method.apply_pairs(x[own], ids[own]), pairs[own]), (first, count)


@pytest.mark.gpu
def test_a_graph_holds_them() -> None:
    method = make_experts(torch.bfloat16, num_experts=16, sizes=(256, 128))
    for num_rows in (1, 8, 200):
        x, weights, ids = inputs(num_rows, 4, method)
        method.apply(x, weights, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = method.apply(x, weights, ids)
        new_x, new_weights, new_ids = inputs(num_rows, 4, method, seed=7)
        x.copy_(new_x)
        weights.copy_(new_weights)
        ids.copy_(new_ids)
        graph.replay()
        expected = (expected_pairs(method, new_x, new_ids) * new_weights.double()[..., None]).sum(1)
        torch.testing.assert_close(output.double(), expected, atol=3e-2, rtol=3e-2)
