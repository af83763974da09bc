"""What the readers of a config.json share: sizes, numbers, windows, layer types, checked. Used by families' files."""

from __future__ import annotations

from typing import Any

from shoal.errors import ModelError

# From a config.json to the fields of ModelConfig that describe its shape.
Fields = dict[str, Any]


def size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer; an absent key and null are `default`. Raises ModelError."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive integer; found {raw.get(name)!r}")
    return value


def take_text_config(raw: dict[str, Any], **defaults: Any) -> None:
    """Of a model that takes more than text: what text_config says, where a model of text has it. defaults: of keys that
    are said nowhere. Raises ModelError."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"text_config must be an object; found {text!r}")
    # Of the whole model, wherever else it is said.
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
    raw.update({**defaults, **text, **tied})


def count(raw: dict[str, Any], name: str, default: int) -> int:
    """An integer from 0 on; an absent key and null are `default`. Raises ModelError."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"{name} must be an integer from 0 on; found {value!r}")
    return value


def number(raw: dict[str, Any], name: str, default: float) -> float:
    """A number above 0; an absent key and null are `default`. Raises ModelError."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{name} must be a number above 0; found {value!r}")
    return float(value)


def window(value: Any) -> int | None:
    """sliding_window: tokens, or None for full attention. Raises ModelError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"sliding_window must be a positive integer or null; found {value!r}")
    return value


def windows_by_type(
    raw: dict[str, Any], num_layers: int, width: int | None, layer_types: list[str]
) -> tuple[int | None, ...]:
    """Per layer: `width` where its type is sliding_attention, None where it is full_attention. Raises ModelError."""
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise ModelError(f"layer_types must be a list of names; found {layer_types!r}")
    if len(layer_types) != num_layers:
        raise ModelError(f"layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}")
    if unknown := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types)
