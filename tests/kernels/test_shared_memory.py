"""The kernels of attention and quantized experts fit into the shared memory of each kind of GPU, as the real compiler
lays them out. No GPU is needed: `pytest -m slow tests/kernels/test_shared_memory.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.offline import run_script  # noqa: E402

# Bytes that a program may have (CUDA's programming guide, technical specifications by compute capability).
MOST = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("capability", MOST)
def test_kernels_fit(tmp_path: Path, capability: int) -> None:
    lines = run_script("tests.kernels.shared_memory", str(capability), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = {name: int(size) for name, size in (line.split(": ") for line in lines)}
    assert len(found) == 28
    assert {name: size for name, size in found.items() if size > MOST[capability]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("capability", MOST)
def test_kernels_of_experts_fit(tmp_path: Path, capability: int) -> None:
    """Into its registers, too, but for a few."""
    lines = run_script("tests.kernels.expert_kernels", str(capability), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = {name: tuple(map(int, sizes.split())) for name, sizes in (line.split(": ") for line in lines)}
    assert len(found) == 82
    most_stack = 96 if capability == 90 else 32  # the largest blocks for wgmma were the fastest nevertheless
    too_much = {name: sizes for name, sizes in found.items() if sizes[0] > MOST[capability] or sizes[1] > most_stack}
    assert too_much == {}
