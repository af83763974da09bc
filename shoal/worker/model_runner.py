"""ModelRunner: one rank's steps. Lays out the inputs, runs its layers of the model, samples on the last pipeline stage;
tokens stay on the device.

Called by the worker, from one thread. T tokens, R rows (requests) of a step, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch

from shoal.attention.base import AttentionBackend, AttentionMetadata
from shoal.config.engine_config import EngineConfig
from shoal.config.graph_sizes import graph_bytes, graph_sizes, token_graph_sizes
from shoal.distributed.rendezvous import ParallelGroups
from shoal.kernels.compile_ahead import compile_ahead
from shoal.kv_transfer.hooks import LayerHooks
from shoal.messages import BatchResult, ScheduledBatch, SlotResult
from shoal.models.base import CausalLM
from shoal.models.pooler import Pooler
from shoal.sampling.choice import TokenChoice
from shoal.sampling.rehearse import rehearse_sampling
from shoal.sampling.rows import upload
from shoal.sampling.sampler import SampledTokens, Sampler
from shoal.sampling.state import SamplingState
from shoal.types.outputs import TokenLogprobs
from shoal.worker.adapters import RankAdapters
from shoal.worker.clock import BUSY, MESSAGES, StageClock
from shoal.worker.graphs import StepGraphs
from shoal.worker.host_copy import HostCopy
from shoal.worker.input_batch import SLOT_COLUMN, DecodeRows, InputBatch, StepInputs, TokenRows, longest_first
from shoal.worker.layer_status import LayerStatus
from shoal.worker.pooling import SequencePooling, mark_segments
from shoal.worker.prompt_logprobs import PromptLogprobs
from shoal.worker.stage import PipelineStage


@dataclasses.dataclass(slots=True)
class _Executed:
    """A step whose forward pass is under way: what sampling it needs.

    slots, ends: of the rows that sample, and the positions of their next tokens. hidden [T or R, H]: None before the
    last stage. last_rows: where in `hidden` their last tokens are; None: it has these alone, row for row. inputs: of a
    step that ran without a graph. by_graph: its tokens can be chosen by one too.
    """

    step_id: int
    generation: int
    slots: list[int]
    ends: list[int]
    hidden: torch.Tensor | None
    last_rows: torch.Tensor | None = None
    inputs: StepInputs | None = None
    by_graph: bool = False


class ModelRunner:
    """Owns the input batch, the KV cache tensors and, on the last stage, the sampling state of one rank."""

    def __init__(
        self,
        config: EngineConfig,
        model: CausalLM,
        backend: AttentionBackend,
        device: torch.device,
        groups: ParallelGroups,
        hooks: LayerHooks | None = None,
        adapters: RankAdapters | None = None,
    ) -> None:
        self.config = config
        self._adapters = adapters
        self.model = model
        self.backend = backend
        self.device = device
        self._status = groups.status
        self._dims = groups.dims
        self.hooks = LayerStatus(groups.status, hooks)
        # A connector's hooks act between layers, which a graph knows nothing of.
        self._captures = device.type == "cuda" and not config.enforce_eager and backend.follows_device and hooks is None
        pooling = config.model.pooling  # texts come in steps of many tokens
        self._captures &= model.follows_device and pooling is None
        self.graphs: StepGraphs | None = None
        self.batch = InputBatch(
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
            device,
            keeps_device_table=self._captures,
        )
        self.clock = StageClock(device, groups.status, measures=groups.dims.pipeline_size > 1)
        self.stage = PipelineStage(
            groups,
            hidden_size=config.model.hidden_size,
            dtype=getattr(torch, config.dtype),
            device=device,
            max_num_seqs=config.max_num_seqs,
            clock=self.clock,
        )
        self.sampling: SamplingState | None = None
        self._pooling: SequencePooling | None = None
        if self.stage.is_last and pooling is not None:
            assert isinstance(model.pooler, Pooler)
            sizes = config.max_num_seqs, config.model.hidden_size
            self._pooling = SequencePooling(pooling, model.pooler, *sizes, device)
        elif self.stage.is_last:
            self.sampling = SamplingState(config.max_num_seqs, config.model.vocab_size, device, groups.tensor)
        self.sampler = Sampler()
        self._prompts = PromptLogprobs(model, device)
        self.kv_caches: list[torch.Tensor] = []
        self._no_tokens = torch.empty(0, dtype=torch.int64, device=device)
        self._first_row = torch.zeros(1, dtype=torch.int64, device=device)
        self._executed: dict[int, _Executed] = {}

    def agree_on_graphs(self, groups: ParallelGroups) -> None:
        """Capture steps only if every rank of a stage can: their sums are in its graphs. When all have loaded."""
        if self.config.model.experts is not None and groups.tensor.world_size > 1:
            total = groups.tensor.all_reduce(torch.full((1,), float(self._captures), device=self.device))
            self._captures = int(total) == groups.tensor.world_size

    def set_kv_caches(self, kv_caches: list[torch.Tensor]) -> None:
        """One tensor a layer, in the attention backend's shape."""
        self.kv_caches = kv_caches

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> None:
        """Take slot changes in and start the forward pass: from tokens, or from what the stage before sends."""
        self.clock.begin_step()
        self.clock.enter(BUSY)
        batch = longest_first(batch)
        self._change_slots(batch)
        self._executed[batch.step_id] = self._run_by_graph(batch) or self._run_eagerly(batch)
        self.clock.enter(MESSAGES)

    def _run_eagerly(self, batch: ScheduledBatch) -> _Executed:
        inputs = self.batch.prepare(batch)
        if self.backend.reads_past_end:
            self._clear(batch)
        wanted = self._wanted_rows(batch, inputs)
        hidden = self._forward(inputs, wanted)
        self._pass_on(batch.step_id, inputs.sample_slots, hidden)
        return _Executed(
            batch.step_id,
            batch.generation,
            inputs.sample_slots.tolist(),
            (inputs.starts + inputs.counts)[inputs.sample_rows].tolist(),
            hidden if self.stage.is_last else None,
            inputs.last_tokens if wanted is None else None,
            inputs,
        )

    def _run_by_graph(self, batch: ScheduledBatch) -> _Executed | None:
        """None where no graph fits."""
        graphs = self.graphs
        if graphs is None:
            return None
        if len(batch.work) <= graphs.largest and (rows := self.batch.decode_rows(batch)) is not None:
            return self._run_decodes(graphs, batch, rows)
        if self._wants_prompt_logprobs(batch):
            return None
        tokens = self.batch.token_rows(batch, graphs.most_tokens)
        return None if tokens is None else self._run_tokens(graphs, batch, tokens)

    def _run_tokens(self, graphs: StepGraphs, batch: ScheduledBatch, rows: TokenRows) -> _Executed:
        """Few tokens, of prompts too: the layers are a graph."""
        if self.backend.reads_past_end:
            self._clear(batch)
        if self.stage.is_first and not self.stage.is_last:
            self.stage.fetch_tokens(rows.reading_slots, self.batch.store_sampled)
        self._put_adapters(rows.packed[:, SLOT_COLUMN])
        hidden = graphs.forward_tokens(rows, self.stage.receive(rows.num_tokens))
        if not self.stage.is_last:
            hidden = hidden.clone()  # on its way while the next replay begins
        self._pass_on(batch.step_id, rows.sample_slots, hidden)
        return _Executed(
            batch.step_id,
            batch.generation,
            rows.sample_slots.tolist(),
            rows.sample_ends.tolist(),
            hidden if self.stage.is_last else None,
        )

    def _run_decodes(self, graphs: StepGraphs, batch: ScheduledBatch, rows: DecodeRows) -> _Executed:
        """One token a request: everything between the upload and the tokens is a graph, or two."""
        if self.backend.reads_past_end:
            self._clear(batch)
        if self.stage.is_first and not self.stage.is_last:
            self.stage.fetch_tokens(rows.slots, self.batch.store_sampled)
        slots, ends = rows.slots.tolist(), rows.ends.tolist()
        by_graph = False
        if self.sampling is not None:
            parameters = self.sampling.simple_rows(slots, ends)
            by_graph = parameters is not None
            if parameters is not None:
                rows.put_sampling(parameters)
        self._put_adapters(rows.slots)
        hidden = graphs.forward(rows, self.stage.receive(len(slots)))
        if not self.stage.is_last:
            hidden = hidden.clone()  # on its way while the next replay begins
        self._pass_on(batch.step_id, rows.slots, hidden)
        return _Executed(
            batch.step_id, batch.generation, slots, ends, hidden if self.stage.is_last else None, by_graph=by_graph
        )

    def _put_adapters(self, slots: np.ndarray) -> None:
        """slots: the request's of each token of the step."""
        if self._adapters is not None:
            self._adapters.put_tokens(slots)

    def _pass_on(self, step_id: int, sample_slots: np.ndarray, hidden: torch.Tensor) -> None:
        """To the next stage, if there is one; the first one expects the tokens of sample_slots back."""
        self.stage.send(hidden)
        if self.stage.is_first and not self.stage.is_last and self.config.model.pooling is None:
            self.stage.expect_tokens(step_id, sample_slots)

    def _change_slots(self, batch: ScheduledBatch) -> None:
        for slot in batch.released_slots:
            self.batch.release(slot)
            if self.sampling is not None:
                self.sampling.release(slot)
        model = self.config.model
        for assignment in batch.assigned:
            if model.pooling is not None:
                assignment = mark_segments(assignment, model.pooling.num_segments, model.vocab_size)
            self.batch.assign(assignment)
            if self._adapters is not None:
                self._adapters.assign(assignment.slot, assignment.adapter)
            if self.sampling is not None:
                self.sampling.assign(
                    assignment.slot, assignment.sampling, assignment.token_ids, assignment.num_prompt_tokens
                )

    def _clear(self, batch: ScheduledBatch) -> None:
        """Zero the new blocks that this step does not fill: another request's numbers are in them."""
        block_size = self.config.block_size
        blocks: list[int] = []
        for item in batch.work:
            if item.new_block_ids:
                end = item.num_computed_tokens + item.num_new_tokens
                num_partial = self.batch.num_blocks(item.slot) - end // block_size
                if num_partial > 0:
                    blocks += item.new_block_ids[-num_partial:]
        if blocks:
            index = upload(np.array(blocks, np.int64), self.device)
            for kv_cache in self.kv_caches:
                self.backend.clear_blocks(kv_cache, index)

    def _wants_prompt_logprobs(self, batch: ScheduledBatch) -> bool:
        return any(self._prompts.wants(item, self.batch.assignments) for item in batch.work)

    def _wanted_rows(self, batch: ScheduledBatch, inputs: StepInputs) -> torch.Tensor | None:
        """The tokens whose states are asked for, at least one; None: all, as on every stage but the last."""
        if not self.stage.is_last or len(inputs.sample_rows) == inputs.num_tokens:
            return None
        if self._pooling is not None:
            if not self._pooling.needs_last_only:
                return None
        elif self._wants_prompt_logprobs(batch):
            return None
        return inputs.last_tokens if len(inputs.last_tokens) else self._first_row

    def _forward(self, inputs: StepInputs, wanted: torch.Tensor | None) -> torch.Tensor:
        """[T, H], or [R, H] of the wanted tokens."""
        metadata = AttentionMetadata(
            query_lens=inputs.query_lens,
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            block_size=self.config.block_size,
        )
        self.backend.prepare(metadata)
        token_ids = self._token_ids(inputs)
        hidden = self.stage.receive(inputs.num_tokens)
        if self._adapters is not None:
            self._put_adapters(inputs.slots[inputs.row_of_token])
        hidden = self.model.forward(token_ids, inputs.positions, self.kv_caches, metadata, self.hooks, hidden, wanted)
        self._status.enter_layer(-1)
        return hidden

    def _token_ids(self, inputs: StepInputs) -> torch.Tensor:
        """int64 [T], on the first stage; the others need none."""
        if not self.stage.is_first:
            return self._no_tokens
        if not self.stage.is_last:
            self.stage.fetch_tokens(self.batch.reading_slots(inputs), self.batch.store_sampled)
        return self.batch.token_ids(inputs)

    @torch.inference_mode()
    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Callable[[], BatchResult]:
        """Choose this step's tokens; returns what waits for the device and reads them. Before the last stage there is
        nothing to choose and nothing to read."""
        executed = self._executed.pop(step_id)
        if executed.hidden is None:
            return self._collector(executed, None, {})
        self.clock.enter(BUSY)
        if self._pooling is not None:
            assert executed.inputs is not None, "steps of texts run without graphs"
            collect = self._pooling.take(executed.inputs, executed.hidden, self.batch.assignments)
        elif executed.by_graph and not grammar_masks:
            assert self.graphs is not None
            token_ids = self.graphs.choose(len(executed.slots))
            if not self.stage.is_first:
                self.stage.send_tokens(token_ids)
            collect = self._collector(executed, SampledTokens(token_ids, None), {})
        else:
            prompts: dict[int, list[TokenLogprobs]] = {}
            if executed.inputs is not None:
                prompts = self._prompts.results(executed.inputs, executed.hidden, self.batch.assignments)
            sampled = self._sample(executed, executed.hidden, grammar_masks) if executed.slots else None
            collect = self._collector(executed, sampled, prompts)
        self.clock.enter(MESSAGES)
        return collect

    def _sample(
        self, executed: _Executed, hidden: torch.Tensor, grammar_masks: dict[int, bytes] | None
    ) -> SampledTokens:
        """hidden [T or R, H], after the final norm."""
        assert self.sampling is not None
        slots = executed.slots
        metadata = self.sampling.prepare(slots, executed.ends)
        if executed.last_rows is not None and len(slots) != hidden.shape[0]:
            hidden = hidden.index_select(0, executed.last_rows)
        mask = self._grammar_mask(slots, grammar_masks) if grammar_masks else None
        sampled = self.sampler.sample(self.model.project_logits(hidden), metadata, mask)
        if self.stage.is_first:
            self.batch.store_sampled(upload(np.array(slots, np.int64), self.device), sampled.token_ids)
        else:
            self.stage.send_tokens(sampled.token_ids)
        self.sampling.commit(metadata, sampled.token_ids)
        return sampled

    def _grammar_mask(self, slots: list[int], masks: dict[int, bytes]) -> torch.Tensor:
        """Packed int32 [R, ceil(V / 32)]; every bit set for rows without a grammar."""
        num_words = -(-self.config.model.vocab_size // 32)
        packed = np.full((len(slots), num_words), -1, np.int32)
        for row, slot in enumerate(slots):
            if slot in masks:
                packed[row] = np.frombuffer(masks[slot], "<i4", num_words)
        return upload(packed, self.device)

    @torch.inference_mode()
    def settle(self) -> None:
        """Between steps, when the results of all are known: finish what is under way between the stages."""
        self.stage.settle(self.batch.store_sampled)

    def _collector(
        self, executed: _Executed, sampled: SampledTokens | None, prompts: dict[int, list[TokenLogprobs]]
    ) -> Callable[[], BatchResult]:
        """What reads the step's tokens back. On CUDA the copy to the host is queued here and awaited there."""
        host = HostCopy(sampled) if sampled is not None else None
        # Before the last stage nothing is sampled.
        slots = executed.slots if executed.hidden is not None else []
        failures = {} if self._adapters is None else dict(self._adapters.failures)

        def collect() -> BatchResult:
            results = []
            token_ids: list[int] = []
            logprobs: list[TokenLogprobs | None] = [None] * len(slots)
            if host is not None:
                token_ids = host.token_ids()
                logprobs = host.logprobs() or logprobs
            for slot, token_id, entry in zip(slots, token_ids, logprobs, strict=True):
                if slot in failures:
                    results.append(SlotResult(slot, [], error=failures[slot]))
                    continue
                results.append(
                    SlotResult(slot, [token_id], [entry] if entry is not None else None, prompts.pop(slot, None))
                )
            results += [
                SlotResult(slot, [], None, entries) for slot, entries in prompts.items() if slot not in failures
            ]
            return BatchResult(executed.step_id, executed.generation, results)

        return collect

    def graph_bytes(self) -> int:
        """About what `capture` will take: activations and logits of its largest step, and what kernels share."""
        if not self._captures:
            return 0
        config, model, dims = self.config, self.config.model, self._dims
        kv_heads = dims.kv_head_slice(model.num_kv_heads)
        num_heads, longest = model.num_heads // dims.tensor_size, config.max_model_len
        if model.latent_cache_dim is not None:
            scratch = self.backend.latent_scratch_bytes(num_heads, model.latent_cache_dim, longest)
        else:
            scratch = self.backend.scratch_bytes(num_heads, kv_heads.stop - kv_heads.start, model.head_dim, longest)
        return scratch + graph_bytes(model, dims.tensor_size, config.max_num_seqs, config.max_num_batched_tokens)

    def capture(self, on_progress: Callable[[int, int], None] | None = None, local_size: int = 1) -> float:
        """Capture steps as graphs, where this device and backend can; on any GPU sample once in each way that has
        kernels of its own, so that they are compiled and loaded. Returns seconds."""
        if self.device.type != "cuda":
            return 0.0
        started = time.monotonic()
        if self._adapters is not None:
            self._adapters.rehearse()
        if self._captures:
            self.graphs = self._capture_graphs(on_progress, local_size)
        else:
            with compile_ahead(local_size):
                self._rehearse_sampling()
        self._rehearse_sampling()
        torch.cuda.synchronize(self.device)
        return time.monotonic() - started

    def _capture_graphs(self, on_progress: Callable[[int, int], None] | None, local_size: int) -> StepGraphs:
        config = self.config
        graphs = StepGraphs(
            self.model,
            self.batch,
            self.kv_caches,
            self.backend.prepare,
            TokenChoice(self.model.vocabulary, self.device) if self.stage.is_last else None,
            sizes=graph_sizes(config.max_num_seqs),
            token_sizes=token_graph_sizes(config.model, self._dims.tensor_size, config.max_num_batched_tokens),
            hidden_size=config.model.hidden_size,
            dtype=getattr(torch, config.dtype),
        )
        graphs.capture(on_progress, local_size, self._rehearse_sampling)
        return graphs

    @torch.inference_mode()
    def _rehearse_sampling(self) -> None:
        if self.sampling is None:
            return
        shape, dtype = self.config.model.hidden_size, getattr(torch, self.config.dtype)
        hidden = torch.zeros((self.config.max_num_seqs, shape), dtype=dtype, device=self.device)
        rehearse_sampling(
            self.sampler,
            self.sampling,
            self.config.max_num_seqs,
            lambda num_rows: self.model.project_logits(hidden[:num_rows]),
        )

    @torch.inference_mode()
    def warm_up(self, num_tokens: int, num_decodes: int = 0, all_states: bool = False) -> None:
        """Run a step of `num_tokens` over the null block: libraries choose their kernels, memory peaks show.

        num_decodes: so many of the tokens, at most all but one, are sequences of their own with room for the longest
        context, as decodes beside prompts are. all_states: of all tokens the states are asked for, not of each
        sequence's last one alone.
        """
        num_tokens = min(num_tokens, self.config.max_num_batched_tokens)
        num_decodes = min(num_decodes, num_tokens - 1, self.config.max_num_seqs)
        longest = self.config.max_model_len
        lengths = [1] * num_decodes
        while sum(lengths) < num_tokens:
            lengths.append(min(longest, num_tokens - sum(lengths)))
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        num_blocks = -(-(longest if num_decodes else max(lengths)) // self.config.block_size)
        metadata = AttentionMetadata(
            query_lens=lengths,
            seq_lens=lengths,
            block_tables=torch.zeros((len(lengths), num_blocks), dtype=torch.int32, device=self.device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            block_size=self.config.block_size,
        )
        self.backend.prepare(metadata)
        if self._adapters is not None:
            self._adapters.rehearse()
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        hidden = None
        if not self.stage.is_first:
            size, dtype = self.config.model.hidden_size, getattr(torch, self.config.dtype)
            hidden = torch.zeros((num_tokens, size), dtype=dtype, device=self.device)
        wanted = None
        if self.stage.is_last and not all_states:
            wanted = torch.tensor(lengths[: self.config.max_num_seqs], device=self.device).cumsum(0) - 1
        hidden = self.model.forward(token_ids, positions, self.kv_caches, metadata, None, hidden, wanted)
        if self.sampling is not None:
            self.model.compute_logits(hidden[: self.config.max_num_seqs])
