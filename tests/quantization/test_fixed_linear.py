"""Linear layers of deterministic mode on CUDA: with and without cuBLAS a row keeps its bits."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")

from shoal.quantization.base import LinearSpec  # noqa: E402
from shoal.quantization.fixed_linear import FixedLinear, _padded_rows  # noqa: E402


def make(
    num_outputs: int, num_inputs: int, dtype: torch.dtype, *, bias: bool = False, **options: object
) -> FixedLinear:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = LinearSpec(
        in_features=num_inputs, out_features=num_outputs, bias=bias, dtype=dtype, device=device, deterministic=True,
        **options,
    )  # fmt: skip
    layer = FixedLinear(spec)
    generator = torch.Generator().manual_seed(num_outputs)
    for tensor in layer.tensors():
        tensor.data.copy_(torch.randn(tensor.data.shape, generator=generator) * num_inputs**-0.5)
    layer.process_after_load()
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_multiplies(bias: bool) -> None:
    layer = make(40, 64, torch.float32, bias=bias)
    x = torch.randn(5, 64).to(layer.weight.device)
    expected = x.double() @ layer.weight.double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    torch.testing.assert_close(layer.apply(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_takes_no_part_of_a_sum() -> None:
    for options in ({"num_input_shards": 2}, {"is_summand": True}):
        with pytest.raises(AssertionError):
            make(40, 64, torch.float32, **options)


def test_rows_are_padded_by_an_eighth_at_most() -> None:
    for num_rows in range(33, 9000):
        padded = _padded_rows(num_rows)
        assert num_rows <= padded <= max(num_rows + 7, num_rows * 9 / 8)
        assert _padded_rows(padded) == padded
    assert len({_padded_rows(num_rows) for num_rows in range(33, 8193)}) <= 64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "bias"), [(512, 1024, False), (1536, 1024, True), (128, 4096, False)]
)
def test_same_bits_with_cublas_and_without(num_outputs: int, num_inputs: int, bias: bool, dtype: torch.dtype) -> None:
    layer = make(num_outputs, num_inputs, dtype, bias=bias)
    x = torch.randn(3000, num_inputs, device="cuda").to(dtype)
    alone = torch.cat([layer.apply(x[row : row + 1]) for row in range(0, 3000, 97)])
    for first, count in [(0, 3000), (0, 33), (0, 100), (0, 257), (0, 1000), (1, 2048)]:
        wanted = [row for row in range(0, 3000, 97) if first <= row < first + count]
        found = layer.apply(x[first : first + count])
        assert found.shape == (count, num_outputs)
        found = found[[row - first for row in wanted]]
        assert torch.equal(found, alone[[row // 97 for row in wanted]]), (first, count)
    settings = torch.backends.cuda.matmul
    assert settings.allow_bf16_reduced_precision_reduction and settings.allow_bf16_reduced_precision_reduction_split_k
