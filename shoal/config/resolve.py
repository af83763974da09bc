"""From options to an EngineConfig: the model's files are read, defaults settled, contradictions refused. No torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from shoal import env
from shoal.config.cache_dtypes import check_cache_dtype
from shoal.config.engine_config import EngineConfig
from shoal.config.lora import LoraConfig, parse_modules, read_adapter
from shoal.config.model_config import ModelConfig, load_model_config
from shoal.config.model_path import resolve_model_path
from shoal.config.options import EMBEDDED_MODEL, CacheOptions, ModelOptions, ParallelOptions, SchedulerOptions
from shoal.config.parallel import ParallelConfig, balance_layers, check_degrees
from shoal.config.pooling import parse_overrides
from shoal.config.sizes import parse_size
from shoal.config.sources import options_from_kwargs
from shoal.errors import ConfigError, InvalidRequestError
from shoal.log import get_logger

_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
_STARTUP_TIMEOUT = 600.0
_STEP_TIMEOUT = 300.0

_logger = get_logger(__name__)


def make_engine_config(**kwargs: Any) -> EngineConfig:
    """The EngineConfig of keyword arguments named as the flags (`model=`, `max_model_len=` …), as LLM takes them."""
    return resolve(*options_from_kwargs(kwargs))


def resolve(
    model: ModelOptions,
    cache: CacheOptions,
    scheduler: SchedulerOptions,
    parallel: ParallelOptions,
    *,
    is_node: bool = False,
) -> EngineConfig:
    """Settle every option. is_node: this machine is a node of a Ray cluster, for ranks that do not fit it.

    Raises ModelError for a model that is missing or broken, ConfigError for options that do not go together or
    that the model or the device cannot do.
    """
    model_config = load_model_config(
        resolve_model_path(model.model),
        model.quantization,
        model_impl=model.model_impl,
        trust_remote_code=model.trust_remote_code,
        overrides=parse_overrides(model.hf_overrides),
        runner=model.runner,
    )
    device = resolve_device(model.device)
    deterministic = model.deterministic
    if deterministic is None:
        deterministic = device == "cpu" and model.model == EMBEDDED_MODEL
    max_model_len = resolve_max_model_len(model.max_model_len, model_config)
    is_encoder = model_config.pooling is not None and model_config.pooling.sees_both_ways
    if is_encoder:
        scheduler = _for_encoder(scheduler, cache, deterministic)
    max_num_seqs, max_num_batched_tokens = resolve_limits(scheduler, device, max_model_len)
    num_blocks = cache.num_gpu_blocks_override
    if is_encoder and num_blocks is None:  # it keeps nothing in them
        num_blocks = max_num_seqs * -(-max_model_len // cache.block_size) + 1
    if cache.block_size & (cache.block_size - 1):
        raise ConfigError(f"block_size must be 8, 16, 32, 64, 128 or 256; got {cache.block_size}")
    dtype = _resolve_dtype(model, model_config, device, deterministic)
    check_cache_dtype(cache.kv_cache_dtype, dtype)
    return EngineConfig(
        model=model_config,
        device=device,
        dtype=dtype,
        load_format=model.load_format,
        seed=model.seed,
        deterministic=deterministic,
        enforce_eager=model.enforce_eager,
        max_model_len=max_model_len,
        block_size=cache.block_size,
        gpu_memory_utilization=cache.gpu_memory_utilization,
        kv_cache_memory=None if cache.kv_cache_memory is None else parse_size(cache.kv_cache_memory, "kv_cache_memory"),
        num_blocks_override=num_blocks,
        kv_cache_dtype=cache.kv_cache_dtype,
        enable_prefix_caching=cache.enable_prefix_caching
        and not (model_config.pooling and model_config.pooling.needs_all_tokens),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
        scheduling_policy=scheduler.scheduling_policy,
        async_scheduling=scheduler.async_scheduling,
        lora=_resolve_lora(model, model_config, deterministic),
        parallel=_resolve_parallel(parallel, model_config, device, deterministic, is_node),
    )


def _for_encoder(scheduler: SchedulerOptions, cache: CacheOptions, deterministic: bool) -> SchedulerOptions:
    """Encoders read a text whole, in one step, and keep no KV cache. Raises ConfigError."""
    if deterministic:
        raise ConfigError("deterministic mode is for decoders, and this model is an encoder; leave it off")
    if cache.kv_cache_memory is not None:
        _logger.warning("kv_cache_memory changes nothing: this model is an encoder, and keeps no KV cache")
    return dataclasses.replace(scheduler, enable_chunked_prefill=False)


def _resolve_lora(options: ModelOptions, model: ModelConfig, deterministic: bool) -> LoraConfig | None:
    if not options.enable_lora:
        if options.lora_modules:
            raise ConfigError("lora_modules needs enable_lora")
        return None
    if deterministic:
        raise ConfigError(
            "enable_lora does not go with deterministic mode: adapters are multiplied with all tokens of a step; "
            "pass --no-deterministic"
        )
    if model.pooling is not None:
        raise ConfigError("enable_lora does not go with models for embeddings and scores")
    modules = parse_modules(options.lora_modules)
    if len(modules) > options.max_loras:
        raise ConfigError(f"{len(modules)} lora_modules are more than max_loras {options.max_loras}")
    for name, path in modules.items():
        try:
            read_adapter(path, options.max_lora_rank)
        except InvalidRequestError as error:
            raise ConfigError(f"lora_modules {name}: {error}") from None
    return LoraConfig(max_loras=options.max_loras, max_rank=options.max_lora_rank)


def _resolve_parallel(
    options: ParallelOptions, model: ModelConfig, device: str, deterministic: bool, is_node: bool
) -> ParallelConfig:
    """Degrees that the model can be cut into, and where the ranks run."""
    num_ranks = options.tensor_parallel_size * options.pipeline_parallel_size
    config = ParallelConfig(
        tensor_size=options.tensor_parallel_size,
        pipeline_size=options.pipeline_parallel_size,
        data_size=options.data_parallel_size,
        expert_parallel=_resolve_expert_parallel(options, model),
        layer_partition=_parse_partition(options.pipeline_layer_partition),
        backend=_resolve_backend(options, device, is_node),
        num_nodes=options.nnodes,
        node_rank=options.node_rank,
        master_address=options.master_addr,
        master_port=options.master_port,
        token_file=options.token_file,
        startup_timeout=options.startup_timeout or env.startup_timeout() or _STARTUP_TIMEOUT,
        step_timeout=options.step_timeout or env.step_timeout() or _STEP_TIMEOUT,
        stall_timeout=options.stall_timeout,
    )
    check_degrees(model, config, deterministic=deterministic)
    if deterministic and device == "cuda" and model.experts and config.tensor_size > 1 and not config.expert_parallel:
        raise ConfigError(
            f"deterministic mode does not split experts on a GPU over {config.tensor_size} ranks; with "
            "enable_expert_parallel ranks share them whole, and tensor_parallel_size 1 works"
        )
    if config.backend == "uni" and num_ranks > 1:
        raise ConfigError(
            f"distributed_executor_backend uni runs one rank, and {num_ranks} are wanted; mp and ray run several"
        )
    if options.nodes:
        raise ConfigError("nodes is for `shoal serve`; elsewhere give nnodes, node_rank and master_addr")
    if options.nnodes > 1:
        _check_nodes(options, config.backend, num_ranks * options.data_parallel_size)
    elif options.node_rank:
        raise ConfigError(f"node_rank {options.node_rank} needs nnodes: of how many machines is this one?")
    if config.layer_partition is None:
        config = dataclasses.replace(config, layer_partition=balance_layers(model, config.pipeline_size))
    return config


def _resolve_expert_parallel(options: ParallelOptions, model: ModelConfig) -> bool:
    """Whether ranks share experts whole. A wish that changes nothing is said, one that cannot be is refused."""
    if not options.enable_expert_parallel:
        return False
    if model.experts is None:
        _logger.warning("enable_expert_parallel: %s has no experts, so it changes nothing", model.architecture)
        return False
    if options.data_parallel_size > 1:
        raise ConfigError(
            f"enable_expert_parallel does not spread experts over data_parallel_size {options.data_parallel_size} "
            "replicas, which are engines of their own: tensor ranks share them. Use tensor_parallel_size in place of "
            "data_parallel_size, or several servers behind `shoal router`"
        )
    if options.tensor_parallel_size == 1:
        _logger.warning("enable_expert_parallel: with tensor_parallel_size 1 there are no ranks to share experts")
        return False
    return True


def _check_nodes(options: ParallelOptions, backend: str, num_ranks: int) -> None:
    if backend != "mp":
        raise ConfigError(f"nnodes is the way without Ray; distributed_executor_backend {backend} does not go with it")
    if options.master_addr is None:
        raise ConfigError("nnodes needs master_addr: the address of the machine with node_rank 0")
    if options.node_rank >= options.nnodes:
        raise ConfigError(
            f"node_rank {options.node_rank} is not one of {options.nnodes} nodes: 0 to {options.nnodes - 1}"
        )
    if num_ranks % options.nnodes:
        raise ConfigError(
            f"{num_ranks} ranks cannot be spread evenly over {options.nnodes} nodes; make "
            "tensor_parallel_size × pipeline_parallel_size × data_parallel_size a multiple of nnodes"
        )


def _parse_partition(given: str | list[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        numbers = [int(part) for part in given.split(",")] if isinstance(given, str) else given
    except ValueError:
        numbers = []
    if not numbers or not all(type(number) is int for number in numbers):
        raise ConfigError(f"pipeline_layer_partition must be numbers of layers such as 10,11,11; got {given!r}")
    return tuple(numbers)


def _resolve_backend(options: ParallelOptions, device: str, is_node: bool) -> str:
    """Where the ranks run, unless it is said: one rank in the core, several on this host if they fit, else on Ray."""
    backend = options.distributed_executor_backend
    if backend != "auto":
        return backend
    num_ranks = options.tensor_parallel_size * options.pipeline_parallel_size
    if options.nnodes > 1:
        return "mp"
    num_here = num_gpus() if device == "cuda" else os.cpu_count() or 1
    fits = num_ranks * options.data_parallel_size <= num_here
    if num_ranks == 1 and (fits or device == "cpu" or options.data_parallel_size == 1):
        return "uni"
    if fits or (device == "cpu" and not is_node):
        return "mp"
    return "ray"


def num_gpus() -> int:
    """GPUs that this process may use, without importing torch."""
    visible = env.cuda_visible_devices()
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len(visible)


def resolve_device(device: str) -> str:
    """ "auto" is a GPU where a driver and a torch that can use it are found, without importing torch."""
    if device != "auto":
        return device
    if not os.path.exists("/dev/nvidiactl") or env.cuda_visible_devices() == []:
        return "cpu"
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "cpu"
    if torch_version.endswith("+cpu"):
        _logger.warning("there is a GPU, but torch %s is built for CPUs: running on the CPU", torch_version)
        return "cpu"
    return "cuda"


def _resolve_dtype(options: ModelOptions, model: ModelConfig, device: str, deterministic: bool) -> str:
    dtype = _DTYPE_ALIASES.get(options.dtype, options.dtype)
    if dtype == "float16" and device == "cpu":
        raise ConfigError("dtype float16 does not run on the CPU; bfloat16 and float32 do")
    if dtype != "auto":
        return dtype
    if deterministic and device == "cpu" and options.model == EMBEDDED_MODEL:
        return "float32"
    if model.dtype == "float16" and device == "cpu":
        _logger.info("the checkpoint is float16, which does not run on the CPU: running in bfloat16")
        return "bfloat16"
    return model.dtype


def resolve_max_model_len(wanted: int | None, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if wanted is None:
        return model.default_max_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len {wanted} is longer than the model's own limit; up to {longest} works")
    return wanted


def resolve_limits(options: SchedulerOptions, device: str, max_model_len: int) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens. What is not given adapts to what is given; what is given must fit."""
    num_seqs, num_tokens = options.max_num_seqs, options.max_num_batched_tokens
    if num_tokens is None:
        num_tokens = max(_MAX_NUM_BATCHED_TOKENS[device], num_seqs or 0)
        if not options.enable_chunked_prefill:
            num_tokens = max(num_tokens, max_model_len)
    if num_seqs is None:
        num_seqs = min(_MAX_NUM_SEQS[device], num_tokens)
    if num_tokens < num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({num_tokens}) must be at least max_num_seqs ({num_seqs}): each running request "
            "takes one token of a step or more"
        )
    if not options.enable_chunked_prefill and num_tokens < max_model_len:
        raise ConfigError(
            f"without chunked prefill a whole prompt must fit one step: max_num_batched_tokens ({num_tokens}) must be "
            f"at least max_model_len ({max_model_len}); raise the one, lower the other, or leave chunked prefill on"
        )
    return num_seqs, num_tokens
