"""Options of `shoal plan`."""

from __future__ import annotations

import dataclasses

from shoal.cluster.plan import DEFAULT_CONCURRENCY, DEFAULT_MAX_MODEL_LEN
from shoal.config.cache_dtypes import CACHE_DTYPES
from shoal.config.options import EMBEDDED_MODEL, option
from shoal.config.quantization import CHOICES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The plan."""

    model: str = option(EMBEDDED_MODEL, "A Hugging Face model directory or its config.json, or shoal-tiny.")
    gpus: str | None = option(
        None,
        "The machine: 2x4xL20-46GiB (nodes x GPUs x name and memory), 8xH100-80, 4xH200, 1x24GB, 3xcpu-16c-32GB; "
        "default: this machine.",
    )
    cluster: bool = option(False, "Plan for the nodes of the cluster that runs.")
    node_link: str | None = option(
        None,
        "Link between nodes: 1gbe, 10gbe, 25gbe, 40gbe, 50gbe, 100gbe, 200gbe, or with RDMA 25g-rdma, 100g-rdma, "
        "200g-rdma, 400g-rdma; default: as shoal doctor measured it, else 10gbe.",
    )
    max_model_len: int | None = option(
        None,
        f"Longest sequence, prompt and output; default: {DEFAULT_MAX_MODEL_LEN}, or the model's own if that is less.",
        minimum=1,
    )
    concurrency: int = option(DEFAULT_CONCURRENCY, "Requests at a time that the machine shall hold.", minimum=1)
    prefer: str = option(
        "throughput",
        "What decides among layouts that fit. latency: a request alone; throughput: all of them.",
        choices=("latency", "throughput"),
    )
    quantization: str | None = option(
        None, "Plan as if the checkpoint were quantized so; default: as its config.json says.", choices=CHOICES
    )
    dtype: str = option(
        "auto", "Data type of weights and activations.", choices=("auto", "float32", "bfloat16", "float16")
    )
    kv_cache_dtype: str = option(
        "auto", "Data type of the KV cache; auto: that of activations.", choices=tuple(CACHE_DTYPES)
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory for weights, activations and KV cache.", minimum=0.01, maximum=1
    )
    all: bool = option(False, "Show all layouts that fit.")
    json: bool = option(False, "Print JSON instead of tables.")
