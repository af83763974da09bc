"""Rotary position embedding (Su et al. 2021) and its scalings. Made once a model, or once for each kind of its layers.

T tokens, D head size, R numbers of a head that turn, P positions of the table.
"""

from __future__ import annotations

import functools
import math

import torch

from shoal.config.model_config import RopeConfig
from shoal.errors import ModelError


class Angles:
    """By what the tokens of one step turn: looked up when first asked for, once for all layers of a table."""

    def __init__(self, rotary: RotaryEmbedding, positions: torch.Tensor) -> None:
        self.rotary, self.positions = rotary, positions

    @functools.cached_property
    def cos_and_signed_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, 1, R], fp32."""
        cos, sin = self.rotary.table.index_select(0, self.positions)[:, None, :].chunk(2, dim=-1)
        if self.rotary.interleaved:
            return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class RotaryEmbedding:
    """fp32 tables of cosines and sines. `lookup` once a step, `rotate` once a layer.

    table [P, R]: cosines, then sines of R / 2 angles. The first R numbers of a head turn, in pairs: j and j + R / 2, or
    `interleaved` 2 j and 2 j + 1.
    """

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        num_positions: int,
        device: torch.device,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        """rotary_dim: R; None: the config's share of the head. Raises ModelError where it cannot be."""
        self.rotary_dim = int(head_dim * config.partial) if rotary_dim is None else rotary_dim
        self.interleaved = interleaved
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ModelError(
                f"{self.rotary_dim} numbers of a head of {head_dim} cannot turn; an even number of them can, from 2 on"
            )
        frequencies, factor = inverse_frequencies(config, self.rotary_dim, num_positions)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
        self.table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1).to(device)

    def lookup(self, positions: torch.Tensor) -> Angles:
        """positions [T]."""
        return Angles(self, positions)

    def rotate(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        """x [T, heads, D]: pairs (a, b) become (a cos - b sin, b cos + a sin); computed in fp32."""
        cos, signed_sin = angles.cos_and_signed_sin
        wide = x.float() if self.rotary_dim == x.shape[-1] else x[..., : self.rotary_dim].float()
        if self.interleaved:
            others = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            others = wide.roll(self.rotary_dim // 2, -1)
        turned = others.mul_(signed_sin).add_(wide * cos).to(x.dtype)
        return turned if self.rotary_dim == x.shape[-1] else torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)


def inverse_frequencies(config: RopeConfig, rotary_dim: int, num_positions: int = 1) -> tuple[torch.Tensor, float]:
    """Angle per position for each pair of a head, fp32 [R / 2], and the factor on cosines and sines (yarn, longrope).

    num_positions: of the longest sequence, which chooses where a scaling has several sets.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    numbers = config.parameters
    plain = 1.0 / (config.theta**exponents)
    if config.scaling == "linear":
        return plain / numbers["factor"], 1.0
    if config.scaling == "llama3":
        return _llama3(plain, **numbers), 1.0
    if config.scaling == "yarn":
        return _yarn(config, rotary_dim, exponents), numbers["attention_factor"]
    if config.scaling == "longrope":
        is_long = num_positions > numbers["original_max_position_embeddings"]
        factors = numbers["long_factor" if is_long else "short_factor"]
        if len(factors) != len(plain):
            raise ModelError(f"rope scaling longrope has {len(factors)} factors for the {len(plain)} pairs of a head")
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * config.theta**exponents), numbers["attention_factor"]
    if config.scaling in ("dynamic", "qwen_dynamic"):
        stretched = config.theta * _theta_factor(config, num_positions) ** (rotary_dim / (rotary_dim - 2))
        return 1.0 / (stretched**exponents), 1.0
    assert config.scaling is None, config.scaling
    return plain, 1.0


def _theta_factor(config: RopeConfig, num_positions: int) -> float:
    """NTK-aware scaling by the length of the sequence: as Llama's configs have it, or Qwen's, which goes in powers of
    two. 1 up to the original length."""
    stretch = num_positions / config.parameters["original_max_position_embeddings"]
    if stretch <= 1:
        return 1.0
    if config.scaling == "qwen_dynamic":
        return float(2 ** math.ceil(math.log2(stretch) + 1) - 1)
    factor: float = config.parameters["factor"]
    return factor * stretch - (factor - 1)


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


def _yarn(config: RopeConfig, rotary_dim: int, exponents: torch.Tensor) -> torch.Tensor:
    """NTK by parts (Peng et al. 2023, YaRN): dimensions that turn often stay, those that turn rarely interpolate."""
    numbers = config.parameters

    def dimension_turning(turns: float) -> float:
        ratio = numbers["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return rotary_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension_turning(numbers["beta_fast"]), dimension_turning(numbers["beta_slow"])
    if numbers["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    interpolated_share = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = 1.0 / (config.theta**exponents)
    return plain / numbers["factor"] * interpolated_share + plain * (1 - interpolated_share)
