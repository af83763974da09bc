"""Sampler: from the logits of a step to one token a row. Called by the model runner, with SamplingState's metadata.

Shapes: R rows, V vocabulary. The order of operations, the same as in vLLM:

1. the raw logits are set aside, for rows that ask for log-probabilities
2. what may be sampled: grammar, allowed and banned tokens, logit bias, end tokens before min_tokens
3. penalties: repetition, frequency, presence
4. greedy rows: the best token, the lowest id of several. All others: temperature, min_p, top_k, top_p (its mass is
   that of what min_p and top_k left), then a draw in proportion to what remains
5. log-probability and rank of the chosen token, and the top k, from 1

A feature that no row uses costs nothing: a greedy batch is one argmax. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.sampling.draws import draw
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
        self._hashed_ids: Tensor | None = None

    def sample(self, logits: Tensor, metadata: SamplingMetadata, grammar_mask: Tensor | None = None) -> SampledTokens:
        """logits fp32 [R, V], used as scratch space: their values are lost. grammar_mask: see `apply_grammar_mask`."""
        plan = metadata.plan
        assert logits.dtype == torch.float32, f"logits must be float32; got {logits.dtype}"
        expected = (plan.num_rows, plan.vocab_size)
        assert logits.shape == expected, f"logits {tuple(logits.shape)} for a plan of {expected}"
        logits = logits.contiguous()
        raw_logits = None
        if plan.logprobs is not None:
            raw_logits = logits.clone() if plan.logprobs.rows is None else take_rows(logits, plan.logprobs.rows)
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
        if not plan.draw_groups:
            return logits.argmax(dim=-1)
        token_ids = torch.empty(plan.num_rows, dtype=torch.int64, device=logits.device)
        if plan.has_greedy and plan.greedy_rows is not None:
            token_ids.index_copy_(0, plan.greedy_rows, logits.index_select(0, plan.greedy_rows).argmax(dim=-1))
        assert metadata.row_keys is not None
        hashed_ids = self._hashed_vocabulary(logits)
        for group in plan.draw_groups:
            drawn = draw(logits, group, metadata.row_keys[group.keys], hashed_ids)
            if group.rows is None:
                return drawn
            token_ids.index_copy_(0, group.rows, drawn)
        return token_ids

    def _hashed_vocabulary(self, logits: Tensor) -> Tensor:
        table = self._hashed_ids
        if table is None or table.shape[0] != logits.shape[1] or table.device != logits.device:
            table = self._hashed_ids = token_hashes(logits.shape[1], logits.device)
        return table


def _apply_masks(logits: Tensor, metadata: SamplingMetadata, grammar_mask: Tensor | None) -> None:
    plan = metadata.plan
    if grammar_mask is not None:
        apply_grammar_mask(logits, grammar_mask)
    if plan.allowed is not None:
        apply_allowed(logits, plan.allowed)
    if plan.banned is not None:
        apply_banned(logits, plan.banned)
    if plan.biases is not None:
        apply_biases(logits, plan.biases)
    if metadata.suppressed is not None:
        apply_banned(logits, metadata.suppressed)
