"""What a request needs to go on elsewhere, and the fold that makes text of its token ids. Used by engine/streams.py.

Everything after the sampler is a pure fold over token ids: the same ids give the same text, whatever the pieces they
come in. So a continuation replays the ids that were emitted and drops what was delivered already.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.engine.detokenizer import Detokenizer
from shoal.engine.stop_strings import StopStrings
from shoal.engine.tokenizer import Tokenizer
from shoal.types.adapter import AdapterRef
from shoal.types.outputs import FinishReason
from shoal.types.pooling_params import PoolingParams
from shoal.types.request import EngineRequest
from shoal.types.sampling_params import SamplingParams

DEFAULT_DEADLINE_SECONDS = 60.0


class RequestJournal(msgspec.Struct, kw_only=True):
    """One answer of one request, as far as it has come.

    sampling: resolved, with the drawn seed. stop_token_strings: stop strings that are special tokens, by token id.
    emitted_token_ids: every token that the engine emitted and the fold took. delivered_*: how much of the text and
    of the tokens has left towards the client. deadline_seconds: how long it may go without progress.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop_token_strings: dict[int, str] = {}
    priority: int = 0
    arrival_time: float = 0.0
    emitted_token_ids: list[int] = []
    delivered_characters: int = 0
    delivered_tokens: int = 0
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    pooling: PoolingParams | None = None
    adapter: AdapterRef | None = None

    def engine_request(self) -> EngineRequest:
        """What an engine is asked for: the whole answer, or the rest of it once tokens were emitted."""
        return EngineRequest(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            emitted_token_ids=list(self.emitted_token_ids),
            priority=self.priority,
            arrival_time=self.arrival_time,
            pooling=self.pooling,
            adapter=self.adapter,
        )

    def end_by_engine(self) -> tuple[FinishReason | None, int | None]:
        """How an engine ends the answer with the last of the emitted ids, if it does, and the stop token id."""
        sampling, num_tokens = self.sampling, len(self.emitted_token_ids)
        if num_tokens > sampling.min_tokens:
            last = self.emitted_token_ids[-1]
            if last in sampling.eos_token_ids:
                return FinishReason.STOP, None
            if last in (sampling.stop_token_ids or ()):
                return FinishReason.STOP, last
        if sampling.max_tokens is not None and num_tokens >= sampling.max_tokens:
            return FinishReason.LENGTH, None
        return None, None


class Folded(msgspec.Struct):
    """What a push settled: new text, how many of the ids belong to the answer, and how it ended, if it did."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Replayed(Folded):
    """What a replay settled beyond what was delivered, and the text that was."""

    delivered_text: str = ""


class Fold:
    """Token ids in, text out: detokenizes, finds stop strings, cuts the end token's text. Keeps the journal's ids.

    The end of the answer comes from the engine (an end token, the length) or from here: a stop string.
    """

    def __init__(self, journal: RequestJournal, tokenizer: Tokenizer | None) -> None:
        sampling = journal.sampling
        self.journal = journal
        self._detokenizer: Detokenizer | None = None
        if sampling.detokenize and tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(
                journal.prompt_token_ids,
                skip_special_tokens=sampling.skip_special_tokens,
                spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            )
        self._stops: StopStrings | None = None
        if sampling.stop_strings and self._detokenizer is not None:
            self._stops = StopStrings(sampling.stop_strings, sampling.include_stop_str_in_output)
        self._keep_end_text = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0

    @classmethod
    def replay(
        cls,
        journal: RequestJournal,
        tokenizer: Tokenizer | None,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> tuple[Fold, Replayed]:
        """The fold of a request that went on elsewhere until now, and what was folded there but not delivered.

        With `finish_reason` the engine ended it with these ids. Raises ValueError when the journal claims more
        delivered text than its ids make, or ids beyond the answer's end.
        """
        emitted = journal.emitted_token_ids
        journal.emitted_token_ids = []
        fold = cls(journal, tokenizer)
        folded = fold.push(emitted, finish_reason, stop_reason)
        num_characters, num_tokens = journal.delivered_characters, journal.delivered_tokens
        if num_characters > len(folded.text) or num_tokens > folded.num_tokens:
            raise ValueError(
                f"journal of {journal.request_id}: {num_characters} characters and {num_tokens} tokens delivered, but "
                f"{folded.num_tokens} of its {len(emitted)} tokens are the answer's, and they make {len(folded.text)} "
                "characters"
            )
        delivered, rest = folded.text[:num_characters], folded.text[num_characters:]
        replayed = Replayed(rest, folded.num_tokens - num_tokens, folded.finish_reason, folded.stop_reason, delivered)
        return fold, replayed

    def push(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None = None, stop_reason: int | str | None = None
    ) -> Folded:
        """Take new ids; with `finish_reason` they are the last ones, as the engine says."""
        ends_by_token = finish_reason is FinishReason.STOP and bool(token_ids)
        shown = token_ids if not ends_by_token or self._keep_end_text else token_ids[:-1]
        if self._stops is None:
            text = self._detokenizer.push(shown) if self._detokenizer is not None else ""
        else:
            text, num_taken, stop = self._push_watching(shown, self._stops)
            if stop is not None:
                return self._take(token_ids[:num_taken], text, FinishReason.STOP, stop)
        if finish_reason is not None:
            text += self._flush()
            if ends_by_token and isinstance(stop_reason, int):
                stop_reason = self.journal.stop_token_strings.get(stop_reason, stop_reason)
        return self._take(token_ids, text, finish_reason, stop_reason)

    def _push_watching(self, token_ids: Sequence[int], stops: StopStrings) -> tuple[str, int, str | None]:
        """The text until a stop string, how many of the ids it took, and that string. One id at a time: the id that
        completes a stop string is the last one of the answer, however many came together."""
        assert self._detokenizer is not None
        parts: list[str] = []
        for index, token_id in enumerate(token_ids):
            may_stop = self._num_tokens + index + 1 > self._min_tokens
            text, stop = stops.push(self._detokenizer.push((token_id,)), may_stop)
            parts.append(text)
            if stop is not None:
                return "".join(parts), index + 1, stop
        return "".join(parts), len(token_ids), None

    def _flush(self) -> str:
        text = self._detokenizer.flush() if self._detokenizer is not None else ""
        return text if self._stops is None else self._stops.flush() + text

    def _take(
        self,
        token_ids: Sequence[int],
        text: str,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> Folded:
        self._num_tokens += len(token_ids)
        self.journal.emitted_token_ids.extend(token_ids)
        return Folded(text, len(token_ids), finish_reason, stop_reason)
