"""Models without a family of their own: their shape as Transformers reads it, and why one cannot be served so.

Transformers brings torch, which the processes that read configs do without: it is asked in a process of its own
(`transformers_shape`), unless it is loaded anyway. Called by model_config.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shoal.config.experts import ExpertsConfig
from shoal.config.families.common import Fields
from shoal.config.transformers_shape import answer
from shoal.errors import ModelError

# --model-impl. vllm: the native file, as users of that server know it.
MODEL_IMPLS = ("auto", "shoal", "vllm", "transformers")
_SECONDS = 300.0


def wants_transformers(model_impl: str, has_family: bool) -> bool:
    """Whether the model runs through Transformers: where that is said, or there is no native file."""
    return model_impl == "transformers" or (model_impl == "auto" and not has_family)


def transformers_fields(directory: Path, raw: dict[str, Any], trust_remote_code: bool) -> Fields:
    """Fields of ModelConfig: what describes the shape, with architecture and model_type. raw: what config.json says.

    Raises ModelError for a model that Transformers does not have or that cannot run on paged attention.
    """
    found = json.loads(_ask(str(directory.resolve()), json.dumps(raw), trust_remote_code))
    if "error" in found:
        raise ModelError(found["error"])
    fields: Fields = found["fields"]
    fields["sliding_windows"] = tuple(fields["sliding_windows"])
    if (experts := fields["experts"]) is not None:
        fields["experts"] = ExpertsConfig(**{**experts, "layers": tuple(experts["layers"])})
    return {**fields, "model_impl": "transformers", "trust_remote_code": trust_remote_code}


@functools.lru_cache(maxsize=64)
def _ask(directory: str, config: str, trust_remote_code: bool) -> str:
    """The answer, as JSON."""
    if "transformers" in sys.modules:
        return answer(directory, config, trust_remote_code)
    command = [sys.executable, "-m", "shoal.config.transformers_shape", directory]
    command += ["--trust-remote-code"] if trust_remote_code else []
    try:
        done = subprocess.run(command, input=config, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"Transformers did not read this config in {_SECONDS:.0f} seconds") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"Transformers could not be asked about this config: {last}")
    return lines[-1]
