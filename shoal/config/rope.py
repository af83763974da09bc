"""RopeConfig: the rotary embedding of a config.json, old and new spelling, normalised. Read by model_config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from shoal.errors import ModelError

DEFAULT_THETA = 10000.0
SUPPORTED_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Phi-3's first configs call it so.
_OTHER_NAMES = {"su": "longrope"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `scaling` is None or one of those below; `parameters` holds its numbers.

    linear: factor. llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    yarn: factor, original_max_position_embeddings, attention_factor, mscale_all_dim, beta_fast, beta_slow, truncate.
    dynamic, qwen_dynamic: original_max_position_embeddings, beyond which theta grows; dynamic: factor.
    longrope: original_max_position_embeddings, attention_factor, short_factor, long_factor.

    The last three have other frequencies for long sequences than for short ones. Cached keys cannot follow a sequence
    that grows from one to the other, so the longest sequence that is served (--max-model-len) decides for all.
    partial: share of a head, from its beginning, that turns.
    """

    theta: float
    scaling: str | None
    parameters: dict[str, Any]
    partial: float = 1.0

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the scale of its attention by: the square of yarn's mscale of all dimensions."""
        mscale = self.parameters.get("mscale_all_dim") if self.scaling == "yarn" else None
        return _yarn_mscale(self.parameters["factor"], mscale) ** 2 if mscale else 1.0

    def max_length(self, max_position_embeddings: int) -> int:
        """Positions that the scaled embedding reaches. Linear, dynamic and yarn stretch; the configs of llama3 and
        longrope have it counted in."""
        if self.scaling in ("linear", "dynamic"):
            return int(max_position_embeddings * self.parameters["factor"])
        if self.scaling == "yarn":
            stretched = int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])
            return max(stretched, max_position_embeddings)
        return max_position_embeddings


def parse_rope(
    raw: dict[str, Any], max_position_embeddings: int, *, allows_partial: bool = False, layer_type: str | None = None
) -> RopeConfig:
    """Read `rope_parameters` (Transformers 5), or `rope_theta` with `rope_scaling` (before). Raises ModelError.

    allows_partial: whether the architecture turns a share of each head where its config says so. layer_type: whose set
    to take where there is one for each, such as "full_attention"; None: of an architecture that has one for all.
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ModelError(f"rope_parameters / rope_scaling must be an object; found {found!r}")
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        if layer_type is None:
            raise ModelError(
                f"rope_parameters per layer type ({', '.join(nested)}) are not supported; one set for all is"
            )
        if layer_type not in nested:
            raise ModelError(f"rope_parameters has no set for {layer_type!r} layers; found: {', '.join(nested)}")
        found = found[layer_type]
    theta = _number(found, "rope_theta", _number(raw, "rope_theta", DEFAULT_THETA))
    if theta is None or theta <= 0:
        raise ModelError(f"rope_theta must be above 0; found {theta!r}")
    partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    partial = 1.0 if partial is None else partial
    if isinstance(partial, bool) or not isinstance(partial, (int, float)) or not 0 < partial <= 1:
        raise ModelError(f"partial_rotary_factor must be above 0 and at most 1; found {partial!r}")
    if partial != 1 and not allows_partial:
        raise ModelError(f"partial_rotary_factor {partial!r} is not supported; only 1.0 is, for this architecture")
    scaling, parameters = _parse_scaling(raw, found, max_position_embeddings)
    return RopeConfig(theta=theta, scaling=scaling, parameters=parameters, partial=float(partial))


def _parse_scaling(
    raw: dict[str, Any], found: dict[str, Any], max_position_embeddings: int
) -> tuple[str | None, dict[str, Any]]:
    """The kind and its numbers."""
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str):
        raise ModelError(f"rope_type must be a name; found {kind!r}")
    kind = _OTHER_NAMES.get(kind, kind)
    original = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    original = original or max_position_embeddings
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise ModelError(f"original_max_position_embeddings must be a positive integer; found {original!r}")
    if kind == "default":
        return None, {}
    if kind == "linear":
        return kind, {"factor": _required(found, kind, "factor")}
    if kind == "dynamic":
        return kind, {
            "factor": _required(found, kind, "factor"),
            "original_max_position_embeddings": max_position_embeddings,
        }
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        parameters: dict[str, Any] = {name: _required(found, kind, name) for name in names}
        if parameters["high_freq_factor"] == parameters["low_freq_factor"]:
            raise ModelError("rope scaling llama3: high_freq_factor and low_freq_factor must differ")
        parameters["original_max_position_embeddings"] = original
        return kind, parameters
    if kind == "yarn":
        return kind, _yarn(found, original, max_position_embeddings)
    if kind == "longrope":
        return kind, _longrope(found, original, max_position_embeddings)
    raise ModelError(f"rope scaling {kind!r} is not supported; supported: {', '.join(SUPPORTED_SCALINGS)}")


def _yarn(found: dict[str, Any], original: int, max_position_embeddings: int) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071) with the defaults of the paper and of Transformers."""
    factor = max_position_embeddings / original
    if found.get("factor") is not None:
        factor = _required(found, "yarn", "factor")
    attention_factor = _number(found, "attention_factor", None)
    if attention_factor is None:
        mscale, mscale_all_dim = _number(found, "mscale", None), _number(found, "mscale_all_dim", None)
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "mscale_all_dim": _number(found, "mscale_all_dim", None),
        "beta_fast": _number(found, "beta_fast", None) or 32.0,
        "beta_slow": _number(found, "beta_slow", None) or 1.0,
        "truncate": bool(found.get("truncate", True)),
    }


def _longrope(found: dict[str, Any], original: int, max_position_embeddings: int) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) as Phi-3 has it: a factor for each pair of a head."""
    factor = _number(found, "factor", None)
    if factor is None:
        factor = max_position_embeddings / original
    attention_factor = _number(found, "attention_factor", None)
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    parameters: dict[str, Any] = {"original_max_position_embeddings": original, "attention_factor": attention_factor}
    for name in ("short_factor", "long_factor"):
        values = found.get(name)
        if not isinstance(values, list) or not all(isinstance(each, (int, float)) and each > 0 for each in values):
            raise ModelError(f"rope scaling longrope needs {name}, a list of numbers above 0; found {values!r}")
        parameters[name] = [float(each) for each in values]
    return parameters


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
