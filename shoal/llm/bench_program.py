"""`python -m shoal.llm.bench_program`: the engine's side of the offline benchmarks, a process of its own.

`shoal.benchmark.offline` starts it. In: one line of JSON on standard input, a BenchOrder; then it stays open, and its
end ends the program. Out: lines of JSON on standard output: BenchReady, a BenchRun for each repetition, or BenchFailed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from shoal import log
from shoal.engine.prepare import PreparedRequest
from shoal.errors import EngineError
from shoal.llm.llm import LLM
from shoal.messages import BenchFailed, BenchOrder, BenchReady, BenchRun
from shoal.network.child_program import do_order
from shoal.types.outputs import FinishReason
from shoal.types.sampling_params import SamplingParams


class BenchProgram:
    """An LLM and the order that it is measured by."""

    def __init__(self, llm: LLM, order: BenchOrder) -> None:
        self._llm = llm
        self._order = order
        self._prompts = [request.prompt for request in order.requests]
        self._params = [
            SamplingParams(
                temperature=order.temperature, max_tokens=request.num_output, ignore_eos=True, detokenize=False
            )
            for request in order.requests
        ]

    def run(self, is_warmup: bool) -> BenchRun:
        """All requests once, at the same time. Raises EngineError when one has not as many tokens as it should."""
        started = time.perf_counter()
        arrivals = self._stream_all(started) if self._order.token_times else self._collect_all()
        seconds = time.perf_counter() - started
        for request, times in zip(self._order.requests, arrivals, strict=True):
            num_tokens = sum(count for _, count in times)
            if num_tokens != request.num_output:
                raise EngineError(f"a request ended after {num_tokens} of {request.num_output} tokens")
        return BenchRun(seconds, arrivals if self._order.token_times else [], is_warmup)

    def _collect_all(self) -> list[list[tuple[float, int]]]:
        outputs = self._llm.generate(self._prompts, self._params, use_tqdm=False)
        return [[(0.0, len(output.outputs[0].token_ids))] for output in outputs]

    def _stream_all(self, started: float) -> list[list[tuple[float, int]]]:
        """For each request the seconds since `started` at which tokens came, and how many."""
        offline = self._llm._engine
        engine = offline.engine

        async def stream(prepared: PreparedRequest) -> list[tuple[float, int]]:
            times: list[tuple[float, int]] = []
            async for update in engine.stream(prepared):
                if update.finish_reason is FinishReason.ERROR:
                    raise EngineError(update.error or "the engine failed on a request")
                if update.token_ids:
                    times.append((time.perf_counter() - started, len(update.token_ids)))
            return times

        async def stream_all() -> list[list[tuple[float, int]]]:
            prepared = [
                engine.prepare(prompt, params) for prompt, params in zip(self._prompts, self._params, strict=True)
            ]
            return await asyncio.gather(*map(stream, prepared))

        return offline.run(stream_all())


def main() -> int:
    """Do the order on standard input; returns the exit code."""
    log.configure()
    return do_order(BenchOrder, _measure, BenchFailed)


def _measure(order: BenchOrder, say: Callable[[BenchReady | BenchRun], None]) -> None:
    with LLM(**order.options) as llm:
        say(BenchReady(time.monotonic()))
        program = BenchProgram(llm, order)
        for index in range(order.num_warmups + order.num_runs):
            say(program.run(is_warmup=index < order.num_warmups))


if __name__ == "__main__":
    sys.exit(main())
