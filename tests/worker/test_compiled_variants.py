"""No request waits for the compiler: what a worker compiles at its start is all that its steps need."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.checkpoints import make_checkpoint  # noqa: E402
from tests.kernels.offline import run_script  # noqa: E402


def check(*arguments: str, fewest: int = 9) -> None:
    """fewest: kernels that the start has compiled, at least."""
    start, *later = run_script("tests.worker.compiled_variants", *arguments).splitlines()
    assert int(start.split()[0]) >= fewest
    assert not later


@pytest.mark.parametrize(("backend", "dtype"), [("triton_paged", "bfloat16"), ("deterministic_cuda", "float32")])
def test_steps_compile_nothing_that_the_start_did_not(tmp_path: Path, backend: str, dtype: str) -> None:
    check("worker", backend, dtype, str(make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)))


def test_nor_does_the_sampling_of_ranks_that_share_a_vocabulary() -> None:
    check("sampling", "bfloat16")


def test_nor_do_norms_of_another_number_of_rows() -> None:
    check("norms", "bfloat16", fewest=2)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        ("bfloat16", "plain"),
        ("float32", "plain"),
        ("bfloat16", "int8"),
        ("bfloat16", "fp8-block"),
        ("bfloat16", "awq"),
        ("bfloat16", "awq-32"),
    ],
)
def test_nor_do_experts_whatever_the_number_of_tokens(dtype: str, form: str) -> None:
    check("experts", dtype, form, fewest=8)
