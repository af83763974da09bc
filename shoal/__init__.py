"""Shoal: an LLM inference engine and the cluster around it, in one package.

`from shoal import LLM, SamplingParams` is the face for offline use. Names are loaded when first used, so that
`import shoal` costs nothing and the client needs no engine.
"""

from __future__ import annotations

import importlib
from typing import Any

from shoal.version import __version__ as __version__

# Type checkers read __init__.pyi; an import of shoal.llm here would be one upwards for every floor.
_HOMES = {
    "LLM": "shoal.llm",
    "LoRARequest": "shoal.types",
    "PoolingParams": "shoal.types",
    "RequestOutput": "shoal.types",
    "SamplingParams": "shoal.types",
}

__all__ = ["LLM", "LoRARequest", "PoolingParams", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
