"""What a rank reads and holds while it loads its share of a model, each rank a process. `python benchmarks/loading.py`.

Makes a checkpoint of random numbers (Llama's layers, bf16, in shards), unless --path names one, and loads it on all
ranks at once. `share` is what the rank's weights take; `peak` is the most memory that the rank held above what it had
before the model was built; `read` is what it read from the files.

2 cores, 24 GiB, 2026-11, checkpoint of 3.0 GiB, MiB:

    ranks      share        peak   peak/share       read
        1     3002.3      3042.2        1.013     3002.3
        2     1501.3   1525-1527        1.016     1501.3
        4      750.8     768-770  1.023-1.026      750.8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from shoal.attention.registry import make_backend
from shoal.config.model_config import load_model_config
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.layers.context import BuildContext
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights

_MIB = 1 << 20
_HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _VOCABULARY = 2048, 5632, 16, 4, 32_000


def make_checkpoint(path: Path, num_bytes: int, tied: bool) -> None:
    """About num_bytes in shards of four layers."""
    kv_size = _HIDDEN // _HEADS * _KV_HEADS
    matrices = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (kv_size, _HIDDEN),
        "self_attn.v_proj": (kv_size, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    layer_bytes = 2 * sum(rows * columns for rows, columns in matrices.values())
    table_bytes = 2 * _VOCABULARY * _HIDDEN * (1 if tied else 2)
    num_layers = max(1, (num_bytes - table_bytes) // layer_bytes)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "num_hidden_layers": num_layers,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    places: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path / name)
        places.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.04, 0.04)

    tables = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    save(
        "tables.safetensors",
        {name: random(_VOCABULARY, _HIDDEN) for name in tables} | {"model.norm.weight": random(_HIDDEN)},
    )
    for first in range(0, num_layers, 4):
        tensors = {}
        for layer in range(first, min(first + 4, num_layers)):
            for name, shape in matrices.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = random(_HIDDEN)
        save(f"layers-{first}.safetensors", tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def load_rank(path: Path, store: str, rank: int, size: int, device_name: str) -> dict[str, float]:
    dims = ParallelDims(tensor_size=size, rank=rank)
    device = torch.device(device_name, rank) if device_name == "cuda" else torch.device(device_name)
    groups = form_groups(dims, device=device, address="127.0.0.1", store_file=store)
    config = load_model_config(path)
    context = BuildContext(
        dtype=torch.bfloat16,
        device=device,
        attention_backend=make_backend(False, device),
        parallel=dims,
        tensor_group=groups.tensor,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.monotonic()
    model = build_model(config, context)
    num_bytes = load_weights(model, config)
    seconds = time.monotonic() - started
    share = model.weight_bytes() / _MIB
    groups.world.barrier()
    groups.close()
    peak = (memory("VmHWM") - before) / _MIB
    return {"rank": rank, "share": share, "peak": peak, "read": num_bytes / _MIB, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint (default: 3)")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding's table")
    parser.add_argument("--tensor-parallel-size", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--path", type=Path, help="a checkpoint that is there")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        (size,) = arguments.tensor_parallel_size
        print(json.dumps(load_rank(arguments.path, arguments.store, arguments.rank, size, arguments.device)))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = arguments.path
        if path is None:
            path = Path(directory) / "model"
            make_checkpoint(path, int(arguments.gib * (1 << 30)), arguments.tied)
        print(f"{'ranks':>5} {'rank':>4} {'share':>8} {'peak':>8} {'peak/share':>10} {'read':>8} {'seconds':>8}")
        for size in arguments.tensor_parallel_size:
            command = [sys.executable, __file__, "--path", str(path), "--device", arguments.device]
            command += ["--tensor-parallel-size", str(size), "--store", f"{directory}/store-{size}", "--rank"]
            ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(size)]
            for process in ranks:
                output, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"a rank ended with status {process.returncode}")
                found = json.loads(output)
                ratio = found["peak"] / found["share"]
                print(
                    f"{size:5} {found['rank']:4} {found['share']:8.1f} {found['peak']:8.1f} {ratio:10.3f} "
                    f"{found['read']:8.1f} {found['seconds']:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
