"""What the readers of a config.json share: sizes, windows and layer types, checked. Used by the families' files."""

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
    if len(layer_types) != num_layers:
        raise ModelError(f"layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}")
    if unknown := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types)
