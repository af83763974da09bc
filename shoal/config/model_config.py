"""ModelConfig: a model's config.json, read without torch or transformers and normalised to one set of names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.config.experts import ExpertsConfig
from shoal.config.families import FAMILIES, SUPPORTED_ARCHITECTURES
from shoal.config.pooling import PoolingConfig, decoder_names, read_pooling
from shoal.config.quantization import QuantizationConfig, read_quantization
from shoal.config.rope import RopeConfig
from shoal.config.transformers_family import transformers_fields, wants_transformers
from shoal.errors import InvalidRequestError, ModelError
from shoal.types.sampling_params import SamplingParams

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "ExpertsConfig",
    "ModelConfig",
    "QuantizationConfig",
    "RopeConfig",
    "load_model_config",
]

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
    # Numbers of a row of the cache that all heads share (multi-head latent attention); None: keys and values by head.
    latent_cache_dim: int | None = None
    # max_model_len where none is asked for; None: max_position_embeddings.
    default_max_len: int | None = None
    # None: a dense model.
    experts: ExpertsConfig | None = None
    # None: matrices in `dtype`.
    quantization: QuantizationConfig | None = None
    # None: it generates; else it makes vectors or scores of texts.
    pooling: PoolingConfig | None = None
    # "shoal": a file in models/; "transformers": the model's own code there, with our layers in it.
    model_impl: str = "shoal"
    # Whether that code may come from the model's directory.
    trust_remote_code: bool = False


def load_model_config(
    path: str | Path,
    quantization: str | None = None,
    *,
    model_impl: str = "auto",
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    runner: str = "auto",
) -> ModelConfig:
    """Read `path`/config.json and, where present, generation_config.json and quantize_config.json.

    quantization, model_impl, trust_remote_code, runner: what the options of these names say. overrides: keys in place
    of config.json's.
    Raises ModelError: directory or file missing, not JSON, unknown architecture, impossible shapes, unsupported rope or
    quantization. ConfigError: `quantization` contradicts the checkpoint.
    """
    directory = Path(path)
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "not there"
        raise ModelError(f"model directory {str(directory)!r} is {kind}; give a directory with a config.json")
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise ModelError(f"{str(directory)!r} has no config.json; it must be a Hugging Face model directory")
    raw |= overrides or {}
    generation = _read_json(directory / "generation_config.json") or {}
    defaults = _generation_defaults(generation, directory)
    try:
        config = ModelConfig(
            path=str(directory),
            dtype=_dtype(raw),
            bos_token_id=_first_id(raw.get("bos_token_id", generation.get("bos_token_id"))),
            eos_token_ids=_eos_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
            generation_defaults=defaults,
            raw=raw,
            quantization=read_quantization(_quantization(raw, directory), quantization),
            **_fields(raw, directory, model_impl, trust_remote_code),
        )
        _check_shapes(config)
    except ModelError as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None
    pooling = read_pooling(str(directory), raw, config.hidden_size, runner)
    if pooling is not None and pooling.max_length is not None:
        longest = min(pooling.max_length, config.max_position_embeddings)
        config = dataclasses.replace(config, default_max_len=longest)
    return dataclasses.replace(config, pooling=pooling)


def _quantization(raw: dict[str, Any], directory: Path) -> dict[str, Any] | None:
    """The object that describes the quantization: in the config, or in the file that AutoGPTQ or AutoAWQ wrote beside
    it."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if found is not None:
        return found  # type: ignore[no-any-return]
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (beside := _read_json(directory / name)) is not None:
            return {"quant_method": method, **beside}
    return None


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


def _native_architecture(raw: dict[str, Any]) -> str | None:
    """The architecture, if it has a native file."""
    names = decoder_names(_names(raw), SUPPORTED_ARCHITECTURES)
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return name
    if not names:
        for architecture, model_type in SUPPORTED_ARCHITECTURES.items():
            if model_type == raw.get("model_type"):
                return architecture
    return None


def _names(raw: dict[str, Any]) -> list[str]:
    found = raw.get("architectures") or []
    if not isinstance(found, (str, list)):
        raise ModelError(f"architectures must be a list of names; found {found!r}")
    return [found] if isinstance(found, str) else list(map(str, found))


def _fields(raw: dict[str, Any], directory: Path, model_impl: str, trust_remote_code: bool) -> dict[str, Any]:
    """What describes the shape, as the family's reader or Transformers finds it. Raises ModelError."""
    native = _native_architecture(raw)
    if wants_transformers(model_impl, native is not None):
        try:
            return transformers_fields(directory, raw, trust_remote_code)
        except ModelError as error:
            others = "" if native else f"; families with a file of their own: {', '.join(SUPPORTED_ARCHITECTURES)}"
            raise ModelError(f"{error}{others}") from None
    if native is None:
        shown = ", ".join(_names(raw)) or f"none (model_type {raw.get('model_type')!r})"
        raise ModelError(
            f"architecture {shown} has no file of its own, and --model-impl {model_impl} allows no other way; "
            f"those that have: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    family = FAMILIES[native]
    return {"architecture": native, "model_type": family.model_type, **family.read(native, raw)}


def _dtype(raw: dict[str, Any]) -> str:
    text = raw.get("text_config")
    both = (raw, text) if isinstance(text, dict) else (raw,)
    found = (each.get(key) for each in both for key in ("dtype", "torch_dtype"))
    name = str(next((value for value in found if value), "float32")).removeprefix("torch.")
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
