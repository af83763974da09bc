"""Golden prompt: what a server must answer as the others do before it enters. The votes are pure; health.py asks.

Weights and kernels that are not sound say something else, greedily, to the same few tokens of prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec

from shoal.config.router_settings import GoldenSpec
from shoal.log import get_logger

MAX_TOKENS = 8

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class GoldenAnswer:
    """token_ids: None where the server does not tell them."""

    text: str
    token_ids: tuple[int, ...] | None = None

    def agrees(self, other: GoldenAnswer) -> bool:
        both = self.token_ids is not None and other.token_ids is not None
        return self.text == other.text and (not both or self.token_ids == other.token_ids)

    def __str__(self) -> str:
        ids = "" if self.token_ids is None else f" {list(self.token_ids)}"
        return f"{self.text!r}{ids}"


class GoldenJudge:
    """Knows the right answer for each model: the settings', else the first that came.

    Of servers that are started together the majority counts: nothing is decided until each of them has voted or was
    given up. On a tie the one that was named first counts.
    """

    def __init__(self, spec: GoldenSpec, together: Iterable[str] = ()) -> None:
        """together: the keys of those that are started together, in the order in which they were named."""
        self.spec = spec
        self._order = list(together)
        self._pending = set(self._order)
        self._votes: dict[str, dict[str, GoldenAnswer]] = {}
        self._right: dict[str, GoldenAnswer] = {}
        self._agreed: dict[str, set[str]] = {}  # who has given the right answer once, by model

    @property
    def decided(self) -> bool:
        return not self._pending

    def vote(self, key: str, answers: dict[str, GoldenAnswer]) -> None:
        """What a server says, by model."""
        for model, answer in answers.items():
            self._votes.setdefault(model, {})[key] = answer
        self.give_up(key)
        if self.decided:
            self._decide()

    def give_up(self, key: str) -> None:
        """Do not wait for this one (any longer)."""
        if key in self._pending:
            self._pending.discard(key)
            if self.decided:
                self._decide()

    def give_up_all(self) -> None:
        """Decide by the votes that are there."""
        for key in tuple(self._pending):
            self.give_up(key)

    def verdict(self, key: str) -> tuple[bool, str] | None:
        """Whether this server's answers are right, and why not; None while it is not decided."""
        if not self.decided:
            return None
        self._decide()
        self._let_go_of_the_past()
        for model, votes in self._votes.items():
            if key not in votes:
                continue
            if not votes[key].agrees(self._right[model]):
                return False, (
                    f"answers the golden prompt {self.spec.prompt!r} of {model} with {votes[key]}; "
                    f"{self._right[model]} is expected"
                )
            self._agreed.setdefault(model, set()).add(key)
        return True, ""

    def forget(self, key: str) -> None:
        """The server is gone. With the last one of a model the right answer goes, too."""
        self.give_up(key)
        for model, votes in list(self._votes.items()):
            votes.pop(key, None)
            self._agreed.get(model, set()).discard(key)
            if not votes:
                del self._votes[model]
                self._right.pop(model, None)

    def withdraw(self, key: str) -> None:
        """It has to answer again; what was right stays right."""
        for votes in self._votes.values():
            votes.pop(key, None)

    def _let_go_of_the_past(self) -> None:
        """What was right stays so as long as a server is there that says it, or one that never did. When all that are
        there said it once and say something else now, their weights were changed, and nobody contradicts them."""
        for model, votes in self._votes.items():
            right = self._right.get(model)
            if self.spec.text is not None or right is None or not votes.keys() <= self._agreed.get(model, set()):
                continue
            if votes and not any(answer.agrees(right) for answer in votes.values()):
                self._right[model] = self._most_common(model, votes)
                logger.warning(
                    "the golden prompt of %s is answered with %s from now on; no server says %s any more",
                    model,
                    self._right[model],
                    right,
                )

    def _decide(self) -> None:
        for model, votes in self._votes.items():
            if model not in self._right and votes:
                self._right[model] = self._most_common(model, votes)

    def _most_common(self, model: str, votes: dict[str, GoldenAnswer]) -> GoldenAnswer:
        if self.spec.text is not None:
            return GoldenAnswer(self.spec.text)
        keys = sorted(votes, key=lambda key: self._order.index(key) if key in self._order else len(self._order))
        counts = [sum(votes[key].agrees(votes[other]) for other in keys) for key in keys]
        best = counts.index(max(counts))
        rivals = [key for key, count in zip(keys, counts, strict=True) if count == max(counts)]
        if any(not votes[key].agrees(votes[keys[best]]) for key in rivals):
            logger.error(
                "servers of %s answer the golden prompt differently without a majority: %s; the first counts",
                model,
                "; ".join(f"{key}: {votes[key]}" for key in keys),
            )
        return votes[keys[best]]


class _Choice(msgspec.Struct):
    text: str
    token_ids: list[int] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def golden_request(spec: GoldenSpec, model: str, *, with_ids: bool) -> bytes:
    """The body for /v1/completions."""
    fields = {"model": model, "prompt": spec.prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "seed": 0}
    return msgspec.json.encode(fields | ({"return_token_ids": True} if with_ids else {}))


def read_golden(body: bytes) -> GoldenAnswer:
    """Raises msgspec.DecodeError for what is no completion."""
    completion = msgspec.json.decode(body, type=_Completion)
    if len(completion.choices) != 1:
        raise msgspec.ValidationError(f"it has {len(completion.choices)} choices")
    choice = completion.choices[0]
    return GoldenAnswer(choice.text, None if choice.token_ids is None else tuple(choice.token_ids))
