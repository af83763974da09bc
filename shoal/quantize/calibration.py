"""The calibration text as token ids, and what the matrices of a layer are given when it is read.

S samples, T tokens of each, K inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.errors import ConfigError, ModelError

# What a tokenizer is loaded from: where there is none, Transformers makes empty ones of some families.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# No tokenizer makes fewer tokens of a text than one of so many bytes.
_BYTES_PER_TOKEN = 32


def read_samples(directory: Path, text_file: Path, num_samples: int, length: int) -> torch.Tensor:
    """int64 [S, T]: its first S pieces of T tokens, fewer where it is shorter. Raises ConfigError, ModelError."""
    import transformers

    if not any(path for pattern in _TOKENIZERS for path in directory.glob(pattern)):
        raise ModelError(f"{directory} has no tokenizer ({', '.join(_TOKENIZERS)}); copy those of the model there")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of several libraries
        raise ModelError(f"the tokenizer of {directory} cannot be loaded: {error}") from error
    most = num_samples * length * _BYTES_PER_TOKEN
    try:
        with text_file.open("rb") as opened:
            content = opened.read(most)
        text = content.decode("utf-8", errors="ignore" if len(content) == most else "strict")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {text_file} cannot be read as UTF-8 text: {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(num_samples, len(ids) // length)
    if count == 0:
        raise ConfigError(
            f"--calibration {text_file} has {len(ids)} tokens, fewer than one sample of {length}; a longer text or a "
            "smaller --sequence-length would work"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


@dataclasses.dataclass
class Inputs:
    """What matrices that read the same tensor are given. hessian fp32 [K, K]: XᵀX; magnitude fp32 [K]: mean of |x|.

    before: the module whose output it is, where it is that of one of this layer.
    """

    names: list[str]
    before: str | None
    hessian: torch.Tensor
    magnitude: torch.Tensor
    num_tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.hessian += x.t() @ x
        self.magnitude += x.abs().sum(0)
        self.num_tokens += len(x)


def collect_inputs(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    num_samples: int,
    run: Callable[[int], Any],
    of_experts: frozenset[str] = frozenset(),
) -> list[Inputs]:
    """Run all samples through a layer by `run(sample)`. Raises ModelError for a matrix that none of them reaches,
    unless it is among those of experts."""
    found: list[Inputs] = []
    of_name: dict[str, Inputs] = {}
    given: dict[str, torch.Tensor] = {}
    outputs: list[tuple[str, torch.Tensor]] = []

    def before_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            if name not in of_name:
                same = [other for other, tensor in given.items() if tensor is x]
                given[name] = x
                if same:
                    of_name[name] = of_name[same[0]]
                    of_name[name].names.append(name)
                    return
                before = next((other for other, output in reversed(outputs) if output is x), None)
                size = x.shape[-1]
                of_name[name] = Inputs(
                    [name], before, torch.zeros(size, size, device=x.device), torch.zeros(size, device=x.device)
                )
                found.append(of_name[name])
            given[name] = x
            if of_name[name].names[0] == name:
                of_name[name].add(x)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append((name, output))

        return hook

    hooks = [module.register_forward_pre_hook(before_linear(name)) for name, module in linears.items()]
    hooks += [module.register_forward_hook(after(name)) for name, module in layer.named_modules() if name]
    try:
        for sample in range(num_samples):
            run(sample)
            given.clear()
            outputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in linears if name not in of_name and name not in of_experts]
    if missing:
        raise ModelError(f"the calibration text reaches no {', '.join(missing)}; these layers cannot be calibrated")
    return found
