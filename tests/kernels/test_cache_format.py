"""8-bit floats of the KV cache, written and read by kernels, against PyTorch's conversions: every bit of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from shoal.kernels.cache_format import cache_cells, cache_format, decode, encode  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _encode_kernel(source, target, inverse, count, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(source + place, mask=place < count, other=0.0)
    tl.store(target + place, encode(x, inverse, FORMAT), mask=place < count)


@triton.jit
def _decode_kernel(source, target, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, decode(tl.load(source + place), target.dtype.element_ty, FORMAT))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_writing(dtype: torch.dtype, source_dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-30, 18, (20000,), generator=generator)
    x = torch.randn(20000, generator=generator) * 2.0**exponents
    cells = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = cells[cells.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2  # ties
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 449.0, -1e30])
    x = torch.cat([x, finite, middles, middles.nextafter(finite[1:]), special]).to(source_dtype)
    limit = torch.finfo(dtype).max
    expected = (x.float() * (1 / scale)).clamp(-limit, limit).to(dtype)
    cache = torch.empty(len(x), dtype=dtype, device=DEVICE)
    grid = (-(-len(x) // 1024),)
    _encode_kernel[grid](x.to(DEVICE), cache_cells(cache), 1 / scale, len(x), FORMAT=cache_format(cache), SIZE=1024)
    found = cache.cpu()
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("form", [pytest.param(1, marks=pytest.mark.gpu), 2, 3])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading(form: int, target_dtype: torch.dtype) -> None:
    """All 256 numbers, by the instructions of the GPU (which the interpreter gets wrong) and by bits."""
    if form == 1 and (DEVICE.type == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("needs instructions of sm_89")
    cells = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    found = torch.empty(256, dtype=target_dtype, device=DEVICE)
    _decode_kernel[(1,)](cells, found, FORMAT=form, SIZE=256)
    expected = cells.cpu().view(torch.float8_e5m2 if form == 2 else torch.float8_e4m3fn).to(target_dtype)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
