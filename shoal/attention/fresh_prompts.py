"""Prompts without earlier context, by cuDNN from the step's own queries, keys and values. For the paged backend, which
takes everything else itself.

L tokens of a prompt, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.attention.base import AttentionForm
from shoal.log import get_logger

_logger = get_logger(__name__)

# cuDNN takes one prompt after the other, the paged kernel all at once. H100, 2026-11: 2 prompts of 4096 tokens with
# 32 / 8 heads of 128 take 556 and 715 us, 8 of 1024 with 16 / 8 heads 282 and 122, with a tenth of the launches.
_FEWEST_TOKENS = 2048
# cuDNN plans anew for each length: lengths are padded to these, at the end, which causal attention does not look at.
_LENGTH_STEP = 256
_HALVES = (torch.bfloat16, torch.float16)


class FreshPrompts:
    """Whether and how cuDNN attends: it is asked on sm_90 and later, until it refuses once."""

    def __init__(self, device: torch.device) -> None:
        self._works = (
            device.type == "cuda"
            and torch.backends.cudnn.is_available()
            and torch.cuda.get_device_capability(device) >= (9, 0)
        )

    def takes(
        self, num_new: np.ndarray, seq_lens: np.ndarray, dtype: torch.dtype, head_dim: int, form: AttentionForm
    ) -> np.ndarray:
        """For each sequence of a step whether it is one for cuDNN."""
        if not self._works or not form.is_plain or dtype not in _HALVES or head_dim % 8 or head_dim > 128:
            return np.zeros(len(num_new), np.bool_)
        fresh = (num_new == seq_lens) & (num_new >= _FEWEST_TOKENS)
        return fresh if form.sliding_window is None else fresh & (num_new <= form.sliding_window)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, scale: float
    ) -> bool:
        """query [L, Hq, D], key and value [L, Hk, D] -> output [L, Hq, D]. False when cuDNN cannot: nothing is done."""
        if not self._works:  # it refused another prompt of this step
            return False
        length = query.shape[0]
        padding = -length % _LENGTH_STEP
        if padding:  # zeros: another prompt's rows could hold what is no number
            query, key, value = (F.pad(each, (0, 0, 0, 0, 0, padding)) for each in (query, key, value))
        queries, keys, values = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        try:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _logger.info("cuDNN does not attend here, the paged kernel does: %s", str(error).split("\n")[0])
            self._works = False
            return False
        output.copy_(attended[0, :, :length].transpose(0, 1))
        return True
