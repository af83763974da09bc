"""How many KV cache blocks there are room for, and their tensors. Called by the worker once, after loading."""

from __future__ import annotations

import math

import torch

from shoal.config.engine_config import EngineConfig
from shoal.errors import ConfigError

_GIB = 1 << 30
_MIB = 1 << 20
# Default on CPU, where memory is shared with everything else: twice the weights, within these bounds.
_CPU_DEFAULT_LEAST = 512 * _MIB
_CPU_DEFAULT_MOST = 4 * _GIB


def block_bytes(cache_shape: tuple[int, ...], dtype: torch.dtype, num_layers: int) -> int:
    """Bytes of one block over all layers; cache_shape is one layer's shape for a single block."""
    return math.prod(cache_shape) * dtype.itemsize * num_layers


def num_blocks_for(
    config: EngineConfig,
    bytes_per_block: int,
    weight_bytes: int,
    device: torch.device,
    host_bytes: int,
    graph_bytes: int = 0,
) -> int:
    """Blocks that the budget holds, the null block counted. Raises ConfigError when that is too few.

    host_bytes: this rank's part of the host's memory, weights included: what was free before any rank loaded.
    On CUDA the peak of a full-size step has been measured just before: torch knows it. graph_bytes: what the capture of
    graphs will take beside.
    """
    if config.num_blocks_override is not None:
        return config.num_blocks_override
    most_useful = config.max_num_seqs * -(-config.max_model_len // config.block_size) + 1
    budget, source = memory_budget(config, weight_bytes, device, host_bytes)
    if config.kv_cache_memory is None:
        budget = max(0, budget - graph_bytes)
    num_blocks = min(budget // bytes_per_block, most_useful)
    needed = -(-config.max_model_len // config.block_size) + 1
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache gets {budget / _MIB:.0f} MiB ({source}), "
            f"one request of max_model_len {config.max_model_len} needs {needed * bytes_per_block / _MIB:.1f} MiB; "
            f"give it more{_shorter_hint((num_blocks - 1) * config.block_size)}"
        )
    return num_blocks


def _shorter_hint(num_tokens: int) -> str:
    return f", or set --max-model-len to {num_tokens} or less" if num_tokens > 1 else ""


def memory_budget(config: EngineConfig, weight_bytes: int, device: torch.device, host_bytes: int) -> tuple[int, str]:
    """Bytes for the KV cache and where the number comes from."""
    if device.type == "cuda":
        if config.kv_cache_memory is not None:
            return config.kv_cache_memory, "--kv-cache-memory"
        return _cuda_budget(config, device)
    available = max(0, host_bytes - weight_bytes)
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory > available:
            raise ConfigError(
                f"--kv-cache-memory asks for {config.kv_cache_memory / _MIB:.0f} MiB, "
                f"{available / _MIB:.0f} MiB are free for each rank"
            )
        return config.kv_cache_memory, "--kv-cache-memory"
    budget = min(max(2 * weight_bytes, _CPU_DEFAULT_LEAST), _CPU_DEFAULT_MOST, available // 2)
    return budget, "default: twice the weights, 512 MiB to 4 GiB, at most half of what is free"


def _cuda_budget(config: EngineConfig, device: torch.device) -> tuple[int, str]:
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    others = total - free - reserved  # other processes, and what CUDA itself takes
    budget = int(total * config.gpu_memory_utilization) - others - peak
    return max(0, budget), (
        f"--gpu-memory-utilization {config.gpu_memory_utilization:g} of {total / _GIB:.1f} GiB, "
        f"less {peak / _GIB:.1f} GiB for weights and activations and {others / _GIB:.1f} GiB held by others"
    )
