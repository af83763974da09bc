"""Which steps an engine on CUDA captures as graphs, what these take, and from where on launching kernels one by one is
quick enough. For the engine itself and the planner."""

from __future__ import annotations

import math

from shoal.config.model_config import ModelConfig

# Of steps with prompts: from 512 tokens on a fifth of a graph pads a step at most.
_TOKEN_SIZES = (
    16, 32, 64, 96, 128, 192, 256, 384, 512, *range(640, 1025, 128), *range(1280, 2049, 256), *range(2560, 4097, 512),
    *range(5120, 8193, 1024),
)  # fmt: skip
# Bytes of the smallest half that copy engines sum, and what they may take for all.
_SMALLEST_HALF = 16 << 20
LARGE_SUM_BYTES = 1 << 30
# Tokens of a step from which ranks sum one half of them while they compute the other, where sums are slow.
OVERLAP_TOKENS = 4096
# Up to these steps are captured whatever the model. On several ranks these are all: no graph has held sums of more
# tokens over ranks yet.
_FEW_TOKENS = 512
# What Python takes to launch a layer's kernels, and what a GPU multiplies meanwhile (H100, 2026-11: 1.4 ms, and about
# 600 TFLOP/s in bf16; others are slower).
_LAUNCH_SECONDS, _FLOPS = 1.4e-3, 5e14
_BYTES_A_GRAPH, _OVERHEAD_BYTES = 1 << 20, 256 << 20


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Of steps of one token a request: 1, 2, 4, 8, then every 8 to 256 and every 16 beyond; the last max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def token_graph_sizes(config: ModelConfig, tensor_size: int, max_num_batched_tokens: int) -> list[int]:
    """Of steps with prompts, in tokens: as far as a rank alone would compute for a shorter time than Python launches
    the kernels, and no more than a step may have."""
    most = _FEW_TOKENS
    if tensor_size == 1:
        most = max(most, int(_LAUNCH_SECONDS * _FLOPS / (2 * _layer_weights(config))))
    return [size for size in _TOKEN_SIZES if size <= min(most, max_num_batched_tokens)]


def large_sum_bytes(config: ModelConfig, tensor_size: int, max_num_batched_tokens: int, itemsize: int) -> int:
    """Memory through which copy engines sum halves (`kernels/copied_sum.py`): for two, what comes of the ranks and the
    result."""
    if tensor_size == 1 or max_num_batched_tokens < tokens_in_halves(config, tensor_size, itemsize):
        return 0
    return min(2 * max_num_batched_tokens * config.hidden_size * itemsize, LARGE_SUM_BYTES)


def tokens_in_halves(config: ModelConfig, tensor_size: int, itemsize: int) -> int:
    """Tokens of a step, an even number, from which copy engines sum its halves: OVERLAP_TOKENS at least, so many that
    ranks compute a layer in two halves for as long as Python launches these, and that copies of a half are about as
    quick as NCCL's sums."""
    launching = math.ceil(_LAUNCH_SECONDS * _FLOPS * tensor_size / (2 * _layer_weights(config)))
    return 2 * max(OVERLAP_TOKENS // 2, launching, -(-_SMALLEST_HALF // (config.hidden_size * itemsize)))


def graph_bytes(config: ModelConfig, tensor_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """About what the capture takes on a rank: activations of the largest step, logits, and the graphs themselves."""
    token_sizes = token_graph_sizes(config, tensor_size, max_num_batched_tokens)
    width = 2 * config.intermediate_size // tensor_size + 8 * config.hidden_size
    if config.experts is not None:
        routed = 2 * config.hidden_size + 3 * config.experts.intermediate_size // tensor_size
        width = max(width, config.experts.num_per_token * routed // 2 + 8 * config.hidden_size)
    numbers = max([max_num_seqs, *token_sizes]) * width + max_num_seqs * config.vocab_size // tensor_size
    num_graphs = 2 * len(graph_sizes(max_num_seqs)) + len(token_sizes)
    return numbers * 4 + num_graphs * _BYTES_A_GRAPH + _OVERHEAD_BYTES


def _layer_weights(config: ModelConfig) -> int:
    """About how many numbers of a layer a token is multiplied with."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    width = config.intermediate_size
    if config.experts is not None:
        width = config.experts.num_per_token * config.experts.intermediate_size + config.experts.shared_size
    return config.hidden_size * (heads * config.head_dim + 3 * width)
