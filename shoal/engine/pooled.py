"""Vectors and scores from an AsyncEngine: of texts, and of pairs of texts. The server and LLM are built on it."""

from __future__ import annotations

import array
import asyncio
import dataclasses
import operator
from collections.abc import Callable, Sequence

import msgspec

from shoal.engine.async_engine import AsyncEngine
from shoal.engine.pooling import what_it_does
from shoal.engine.prepare import PreparedRequest, Prompt
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import EngineDeadError, EngineError, InvalidRequestError, UnavailableError
from shoal.protocol.errors import NOT_THIS_KIND
from shoal.types.outputs import FinishReason
from shoal.types.pooling_params import PoolingParams

# truncate_prompt_tokens: cut to what the model takes.
_TO_MODEL = -1
# How often a document is cut until it fits into its template: tokens at its end may merge with what follows.
_MOST_CUTS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Pooled:
    """A result: little-endian fp32 in `data`."""

    request: PreparedRequest
    data: bytes
    num_cached_tokens: int

    def numbers(self) -> array.array[float]:
        return array.array("f", self.data)


@dataclasses.dataclass(frozen=True, slots=True)
class PairScore:
    """A pair's score, and the results that it was made of: one of both texts, or one of each."""

    score: float
    parts: tuple[Pooled, ...]


# --- one text after the other ----------------------------------------------------------------------------------------


async def pool(engine: AsyncEngine, prepared: PreparedRequest) -> Pooled:
    """Queue a request and return its result. Raises EngineError, or UnavailableError when the server shuts down."""
    async with engine.running(prepared, eager=False) as stream:
        while updates := await stream.next_updates():
            for update in updates:
                if update.finish_reason is FinishReason.ERROR:
                    message = update.error or "the engine failed on this request"
                    raise EngineDeadError(message) if update.lost else EngineError(message)
                if update.pooled is not None:
                    return Pooled(prepared, update.pooled, update.num_cached_tokens)
    raise UnavailableError("the server shut down before the answer was there; send the request elsewhere")


async def pool_all(engine: AsyncEngine, prepared: Sequence[PreparedRequest]) -> list[Pooled]:
    """The results in order; if one fails, the others are ended too."""
    tasks = [asyncio.create_task(pool(engine, one)) for one in prepared]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def prepare_text(
    engine: AsyncEngine,
    prompt: Prompt,
    params: PoolingParams,
    *,
    truncate: int | None = None,
    request_id: str | None = None,
    priority: int = 0,
) -> PreparedRequest:
    """prompt: as of `AsyncEngine.prepare`. truncate: to so many tokens at most, or -1: to what the model takes; the end
    is cut off. Raises InvalidRequestError, UnavailableError or EngineDeadError."""
    most = _most_tokens(engine, truncate)
    if most is not None:
        content = prompt.get("prompt_token_ids") or prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if isinstance(content, str):
            ids, _ = _tokenizer(engine).encode_cut(content, None, most)
            prompt = {"prompt": content, "prompt_token_ids": ids}
        elif isinstance(content, Sequence):
            prompt = content[:most]
    return engine.prepare(prompt, params, request_id=request_id, priority=priority)


def _most_tokens(engine: AsyncEngine, truncate: int | None) -> int | None:
    if truncate is None:
        return None
    most = engine.max_model_len
    if type(truncate) is not int or not (truncate == _TO_MODEL or 1 <= truncate <= most):
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be from 1 to {most}, or -1 for {most}; got {truncate!r:.50}",
            "truncate_prompt_tokens",
        )
    return most if truncate == _TO_MODEL else truncate


def _tokenizer(engine: AsyncEngine) -> Tokenizer:
    if engine.tokenizer is None:
        raise InvalidRequestError("this engine has no tokenizer (skip_tokenizer_init); send token ids")
    return engine.tokenizer


# --- pairs of texts --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPairs:
    """Requests, and for each pair which of them it is made of: one of both texts, or one of each."""

    requests: list[PreparedRequest]
    pairs: list[tuple[int, ...]]


def prepare_pairs(
    engine: AsyncEngine,
    pairs: Sequence[tuple[str, str]],
    params: PoolingParams,
    *,
    truncate: int | None = None,
    chat_template: str | None = None,
    request_id: str | None = None,
    priority: int = 0,
) -> PreparedPairs:
    """Nothing is queued yet. A model of scores reads both texts at once; one of embeddings each text once, and the
    score is the cosine of both vectors. chat_template: as of `_render`. Raises what `prepare_text` raises."""
    pooling = engine.config.model.pooling
    if pooling is None:
        raise InvalidRequestError(what_it_does(None), "model", NOT_THIS_KIND)
    if pooling.num_labels > 1:
        raise InvalidRequestError(
            f"a score is one number, and this model gives {pooling.num_labels} (num_labels)", "model", NOT_THIS_KIND
        )
    name: Callable[[int], str | None] = lambda index: f"{request_id}-{index}" if request_id else None  # noqa: E731
    if pooling.task == "embed":
        params = msgspec.structs.replace(params, use_activation=True)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        requests = [
            prepare_text(engine, text, params, truncate=truncate, request_id=name(index), priority=priority)
            for index, text in enumerate(texts)
        ]
        number = {text: index for index, text in enumerate(texts)}
        return PreparedPairs(requests, [(number[first], number[second]) for first, second in pairs])
    most, tokenizer = _most_tokens(engine, truncate), _tokenizer(engine)
    requests = []
    for index, (first, second) in enumerate(pairs):
        if chat_template is not None or tokenizer.has_own_template:
            ids, num_first = _render(tokenizer, chat_template, first, second, most), None
        else:
            ids, num_first = tokenizer.encode_cut(first, second, most)
        own = msgspec.structs.replace(params, first_segment=num_first)
        requests.append(engine.prepare(ids, own, request_id=name(index), priority=priority))
    return PreparedPairs(requests, [(index,) for index in range(len(pairs))])


def scores_of(prepared: PreparedPairs, results: Sequence[Pooled]) -> list[PairScore]:
    """The scores of all pairs, in order. results: of `prepared.requests`."""
    vectors = [result.numbers() for result in results]
    scores = []
    for indices in prepared.pairs:
        numbers = [vectors[index] for index in indices]
        # A cosine: its last bit may stand above 1.
        score = numbers[0][0] if len(numbers) == 1 else max(-1.0, min(sum(map(operator.mul, *numbers)), 1.0))
        scores.append(PairScore(score, tuple(results[index] for index in indices)))
    return scores


def _render(tokenizer: Tokenizer, chat_template: str | None, query: str, document: str, most: int | None) -> list[int]:
    """The given template, or the operator's, over messages of the roles "query" and "document". To make it fit the
    document is cut, since what a template writes at the end is what models judge by."""
    for _ in range(_MOST_CUTS):
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        text = tokenizer.apply_chat_template(messages, chat_template=chat_template, add_generation_prompt=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if most is None or len(ids) <= most or not document:
            break
        kept = tokenizer.encode(document, add_special_tokens=False)
        document = tokenizer.decode(kept[: max(len(kept) - (len(ids) - most), 0)])
    return ids
