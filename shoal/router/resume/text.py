"""The journal of a kept request by text, and what is known of it where nothing answers it. By frames: journals.py.

A text cannot be generated again, so it matters whose text a client has: each run of a request has a name, which its
event ids bear. A run that goes on from another's text has that up to where the client was, and its own behind it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.router.request import GenerationRequest
from shoal.router.resume.journals import TOKEN_BYTES, CannotResume, Grown, ignore
from shoal.router.resume.position import TextPosition
from shoal.router.text_journal import Chunk, TextJournal

# More takeovers, one behind the other and none with news for the client, leave no client with the name of the first.
_MOST_RUNS = 64


class TextRun(msgspec.Struct, array_like=True, frozen=True):
    """start: characters of the text that were there when it began."""

    name: str
    start: int


class TextState(msgspec.Struct, omit_defaults=True):
    """A TextJournal without its request. head: what all events say, as JSON. runs: whose text it is, the oldest first.

    ending: the finish reason, where that is all that the client lacks.
    """

    pieces: list[str] = []
    num_tokens: int = 0
    num_events: int = 0
    num_prompt_tokens: int = 0
    told_usage: bool = False
    head: dict[str, Any] | None = None
    finish_reason: str | None = None
    ending: str | None = None
    trouble: str | None = None
    runs: list[TextRun] = []

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def num_bytes(self) -> int:
        """About what it holds in memory."""
        return TOKEN_BYTES * len(self.pieces) + self.num_characters

    def since(self, first_piece: int) -> TextState:
        return msgspec.structs.replace(self, pieces=self.pieces[first_piece:])

    def has(self, position: TextPosition) -> bool:
        """Whether what a client has that is there is a beginning of this text."""
        ends = [*(run.start for run in self.runs[1:]), self.num_characters]
        spans = {run.name: (run.start, end) for run, end in zip(self.runs, ends, strict=False)}
        start, end = spans.get(position.run, (1, 0))
        return self.head is not None and start <= position.num_characters <= end

    def check(self, position: TextPosition) -> None:
        """Raises CannotResume unless `has`."""
        if not self.has(position):
            raise CannotResume(
                f"the client has {position.num_characters} characters of a text; {self.num_characters} are known here, "
                "of it or of another one, and no other router that can be reached has more. The answer of a server "
                "that speaks no frames cannot be generated again"
            )

    def follows(self, run: TextRun) -> TextRun | None:
        """The run that took over from this one, if this is the text of such a run."""
        names = [each.name for each in self.runs[:-1]]
        return self.runs[names.index(run.name) + 1] if run.name in names else None

    def begin(self, position: TextPosition | None, run: str) -> TextState:
        """Of a run that goes on where the client is; None: it has nothing. Raises CannotResume for what is not here."""
        if position is None or not position.num_events:
            return TextState(runs=[TextRun(run, 0)])
        self.check(position)
        text = "".join(self.pieces)
        lacks_end = len(text) == position.num_characters and self.finish_reason is not None and not position.ended
        names = [each.name for each in self.runs]
        before = self.runs[: names.index(position.run) + 1]
        return TextState(
            pieces=[text[: position.num_characters]] if position.num_characters else [],
            num_tokens=self.num_tokens if lacks_end else position.num_tokens,
            num_events=position.num_events,
            num_prompt_tokens=self.num_prompt_tokens,
            told_usage=position.told_usage,
            head=self.head,
            finish_reason=(self.finish_reason or "stop") if position.ended else None,
            ending=self.finish_reason if lacks_end else None,
            trouble=self.trouble,
            runs=[*before, TextRun(run, position.num_characters)][-_MOST_RUNS:],
        )


class TrackedTextJournal(TextJournal):
    """A text journal whose events get their position as their id. state: where it begins. grown: told of each change,
    and by how many bytes."""

    def __init__(self, request: GenerationRequest, key: str, state: TextState, grown: Grown = ignore) -> None:
        super().__init__(request)
        self.num_events, self.num_characters = state.num_events, state.num_characters
        self.num_tokens = self._base_tokens = state.num_tokens
        self.finish_reason, self.known_ending = state.finish_reason, state.ending
        self._text = list(state.pieces)
        self._head, self._trouble = state.head, state.trouble
        self._num_prompt_tokens, self._has_told_usage = state.num_prompt_tokens, state.told_usage
        self._runs = state.runs
        self._grown = grown
        self._mark = f"\nid: {key}:".encode("ascii")
        self._num_counted = len(self._text)

    def add(self, chunk: Chunk, data: bytes) -> bytes:
        told = super().add(chunk, data)
        while self._num_counted < len(self._text):
            self.num_characters += len(self._text[self._num_counted])
            self._grown(TOKEN_BYTES + len(self._text[self._num_counted]))
            self._num_counted += 1
        if not told:
            return told
        self.num_events += 1
        position = TextPosition(
            self.num_events,
            self.num_characters,
            self.num_tokens,
            self._runs[-1].name,
            self.finish_reason is not None,
            self._has_told_usage,
        )
        return b"".join((told, self._mark, str(position).encode("ascii")))

    def state(self, first_piece: int = 0) -> TextState:
        return TextState(
            pieces=self._text[first_piece:],
            num_tokens=self.num_tokens,
            num_events=self.num_events,
            num_prompt_tokens=self._num_prompt_tokens,
            told_usage=self._has_told_usage,
            head=self._head,
            finish_reason=self.finish_reason or self.known_ending,
            trouble=self._trouble,
            runs=self._runs,
        )
