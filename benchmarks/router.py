"""What the router costs and what its policies are worth, over fake servers without a model (tests/router/fakes).

    python benchmarks/router.py [overhead] [prefixes] [speeds] [overload] [--seconds S] [--json FILE]

overhead: 128 streams at 50 tokens/s, first straight to a server, then through the router to the same server. A token's
delay is counted from its making in the engine; what the router adds is the difference of the two delays.
prefixes: requests that share long beginnings, over servers that cannot keep all of them: prefix-aware and round robin.
speeds: three servers of which one is three times as slow: least outstanding tokens and round robin.
overload: ten times what the servers can do. The router's memory is watched, and what becomes of each request.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from shoal.network import free_port  # noqa: E402
from shoal.network.http_server import loop_factory  # noqa: E402
from shoal.stats import percentile  # noqa: E402
from tests.router.fakes.process import FakeProcess, fake_servers  # noqa: E402
from tests.router.fakes.vocabulary import encode_text  # noqa: E402

LETTERS = encode_text("abcdefghijklmnopqrstuvwxyz")
STREAMS, TOKENS_PER_SECOND, TOKENS = 128, 50, 100


# --- the router ------------------------------------------------------------------------------------------------------
class Router:
    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self._process = psutil.Process(process.pid)

    def _all(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (one.cpu_times() for one in self._all()))

    def rss(self) -> int:
        return sum(one.memory_info().rss for one in self._all())


@contextlib.asynccontextmanager
async def router(servers: Sequence[FakeProcess], *flags: str) -> AsyncIterator[Router]:
    port = free_port()
    backends = [argument for server in servers for argument in ("--backend", server.url)]
    command = [sys.executable, "-m", "shoal.cli.main", "router", "--port", str(port), *backends]
    command += ["--log-level", "warning", "--disable-log-requests", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        await _until_up(url, process)
        yield Router(process, url)
    finally:
        process.terminate()
        process.wait(40)


async def _until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the router ended with exit code {process.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise SystemExit("the router did not come up within 30 s")


# --- a client that costs little --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Sent:
    """One request. arrivals: when each token came. A token is one letter here, so tokens are counted by the text.
    status: 0 where no answer began."""

    id: str
    began: float
    status: int = 0
    retry_after: bool = False
    arrivals: list[float] = dataclasses.field(default_factory=list)
    whole: bool = False
    ended: float = 0.0

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.began


_numbers = itertools.count()
_BENCH_ID = re.compile(r"bench-\d+-end")
_TEXT = re.compile(rb'"text":"([a-z]+)"')
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


def body_of(prompt: str, num_tokens: int) -> bytes:
    content = {
        "model": "fake", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0,
        "allowed_token_ids": LETTERS, "stream": True,
    }  # fmt: skip
    return json.dumps(content).encode()


class _Connection(asyncio.Protocol):
    """Keeps the pieces of an answer with their times, no more: the client shares the cores with what it measures."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.Event()
        self.lost = False
        self._left: int | None = None  # bytes of a body whose length is known

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> None:
        self.pieces, self._left = [], None
        self.ended.clear()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if len(self.pieces) == 1 and (length := _LENGTH.search(data)):
            self._left = int(length[1]) + data.index(b"\r\n\r\n") + 4
        if self._left is not None:
            self._left -= len(data)
        if self._left == 0 or (self._left is None and data.endswith(b"0\r\n\r\n")):  # no event ends so
            self.ended.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self.ended.set()


class Client:
    """Connections to one server, each used again when its answer is whole."""

    def __init__(self, url: str) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self._free: list[_Connection] = []

    async def stream(self, body: bytes) -> Sent:
        sent = Sent(f"bench-{next(_numbers)}-end", time.monotonic())
        head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        try:
            connection = await self._take()
        except OSError:
            sent.ended = time.monotonic()
            return sent
        head += f"x-request-id: {sent.id}\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.send(head.encode() + body)
        try:
            async with asyncio.timeout(300):
                await connection.ended.wait()
        finally:
            sent.ended = time.monotonic()
            if not connection.lost and connection.ended.is_set():
                self._free.append(connection)
            else:
                connection.transport.close()
        _read(sent, connection.pieces)
        return sent

    async def _take(self) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if not connection.lost:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, int(self._port))
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.transport.close()


def _read(sent: Sent, pieces: Sequence[tuple[float, bytes]]) -> None:
    """What an answer said, and when each of its tokens came."""
    whole = b"".join(data for _, data in pieces)
    head = whole[: whole.find(b"\r\n\r\n") + 4]
    if not head:
        return
    sent.status = int(head.split(b" ", 2)[1])
    sent.retry_after = b"\r\nretry-after: " in head.lower()
    sent.whole = b"data: [DONE]\n\n" in whole[-64:]
    ends = list(itertools.accumulate(len(data) for _, data in pieces))
    for text in _TEXT.finditer(whole):
        event_end = whole.find(b"\n\n", text.end()) + 2
        if event_end > 1:  # else it was cut off
            when = pieces[bisect.bisect_left(ends, event_end)][0]
            sent.arrivals += [when] * len(text[1])


# --- overhead --------------------------------------------------------------------------------------------------------
async def overhead(seconds: float) -> dict[str, Any]:
    """With all tokens of a step at one time, as one engine makes them, and spread as by eight; by frames and text."""
    forms = itertools.product(("native", "foreign"), (1, 8))
    return {f"{kind}, {phases} phases": await _overhead(seconds, kind, phases) for kind, phases in forms}


async def _overhead(seconds: float, kind: str, phases: int) -> dict[str, Any]:
    options = {"tokens_per_second": TOKENS_PER_SECOND, "max_num_seqs": 2 * STREAMS, "num_phases": phases}
    figures: dict[str, Any] = {}
    with fake_servers(kind, records_times=True, **options) as (server,):
        program = psutil.Process(server.process.pid)
        async with router([server]) as through:
            for name, url in (("direct", server.url), ("router", through.url)):
                await _many_streams(url, 2.0)  # imports, connections
                cpu, server_cpu, began = through.cpu_seconds(), _cpu_seconds(program), time.monotonic()
                sent = await _many_streams(url, seconds)
                busy, elapsed = through.cpu_seconds() - cpu, time.monotonic() - began
                server_cpu = _cpu_seconds(program) - server_cpu
                first, later = _delays(sent, server.token_times())
                broken = sum(not one.whole or len(one.arrivals) != TOKENS for one in sent)
                num_tokens = sum(len(one.arrivals) for one in sent)
                figures[name] = {
                    "streams": len(sent), "broken": broken, "tokens per second": num_tokens / elapsed,
                    "router cores": busy / elapsed, "router cpu per token": busy / num_tokens,
                    "server cpu per token": server_cpu / num_tokens,
                    "first token": _quantiles([one.first for one in sent if one.arrivals]),
                    "first token after its step": _quantiles(first), "later tokens after their step": _quantiles(later),
                }  # fmt: skip
    added = {
        name: {which: figures["router"][name][which] - figures["direct"][name][which] for which in ("p50", "p99")}
        for name in ("first token", "first token after its step", "later tokens after their step")
    }
    rows = [
        [name, *(f"{figures[way][name][which] * 1000:.2f}" for way in ("direct", "router") for which in ("p50", "p99"))]
        + [f"{added[name]['p50'] * 1000:+.2f}", f"{added[name]['p99'] * 1000:+.2f}"]
        for name in added
    ]
    heads = ["ms", "direct p50", "direct p99", "router p50", "router p99", "added p50", "added p99"]
    steps = "all tokens of a step at once" if phases == 1 else f"tokens spread as by {phases} engines"
    _print_table(f"{STREAMS} streams × {TOKENS_PER_SECOND} tokens/s from a {kind} server, {steps}", heads, rows)
    direct, routed = figures["direct"], figures["router"]
    print(
        f"the router: {routed['router cores']:.2f} cores, {routed['router cpu per token'] * 1e6:.0f} µs of CPU a token "
        f"of {routed['tokens per second']:.0f} a second; the server: {direct['server cpu per token'] * 1e6:.0f} µs a "
        f"token direct, {routed['server cpu per token'] * 1e6:.0f} µs through the router; broken streams: "
        f"{direct['broken']} direct, {routed['broken']} through the router\n"
    )
    return {"added seconds": added, **figures}


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _many_streams(url: str, seconds: float) -> list[Sent]:
    """So many streams at a time, each followed by another; they do not begin together."""
    done: list[Sent] = []
    until = time.monotonic() + seconds

    async def one_after_the_other(number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.uniform(0, min(1.0, seconds / 2)))
        while time.monotonic() < until:
            done.append(await client.stream(body_of(f"stream {number} {rng.random()}", TOKENS)))
            await asyncio.sleep(rng.uniform(0, 0.04))  # or all keep to the engine's steps for ever

    client = Client(url)
    await asyncio.gather(*map(one_after_the_other, range(STREAMS)))
    client.close()
    return done


def _delays(sent: Sequence[Sent], made: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Seconds from the making of a token to its arrival, of first and of later tokens."""
    times_of = {match[0]: times for name, times in made.items() if (match := _BENCH_ID.search(name))}
    first: list[float] = []
    later: list[float] = []
    for one in sent:
        times = times_of[one.id]
        if len(one.arrivals) == len(times) == TOKENS:
            delays = [when - began for when, began in zip(one.arrivals, times, strict=True)]
            first.append(delays[0])
            later += delays[1:]
    return first, later


# --- policies --------------------------------------------------------------------------------------------------------
async def _open_loop(url: str, requests: Sequence[tuple[float, bytes]]) -> list[Sent]:
    """Send each at its time, whatever became of those before."""
    began = time.monotonic()

    async def at(when: float, body: bytes) -> Sent:
        await asyncio.sleep(max(0.0, began + when - time.monotonic()))
        return await client.stream(body)

    client = Client(url)
    sent = await asyncio.gather(*(at(when, body) for when, body in requests))
    client.close()
    return list(sent)


def _counters(server: FakeProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    names = ("prefix_cache_hits_total", "prefix_cache_queries_total", "generation_tokens_total")
    return {name: float(re.search(rf"^shoal:{name}\S* (\S+)$", text, re.MULTILINE)[1]) for name in names}  # type: ignore[index]


async def _compare(
    kinds: Sequence[dict[str, Any]], policies: Sequence[str], requests: Sequence[tuple[float, bytes]]
) -> dict[str, Any]:
    """The same requests under each policy, each time over new servers. kinds: options of each server."""
    figures: dict[str, Any] = {}
    for policy in policies:
        servers = [FakeProcess("native", **options) for options in kinds]
        try:
            async with router(servers, "--policy", policy, "--golden-prompt", "off") as through:
                sent = await _open_loop(through.url, requests)
            counts = [_counters(server) for server in servers]
        finally:
            for server in servers:
                server.end()
        # What a server had to compute: prompts as far as they were not cached, and every token of the answers.
        loads = [
            one["prefix_cache_queries_total"] - one["prefix_cache_hits_total"] + one["generation_tokens_total"]
            for one in counts
        ]
        tokens = [one["prefix_cache_queries_total"] + one["generation_tokens_total"] for one in counts]
        queries = sum(one["prefix_cache_queries_total"] for one in counts)
        good = [one for one in sent if one.whole]
        figures[policy] = {
            "requests": len(sent), "failed": len(sent) - len(good),
            "hit rate": sum(one["prefix_cache_hits_total"] for one in counts) / queries,
            "first token": _quantiles([one.first for one in good]),
            "whole answer": _quantiles([one.ended - one.began for one in good]),
            "max / mean of tokens served": max(tokens) / statistics.mean(tokens),
            "max / mean of tokens computed": max(loads) / statistics.mean(loads),
        }  # fmt: skip
    return figures


def _print_policies(title: str, figures: dict[str, Any]) -> None:
    heads = [
        "policy", "requests", "failed", "hit rate", "first token p50 ms", "p95", "answer p50 ms", "p95",
        "max/mean served", "max/mean computed",
    ]  # fmt: skip
    rows = []
    for policy, own in figures.items():
        waits = [own[name][which] for name in ("first token", "whole answer") for which in ("p50", "p95")]
        balance = [own["max / mean of tokens served"], own["max / mean of tokens computed"]]
        rows.append(
            [policy, str(own["requests"]), str(own["failed"]), f"{own['hit rate']:.1%}"]
            + [f"{wait * 1000:.0f}" for wait in waits]
            + [f"{value:.2f}" for value in balance]
        )
    _print_table(title, heads, rows)


async def prefixes(seconds: float) -> dict[str, Any]:
    rng = random.Random(5)
    beginnings = ["".join(rng.choices("abcdefghij ", k=1200)) for _ in range(24)]
    popularity = [1 / (rank + 3) for rank in range(len(beginnings))]
    requests, when = [], 0.0
    while when < seconds:
        when += rng.expovariate(10)
        prompt = rng.choices(beginnings, popularity)[0] + "".join(rng.choices("klmnop", k=60))
        requests.append((when, body_of(prompt, rng.randint(20, 60))))
    # A third of the beginnings fit the cache of one server.
    options = {
        "tokens_per_second": 50, "prompt_tokens_per_second": 6000, "num_blocks": 900, "max_num_seqs": 32,
    }  # fmt: skip
    figures = await _compare([options] * 4, ("round-robin", "least-outstanding-tokens", "prefix-aware"), requests)
    _print_policies("24 shared beginnings of 1200 tokens, 4 servers, 10 requests/s", figures)
    return figures


async def speeds(seconds: float) -> dict[str, Any]:
    rng = random.Random(6)
    requests, when = [], 0.0
    while when < seconds:
        when += rng.expovariate(14)
        prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(20, 200)))
        requests.append((when, body_of(prompt, rng.choice((10, 20, 40, 80)))))
    quick = {"tokens_per_second": 60, "max_num_seqs": 8, "prompt_tokens_per_second": 6000}
    slow = {**quick, "tokens_per_second": 20, "prompt_tokens_per_second": 2000}
    figures = await _compare([quick, quick, slow], ("round-robin", "least-outstanding-tokens"), requests)
    _print_policies("3 servers, one of them 3 times as slow, 14 requests/s", figures)
    return figures


# --- overload --------------------------------------------------------------------------------------------------------
async def overload(seconds: float) -> dict[str, Any]:
    slots, num_tokens = 8, 25
    capacity = 2 * slots * TOKENS_PER_SECOND / num_tokens
    rng = random.Random(7)
    requests, when = [], 0.0
    while when < seconds:
        when += rng.expovariate(10 * capacity)
        requests.append((when, body_of(f"overload {rng.random()}", num_tokens)))
    memory: list[int] = []
    options = {"tokens_per_second": TOKENS_PER_SECOND, "max_num_seqs": slots}
    with fake_servers("native", "native", **options) as servers:
        async with router(servers, "--max-running", str(2 * slots), "--max-num-waiting", "64") as through:
            await _open_loop(through.url, [(0.0, body_of("imports", num_tokens))])
            watching = asyncio.create_task(_watch(through, memory))
            sent = await _open_loop(through.url, requests)
            await asyncio.sleep(2)
            watching.cancel()
    kinds = Counter(_kind(one) for one in sent)
    served = [one for one in sent if one.status == 200]
    figures = {
        "requests": len(sent), "capacity per second": capacity, "kinds": dict(kinds),
        "rss at the start": memory[0], "rss after half the time": memory[len(memory) // 2],
        "rss at the end": memory[-1], "rss at most": max(memory),
        "served per second": len(served) / seconds,
        "whole answer": _quantiles([one.ended - one.began for one in served if one.whole]),
        "refusal": _quantiles([one.ended - one.began for one in sent if one.status in (429, 503)]),
    }  # fmt: skip
    rows = [[name, str(count)] for name, count in sorted(kinds.items())]
    rows += [[name, f"{figures[name] / 2**20:.0f} MiB"] for name in figures if name.startswith("rss")]
    rows += [["served a second", f"{figures['served per second']:.1f} of {capacity:.0f}"]]
    for name in ("whole answer", "refusal"):
        rows += [[f"{name} p50, p99", " ".join(f"{figures[name][which]:.3f} s" for which in ("p50", "p99"))]]
    _print_table(f"10 × the capacity for {seconds:g} s: {len(sent)} requests", ["", ""], rows)
    return figures


async def _watch(through: Router, memory: list[int]) -> None:
    while True:
        memory.append(through.rss())
        await asyncio.sleep(0.25)


def _kind(one: Sent) -> str:
    if one.status == 200:
        return "accepted and whole" if one.whole else "accepted and broken"
    if one.status in (429, 503):
        return f"{one.status} with{'' if one.retry_after else 'out'} Retry-After"
    return f"status {one.status}" if one.status else "no answer"


# --- all together ----------------------------------------------------------------------------------------------------
def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{share}": percentile(ordered, share / 100) for share in (50, 95, 99)} if ordered else {}


def _print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    print(title)
    for row in (heads, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


PARTS = {
    "overhead": (overhead, 20.0),
    "prefixes": (prefixes, 40.0),
    "speeds": (speeds, 40.0),
    "overload": (overload, 60.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, help="how long each measurement runs; default: its own time")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}, but {', '.join(PARTS)}")
    figures = {}
    for part in arguments.parts or PARTS:
        measure, own_seconds = PARTS[part]
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            figures[part] = runner.run(measure(arguments.seconds or own_seconds))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
