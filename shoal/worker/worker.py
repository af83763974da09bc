"""Worker: one rank. Finds its device, loads the model, sizes the KV cache, runs steps. Called by an executor."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from shoal import env
from shoal.attention.registry import make_backend
from shoal.config.engine_config import EngineConfig
from shoal.errors import ConfigError
from shoal.layers.context import BuildContext
from shoal.log import get_logger
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights
from shoal.worker.kv_cache import block_bytes, num_blocks_for
from shoal.worker.model_runner import ModelRunner

logger = get_logger(__name__)

# Below, an operation is shorter than waking a second thread, and waits for whatever else uses that thread's core.
_ONE_THREAD_WEIGHTS = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 512 << 20


class Worker:
    """Everything of one rank, from device to steps. All calls come from one thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._runner: ModelRunner | None = None

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "start comes first"
        return self._runner

    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        """Load and warm up. Returns facts for the start-up message, among them num_blocks."""
        config = self.config
        device = find_device(config.device)
        if device.type == "cpu":
            keep_freed_memory()
        dtype = getattr(torch, config.dtype)
        check_dtype(dtype, device)
        backend = make_backend(config.deterministic, device)
        context = BuildContext(
            dtype=dtype,
            device=device,
            deterministic=config.deterministic,
            attention_backend=backend,
            max_model_len=config.max_model_len,
        )
        started = time.monotonic()
        on_progress(StartupProgress("load weights"))
        model = build_model(config.model, context)
        load_weights(
            model,
            config.model,
            config.load_format,
            config.seed,
            lambda done, total: on_progress(StartupProgress("load weights", done, total)),
        )
        load_seconds = time.monotonic() - started
        weight_bytes = model.weight_bytes()
        if device.type == "cpu" and weight_bytes < _ONE_THREAD_WEIGHTS and env.omp_num_threads() is None:
            torch.set_num_threads(1)
        self._runner = ModelRunner(config, model, backend, device)
        on_progress(StartupProgress("size the KV cache"))
        num_blocks, cache_bytes = self._make_kv_caches(weight_bytes, device, dtype)
        on_progress(StartupProgress("warm up"))
        self._runner.warm_up(1)
        return {
            "num_blocks": num_blocks,
            "device": describe_device(device),
            "dtype": config.dtype,
            "deterministic": config.deterministic,
            "attention": backend.name,
            "weight_bytes": weight_bytes,
            "load_seconds": round(load_seconds, 2),
            "kv_cache_bytes": cache_bytes,
            "kv_cache_tokens": (num_blocks - 1) * config.block_size,
            "max_full_requests": (num_blocks - 1) * config.block_size // config.max_model_len,
        }

    def _make_kv_caches(self, weight_bytes: int, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        """Size and allocate. On CUDA a step of full size first shows how much memory activations take."""
        config, runner = self.config, self.runner
        model = config.model

        def shape(num_blocks: int) -> tuple[int, ...]:
            return runner.backend.kv_cache_shape(num_blocks, config.block_size, model.num_kv_heads, model.head_dim)

        def allocate(num_blocks: int) -> list[torch.Tensor]:
            return [torch.zeros(shape(num_blocks), dtype=dtype, device=device) for _ in range(model.num_layers)]

        if device.type == "cuda":
            runner.set_kv_caches(allocate(2))
            runner.warm_up(config.max_num_batched_tokens)
            torch.cuda.synchronize(device)
        bytes_per_block = block_bytes(shape(1), dtype, model.num_layers)
        num_blocks = num_blocks_for(config, bytes_per_block, weight_bytes, device)
        runner.set_kv_caches(allocate(num_blocks))
        return num_blocks, num_blocks * bytes_per_block

    def execute(self, batch: ScheduledBatch) -> None:
        self.runner.execute(batch)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Callable[[], BatchResult]:
        return self.runner.sample(step_id, grammar_masks)

    def shutdown(self) -> None:
        self._runner = None


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, up to half a gigabyte: otherwise every large temporary of every step is asked
    of the kernel anew, page by page. Without glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _KEPT_BYTES)


def find_device(name: str) -> torch.device:
    """The torch device of this rank. Raises ConfigError when CUDA is wanted and torch has none."""
    if name == "cuda" and not torch.cuda.is_available():
        built = f"this torch ({torch.__version__}) is built for CUDA {torch.version.cuda}"
        reason = built if torch.version.cuda else f"this torch ({torch.__version__}) is a CPU build"
        raise ConfigError(
            f"CUDA is wanted and torch finds no usable GPU: {reason}; install a CUDA build, or pass --device cpu"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


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
