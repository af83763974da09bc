"""Products of MXFP4 experts in kernels against those of dequantized weights, in the interpreter and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.config.quantization import read_quantization  # noqa: E402
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, weighted_sum  # noqa: E402
from shoal.quantization.grouped_experts import FEW_ROWS  # noqa: E402
from shoal.quantization.mxfp4 import Mxfp4, Mxfp4Experts  # noqa: E402
from shoal.quantization.mxfp4_cuda import Mxfp4CudaExperts  # noqa: E402
from tests.kernels.test_moe import ACTIVATIONS  # noqa: E402

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_EXPERTS = 5


def make(
    dtype: torch.dtype, activation: str, bias: bool, sizes: tuple[int, int] = (96, 32)
) -> tuple[Mxfp4CudaExperts, Mxfp4Experts]:
    """The method with kernels, and the reference on a CPU in fp32, of the same numbers."""
    spec = ExpertsSpec(
        num_experts=NUM_EXPERTS,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        activation=ACTIVATIONS[activation],
        dtype=dtype,
        device=DEVICE,
        interleaved=activation == "clamped",
        gate_up_bias=bias,
        down_bias=bias,
        gate_up_names=(("mlp.experts.gate_up_proj",),) * NUM_EXPERTS,
        down_names=("mlp.experts.down_proj",) * NUM_EXPERTS,
    )
    config = read_quantization({"quant_method": "mxfp4"})
    assert config is not None
    on_cpu = dataclasses.replace(spec, dtype=torch.float32, device=torch.device("cpu"))
    reference = Mxfp4Experts.of(on_cpu, Mxfp4(config))
    found = Mxfp4CudaExperts(spec)
    generator = torch.Generator().manual_seed(1)
    for own, other in zip(found.tensors(), reference.tensors(), strict=True):
        data = other.tensor.data
        assert own.part == other.part and own.tensor.suffix == other.tensor.suffix
        if other.tensor.suffix == "blocks":
            data.random_(0, 256, generator=generator)
        elif other.tensor.suffix == "scales":
            data.random_(119, 125, generator=generator)
        else:
            data.copy_(torch.randn(data.shape, generator=generator).to(dtype))
        own.tensor.data.copy_(data)
    found.process_after_load()
    reference.process_after_load()
    assert isinstance(found, ExpertsMethod) and found.weight_bytes() <= reference.weight_bytes()
    return found, reference


def inputs(num_rows: int, dtype: torch.dtype, hidden_size: int) -> tuple[torch.Tensor, ...]:
    """x, weights, ids; some ids are of other ranks."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weights = torch.rand(num_rows, 3, generator=generator)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:3] for _ in range(num_rows)])
    ids[::2, 1] = -1
    return x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)


# The interpreter takes a second for some ten programs.
@pytest.mark.parametrize(
    ("activation", "bias", "dtype", "num_rows"),
    [
        ("clamped", True, torch.float32, 1),
        ("clamped", True, torch.float16, 6),
        ("silu", False, torch.float32, 6),
        ("gelu", True, torch.float32, 1),
        *(
            pytest.param(*form, dtype, num_rows, marks=ON_GPU)
            for form in (("clamped", True), ("silu", False), ("gelu", True))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for num_rows in (1, FEW_ROWS, 9, 300)
        ),
    ],
)
def test_products(activation: str, bias: bool, dtype: torch.dtype, num_rows: int) -> None:
    method, reference = make(dtype, activation, bias)
    x, weights, ids = inputs(num_rows, dtype, 96)
    exact = reference.apply_pairs(x.float().cpu(), ids.cpu())
    expected = weighted_sum(exact, weights.cpu())
    error = TOLERANCE[dtype] * float(exact.abs().max())
    torch.testing.assert_close(method.apply(x, weights, ids).float().cpu(), expected, atol=error, rtol=0)
    torch.testing.assert_close(method.apply_pairs(x, ids).cpu(), exact, atol=error, rtol=0)
    assert method.tokens.tolist() == [2 * count for count in reference.tokens.tolist()]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")
def test_the_shape_of_gpt_oss_20b() -> None:
    method, reference = make(torch.bfloat16, "clamped", True, sizes=(2880, 2880))
    for num_rows in (1, 2, 33):
        x, weights, ids = inputs(num_rows, torch.bfloat16, 2880)
        expected = reference.apply(x.float().cpu(), weights.cpu(), ids.cpu())
        found = method.apply(x, weights, ids).float().cpu()
        assert ((found - expected).norm() / expected.norm()).item() < 0.01
