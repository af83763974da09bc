"""Configs of families without a native file, as Transformers reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers  # loaded here, so that it is asked in this process and not in one of its own

from shoal.config.model_config import ModelConfig, load_model_config
from shoal.config.resolve import make_engine_config
from shoal.errors import ModelError

STABLELM = {
    "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 3,
    "n_head": 4, "n_positions": 128,
}  # fmt: skip


def write(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return directory


def read(directory: Path, raw: dict[str, Any], **options: Any) -> ModelConfig:
    return load_model_config(write(directory, raw), **options)


def test_sizes(tmp_path: Path) -> None:
    assert transformers.__version__
    config = read(tmp_path, STABLELM)
    assert (config.architecture, config.model_type, config.model_impl) == (
        "StableLmForCausalLM",
        "stablelm",
        "transformers",
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.max_position_embeddings, config.dtype, config.eos_token_ids) == (256, "bfloat16", (2,))
    assert not config.tie_word_embeddings and config.sliding_windows == (None,) * 3


def test_other_names_for_sizes(tmp_path: Path) -> None:
    config = read(tmp_path, GPT2)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 4, 16)
    assert (config.intermediate_size, config.max_position_embeddings) == (256, 128)
    assert config.tie_word_embeddings


def test_one_kv_head(tmp_path: Path) -> None:
    raw = {**GPT2, "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"}
    assert read(tmp_path, raw).num_kv_heads == 1
    assert read(tmp_path, {**raw, "multi_query": False}).num_kv_heads == 4


def test_windows_and_stretched_positions(tmp_path: Path) -> None:
    raw = {**STABLELM, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 32}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(tmp_path, {**raw, "layer_types": types}).sliding_windows == (32, None, 32)
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    for kind in ("linear", "dynamic"):
        raw = {**STABLELM, "rope_parameters": {**stretched, "rope_type": kind}}
        assert read(tmp_path, raw).max_position_embeddings == 1024


def test_overrides_reach_transformers(tmp_path: Path) -> None:
    assert read(tmp_path, STABLELM, overrides={"num_hidden_layers": 2}).num_layers == 2


def test_which_way_is_taken(tmp_path: Path) -> None:
    llama = {**STABLELM, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert read(tmp_path, llama).model_impl == "shoal"
    assert read(tmp_path, llama, model_impl="vllm").model_impl == "shoal"
    assert read(tmp_path, llama, model_impl="transformers").model_impl == "transformers"
    for impl in ("shoal", "vllm"):
        with pytest.raises(ModelError, match="StableLmForCausalLM has no file of its own, and --model-impl"):
            read(tmp_path, STABLELM, model_impl=impl)
    assert make_engine_config(model=str(write(tmp_path, llama)), model_impl="transformers").model.model_impl == (
        "transformers"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unheard"}, "Transformers .* does not know model_type 'unheard'; families with a file"),
        ({"num_attention_heads": 7}, "cannot build it|num_attention_heads"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3|cannot build it"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        read(tmp_path, {**STABLELM, **changes})
    assert str(tmp_path / "config.json") in str(error.value)


def test_the_process_that_reads_it_stays_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from shoal.config.model_config import load_model_config\n"
        "config = load_model_config(sys.argv[1])\n"
        "print(config.num_layers, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(write(tmp_path, STABLELM))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["3", "False", "False"]


def test_native_families_never_load_transformers(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "import torch\n"
        "from shoal.attention.registry import create_attention_backend\n"
        "from shoal.config.model_config import load_model_config\n"
        "from shoal.layers.context import BuildContext\n"
        "from shoal.models.registry import build_model\n"
        "backend = create_attention_backend('torch_paged')\n"
        "context = BuildContext(dtype=torch.float32, device=torch.device('cpu'), attention_backend=backend)\n"
        "build_model(load_model_config(sys.argv[1]), context)\n"
        "print('transformers' in sys.modules)\n"
    )
    llama = {**STABLELM, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    command = [sys.executable, "-c", program, str(write(tmp_path, llama))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
