"""What running a model by Transformers' own code costs against its native file: the same shape, weights and work.

    python benchmarks/transformers_fallback.py [--rounds 3] [--batch 1 16] [--output-tokens 64]

One process at a time, the two in turns (`shoal bench latency`). Model: the Qwen2 shape of 0.5B with a small vocabulary,
random weights, bfloat16, all cores (OMP_NUM_THREADS=1: one). Prints the median milliseconds between two tokens of a
request, the least of the rounds (what else runs on a machine only ever adds to it), and the fallback's speed as a
share of the native one's; then that of each round. Options after -- go to `shoal bench latency`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
IMPLS = ("shoal", "transformers")


def milliseconds(directory: Path, impl: str, batch: int, arguments: argparse.Namespace) -> float:
    """Between two tokens of a request, the median, of a process of its own."""
    figures = directory / "figures.json"
    command = [sys.executable, "-m", "shoal.cli", "bench", "latency", "--model", str(directory)]
    command += ["--load-format", "dummy", "--model-impl", impl, "--batch-size", str(batch), "--json", str(figures)]
    command += ["--input-len", str(arguments.input_tokens), "--output-len", str(arguments.output_tokens)]
    done = subprocess.run([*command, *arguments.more], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(f"{impl}: {done.stdout}{done.stderr}")
    found: float = json.loads(figures.read_text(encoding="utf-8"))["result"]["between_tokens_ms"]["p50"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    own, _, more = " ".join(sys.argv[1:]).partition("-- ")
    arguments = parser.parse_args(own.split())
    arguments.more = more.split()
    table = Table("batch", "native, ms", "Transformers, ms", "speed", "of each round")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for batch in arguments.batch:
            rounds = [
                {impl: milliseconds(directory, impl, batch, arguments) for impl in IMPLS}
                for _ in range(arguments.rounds)
            ]
            least = {impl: min(times[impl] for times in rounds) for impl in IMPLS}
            shares = [times["shoal"] / times["transformers"] for times in rounds]
            table.add_row(
                str(batch),
                *(f"{least[impl]:.1f}" for impl in IMPLS),
                f"{least['shoal'] / least['transformers']:.2f}",
                " ".join(f"{share:.2f}" for share in shares),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
