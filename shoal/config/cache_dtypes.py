"""What --kv-cache-dtype can be. Read by the options, by whoever makes caches, and by the planner."""

from __future__ import annotations

from shoal.errors import ConfigError

# Name -> PyTorch's name of the type; None: that of activations.
CACHE_DTYPES = {
    "auto": None,
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
# Caches of 8-bit floats go with any activations; the others are what the activations are.
ROUNDED = tuple(name for name, dtype in CACHE_DTYPES.items() if dtype is not None and dtype.startswith("float8"))


def check_cache_dtype(name: str, dtype: str) -> None:
    """dtype: that of activations. Raises ConfigError where a cache of the type `name` does not go with them."""
    if name not in ("auto", dtype, *ROUNDED):
        raise ConfigError(
            f"kv_cache_dtype {name} does not go with activations of {dtype}: a cache is of their type, or of 8-bit "
            f"floats; auto, {', '.join(ROUNDED)} work here ({name} needs --dtype {name})"
        )
