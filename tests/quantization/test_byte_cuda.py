"""On a GPU: products with weights of a byte against references in double precision, whatever way they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoal.quantization.base import LinearSpec
from shoal.quantization.byte_linear import MOST, ByteFormat, ByteLinear, QuantizedWhileLoading

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
DEVICE = torch.device("cuda")
FORMS = {
    "fp8-tensor": ByteFormat(dtype=FP8, scales="tensor", activations="dynamic_token"),
    "fp8-static": ByteFormat(dtype=FP8, scales="tensor", activations="static_tensor"),
    "fp8-channel": ByteFormat(dtype=FP8, scales="channel", activations="dynamic_token"),
    "fp8-block": ByteFormat(dtype=FP8, scales="block", block=(128, 128), activations="dynamic_group"),
    "fp8-weight-only": ByteFormat(dtype=FP8, scales="channel"),
    "int8-channel": ByteFormat(dtype=torch.int8, scales="channel", activations="dynamic_token"),
    "int8-static": ByteFormat(dtype=torch.int8, scales="channel", activations="static_tensor"),
    "int8-weight-only": ByteFormat(dtype=torch.int8, scales="channel"),
    "int8-groups": ByteFormat(dtype=torch.int8, scales="block", block=(1, 64)),
    "int8-groups-rows": ByteFormat(dtype=torch.int8, scales="block", block=(1, 64), activations="dynamic_token"),
}


def make(form: ByteFormat, inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """(the layer, its dequantized weight in fp64, its bias)."""
    spec = LinearSpec(
        in_features=inputs, out_features=outputs, bias=True, dtype=dtype, device=DEVICE, names=("a", "b"),
        part_sizes=(outputs // 4, outputs - outputs // 4), **changes,
    )  # fmt: skip
    method = ByteLinear(spec, form)
    found = {tensor.suffix: tensor.data for tensor in method.tensors()}
    found["weight"].copy_((torch.randn(outputs, inputs, device=DEVICE) * 40).clamp(-127, 127))
    scales = found["weight_scale"].uniform_(0.5, 2.0).div_(40 * inputs**0.5)
    if "input_scale" in found:
        found["input_scale"].copy_(torch.tensor([3.0, 4.0]) / MOST[form.dtype])
    bias = found["bias"].normal_().double()
    by_row = scales.double()
    if form.scales == "tensor":
        by_row = by_row.repeat_interleave(torch.tensor(spec.part_sizes, device=DEVICE))[:, None]
    elif form.scales == "block":
        by_row = by_row.repeat_interleave(form.block[0], 0)[:outputs].repeat_interleave(form.block[1], 1)[:, :inputs]
    weight = found["weight"].double() * by_row
    method.process_after_load()
    return method, weight, bias


def quantized(x: torch.Tensor, form: ByteFormat) -> torch.Tensor:
    """What rows become, in PyTorch's own operations."""
    most = MOST[form.dtype]
    values = x.float()
    if form.activations == "static_tensor":
        scales = torch.full((1, 1), 4.0 / most, device=DEVICE)
    elif form.activations == "dynamic_group":
        padded = F.pad(values, (0, -values.shape[1] % form.block[1]))
        scales = padded.unflatten(1, (-1, form.block[1])).abs().amax(2).clamp(min=1e-10) / most
        scales = scales.repeat_interleave(form.block[1], 1)[:, : values.shape[1]]
    else:
        scales = values.abs().amax(1, keepdim=True).clamp(min=1e-10) / most
    q = (values / scales).clamp(-most, most)
    q = q.round() if form.dtype is torch.int8 else q.to(FP8).float()
    return q.double() * scales.double()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 768), (512, 200), (200, 136)])
def test_every_number_of_rows(name: str, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    form = FORMS[name]
    if form.scales == "block" and inputs == 200:
        inputs, outputs = 320, 144  # a block that is cut at either end
    method, weight, bias = make(form, inputs, outputs, dtype)
    for num_rows in (1, 2, 3, 8, 16, 17, 64, 200):
        x = torch.randn(num_rows, inputs, device=DEVICE).to(dtype)
        found = method.apply(x)
        assert found.dtype is dtype and found.shape == (num_rows, outputs)
        plain = x.double() @ weight.T + bias
        rounding = 4e-3 if dtype is torch.bfloat16 else 1e-3
        if num_rows <= 16:
            if method.fused_rows:
                assert distance(found, plain) < rounding, num_rows
            continue
        if form.activations == "none":
            assert distance(found, plain) < 2 * rounding, num_rows
            continue
        expected = quantized(x, form) @ weight.T + bias
        takes_it = distance(found, expected) < rounding + 1e-3
        # Sizes that no kernel for quantized rows takes are multiplied as they are.
        assert takes_it or distance(found, plain) < 2 * rounding, (num_rows, distance(found, expected))
        assert takes_it or outputs % 16 or inputs % 16
        assert distance(found, plain) < (0.04 if form.dtype is FP8 else 0.02), num_rows


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "int8-channel"])
def test_gated_with_norm_and_residual(name: str) -> None:
    method, weight, bias = make(FORMS[name], 512, 1024)
    norm = torch.rand(512, device=DEVICE).to(torch.bfloat16) + 0.5, 1e-5
    for num_rows in (1, 5, 16):
        x = torch.randn(num_rows, 512, device=DEVICE).to(torch.bfloat16)
        normed = F.rms_norm(x.double(), (512,), norm[0].double(), 1e-5)
        gate, up = (normed @ weight.T + bias).chunk(2, dim=1)
        assert distance(method.apply_gated(x, norm=norm), F.silu(gate) * up) < 8e-3
        residual = torch.randn(num_rows, 1024, device=DEVICE).to(torch.bfloat16)
        expected = normed @ weight.T + bias + residual.double()
        assert distance(method.apply_fused(x, norm=norm, residual=residual), expected) < 6e-3


def test_fp8_numbers_are_converted_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[bits & 0x7F != 0x7F].view(FP8).to(DEVICE)
    spec = LinearSpec(in_features=16, out_features=254, bias=False, dtype=torch.bfloat16, device=DEVICE, names=("a",))
    method = ByteLinear(spec, FORMS["fp8-channel"])
    found = {tensor.suffix: tensor.data for tensor in method.tensors()}
    found["weight"].copy_(numbers[:, None])
    found["weight_scale"].fill_(1.0)
    method.process_after_load()
    for num_rows in (1, 4, 16):
        x = torch.zeros(num_rows, 16, dtype=torch.bfloat16, device=DEVICE)
        x[:, 3] = 1
        assert torch.equal(method.apply(x).float(), numbers.float().expand(num_rows, 254))


def test_rows_become_the_nearest_fp8_numbers() -> None:
    from shoal.kernels.byte_matmul import quantize_rows

    for group in (0, 128):
        x = torch.randn(7, 1000, device=DEVICE).to(torch.bfloat16)
        q, scales = quantize_rows(x, FP8, group=group)
        by_element = scales.repeat_interleave(group, 1)[:, :1000] if group else scales
        assert torch.equal(q.float(), (x.float() / by_element).clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "int8-channel", "int8-groups"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_rows_do_not_depend_on_mates(name: str, dtype: torch.dtype) -> None:
    method, weight, bias = make(FORMS[name], 512, 384, dtype, deterministic=True)
    x = torch.randn(300, 512, device=DEVICE).to(dtype)
    whole = method.apply(x)
    assert distance(whole, x.double() @ weight.T + bias) < (8e-3 if dtype is torch.bfloat16 else 1e-5)
    for start, count in ((0, 1), (7, 1), (3, 16), (100, 64), (150, 150)):
        assert torch.equal(method.apply(x[start : start + count]), whole[start : start + count])


def test_replicated_layers_do_not_measure() -> None:
    method, weight, bias = make(FORMS["fp8-channel"], 512, 384, is_replicated=True)
    for num_rows in (1, 2, 4, 8, 16):
        x = torch.randn(num_rows, 512, device=DEVICE).to(torch.bfloat16)
        assert distance(method.apply(x), x.double() @ weight.T + bias) < 4e-3


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_quantizing_while_loading_holds_one_layer_more(dtype: torch.dtype) -> None:
    size = 2048
    spec = LinearSpec(
        in_features=size, out_features=size, bias=False, dtype=torch.bfloat16, device=DEVICE, names=("a",)
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    methods = [QuantizedWhileLoading(spec, dtype) for _ in range(8)]
    assert torch.cuda.memory_allocated() == before, "plain weights wait in the host's memory"
    torch.cuda.reset_peak_memory_stats()
    for method in methods:
        plain = torch.randn(size, size).to(torch.bfloat16)
        method.tensors()[0].data.copy_(plain)
        method.process_after_load()
    held = torch.cuda.memory_allocated() - before
    assert 8 * size * size <= held < 8.2 * size * size + (64 << 20)  # and the workspace of split products
    assert torch.cuda.max_memory_allocated() - before < held + 32 * size * size
    x = torch.randn(3, size, device=DEVICE).to(torch.bfloat16)
    assert distance(methods[-1].apply(x), x.double() @ plain.to(DEVICE).double().T) < 0.05
