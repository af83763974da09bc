"""GPTQ and AWQ checkpoints as others write them give the logits of their dequantized weights: on one rank, on two and
through two stages. What is broken or inconsistent is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import LLM, SamplingParams
from shoal.distributed.group import GroupCoordinator
from shoal.errors import ConfigError, ModelError
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.quantization.integer_writers import awq, by_values, by_width, gptq
from tests.quantization.writers import Writer, write_quantized
from tests.rank_threads import on_ranks

Form = tuple[dict[str, Any], Writer]


def _gptq(bits: int = 4, group: int = 32, **more: Any) -> Form:
    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group}
    config |= {"sym": more.get("symmetric", True), "desc_act": more.get("order") is not None}
    if more.get("version") == 2:
        config["checkpoint_format"] = "gptq_v2"
    return config, gptq(bits, group, **more)


def _awq(group: int = 32, **more: Any) -> Form:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return config | {"zero_point": not more.get("symmetric", False)}, awq(group, **more)


# The widths of the model are 128, 64 (keys and values) and 256.
FORMS: dict[str, Form] = {
    "gptq": _gptq(),
    "gptq-without-g_idx": _gptq(g_idx=False),
    "gptq-zero-points": _gptq(symmetric=False),
    "gptq-v2-zero-points": _gptq(symmetric=False, version=2),
    "gptq-v2": _gptq(version=2),
    "gptq-one-group": _gptq(group=-1),
    "gptq-groups-of-8": _gptq(group=8, symmetric=False),
    "gptq-2-bits": _gptq(2, 16, symmetric=False),
    "gptq-3-bits": _gptq(3, 32, symmetric=False),
    "gptq-8-bits": _gptq(8, 64),
    "gptq-8-bits-zero-points": _gptq(8, 32, symmetric=False),
    "gptq-act-order": _gptq(order=by_width),
    "gptq-act-order-by-matrix": _gptq(order=by_values, symmetric=False),
    "gptq-act-order-8-bits": _gptq(8, 16, order=by_values, symmetric=False),
    "gptq-zero-biases": _gptq(zero_bias=True),
    "awq": _awq(),
    "awq-symmetric": _awq(symmetric=True),
    "awq-one-group": _awq(-1),
}
BF16 = ("gptq", "gptq-zero-points", "gptq-one-group", "gptq-8-bits", "gptq-act-order-by-matrix", "awq")
# Two ranks cut rows of 64, 32 and 128, and inputs of 64 and 128.
MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "num_hidden_layers": 3}
CLOSE = {"atol": 2e-4, "rtol": 1e-5}


def write(directory: Path, form: Form, family: str = "llama", **changes: Any) -> Path:
    plain = make_checkpoint(directory / "plain", family, **{"tie_word_embeddings": False, **MODEL, **changes})
    return write_quantized(plain, directory, *form)


def run(model: PagedModel) -> torch.Tensor:
    """Logits of sequences that enter, prefill in pieces and decode beside each other: 1 to 43 rows."""
    sequences = [Sequence(random_tokens(80, seed)) for seed in range(3)]
    steps = [[(0, 40), (1, 3)], [(1, 1)], [(1, 1), (2, 11)], [(0, 1), (1, 2), (2, 1)]]
    return torch.cat([rows for step in steps for rows in model.step([(sequences[i], count) for i, count in step])])


def through_stages(path: Path, group: GroupCoordinator, tokens: list[int]) -> torch.Tensor:
    hidden = None
    for layers in (range(0, 2), range(2, 3)):
        stage = PagedModel(path, group=group, layer_range=layers)
        hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
    with torch.inference_mode():
        return stage.model.compute_full_logits(hidden)


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_dequantized_checkpoint(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMS[name])
    expected = run(PagedModel(tmp_path / "reference"))
    assert (expected - run(PagedModel(tmp_path / "plain"))).abs().max() > 0.01, "quantizing changes something"
    torch.testing.assert_close(run(PagedModel(path)), expected, **CLOSE)
    for rank in on_ranks(2, lambda group: run(PagedModel(path, group=group))):
        torch.testing.assert_close(rank, expected, **CLOSE)
    tokens = random_tokens(50, seed=1)
    expected = PagedModel(tmp_path / "reference").logits(tokens, 50)
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: through_stages(path, group, tokens)):
            torch.testing.assert_close(rank, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BF16)
def test_short_floats_are_near(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = write(tmp_path, FORMS[name])
    expected = run(PagedModel(tmp_path / "reference"))
    rounded = run(PagedModel(tmp_path / "reference", dtype=dtype)).float()
    found = run(PagedModel(path, dtype=dtype)).float()
    assert 0 < (found - expected).norm() < 1.3 * (rounded - expected).norm(), "no worse than weights in that dtype"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq", "gptq-8-bits-zero-points", "gptq-act-order-by-matrix", "awq"])
def test_deterministic_bits_depend_neither_on_mates_nor_on_ranks(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = write(tmp_path, FORMS[name])
    (expected,) = on_ranks(1, lambda group: run(PagedModel(path, "deterministic", dtype=dtype, group=group)))
    if dtype is torch.float32:
        torch.testing.assert_close(expected, run(PagedModel(tmp_path / "reference")), **CLOSE)
    for rank in on_ranks(2, lambda group: run(PagedModel(path, "deterministic", dtype=dtype, group=group))):
        assert torch.equal(rank, expected)
    alone = PagedModel(path, "deterministic", dtype=dtype).logits(random_tokens(80, 0)[:40], 7)
    assert torch.equal(alone, expected[:40])


@pytest.mark.parametrize(("family", "changes"), [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True})])
@pytest.mark.parametrize("name", ["gptq-act-order-by-matrix", "awq"])
def test_biases(tmp_path: Path, name: str, family: str, changes: dict[str, Any]) -> None:
    path = write(tmp_path, FORMS[name], family, **changes)
    expected = run(PagedModel(tmp_path / "reference"))
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: run(PagedModel(path, group=group))):
            torch.testing.assert_close(rank, expected, **CLOSE)


@pytest.mark.parametrize("name", ["gptq", "gptq-3-bits", "gptq-act-order", "gptq-one-group", "awq"])
def test_random_weights_keep_activations_their_size(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMS[name])
    logits = run(PagedModel(path, load_format="dummy"))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    for rank in on_ranks(2, lambda group: run(PagedModel(path, load_format="dummy", group=group))):
        torch.testing.assert_close(rank, logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "family", "more"),
    [
        ("gptq", "qwen2", {"tensor_parallel_size": 2}),
        ("gptq-act-order-by-matrix", "llama", {"pipeline_parallel_size": 2}),
        ("awq", "qwen2", {}),
        ("gptq-cut", "qwen2", {"tensor_parallel_size": 2}),
    ],
)
def test_served_tokens_are_those_of_the_dequantized_checkpoint(
    tmp_path: Path, name: str, family: str, more: dict[str, Any]
) -> None:
    path = write(tmp_path, _gptq(group=128) if name == "gptq-cut" else FORMS[name], family)
    config = json.loads((path / "config.json").read_text())
    # Older ones have it in a file of its own, by its maker's names.
    beside, content = "quantize_config.json", {**config.pop("quantization_config")}
    content.pop("quant_method")
    if name == "awq":
        beside = "quant_config.json"
        content = {"zero_point": True, "q_group_size": content["group_size"], "w_bit": 4, "version": "GEMM"}
    (path / beside).write_text(json.dumps(content))
    (path / "config.json").write_text(json.dumps(config))
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = ["Hello, my name is", "The capital"]
    tokens = []
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "deterministic": False}
    for model, extra in ((tmp_path / "reference", {}), (path, more)):
        with LLM(str(model), **options, **extra) as llm:
            tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert tokens[0] == tokens[1]


def _damage(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gptq", lambda t: t.update({f"{DOWN}.g_idx": t[f"{DOWN}.g_idx"] + 1}), rf"{DOWN}: g_idx has groups 1 to 8"),
        ("gptq", lambda t: t.update({f"{DOWN}.g_idx": t[f"{DOWN}.g_idx"] - 1}), rf"{DOWN}: g_idx has groups -1 to 6"),
        ("gptq", lambda t: t[f"{DOWN}.scales"][3, 5].fill_(torch.inf), rf"{DOWN}: scales are not finite"),
        ("awq", lambda t: t[f"{DOWN}.scales"][3, 5].fill_(torch.nan), rf"{DOWN}: scales are not finite"),
        ("gptq", lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:-1].clone()}), rf"{DOWN}.qweight has"),
        ("gptq", lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][:-1].clone()}), rf"{DOWN}.scales has shape"),
        ("gptq", lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].float()}), rf"{DOWN}.qweight is float32"),
        ("gptq", lambda t: t.pop(f"{DOWN}.qzeros"), rf"missing.*{DOWN}.qzeros"),
        ("gptq", lambda t: t.update({f"{DOWN}.bias": torch.ones(128)}), rf"{DOWN}: the checkpoint has a bias"),
        ("gptq-act-order", lambda t: [t.pop(name) for name in list(t) if "g_idx" in name], "desc_act.*no g_idx"),
        ("gptq", lambda t: t.pop("model.layers.0.mlp.up_proj.g_idx"), "g_idx is there for some"),
        ("awq", lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].t().contiguous()}), rf"{DOWN}.qweight has"),
    ],
)
def test_broken_tensors_are_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    path = write(tmp_path, FORMS[name])
    _damage(path, change)
    with pytest.raises(ModelError, match=said):
        PagedModel(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 8}, "qweight has shape"),
        ({"group_size": 64}, "has shape"),
        ({"bits": 5}, "bits 5 is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"modules_to_not_convert": ["up_proj"]}, "gate_proj"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "down_proj.qweight has shape"),
        ({"dynamic": {"+:.*down.*": {"bits": 5}}}, "bits 5 is not supported"),
        ({"dynamic": {"+:.*down.*": "plain"}}, r"dynamic gives '\+:\.\*down\.\*' 'plain'; an object is read"),
        ({"dynamic": {r".*k_proj": {"bits": 8}}}, "q_proj is gptq, 4-bit .*k_proj is gptq, 8-bit .*must be held alike"),
        ({"dynamic": {"-:*down": {}}}, r"dynamic has '\*down', which is no regular expression"),
        ({"dynamic": ["-:lm_head"]}, "dynamic must be an object"),
    ],
)
def test_broken_configs_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path, FORMS["gptq"])
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelError, ConfigError), match=said):
        PagedModel(path)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "form",
    [_gptq(group=128), _gptq(group=128, g_idx=False, symmetric=False), _gptq(8, 48, symmetric=False), _awq(128)],
    ids=["gptq", "gptq-without-g_idx", "gptq-groups-of-48", "awq"],
)
def test_groups_that_are_cut_by_ranks(tmp_path: Path, form: Form, deterministic: bool) -> None:
    """Inputs of 128 and 384 are 64 and 192 a rank: half a group, one and a half, and four."""
    path = write(tmp_path, form, intermediate_size=384)
    backend = "deterministic" if deterministic else "torch_paged"
    expected = run(PagedModel(tmp_path / "reference"))
    (alone,) = on_ranks(1, lambda group: run(PagedModel(path, backend, group=group)))
    for rank in on_ranks(2, lambda group: run(PagedModel(path, backend, group=group))):
        torch.testing.assert_close(rank, expected, **CLOSE)
        assert not deterministic or torch.equal(rank, alone)


def test_modules_that_are_left_plain(tmp_path: Path) -> None:
    config, writer = FORMS["gptq"]
    plain = make_checkpoint(tmp_path / "plain", "llama", tie_word_embeddings=False, **MODEL)
    path = write_quantized(plain, tmp_path, config | {"dynamic": {r"-:.*\.down_proj": {}}}, writer, keep="down_proj")
    # The writer has quantized the head, which the config does not say.
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    for directory in (path, tmp_path / "reference"):
        tensors = load_file(directory / "model.safetensors")
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
        save_file({**others, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(run(PagedModel(path)), run(PagedModel(tmp_path / "reference")), **CLOSE)
