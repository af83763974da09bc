"""Runs a model over a paged cache with block ids in random order: what the worker does, in a few lines for tests."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import torch

from shoal.attention.base import AttentionMetadata
from shoal.attention.registry import create_attention_backend
from shoal.config.model_config import ModelConfig, load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM, LayerObserver
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights

CPU = torch.device("cpu")


@dataclasses.dataclass
class Sequence:
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)


class PagedModel:
    """A model, its cache, and an allocator that hands blocks out in random order."""

    def __init__(
        self,
        path: Path,
        backend: str = "torch_paged",
        *,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 512,
        block_size: int = 16,
        hooks: LayerObserver | None = None,
        load_format: str = "auto",
        seed: int = 0,
        group: GroupCoordinator | None = None,
        layer_range: range | None = None,
        quantization: str | None = None,
        max_model_len: int | None = None,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        expert_parallel: bool = False,
    ) -> None:
        """group: the tensor-parallel ranks, which all make the same calls. layer_range: of a pipeline stage."""
        self.config: ModelConfig = load_model_config(
            path, quantization, model_impl=model_impl, trust_remote_code=trust_remote_code
        )
        self.backend = create_attention_backend(backend)
        group = group or GroupCoordinator([0], 0, name="tensor")
        parallel = ParallelDims(tensor_size=group.world_size, rank=group.rank_in_group, expert_parallel=expert_parallel)
        context = BuildContext(
            dtype=dtype,
            device=CPU,
            attention_backend=self.backend,
            deterministic=backend == "deterministic",
            parallel=parallel,
            tensor_group=group,
            layer_range=layer_range,
            max_model_len=max_model_len,
        )
        self.model: CausalLM = build_model(self.config, context)
        load_weights(self.model, self.config, load_format)
        if self.config.latent_cache_dim is not None:
            shape = self.backend.latent_cache_shape(num_blocks, block_size, self.config.latent_cache_dim)
        else:
            heads = parallel.kv_head_slice(self.config.num_kv_heads)
            num_kv_heads = heads.stop - heads.start
            shape = self.backend.kv_cache_shape(num_blocks, block_size, num_kv_heads, self.config.head_dim)
        # What other requests left behind must not matter.
        self.kv_caches = [torch.full(shape, 3.0, dtype=dtype) for _ in self.model.layer_range]
        self.block_size = block_size
        self.hooks = hooks
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)

    def release(self, sequence: Sequence) -> None:
        self._free += sequence.blocks
        sequence.blocks = []

    @torch.inference_mode()
    def hidden(
        self, work: list[tuple[Sequence, int]], received: torch.Tensor | None = None, rows: list[int] | None = None
    ) -> torch.Tensor:
        """One step: each sequence computes so many tokens more. Returns hidden states [T, H], or [R, H] of the tokens
        `rows`; received: those of the stage before."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, num_new in work:
            start, end = sequence.num_computed, sequence.num_computed + num_new
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self._free.pop())
            for position in range(start, end):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                block = sequence.blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            sequence.num_computed = end
        most = max(len(sequence.blocks) for sequence, _ in work)
        tables = [sequence.blocks + [0] * (most - len(sequence.blocks)) for sequence, _ in work]
        metadata = AttentionMetadata(
            query_lens=[num_new for _, num_new in work],
            seq_lens=[sequence.num_computed for sequence, _ in work],
            block_tables=torch.tensor(tables, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            block_size=self.block_size,
        )
        self.backend.prepare(metadata)
        return self.model(
            torch.tensor(token_ids),
            torch.tensor(positions),
            self.kv_caches,
            metadata,
            self.hooks,
            received,
            None if rows is None else torch.tensor(rows),
        )

    @torch.inference_mode()
    def step(self, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
        """Logits of every new token, [num_new, V] for each sequence."""
        logits = self.model.compute_full_logits(self.hidden(work))
        return list(logits.split([num_new for _, num_new in work]))

    @torch.inference_mode()
    def last_logits(self, work: list[tuple[Sequence, int]]) -> torch.Tensor:
        """Logits of each sequence's last token, [len(work), V]: nothing else is asked of the model."""
        ends = itertools.accumulate(num_new for _, num_new in work)
        return self.model.compute_full_logits(self.hidden(work, rows=[end - 1 for end in ends]))

    def logits(self, token_ids: list[int], chunk: int) -> torch.Tensor:
        """[len(token_ids), V], computed alone, `chunk` tokens at a time."""
        sequence = Sequence(token_ids)
        rows = []
        while sequence.num_computed < len(token_ids):
            num_new = min(chunk, len(token_ids) - sequence.num_computed)
            rows += self.step([(sequence, num_new)])
        self.release(sequence)
        return torch.cat(rows)


def random_tokens(length: int, seed: int, vocab_size: int = 512) -> list[int]:
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(vocab_size) for _ in range(length)]
