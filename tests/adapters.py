"""Random LoRA adapters as PEFT writes them, and checkpoints with one merged into the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    directory: Path,
    checkpoint: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ALL_LINEAR,
    size: float = 0.3,
    **changes: Any,
) -> Path:
    """Matrices for every layer of the checkpoint whose name ends with one of the targets. Returns the directory."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in sorted(load_file(checkpoint / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and module.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{module}"
            down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            tensors[f"{prefix}.lora_A.weight"] = down
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * size
    assert tensors
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return directory


def merge(directory: Path, checkpoint: Path, adapter: Path) -> Path:
    """A checkpoint whose weights are W + alpha / r · B A."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((adapter / "adapter_config.json").read_text())
    matrices = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(checkpoint / "model.safetensors")
    for name, down in matrices.items():
        if name.endswith(".lora_A.weight"):
            up = matrices[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            tensors[target] = tensors[target] + config["lora_alpha"] / config["r"] * up @ down
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
