"""What --kv-cache-dtype can be. Read by the options and by whoever makes caches."""

from __future__ import annotations

# Name -> PyTorch's name of the type; None: that of activations.
CACHE_DTYPES = {
    "auto": None,
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
