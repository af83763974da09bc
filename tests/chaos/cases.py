"""The requests of the chaos runs: every kind that a fault must not touch, from a seed. Pure.

All of them are reproducible: greedy, or with a seed. So each has one right answer, which an undisturbed server gives.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any

_OPENINGS = (
    "The sea was calm, and", "Tell me about the moon.", "你好，请介绍一下你自己。", "北京的天气", "def add(a, b):",
    "Once upon a time", "1, 2, 3,", "他说：“", "😀 means",
)  # fmt: skip
_STOPS = ("的", "a ", " t", "我", "on", "，", ". ", "the", "是一")


@dataclasses.dataclass(frozen=True)
class Case:
    """One request. `number` names it within its set."""

    number: int
    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    def marked(self, marker: str) -> bytes:
        """The body as it is sent; the marker, which answers do not depend on, tells one sending from all others."""
        return json.dumps({**self.body, "user": marker}, ensure_ascii=False).encode()


def make_cases(
    model: str, num_cases: int, seed: int, *, max_tokens: int = 48, by_text: Sequence[int] = ()
) -> list[Case]:
    """Streams and plain requests, chats and completions, with n, log-probabilities, stop strings, seeds, penalties.

    by_text: only what can go on by its text on servers that know no more than the OpenAI API, of these tokens, each of
    which is whole text: such servers count tokens, and tell nothing of those whose text they hold back.
    """
    rng = random.Random(f"cases {seed}")
    cases = [_make(number, model, rng, max_tokens) for number in range(num_cases)]
    for case in cases if by_text else ():
        _simplify(case.body, by_text)
    return cases


def _simplify(body: dict[str, Any], allowed: Sequence[int]) -> None:
    """Leave out what docs/reliability.md says other servers cannot go on with."""
    body["allowed_token_ids"] = list(allowed)
    for name in ("n", "logprobs", "top_logprobs", "stop", "min_tokens", "echo", "return_token_ids"):
        body.pop(name, None)
    if isinstance(body.get("prompt"), list):
        body["prompt"] = "in place of token ids"
    if body.get("stream"):  # the counts in each event tell how many tokens are left
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}


def _make(number: int, model: str, rng: random.Random, max_tokens: int) -> Case:
    body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(max_tokens // 3, max_tokens)}
    chat = rng.random() < 0.5
    opening = rng.choice(_OPENINGS) + f" {number}"
    if chat:
        body["messages"] = [{"role": "user", "content": opening}]
        if rng.random() < 0.3:
            body["messages"].insert(0, {"role": "system", "content": "你是一个助手。"})
    else:
        body["prompt"] = _prompt(opening, rng)
    _choose_sampling(body, rng)
    if rng.random() < 0.8:
        body["return_token_ids"] = True
    if rng.random() < 0.25:
        body["n"] = rng.randint(2, 3)
    if rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 3)} if chat else {"logprobs": rng.randint(0, 3)}
    if rng.random() < 0.3:
        body["stop"] = rng.sample(_STOPS, rng.randint(1, 2))
        body["min_tokens"] = rng.choice((0, max_tokens // 4))
    if rng.random() < 0.6:
        body["ignore_eos"] = True
    if rng.random() < 0.6:
        body["stream"] = True
        if rng.random() < 0.7:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.3}
    elif not chat and rng.random() < 0.2:
        body["echo"] = True
    return Case(number, "/v1/chat/completions" if chat else "/v1/completions", body)


def _prompt(opening: str, rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.6:
        return opening
    if kind < 0.8:
        return [rng.randint(20, 200) for _ in range(rng.randint(3, 40))]
    return [opening, opening + "!"]


def _choose_sampling(body: dict[str, Any], rng: random.Random) -> None:
    if rng.random() < 0.4:
        body["temperature"] = 0
    else:
        body |= {"temperature": rng.choice((0.6, 1.0)), "seed": rng.randrange(2**31)}
        if rng.random() < 0.4:
            body["top_p"] = 0.9
    if rng.random() < 0.4:
        body[rng.choice(("presence_penalty", "frequency_penalty"))] = rng.choice((0.5, 1.2))
