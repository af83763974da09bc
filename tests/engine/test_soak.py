"""Hours in small: thousands of requests of all kinds, many of them abandoned; nothing may grow, nothing may be lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import psutil
import pytest

from shoal.config.resolve import make_engine_config
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import SubprocessClient
from shoal.engine.tokenizer import load_tokenizer
from shoal.types import SamplingParams
from tests.checkpoints import make_checkpoint

NUM_REQUESTS = 8000
NUM_AT_ONCE = 64
MOST_GROWTH_BYTES = 24 << 20


def draw_params(generator: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=generator.randrange(1, 24),
        temperature=generator.choice([0.0, 0.7, 1.3]),
        top_p=generator.choice([1.0, 0.9]),
        top_k=generator.choice([0, 5]),
        n=generator.choice([1, 1, 1, 3]),
        frequency_penalty=generator.choice([0.0, 0.0, 0.5]),
        logprobs=generator.choice([None, None, 2]),
        stop=generator.choice([None, None, ["a"]]),
        seed=generator.choice([None, 7]),
    )


async def one(engine: AsyncEngine, generator: random.Random) -> None:
    prompt = [generator.randrange(256) for _ in range(generator.choice([1, 3, 20, 60, 60, 150]))]
    prepared = engine.prepare(prompt, draw_params(generator))
    leave_after = generator.choice([None, None, 0, 1, 5])
    endings: dict[int, int] = {}
    async with contextlib.aclosing(engine.stream(prepared)) as updates:
        async for update in updates:
            if update.finish_reason is not None:
                endings[update.index] = endings.get(update.index, 0) + 1
            if leave_after is not None:
                leave_after -= 1
                if leave_after < 0:
                    return
    assert endings == dict.fromkeys(range(prepared.params.n), 1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_nothing_grows(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "qwen2")
    config = make_engine_config(model=str(checkpoint), max_model_len=256, num_gpu_blocks_override=120, max_num_seqs=48)
    client = SubprocessClient(config)
    await client.start()
    engine = AsyncEngine(client, config, load_tokenizer(str(checkpoint)))
    await engine.start()
    assert client.process_id is not None
    processes = [psutil.Process(), psutil.Process(client.process_id)]
    generator, limit = random.Random(5), asyncio.Semaphore(NUM_AT_ONCE)

    async def limited() -> None:
        async with limit:
            await one(engine, generator)

    sizes = []
    for _ in range(4):
        await asyncio.gather(*[limited() for _ in range(NUM_REQUESTS // 4)])
        assert await engine.wait_drained(30)
        sizes.append([process.memory_info().rss for process in processes])
    stats = await engine.stats()
    assert stats.num_free_blocks == stats.num_blocks and stats.num_preemptions_total > 0
    assert stats.num_requests_running == stats.num_requests_waiting == engine.num_unfinished == 0
    growth = [last - second for second, last in zip(sizes[1], sizes[-1], strict=True)]
    assert max(growth) < MOST_GROWTH_BYTES, f"resident memory of client and core: {sizes}"
    await engine.close()
