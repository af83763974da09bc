"""Whether the Triton kernels can run here: asked once, when a layer or backend is made. Each has a plain way too."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import sysconfig
from pathlib import Path

import torch

from shoal import env
from shoal.log import get_logger

_logger = get_logger(__name__)

# bfloat16 matrix units and asynchronous copies: A100, L20, H100 and later.
_OLDEST = (8, 0)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether this device runs them: an NVIDIA GPU from sm_80 on, with Triton installed, and all that Triton needs."""
    return (
        device.type == "cuda" and has_triton() and torch.cuda.get_device_capability(device) >= _OLDEST and _launches()
    )


def has_large_tiles(device: torch.device) -> bool:
    """Whether a program may have 227 KiB of shared memory: sm_90 and sm_100. Others have 163 or, sm_120 too, 99."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def _launches() -> bool:
    """Whether a trivial kernel compiles and runs on the current device; if not, one warning says why."""
    try:
        importlib.import_module("shoal.kernels.probe").launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, a compiler that it starts, the loader or the driver
        missing = _missing()
        _logger.warning(
            "Triton compiles no kernels here, so PyTorch's own operations are used, which are slower: %s (%s: %s)",
            f"install {' and '.join(missing)}" if missing else "the error is",
            type(error).__name__,
            str(error).strip().split("\n")[0],
        )
        return False
    return True


def _missing() -> list[str]:
    """What Triton builds its launchers with and is not here."""
    missing = []
    if not any(shutil.which(name) for name in (env.c_compiler() or "gcc", "clang")):
        missing.append("a C compiler (gcc or clang)")
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        missing.append("Python.h (the package python3-dev)")
    return missing
