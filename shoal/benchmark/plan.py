"""From what was asked for to what the benchmark's program is told: the model, LLM's options and the workload."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal import env
from shoal.benchmark.offline import NewsCallback, run_program
from shoal.benchmark.offline_report import Start
from shoal.benchmark.presets import PRESETS
from shoal.benchmark.workload import Range, TokenRequest, Workload
from shoal.config.model_config import load_model_config
from shoal.config.model_path import resolve_model_path
from shoal.config.options import EMBEDDED_MODEL
from shoal.errors import ConfigError

NO_MODEL = "auto"
# What compilers of kernels keep between two starts.
_CACHES = ("SHOAL_CACHE_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the command line says. None: the preset's, else the command's own default."""

    engine: Mapping[str, Any]
    default: Workload
    preset: str | None = None
    scale: float = 1.0
    num_requests: int | None = None
    prompt_tokens: Range | None = None
    output_tokens: Range | None = None
    temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """LLM's options with a model directory that is there, its number of token ids, and what is asked of it."""

    title: str
    options: dict[str, Any]
    vocab_size: int
    workload: Workload


@contextlib.contextmanager
def plan(wish: Wish) -> Iterator[Plan]:
    """Settle everything; a preset's directory is there inside of this. Raises ConfigError, ModelError."""
    options = dict(wish.engine)
    if wish.preset is None:
        if wish.scale != 1.0:
            raise ConfigError("--scale makes a preset smaller; name one with --preset")
        options["model"] = EMBEDDED_MODEL if options["model"] == NO_MODEL else options["model"]
        options["tensor_parallel_size"] = options["tensor_parallel_size"] or 1
        path = resolve_model_path(options["model"])
        if options["model"] != EMBEDDED_MODEL:  # that name also says that it is deterministic by default
            options["model"] = str(path)
        workload = _settle(wish, wish.default)
        yield Plan(Path(options["model"]).name, options, load_model_config(path).vocab_size, workload)
        return
    if options["model"] != NO_MODEL:
        raise ConfigError(f"--preset {wish.preset} brings its own model; leave out --model {options['model']}")
    if options["load_format"] not in ("auto", "dummy"):
        raise ConfigError(f"a preset has random weights; --load-format {options['load_format']} finds no files")
    preset = PRESETS[wish.preset].scaled(wish.scale)
    workload = _settle(wish, preset.workload)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as directory:
        preset.shape.write(Path(directory))
        if options["deterministic"] is None and preset.deterministic:
            options["deterministic"] = True
        options |= {
            "model": directory,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "tensor_parallel_size": options["tensor_parallel_size"] or preset.tensor_parallel_size,
            # The KV cache must hold a whole sequence: a row's, not the longest that the shape can do.
            "max_model_len": options["max_model_len"] or workload.longest,
        }
        name = preset.shape.name if wish.scale == 1.0 else f"{preset.shape.name} × {wish.scale:g}"
        yield Plan(f"{wish.preset} ({name})", options, preset.shape.vocab_size, workload)


def _settle(wish: Wish, default: Workload) -> Workload:
    """What was said, and `default` for the rest."""
    said: dict[str, Any] = {
        "num_requests": wish.num_requests,
        "prompt_tokens": wish.prompt_tokens,
        "output_tokens": wish.output_tokens,
        "temperature": wish.temperature,
    }
    return dataclasses.replace(default, **{name: value for name, value in said.items() if value is not None})


def cache_variables(caches: Path) -> dict[str, str]:
    """The environment in which all that an engine keeps for its next start lies in `caches`, but for models."""
    return {name: str(caches / name.lower()) for name in _CACHES} | {"HF_HUB_CACHE": str(env.hub_cache())}


def measure_start(
    options: Mapping[str, Any], caches: Path, vocab_size: int, on_news: NewsCallback | None = None
) -> Start:
    """Start an engine whose caches of compiled kernels lie in `caches`, ask one token of it, and end it."""
    environment = cache_variables(caches)
    request = TokenRequest([2 % vocab_size] * 8, 1)
    measured = run_program(options, [request], environment=environment, on_news=on_news)
    assert measured is not None, "a start on several machines"
    ready, runs = measured
    return Start(ready, runs[0].seconds)


def measure_starts(
    options: Mapping[str, Any], vocab_size: int, num_pairs: int, on_start: Callable[[str, Start], None]
) -> tuple[list[Start], list[Start]]:
    """`num_pairs` times: a start with empty caches, and one with what that left there. Raises what the engine raises.

    on_start: called with "cold" or "again" after each. Files that the kernel holds in memory stay there.
    """
    cold: list[Start] = []
    again: list[Start] = []
    for _ in range(num_pairs):
        with tempfile.TemporaryDirectory(prefix="shoal-bench-caches-") as directory:
            for starts, name in ((cold, "cold"), (again, "again")):
                starts.append(measure_start(options, Path(directory), vocab_size))
                on_start(name, starts[-1])
    return cold, again
