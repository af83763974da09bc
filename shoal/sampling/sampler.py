"""Sampler: from the logits of a step to one token a row. Called by the model runner, with SamplingState's metadata.

Shapes: R rows, V vocabulary, W width of this rank's slice of it (alone: V). The order of operations, the same as in
vLLM:

1. the raw logits are set aside, for rows that ask for log-probabilities
2. what may be sampled: grammar, allowed and banned tokens, logit bias, end tokens before min_tokens
3. penalties: repetition, frequency, presence
4. greedy rows: the best token, the lowest id of several. All others: temperature, min_p, top_k, top_p (its mass is
   that of what min_p and top_k left), then a draw in proportion to what remains
5. log-probability and rank of the chosen token, and the top k, from 1

A feature that no row uses costs nothing: a greedy batch is one argmax. Nothing waits for the device. On a GPU with
kernels, greedy rows and those drawn from the whole vocabulary are one pass over the logits (`kernels/sampling.py`), and
top_k and top_p need no sort (`kernels/truncated.py`).

Ranks that share the vocabulary sample together, each on its own slice of the logits: masks and penalties act on single
tokens, and so do greedy rows and draws with temperature and min_p, whose best token of each rank is all that is
exchanged. Only rows with top_k, top_p or log-probabilities gather their logits. All ranks end with the same tokens.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.sampling.draws import DrawKind, draw, draw_together
from shoal.sampling.logprobs import LogprobsTensors, sampled_logprobs
from shoal.sampling.masks import apply_allowed, apply_banned, apply_biases, apply_grammar_mask
from shoal.sampling.penalties import apply_penalties
from shoal.sampling.plan import ChoiceRows, TruncatedRows
from shoal.sampling.random import token_hashes
from shoal.sampling.rows import take_rows
from shoal.sampling.state import SamplingMetadata


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """token_ids int64 [R], on the device; logprobs only where a row asked for them."""

    token_ids: Tensor
    logprobs: LogprobsTensors | None


class Sampler:
    """Chooses tokens. Holds nothing but the hashed token ids of the vocabulary."""

    def __init__(self) -> None:
        self._hashed_ids: Tensor | None = None  # int32, of whichever is more: V, or the ids up to this rank's last

    def sample(self, logits: Tensor, metadata: SamplingMetadata, grammar_mask: Tensor | None = None) -> SampledTokens:
        """logits [R, W], as the head projects them, used as scratch space: their values are lost, and what stands in
        the columns of padding does not count. grammar_mask: see `apply_grammar_mask`.

        Logits are float32 from here on, whatever the product was rounded to; those that are only chosen from are
        widened as they are read.
        """
        plan = metadata.plan
        vocabulary = plan.vocabulary
        expected = (plan.num_rows, vocabulary.width)
        assert logits.shape == expected, f"logits {tuple(logits.shape)} for a plan of {expected}"
        if not (plan.only_chooses and metadata.suppressed is None and grammar_mask is None):
            logits = logits.float()
        logits = logits.contiguous()
        if vocabulary.num_tokens < vocabulary.width:
            logits[:, vocabulary.num_tokens :] = float("-inf")
        raw_logits = None
        if plan.logprobs is not None:
            raw_logits = vocabulary.gather(take_rows(logits, plan.logprobs.rows))
            if raw_logits is logits:
                raw_logits = logits.clone()
        _apply_masks(logits, metadata, grammar_mask)
        if plan.penalties is not None:
            apply_penalties(logits, plan.penalties, metadata.counts)
        token_ids = self._choose(logits, metadata)
        if is_compiling_ahead():  # no kernel has run: what stands there is no token
            token_ids.zero_()
        logprobs = None
        if plan.logprobs is not None and raw_logits is not None:
            logprobs = sampled_logprobs(raw_logits, take_rows(token_ids, plan.logprobs.rows), plan.logprobs)
        return SampledTokens(token_ids, logprobs)

    def _choose(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        plan = metadata.plan
        vocabulary = plan.vocabulary
        best = _BestTokens(plan.num_rows, vocabulary, logits.device)
        if plan.choice is not None:
            best.put_choice(logits, plan.choice, metadata.row_keys)
        if plan.truncated is not None:
            best.put_truncated(logits, plan.truncated, metadata.row_keys)
        if plan.has_greedy:
            best.put_columns(plan.greedy_rows, *_greatest(take_rows(logits, plan.greedy_rows), vocabulary))
        for group in plan.draw_groups:
            assert metadata.row_keys is not None
            row_keys, hashed_ids = metadata.row_keys[group.keys], self._hashed_vocabulary(vocabulary, logits.device)
            own = take_rows(logits, group.rows)
            if group.kind is DrawKind.WHOLE_VOCABULARY and not vocabulary.is_whole:
                own_hashes = hashed_ids[vocabulary.start : vocabulary.start + vocabulary.width]
                best.put_columns(group.rows, *draw_together(own, group, row_keys, own_hashes, vocabulary))
            else:
                whole_hashes = hashed_ids[: vocabulary.vocab_size]
                best.put_known(group.rows, draw(vocabulary.gather(own), group, row_keys, whole_hashes))
        return best.agree()

    def _hashed_vocabulary(self, vocabulary: VocabularySlice, device: torch.device) -> Tensor:
        table = self._hashed_ids
        num_ids = max(vocabulary.vocab_size, vocabulary.start + vocabulary.width)
        if table is None or table.shape[0] != num_ids or table.device != device:
            table = self._hashed_ids = token_hashes(num_ids, device)
        return table


class _BestTokens:
    """The tokens chosen so far. With several ranks: the best one of this rank's tokens for each row, and its value."""

    def __init__(self, num_rows: int, vocabulary: VocabularySlice, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # Of equal values the first rank's counts: so it does for tokens that are known already.
        self._values = torch.zeros(num_rows, dtype=torch.float32, device=device)

    def put_choice(self, logits: Tensor, choice: ChoiceRows, row_keys: Tensor | None) -> None:
        """logits [R, W] of all rows. row_keys: those of the step."""
        vocabulary, num_chosen = self._vocabulary, choice.temperature.shape[0]
        best_logits = None
        if choice.uses_min_p and not vocabulary.is_whole:
            best_logits = vocabulary.greatest(take_rows(logits, choice.rows).amax(dim=-1).float())
        if not choice.has_keys:  # nobody reads them
            row_keys = choice.temperature.view(torch.int32)
        assert row_keys is not None
        _kernel("shoal.kernels.sampling", "choose_tokens")(
            logits,
            choice.temperature,
            choice.min_p,
            row_keys[:num_chosen],
            vocabulary.start,
            vocabulary.num_tokens,
            best_logits=best_logits,
            row_numbers=choice.rows,
            outputs=(self._values, self._token_ids),
        )

    def put_truncated(self, logits: Tensor, group: TruncatedRows, row_keys: Tensor | None) -> None:
        """As `put_choice`. All ranks' logits are needed, and all find the same."""
        assert row_keys is not None
        rows, token_ids = group.rows, self._token_ids
        if not self._vocabulary.is_whole:
            logits, rows = self._vocabulary.gather(take_rows(logits, rows)), None
            token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        _kernel("shoal.kernels.truncated", "draw_truncated")(
            logits,
            group.temperature,
            group.min_p,
            group.top_p,
            group.top_k,
            row_keys[group.keys],
            token_ids,
            rows,
        )
        if token_ids is not self._token_ids:
            self.put_known(group.rows, token_ids)

    def put_known(self, rows: Tensor | None, token_ids: Tensor) -> None:
        """token_ids int64 [G], the same on all ranks. The first rank's count should they differ: two kinds of processor
        may differ in the last bit of an exponential."""
        if rows is None:
            self._token_ids = token_ids
        else:
            self._token_ids.index_copy_(0, rows, token_ids)

    def put_columns(self, rows: Tensor | None, values: Tensor | None, columns: Tensor) -> None:
        """columns int64 [G] of the logits; values fp32 [G], the greatest of all ranks' wins; None for a rank alone."""
        if values is None:
            self.put_known(rows, columns)
            return
        self.put_known(rows, columns + self._vocabulary.start)
        if rows is None:
            self._values = values
        else:
            self._values.index_copy_(0, rows, values)

    def agree(self) -> Tensor:
        """Token ids int64 [R], the same on all ranks."""
        return self._vocabulary.best(self._values, self._token_ids)


@functools.cache
def _kernel(module: str, name: str) -> Callable[..., object]:
    """Triton is imported where it is needed only."""
    kernel: Callable[..., object] = getattr(importlib.import_module(module), name)
    return kernel


def _greatest(logits: Tensor, vocabulary: VocabularySlice) -> tuple[Tensor | None, Tensor]:
    """The greatest logit of each row [G] (None for a rank alone, who need not know) and its column [G]."""
    columns = logits.argmax(dim=-1)
    return None if vocabulary.is_whole else logits.gather(1, columns.unsqueeze(1)).squeeze(1), columns


def _apply_masks(logits: Tensor, metadata: SamplingMetadata, grammar_mask: Tensor | None) -> None:
    plan = metadata.plan
    if grammar_mask is not None:
        apply_grammar_mask(logits, grammar_mask, metadata.plan.vocabulary)
    if plan.allowed is not None:
        apply_allowed(logits, plan.allowed)
    if plan.banned is not None:
        apply_banned(logits, plan.banned)
    if plan.biases is not None:
        apply_biases(logits, plan.biases)
    if metadata.suppressed is not None:
        apply_banned(logits, metadata.suppressed)
