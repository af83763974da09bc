"""What routing policies do to hit rate, time to first token and balance: a discrete simulation, no sockets, no model.

`python benchmarks/router_policies.py`. Each backend makes steps as an engine does (chunked prefill, a batch of decodes,
prefix blocks of 16 tokens evicted by least recent use); the router sees of it what a router sees: its own counts, and
the cached-token counts of answers. Everything is drawn from a seed.

2026-11, seed 0, 3000 requests each: prompt tokens found cached | time to first token, median and p95 | latency,
median and p95, ms | tokens of the most loaded backend by the mean's

    shared prefixes, 30 requests/s    round-robin                 45.8% |  119   353 | 1532  5874 | 1.02
    on 4 equal backends               least-outstanding-tokens    45.2% |  112   285 | 1536  5618 | 1.01
                                      prefix-aware                67.9% |   36   207 |  935  3496 | 1.21
                                      session-affinity            45.2% |  144   405 | 1644  5994 | 1.07
    one of 4 backends 3 x slower,     round-robin                  0.0% |  102  8155 | 1132 28836 | 1.01
    16 requests/s, nothing shared     least-connections            0.0% |   98   314 | 1000  4149 | 1.19
                                      least-outstanding-tokens     0.0% |   91   287 |  973  4469 | 1.20
                                      power-of-two                 0.0% |   98   345 | 1005  5743 | 1.15
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from random import Random

from shoal.router.policies import (
    POLICIES,
    BackendView,
    OutputEstimate,
    Policy,
    PolicyOptions,
    RequestView,
    TokenRatio,
    create_policy,
    read_prompt,
)
from shoal.stats import percentile

# An engine's step, after what an 8B model costs on one GPU: seconds for itself, per prompt token, per decoding request.
_STEP_SECONDS, _PREFILL_SECONDS, _DECODE_SECONDS = 0.008, 1 / 16_000, 0.000_1
_MAX_STEP_TOKENS, _MAX_RUNNING = 2048, 64
_BLOCK_TOKENS, _BYTES_PER_TOKEN = 16, 4


@dataclasses.dataclass
class Job:
    """A request of the trace: its prompt is `document` (shared, may be empty) and then a question of its own."""

    number: int
    arrival: float
    document: str
    question: str
    num_output: int
    session: str

    @property
    def body(self) -> dict[str, object]:
        messages = [{"role": "system", "content": self.document}, {"role": "user", "content": self.question}]
        return {"model": "m", "messages": messages}

    @property
    def num_prompt(self) -> int:
        return (len(self.document) + len(self.question)) // _BYTES_PER_TOKEN

    def cache_blocks(self) -> list[int]:
        """Of this process only: simulated engines need no hash that others know."""
        text = self.document + self.question
        size = _BLOCK_TOKENS * _BYTES_PER_TOKEN
        return [hash(text[:end]) for end in range(size, len(text), size)]


@dataclasses.dataclass
class Served:
    """What became of a job."""

    job: Job
    backend: int
    num_cached: int = 0
    first_token: float = 0.0
    end: float = 0.0
    to_prefill: int = 0
    num_generated: int = 0


class Engine:
    """One backend: steps over a batch, first come first served."""

    def __init__(self, slowness: float, num_cache_blocks: int) -> None:
        self.slowness = slowness
        self.running: list[Served] = []
        self.waiting: deque[Served] = deque()
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._num_cache_blocks = num_cache_blocks
        self._emitting: list[Served] = []

    def begin_step(self) -> float | None:
        """Seconds that the next step takes; None when there is nothing to do."""
        while self.waiting and len(self.running) < _MAX_RUNNING:
            served = self.waiting.popleft()
            blocks = served.job.cache_blocks()
            num_hit = next((n for n, block in enumerate(blocks) if block not in self._cache), len(blocks))
            served.num_cached = num_hit * _BLOCK_TOKENS
            served.to_prefill = served.job.num_prompt - served.num_cached
            for block in reversed(blocks):
                self._cache[block] = None
                self._cache.move_to_end(block)
            while len(self._cache) > self._num_cache_blocks:
                self._cache.popitem(last=False)
            self.running.append(served)
        if not self.running:
            return None
        budget = _MAX_STEP_TOKENS
        num_decodes = num_prefill = 0
        self._emitting = []
        for served in self.running:
            if served.to_prefill == 0:
                num_decodes += 1
                self._emitting.append(served)
            elif budget:
                chunk = min(served.to_prefill, budget)
                budget -= chunk
                num_prefill += chunk
                served.to_prefill -= chunk
                if served.to_prefill == 0:
                    self._emitting.append(served)
        return self.slowness * (_STEP_SECONDS + num_prefill * _PREFILL_SECONDS + num_decodes * _DECODE_SECONDS)

    def end_step(self, now: float) -> Iterator[Served]:
        """Those that have got a token by now."""
        for served in self._emitting:
            served.num_generated += 1
            if served.num_generated == 1:
                served.first_token = now
            if served.num_generated == served.job.num_output:
                served.end = now
                self.running.remove(served)
            yield served


class Router:
    """A policy and its counts, kept as the router keeps them."""

    def __init__(self, policy: Policy, num_backends: int) -> None:
        self.policy = policy
        self.views = [BackendView(f"http://backend-{index}") for index in range(num_backends)]
        self._requests: dict[int, tuple[RequestView, int]] = {}  # and the tokens it has outstanding
        self._ratio, self._outputs = TokenRatio(), OutputEstimate()

    def send(self, job: Job) -> int:
        shape = read_prompt("/v1/chat/completions", job.body)
        request = RequestView(
            request_id=str(job.number),
            session=job.session,
            blocks=shape.blocks,
            num_prompt_bytes=shape.num_bytes,
            num_prompt_tokens=self._ratio.estimate(shape.num_bytes),
            num_output_tokens=self._outputs.estimate(None),
        )
        chosen = self.policy.pick(request, self.views)
        view = self.views[chosen]
        view.num_running += 1
        view.outstanding_tokens += request.num_tokens
        self.policy.started(view.key, request)
        self._requests[job.number] = (request, request.num_tokens)
        return chosen

    def on_token(self, served: Served, seconds: float) -> None:
        request, left = self._requests[served.job.number]
        view = self.views[served.backend]
        done = 1 + (request.num_prompt_tokens if served.num_generated == 1 else 0)
        if served.end:
            done = left
            view.num_running -= 1
            self._ratio.learn(request.num_prompt_bytes, served.job.num_prompt)
            self._outputs.learn(served.job.num_output)
            self.policy.finished(view.key, request, served.num_cached, served.job.num_prompt, seconds)
            del self._requests[served.job.number]
        else:
            done = min(done, left)
            self._requests[served.job.number] = (request, left - done)
        view.outstanding_tokens -= done


@dataclasses.dataclass(frozen=True)
class Outcome:
    """hit_rate: cached tokens of all prompt tokens. load: the most loaded backend's tokens by the mean's."""

    hit_rate: float
    ttft_p50: float
    ttft_p95: float
    latency_p50: float
    latency_p95: float
    load: float

    def row(self) -> str:
        times = (self.ttft_p50, self.ttft_p95, self.latency_p50, self.latency_p95)
        return f"{self.hit_rate:6.1%} " + " ".join(f"{1000 * value:8.0f}" for value in times) + f" {self.load:7.2f}"


def make_trace(random: Random, num_jobs: int, rate: float, num_documents: int, shared: float) -> list[Job]:
    """Questions to documents of 1,000 to 3,000 tokens, some asked far more often than others (Zipf, exponent 0.9).

    shared: the part of the questions that are to a document; the others stand alone.
    """

    def text(num_tokens: int) -> str:
        return "".join(random.choices("abcdefghijklmnopqrstuvwxyz ", k=num_tokens * _BYTES_PER_TOKEN))

    documents = [text(random.randint(1000, 3000)) for _ in range(num_documents)]
    popularity = [1 / rank**0.9 for rank in range(1, num_documents + 1)]
    now = 0.0
    jobs = []
    for number in range(num_jobs):
        now += random.expovariate(rate)
        document = random.choices(range(num_documents), popularity)[0] if random.random() < shared else None
        jobs.append(
            Job(
                number,
                now,
                "" if document is None else documents[document],
                text(random.randint(20, 300) if document is not None else random.randint(200, 2000)),
                max(int(random.lognormvariate(4.2, 0.8)), 1),
                f"user-{random.randrange(200)}",
            )
        )
    return jobs


def simulate(policy: Policy, jobs: list[Job], slowness: list[float], num_cache_blocks: int) -> Outcome:
    """The trace through the policy to one backend for each number in `slowness`."""
    engines = [Engine(slow, num_cache_blocks) for slow in slowness]
    router = Router(policy, len(engines))
    stepping = [False] * len(engines)
    finished: list[Served] = []
    # (time, order, backend whose step ends or None, the job that comes)
    events: list[tuple[float, int, int | None, Job | None]] = [
        (job.arrival, order, None, job) for order, job in enumerate(jobs)
    ]
    order = len(events)
    while events:
        now, _, index, job = heapq.heappop(events)
        if job is not None:
            index = router.send(job)
            engines[index].waiting.append(Served(job, index))
        else:
            assert index is not None
            stepping[index] = False
            for served in engines[index].end_step(now):
                router.on_token(served, now - served.job.arrival)
                if served.end:
                    finished.append(served)
        if not stepping[index]:
            seconds = engines[index].begin_step()
            if seconds is not None:
                stepping[index] = True
                order += 1
                heapq.heappush(events, (now + seconds, order, index, None))
    assert len(finished) == len(jobs)
    return summarize(finished, len(engines))


def summarize(finished: list[Served], num_backends: int) -> Outcome:
    loads = [0] * num_backends
    for served in finished:
        loads[served.backend] += served.job.num_prompt + served.job.num_output
    ttft = [served.first_token - served.job.arrival for served in finished]
    latency = [served.end - served.job.arrival for served in finished]
    return Outcome(
        sum(served.num_cached for served in finished) / sum(served.job.num_prompt for served in finished),
        percentile(ttft, 0.5),
        percentile(ttft, 0.95),
        percentile(latency, 0.5),
        percentile(latency, 0.95),
        max(loads) / (sum(loads) / num_backends),
    )


def shared_prefixes(policy: Policy, seed: int, num_jobs: int = 3000, rate: float = 30.0) -> Outcome:
    """Four equal backends, 60 documents, a cache each that holds about 16 of them."""
    jobs = make_trace(Random(seed), num_jobs, rate, num_documents=60, shared=0.85)
    return simulate(policy, jobs, [1.0] * 4, num_cache_blocks=2000)


def one_slow(policy: Policy, seed: int, num_jobs: int = 3000, rate: float = 16.0) -> Outcome:
    """Four backends, one of them three times as slow; nothing is shared."""
    jobs = make_trace(Random(seed), num_jobs, rate, num_documents=1, shared=0.0)
    return simulate(policy, jobs, [3.0, 1.0, 1.0, 1.0], num_cache_blocks=2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rate", type=float, nargs="*", help="requests a second, of both traces")
    arguments = parser.parse_args()
    for title, scenario, rates in (
        ("shared prefixes, 4 equal backends", shared_prefixes, arguments.rate or [10.0, 30.0]),
        ("one of 4 backends 3 x slower", one_slow, arguments.rate or [16.0]),
    ):
        for rate in rates:
            print(
                f"\n{title}, {rate:g} requests/s   hit rate | TTFT p50, p95 | latency p50, p95, ms | most by mean load"
            )
            for name in POLICIES:
                policy = create_policy(name, PolicyOptions(), Random(arguments.seed))
                outcome = scenario(policy, arguments.seed, arguments.requests, rate)
                print(f"    {name:26}{outcome.row()}", flush=True)


if __name__ == "__main__":
    main()
