"""What sampling costs: milliseconds a step by rows, vocabulary and feature. `python benchmarks/sampler.py --help`.

`prepare` is the host's work with the slots unchanged; `rebuild` is prepare right after a request came or went; `sample`
is the rest of the step: sample and commit, on a GPU until it is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams

FEATURES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "temperature": {},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_k 20, top_p 0.8": {"top_k": 20, "top_p": 0.8},
    "top_p 0.95": {"top_p": 0.95},
    "all penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2},
    "logit_bias, bad words": {"logit_bias": {5: 1.0, 6: -1.0}, "bad_words_token_ids": [7, 8]},
}


def best_ms(
    call: Callable[[], object], device: torch.device, num_repeats: int, before: Callable[[], object] = lambda: None
) -> float:
    """Least time of a call, after two calls to warm up: what the work takes where nothing else runs.

    before: called ahead of each call, outside the time.
    """
    times = []
    for repeat in range(num_repeats + 2):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(
    num_rows: int, vocab_size: int, changes: dict[str, object], flatness: float, device: torch.device, num_repeats: int
) -> tuple[float, float, float]:
    """Milliseconds of prepare, prepare after a change, and sample + commit."""
    state, sampler = SamplingState(num_rows, vocab_size, device), Sampler()
    params = [SamplingParams(seed=row, **changes) for row in range(num_rows)]  # type: ignore[arg-type]
    for slot, item in enumerate(params):
        state.assign(slot, item, [1, 2, 3], 3)
    slots, positions = list(range(num_rows)), [3] * num_rows
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(device) * flatness
    scratch = torch.empty_like(logits)

    def rebuild() -> None:
        state.release(0)
        state.assign(0, params[0], [1, 2, 3], 3)
        state.prepare(slots, positions)

    rebuilt = best_ms(rebuild, device, num_repeats)
    prepared = best_ms(lambda: state.prepare(slots, positions), device, num_repeats)
    metadata = state.prepare(slots, positions)

    def step() -> None:
        state.commit(metadata, sampler.sample(scratch, metadata).token_ids)

    return prepared, rebuilt, best_ms(step, device, num_repeats, before=lambda: scratch.copy_(logits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--flatness", type=float, default=4.0, help="standard deviation of the logits (default: 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"device {device}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"milliseconds, best of {arguments.repeats}")
    print(f"{'rows':>5} {'vocabulary':>10}  {'feature':<24} {'prepare':>8} {'rebuild':>8} {'sample':>8}")
    for num_rows in arguments.rows:
        for vocab_size in arguments.vocab_size:
            for name, changes in FEATURES.items():
                figures = measure(num_rows, vocab_size, changes, arguments.flatness, device, arguments.repeats)
                columns = " ".join(f"{figure:8.3f}" for figure in figures)
                print(f"{num_rows:5} {vocab_size:10}  {name:<24} {columns}", flush=True)


if __name__ == "__main__":
    main()
