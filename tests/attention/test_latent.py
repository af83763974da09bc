"""Attention to latents that all heads share, in every backend, against the plain one; that one against DeepSeek's."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made
from shoal.attention.reference import ReferenceAttention
from tests.attention.forms import KERNELS, run_latent
from tests.attention.test_backends import STEPS, make_step
from tests.attention.test_forms import BACKENDS, CASES, prompt_metadata


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_equals_the_reference(name: str, case: str, cache_dtype: torch.dtype | None) -> None:
    step = make_step(*CASES[case], (5, 1, 40), 16, torch.float32)
    expected = run_latent("reference", step, 24, cache_dtype, cache_scale=0.5)
    found = run_latent(name, step, 24, cache_dtype, cache_scale=0.5)
    assert found.shape == (sum(CASES[case][0]), 5, 24)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_the_device_knows(name: str) -> None:
    """Several of them tokens of one sequence."""
    step = make_step(*CASES["mixed"], (20, 1, 40), 16, torch.float32)
    expected = run_latent("reference", step, 24)
    torch.testing.assert_close(run_latent(name, step, 24, follow=True), expected, atol=2e-5, rtol=2e-5)


def test_bits_of_rows_are_those_of_prompts() -> None:
    """Past a split of keys: tiles of tokens merge splits in registers, rows of a graph by a second kernel."""
    step = make_step([8], [530], (3, 1, 40), 16, torch.float32)
    expected = run_latent("deterministic_cuda", step, 24)
    assert torch.equal(run_latent("deterministic_cuda", step, 24, follow=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_deepseeks_sizes_on_a_gpu(name: str, case: str, num_heads: int, cache_dtype: torch.dtype | None) -> None:
    step = make_step(*STEPS[case], (num_heads, 1, 576), 16, torch.bfloat16)
    step.query.mul_(0.3)
    expected = run_latent("reference", step, 512, cache_dtype)
    follow = case == "decodes"
    found = run_latent(name, step, 512, cache_dtype, follow=follow)
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
def test_bits_on_a_gpu() -> None:
    """A prompt's tokens in tiles, as rows of a graph, and one by one, deterministic."""
    whole = make_step([40], [1300], (16, 1, 576), 16, torch.bfloat16)
    expected = run_latent("deterministic_cuda", whole, 512)
    assert torch.equal(run_latent("deterministic_cuda", whole, 512, follow=True), expected)
    others = make_step([1, 40, 1], [700, 1300, 20], (16, 1, 576), 16, torch.bfloat16)
    again = run_latent("deterministic_cuda", others, 512)
    assert torch.equal(run_latent("deterministic_cuda", others, 512, follow=True), again)


def test_absorbed_is_expanded() -> None:
    """What DeepSeek-V2 computes with keys and values of each head, expanded from the latents, as Transformers does."""
    num_tokens, num_heads, rank, rope, nope, value = 30, 3, 24, 8, 12, 10
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, latent = randn(num_tokens, num_heads, nope + rope), randn(num_tokens, rank + rope)
    expand_keys, expand_values = randn(num_heads, nope, rank), randn(num_heads, value, rank)
    keys = torch.cat(
        [
            torch.einsum("tr,hnr->thn", latent[:, :rank], expand_keys),
            latent[:, None, rank:].expand(-1, num_heads, -1),
        ],
        dim=-1,
    )
    values = torch.einsum("tr,hvr->thv", latent[:, :rank], expand_values)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, keys, values)), is_causal=True, scale=0.2
    ).transpose(0, 1)
    absorbed = torch.cat([torch.einsum("thn,hnr->thr", query[..., :nope], expand_keys), query[..., nope:]], dim=-1)
    backend, metadata = ReferenceAttention(), prompt_metadata(num_tokens)
    cache = torch.zeros(backend.latent_cache_shape(8, 16, rank + rope), dtype=torch.float64)
    backend.prepare(metadata)
    found = backend.forward_latent(absorbed, latent, cache, metadata, scale=0.2, value_dim=rank)
    torch.testing.assert_close(torch.einsum("thr,hvr->thv", found, expand_values), expected)
