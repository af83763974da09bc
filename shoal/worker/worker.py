"""Worker: one rank. Loads its part of the model, sizes its part of the KV cache, runs steps. Called by an executor, or
by the worker process, which first forms the groups."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from shoal.attention.base import AttentionBackend
from shoal.attention.cache_dtype import cache_dtype
from shoal.attention.registry import build_with_backend, create_attention_backend
from shoal.config.engine_config import EngineConfig
from shoal.config.graph_sizes import tokens_in_halves
from shoal.config.parallel import balance_layers
from shoal.distributed.rendezvous import ParallelGroups, single_rank_groups
from shoal.kernels.compile_ahead import CompileWatch, compile_ahead
from shoal.kernels.disk_cache import find_compiler_cache
from shoal.kernels.large_reducer import attach_large_reducer
from shoal.kernels.small_reducer import attach_small_reducer
from shoal.layers.context import BuildContext
from shoal.layers.lora import AdapterSlots
from shoal.log import get_logger
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress
from shoal.models.base import CausalLM
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights
from shoal.worker.adapters import RankAdapters
from shoal.worker.device import (
    check_dtype,
    describe_device,
    find_device,
    keep_freed_memory,
    share_cores,
    use_few_threads,
)
from shoal.worker.expert_load import ExpertLoad
from shoal.worker.kv_cache import block_bytes, num_blocks_for
from shoal.worker.model_runner import ModelRunner

logger = get_logger(__name__)

# Tokens of a step, and how many of them are decodes.
_WARM_UP_STEPS = ((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (64, 0))
# For attention with kernels: beside a prompt few decodes, and more than a launch splits the contexts of.
_MIXED_WARM_UP_STEPS = ((8, 1), (272, 256))
_USE_SECONDS = 1.0
OnProgress = Callable[[StartupProgress], None]


class Worker:
    """Everything of one rank, from device to steps. All calls come from one thread, and on all ranks in one order."""

    def __init__(
        self,
        config: EngineConfig,
        groups: ParallelGroups | None = None,
        *,
        device_index: int = 0,
        local_size: int = 1,
    ) -> None:
        """
        groups: formed on `find_device(config.device, device_index)`; None: one rank alone. Whoever owns the process
        registers them (`set_parallel_groups`) and closes them.
        local_size: ranks on this host, those of other replicas counted. They share its memory, so all of them make
        their workers before any of them loads, as they do right after forming groups: what is free then is divided
        evenly.
        """
        self.config = config
        self.groups = groups or single_rank_groups()
        self._device_index = device_index
        self._local_size = local_size
        self._host_bytes = psutil.virtual_memory().available // local_size
        self._runner: ModelRunner | None = None
        self._expert_load: ExpertLoad | None = None
        self._process = psutil.Process()
        self._use_noted = 0.0
        # Of a step that shows no layers while it is computed: its kernels are queued at once.
        self._full_step_seconds = 0.0

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "load comes first"
        return self._runner

    def load(self, on_progress: OnProgress) -> tuple[int, dict[str, Any]]:
        """Build this rank's part of the model and load its weights.

        Returns the KV cache blocks that fit here (the null block counted), and facts for the start-up message.
        Raises ConfigError or ModelError.
        """
        config, started = self.config, time.monotonic()
        self.groups.status.update(generation=config.generation, phase="load")
        device = find_device(config.device, self._device_index)
        facts: dict[str, Any] = {}
        if device.type == "cpu":
            share_cores(self._local_size)
        else:
            torch.cuda.set_device(device)
            # cuDNN's attention, which PyTorch prefers on sm_90, plans anew for each number and length of texts. Long
            # prompts ask for it by name (attention/fresh_prompts.py).
            torch.backends.cuda.enable_cudnn_sdp(False)
            find_compiler_cache()
            CompileWatch(self.groups.status.update).attach()
            facts["all_reduce"] = attach_small_reducer(self.groups.tensor)
        on_progress(StartupProgress("load weights"))
        model, context = self._build(device)
        load_weights(
            model,
            config.model,
            config.load_format,
            config.seed,
            lambda done, total: on_progress(StartupProgress("load weights", done, total)),
        )
        load_seconds = time.monotonic() - started
        weight_bytes = model.weight_bytes()
        if device.type == "cpu":
            # Not before: what packing frees would stay, a part of every matrix.
            keep_freed_memory()
            use_few_threads(weight_bytes)
        adapters = None
        if config.lora is not None and context.adapters is not None:
            adapters = RankAdapters(config.lora, context.adapters, model, self.groups.world, config.max_num_seqs)
        self._runner = ModelRunner(config, model, context.attention_backend, device, self.groups, adapters=adapters)
        self._expert_load = ExpertLoad(model, device)
        # One rank may load for longer than a collective of the step that sizes the cache would wait for it.
        self.groups.meet("loaded")
        if device.type == "cuda" and model.takes_halves and config.max_num_batched_tokens >= self._fewest_in_halves:
            rows = (self._fewest_in_halves // 2, -(-config.max_num_batched_tokens // 2))
            large_sums = attach_large_reducer(
                self.groups.tensor,
                rows,
                config.model.hidden_size,
                getattr(torch, config.dtype),
                self.groups.share_memory,
            )
            if large_sums is not None:
                facts["all_reduce"] += f"; {large_sums}"
        self._runner.agree_on_graphs(self.groups)
        on_progress(StartupProgress("size the KV cache"))
        self.groups.status.update(phase="size")
        num_blocks = self._count_blocks(weight_bytes)
        return num_blocks, facts | {
            "full_step_seconds": round(self._full_step_seconds, 3),
            "device": describe_device(device),
            "dtype": config.dtype,
            "deterministic": config.deterministic,
            "attention": context.attention_backend.name,
            "weight_bytes": weight_bytes,
            "load_seconds": round(load_seconds, 2),
        }

    def _build(self, device: torch.device) -> tuple[CausalLM, BuildContext]:
        config, dims = self.config, self.groups.dims
        dtype = getattr(torch, config.dtype)
        check_dtype(dtype, device)
        partition = config.parallel.layer_partition or balance_layers(config.model, dims.pipeline_size)

        def build(backend: AttentionBackend) -> tuple[CausalLM, BuildContext]:
            lora = config.lora
            adapters = None
            if lora is not None:
                adapters = AdapterSlots(lora.max_loras, lora.max_rank, config.max_num_batched_tokens, dtype, device)
            context = BuildContext(
                dtype=dtype,
                device=device,
                deterministic=config.deterministic,
                attention_backend=backend,
                parallel=dims,
                tensor_group=self.groups.tensor,
                layer_range=dims.layer_range(config.model.num_layers, partition),
                max_model_len=config.max_model_len,
                cache_dtype=self._cache_dtype,
                adapters=adapters,
            )
            return build_model(config.model, context), context

        if config.model.pooling is not None and config.model.pooling.sees_both_ways:
            return build(create_attention_backend("bidirectional"))
        return build_with_backend(config.deterministic, device, build)

    @property
    def _fewest_in_halves(self) -> int:
        """Tokens of a step from which a large reducer sums its halves."""
        itemsize = getattr(torch, self.config.dtype).itemsize
        return tokens_in_halves(self.config.model, self.groups.dims.tensor_size, itemsize)

    def _count_blocks(self, weight_bytes: int) -> int:
        """On CUDA a step of full size first shows how much memory activations take."""
        runner = self.runner
        if runner.device.type == "cuda":
            runner.set_kv_caches(self._make_kv_caches(2))
            with compile_ahead(self._local_size):
                runner.warm_up(self.config.max_num_batched_tokens)
            # As most steps are, and as those are that take most memory. Libraries set themselves up.
            for all_states in (False, True):
                runner.warm_up(self.config.max_num_batched_tokens, all_states=all_states)
            if self.groups.tensor.large_reducer is not None:
                # The largest step that is computed whole may take more than the largest in halves.
                whole = min(self._fewest_in_halves - 2, self.config.max_num_batched_tokens)
                runner.warm_up(whole, all_states=True)
            torch.cuda.synchronize(runner.device)
            started = time.monotonic()
            runner.warm_up(self.config.max_num_batched_tokens)
            torch.cuda.synchronize(runner.device)
            self._full_step_seconds = time.monotonic() - started
            runner.set_kv_caches([])
        return num_blocks_for(
            self.config,
            self._block_bytes(),
            weight_bytes,
            runner.device,
            self._host_bytes,
            runner.graph_bytes(),
        )

    def allocate(self, num_blocks: int, on_progress: OnProgress) -> dict[str, Any]:
        """Make a KV cache of so many blocks, as many as every rank has room for, and warm up. Returns facts."""
        config = self.config
        self.runner.set_kv_caches(self._make_kv_caches(num_blocks))
        on_progress(StartupProgress("warm up"))
        self.groups.status.update(phase="capture")
        # What a step outside of graphs needs: each size that chooses its kernels by itself, and a short prompt.
        steps = _WARM_UP_STEPS + (_MIXED_WARM_UP_STEPS if self.runner.backend.follows_device else ())
        with compile_ahead(self._local_size):
            for num_tokens, num_decodes in steps:
                self.runner.warm_up(num_tokens, num_decodes)
        for num_tokens, num_decodes in steps:
            self.runner.warm_up(num_tokens, num_decodes)
        capture_seconds = self.runner.capture(
            lambda done, total: on_progress(StartupProgress("capture CUDA graphs", done, total)), self._local_size
        )
        self.groups.status.update(phase="idle")
        if self._expert_load is not None:
            self._expert_load.clear()
        self._note_use()
        return {
            "num_blocks": num_blocks,
            "capture_seconds": round(capture_seconds, 2),
            "kv_cache_dtype": str(self._cache_dtype).removeprefix("torch."),
            "kv_cache_bytes": num_blocks * self._block_bytes(),
            "kv_cache_tokens": (num_blocks - 1) * config.block_size,
            "max_full_requests": (num_blocks - 1) * config.block_size // config.max_model_len,
        }

    def _cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of one layer, on this rank."""
        model = self.config.model
        if model.latent_cache_dim is not None:
            return self.runner.backend.latent_cache_shape(num_blocks, self.config.block_size, model.latent_cache_dim)
        heads = self.groups.dims.kv_head_slice(model.num_kv_heads)
        return self.runner.backend.kv_cache_shape(
            num_blocks, self.config.block_size, heads.stop - heads.start, model.head_dim
        )

    @property
    def _cache_dtype(self) -> torch.dtype:
        return cache_dtype(self.config.kv_cache_dtype, getattr(torch, self.config.dtype))

    def _block_bytes(self) -> int:
        return block_bytes(self._cache_shape(1), self._cache_dtype, len(self.runner.model.layer_range))

    def _make_kv_caches(self, num_blocks: int) -> list[torch.Tensor]:
        shape, dtype, device = self._cache_shape(num_blocks), self._cache_dtype, self.runner.device
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in self.runner.model.layer_range]

    def execute(self, batch: ScheduledBatch) -> None:
        """Start the forward pass of a step."""
        self.groups.status.update(step=batch.step_id, phase="forward")
        self._note_use()
        self.runner.execute(batch)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Callable[[], BatchResult]:
        """Choose the step's tokens; returns what waits for the device and reads them, from any thread."""
        self.groups.status.update(step=step_id, phase="sample")
        collect = self.runner.sample(step_id, grammar_masks)
        self.groups.status.update(phase="idle")
        return collect

    def _note_use(self, is_idle: bool = False) -> None:
        """Once a second, what this process holds, and what its experts got; is_idle: now, and up to the last step."""
        now = time.monotonic()
        if is_idle or now - self._use_noted >= _USE_SECONDS:
            self._use_noted = now
            device = self.runner.device
            device_bytes = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
            self.groups.status.set_memory(self._process.memory_info().rss, device_bytes)
            load = self._expert_load
            if load is not None and load.tells:
                tokens = load.read() if is_idle else load.poll()
                if tokens is not None:
                    self.groups.status.set_experts(load.first_expert, tokens)

    def idle(self) -> None:
        """When the results of all steps are known: say what was counted in them. Then meet all ranks, on the host and
        on the device, and wait until they have come, so that a lost peer is found without traffic. Raises
        CollectiveError."""
        world = self.groups.world
        self.runner.settle()
        self._note_use(is_idle=True)
        if world.world_size == 1:
            return
        world.barrier()
        if self.runner.device.type == "cuda":
            world.all_reduce(torch.zeros(1, device=self.runner.device)).item()

    def stage_times(self) -> dict[str, float]:
        """Seconds since the first step that this rank waited for messages, for tokens and for hidden states, and was
        busy (`clock.STATES`), and num_steps. What is not busy while there is work is the stage's bubble."""
        return self.runner.clock.seconds()

    def shutdown(self) -> None:
        self._runner = None
