"""Softcaps, sinks and caches of 8-bit floats in every backend, against the one that is written out plainly; and that
one against Transformers' own."""

from __future__ import annotations

import types

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made
from shoal.attention.base import AttentionForm, AttentionMetadata, LayerNeeds
from shoal.attention.cache_dtype import decode, encode
from shoal.attention.reference import ReferenceAttention
from shoal.attention.registry import create_attention_backend
from tests.attention.forms import run_form
from tests.attention.test_backends import STEPS, make_step

HEADS = (6, 2, 32)
SINKS = torch.tensor([-1.0, 0.5, 2.0, 8.0, -4.0, 0.0])
FORMS = {
    "softcap": AttentionForm(0.3, softcap=2.0),
    "sinks": AttentionForm(0.3, sinks=SINKS),
    "sinks in a window": AttentionForm(0.3, 20, sinks=SINKS),
    "softcap in a window": AttentionForm(0.3, 20, 5.0),
    "all": AttentionForm(0.3, 20, 5.0, SINKS),
}
BACKENDS = ["torch_paged", "deterministic", "triton_paged", "deterministic_cuda"]
# Small: the interpreter is slow.
CASES = {"decodes": ([1] * 3, [1, 17, 300]), "mixed": ([1, 12, 1, 2], [9, 20, 300, 40])}
ROUNDED = [torch.float8_e4m3fn, torch.float8_e5m2]


# The deterministic one on a CPU has no softcap.
PAIRS = [(name, form) for name in BACKENDS for form in FORMS if name != "deterministic" or FORMS[form].softcap is None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_forms(name: str, case: str, form: str) -> None:
    step = make_step(*CASES[case], HEADS, 16, torch.float32)
    expected = run_form("reference", step, FORMS[form])
    torch.testing.assert_close(run_form(name, step, FORMS[form]), expected, atol=2e-5, rtol=2e-5)
    plain = run_form("reference", step, AttentionForm(0.3, FORMS[form].sliding_window))
    assert (plain - expected).abs().max() > 0.05, "the form makes a difference"


@pytest.mark.parametrize("form", ["all", "sinks"])
@pytest.mark.parametrize("name", ["triton_paged", "deterministic_cuda"])
def test_forms_of_rows_that_the_device_knows(name: str, form: str) -> None:
    case = "mixed" if name == "triton_paged" else "decodes"
    step = make_step(*CASES[case], HEADS, 16, torch.float32)
    expected = run_form("reference", step, FORMS[form])
    torch.testing.assert_close(run_form(name, step, FORMS[form], follow=True), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache_dtype", ROUNDED)
def test_caches_of_8_bits(name: str, case: str, cache_dtype: torch.dtype) -> None:
    step = make_step(*CASES[case], HEADS, 16, torch.float32)
    form = AttentionForm(0.3, None if case == "mixed" else 20, key_scale=0.5, value_scale=0.25)
    expected = run_form("reference", step, form, cache_dtype)
    torch.testing.assert_close(run_form(name, step, form, cache_dtype), expected, atol=2e-5, rtol=2e-5)
    exact = run_form("reference", step, form)
    assert 0.002 < (expected - exact).abs().mean() < 0.1, "rounded, and not by much"


@pytest.mark.parametrize("name", ["triton_paged", "deterministic_cuda"])
def test_caches_of_8_bits_of_rows_that_the_device_knows(name: str) -> None:
    case = "mixed" if name == "triton_paged" else "decodes"
    step = make_step(*CASES[case], HEADS, 16, torch.float32)
    form = AttentionForm(0.3, key_scale=0.5, sinks=SINKS)
    expected = run_form("reference", step, form, torch.float8_e4m3fn)
    found = run_form(name, step, form, torch.float8_e4m3fn, follow=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton_paged", "deterministic_cuda"])
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("cache_dtype", [None, *ROUNDED])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_types_on_a_gpu(name: str, case: str, cache_dtype: torch.dtype | None, head_dim: int) -> None:
    step = make_step(*STEPS[case], (16, 2, head_dim), 16, torch.bfloat16)
    form = AttentionForm(head_dim**-0.5, 200, 10.0, torch.linspace(-2, 4, 16), key_scale=0.5, value_scale=2.0)
    expected = run_form("reference", step, form, cache_dtype)
    torch.testing.assert_close(run_form(name, step, form, cache_dtype), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("cache_dtype", ROUNDED)
def test_what_is_too_large_becomes_the_largest_number(cache_dtype: torch.dtype) -> None:
    cache = torch.zeros(1, dtype=cache_dtype)
    x = torch.tensor([1e6, -float("inf"), 3.0, -0.0])
    limit = torch.finfo(cache_dtype).max
    assert decode(encode(x, cache, 1.0), cache, torch.bfloat16).tolist() == [limit, -limit, 3.0, -0.0]


def prompt_metadata(num_tokens: int) -> AttentionMetadata:
    tables = torch.arange(1, -(-num_tokens // 16) + 1, dtype=torch.int32)[None]
    return AttentionMetadata([num_tokens], [num_tokens], tables, torch.arange(16, 16 + num_tokens), 16)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_the_plain_one_is_transformers(family: str) -> None:
    """Gemma 2's softcap, and gpt-oss' sinks with a window."""
    num_tokens, window = 50, 20 if family == "gpt_oss" else None
    query, key, value = (torch.randn(num_tokens, heads, 32, dtype=torch.float64) for heads in (6, 2, 2))
    position = torch.arange(num_tokens)
    hidden = position[None, :] > position[:, None]
    if window is not None:
        hidden |= position[None, :] <= position[:, None] - window
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.float64).masked_fill(hidden, float("-inf"))[None, None]
    module = types.SimpleNamespace(num_key_value_groups=3, training=False, sinks=SINKS.double())
    heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
    if family == "gemma2":
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        form = AttentionForm(0.3, softcap=2.0)
        expected, _ = eager_attention_forward(module, *heads, mask, scaling=0.3, softcap=2.0)
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

        form = AttentionForm(0.3, window, sinks=SINKS)
        expected, _ = eager_attention_forward(module, *heads, mask, scaling=0.3)
    backend, metadata = ReferenceAttention(), prompt_metadata(num_tokens)
    cache = torch.zeros(backend.kv_cache_shape(8, 16, 2, 32), dtype=torch.float64)
    backend.prepare(metadata)
    found = backend.forward(query, key, value, cache, metadata, form)
    torch.testing.assert_close(found, expected[0].flatten(1), atol=1e-6, rtol=1e-6)


def test_what_is_refused() -> None:
    needs = LayerNeeds(32, FORMS["softcap"], torch.float32, torch.float32, torch.device("cpu"))
    refusal = create_attention_backend("deterministic").refusal(needs)
    assert refusal is not None and "deterministic caps no logits" in refusal
    for name in ("reference", "torch_paged", "triton_paged", "deterministic_cuda"):
        assert create_attention_backend(name).refusal(needs) is None
