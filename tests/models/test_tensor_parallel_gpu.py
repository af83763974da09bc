"""On several GPUs: the logits and tokens of one, no wait for the device, and all of it fit for a CUDA graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 5003,
    "torch_dtype": "float32",
}


def run_ranks(size: int, directory: Path) -> list[dict[str, Any]]:
    """What every rank wrote."""
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "tests.models.gpu_rank"]
    outputs = [directory / f"output-{size}-{rank}" for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(directory / f"store-{size}"), str(directory / "model"), str(output)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        assert [process.wait(160) for process in ranks] == [0] * size
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(output) for output in outputs]


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA GPUs")
def test_ranks_on_gpus_compute_what_one_does(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, tmp_path)
    assert alone["logits"].shape == (40, 5003) and alone["replayed"]
    for size in (2, 4):
        if size > torch.cuda.device_count():
            continue
        for rank in run_ranks(size, tmp_path):
            torch.testing.assert_close(rank["logits"], alone["logits"], atol=1e-4, rtol=1e-4)
            assert rank["tokens"] == alone["tokens"]
            assert rank["replayed"]
