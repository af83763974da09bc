"""The device of a rank and how its process uses the host: which one, with what data types, how many threads. Called by
the worker, and `find_device` by whoever forms the groups before."""

from __future__ import annotations

import ctypes

import torch

from shoal import env
from shoal.errors import ConfigError

# Below, an operation is shorter than waking a second thread, and waits for whatever else uses that thread's core.
_ONE_THREAD_WEIGHTS = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 512 << 20


def find_device(name: str, index: int = 0) -> torch.device:
    """The torch device of this rank, `index` among those that this process sees.

    Raises ConfigError when CUDA is wanted and torch has none, or not so many.
    """
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        built = f"this torch ({torch.__version__}) is built for CUDA {torch.version.cuda}"
        reason = built if torch.version.cuda else f"this torch ({torch.__version__}) is a CPU build"
        raise ConfigError(
            f"CUDA is wanted and torch finds no usable GPU: {reason}; install a CUDA build, or pass --device cpu"
        )
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"GPU number {index} is wanted and this process sees {torch.cuda.device_count()}; "
            "run fewer ranks on this host, or show more in CUDA_VISIBLE_DEVICES"
        )
    return torch.device(name, index)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError for a data type that the device does not compute in."""
    if device.type == "cpu" and dtype is torch.float16:
        raise ConfigError("float16 is not served on CPU; pass --dtype bfloat16 or --dtype float32")
    if device.type == "cuda" and dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16; pass --dtype float16 or --dtype float32"
        )


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"


def share_cores(local_size: int) -> None:
    """Leave this process its part of the cores, one thread at least: threads of several ranks on one core wait for each
    other inside every operation. OMP_NUM_THREADS counts before it."""
    if local_size > 1 and env.omp_num_threads() is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))


def use_few_threads(weight_bytes: int) -> None:
    """One thread for a model whose operations are over before a second one wakes up."""
    if weight_bytes < _ONE_THREAD_WEIGHTS and env.omp_num_threads() is None:
        torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, up to half a gigabyte: otherwise every large temporary of every step is asked
    of the kernel anew, page by page. Without glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _KEPT_BYTES)
