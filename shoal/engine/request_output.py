"""RequestOutput from the updates of a request: what AsyncEngine.collect and LLM return."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.engine.prepare import PreparedRequest
from shoal.engine.tokenizer import Tokenizer
from shoal.types.outputs import CompletionOutput, Logprob, RequestOutput, RequestUpdate, TokenLogprobs


class OutputBuilder:
    """Adds updates up to one RequestOutput."""

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: list[list[str]] = [[] for _ in range(request.params.n)]
        wants = request.params.logprobs is not None
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[
                CompletionOutput(index, "", [], 0.0 if wants else None, [] if wants else None)
                for index in range(request.params.n)
            ],
        )

    def add(self, update: RequestUpdate) -> None:
        """Take one update of one answer."""
        answer = self.output.outputs[update.index]
        self._texts[update.index].append(update.text)
        answer.token_ids.extend(update.token_ids)
        if update.logprobs is not None and answer.logprobs is not None:
            answer.logprobs.extend(logprob_dicts(update.logprobs, self._tokenizer))
            chosen = sum(entry.logprobs[0] for entry in update.logprobs)
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + chosen
        if update.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else logprob_dict(entry, self._tokenizer) for entry in update.prompt_logprobs
            ]
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, update.num_cached_tokens)
        if update.finish_reason is not None:
            answer.finish_reason = str(update.finish_reason)
            answer.stop_reason = update.stop_reason

    def build(self) -> RequestOutput:
        """The output so far."""
        for answer, texts in zip(self.output.outputs, self._texts, strict=True):
            answer.text = "".join(texts)
        self.output.finished = all(answer.finished() for answer in self.output.outputs)
        return self.output


def logprob_dicts(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer | None) -> list[dict[int, Logprob]]:
    """One dict per position, as `logprob_dict` makes it."""
    return [logprob_dict(entry, tokenizer) for entry in entries]


def logprob_dict(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Token id -> Logprob at one position: the token itself first, then the top ones, which are ranked 1, 2, …"""
    result: dict[int, Logprob] = {}
    for position, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        if token_id in result:
            continue  # the token itself is among the top ones
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        result[token_id] = Logprob(logprob, entry.rank if position == 0 else position, text)
    return result
