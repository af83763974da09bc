"""What config.json says of a quantized checkpoint, as Transformers and others read it. Without torch."""

from __future__ import annotations

import re
from typing import Any

from shoal.quantize.order import QuantizeOrder
from shoal.version import __version__


def quantization_config(order: QuantizeOrder, plain_modules: list[str]) -> dict[str, Any]:
    """plain_modules: full names of the linear modules that stay as they are."""
    if order.method == "gptq":
        return _gptq(order, plain_modules)
    if order.method == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": order.bits,
            "group_size": order.group_size,
            "zero_point": True,
            "modules_to_not_convert": plain_modules or None,
        }
    return _compressed(order, plain_modules)


def _gptq(order: QuantizeOrder, plain_modules: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": order.bits,
        "group_size": order.group_size,
        "desc_act": order.desc_act,
        "sym": order.symmetric,
        "damp_percent": order.damp,
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"shoal:{__version__}"]},
    }
    if inside := [name for name in plain_modules if re.search(r"\.\d+\.", name)]:
        # Only modules of the layers are quantized by this method: those outside need no word.
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
    return config


def _compressed(order: QuantizeOrder, plain_modules: list[str]) -> dict[str, Any]:
    kind = "float" if order.method == "fp8" else "int"
    weights = {
        "num_bits": 8,
        "type": kind,
        "strategy": order.granularity,
        "symmetric": True,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
        "ignore": plain_modules,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
