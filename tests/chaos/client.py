"""Sends one case and folds the answer, streamed or not, into one form that two runs can be compared by."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import aiohttp

from tests.chaos.cases import Case

_DONE = "[DONE]"


@dataclasses.dataclass
class Outcome:
    """What a client got. times: when something of the text came (time.monotonic()). fault: what it must not have seen.

    content: what must equal the undisturbed run's; None unless the answer came whole.
    """

    case: Case
    marker: str
    started: float
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float | None = None
    fault: str | None = None
    content: dict[str, Any] | None = None


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


async def send(http: aiohttp.ClientSession, url: str, case: Case, marker: str, outcome: Outcome) -> None:
    """Fill the outcome. Never raises but when cancelled: what goes wrong is the outcome's fault."""
    fold = AnswerFold()
    headers = {"content-type": "application/json"}
    try:
        async with http.post(url + case.path, data=case.marked(marker), headers=headers) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {(await response.text())[:500]}")
            if case.streams:
                await _read_stream(response, fold, outcome)
            else:
                fold.add(json.loads(await response.read()))
            outcome.content = fold.content()
    except (TimeoutError, ValueError, KeyError, aiohttp.ClientError) as error:
        outcome.fault = f"{type(error).__name__}: {error}"
    outcome.ended = time.monotonic()


async def _read_stream(response: aiohttp.ClientResponse, fold: AnswerFold, outcome: Outcome) -> None:
    done = False
    async for line in response.content:
        text = line.decode().strip()
        if not text or text.startswith((":", "id:")):
            continue
        if done or not text.startswith("data: "):
            raise ValueError(f"no event of a stream: {text[:200]!r}")
        if text[6:] == _DONE:
            done = True
            continue
        fold.add(json.loads(text[6:]))
        outcome.times.append(time.monotonic())
    if not done:
        raise ValueError("the stream ended without [DONE]")


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
