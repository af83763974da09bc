"""Sampler: from the logits of a step to one token a row. Called by the model runner, with SamplingState's metadata.

Shapes: R rows, V vocabulary, W width of this rank's slice of it (alone: V). The order of operations, the same as in
vLLM:

1. the raw logits are set aside, for rows that ask for log-probabilities
2. what may be sampled: grammar, allowed and banned tokens, logit bias, end tokens before min_tokens
3. penalties: repetition, frequency, presence
4. greedy rows: the best token, the lowest id of several. All others: temperature, min_p, top_k, top_p (its mass is
   that of what min_p and top_k left), then a draw in proportion to what remains
5. log-probability and rank of the chosen token, and the top k, from 1

A feature that no row uses costs nothing: a greedy batch is one argmax. Nothing waits for the device.

Ranks that share the vocabulary sample together, each on its own slice of the logits: masks and penalties act on single
tokens, and so do greedy rows and draws with temperature and min_p, whose best token of each rank is all that is
exchanged. Only rows with top_k, top_p or log-probabilities gather their logits. All ranks end with the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.draws import DrawKind, draw, draw_together
from shoal.sampling.logprobs import LogprobsTensors, sampled_logprobs
from shoal.sampling.masks import apply_allowed, apply_banned, apply_biases, apply_grammar_mask
from shoal.sampling.penalties import apply_penalties
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
        """logits fp32 [R, W], used as scratch space: their values are lost. grammar_mask: see `apply_grammar_mask`."""
        plan = metadata.plan
        vocabulary = plan.vocabulary
        assert logits.dtype == torch.float32, f"logits must be float32; got {logits.dtype}"
        expected = (plan.num_rows, vocabulary.width)
        assert logits.shape == expected, f"logits {tuple(logits.shape)} for a plan of {expected}"
        logits = logits.contiguous()
        raw_logits = None
        if plan.logprobs is not None:
            raw_logits = vocabulary.gather(take_rows(logits, plan.logprobs.rows))
            if raw_logits is logits:
                raw_logits = logits.clone()
        _apply_masks(logits, metadata, grammar_mask)
        if plan.penalties is not None:
            apply_penalties(logits, plan.penalties, metadata.counts)
        token_ids = self._choose(logits, metadata)
        logprobs = None
        if plan.logprobs is not None and raw_logits is not None:
            logprobs = sampled_logprobs(raw_logits, take_rows(token_ids, plan.logprobs.rows), plan.logprobs)
        return SampledTokens(token_ids, logprobs)

    def _choose(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        plan = metadata.plan
        vocabulary = plan.vocabulary
        best = _BestTokens(plan.num_rows, vocabulary, logits.device)
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
        self._token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
        # Of equal values the first rank's counts: so it does for tokens that are known already.
        self._values = torch.zeros(0 if vocabulary.is_whole else num_rows, dtype=torch.float32, device=device)

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
