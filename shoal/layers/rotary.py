"""Rotary position embedding (Su et al. 2021) and its scalings: linear, llama3, yarn. Made once a model.

T tokens, D head size, P positions of the table.
"""

from __future__ import annotations

import functools
import math

import torch

from shoal.config.model_config import RopeConfig


class Angles:
    """By what the tokens of one step turn: looked up when first asked for, once for all layers."""

    def __init__(self, table: torch.Tensor, positions: torch.Tensor) -> None:
        self._table, self.positions = table, positions

    @functools.cached_property
    def cos_and_signed_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, 1, D], fp32."""
        cos, sin = self._table.index_select(0, self.positions)[:, None, :].chunk(2, dim=-1)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class RotaryEmbedding:
    """fp32 tables of cosines and sines. `lookup` once a step, `rotate` once a layer.

    table [P, D]: cosines, then sines; each half as wide as a head, since both halves of a head turn by the same angles.
    """

    def __init__(self, config: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(config, head_dim)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
        self.table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1).to(device)
        self._half = head_dim // 2

    def lookup(self, positions: torch.Tensor) -> Angles:
        """positions [T]."""
        return Angles(self.table, positions)

    def rotate(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        """x [T, heads, D]: (a, b) becomes (a cos - b sin, b cos + a sin) for its halves; computed in fp32."""
        cos, signed_sin = angles.cos_and_signed_sin
        wide = x.float()
        return wide.roll(self._half, -1).mul_(signed_sin).add_(wide * cos).to(x.dtype)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position for each pair of a head, fp32 [D / 2], and the factor on cosines and sines (yarn)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.scaling == "linear":
        return plain / config.parameters["factor"], 1.0
    if config.scaling == "llama3":
        return _llama3(plain, **config.parameters), 1.0
    if config.scaling == "yarn":
        return _yarn(config, head_dim, exponents), config.parameters["attention_factor"]
    assert config.scaling is None, config.scaling
    return plain, 1.0


def _llama3(
    plain: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """Long waves slow down by `factor`, short ones stay, those between are blended (Llama 3.1)."""
    turns = original_max_position_embeddings * plain / (2 * math.pi)  # full turns within the original context
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(config: RopeConfig, head_dim: int, exponents: torch.Tensor) -> torch.Tensor:
    """NTK by parts (Peng et al. 2023, YaRN): dimensions that turn often stay, those that turn rarely interpolate."""
    numbers = config.parameters

    def dimension_turning(turns: float) -> float:
        ratio = numbers["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension_turning(numbers["beta_fast"]), dimension_turning(numbers["beta_slow"])
    if numbers["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = 1.0 / (config.theta**exponents)
    return plain / numbers["factor"] * interpolated_share + plain * (1 - interpolated_share)
