"""The journal of a kept request by frames: it counts positions, writes them behind events, and can be cut to a client's
position. By text: text.py.

core.py's requests without a key use the base class, which does nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.errors import EngineError
from shoal.protocol.internal import AnswerJournal, Progress
from shoal.router.native import Journal
from shoal.router.outcome import Realign
from shoal.router.resume.position import AnswerPosition, FramePosition, join_answers
from shoal.types.outputs import TokenLogprobs

# About what Python holds for them.
TOKEN_BYTES = 40
_LOGPROB_BYTES = 160
_TOP_BYTES = 64

Grown = Callable[[int], None]


class CannotResume(EngineError):
    """What the client has cannot be gone on from."""

    code = "cannot_resume"


def ignore(_: int) -> None:
    """For journals that nobody counts."""


class TrackedJournal(Journal):
    """A journal whose news get their position as the event's id. grown: told of each change, and by how many bytes.

    While the client has more than the journal (`ahead`), news are taken in without the client, to exactly there.
    """

    def __init__(self, key: str, grown: Grown = ignore) -> None:
        self.grown = grown
        super().__init__()
        self._mark = f"id: {key}:".encode("ascii")
        self._positions: dict[int, str] = {}
        self._ahead: dict[int, AnswerPosition] | None = None
        self._reached: set[int] = set()
        self._left_out = False
        self._counted_prompts = False

    @property
    def num_crashes(self) -> int:
        return self._num_crashes

    @num_crashes.setter
    def num_crashes(self, number: int) -> None:
        # Peers have to know, so that a request that ends engines gets no new chances there.
        self._num_crashes = number
        self.grown(0)

    @property
    def position(self) -> str:
        return join_answers(self._positions)

    @property
    def num_bytes(self) -> int:
        """About what it holds in memory."""
        prompts = sum(map(len, self.prompts or ()))
        answers = self.answers.values()
        logprobs = sum(cost_of(answer.logprobs) + cost_of(answer.prompt_logprobs) for answer in answers)
        return TOKEN_BYTES * (prompts + self.num_tokens) + logprobs

    @property
    def catching_up(self) -> bool:
        return self._ahead is not None

    def add(self, progress: Progress) -> None:
        """Raises ValueError as the base does, Realign when the next attempt has to begin where the client is, and
        CannotResume for what is not what the client has."""
        if not self._counted_prompts:
            self._count_prompts()
        if self._ahead is not None:
            self._catch_up(progress, self._ahead)
            return
        super().add(progress)
        self._moved(progress.index)
        self.grown(_cost(progress))
        data = progress.data
        if data:
            # One id for all events of a frame: between them there is no place to go on from.
            progress.data = b"".join((data[:-1], self._mark, self.position.encode("ascii"), b"\n\n"))

    def _catch_up(self, progress: Progress, ahead: dict[int, AnswerPosition]) -> None:
        index, wanted = progress.index, ahead.get(progress.index)
        progress.data = b""
        if wanted is None or index in self._reached:
            self._left_out = True  # the client has nothing of it: it comes again, then with its bytes
            return
        super().add(progress)
        self.grown(_cost(progress))
        answer = self.answers[index]
        there = AnswerPosition.of(answer)
        if there == wanted:
            self._reached.add(index)
        elif not there.is_within(wanted):
            self._cut_answer(answer, wanted)
            self._reached.add(index)
            self._left_out = True
        self._moved(index)
        if len(self._reached) == len(ahead):
            left_out = self._left_out
            self._ahead = None
            if left_out:
                raise Realign("the answers are as far as the client has them")

    def check_whole(self) -> None:
        """Raises CannotResume when the answers ended before they came to where the client is."""
        if self._ahead is not None:
            raise CannotResume("what was generated again is shorter than what the client has")

    def go_to(self, position: FramePosition | None) -> None:
        """Cut the journal to what the client has; None: nothing. What it has more is generated without it."""
        wanted = {} if position is None else dict(position.answers)
        for index in [index for index in self.answers if index not in wanted]:
            del self.answers[index]
            self._positions.pop(index, None)
        self._reached = set()
        for index, target in wanted.items():
            answer = self.answers.get(index)
            if answer is None:
                continue
            there = AnswerPosition.of(answer)
            if there == target:
                self._reached.add(index)
            elif not there.is_within(target):
                self._cut_answer(answer, target)
                self._reached.add(index)
            self._moved(index)
        self._left_out = False
        self._ahead = wanted if len(self._reached) < len(wanted) else None
        self.recount()

    def keep_all(self) -> None:
        """Go on from all that there is: of an answer that comes whole the client has nothing."""
        self._ahead = None
        for index in self.answers:
            self._moved(index)
        self.recount()

    def recount(self) -> None:
        self._counted_prompts = self.prompts is not None
        self.num_tokens = sum(len(answer.token_ids) for answer in self.answers.values())

    def _cut_answer(self, answer: AnswerJournal, target: AnswerPosition) -> None:
        if target.num_tokens > len(answer.token_ids) or target.ending is not None:
            raise CannotResume("what was generated again ends elsewhere than what the client has")
        dropped = len(answer.token_ids) - target.num_tokens
        del answer.token_ids[target.num_tokens :]
        if answer.logprobs is not None:
            del answer.logprobs[target.num_tokens :]
        answer.delivered_characters = target.num_characters
        answer.finish_reason = answer.stop_reason = None
        self.num_tokens -= dropped
        self.grown(-dropped * TOKEN_BYTES)

    def _count_prompts(self) -> None:
        self._counted_prompts = True
        self.grown(TOKEN_BYTES * sum(map(len, self.prompts or ())))

    def _moved(self, index: int) -> None:
        self._positions[index] = str(AnswerPosition.of(self.answers[index]))


def _cost(progress: Progress) -> int:
    return TOKEN_BYTES * len(progress.token_ids) + cost_of(progress.logprobs) + cost_of(progress.prompt_logprobs)


def cost_of(entries: Sequence[TokenLogprobs | None] | None) -> int:
    """About the bytes in memory of log-probabilities."""
    if not entries:
        return 0
    return sum(_LOGPROB_BYTES + _TOP_BYTES * len(one.token_ids) for one in entries if one is not None)
