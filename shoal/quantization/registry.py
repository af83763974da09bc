"""Quantization schemes by the name in config.json (`quantization_config.quant_method`), imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from shoal.errors import ModelError
from shoal.quantization.base import QuantizationScheme

_SCHEMES = {"none": ("shoal.quantization.unquantized", "Unquantized")}


def create_quantization(raw_config: dict[str, Any]) -> QuantizationScheme:
    """The scheme that a checkpoint was made with. Raises ModelError for one that is not supported."""
    found = raw_config.get("quantization_config")
    name = "none" if not found else str(found.get("quant_method", found) if isinstance(found, dict) else found)
    if name not in _SCHEMES:
        raise ModelError(
            f"the checkpoint is quantized with {name!r}, which is not supported; use the unquantized model "
            "(float32, bfloat16 or float16 safetensors)"
        )
    module, class_name = _SCHEMES[name]
    scheme: QuantizationScheme = getattr(importlib.import_module(module), class_name)()
    return scheme
