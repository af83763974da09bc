"""What pipeline stages give: output tokens per second of one rank and of several stages on the same requests, and how
long each stage computes. `python benchmarks/pipeline.py --help`.

All requests are there at the start; weights and token ids are random, every answer has the same length. The bubble is
the share of the time, from the first step to the last result, in which a stage does not compute.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.engine.core import make_scheduler_config
from shoal.executor.registry import make_executor
from shoal.messages import BatchResult
from shoal.scheduling import Scheduler
from shoal.types import EngineRequest, SamplingParams

# layers, hidden, ffn, heads, kv heads, head size, vocabulary
SHAPES = {
    "tiny": (8, 256, 1024, 4, 2, 64, 32000),
    "0.6b": (28, 1024, 3072, 16, 8, 128, 151936),
    "8b": (32, 4096, 14336, 32, 8, 128, 128256),
}
WARM_UP_REQUESTS = 4


def write_model(directory: Path, shape: str) -> None:
    layers, hidden, ffn, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def make_config(directory: Path, arguments: argparse.Namespace, pipeline_size: int) -> EngineConfig:
    options: dict[str, Any] = {
        "model": str(directory),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "load_format": "dummy",
        "deterministic": False,
        "enable_prefix_caching": False,
        "max_model_len": arguments.prompt + arguments.output + 16,
        "max_num_seqs": arguments.requests,
        "max_num_batched_tokens": arguments.batched_tokens,
        "pipeline_parallel_size": pipeline_size,
    }
    if pipeline_size > 1:
        options["distributed_executor_backend"] = "mp"
    return make_engine_config(**options)


class Engine:
    """Scheduler and executor, with as many steps in flight as the engine core has."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.executor = make_executor(config)
        facts = self.executor.start(lambda _: None)
        self._scheduler = Scheduler(make_scheduler_config(config, facts["num_blocks"]))
        self._in_flight: deque[Future[BatchResult]] = deque()
        self._num_requests = 0

    def serve(self, num_requests: int, num_prompt: int, num_output: int) -> float:
        """Serve so many requests to their ends; returns the seconds that took."""
        generator = random.Random(num_requests)
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        for _ in range(num_requests):
            ids = [generator.randrange(self.config.model.vocab_size) for _ in range(num_prompt)]
            self._num_requests += 1
            self._scheduler.add(EngineRequest(f"r{self._num_requests}", ids, params))
        most = self.config.parallel.pipeline_size + 1
        started = time.perf_counter()
        while self._scheduler.num_unfinished or self._in_flight:
            batch = self._scheduler.schedule()
            if batch is not None:
                self.executor.execute(batch)
                self._in_flight.append(self.executor.sample(batch.step_id))
            if self._in_flight and (batch is None or len(self._in_flight) >= most):
                self._scheduler.update(self._in_flight.popleft().result())
        return time.perf_counter() - started


def measure(directory: Path, arguments: argparse.Namespace, pipeline_size: int) -> float:
    engine = Engine(make_config(directory, arguments, pipeline_size))
    try:
        engine.serve(WARM_UP_REQUESTS, arguments.prompt, min(arguments.output, 8))
        time.sleep(0.5)  # stages tell what they have done with the next step
        before = engine.executor.stage_busy_seconds()
        seconds = engine.serve(arguments.requests, arguments.prompt, arguments.output)
        busy = [after - start for after, start in zip(engine.executor.stage_busy_seconds(), before, strict=True)]
    finally:
        engine.executor.shutdown()
    rate = arguments.requests * arguments.output / seconds
    total = arguments.requests * (arguments.prompt + arguments.output) / seconds
    bubbles = ", ".join(f"{1 - each / seconds:.0%}" for each in busy)
    print(
        f"{pipeline_size} stages: {rate:9.0f} output tokens/s, {total:9.0f} in all; bubble by stage: {bubbles or '–'}"
    )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(
        f"{arguments.shape} on {arguments.device}, {arguments.dtype}: {arguments.requests} requests of "
        f"{arguments.prompt} tokens in, {arguments.output} out, {arguments.batched_tokens} tokens a step"
    )
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), arguments.shape)
        rates = [measure(Path(name), arguments, stages) for stages in arguments.stages]
    for stages, rate in zip(arguments.stages[1:], rates[1:], strict=True):
        print(f"{stages} stages / {arguments.stages[0]}: {rate / rates[0]:.2f}")


if __name__ == "__main__":
    main()
