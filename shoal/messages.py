"""What crosses Shoal's processes: API server <-> engine core, engine core <-> worker. msgspec only, never pickle.

Ready, outputs, batches and their results carry the `generation` of the engine: outputs of an older one are dropped.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.types.adapter import AdapterRef
from shoal.types.outputs import FinishReason, TokenLogprobs
from shoal.types.pooling_params import PoolingParams
from shoal.types.request import EngineRequest
from shoal.types.sampling_params import SamplingParams

# --- API server -> engine core ---------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, tag="add"):
    """Queue one request. It is answered by TokenDeltas, the last of which has a finish_reason."""

    request: EngineRequest


class AbortRequests(msgspec.Struct, tag="abort"):
    """End these requests; unknown or finished ids are ignored (they crossed on the way)."""

    request_ids: list[str]
    # The end that the caller already reported (a stop string): no TokenDelta answers it then.
    silent: bool = False


class Utility(msgspec.Struct, tag="utility"):
    """A question outside the token path. `call` is one of: "ping", "stats", "reset_prefix_cache"."""

    call_id: int
    call: str


class Shutdown(msgspec.Struct, tag="shutdown"):
    """End the engine. Requests still running are aborted after `drain_seconds`."""

    drain_seconds: float = 0.0


ClientMessage = AddRequest | AbortRequests | Utility | Shutdown

# --- engine core -> API server ---------------------------------------------------------------------------------


class TokenDelta(msgspec.Struct, omit_defaults=True):
    """0..k new tokens of one request. With a finish_reason it is the last message of that request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    # Of the whole prompt (position 0 has none), sent once, with or before the first token.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    # The stop token id where one ended the request.
    stop_reason: int | None = None
    # Prompt tokens taken from the prefix cache; sent with the first delta.
    num_cached_tokens: int = 0
    error: str | None = None
    # Beside an error: the core that worked on it is gone, and another one can do it.
    lost: bool = False
    # The vector or the scores of a pooling request: little-endian fp32.
    pooled: bytes | None = None


class RankStats(msgspec.Struct, array_like=True):
    """One rank at one moment: since its start, and seconds since it went from one step or collective to the next.

    collective_seconds_total: its host's time inside of collectives. *_bytes: memory that its process holds.
    """

    rank: int
    num_steps_total: int
    num_collectives_total: int
    seconds_since_progress: float
    collective_seconds_total: float
    host_bytes: int
    device_bytes: int


class EngineStats(msgspec.Struct):
    """Numbers of one moment, and counters since the start (`*_total`)."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    # time.monotonic() of the core at its last finished step: what `progressing` is judged by.
    seconds_since_last_step: float = 0.0
    # Of each pipeline stage, the share of the last seconds with steps in flight in which it computed nothing.
    stage_bubbles: list[float] = []
    ranks: list[RankStats] = []
    # Routed to each expert since the start, in all layers; empty without experts.
    expert_tokens_total: list[int] = []
    # While a step is awaited: since any rank showed a sign, in whatever layer or collective.
    seconds_without_progress: float = 0.0


class CoreReady(msgspec.Struct, tag="ready"):
    """The engine core is up: the model is loaded and the KV cache is sized."""

    generation: int
    max_model_len: int
    num_blocks: int
    block_size: int
    # Facts for the start-up message and /version: dtype, device, seconds to load, bytes of weights and cache …
    info: dict[str, Any]


class StartupProgress(msgspec.Struct, tag="progress"):
    """What the engine does while it comes up: a phase ("load weights"), done of total (bytes, layers …)."""

    phase: str
    done: int = 0
    total: int = 0


class CoreOutputs(msgspec.Struct, tag="outputs"):
    """The deltas of one step, and now and then the stats. replica: noted on arrival, where several cores send."""

    generation: int
    deltas: list[TokenDelta]
    stats: EngineStats | None = None
    replica: int = 0


class UtilityResult(msgspec.Struct, tag="utility_result"):
    call_id: int
    result: Any = None
    error: str | None = None


class CoreFailed(msgspec.Struct, tag="failed"):
    """The engine core cannot start or go on. `kind` is the name of the ShoalError class to raise."""

    kind: str
    message: str


CoreMessage = CoreReady | StartupProgress | CoreOutputs | UtilityResult | CoreFailed

# --- engine core -> workers ------------------------------------------------------------------------------------


class SlotAssignment(msgspec.Struct, array_like=True):
    """A request enters a slot of the workers' input batch: new, or back from a preemption.

    token_ids: all ids known to the host: prompt, then `len(token_ids) - num_prompt_tokens` output ids.
    """

    slot: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    pooling: PoolingParams | None = None
    adapter: AdapterRef | None = None


class SlotWork(msgspec.Struct, array_like=True):
    """What one slot does in this step.

    Computes positions [num_computed_tokens, num_computed_tokens + num_new_tokens). A position below the number of
    ids that the worker was given reads them; the next one reads the token that this slot sampled last, on the device.
    new_block_ids are appended to the slot's block table. `sample`: the last position's logits choose a token.
    """

    slot: int
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: list[int]
    sample: bool


class ScheduledBatch(msgspec.Struct, array_like=True):
    """One step. Order inside a worker: release slots, assign slots, then work."""

    step_id: int
    generation: int
    released_slots: list[int]
    assigned: list[SlotAssignment]
    work: list[SlotWork]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.work)


class SlotResult(msgspec.Struct, array_like=True):
    """What one slot sampled: 0..k token ids; prompt_logprobs for the prompt positions computed in this step.

    pooled: of a pooling request instead, see TokenDelta. error: why there is no result; the request ends with it.
    """

    slot: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None
    error: str | None = None


class BatchResult(msgspec.Struct, array_like=True):
    """The results of one step, one entry for each SlotWork with `sample` or with prompt log-probabilities."""

    step_id: int
    generation: int
    results: list[SlotResult]


# --- executor -> worker processes ------------------------------------------------------------------------------
# Steps go to every rank in one order, through shared memory on the executor's host and ZeroMQ to others.


class ExecuteStep(msgspec.Struct, tag="execute"):
    """Start the forward pass of a step."""

    batch: ScheduledBatch


class SampleStep(msgspec.Struct, tag="sample"):
    """Choose tokens for a step that was given before. grammar_masks: see `Executor.sample`."""

    step_id: int
    grammar_masks: dict[int, bytes] | None = None


class IdleStep(msgspec.Struct, tag="idle"):
    """Enter a collective of all ranks and answer IdleDone: so that a lost peer is found without traffic."""

    number: int


class StopWorker(msgspec.Struct, tag="stop"):
    """End the process. Nothing comes after it."""


StepMessage = ExecuteStep | SampleStep | IdleStep | StopWorker


class WorkerSetup(msgspec.Struct, tag="setup"):
    """The answer to WorkerHello once every rank has come: all that a worker needs to know.

    config: the EngineConfig as JSON. local_size: ranks on this host, those of other replicas counted. device_index: of
    the CUDA device among those that this process sees. several_hosts: whether ranks talk over a network. store_address,
    store_port: where rank 0 serves the store of the rendezvous. names: how to call each rank. environment: variables of
    the executor's host that count here unless they are set here.
    ring, ring_index, ring_size: address of the shared memory with the steps, which of its readers this is, and how many
    there are; empty: they come from `steps`, a ZeroMQ endpoint. results: address of the shared memory that takes the
    output rank's results; empty: they go over the link.
    """

    config: bytes
    local_size: int
    device_index: int
    several_hosts: bool
    store_address: str
    store_port: int
    names: dict[int, str]
    environment: dict[str, str]
    ring: str
    ring_index: int
    ring_size: int
    steps: str
    results: str


class AllocateCache(msgspec.Struct, tag="allocate"):
    """Every rank has loaded; this many blocks fit on all of them (the null block counted). Allocate and warm up."""

    num_blocks: int


class ExecutorBeat(msgspec.Struct, tag="executor_beat"):
    """The executor lives. Workers that are linked to it by a network, and hear nothing for long, end."""


WorkerOrder = WorkerSetup | AllocateCache | ExecutorBeat | StopWorker

# --- worker processes -> executor ------------------------------------------------------------------------------


class WorkerHello(msgspec.Struct, tag="hello"):
    """The first message of a worker.

    address, interface: of this host, where other ranks reach it. store_port: where rank 0 will serve the store (0 on
    other ranks). facts: what must be equal on all ranks (versions), by name; what takes torch or the config to know is
    compared when the ranks meet.
    """

    rank: int
    generation: int
    pid: int
    hostname: str
    host_identity: str
    address: str
    interface: str
    store_port: int
    facts: dict[str, str]


class WorkerProgress(msgspec.Struct, tag="worker_progress"):
    """A phase of this rank's start, done of total."""

    rank: int
    phase: str
    done: int = 0
    total: int = 0


class WorkerLoaded(msgspec.Struct, tag="loaded"):
    """The weights are in memory, and there is room for num_blocks blocks of KV cache. facts: for the start message."""

    rank: int
    num_blocks: int
    facts: dict[str, Any]


class WorkerReady(msgspec.Struct, tag="worker_ready"):
    """The KV cache is allocated, the model is warm. status_address: of this host's status board; empty for one rank."""

    rank: int
    facts: dict[str, Any]
    status_address: str


class StepDone(msgspec.Struct, tag="done"):
    """The result of a step, from the output rank."""

    result: BatchResult


class IdleDone(msgspec.Struct, tag="idle_done"):
    number: int


class WorkerBeat(msgspec.Struct, tag="beat"):
    """A worker that is linked by a network lives. status: its raw status record, empty before it has met the others;
    time: now, on the clock of the record."""

    rank: int
    status: bytes
    time: float


class WorkerExited(msgspec.Struct, tag="exited"):
    """From whoever watches a worker's process on another host: it has ended, and how ("was killed by signal 9")."""

    rank: int
    how: str


class WorkerFailed(msgspec.Struct, tag="worker_failed"):
    """This rank cannot start or go on. `kind`: the name of a ShoalError class."""

    rank: int
    kind: str
    message: str


WorkerMessage = (
    WorkerHello
    | WorkerProgress
    | WorkerLoaded
    | WorkerReady
    | StepDone
    | IdleDone
    | WorkerBeat
    | WorkerExited
    | WorkerFailed
)

# --- agents of other nodes (--nnodes) <-> launcher of node 0 -----------------------------------------------------


class NodeHello(msgspec.Struct, tag="node_hello"):
    """The first message of an agent. facts: what must be equal on all nodes (settings, the model's), by name."""

    node_rank: int
    hostname: str
    address: str
    pid: int
    facts: dict[str, str]


class NodeBeat(msgspec.Struct, tag="node_beat"):
    """The node lives."""


class NodeLeaving(msgspec.Struct, tag="node_leaving"):
    """The node was told to stop, and ends its workers."""

    reason: str


class NodeStopped(msgspec.Struct, tag="node_stopped"):
    """No worker of the node is left. Nothing comes after it."""


NodeMessage = NodeHello | NodeBeat | NodeLeaving | NodeStopped | WorkerExited


class NodeStart(msgspec.Struct, tag="node_start"):
    """The answer to NodeHello: start the workers of the node. endpoint: of the hub, see `executor.launcher`."""

    generation: int
    endpoint: str


class NodeRefused(msgspec.Struct, tag="node_refused"):
    """The other answer: the node is none of these."""

    reason: str


class NodeStop(msgspec.Struct, tag="node_stop"):
    """The engine ends, and workers have so long to end by themselves. reason: what failed; empty: nothing did."""

    grace_seconds: float
    reason: str


NodeOrder = NodeStart | NodeRefused | NodeStop | ExecutorBeat


# --- offline benchmark <-> its program, lines of JSON ----------------------------------------------------------


class BenchRequest(msgspec.Struct):
    """A prompt of token ids, and how many tokens must follow it."""

    prompt: list[int]
    num_output: int


class BenchOrder(msgspec.Struct, tag="bench_order"):
    """What the program shall measure. `options` are LLM's; `token_times`: when each token came, not only the whole."""

    options: dict[str, Any]
    requests: list[BenchRequest]
    temperature: float
    num_warmups: int
    num_runs: int
    token_times: bool


class BenchReady(msgspec.Struct, tag="bench_ready"):
    """The engine takes requests; `time` is CLOCK_MONOTONIC, which all processes of a host share."""

    time: float


class BenchRun(msgspec.Struct, tag="bench_run"):
    """One repetition: its seconds, and for each request [seconds since the start, tokens that came then] if asked."""

    seconds: float
    arrivals: list[list[tuple[float, int]]]
    is_warmup: bool


class BenchFailed(msgspec.Struct, tag="bench_failed"):
    """The program could not go on. kind: the name of an error of shoal.errors."""

    kind: str
    error: str


BenchNews = BenchReady | BenchRun | BenchFailed


class TrialOrder(msgspec.Struct, frozen=True):
    """From the doctor to one rank of an all-reduce that is tried (shoal.distributed.trial).

    backend: "gloo" or "nccl". address: of this rank's machine. names: of all ranks, for messages. timeout: seconds for
    each phase, and each operation.
    """

    backend: str
    rank: int
    address: str
    master_address: str
    master_port: int
    names: list[str]
    num_bytes: int
    timeout: float
    local_rank: int = 0
