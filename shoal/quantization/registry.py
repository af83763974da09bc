"""Quantization schemes by method (`config.quantization.METHODS`), imported when asked for."""

from __future__ import annotations

import importlib

from shoal.config.quantization import QuantizationConfig
from shoal.errors import ModelError
from shoal.quantization.base import QuantizationScheme
from shoal.quantization.unquantized import Unquantized

# A scheme is made with the QuantizationConfig.
_SCHEMES: dict[str, tuple[str, str]] = {
    "gptq": ("shoal.quantization.gptq", "Gptq"),
    "awq": ("shoal.quantization.awq", "Awq"),
    "fp8": ("shoal.quantization.fp8", "Fp8"),
    "int8": ("shoal.quantization.int8", "Int8"),
    "mxfp4": ("shoal.quantization.mxfp4", "Mxfp4"),
    "compressed-tensors": ("shoal.quantization.compressed_tensors", "CompressedTensors"),
}


def create_quantization(config: QuantizationConfig | None) -> QuantizationScheme:
    """The scheme that a checkpoint was made with. Raises ModelError for one that is not supported."""
    if config is None:
        return Unquantized()
    if config.method not in _SCHEMES:
        raise ModelError(
            f"the checkpoint is quantized with {config.method!r}, which is not supported; use the unquantized model "
            "(float32, bfloat16 or float16 safetensors)"
        )
    module, class_name = _SCHEMES[config.method]
    scheme: QuantizationScheme = getattr(importlib.import_module(module), class_name)(config)
    return scheme
