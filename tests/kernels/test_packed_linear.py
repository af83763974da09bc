from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from shoal.kernels import packed_linear as packed_linear_module
from shoal.kernels import packed_tuning
from shoal.kernels.linear import Workspace
from shoal.kernels.packed_linear import PackedConfig, packed_linear
from shoal.kernels.packed_tuning import Case, PackedChooser, candidates_for
from shoal.kernels.packed_weight import PackedWeight, dequantize_packed
from shoal.quantization.packed_cuda import packed_weight
from shoal.quantization.packed_int import IntegerMatrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies no matrices of bf16.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16]
SUM = PackedConfig("sum", block_n=16, num_warps=2, takes_norm=True)
ROWS = PackedConfig("rows", block_n=32, num_warps=2, takes_norm=True)
ROWS_SPLIT = PackedConfig("rows", block_n=16, num_warps=1, num_stages=2, num_splits=3)
DOT = PackedConfig("dot", block_n=32, num_warps=1, num_stages=2)
SUM_SPLIT = PackedConfig("sum", block_n=16, num_warps=1, num_splits=3)
DOT_SPLIT = PackedConfig("dot", block_n=16, num_warps=1, num_stages=2, num_splits=3)


@pytest.fixture(scope="module")
def workspace():
    return Workspace(torch.device(DEVICE))


def _random(num_outputs, num_inputs, bits, group, has_zeros, scales=torch.float16):
    """(weight as the kernels take it, the same in fp64 [N, K])."""
    generator = torch.Generator().manual_seed(num_outputs + num_inputs + bits + group)
    integers = torch.randint(0, 1 << bits, (num_outputs, num_inputs), generator=generator).to(torch.uint8)
    num_groups = -(-num_inputs // group)
    scale = ((torch.rand(num_groups, num_outputs, generator=generator) + 0.5) * 0.2 / (1 << bits)).to(scales)
    zeros = torch.randint(0, 1 << bits, scale.shape, generator=generator).to(torch.uint8) if has_zeros else None
    groups_of = torch.arange(num_inputs) // group
    offset = torch.full(scale.shape, 1 << (bits - 1)) if zeros is None else zeros
    exact = (integers.double() - offset.double()[groups_of].t()) * scale.double()[groups_of].t()
    integers, scale = integers.to(DEVICE), scale.to(DEVICE)
    matrix = IntegerMatrix(
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        bits=bits,
        group_size=group,
        read=lambda outputs: integers[outputs],
        scales=scale.float(),
        zeros=None if zeros is None else zeros.to(DEVICE),
    )
    return packed_weight(matrix), exact.to(DEVICE)


def _expected(x, weight, bias, gated, residual, norm):
    x = x.double()
    if norm is not None:
        x = F.rms_norm(x, (x.shape[1],), norm[0].double(), norm[1])
    y = x @ weight.T
    if bias is not None:
        y = y + bias.double()
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.double()).float()


# Bits, inputs of a group, zeros, inputs: whole slabs, and one that is cut; groups that a slab holds, that hold it, and
# one whose size has to be cut.
FORMATS = [
    (4, 128, False, 512), (4, 32, True, 400), (4, 256, True, 512), (4, 96, False, 288), (4, 400, True, 400),
    (8, 64, False, 256), (8, 16, True, 200), (3, 32, False, 192),
]  # fmt: skip


# The same, of groups that hold whole slabs.
WIDE_FORMATS = [
    (4, 128, False, 512), (4, 256, True, 1024), (4, 128, True, 400), (8, 64, False, 256), (8, 128, True, 200),
    (3, 128, False, 384),
]  # fmt: skip
CASES = [
    *((*each, config, num_rows) for each in FORMATS for config, num_rows in (
        (SUM, 1), (SUM_SPLIT, 1), (DOT, 1), (DOT_SPLIT, 13), (DOT, 40),
    )),
    *((*each, config, num_rows) for each in WIDE_FORMATS for config, num_rows in (
        (ROWS, 1), (ROWS, 8), (ROWS_SPLIT, 1), (ROWS_SPLIT, 5),
    )),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "has_zeros", "num_inputs", "config", "num_rows"), CASES)
def test_equals_the_product_in_full_precision(workspace, config, num_rows, bits, group, has_zeros, num_inputs, dtype):
    gated, extras = num_rows > 1, has_zeros
    num_outputs = 36  # no multiple of a block
    weight, exact = _random(num_outputs * (2 if gated else 1), num_inputs, bits, group, has_zeros)
    x = torch.randn(num_rows, num_inputs, device=DEVICE).to(dtype)
    bias = torch.randn(exact.shape[0], device=DEVICE).to(dtype) if extras else None
    residual = torch.randn(num_rows, num_outputs, device=DEVICE).to(dtype) if extras else None
    norm = None
    if config in (SUM, ROWS):
        norm = (torch.rand(num_inputs, device=DEVICE).to(dtype) + 0.5, 1e-3)
    y = packed_linear(
        x, weight, bias, config, workspace, gated=gated, residual=residual, norm=norm, output_dtype=torch.float32
    )
    if config is ROWS:  # what the norm gives is rounded
        x, norm = F.rms_norm(x.double(), (num_inputs,), norm[0].double(), norm[1]).to(dtype), None
    torch.testing.assert_close(
        y, _expected(x, exact, bias, gated, residual, norm), rtol=1e-4, atol=1e-3 if config is ROWS else 1e-4
    )
    assert int(workspace.counters.sum()) == 0  # ready for the next product


@pytest.mark.parametrize("config", [SUM, ROWS])
def test_inputs_of_all_sizes_keep_their_precision(workspace, config):
    """Few rows are multiplied by numbers that are not normal: what is small or very large must come through."""
    weight, exact = _random(16, 256, 4, 128, False)
    for size in (2.0**-24, 1.0, 2.0**15) if DEVICE == "cpu" else (2.0**-24, 1.0, 2.0**15, 2.0**40):
        dtype = torch.bfloat16 if size > 2.0**15 else torch.float16
        x = (torch.rand(1, 256, device=DEVICE) * size).to(dtype)
        y = packed_linear(x, weight, None, config, workspace, output_dtype=torch.float32)
        torch.testing.assert_close(y / size, (x.double() @ exact.T / size).float(), rtol=1e-5, atol=1e-5)


def test_strides_of_x_and_residual(workspace):
    weight, exact = _random(32, 256, 4, 128, True)
    x = torch.randn(3, 300, device=DEVICE).half()[:, 16:272]
    residual = torch.randn(3, 100, device=DEVICE).half()[:, 10:42]
    y = packed_linear(x, weight, None, DOT, workspace, residual=residual)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), _expected(x, exact, None, False, residual, None), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("bits", "group", "has_zeros", "num_inputs"), FORMATS)
def test_dequantized(bits, group, has_zeros, num_inputs):
    weight, exact = _random(50, num_inputs, bits, group, has_zeros)
    output = torch.empty(30, num_inputs, device=DEVICE)
    dequantize_packed(weight, slice(11, 41), output)
    torch.testing.assert_close(output, exact[11:41].float(), rtol=1e-6, atol=0)


def test_scales_that_fit_no_short_float_stay_as_they_are():
    weight, _ = _random(16, 128, 4, 128, False, torch.float32)
    assert weight.scales.dtype is torch.float32
    weight, _ = _random(16, 128, 4, 128, False, torch.bfloat16)
    assert weight.scales.dtype is torch.bfloat16 or weight.scales.dtype is torch.float16


class Timer:
    """Runs, and finds faster what comes later."""

    def __init__(self):
        self.count = 0

    def __call__(self, run):
        self.count += 1
        run()
        return 1.0 / self.count


@pytest.fixture
def chooser(monkeypatch):
    for module in (packed_linear_module, packed_tuning):
        monkeypatch.setattr(module, "_num_multiprocessors", lambda device: 4)
    timer = Timer()
    made = PackedChooser(torch.device(DEVICE), None, timer)
    return made, timer


@pytest.mark.parametrize("num_rows", [0, 1, 5, 30, 70, 600])
def test_a_plan_measures_once_and_multiplies(monkeypatch, chooser, num_rows):
    made, timer = chooser
    monkeypatch.setattr(packed_tuning, "_ROWS", ((16, 2, 1, False), (16, 1, 1, True)))
    monkeypatch.setattr(packed_tuning, "_FEW_DOTS", ((16, 1, 2),))
    monkeypatch.setattr(packed_tuning, "_MORE_DOTS", ((16, 1, 2),))
    monkeypatch.setattr(packed_tuning, "_MANY_DOTS", ((32, 1, 2),))
    monkeypatch.setattr(packed_tuning, "_SCRATCH_BYTES", 30 * 128 * 2)
    monkeypatch.setattr(packed_tuning, "BUCKETS", (1, 8, 32, 128))
    weight, exact = _random(64, 128, 4, 128, False)
    bias = torch.randn(64, device=DEVICE).half()
    plan = made.plan(weight, bias, torch.float16)
    x = torch.randn(num_rows, 128, device=DEVICE).half()
    norm = (torch.rand(128, device=DEVICE).half() + 0.5, 1e-3) if num_rows <= 5 else None
    residual = torch.randn(num_rows, 64, device=DEVICE).half()
    for _ in range(2):
        y = plan.apply(x, residual=residual, norm=norm)
        torch.testing.assert_close(y.float(), _expected(x, exact, bias, False, residual, norm), rtol=5e-3, atol=5e-3)
    measured = timer.count
    assert (measured > 0) == (0 < num_rows <= 128)
    y = made.plan(weight, bias, torch.float16).apply(x, norm=norm)
    assert timer.count == measured, "layers of a shape share a choice"
    y = plan.apply_gated(x, norm=norm)
    assert timer.count > measured or not measured
    torch.testing.assert_close(y.float(), _expected(x, exact, bias, True, None, norm), rtol=5e-3, atol=5e-3)


def test_a_kernel_that_is_wrong_here_is_not_taken(monkeypatch, chooser, caplog):
    made, timer = chooser
    monkeypatch.setattr(packed_tuning, "_ROWS", ((16, 2, 1, False),))
    monkeypatch.setattr(packed_tuning, "_SUMS", ((16, 2, 1),))
    monkeypatch.setattr(packed_tuning, "_FEW_DOTS", ((16, 1, 2),))
    weight, exact = _random(32, 128, 4, 128, False)
    plan = made.plan(weight, None, torch.float16)
    run = plan._run

    def run_wrong(x, config, *arguments):
        return run(x.flip(1) if config.kind == "rows" else x, config, *arguments)

    monkeypatch.setattr(plan, "_run", run_wrong)
    x = torch.randn(1, 128, device=DEVICE).half()
    expected = _expected(x, exact, None, False, None, None)
    torch.testing.assert_close(plan.apply(x).float(), expected, rtol=5e-3, atol=5e-3)
    config, is_final = made.choose(plan, Case(1, False, False))
    assert is_final and config.kind != "rows" and timer.count > 0 and "wrong results" in caplog.text


def test_replicated_layers_measure_nothing(chooser):
    made, timer = chooser
    weight, exact = _random(32, 128, 4, 128, False)
    x = torch.randn(1, 128, device=DEVICE).half()
    y = made.plan(weight, None, torch.float16, measures=False).apply(x)
    assert timer.count == 0
    torch.testing.assert_close(y.float(), _expected(x, exact, None, False, None, None), rtol=5e-3, atol=5e-3)
    for num_rows in (1, 8):
        config, is_final = made.choose(
            made.plan(weight, None, torch.float16, measures=False), Case(num_rows, False, False)
        )
        assert is_final and config.kind != "rows"


def test_candidates_fit_the_workspace():
    for num_outputs, num_inputs in ((7168, 5120), (5120, 27648), (55296, 5120), (64, 128), (200000, 8192)):
        words = torch.empty(num_inputs // 128, num_outputs, 16, dtype=torch.int32, device="meta")
        weight = PackedWeight(words, words, None, 4, 128, num_inputs)
        for bucket in packed_tuning.BUCKETS:
            for gated, has_norm in ((False, False), (True, False), (False, True), (True, True)):
                found = candidates_for(Case(bucket, gated, has_norm), weight, 132)
                assert len(set(found)) == len(found) and len(found) >= 2
                for config in found:
                    if config is not None and config.num_splits > 1:
                        tiles = -(-num_outputs // config.block_n) * -(-bucket // 128)
                        assert Workspace.holds(config.num_splits, bucket, num_outputs, tiles)
