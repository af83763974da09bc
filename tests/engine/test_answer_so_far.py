"""AsyncEngine goes on with answers that others began: what is run, what is returned, what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from shoal.engine.answer_so_far import AnswerSoFar
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest
from shoal.messages import AddRequest
from shoal.types import CompletionOutput, FinishReason, SamplingParams, TokenLogprobs
from tests.engine.fake_client import FakeClient, make_config
from tests.engine.tokenizers_for_tests import tokenizer

PARAMS = SamplingParams(n=3, max_tokens=9, seed=1, logprobs=1)


class Counting(EngineObserver):
    def __init__(self) -> None:
        self.finished_answers: list[tuple[int, FinishReason, int]] = []

    def finished(
        self, request: PreparedRequest, index: int, reason: FinishReason, num_tokens: int, seconds: float
    ) -> None:
        self.finished_answers.append((index, reason, num_tokens))


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    config = make_config()
    engine = AsyncEngine(FakeClient(config), config, tokenizer(), observer=Counting())
    await engine.start()
    yield engine
    await engine.close()


async def undisturbed(engine: AsyncEngine) -> list[CompletionOutput]:
    outputs = (await engine.collect(engine.prepare("hi", PARAMS))).outputs
    engine._client.sent.clear()  # type: ignore[attr-defined]
    engine._observer.finished_answers.clear()  # type: ignore[union-attr]
    return outputs


def begun(answer: CompletionOutput, num_tokens: int, num_characters: int, *, ended: bool = False) -> AnswerSoFar:
    entries = [TokenLogprobs([*entry], [one.logprob for one in entry.values()], 1) for entry in answer.logprobs or []]
    return AnswerSoFar(
        token_ids=answer.token_ids[:num_tokens],
        num_characters=num_characters,
        logprobs=entries[:num_tokens],
        finish_reason=FinishReason.LENGTH if ended else None,
    )


async def test_answers_in_every_state_come_out_whole(engine: AsyncEngine) -> None:
    """One has ended elsewhere, of one the end was not told, one is in its middle."""
    expected = await undisturbed(engine)
    prepared = engine.prepare("hi", PARAMS)
    length = len(expected[0].text)
    prepared.carry_on(
        {
            0: begun(expected[0], 9, length, ended=True),
            1: begun(expected[1], 9, length - 1),
            2: begun(expected[2], 4, 2),
        },
        engine.config.model.vocab_size,
    )
    assert (await engine.collect(prepared)).outputs == expected
    (asked,) = [message.request for message in engine._client.sent if isinstance(message, AddRequest)]  # type: ignore[attr-defined]
    assert asked.emitted_token_ids == expected[2].token_ids[:4]
    counted = engine._observer.finished_answers  # type: ignore[union-attr]
    assert counted == [(1, FinishReason.LENGTH, 9), (2, FinishReason.LENGTH, 9)], "once for all that ended here"
    assert engine.num_unfinished == 0


async def test_a_stream_yields_only_what_was_not_delivered(engine: AsyncEngine) -> None:
    expected = await undisturbed(engine)
    prepared = engine.prepare("hi", PARAMS)
    prepared.carry_on({0: begun(expected[0], 4, 3)}, engine.config.model.vocab_size)
    texts, ids = [""] * 3, [[], [], []]
    async for update in engine.stream(prepared):
        texts[update.index] += update.text
        ids[update.index] += update.token_ids
    assert texts == [expected[0].text[3:], expected[1].text, expected[2].text]
    assert ids == [expected[0].token_ids[4:], expected[1].token_ids, expected[2].token_ids]
