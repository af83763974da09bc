"""What pipeline stages give: tokens per second of one rank and of several stages on the same requests, in turns, and
the bubble of each stage. `scripts/bench pipeline --help`.

All requests are there at the start; weights and token ids are random, every answer has the same length. The bubble is
the share of the time, from the first request to the last token, in which a stage does not compute.

Tokens/s, prompts counted, 2 H200s of one host (NVLink), torch 2.11, 2026-11, --shape 8b --batched-tokens 4096
    requests · in · out        1 stage    2 stages             bubble by stage
    24 · 4096 · 1               34,402      62,079   1.80 ×          4 %, 19 %
    256 · 512 · 64              21,490      37,030   1.72 ×          2 %, 14 %
4 H200s, the last of these: 1 stage 21,390, 2 stages 36,794 (1.72 ×), 4 stages 45,282 (2.12 ×; 29 %, 20 %, 20 %, 41 %)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.engine.core import EngineCore
from shoal.executor.registry import make_executor
from shoal.messages import AddRequest, ClientMessage, CoreFailed, CoreMessage, CoreOutputs, Shutdown
from shoal.types import EngineRequest, SamplingParams

# layers, hidden, ffn, heads, kv heads, head size, vocabulary
SHAPES = {
    "tiny": (16, 512, 1536, 8, 4, 64, 4096),
    "0.6b": (28, 1024, 3072, 16, 8, 128, 151936),
    "8b": (32, 4096, 14336, 32, 8, 128, 128256),
}
_SETTLE_SECONDS = 1.5  # ranks tell what their last step took when they do the next, be it an empty one


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


def make_config(model: str, arguments: argparse.Namespace, num_stages: int) -> EngineConfig:
    several = num_stages * arguments.tensor_size > 1
    options: dict[str, Any] = {
        "model": model,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "load_format": "dummy",
        "deterministic": False,
        "enable_prefix_caching": False,
        "max_model_len": arguments.prompt + arguments.output + 16,
        "max_num_seqs": arguments.requests,
        "max_num_batched_tokens": arguments.batched_tokens,
        # All engines are there at once: each may fill its share of what those before it have left.
        "gpu_memory_utilization": 0.9 * (arguments.stages.index(num_stages) + 1) / len(arguments.stages),
        "pipeline_parallel_size": num_stages,
        "tensor_parallel_size": arguments.tensor_size,
        "distributed_executor_backend": arguments.backend if several else "uni",
    }
    if arguments.device == "cpu":
        tokens = 2 * arguments.requests * (options["max_model_len"] + 16)
        options["num_gpu_blocks_override"] = tokens // 16 + 1
    return make_engine_config(**options)


class Channel:
    """The core's channel inside this process: brings requests in, and tells when all have ended."""

    def __init__(self) -> None:
        self._incoming: deque[ClientMessage] = deque()
        self._news = threading.Event()
        self._num_running = 0
        self._all_done = threading.Event()
        self.failure: BaseException | None = None

    def serve(self, requests: list[EngineRequest]) -> float:
        """Returns the seconds to the last token."""
        self._num_running = len(requests)
        self._all_done.clear()
        started = time.perf_counter()
        self.push([AddRequest(request) for request in requests])
        self._all_done.wait()
        if self.failure is not None:
            raise SystemExit(f"the engine failed: {self.failure}")
        return time.perf_counter() - started

    def push(self, messages: list[ClientMessage]) -> None:
        self._incoming.extend(messages)
        self._news.set()

    def fail(self, error: BaseException) -> None:
        self.failure = error
        self._all_done.set()

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        while block and not self._incoming:
            self.wait(seconds)
            if seconds is not None:
                break
        return [self._incoming.popleft() for _ in range(len(self._incoming))]

    def wait(self, seconds: float | None = None) -> None:
        if not self._incoming:
            self._news.wait(seconds)
        self._news.clear()

    def wake(self) -> None:
        self._news.set()

    def send(self, message: CoreMessage) -> None:
        if isinstance(message, CoreFailed):
            self.fail(RuntimeError(message.message))
        elif isinstance(message, CoreOutputs):
            self._num_running -= sum(delta.finish_reason is not None for delta in message.deltas)
            if not self._num_running:
                self._all_done.set()


@dataclasses.dataclass
class Round:
    """One engine's turn: tokens per second, those of the prompts and of the answers, and each stage's bubble."""

    tokens_per_second: float
    output_per_second: float
    bubbles: list[float]


class Engine:
    """A core of so many stages in a thread of this process, its ranks where the executor puts them."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._executor = make_executor(config)
        self._channel = Channel()
        self._core = EngineCore(config, self._executor, self._channel)
        self._core.start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._core.run()
        except Exception as error:
            self._channel.fail(error)

    def serve(self, num_requests: int, num_prompt: int, num_output: int) -> Round:
        generator = random.Random(num_requests)
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        size = self._config.model.vocab_size
        requests = [
            EngineRequest(f"r{index}", [generator.randrange(size) for _ in range(num_prompt)], params)
            for index in range(num_requests)
        ]
        before = self._executor.stage_busy_seconds()
        seconds = self._channel.serve(requests)
        time.sleep(_SETTLE_SECONDS)
        busy = [now - then for now, then in zip(self._executor.stage_busy_seconds(), before, strict=True)]
        return Round(
            num_requests * (num_prompt + num_output) / seconds,
            num_requests * num_output / seconds,
            [1 - each / seconds for each in busy],
        )

    def close(self) -> None:
        self._channel.push([Shutdown()])
        self._thread.join()


def report(results: dict[int, list[Round]]) -> None:
    """Medians over the rounds, and ratios to the first engine round by round."""
    base = next(iter(results.values()))
    for num_stages, rounds in results.items():
        total = statistics.median(each.tokens_per_second for each in rounds)
        output = statistics.median(each.output_per_second for each in rounds)
        print(f"{num_stages} stage{'s' if num_stages > 1 else ' '}: {total:9.0f} tokens/s, {output:9.0f} of output")
        if rounds is not base:
            ratios = [own.tokens_per_second / other.tokens_per_second for own, other in zip(rounds, base, strict=True)]
            print(
                f"    {statistics.median(ratios):.2f} times the first ({' '.join(f'{ratio:.2f}' for ratio in ratios)})"
            )
        if rounds[0].bubbles:
            shares = [statistics.median(stage) for stage in zip(*(each.bubbles for each in rounds), strict=True)]
            print("    bubble by stage: " + ", ".join(f"{share:.1%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of a Llama with random weights")
    parser.add_argument("--model", help="instead of a shape: a directory with a config.json; weights are random too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", choices=["mp", "ray"], default="mp", help="where several ranks run")
    parser.add_argument("--repeats", type=int, default=3, help="the median is told")
    parser.add_argument("--partition", help="layers of each stage, such as 17,15")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], help="pipeline sizes to compare")
    parser.add_argument("--tensor-size", type=int, default=1, help="tensor ranks of every stage")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="most tokens in a step")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    arguments = parser.parse_args()
    print(
        f"{arguments.model or arguments.shape} on {arguments.device}, {arguments.dtype}: {arguments.requests} requests "
        f"of {arguments.prompt} tokens in, {arguments.output} out, {arguments.batched_tokens} tokens a step"
    )
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), arguments.shape)
        model = arguments.model or name
        engines = {size: Engine(make_config(model, arguments, size)) for size in arguments.stages}
        try:
            results: dict[int, list[Round]] = {size: [] for size in engines}
            for index in range(arguments.rounds + 1):
                for size, engine in engines.items():
                    result = engine.serve(arguments.requests, arguments.prompt, arguments.output)
                    if index:
                        results[size].append(result)
        finally:
            for engine in engines.values():
                engine.close()
    report(results)


if __name__ == "__main__":
    main()
