"""StepGraphs: steps as CUDA graphs, one for each of a set of sizes. Owned by the model runner.

A step of one token a request is a row a request (`InputBatch.decode_rows`). A step with prompts in it is a row a token
(`token_rows`) up to a size, so that a short prompt, or a small model, does not wait for Python to launch each kernel.
Either is padded to the next larger size; of more tokens than there may be requests, the last layer goes on with as many
rows as there may be. What changes between steps comes in one upload, and of prompts where their sequences lie
(`DeviceSequences`); the forward pass and the choice of tokens are a graph each, since requests that ask for more than a
draw choose without one, and so do steps with prompts.
All graphs share one pool of memory: only what is kept here outlives the next replay of another graph.

R rows of a step, S rows of the graph that serves it, H hidden size, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable

import numpy as np
import torch

from shoal.attention.base import AttentionMetadata, DeviceRows
from shoal.attention.sequences import DeviceSequences
from shoal.kernels.compile_ahead import compile_ahead
from shoal.models.base import CausalLM
from shoal.worker.input_batch import ROW_WIDTH, DecodeRows, InputBatch, TokenRows

# Above, kernels are chosen by nothing but whether sixteen divides the number of rows.
_MOST_COMPILED = 48

_Compute = Callable[[int], torch.Tensor]
# Token ids int64 [S] of logits [S, W]; temperatures, min_ps fp32 [S], row_keys int32 [S].
Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(slots=True)
class _Graph:
    """A captured computation and what it returns. graph: None runs it anew each time (for tests without a GPU)."""

    graph: torch.cuda.CUDAGraph | None
    output: torch.Tensor


class StepGraphs:
    """`capture` once, then for each step `forward` and `choose`, in this order, or `forward_tokens`."""

    def __init__(
        self,
        model: CausalLM,
        batch: InputBatch,
        kv_caches: list[torch.Tensor],
        prepare: Callable[[AttentionMetadata], None],
        choose: Choose | None,
        *,
        sizes: list[int],
        token_sizes: list[int],
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """prepare: the attention backend's. choose: None before the last pipeline stage."""
        self.sizes, self.token_sizes = sizes, token_sizes
        self._model, self._batch, self._kv_caches = model, batch, kv_caches
        self._prepare, self._choose = prepare, choose
        device, most = batch.device, max(sizes + token_sizes)
        self._packed = torch.zeros((most, ROW_WIDTH), dtype=torch.int32, device=device)
        self._rows = {
            name: torch.zeros(most, dtype=kind, device=device)
            for kind, names in (
                (torch.int64, ("token_ids", "positions", "slots", "slot_mapping")),
                (torch.int32, ("table_rows", "seq_lens", "row_keys")),
                (torch.float32, ("temperatures", "min_ps")),
            )
            for name in names
        }
        # Of steps with prompts, on the last stage: the tokens whose states are wanted, padded with others.
        self._wanted = torch.zeros(self.largest, dtype=torch.int64, device=device)
        self._sequences = DeviceSequences(batch.padding_slot, max(token_sizes, default=1), device)
        self._hidden_in: torch.Tensor | None = None
        if not model.is_first_stage:
            self._hidden_in = torch.zeros((most, hidden_size), dtype=dtype, device=device)
        self._forward: dict[int, _Graph] = {}
        self._forward_tokens: dict[int, _Graph] = {}
        self._choice: dict[int, _Graph] = {}
        self._padding = batch.padding_rows(most)
        self._unpack = _find_unpack(device)

    @property
    def largest(self) -> int:
        """Rows of the largest step of one token a request that they serve."""
        return self.sizes[-1]

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step with prompts that they serve; 0: none."""
        return max(self.token_sizes, default=0)

    # --- the start ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        local_size: int = 1,
        also_compile: Callable[[], None] = lambda: None,
    ) -> float:
        """Run and capture every size, the largest first so that the others fit into its memory. Returns seconds.

        local_size: processes of this host that do so at the same time. also_compile: other work whose kernels are
        compiled beside these; it is called where launches do nothing.
        """
        started = time.monotonic()
        self._packed.copy_(torch.from_numpy(self._padding))
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._batch.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compile(local_size, also_compile)
            num_graphs = len(self.sizes) + len(self.token_sizes)
            for index, size in enumerate(reversed(self.token_sizes)):
                self._forward_tokens[size] = self._capture_one(self._compute_tokens, size, pool)
                if on_progress is not None:
                    on_progress(index + 1, num_graphs)
            for index, size in enumerate(reversed(self.sizes)):
                self._forward[size] = self._capture_one(self._compute_forward, size, pool)
                if self._choose is not None:
                    self._choice[size] = self._capture_one(self._compute_choice, size, pool)
                if on_progress is not None:
                    on_progress(len(self.token_sizes) + index + 1, num_graphs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return time.monotonic() - started

    def _compile(self, local_size: int, also_compile: Callable[[], None]) -> None:
        """The kernels of all sizes, side by side; sizes between those here need no others."""
        with compile_ahead(local_size):
            for size in self.sizes:
                if size <= _MOST_COMPILED or size == self.largest:
                    self._forward[size] = _Graph(None, self._compute_forward(size))
                    if self._choose is not None:
                        self._compute_choice(size)
            for size in {*self.token_sizes[:1], *self.token_sizes[-1:]}:
                self._compute_tokens(size)
            also_compile()
        self._batch.last_token.zero_()  # what was chosen there is no token

    def _capture_one(self, compute: _Compute, size: int, pool: tuple[int, int]) -> _Graph:
        compute(size)  # compiles, and lets libraries set themselves up
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to CUDA meanwhile: NCCL's own, and the one that reads results.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            output = compute(size)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what went wrong before says more
                graph.capture_end()
            raise
        graph.capture_end()
        return _Graph(graph, output)

    # --- steps -------------------------------------------------------------------------------------------------

    def forward(self, rows: DecodeRows, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Start the forward pass; hidden [R, H] of the stage before. Returns [R, H], valid until the next replay."""
        size = _size_for(len(rows.packed), self.sizes)
        self._upload(rows.packed, size, hidden)
        return self._replay(self._forward, self._compute_forward, size)[: len(rows.packed)]

    def forward_tokens(self, rows: TokenRows, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The same for a row a token: hidden [T, H]. Returns [T, H], on the last stage [R, H] of `last_rows`."""
        size = _size_for(rows.num_tokens, self.token_sizes)
        self._sequences.fill(rows.sequences)
        self._upload(rows.packed, size, hidden)
        if not self._model.is_last_stage:
            return self._replay(self._forward_tokens, self._compute_tokens, size)[: rows.num_tokens]
        num_rows = len(rows.last_rows)
        # Copies of one token would all go to the same experts.
        padding = np.arange(self.largest - num_rows) % rows.num_tokens
        self._wanted.copy_(self._to_host_memory(np.concatenate([rows.last_rows, padding])), non_blocking=True)
        hidden = self._replay(self._forward_tokens, self._compute_tokens, size)
        return hidden[:num_rows] if self._drops(size) else hidden.index_select(0, self._wanted[:num_rows])

    def _drops(self, size: int) -> bool:
        """Whether the graph of so many tokens gives the states of those alone that are wanted."""
        return self._model.is_last_stage and size > self.largest

    def _to_host_memory(self, array: np.ndarray) -> torch.Tensor:
        """From where the device copies it without anybody waiting."""
        host = torch.from_numpy(array)
        return host.pin_memory() if self._packed.is_cuda else host

    def _upload(self, packed: np.ndarray, size: int, hidden: torch.Tensor | None) -> None:
        host = self._to_host_memory(np.concatenate([packed, self._padding[: size - len(packed)]]))
        self._packed[:size].copy_(host, non_blocking=True)
        if hidden is not None:
            assert self._hidden_in is not None
            self._hidden_in[: len(packed)].copy_(hidden)

    def choose(self, num_rows: int) -> torch.Tensor:
        """Choose and store the tokens of the rows that `forward` computed last: greedy, or drawn as the rows say.

        Returns int64 [R], valid until the next replay.
        """
        return self._replay(self._choice, self._compute_choice, _size_for(num_rows, self.sizes))[:num_rows]

    def _replay(self, graphs: dict[int, _Graph], compute: _Compute, size: int) -> torch.Tensor:
        found = graphs.get(size)
        if found is None or found.graph is None:  # not captured
            graphs[size] = _Graph(None, compute(size))
            return graphs[size].output
        found.graph.replay()
        return found.output

    def _compute_tokens(self, size: int) -> torch.Tensor:
        return self._compute_forward(size, are_tokens=True)

    def _compute_forward(self, size: int, are_tokens: bool = False) -> torch.Tensor:
        batch = self._batch
        assert batch.device_table is not None
        rows = {name: tensor[:size] for name, tensor in self._rows.items()}
        self._unpack(self._packed[:size], batch.last_token, batch.device_table, rows, batch.block_size)
        metadata = AttentionMetadata(
            query_lens=[],
            seq_lens=[],
            block_tables=batch.device_table,
            slot_mapping=rows["slot_mapping"],
            block_size=batch.block_size,
            device_rows=None if are_tokens else DeviceRows(rows["table_rows"], rows["seq_lens"]),
            device_sequences=self._sequences if are_tokens else None,
        )
        self._prepare(metadata)
        hidden = None if self._hidden_in is None else self._hidden_in[:size]
        wanted = self._wanted if are_tokens and self._drops(size) else None
        token_ids, positions = rows["token_ids"], rows["positions"]
        return self._model.forward(token_ids, positions, self._kv_caches, metadata, None, hidden, wanted)

    def _compute_choice(self, size: int) -> torch.Tensor:
        assert self._choose is not None
        rows = {name: tensor[:size] for name, tensor in self._rows.items()}
        logits = self._model.project_logits(self._forward[size].output)
        token_ids = self._choose(logits, rows["temperatures"], rows["min_ps"], rows["row_keys"])
        if self._model.is_first_stage:
            self._batch.store_sampled(rows["slots"], token_ids)
        return token_ids


def _size_for(num_rows: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= num_rows)


def _find_unpack(device: torch.device) -> Callable[..., None]:
    """The kernel, on a GPU; Triton is imported where it is needed only."""
    if device.type != "cuda":
        return unpack_rows
    unpack: Callable[..., None] = importlib.import_module("shoal.kernels.step").unpack_rows
    return unpack


def unpack_rows(
    packed: torch.Tensor,
    last_token: torch.Tensor,
    block_table: torch.Tensor,
    outputs: dict[str, torch.Tensor],
    block_size: int,
) -> None:
    """What `kernels.step.unpack_rows` does, by PyTorch's own operations."""
    wide = packed.to(torch.int64)
    slots, positions, given = wide[:, 0], wide[:, 1], wide[:, 2]
    block_table.view(-1).index_copy_(0, wide[:, 6], packed[:, 7])
    outputs["token_ids"].copy_(torch.where(given >= 0, given, last_token[slots]))
    outputs["positions"].copy_(positions)
    outputs["slots"].copy_(slots)
    outputs["table_rows"].copy_(packed[:, 0])
    outputs["seq_lens"].copy_(packed[:, 1] + 1)
    blocks = block_table[slots, positions // block_size].to(torch.int64)
    outputs["slot_mapping"].copy_(blocks * block_size + positions % block_size)
    outputs["temperatures"].copy_(packed[:, 3].contiguous().view(torch.float32))
    outputs["min_ps"].copy_(packed[:, 4].contiguous().view(torch.float32))
    outputs["row_keys"].copy_(packed[:, 5])
