"""Which prompts go to cuDNN, what happens when it refuses, and on a GPU whether it is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made
from shoal.attention.base import AttentionForm
from shoal.attention.fresh_prompts import FreshPrompts
from tests.attention.test_backends import make_step, run

CPU = torch.device("cpu")


def willing() -> FreshPrompts:
    """As on a GPU that has cuDNN."""
    fresh = FreshPrompts(CPU)
    fresh._works = True
    return fresh


def form(window: int | None = None) -> AttentionForm:
    return AttentionForm(0.1, window)


def test_what_it_takes() -> None:
    num_new, seq_lens = np.array([3000, 3000, 100, 1]), np.array([3000, 4500, 100, 1])
    fresh, half = willing(), torch.bfloat16
    assert fresh.takes(num_new, seq_lens, half, 128, form()).tolist() == [True, False, False, False]
    assert fresh.takes(num_new, seq_lens, half, 128, form(3000)).tolist() == [True, False, False, False]
    assert not fresh.takes(num_new, seq_lens, half, 128, form(2999)).any(), "a window hides keys"
    assert not fresh.takes(num_new, seq_lens, torch.float32, 128, form()).any()
    assert not fresh.takes(num_new, seq_lens, half, 256, form()).any()
    assert not fresh.takes(num_new, seq_lens, half, 100, form()).any()
    assert not fresh.takes(num_new, seq_lens, half, 128, AttentionForm(0.1, softcap=30.0)).any()
    assert not fresh.takes(num_new, seq_lens, half, 128, AttentionForm(0.1, sinks=torch.zeros(4))).any()
    assert not FreshPrompts(CPU).takes(num_new, seq_lens, half, 128, form()).any()


def test_the_paged_kernel_takes_what_cudnn_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there is no cuDNN: it refuses once, and is not asked again."""
    monkeypatch.setattr("shoal.attention.fresh_prompts._FEWEST_TOKENS", 8)
    monkeypatch.setattr("shoal.attention.triton_paged.FreshPrompts", lambda device: willing())
    query, key, value = (torch.randn(9, heads, 32, dtype=torch.float16) for heads in (4, 2, 2))
    fresh, output = willing(), torch.zeros_like(query)
    assert not fresh.attend(query, key, value, output, 0.3)
    assert not output.any()
    assert not fresh.takes(np.array([9]), np.array([9]), torch.float16, 32, form()).any()
    step = make_step([9, 1, 20, 5], [9, 30, 20, 12], (4, 2, 32), 16, torch.float16)
    expected, found = run("reference", step, None), run("triton_paged", step, None)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2048, 2049, 3000])
def test_against_plain_attention(length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(length)
    wide = torch.randn((length, 48, 128), generator=generator, device="cuda", dtype=torch.bfloat16)
    query, key, value = wide.split([32, 8, 8], dim=1)
    output = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
    assert FreshPrompts(query.device).attend(query, key, value, output, 128**-0.5)
    keys, values = (each.float().repeat_interleave(4, dim=1).transpose(0, 1) for each in (key, value))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * 128**-0.5
    hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    expected = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    distance = (output.float() - expected).norm() / expected.norm()
    assert distance < 1e-2
