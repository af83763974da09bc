"""RopeConfig: the rotary embedding of a config.json, old and new spelling, normalised. Read by model_config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from shoal.errors import ModelError

DEFAULT_THETA = 10000.0
SUPPORTED_SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `scaling` is None or one of "linear", "llama3", "yarn"; `parameters` holds its numbers.

    linear: factor. llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    yarn: factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, truncate.
    """

    theta: float
    scaling: str | None
    parameters: dict[str, Any]

    def max_length(self, max_position_embeddings: int) -> int:
        """Positions that the scaled embedding reaches. Linear and yarn stretch; llama3's config has it counted in."""
        if self.scaling == "linear":
            return int(max_position_embeddings * self.parameters["factor"])
        if self.scaling == "yarn":
            stretched = int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])
            return max(stretched, max_position_embeddings)
        return max_position_embeddings


def parse_rope(raw: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (Transformers 5), or `rope_theta` with `rope_scaling` (before). Raises ModelError."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ModelError(f"rope_parameters / rope_scaling must be an object; found {found!r}")
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise ModelError(f"rope_parameters per layer type ({', '.join(nested)}) are not supported; one set for all is")
    theta = _number(found, "rope_theta", _number(raw, "rope_theta", DEFAULT_THETA))
    if theta is None or theta <= 0:
        raise ModelError(f"rope_theta must be above 0; found {theta!r}")
    partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor {partial!r} is not supported; only 1.0 is, for this architecture")
    kind = found.get("rope_type") or found.get("type") or "default"
    original = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    original = original or max_position_embeddings
    if kind == "default":
        return RopeConfig(theta=theta, scaling=None, parameters={})
    if kind == "linear":
        return RopeConfig(theta=theta, scaling=kind, parameters={"factor": _required(found, kind, "factor")})
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        parameters: dict[str, Any] = {name: _required(found, kind, name) for name in names}
        if parameters["high_freq_factor"] == parameters["low_freq_factor"]:
            raise ModelError("rope scaling llama3: high_freq_factor and low_freq_factor must differ")
        parameters["original_max_position_embeddings"] = original
        return RopeConfig(theta=theta, scaling=kind, parameters=parameters)
    if kind == "yarn":
        return RopeConfig(theta=theta, scaling=kind, parameters=_yarn(found, original, max_position_embeddings))
    raise ModelError(f"rope scaling {kind!r} is not supported; supported: {', '.join(SUPPORTED_SCALINGS)}")


def _yarn(found: dict[str, Any], original: int, max_position_embeddings: int) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071) with the defaults of the paper and of Transformers."""
    factor = _number(found, "factor", None)
    if factor is None:
        factor = max_position_embeddings / original
    attention_factor = _number(found, "attention_factor", None)
    if attention_factor is None:
        mscale, mscale_all_dim = found.get("mscale"), found.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "beta_fast": _number(found, "beta_fast", None) or 32.0,
        "beta_slow": _number(found, "beta_slow", None) or 1.0,
        "truncate": bool(found.get("truncate", True)),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(source: dict[str, Any], name: str, default: float | None) -> float | None:
    value = source.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelError(f"{name} must be a number; found {value!r}")
    return float(value)


def _required(found: dict[str, Any], kind: str, name: str) -> float:
    value = _number(found, name, None)
    if value is None or value <= 0:
        raise ModelError(f"rope scaling {kind} needs {name} above 0; found {found.get(name)!r}")
    return value
