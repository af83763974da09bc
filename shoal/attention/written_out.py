"""Attention in plain operations, for what PyTorch's fused kernels do not know: capped logits, and sinks.

Q queries, C keys, D head size; batch dimensions stand before them.
"""

from __future__ import annotations

import torch

# Scores that are held at once, fp32: queries go in pieces where there would be more.
_MOST_SCORES = 1 << 24


def attend_written_out(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """query […, Q, D], keys and values […, C, D] -> […, Q, D], computed in fp32. The mask […, Q, C] is added to the
    logits, sinks […, Q, 1] join them: both are broadcast."""
    transposed, wide_values = keys.float().transpose(-1, -2), values.float()
    num_queries, num_keys = query.shape[-2], keys.shape[-2]
    piece = max(1, _MOST_SCORES // (query.shape[:-2].numel() * num_keys))
    outputs = []
    for start in range(0, num_queries, piece):
        rows = slice(start, start + piece)
        scores = torch.matmul(query[..., rows, :].float(), transposed) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + _rows(mask, rows)
        if sinks is not None:
            scores = torch.cat([scores, _rows(sinks, rows).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :num_keys]
        outputs.append(torch.matmul(weights, wide_values).to(query.dtype))
    return torch.cat(outputs, dim=-2)


def _rows(broadcast: torch.Tensor, rows: slice) -> torch.Tensor:
    return broadcast if broadcast.shape[-2] == 1 else broadcast[..., rows, :]
