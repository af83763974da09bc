"""Whether the deterministic mode gives the same tokens and log-probabilities, to the bit, whatever else is different.

    python benchmarks/gpu_deterministic.py [--scale 1] [--device cuda]

The shape of Llama-3.1-8B in bfloat16 with random weights: 24 greedy prompts of 1 to 1,500 tokens, each alone; then
among 40 others, found in the prefix cache, in chunks of 512 tokens, and on two GPUs if there are two. The weights are
those of one seed in every run. Prints a line a run and exits with 1 where an answer differs from the one given alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from shoal import LLM, SamplingParams
from shoal.benchmark.presets import PRESETS

LENGTHS = (1, 2, 7, 16, 17, 33, 64, 100, 128, 129, 200, 255, 256, 257, 300, 400, 511, 513, 600, 777, 1000, 1024, 1300,
           1500)  # fmt: skip
NUM_OTHERS = 40
NUM_OUTPUT = 48
_MAX_MODEL_LEN = 2048

Answers = list[tuple[tuple[int, ...], str]]


def draw(count: int, lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    return [
        {"prompt_token_ids": [generator.randrange(vocab_size) for _ in range(lengths[index % len(lengths)])]}
        for index in range(count)
    ]


def ask(llm: LLM, prompts: list[Any]) -> Answers:
    """Of each of the prompts that count, which come first: its tokens and their log-probabilities, as text."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=1)
    outputs = llm.generate(prompts, params, use_tqdm=False)[: len(LENGTHS)]
    return [(tuple(output.outputs[0].token_ids), repr(output.outputs[0].logprobs)) for output in outputs]


def compare(name: str, found: Answers, expected: Answers, seconds: float) -> int:
    tokens = sum(one[0] != other[0] for one, other in zip(found, expected, strict=True))
    different = sum(one != other for one, other in zip(found, expected, strict=True))
    print(f"{name}: {tokens} of {len(found)} answers have other tokens, {different} other bits ({seconds:.1f} s)")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="a smaller model, to try the program itself")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    shape = PRESETS["lat8b"].shape.scaled(arguments.scale)
    probes = draw(len(LENGTHS), LENGTHS, shape.vocab_size, 1)
    others = draw(NUM_OTHERS, (350, 20, 1100, 3), shape.vocab_size, 2)
    num_different = 0
    with tempfile.TemporaryDirectory() as directory:
        shape.write(Path(directory))
        options: dict[str, Any] = {
            "model": directory, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "device": arguments.device, "deterministic": True, "max_model_len": _MAX_MODEL_LEN,
            "num_gpu_blocks_override": 6000,
        }  # fmt: skip
        with LLM(**options) as llm:
            started = time.perf_counter()
            alone = [answer for probe in probes for answer in ask(llm, [probe])]
            print(f"alone: {len(alone)} answers of {NUM_OUTPUT} tokens ({time.perf_counter() - started:.1f} s)")
            for name in ("among 40 others, prompts in the prefix cache", "among 40 others, the cache emptied"):
                started = time.perf_counter()
                num_different += compare(name, ask(llm, probes + others), alone, time.perf_counter() - started)
                llm.reset_prefix_cache()
        runs: dict[str, dict[str, Any]] = {
            "chunks of 512, 24 at a time": {"max_num_batched_tokens": 512, "max_num_seqs": 24}
        }
        if arguments.device == "cpu" or torch.cuda.device_count() > 1:
            runs["two ranks, among 40 others"] = {"tensor_parallel_size": 2}
            runs["two ranks, chunks of 300"] = {"tensor_parallel_size": 2, "max_num_batched_tokens": 300}
        for name, changes in runs.items():
            with LLM(**(options | changes)) as llm:
                started = time.perf_counter()
                num_different += compare(name, ask(llm, probes + others), alone, time.perf_counter() - started)
    print("all the same" if not num_different else f"{num_different} answers differ")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
