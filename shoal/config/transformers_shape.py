"""A program: reads a config.json (standard input) with Transformers and writes the model's shape, or why it cannot be
served, as JSON.

Started by transformers_family in a process of its own; workers read the config in the same way. The model is built
without memory (meta device), so that what is looked at is its own code and not a list of names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from typing import Any

from shoal.config.transformers_experts import expert_modules, experts_refusal, experts_shape

_NUMBER = re.compile(r"\.(\d+)\.")
_LAYER_TYPES = ("full_attention", "sliding_attention")


class _Refused(Exception):
    """Why this model cannot be served so."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()
    print(answer(arguments.directory, sys.stdin.read(), arguments.trust_remote_code))


def answer(directory: str, config: str, trust_remote_code: bool) -> str:
    """{"fields": of ModelConfig} or {"error": why not}, as JSON. config: what config.json says, as JSON."""
    try:
        return json.dumps({"fields": describe(directory, json.loads(config), trust_remote_code)})
    except _Refused as refusal:
        return json.dumps({"error": str(refusal)})


def read_config(directory: str, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """The configuration that `raw` says, of the class that belongs to the model in `directory`."""
    transformers = importlib.import_module("transformers")
    if raw.get("model_type") in transformers.CONFIG_MAPPING and not (trust_remote_code and raw.get("auto_map")):
        kind = transformers.CONFIG_MAPPING[raw["model_type"]]
    else:
        found = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        kind = type(found)
    config = kind.from_dict(dict(raw))
    config._name_or_path = directory  # where the model's own code is looked for
    return config


def describe(directory: str, raw: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    try:
        transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    except ImportError as error:
        raise _Refused(f"{_named(raw)} needs Transformers, which is not there: {error}") from None
    if raw.get("model_type") not in transformers.CONFIG_MAPPING and not (raw.get("auto_map") and trust_remote_code):
        if raw.get("auto_map"):
            raise _Refused(
                f"{_named(raw)} comes with Python code of its own (auto_map), which is not run unless "
                "--trust-remote-code says so"
            )
        raise _Refused(
            f"{_named(raw)}: Transformers {transformers.__version__} does not know model_type {raw.get('model_type')!r}"
        )
    try:
        config = read_config(directory, raw, trust_remote_code)
        _check_config(config, raw)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        _check_model(model, raw)
        return _fields(model, config)
    except _Refused:
        raise
    except Exception as error:  # whatever the config provokes there
        message = " ".join(str(error).split())[:300]
        raise _Refused(f"{_named(raw)}: Transformers {transformers.__version__} cannot build it: {message}") from None


def _named(raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or []
    shown = ", ".join([names] if isinstance(names, str) else map(str, names))
    return f"architecture {shown}" if shown else f"model_type {raw.get('model_type')!r}"


def _check_config(config: Any, raw: dict[str, Any]) -> None:
    name = _named(raw)
    if config.is_encoder_decoder:
        raise _Refused(f"{name} is an encoder-decoder; decoders are served")
    if config.get_text_config() is not config:
        raise _Refused(f"{name} takes more than text; through Transformers models of text alone are served")
    if getattr(config, "kv_lora_rank", None):
        raise _Refused(f"{name} caches a latent (kv_lora_rank), which only native families do")
    if getattr(config, "num_kv_shared_layers", None):
        raise _Refused(f"{name} has layers that read other layers' keys (num_kv_shared_layers)")
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(map(str, types - set(_LAYER_TYPES))):
        raise _Refused(f"{name} has layers of type {unknown[0]}; served are {' and '.join(_LAYER_TYPES)}")


def _check_model(model: Any, raw: dict[str, Any]) -> None:
    name, found = _named(raw), type(model).__name__
    names = raw.get("architectures") or [found]
    if found not in names:
        raise _Refused(f"{name} is no causal language model; of this model_type that is {found}")
    if getattr(model, "_is_stateful", False):
        raise _Refused(f"{name} keeps a recurrent state (a state-space or hybrid model), which is not cached in pages")
    replaceable = getattr(model, "_supports_attention_backend", False)
    if not replaceable and "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(model).__module__]):
        raise _Refused(
            f"{name} computes attention in its own code (no attention function, _supports_attention_backend is not "
            "set): paged attention cannot take its place"
        )
    experts = expert_modules(model)
    for module_name, module in experts.items():
        if (reason := experts_refusal(module)) is not None:
            raise _Refused(f"{name} has experts ({module_name}) that only a native family could serve: {reason}")
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 2 and parameter_name.rpartition(".")[0] not in experts:
            raise _Refused(
                f"{name} has weights of {parameter.dim()} dimensions ({parameter_name}); native families load such"
            )


def _fields(model: Any, config: Any) -> dict[str, Any]:
    hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    num_layers = _size(config, "num_hidden_layers")
    return {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _size(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden_size),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _num_kv_heads(config, num_heads),
        "head_dim": _size(config, "head_dim", default=hidden_size // num_heads),
        "max_position_embeddings": _max_positions(config),
        "norm_eps": float(_first(config, "rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon") or 0),
        "hidden_act": str(_first(config, "hidden_act", "activation_function", "hidden_activation") or ""),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "rope": None,
        "sliding_windows": _windows(config, num_layers),
        "experts": _experts(model, config),
    }


def _experts(model: Any, config: Any) -> dict[str, Any] | None:
    """Fields of ExpertsConfig. What tokens go through beside the experts is split by the model's own plan."""
    modules = expert_modules(model)
    if not modules:
        return None
    shapes = {experts_shape(module) for module in modules.values()}
    numbers = [match and int(match[1]) for match in map(_NUMBER.search, modules)]
    if len(shapes) > 1 or None in numbers or len(set(numbers)) < len(numbers):
        raise _Refused(f"experts that differ by layer, or several kinds of them in a layer: {', '.join(modules)}"[:300])
    num_experts, _, width = shapes.pop()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return {
        "num_experts": num_experts,
        "num_per_token": _size(config, *names, default=1),
        "intermediate_size": width,
        "layers": numbers,
    }


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _size(config: Any, *names: str, default: int | None = None) -> int:
    value = _first(config, *names)
    value = default if value is None else value
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        raise _Refused(f"{names[0]} differs from layer to layer; served are models whose layers are alike")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _Refused(f"{names[0]} must be a positive integer; Transformers finds {value!r}")
    return value


def _num_kv_heads(config: Any, num_heads: int) -> int:
    if getattr(config, "multi_query", False):
        return 1
    return _size(config, "num_key_value_heads", "num_kv_heads", default=num_heads)


def _max_positions(config: Any) -> int:
    """Rope that is stretched reaches as far as for native families (`RopeConfig.max_length`)."""
    longest = _size(config, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind in ("linear", "dynamic") and factor:
        return int(longest * factor)
    if kind == "yarn" and factor:
        return max(longest, int((rope.get("original_max_position_embeddings") or longest) * factor))
    return longest


def _windows(config: Any, num_layers: int) -> list[int | None]:
    """As far as the config tells. What attention does is seen when the model is first run."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types:
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window if getattr(config, "use_sliding_window", True) else None] * num_layers


if __name__ == "__main__":
    main()
