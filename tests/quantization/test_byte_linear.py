"""Linear layers with weights of a byte: what they hold, what they refuse, quantizing while a plain weight is loaded."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from shoal import LLM, SamplingParams
from shoal.config.quantization import read_quantization
from shoal.errors import ConfigError, ModelError
from shoal.quantization.base import LinearMethod, LinearSpec
from shoal.quantization.byte_linear import ByteFormat, ByteLinear, QuantizedWhileLoading
from shoal.quantization.registry import create_quantization
from shoal.quantization.unquantized import UnquantizedLinear
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel
from tests.quantization import writers
from tests.quantization.test_byte_checkpoints import FORMATS, INT, INT4, write
from tests.quantization.writers import compressed
from tests.rank_threads import on_ranks

CPU = torch.device("cpu")
BYTES = [torch.float8_e4m3fn, torch.int8]


def make_spec(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, **changes: Any) -> LinearSpec:
    values: dict = dict(
        in_features=inputs, out_features=outputs, bias=False, dtype=dtype, device=CPU, names=("model.some",),
        part_sizes=(outputs,),
    )  # fmt: skip
    return LinearSpec(**{**values, **changes})


def loaded(form: ByteFormat, spec: LinearSpec) -> tuple[LinearMethod, torch.Tensor, torch.Tensor]:
    """(the layer, its dequantized weight, its bias), of random numbers and scales."""
    method = ByteLinear(spec, form)
    found = {tensor.suffix: tensor.data for tensor in method.tensors()}
    weight = torch.randn(spec.out_features, spec.in_features) * 30
    found["weight"].copy_(weight.clamp(-127, 127))
    scales = found["weight_scale"].copy_(torch.rand(found["weight_scale"].shape) / 1000 + 1e-4)
    bias = found["bias"].normal_() if "bias" in found else torch.zeros(spec.out_features)
    dequantized = found["weight"].float()
    if form.scales == "block":
        by_output = scales.repeat_interleave(form.block[0], 0)[: spec.out_features]
        dequantized = dequantized * by_output.repeat_interleave(form.block[1], 1)[:, : spec.in_features]
    elif form.scales == "channel":
        dequantized = dequantized * scales
    else:
        dequantized = dequantized * scales.repeat_interleave(torch.tensor(spec.part_sizes))[:, None]
    bias = bias.float()
    method.process_after_load()
    return method, dequantized, bias


@pytest.mark.parametrize("number", BYTES)
@pytest.mark.parametrize(("scales", "block"), [("tensor", (0, 0)), ("channel", (0, 0)), ("block", (32, 48))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 1024), (257, 31), (1, 1)])
def test_a_product_is_that_of_the_dequantized_weight(
    number: torch.dtype, scales: Any, block: tuple[int, int], dtype: torch.dtype, deterministic: bool, inputs: int,
    outputs: int,
) -> None:  # fmt: skip
    parts = (outputs // 2, outputs - outputs // 2) if outputs > 1 else (outputs,)
    spec = make_spec(inputs, outputs, dtype, deterministic=deterministic, bias=True, part_sizes=parts)
    method, weight, bias = loaded(ByteFormat(dtype=number, scales=scales, block=block), spec)
    for num_rows in (1, 3, 16, 33):
        x = torch.randn(num_rows, inputs).to(dtype)
        expected = F.linear(x.float(), weight, bias)
        found = method.apply(x)
        assert found.dtype is dtype and found.shape == (num_rows, outputs)
        tolerance = 1e-6 if dtype is torch.float32 else 8e-3
        size = float(F.linear(x.float().abs(), weight.abs(), bias.abs()).max())
        torch.testing.assert_close(found.float(), expected, atol=tolerance * size, rtol=0)


def test_every_fp8_number_is_converted_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[bits & 0x7F != 0x7F].view(torch.float8_e4m3fn)
    method = ByteLinear(make_spec(1, 254), ByteFormat(dtype=torch.float8_e4m3fn, scales="channel"))
    weight, scales = (tensor.data for tensor in method.tensors())
    weight.copy_(numbers[:, None])
    scales.fill_(1.0)
    method.process_after_load()
    assert torch.equal(method.apply(torch.ones(1, 1))[0], numbers.float())


@pytest.mark.parametrize("number", BYTES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_quantized_while_loading(number: torch.dtype, deterministic: bool) -> None:
    spec = make_spec(128, 48, deterministic=deterministic, num_input_shards=4 if deterministic else 1)
    method = QuantizedWhileLoading(spec, number)
    (tensor,) = method.tensors()
    plain = torch.randn(48, 128)
    plain[5] = 0
    tensor.data.copy_(plain)
    gone = weakref.ref(tensor.data)
    del tensor
    method.process_after_load()
    gc.collect()
    assert gone() is None, "the plain weight is freed"
    assert method.weight_bytes() < plain.nbytes / 3
    found = method.apply(torch.eye(128)).T
    steps = plain.abs().amax(1, keepdim=True) / (127 if number is torch.int8 else 448)
    # Half a step of INT8; a 16th of a number in FP8, and half a step of its smallest ones.
    allowed = steps / 2 if number is torch.int8 else plain.abs() / 16 + steps * 2.0**-10
    assert ((found - plain).abs() <= allowed * 1.001 + 1e-12).all()
    assert (found - plain).abs().max() > 0
    assert not found[5].any()


def test_a_weight_that_is_not_finite_is_not_quantized() -> None:
    for broken in (torch.inf, torch.nan):
        method = QuantizedWhileLoading(make_spec(8, 8), torch.int8)
        method.tensors()[0].data.fill_(1.0)[3, 3] = broken
        with pytest.raises(ModelError, match="model.some: the weight .* not finite"):
            method.process_after_load()


def test_weights_take_a_byte_each(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["fp8-tensor"])
    model = PagedModel(path).model
    methods = [layer.method for layer in model.weight_holders() if hasattr(layer, "method")]
    quantized = [method for method in methods if isinstance(method, ByteLinear)]
    (head,) = [method for method in methods if not isinstance(method, ByteLinear)]
    assert len(quantized) == 3 * 4 and isinstance(head, UnquantizedLinear)
    for method in quantized:
        spec = method.spec
        least = spec.out_features * spec.in_features
        assert least < method.weight_bytes() <= least + 8 * spec.out_features  # with scales and bias


# --- what is refused ---------------------------------------------------------------------------------------------


def edit(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    assert name in tensors
    del tensors[name]
    if value is not None:
        tensors[name] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("form", "suffix", "value", "words"),
    [
        ("fp8-tensor", "weight_scale", torch.tensor(torch.inf), "gate_proj.*weight_scale .* not finite"),
        ("fp8-tensor", "weight_scale", torch.tensor(-1.0), f"{GATE}.*weight_scale holds -1; scales are positive"),
        ("fp8-tensor", "weight_scale", torch.tensor(0.0), f"{GATE}.*weight_scale holds 0; scales are positive"),
        ("fp8-tensor", "weight_scale", torch.ones(256), "weight_scale has shape \\[256\\], the config asks for \\[\\]"),
        ("fbgemm", "weight_scale", torch.ones(2, 1), "weight_scale has shape \\[2, 1\\]"),
        ("fp8-block", "weight_scale_inv", torch.zeros(8, 8), f"{GATE}.*holds 0; scales are positive"),
        ("fp8-block", "weight_scale_inv", torch.ones(7, 8), "weight_scale_inv has shape \\[7, 8\\], .* \\[8, 8\\]"),
        ("fp8-tensor-static", "input_scale", torch.tensor([torch.nan]), f"{GATE}.*or holds NaN there"),
        ("fp8-tensor-static", "input_scale", None, f"{GATE}.*lacks input_scale or activation_scale"),
        ("fbgemm", "weight_scale", None, f"{GATE}.*lacks weight_scale or weight_scale_inv"),
        ("int-quantized", "weight_scale", None, f"tensors are missing .* {GATE}.weight_scale"),
        ("int-quantized", "weight", torch.ones(256, 128), "is float32, the config asks for int8"),
        ("fp8-tensor", "weight", torch.ones(256, 128), "is float32, the config asks for float8_e4m3fn"),
        ("packed-int4-group", "weight_shape", torch.tensor([256, 64]), f"{GATE}.*weight_shape says 256 × 64, .* 128"),
        ("packed-int4-group", "weight_scale", torch.full((256, 8), -0.5), f"{GATE}.*weight_scale holds -0.5"),
        ("packed-int4-ordered", "weight_g_idx", torch.full((128,), 8, dtype=torch.int32), "gate.*weight_scale has 8; "),
    ],
)  # fmt: skip
def test_broken_tensors(tmp_path: Path, form: str, suffix: str, value: torch.Tensor | None, words: str) -> None:
    path = write(tmp_path, FORMATS[form])
    edit(path, f"{GATE}.{suffix}", value)
    with pytest.raises(ModelError, match=words):
        PagedModel(path)


def test_a_scale_of_0_for_numbers_that_are_0_is_let_be(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["fbgemm"])
    tensors = load_file(path / "model.safetensors")
    tensors[f"{GATE}.weight"].view(torch.uint8)[7] = 0x80  # -0
    tensors[f"{GATE}.weight_scale"][7] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert PagedModel(path).logits([1, 2, 3], 3).isfinite().all()


def test_fp8_without_a_config(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["fp8-tensor"])
    (path / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    with pytest.raises(ModelError, match="float8_e4m3fn; the config describes plain|unexpected tensor .*weight_scale"):
        PagedModel(path)


def scheme_of(config: dict[str, Any]) -> Any:
    return create_quantization(read_quantization(config))


def test_what_is_not_supported_is_refused_by_name() -> None:
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}
    for config, words in (
        (compressed("int-quantized", INT | {"strategy": "channel"}, static), "input_activations with zero points"),
        (compressed("int-quantized", INT | {"strategy": "channel", "symmetric": False}), "weights with zero points"),
    ):
        with pytest.raises(ModelError, match=words):
            scheme_of(config)
    with pytest.raises(ModelError, match="pack-quantized with scales by tensor"):
        scheme_of(compressed("pack-quantized", INT4 | {"strategy": "tensor"})).linear(make_spec(32, 32))


def test_dynamic_rows_with_zero_points_stay_as_they_are() -> None:
    dynamic = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}
    assert scheme_of(compressed("int-quantized", INT | {"strategy": "channel"}, dynamic)).form.activations == "none"


def test_a_layer_of_which_a_part_is_kept(tmp_path: Path) -> None:
    config, writer = FORMATS["fp8-tensor"]
    path = write(tmp_path, (config | {"modules_to_not_convert": ["k_proj", "lm_head"]}, writer))
    with pytest.raises(ModelError, match=r"keeps .*k_proj as it is, but not .*q_proj.*must be held alike"):
        PagedModel(path)


def test_kept_layers_are_plain(tmp_path: Path) -> None:
    config, writer = FORMATS["fp8-tensor"]
    plain = make_checkpoint(tmp_path / "plain", "llama", tie_word_embeddings=True)
    kept = config | {"modules_to_not_convert": ["down_proj"]}
    path = writers.write_quantized(plain, tmp_path, kept, writer, keep="down_proj")
    expected = PagedModel(tmp_path / "reference").logits([1, 2, 3, 4], 4)
    torch.testing.assert_close(PagedModel(path).logits([1, 2, 3, 4], 4), expected, atol=2e-4, rtol=1e-5)


def test_a_block_on_two_ranks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["fp8-block"], intermediate_size=224)
    PagedModel(path)
    with pytest.raises(ConfigError, match="in units of 32 outputs; use fewer tensor parallel ranks"):
        on_ranks(2, lambda group: PagedModel(path, group=group))


# --- end to end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_llm_quantizes_a_plain_checkpoint(tmp_path: Path, quantization: str) -> None:
    plain = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=False)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    answers = {}
    for asked in (None, quantization):
        options: dict[str, Any] = dict(device="cpu", dtype="float32", max_model_len=64, kv_cache_memory="8MiB")
        with LLM(model=str(plain), quantization=asked, **options) as llm:
            answers[asked] = llm.generate(["What is the capital"], params)[0].outputs[0]
    assert len(answers[quantization].token_ids) == 12
    first = [next(iter(answer.logprobs[0].values())).logprob for answer in answers.values()]
    assert 0 < abs(first[0] - first[1]) < 0.5, "the same but for what quantizing costs"
