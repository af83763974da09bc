"""Sends one case and folds the answer, streamed or not, into one form that two runs can be compared by.

A request with a key is gone on with at another router when a fault broke its connection, and only then: what breaks
without a fault is one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp

from tests.chaos.cases import Case

_DONE = "[DONE]"
# plain: no key. keyed: an Idempotency-Key. asked: the router makes the key, and says it with the answer's headers.
WAYS = ("plain", "keyed", "asked")
_PAUSE_SECONDS = 0.05
# After so much silence the clients of a router that was stopped take it for gone.
_SILENCE_SECONDS = 1.5
_LOOK_SECONDS = 0.25


class Door:
    """A router, as clients see it. breaking: a fault strikes it: whoever has a key goes on at another door.

    stopped: nothing comes through it. num_answers: whole answers that came through it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.breaking = False
        self.stopped = False
        self.num_breaks = 0
        self.num_answers = 0

    def begin_to_break(self) -> None:
        self.breaking = True
        self.num_breaks += 1


@dataclasses.dataclass
class Outcome:
    """What a client got. times: when something of the text came (time.monotonic()). fault: what it must not have seen.

    content: what must equal the undisturbed run's; None unless the answer came whole. way: one of WAYS. door: where it
    is asked now. num_resumed: how often it was asked again.
    """

    case: Case
    marker: str
    started: float
    way: str = "plain"
    door: Door | None = None
    num_resumed: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float | None = None
    fault: str | None = None
    content: dict[str, Any] | None = None
    attempt: asyncio.Task[None] | None = None

    def cut(self) -> None:
        """Break the client's connection; with a key it comes back."""
        assert self.way != "plain"
        if self.attempt is not None:
            self.attempt.cancel()


class _Broken(Exception):
    """The connection ended too soon, or the router says that it ends."""


class AnswerFold:
    """Puts an answer together. Raises ValueError for what no right answer contains."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}
        self.usage: dict[str, int] | None = None
        self._ids: set[str] = set()

    def add(self, body: dict[str, Any]) -> None:
        """A chunk, or the whole answer."""
        if "error" in body:
            raise ValueError(f"an error: {json.dumps(body['error'], ensure_ascii=False)}")
        self._ids.add(body["id"])
        if len(self._ids) > 1:
            raise ValueError(f"the answer's id changed: {sorted(self._ids)}")
        usage = body.get("usage")
        if usage is not None:
            # How much of the prompt was cached depends on what the server did before.
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        for choice in body["choices"]:
            self._add_choice(choice)

    def _add_choice(self, news: dict[str, Any]) -> None:
        choice = self.choices.setdefault(news["index"], {"text": "", "token_ids": [], "finish_reason": None})
        if choice["finish_reason"] is not None:
            raise ValueError(f"answer {news['index']} goes on after its end: {news}")
        message = news.get("message") or news.get("delta")
        choice["text"] += (news.get("text") if message is None else message.get("content")) or ""
        if message is not None and message.get("role"):
            if "role" in choice:
                raise ValueError(f"answer {news['index']} begins twice")
            choice["role"] = message["role"]
        choice["token_ids"] += news.get("token_ids") or []
        for name, values in (news.get("logprobs") or {}).items():
            if values is not None:
                choice.setdefault("logprobs", {}).setdefault(name, []).extend(values)
        choice["finish_reason"] = news.get("finish_reason")
        choice["stop_reason"] = news.get("stop_reason")

    def content(self) -> dict[str, Any]:
        """Raises ValueError unless every answer has ended."""
        open_ = [index for index, choice in self.choices.items() if choice["finish_reason"] is None]
        if open_ or not self.choices:
            raise ValueError(f"answers without an end: {open_ or 'all'}")
        return {"choices": [self.choices[index] for index in sorted(self.choices)], "usage": self.usage}


async def send(http: aiohttp.ClientSession, doors: Sequence[Door], outcome: Outcome) -> None:
    """Fill the outcome. Never raises but when cancelled: what goes wrong is the outcome's fault."""
    client = _Client(http, outcome)
    rng = random.Random(outcome.marker)
    place = rng.randrange(len(doors))
    try:
        while True:
            door = outcome.door = doors[place]
            num_breaks = door.num_breaks
            outcome.attempt = asyncio.create_task(client.ask(door.url))
            try:
                silent = await _until_done(outcome.attempt, door, outcome)
            finally:
                outcome.attempt.cancel()
            if silent:
                place = (place + 1) % len(doors)
            elif outcome.attempt.cancelled():
                place = rng.randrange(len(doors))  # its connection was cut: any router may be next
            elif isinstance(error := outcome.attempt.exception(), _Broken) and (
                outcome.way != "plain" and (door.breaking or door.num_breaks > num_breaks)
            ):
                place = (place + 1) % len(doors)
            else:
                outcome.attempt.result()
                outcome.content = client.fold.content()
                door.num_answers += 1
                break
            outcome.num_resumed += 1
            await asyncio.sleep(_PAUSE_SECONDS)
    except (TimeoutError, ValueError, KeyError, _Broken) as error:
        outcome.fault = (
            f"{type(error).__name__}: {error} ({outcome.way}, at {door.url}, resumed {outcome.num_resumed}x)"
        )
    outcome.ended = time.monotonic()


async def _until_done(attempt: asyncio.Task[None], door: Door, outcome: Outcome) -> bool:
    """Clients of a router that was stopped notice its silence by themselves: True then."""
    began = time.monotonic()
    while not attempt.done():
        await asyncio.wait((attempt,), timeout=_LOOK_SECONDS)
        heard = max(began, outcome.times[-1] if outcome.times else 0.0)
        if door.stopped and outcome.way != "plain" and time.monotonic() - heard > _SILENCE_SECONDS:
            attempt.cancel()
            await asyncio.wait((attempt,))
            return attempt.cancelled()
    return False


class _Client:
    """One request and what came of it so far, whatever number of connections it takes."""

    def __init__(self, http: aiohttp.ClientSession, outcome: Outcome) -> None:
        self.fold = AnswerFold()
        self._http, self._outcome = http, outcome
        self._headers = {"content-type": "application/json"}
        if outcome.way == "keyed":
            self._headers["idempotency-key"] = uuid.uuid4().hex
        elif outcome.way == "asked":
            self._headers["x-shoal-resumable"] = "true"

    async def ask(self, url: str) -> None:
        """By one connection. Raises _Broken; ValueError and KeyError for what no right answer contains."""
        case = self._outcome.case
        try:
            async with self._http.post(
                url + case.path, data=case.marked(self._outcome.marker), headers=self._headers
            ) as response:
                if response.status != 200:
                    error = f"status {response.status}: {(await response.text())[:500]}"
                    raise _Broken(error) if response.status == 503 else ValueError(error)
                if self._outcome.way == "asked":
                    self._headers["idempotency-key"] = response.headers["idempotency-key"]
                if case.streams:
                    await self._read_stream(response)
                else:
                    self.fold.add(json.loads(await response.read()))
        except aiohttp.ClientError as error:
            raise _Broken(f"{type(error).__name__}: {error}") from None

    async def _read_stream(self, response: aiohttp.ClientResponse) -> None:
        """With a key, events count when the id that ends them is there."""
        held: list[dict[str, Any]] = []
        done = False
        async for line in response.content:
            text = line.decode().strip()
            if not text or text.startswith(":"):
                continue
            if done or not text.startswith(("data: ", "id: ")):
                raise ValueError(f"no event of a stream: {text[:200]!r}")
            name, _, value = text.partition(": ")
            if name == "id":
                if self._outcome.way == "plain":
                    raise ValueError(f"an id that nobody asked for: {text[:200]!r}")
                self._headers["last-event-id"] = value
            elif value == _DONE:
                done = True
            else:
                held.append(_event(value))
            if done or name == "id" or self._outcome.way == "plain":
                for event in held:
                    self.fold.add(event)
                self._outcome.times += [time.monotonic()] * bool(held)
                held = []
        if not done:
            raise _Broken("the stream ended without [DONE]")


def _event(data: str) -> dict[str, Any]:
    """Raises _Broken for the error of a router that shuts down, ValueError for any other one."""
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        text = f"an error: {json.dumps(event['error'], ensure_ascii=False)}"
        raise _Broken(text) if event["error"].get("code") == "unavailable" else ValueError(text)
    return event


def difference(got: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Where two contents differ; None when they are the same."""
    if got == wanted:
        return None
    if len(got["choices"]) != len(wanted["choices"]):
        return f"{len(got['choices'])} answers instead of {len(wanted['choices'])}"
    for index, (one, other) in enumerate(zip(got["choices"], wanted["choices"], strict=True)):
        for name in sorted(set(one) | set(other)):
            if one.get(name) != other.get(name):
                found = f"{_shown(one.get(name))} instead of {_shown(other.get(name))}"
                return f"answer {index}: {name} is {found}"
    return f"usage is {got['usage']} instead of {wanted['usage']}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 600 else text[:600] + "…"
