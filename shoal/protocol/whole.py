"""A whole answer in the API's shapes, made of a RequestOutput. Says what the joined chunks of a stream would say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import UNSET

from shoal.protocol.logprobs import (
    CompletionLogprobsBuilder,
    TokenBytes,
    chat_logprobs,
    prompt_logprobs,
)
from shoal.protocol.responses import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    PromptLogprobs,
    Usage,
)
from shoal.types.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs


def token_logprobs(entry: Mapping[int, Logprob], num_top: int) -> TokenLogprobs:
    """The entry of a RequestOutput as the engine had it: the token itself, then the `num_top` likeliest ones.

    In the dict the token itself stands first and only once; its place among the likeliest is the one that is missing.
    """
    (token_id, chosen), *others = entry.items()
    top = [(other_id, other.logprob) for other_id, other in others]
    if len(top) < num_top:
        ranks = {other.rank for _, other in others}
        missing = next(rank for rank in range(1, len(top) + 2) if rank not in ranks)
        top.insert(missing - 1, (token_id, chosen.logprob))
    return TokenLogprobs(
        [token_id, *(other_id for other_id, _ in top)],
        [chosen.logprob, *(logprob for _, logprob in top)],
        chosen.rank or 1,
    )


def chat_completion(
    output: RequestOutput,
    *,
    id: str,
    created: int,
    model: str,
    role: str,
    num_top: int | None,
    token_bytes: TokenBytes,
    return_token_ids: bool,
) -> ChatCompletion:
    """num_top: the logprobs that were asked for, None for none."""

    def choice(answer: CompletionOutput) -> ChatChoice:
        logprobs = None
        if answer.logprobs is not None and num_top is not None:
            entries = (token_logprobs(entry, num_top) for entry in answer.logprobs)
            logprobs = ChatLogprobs(chat_logprobs(entries, token_bytes))
        return ChatChoice(
            answer.index,
            ChatMessage(role, answer.text),
            logprobs,
            answer.finish_reason or "",
            answer.stop_reason,
            answer.token_ids if return_token_ids else UNSET,
        )

    return ChatCompletion(
        id,
        "chat.completion",
        created,
        model,
        [choice(answer) for answer in output.outputs],
        _usage([output]),
        _prompt_logprobs(output),
        output.prompt_token_ids if return_token_ids else UNSET,
    )


def completion(
    outputs: Sequence[RequestOutput],
    *,
    id: str,
    created: int,
    model: str,
    echo: list[str] | None,
    only_echo: bool,
    num_top: int | None,
    make_logprobs: Callable[[], CompletionLogprobsBuilder],
    return_token_ids: bool,
    return_prompt_logprobs: bool,
) -> Completion:
    """outputs: one per prompt. echo: the prompts' texts where they open the answers. num_top: as in chat_completion."""

    def choice(prompt_index: int, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        if only_echo:
            answer = CompletionOutput(answer.index, "", [], None, [], answer.finish_reason, answer.stop_reason)
        opening = echo[prompt_index] if echo is not None else ""
        result = CompletionChoice(
            prompt_index * len(output.outputs) + answer.index,
            opening + answer.text,
            None,
            answer.finish_reason,
            answer.stop_reason,
        )
        if num_top is not None and answer.logprobs is not None:
            builder = make_logprobs()
            if echo is not None:
                entries = [None if e is None else token_logprobs(e, num_top) for e in output.prompt_logprobs or []]
                builder.add_prompt(output.prompt_token_ids, entries, opening)
            builder.add(token_logprobs(entry, num_top) for entry in answer.logprobs)
            result.logprobs = builder.take()
        if return_token_ids:
            result.token_ids = answer.token_ids
            result.prompt_token_ids = output.prompt_token_ids
        if return_prompt_logprobs:
            result.prompt_logprobs = _prompt_logprobs(output)
        return result

    choices = [choice(index, output, answer) for index, output in enumerate(outputs) for answer in output.outputs]
    return Completion(id, "text_completion", created, model, choices, _usage(outputs, only_prompt=only_echo))


def _usage(outputs: Sequence[RequestOutput], *, only_prompt: bool = False) -> Usage:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_completion = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    num_cached = sum(output.num_cached_tokens for output in outputs)
    return Usage.of(num_prompt, 0 if only_prompt else num_completion, num_cached)


def _prompt_logprobs(output: RequestOutput) -> PromptLogprobs | None:
    return None if output.prompt_logprobs is None else prompt_logprobs(output.prompt_logprobs)
