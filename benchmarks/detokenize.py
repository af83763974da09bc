"""What a token costs the API process once it left the engine core: decode the message, fold to text, wake the consumer.

    python benchmarks/detokenize.py [--model DIRECTORY] [--streams 64] [--tokens 512]

A client that has all messages ready stands in for the core, so that all the time is this process's own, on one core.
Each step brings one token of every stream, as a core does; each stream has a consumer that takes every update.
The goal is 20,000 tokens/s, HTTP included: a line with 50,000 leaves three fifths of the time for HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.config.model_path import resolve_model_path
from shoal.config.resolve import make_engine_config
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import EngineClient, ProgressCallback
from shoal.engine.tokenizer import Tokenizer, load_tokenizer
from shoal.messages import AddRequest, ClientMessage, CoreMessage, CoreOutputs, CoreReady, TokenDelta
from shoal.types import FinishReason, SamplingParams

TEXT = (
    "Beijing is the capital of China, and Xi'an keeps its old city wall. 给我推荐中国适合旅游的地方：北京、西安、"
    "成都和杭州都很好。 12 + 30 = 42 😀\n"
)


class ReadyClient(EngineClient):
    """Has the bytes of all steps ready; decodes one message per `receive`, as the real client does."""

    def __init__(self, config: EngineConfig, ids: list[int], num_tokens: int, num_streams: int) -> None:
        self._config = config
        self._decoder = msgspec.msgpack.Decoder(CoreMessage)
        self._ids, self._num_tokens, self._num_streams = ids, num_tokens, num_streams
        self._request_ids: list[str] = []
        self._messages: deque[bytes] = deque()
        self._all_there = asyncio.Event()

    @property
    def ready(self) -> CoreReady:
        return CoreReady(0, self._config.max_model_len, 1, 16, {})

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        return self.ready

    async def send(self, message: ClientMessage) -> None:
        if isinstance(message, AddRequest):
            self._request_ids.append(message.request.request_id)
        if len(self._request_ids) == self._num_streams and not self._messages:
            encoder = msgspec.msgpack.Encoder()
            self._messages.extend(encoder.encode(self._step(index)) for index in range(self._num_tokens))
            self._all_there.set()

    def _step(self, index: int) -> CoreOutputs:
        reason = FinishReason.LENGTH if index == self._num_tokens - 1 else None
        deltas = [
            TokenDelta(request_id, [self._ids[(index + shift) % len(self._ids)]], finish_reason=reason)
            for shift, request_id in enumerate(self._request_ids)
        ]
        return CoreOutputs(0, deltas)

    async def receive(self) -> CoreOutputs:
        await self._all_there.wait()
        if not self._messages:
            await asyncio.Event().wait()
        message = self._decoder.decode(self._messages.popleft())
        assert isinstance(message, CoreOutputs)
        return message

    async def utility(self, call: str) -> Any:
        return None

    async def close(self, drain_seconds: float = 0.0) -> None:
        return None

    @property
    def all_there(self) -> asyncio.Event:
        return self._all_there


async def through_engine(
    config: EngineConfig, tokenizer: Tokenizer, num_streams: int, num_tokens: int, **params: Any
) -> tuple[float, int]:
    """Seconds and number of updates from the first message to the last consumer's end."""
    client = ReadyClient(config, tokenizer.encode(TEXT), num_tokens, num_streams)
    engine = AsyncEngine(client, config, tokenizer)
    num_updates = 0

    async def consume() -> None:
        nonlocal num_updates
        request = engine.prepare("x", SamplingParams(max_tokens=num_tokens, ignore_eos=True, **params))
        async for _ in engine.stream(request):
            num_updates += 1

    consumers = [asyncio.create_task(consume()) for _ in range(num_streams)]
    await client.all_there.wait()
    started = time.perf_counter()
    await engine.start()
    await asyncio.gather(*consumers)
    seconds = time.perf_counter() - started
    await engine.close()
    return seconds, num_updates


def detokenizers(tokenizer: Tokenizer, num_streams: int, num_tokens: int) -> float:
    """Seconds to make text of the ids alone, stream by stream in turn."""
    ids = tokenizer.encode(TEXT)
    streams = [tokenizer.detokenizer([1]) for _ in range(num_streams)]
    started = time.perf_counter()
    for index in range(num_tokens):
        for shift, stream in enumerate(streams):
            stream.push((ids[(index + shift) % len(ids)],))
    return time.perf_counter() - started


def decode_streams(tokenizer: Tokenizer, num_streams: int, num_tokens: int) -> float:
    """The same with the `tokenizers` library's own DecodeStream, to compare."""
    from tokenizers.decoders import DecodeStream

    ids, rust = tokenizer.encode(TEXT), tokenizer.backend.backend_tokenizer
    streams = [DecodeStream(skip_special_tokens=True) for _ in range(num_streams)]
    started = time.perf_counter()
    for index in range(num_tokens):
        for shift, stream in enumerate(streams):
            stream.step(rust, ids[(index + shift) % len(ids)])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shoal-tiny", help="its tokenizer is used")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="the best of them counts")
    arguments = parser.parse_args()
    num_streams, num_tokens = arguments.streams, arguments.tokens
    total = num_streams * num_tokens
    config = make_engine_config(model=arguments.model, device="cpu")
    tokenizer = load_tokenizer(str(resolve_model_path(arguments.model)))

    def report(name: str, measure: Callable[[], float]) -> None:
        seconds = min(measure() for _ in range(arguments.rounds))
        print(f"{name:46} {total / seconds:12,.0f} tokens/s {1e6 * seconds / total:8.2f} µs/token")

    def engine(**params: Any) -> Callable[[], float]:
        return lambda: asyncio.run(through_engine(config, tokenizer, num_streams, num_tokens, **params))[0]

    print(f"{num_streams} streams of {num_tokens} tokens, {type(tokenizer.detokenizer([1])).__name__}")
    report("tokenizers' DecodeStream alone", lambda: decode_streams(tokenizer, num_streams, num_tokens))
    report("detokenizer alone", lambda: detokenizers(tokenizer, num_streams, num_tokens))
    report("message, fold, queue, consumer", engine())
    report("the same with two stop strings", engine(stop=["\n\nUser:", "###"]))


if __name__ == "__main__":
    main()
