"""Products of FP8, INT8 and packed experts in one launch against those of dequantized weights, one by one: in the
interpreter and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.config.quantization import read_quantization  # noqa: E402
from shoal.errors import ModelError  # noqa: E402
from shoal.kernels import moe, packed_experts  # noqa: E402
from shoal.quantization import experts as choice  # noqa: E402
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, QuantizationScheme, weighted_sum  # noqa: E402
from shoal.quantization.byte_experts import ByteExperts  # noqa: E402
from shoal.quantization.grouped_experts import FEW_ROWS  # noqa: E402
from shoal.quantization.looped_experts import LoopedExperts  # noqa: E402
from shoal.quantization.packed_experts import PackedExperts  # noqa: E402
from shoal.quantization.registry import create_quantization  # noqa: E402
from shoal.quantization.stacked_experts import StackedExperts  # noqa: E402
from tests.kernels.test_moe import ACTIVATIONS, inputs  # noqa: E402
from tests.quantization.writers import compressed  # noqa: E402

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
INT8 = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
# By name: how a checkpoint says it, and --quantization.
BYTES: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, None),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, None),
    "fp8-channel": ({"quant_method": "fbgemm_fp8"}, None),
    "fp8-block": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}, None),
    "fp8-on-the-fly": (None, "fp8"),
    "int8-channel": ({"quant_method": "int8"}, None),
    "int8-group": (compressed("int-quantized", INT8), None),
    "int8-on-the-fly": (None, "int8"),
}
PACKED: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "gptq": (GPTQ, None),
    "gptq-zeros": (GPTQ | {"sym": False, "group_size": 32}, None),
    "gptq-8": (GPTQ | {"bits": 8}, None),
    "gptq-8-zeros": (GPTQ | {"bits": 8, "group_size": 16, "sym": False}, None),
    # Of 4 bits a slab has inputs of two groups, of 8 of one.
    "gptq-8-and-4": (GPTQ | {"group_size": 64, "dynamic": {"+:.*(gate|up)_proj.*": {"bits": 8}}}, None),
    "gptq-3": (GPTQ | {"bits": 3, "group_size": 64}, None),
    "gptq-one-group": (GPTQ | {"group_size": -1}, None),
    "awq": (AWQ, None),
    "packed": (compressed("pack-quantized", INT4), None),
}
FORMS = BYTES | PACKED
NUM_EXPERTS = 5


def scheme_of(name: str) -> QuantizationScheme:
    return create_quantization(read_quantization(*FORMS[name]))


def make_spec(
    dtype: torch.dtype, activation: str = "silu", bias: bool = False, sizes: tuple[int, int] | None = None
) -> ExpertsSpec:
    sizes = sizes or (80, 48)
    return ExpertsSpec(
        num_experts=NUM_EXPERTS,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        activation=ACTIVATIONS[activation],
        dtype=dtype,
        device=DEVICE,
        interleaved=activation == "clamped",
        gate_up_bias=bias,
        down_bias=bias,
        gate_up_names=tuple((f"experts.{n}.gate_proj", f"experts.{n}.up_proj") for n in range(NUM_EXPERTS)),
        down_names=tuple(f"experts.{n}.down_proj" for n in range(NUM_EXPERTS)),
    )


def make(
    name: str, spec: ExpertsSpec, g_idx: Callable[[str, int], torch.Tensor] | None = None
) -> tuple[Any, LoopedExperts]:
    """The method with kernels, and the reference on a CPU in fp32, of the same numbers. g_idx: of a part and an
    expert; None: the checkpoint has none."""
    scheme = scheme_of(name)
    reference = LoopedExperts.of(dataclasses.replace(spec, dtype=torch.float32, device=torch.device("cpu")), scheme)
    found = (ByteExperts if name in BYTES else PackedExperts)(spec, scheme)
    generator = torch.Generator().manual_seed(1)
    for own, other in zip(found.tensors(), reference.tensors(), strict=True):
        data = other.tensor.data
        assert (own.part, own.expert, own.tensor.suffix) == (other.part, other.expert, other.tensor.suffix)
        if own.tensor.suffix in ("qweight", "qzeros", "weight_packed"):
            data.random_(-(1 << 31), 1 << 31, generator=generator)
        elif own.tensor.suffix == "weight_shape":
            data.fill_(1 << 20)
        elif own.tensor.suffix == "g_idx" and g_idx is not None:
            data.copy_(g_idx(own.part, own.expert).expand_as(data))
        elif own.tensor.suffix == "g_idx" or (own.tensor.optional and own.tensor.suffix == "bias"):
            continue  # the checkpoint has none
        elif own.tensor.suffix == "weight" and data.itemsize == 1:
            data.copy_((torch.randn(data.shape, generator=generator) * 40).clamp(-127, 127))
        elif own.tensor.suffix in ("weight", "bias"):
            data.copy_((torch.randn(data.shape, generator=generator) * data.shape[-1] ** -0.5).to(spec.dtype))
        else:
            small = 40 if name in BYTES else 60 if "8" in name else 4
            data.copy_(((torch.rand(data.shape, generator=generator) + 0.5) / small * spec.hidden_size**-0.5).half())
        own.tensor.data.copy_(data)
    loaded = found.as_loaded()
    loaded.process_after_load()
    reference.process_after_load()
    return loaded, reference


def check(method: ExpertsMethod, reference: LoopedExperts, num_rows: int, num_chosen: int = 3) -> None:
    """Twice: weighted, and by pairs."""
    before = method.tokens.tolist()
    x, weights, ids = inputs(num_rows, num_chosen, method, seed=num_rows)
    exact = reference.apply_pairs(x.float().cpu(), ids.cpu())
    expected = weighted_sum(exact, weights.cpu())
    error = TOLERANCE[method.spec.dtype]
    found = method.apply(x, weights, ids)
    assert found.dtype is method.spec.dtype
    torch.testing.assert_close(found.float().cpu(), expected, atol=error * float(expected.abs().max()), rtol=0)
    pairs = method.apply_pairs(x, ids)
    torch.testing.assert_close(pairs.cpu(), exact, atol=error * float(exact.abs().max()), rtol=0)
    counts = torch.bincount(ids.flatten().cpu() + 1, minlength=NUM_EXPERTS + 1)[1:].tolist()
    assert method.tokens.tolist() == [old + 2 * new for old, new in zip(before, counts, strict=True)]


# The interpreter takes a second for some ten programs.
@pytest.mark.parametrize(
    ("name", "activation", "bias", "dtype", "num_rows"),
    [
        *((name, "silu", False, torch.float32, 2) for name in BYTES),
        *((name, "silu", False, torch.float16, 2) for name in PACKED),
        *((name, "silu", False, torch.float32, 7) for name in ("fp8-channel", "fp8-block", "int8-channel")),
        *((name, "silu", False, torch.float16, 7) for name in ("gptq-8", "gptq-8-zeros", "packed")),
        ("gptq", "clamped", True, torch.float16, 2),
        ("awq", "clamped", True, torch.float16, 9),
        ("gptq-8", "gelu", True, torch.float16, 1),
        ("fp8-channel", "clamped", True, torch.float16, 1),
        ("fp8-channel", "clamped", True, torch.float16, 9),
        ("fp8-block", "silu", True, torch.float16, 3),
        ("fp8-block", "silu", True, torch.float16, 9),
        ("int8-channel", "gelu", True, torch.float32, 1),
        *(
            pytest.param(name, activation, bias, dtype, num_rows, marks=ON_GPU)
            for name in FORMS
            for activation, bias, dtype in (
                ("silu", False, torch.bfloat16),
                ("gelu", True, torch.bfloat16),
                ("silu", True, torch.float16),
                ("silu", True, torch.float32),
            )
            if name in BYTES or dtype is not torch.float32
            for num_rows in (1, FEW_ROWS, 9, 40, 90, 400)
        ),
        *(
            pytest.param(name, "clamped", True, torch.bfloat16, num_rows, marks=ON_GPU)
            for name in ("fp8-channel", "int8-channel", "gptq", "awq")
            for num_rows in (1, FEW_ROWS, 9, 400)
        ),
    ],
)
def test_products(name: str, activation: str, bias: bool, dtype: torch.dtype, num_rows: int) -> None:
    method, reference = make(name, make_spec(dtype, activation, bias))
    check(method, reference, num_rows)


@pytest.mark.parametrize(
    ("name", "block_k"),
    [("fp8-channel", 16), ("fp8-block", 16), ("fp8-block", 64), ("int8-channel", 32), ("gptq-8", 64)],
)
def test_few_tokens_whose_inputs_are_read_in_pieces(name: str, block_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "BYTE_UP_CUT", (2, block_k, 4))
    monkeypatch.setattr(moe, "BYTE_DOWN_CUT", (4, block_k, 4))
    monkeypatch.setattr(packed_experts, "_UP_CUT", (1, 1))
    monkeypatch.setattr(packed_experts, "_DOWN_CUT", (1, 1))
    method, reference = make(name, make_spec(torch.float16 if DEVICE.type == "cpu" else torch.bfloat16))
    check(method, reference, 2)


@pytest.mark.parametrize(
    "name", ["fp8-channel", "fp8-block", "int8-channel", "gptq", "gptq-8", "awq", "gptq-zeros", "gptq-8-and-4"]
)
def test_tiles_do_not_matter(name: str) -> None:
    """Half of the tokens go to one expert, none to another."""
    dtype = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16
    method, reference = make(name, make_spec(dtype, sizes=(128, 128) if name == "gptq-8-and-4" else None))
    x, _, ids = inputs(150, 1, method)
    ids[:75], ids[ids == 4] = 2, -1
    exact = reference.apply_pairs(x.float().cpu(), ids.cpu())[:, 0]
    for tiles in method.leading.every_tiles(method.spec.dtype):
        found = method._multiply(x, ids, tiles, torch.float32).cpu().masked_fill(ids.cpu() < 0, 0.0)
        error = TOLERANCE[method.spec.dtype] * float(exact.abs().max())
        torch.testing.assert_close(found, exact, atol=error, rtol=0)
    assert method.tokens[4] == 0 and method.tokens[2] >= 75 * 3


def test_tiles_are_chosen_by_what_experts_here_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 experts 5 are here: of 120 pairs 15 are theirs, if all get as many."""
    chosen = []
    for all_experts in (0, 40):
        method, _ = make("int8-channel", dataclasses.replace(make_spec(torch.float16), all_experts=all_experts))
        monkeypatch.setattr(method, "_multiply", lambda x, ids, tiles, dtype: chosen.append(tiles) or x)
        method._grouped(torch.zeros(40, 80), torch.zeros(40, 3, dtype=torch.int32), torch.float16)
    assert [tiles.block_m for tiles in chosen] == [32, 16]


def test_all_tokens_may_go_to_one_expert_or_to_none_here() -> None:
    method, reference = make("fp8-block", make_spec(torch.float32))
    x = torch.randn(40, 80, device=DEVICE)
    for ids in (torch.full((40, 1), 3), torch.full((40, 1), -1)):
        expected = reference.apply_pairs(x.cpu(), ids)
        found = method.apply_pairs(x, ids.to(DEVICE, torch.int32))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert method.tokens.tolist() == [0, 0, 0, 40, 0]
    few = method.apply(x[:2], torch.ones(2, 1, device=DEVICE), torch.full((2, 1), -1, device=DEVICE))
    assert not few.any()


@pytest.mark.parametrize("name", ["fp8-block", "awq"])
def test_a_scale_that_is_none_is_refused_by_its_name(name: str) -> None:
    method = (ByteExperts if name in BYTES else PackedExperts)(make_spec(torch.float32), scheme_of(name))
    for found in method.tensors():
        is_broken = "scale" in found.tensor.suffix and (found.part, found.expert) == ("down", 3)
        found.tensor.data.fill_(float("inf") if is_broken else 0 if found.tensor.suffix == "bias" else 1)
    with pytest.raises(ModelError, match=r"experts\.3\.down_proj: .*not finite"):
        method.process_after_load()


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_held_once(name: str) -> None:
    method, _ = make(name, make_spec(torch.float32, sizes=(128, 64)))
    held: dict[int, int] = {}
    for matrix in (method.gate_up, method.down):
        tensors = [value for value in vars(matrix).values() if isinstance(value, torch.Tensor)]
        held |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert method.weight_bytes() == sum(held.values())
    # Inputs are filled up to whole slabs of 128.
    numbers = NUM_EXPERTS * 128 * (2 * 64 + (64 if name in BYTES or "8" in name else 128))
    bits = 8 if name in BYTES or "8" in name else 4
    assert numbers * bits // 8 < method.weight_bytes() < numbers * bits // 8 * 1.3
    left = [value for key, value in vars(method).items() if isinstance(value, (list, tuple))]
    assert not left  # nothing of what was loaded


def test_a_scheme_takes_the_product_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(torch.float16)
    schemes = {name: scheme_of(name) for name in FORMS}
    assert DEVICE.type == "cuda" or all(scheme.experts(spec) is None for scheme in schemes.values())
    monkeypatch.setattr(choice, "has_kernels", lambda _: True)
    for name, scheme in schemes.items():
        assert isinstance(scheme.experts(spec), ByteExperts if name in BYTES else PackedExperts)
        assert scheme.experts(dataclasses.replace(spec, deterministic=True)) is None
        in_fp32 = scheme.experts(dataclasses.replace(spec, dtype=torch.float32))
        assert isinstance(in_fp32, ByteExperts) if name in BYTES else in_fp32 is None

    def made_of(config: dict[str, Any]) -> ExpertsMethod | None:
        return create_quantization(read_quantization(config)).experts(spec)

    # Blocks and groups that are too small for the matrix units, inputs in another order, experts not held alike.
    assert made_of(compressed("int-quantized", INT8 | {"group_size": 16})) is None
    assert made_of(GPTQ | {"group_size": 8}) is None
    assert made_of(GPTQ | {"desc_act": True}) is None
    assert made_of(GPTQ | {"dynamic": {r"+:.*experts\.3\.down.*": {"bits": 8}}}) is None
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert made_of(fp8 | {"modules_to_not_convert": ["experts.3"]}) is None
    monkeypatch.setattr("shoal.quantization.unquantized.has_kernels", lambda _: True)
    assert isinstance(made_of(fp8 | {"modules_to_not_convert": ["experts"]}), StackedExperts)


def in_order(part: str, expert: int) -> torch.Tensor:
    return torch.arange(96, 192) // 128 if part == "down" else torch.zeros(128, dtype=torch.int64)


def in_another_order(part: str, expert: int) -> torch.Tensor:
    """Of the second product, and of half of its experts."""
    return torch.arange(96) % 2 if part == "down" and expert % 2 else in_order(part, expert)


@pytest.mark.parametrize(
    ("g_idx", "kind"), [(None, PackedExperts), (in_order, PackedExperts), (in_another_order, LoopedExperts)]
)
def test_groups_that_ranks_cut(g_idx: Callable[[str, int], torch.Tensor] | None, kind: type[ExpertsMethod]) -> None:
    """Inputs 96 to 191 of 192 in groups of 128: 32 of one and 64 of another. desc_act is false, whatever g_idx says."""
    spec = dataclasses.replace(
        make_spec(torch.float16, sizes=(128, 96)), all_intermediate_size=192, intermediate_start=96, is_summand=True
    )
    method, reference = make("gptq", spec, g_idx)
    assert type(method) is kind and method.follows_device == (kind is PackedExperts)
    if kind is PackedExperts:
        assert method.down.group_size == 32 and method.leading is method.down
        assert all(tiles.weight_left for tiles in method.leading.every_tiles(torch.float16))
    for num_rows in (2, 8):
        check(method, reference, num_rows)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")
@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "int8-channel", "gptq", "gptq-8", "awq"])
def test_the_shape_of_qwen3_30b_a3b(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tiles, in CUDA graphs, with rows that lie apart."""
    monkeypatch.setitem(FORMS, "fp8-block", (FORMS["fp8-block"][0] | {"weight_block_size": [128, 128]}, None))  # type: ignore[operator]
    method, reference = make(name, make_spec(torch.bfloat16, sizes=(2048, 768)))
    assert len({method.leading.choose_tiles(3 * rows, torch.bfloat16) for rows in (16, 30, 100, 700)}) == 4
    for num_rows in (1, 3, 16, 30, 100, 700):
        check(method, reference, num_rows)
        x, weights, ids = inputs(num_rows, 3, method)
        method.apply(x, weights, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = method.apply(x, weights, ids)
        for old, new in zip((x, weights, ids), inputs(num_rows, 3, method, seed=7), strict=True):
            old.copy_(new)
        graph.replay()
        expected = reference.apply(x.float().cpu(), weights.cpu(), ids.cpu())
        assert ((output.float().cpu() - expected).norm() / expected.norm()).item() < 0.01
        apart = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)[:, :2048]
        found, same = method.apply(apart, weights, ids), method.apply(apart.contiguous(), weights, ids)
        assert torch.equal(found, same)
