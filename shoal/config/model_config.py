"""ModelConfig: a model's config.json, read without torch or transformers and normalised to one set of names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from shoal.config.rope import RopeConfig, parse_rope
from shoal.errors import InvalidRequestError, ModelError
from shoal.types.sampling_params import SamplingParams

__all__ = ["SUPPORTED_ARCHITECTURES", "ModelConfig", "RopeConfig", "load_model_config"]

# Architecture (as in config.json) -> model_type.
SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "OPTForCausalLM": "opt",
}
_DTYPES = ("float32", "bfloat16", "float16")
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the models, the loader and the KV cache sizing need to know. Sizes in elements."""

    path: str
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # The longest sequence, rope scaling counted in.
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    rope: RopeConfig | None
    # Per layer: None is full attention, else the window in tokens.
    sliding_windows: tuple[int | None, ...]
    # dtype of the checkpoint: "float32", "bfloat16", "float16".
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    # Sampling defaults of generation_config.json (temperature, top_p, top_k, repetition_penalty, min_p).
    generation_defaults: dict[str, Any]
    # The whole config.json: for what only one family has.
    raw: dict[str, Any]


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `path`/config.json and, where present, generation_config.json.

    Raises ModelError: directory or file missing, not JSON, unknown architecture, impossible shapes, unsupported rope.
    """
    directory = Path(path)
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "not there"
        raise ModelError(f"model directory {str(directory)!r} is {kind}; give a directory with a config.json")
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise ModelError(f"{str(directory)!r} has no config.json; it must be a Hugging Face model directory")
    generation = _read_json(directory / "generation_config.json") or {}
    defaults = _generation_defaults(generation, directory)
    architecture = _architecture(raw, directory)
    try:
        shape = _opt_fields(raw) if architecture == "OPTForCausalLM" else _llama_like_fields(architecture, raw)
        config = ModelConfig(
            path=str(directory),
            architecture=architecture,
            model_type=SUPPORTED_ARCHITECTURES[architecture],
            dtype=_dtype(raw),
            bos_token_id=_first_id(raw.get("bos_token_id", generation.get("bos_token_id"))),
            eos_token_ids=_eos_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
            generation_defaults=defaults,
            raw=raw,
            **shape,
        )
        _check_shapes(config)
    except ModelError as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None
    return config


def _generation_defaults(generation: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The sampling defaults, known to be valid: a bad one is the operator's to mend, not a client's."""
    defaults = {name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        path = directory / "generation_config.json"
        raise ModelError(f"{path}: {error}; mend or remove the file") from None
    return defaults


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file. ModelError if it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; found {type(content).__name__}")
    return content


def _architecture(raw: dict[str, Any], directory: Path) -> str:
    found = raw.get("architectures") or []
    names = [found] if isinstance(found, str) else list(found)
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    if not names:
        for architecture, model_type in SUPPORTED_ARCHITECTURES.items():
            if model_type == raw.get("model_type"):
                return architecture
    shown = ", ".join(map(str, names)) or f"none (model_type {raw.get('model_type')!r})"
    raise ModelError(
        f"{directory / 'config.json'}: architecture {shown} is not supported; "
        f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _llama_like_fields(architecture: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3. Keys that are absent take the defaults of Hugging Face's configuration classes."""
    hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    num_layers = _size(raw, "num_hidden_layers")
    positions_default = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072}.get(architecture, 32768)
    max_positions = _size(raw, "max_position_embeddings", positions_default)
    rope = parse_rope(raw, max_positions)
    fixed_head_dim = architecture == "Qwen3ForCausalLM" and "head_dim" not in raw
    if raw.get("head_dim") is None and not fixed_head_dim and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
        )
    # Mistral's absent key means 8, its explicit null as many as query heads.
    absent_means_8 = architecture == "MistralForCausalLM" and "num_key_value_heads" not in raw
    attention_bias = architecture == "Qwen2ForCausalLM" or bool(raw.get("attention_bias", False))
    return {
        "vocab_size": _size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _size(raw, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _size(raw, "num_key_value_heads", 8 if absent_means_8 else num_heads),
        "head_dim": _size(raw, "head_dim", 128 if fixed_head_dim else hidden_size // num_heads),
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": attention_bias and architecture != "MistralForCausalLM",
        "rope": rope,
        "sliding_windows": _sliding_windows(architecture, raw, num_layers),
    }


def _opt_fields(raw: dict[str, Any]) -> dict[str, Any]:
    hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    num_layers = _size(raw, "num_hidden_layers")
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return {
        "vocab_size": _size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _size(raw, "ffn_dim"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": _size(raw, "max_position_embeddings", 2048),
        "norm_eps": 1e-5,
        "hidden_act": str(raw.get("activation_function", "relu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "attention_bias": bool(raw.get("enable_bias", True)),
        "rope": None,
        "sliding_windows": (None,) * num_layers,
    }


def _sliding_windows(architecture: str, raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if architecture == "MistralForCausalLM":
        window = raw.get("sliding_window", 4096)
        return (_window(window),) * num_layers
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return (None,) * num_layers
    window = _window(raw.get("sliding_window", 4096)) if raw.get("use_sliding_window", False) else None
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = int(raw.get("max_window_layers", 28))
        return tuple(window if index >= first else None for index in range(num_layers))
    if len(layer_types) != num_layers:
        raise ModelError(f"layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}")
    if unknown := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _window(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"sliding_window must be a positive integer or null; found {value!r}")
    return value


def _size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive integer; found {raw.get(name)!r}")
    return value


def _dtype(raw: dict[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return name


def _first_id(value: Any) -> int | None:
    ids = _eos_ids(value)
    return ids[0] if ids else None


def _eos_ids(*values: Any) -> tuple[int, ...]:
    """Ids from several places (an integer, a list or None each), in order, each once."""
    ids: dict[int, None] = {}
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if not isinstance(item, int) or isinstance(item, bool):
                raise ModelError(f"token ids must be integers; found {item!r}")
            ids[item] = None
    return tuple(ids)


def _check_shapes(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.rope is not None and config.head_dim % 2:
        raise ModelError(f"head_dim {config.head_dim} is odd; rotary embeddings need an even one")
