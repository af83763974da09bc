"""Every knob, declared once. Flags, YAML keys and keyword arguments of LLM are derived from these dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.config.cache_dtypes import CACHE_DTYPES
from shoal.config.pooling import RUNNERS
from shoal.config.quantization import CHOICES as QUANTIZATIONS
from shoal.config.transformers_family import MODEL_IMPLS

EMBEDDED_MODEL = "shoal-tiny"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    short: str | None = None,
    aliases: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of an options class. The flag is the field's name with dashes; `short` and `aliases` are more spellings.

    Numbers below `minimum` or above `maximum` are refused.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "short": short,
        "aliases": aliases,
        "minimum": minimum,
        "maximum": maximum,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: str = option(EMBEDDED_MODEL, "A Hugging Face model directory, or shoal-tiny (embedded).")
    tokenizer: str | None = option(None, "Directory of the tokenizer; default: the model's.")
    skip_tokenizer_init: bool = option(False, "Offline use with token ids only: load no tokenizer.")
    dtype: str = option(
        "auto",
        "Data type of weights and activations.",
        choices=("auto", "float32", "float", "bfloat16", "float16", "half"),
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    max_model_len: int | None = option(
        None, "Longest sequence, prompt and output; default: the model's own.", minimum=1
    )
    seed: int = option(0, "Seed of dummy weights and of the seeds drawn for requests that bring none.", minimum=0)
    trust_remote_code: bool = option(
        False, "Let Python code from the model directory run: a tokenizer's, and with --model-impl a model's own."
    )
    model_impl: str = option(
        "auto",
        "shoal (or vllm): the family's native file; transformers: the model's own code in Transformers, with paged "
        "attention; auto: the native file where there is one.",
        choices=MODEL_IMPLS,
    )
    load_format: str = option(
        "auto",
        "auto: safetensors; pt: also .bin files (pickle: only from a source you trust); dummy: random weights.",
        choices=("auto", "safetensors", "pt", "dummy"),
    )
    quantization: str | None = option(
        None,
        "How the checkpoint is quantized; default: as its config says. fp8 and int8 also quantize a plain checkpoint "
        "while it is loaded.",
        choices=QUANTIZATIONS,
        short="q",
    )
    runner: str = option(
        "auto",
        "generate: text; pooling: vectors or scores of texts; auto: what the checkpoint is for.",
        choices=RUNNERS,
    )
    hf_overrides: str | dict[str, Any] | None = option(
        None, "Keys in place of config.json's, as a JSON object such as '{\"is_matryoshka\": true}'."
    )
    enable_lora: bool = option(False, "Take LoRA adapters, which requests name as their model.")
    max_loras: int = option(8, "Adapters that are loaded at a time; all of them may go into one step.", minimum=1)
    max_lora_rank: int = option(16, "The widest adapter's rank.", minimum=1, maximum=512)
    lora_modules: list[str] = option([], "Adapters to begin with, each as NAME=PATH.")
    enforce_eager: bool = option(False, "Do not capture CUDA graphs.")
    deterministic: bool | None = option(
        None, "A request's tokens do not depend on what it is batched with; default: on for shoal-tiny on CPU."
    )
    generation_config: str = option(
        "auto", "auto: defaults from the model's generation_config.json; shoal: none of it.", choices=("auto", "shoal")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The KV cache."""

    block_size: int = option(16, "Tokens per block of the KV cache: 8, 16, 32, 64, 128 or 256.", minimum=8, maximum=256)
    gpu_memory_utilization: float = option(
        0.9, "Share of the GPU's memory for weights, activations and KV cache.", minimum=0.01, maximum=1
    )
    kv_cache_memory: str | int | None = option(
        None,
        "KV cache size, such as 512MiB, 4GiB or a number of bytes; default on CPU: a share of the free memory.",
        aliases=("kv_cache_memory_bytes",),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Numbers of the KV cache. auto: the model's dtype, which may be named too (bfloat16, float16); fp8 (that is "
        "fp8_e4m3) and fp8_e5m2: 8 bits, so that twice as many tokens fit as with 16, for a little accuracy.",
        choices=tuple(CACHE_DTYPES),
    )
    num_gpu_blocks_override: int | None = option(
        None, "Number of KV cache blocks, whatever the memory says (for tests).", minimum=1
    )
    enable_prefix_caching: bool = option(True, "Reuse the KV cache of equal prompt beginnings.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How requests share the steps."""

    max_num_seqs: int | None = option(None, "Most requests in one step; default 256 on GPU, 64 on CPU.", minimum=1)
    max_num_batched_tokens: int | None = option(
        None, "Most tokens in one step; default 8192 on GPU, 2048 on CPU.", minimum=1
    )
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps, mixed with decodes.")
    long_prefill_token_threshold: int = option(
        0, "Longest piece of one prompt in a step; 0: up to max_num_batched_tokens.", minimum=0
    )
    scheduling_policy: str = option(
        "fcfs", "fcfs: by arrival; priority: by the request's priority, then arrival.", choices=("fcfs", "priority")
    )
    async_scheduling: bool = option(True, "Schedule the next step while this one runs.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """One model on many devices and machines."""

    tensor_parallel_size: int = option(1, "Ranks that share each layer.", short="tp", minimum=1)
    pipeline_parallel_size: int = option(
        1, "Pipeline stages: runs of layers, one after the other.", short="pp", minimum=1
    )
    data_parallel_size: int = option(
        1, "Replicas of the model behind this server, each with its own ranks.", short="dp", minimum=1
    )
    enable_expert_parallel: bool = option(
        False,
        "Tensor ranks share the experts of a layer whole, instead of a part of each; the rest of the layer is split as "
        "ever.",
        short="ep",
    )
    pipeline_layer_partition: str | list[int] | None = option(
        None, "Layers of each stage, such as 10,11,11; default: balanced, the head counted."
    )
    distributed_executor_backend: str = option(
        "auto",
        "Where ranks run. uni: in the engine's process; mp: subprocesses; ray: on a Ray cluster; auto: uni for one "
        "rank, mp where they fit this host, else ray.",
        choices=("auto", "uni", "mp", "ray"),
    )
    nodes: list[str] = option(
        [],
        "All machines of the model, each as HOST or HOST:PORT of its service: the same list on each, which finds "
        "itself by its addresses. The first holds the engine. Instead of --nnodes, --node-rank and --master-addr.",
    )
    communication_protocol: str = option(
        "auto",
        "How machines talk, with --nodes. tcp: sockets; rdma: InfiniBand or RoCE, which must be there; auto: NCCL's "
        "choice.",
        choices=("auto", "tcp", "rdma"),
    )
    communication_interface: str | None = option(
        None, "Network interface between machines, with --nodes; as NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME say it."
    )
    nnodes: int = option(1, "Machines without Ray: the same command on each, with its own --node-rank.", minimum=1)
    node_rank: int = option(0, "Which of the --nnodes machines this is; 0 serves.", minimum=0)
    master_addr: str | None = option(None, "Address of the machine with --node-rank 0.")
    master_port: int = option(
        29500, "Port on which --node-rank 0 takes the other machines in.", minimum=1, maximum=65535
    )
    token_file: str | None = option(
        None, "File with the cluster's token; default: SHOAL_CLUSTER_TOKEN, else ~/.shoal/cluster-token."
    )
    startup_timeout: float | None = option(
        None,
        "Seconds that each phase of the start may take; default 600, or TORCH_DISTRIBUTED_INIT_TIMEOUT.",
        minimum=1,
    )
    step_timeout: float | None = option(
        None, "Seconds that one step may take; default 300, or NCCL_TIMEOUT, or GLOO_TIMEOUT.", minimum=1
    )
    stall_timeout: float = option(
        5.0,
        "Seconds without a sign of any rank within a step, beyond what full steps take on a GPU, after which the "
        "engine is ended, and the server starts it again; 0: only --step-timeout counts.",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """What API server and router have alike: TLS, CORS, and the secret between them."""

    ssl_keyfile: str | None = option(None, "TLS key file (PEM).")
    ssl_certfile: str | None = option(None, "TLS certificate file (PEM); with it the server speaks https only.")
    ssl_ca_certs: str | None = option(None, "Certificates of the CAs (PEM) that sign clients' certificates.")
    ssl_cert_reqs: int | None = option(
        None,
        "Clients' certificates: 0: none are asked for; 1: checked where there is one; 2: needed. Default: 2 with "
        "--ssl-ca-certs, else 0.",
        minimum=0,
        maximum=2,
    )
    allowed_origins: list[str] = option(["*"], "CORS: origins of web pages that may call.")
    allowed_methods: list[str] = option(["*"], "CORS: methods that they may use.")
    allowed_headers: list[str] = option(["*"], "CORS: headers that they may send.")
    allow_credentials: bool = option(False, "CORS: they may send cookies and the like.")
    internal_token: str | None = option(
        None,
        "What a router shows its servers at /internal/… (16 characters or more). Default: one made from the cluster's "
        "token. A server without either is open there to API keys, or without these to this machine only.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions(HttpOptions):
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes any free one.", minimum=0, maximum=65535)
    served_model_name: list[str] = option([], "Names of the model in the API; default: the model argument.")
    skip_preflight: bool = option(
        False, "On several machines, start without looking first for what `shoal doctor --quick` finds."
    )
    model_label: str | None = option(None, "Any label of the model, such as large: the log names it.")
    api_key: list[str] = option([], "Keys that clients may present; default: none is asked for (or SHOAL_API_KEY).")
    max_request_bytes: int = option(16 * 1024 * 1024, "Largest request body.", minimum=1)
    max_num_waiting: int = option(4096, "Most requests queued; above, new ones get 503.", minimum=1)
    chat_template: str | None = option(None, "File with a Jinja chat template; default: the model's.")
    trust_request_chat_template: bool = option(
        False, "Let requests bring their own chat_template: a program, which can use up time and memory."
    )
    response_role: str = option("assistant", "Role of the answers in chat completions.")
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests have to finish after Ctrl-C or SIGTERM.", minimum=0
    )
    max_engine_restarts: int = option(
        5,
        "How often a lost engine core is started again within --engine-restart-window, while requests wait; 0: never. "
        "With --nnodes it is not: all nodes end.",
        minimum=0,
    )
    engine_restart_window: float = option(
        600.0, "Seconds of work after which a restart counts no more for --max-engine-restarts.", minimum=1
    )
    log_level: str = option(
        "info", "How much is logged.", choices=("debug", "info", "warning", "error"), aliases=("uvicorn_log_level",)
    )
    metrics_prefix: str = option(
        "shoal", "First word of the names in /metrics; vllm fits dashboards made for it.", choices=("shoal", "vllm")
    )
    disable_log_requests: bool = option(False, "Do not log a line for each request.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterOptions(HttpOptions):
    """The router. A config file holds these names too, and the lists backends, keys, aliases and golden."""

    backend: list[str] = option([], "Servers to route to, each as URL or URL=WEIGHT.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(9000, "Port to listen on; 0 takes any free one.", minimum=0, maximum=65535)
    policy: str = option(
        "least-outstanding-tokens",
        "How a server is chosen for a request: round-robin, weighted-round-robin, least-connections, "
        "least-outstanding-tokens, power-of-two, prefix-aware or session-affinity.",
    )
    by_speed: bool = option(False, "Policies with weights: multiply them by the measured speed.")
    load_factor: float | None = option(
        None, "prefix-aware, session-affinity: how far above the mean the preferred server's load may be.", minimum=1
    )
    max_blocks: int | None = option(None, "prefix-aware: blocks of prompts remembered of each server.", minimum=1)
    alias: list[str] = option([], "Further names of models, each as NAME=MODEL.")
    api_key: list[str] = option([], "Keys that clients may present; default: none is asked for (or SHOAL_API_KEY).")
    admin_key: str | None = option(
        None, "Key for /router/…; default: without one, only this machine may use these endpoints."
    )
    peer: list[str] = option(
        [],
        "URLs of the other routers, which are told of requests with an Idempotency-Key, to go on when this one ends.",
    )
    peer_key: str | None = option(None, "Key that these routers show each other; default: the admin key.")
    replicate_sync: bool = option(
        False, "Tell the other routers of each event before its client gets it, not within 50 ms of it."
    )
    resume_seconds: float = option(
        30.0,
        "Seconds that a request with an Idempotency-Key is kept while its client is away; 0: it is like any other.",
        minimum=0,
    )
    resume_buffer_bytes: int = option(
        256 * 1024, "Bytes of each such stream that are kept to be read again.", minimum=1024
    )
    resume_max_requests: int = option(4096, "Most such requests that are kept.", minimum=1)
    resume_max_bytes: int = option(256 * 1024 * 1024, "Most memory for them (an estimate).", minimum=1)
    backend_api_key: str | None = option(None, "Key that is presented to servers that have none of their own.")
    deadline: float = option(
        60.0, "Seconds that a request may be without progress; requests set theirs by x-shoal-deadline.", minimum=0.1
    )
    stall_timeout: float = option(
        5.0, "Seconds without a sign or without progress after which a server is left out.", minimum=0.1
    )
    probe_interval: float = option(1.0, "Seconds between two looks at a server's health.", minimum=0.01)
    golden_prompt: str = option(
        "on", "Whether a server must answer a fixed prompt as the others do before it enters.", choices=("on", "off")
    )
    max_running: int = option(1024, "Most requests forwarded at a time; others wait.", minimum=1)
    max_num_waiting: int = option(4096, "Most requests that wait; above, new ones get 503.", minimum=1)
    max_request_bytes: int = option(16 * 1024 * 1024, "Largest request body.", minimum=1)
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests have to finish after Ctrl-C or SIGTERM.", minimum=0
    )
    log_level: str = option("info", "How much is logged.", choices=("debug", "info", "warning", "error"))
    disable_log_requests: bool = option(False, "Do not log a line for each request.")
