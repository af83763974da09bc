"""Options of `shoal bench`: those of the engine, with defaults that fit measuring, and what is asked of it."""

from __future__ import annotations

import dataclasses

from shoal.benchmark.presets import LATENCY_PRESETS, PRESETS, THROUGHPUT_PRESETS
from shoal.config.options import CacheOptions, ModelOptions, ParallelOptions, SchedulerOptions, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchModelOptions(ModelOptions):
    """Which model, and how it is read."""

    model: str = option("auto", "A Hugging Face model directory, or shoal-tiny; auto: the preset's, else shoal-tiny.")
    skip_tokenizer_init: bool = option(True, "Load no tokenizer: prompts are token ids.")
    seed: int = option(0, "Seed of dummy weights and of the prompts.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchCacheOptions(CacheOptions):
    """The KV cache."""

    enable_prefix_caching: bool = option(False, "Reuse the KV cache of equal prompt beginnings.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchParallelOptions(ParallelOptions):
    """One model on many devices and machines."""

    tensor_parallel_size: int = option(
        0, "Ranks that share each layer; 0: as many as the preset is for, else 1.", short="tp", minimum=0
    )


BENCH_ENGINE_SECTIONS = (BenchModelOptions, BenchCacheOptions, SchedulerOptions, BenchParallelOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatOptions:
    """How it is measured and shown."""

    repeat: int = option(3, "Runs, of which the median is shown.", minimum=1)
    json: str | None = option(None, "File to write all figures to, as JSON.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupOptions:
    """The warm-up."""

    warmup: int = option(1, "Runs before those that count.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """The preset's size."""

    scale: float = option(
        1.0,
        "With --preset: this many times the layers, heads, hidden sizes, words and requests, to try it on a CPU.",
        minimum=0.001,
        maximum=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What is asked; tokens are drawn at random, and end tokens do not end a request."""

    requests: int | None = option(
        None, "How many; latency: in one batch.", aliases=("num_prompts", "batch_size"), minimum=1
    )
    prompt_tokens: str | None = option(
        None, "Length of a prompt: a number, or a range such as 100-1024.", aliases=("input_len",)
    )
    output_tokens: str | None = option(
        None, "Length of an answer: a number, or a range such as 100-1024.", aliases=("output_len",)
    )
    temperature: float | None = option(None, "0 is greedy; default: the preset's, else 0.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyPresetOptions:
    """The preset."""

    preset: str | None = option(
        None, "A named model shape with random weights, and its workload.", choices=tuple(LATENCY_PRESETS)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputPresetOptions:
    """The preset."""

    preset: str | None = option(
        None, "A named model shape with random weights, and its workload.", choices=tuple(THROUGHPUT_PRESETS)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartupPresetOptions:
    """The preset."""

    preset: str | None = option(None, "A named model shape with random weights.", choices=tuple(PRESETS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchDataOptions:
    """What is asked of the server."""

    dataset: str = option(
        "random",
        "random: prompts that share nothing; shared-prefix: with common beginnings; file: those of --file.",
        choices=("random", "shared-prefix", "file"),
    )
    file: str | None = option(
        None, "JSONL: in each line prompt, messages (OpenAI) or conversations (ShareGPT), and perhaps max_tokens."
    )
    requests: int | None = option(
        None, "How many; default 100, or each line of the file once.", aliases=("num_prompts",), minimum=1
    )
    prompt_tokens: str = option(
        "100-500", "Length of a random prompt, without its prefix: a number or a range.", aliases=("input_len",)
    )
    output_tokens: str | None = option(
        None,
        "Length of an answer (max_tokens): a number or a range; default 128, for a file what the server does.",
        aliases=("output_len",),
    )
    prompt_kind: str = option(
        "ids",
        "Random prompts are token ids, or text of common words, about a token each.",
        choices=("ids", "text"),
    )
    vocab_size: int = option(2000, "Random token ids are below this.", minimum=3)
    num_prefixes: int = option(4, "With shared-prefix: different beginnings.", minimum=1)
    prefix_tokens: int = option(256, "With shared-prefix: length of each beginning.", minimum=1)
    endpoint: str = option(
        "completions", "Where prompts go; conversations go to chat.", choices=("completions", "chat")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchLoadOptions:
    """How it is asked, measured and shown."""

    request_rate: float | None = option(None, "Requests a second, at random times (a Poisson process).")
    concurrency: int | None = option(
        None,
        "Most requests at a time; default 16 without a rate, else no limit.",
        aliases=("max_concurrency",),
        minimum=1,
    )
    warmup: int = option(1, "Requests before those that count.", minimum=0)
    slo: str | None = option(
        None,
        "What good requests keep, for goodput: ttft (first token), itl (mean between tokens), e2e (whole answer), "
        "such as ttft=200ms,itl=50ms.",
    )
    temperature: float = option(0.0, "0 is greedy.", minimum=0)
    ignore_eos: bool = option(
        True, "Ask for answers of full length (ignore_eos); turn it off for servers that do not know it."
    )
    continuous_usage: bool = option(
        False, "Ask for token counts in every chunk (continuous_usage_stats), for servers that put several in one."
    )
    extra_body: str | None = option(None, 'More fields of each request: a JSON object such as {"top_p": 0.9}.')
    request_timeout: float = option(600.0, "Seconds without a byte after which a request has failed.", minimum=0.001)
    seed: int = option(0, "Seed of prompts and of the times between requests.", minimum=0)
    json: str | None = option(None, "File to write all figures to, as JSON.")


# Those that the engine and the other commands do not have.
BENCH_SECTIONS = (
    StartupPresetOptions,
    ScaleOptions,
    RequestOptions,
    WarmupOptions,
    RepeatOptions,
    BenchDataOptions,
    BenchLoadOptions,
)
