"""What a step costs the engine core itself, with an empty model: schedule, dispatch, update, encode.

    python benchmarks/core.py [--requests 64] [--steps 2000]

The executor answers at once with a fixed token, so that all the time left is the core's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from concurrent.futures import Future

import msgspec

from shoal.messages import BatchResult, CoreOutputs, ScheduledBatch, SlotResult
from shoal.scheduling import Scheduler, SchedulerConfig
from shoal.types import EngineRequest, SamplingParams


def answer(batch: ScheduledBatch) -> Future[BatchResult]:
    """What an empty model samples."""
    future: Future[BatchResult] = Future()
    results = [SlotResult(item.slot, [7]) for item in batch.work if item.sample]
    future.set_result(BatchResult(batch.step_id, batch.generation, results))
    return future


def measure(num_requests: int, num_steps: int, prompt_tokens: int) -> tuple[list[float], float]:
    """Seconds of each decode step of the core, and of the codec for the same step between core and a worker."""
    max_model_len = prompt_tokens + num_steps + 8
    config = SchedulerConfig(
        num_blocks=num_requests * (max_model_len // 16 + 2) + 1,
        block_size=16,
        max_model_len=max_model_len,
        max_num_seqs=num_requests,
        max_num_batched_tokens=8192,
    )
    scheduler = Scheduler(config)
    params = SamplingParams(max_tokens=num_steps + 4, ignore_eos=True)
    for index in range(num_requests):
        scheduler.add(EngineRequest(f"request-{index}", [index + 1] * prompt_tokens, params))
    encoder, results, seconds = msgspec.msgpack.Encoder(), deque[Future[BatchResult]](), []
    batch_bytes = b""
    while scheduler.num_unfinished:
        started = time.perf_counter()
        batch = scheduler.schedule()
        if batch is not None:
            results.append(answer(batch))
        if batch is None or len(results) >= 2:
            deltas = scheduler.update(results.popleft().result())
            encoder.encode(CoreOutputs(0, deltas))
        seconds.append(time.perf_counter() - started)
        if batch is not None and len(batch.work) == num_requests:
            batch_bytes = encoder.encode(batch)
    decoder = msgspec.msgpack.Decoder(ScheduledBatch)
    started = time.perf_counter()
    for _ in range(100):
        decoder.decode(batch_bytes)
    return seconds[5:-5], (time.perf_counter() - started) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    arguments = parser.parse_args()
    seconds, codec = measure(arguments.requests, arguments.steps, arguments.prompt_tokens)
    seconds.sort()
    print(f"{arguments.requests} running requests, {len(seconds)} steps, empty model")
    print(f"  core's own work per step: median {statistics.median(seconds) * 1e3:.3f} ms, ", end="")
    print(f"p99 {seconds[int(len(seconds) * 0.99)] * 1e3:.3f} ms")
    print(f"  decoding the step on a worker in another process: {codec * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
