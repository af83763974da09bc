"""How a layer's attention finds a backend that can do it, and what its checkpoint says of the cache."""

from __future__ import annotations

import logging

import pytest
import torch

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionRefusal, LayerNeeds
from shoal.attention.registry import build_with_backend
from shoal.attention.torch_paged import TorchPagedAttention
from shoal.errors import ConfigError, ModelError
from shoal.layers.attention import Attention, LatentAttention
from shoal.layers.context import BuildContext

CPU = torch.device("cpu")


class Choosy(TorchPagedAttention):
    name = "choosy"

    def refusal(self, needs: LayerNeeds) -> str | None:
        return "attention backend choosy has no latents" if needs.is_latent else None


def context(backend: AttentionBackend) -> BuildContext:
    return BuildContext(dtype=torch.float32, device=CPU, attention_backend=backend)


def test_the_next_backend_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("shoal.attention.registry.backend_names", lambda *_: ("choosy", "torch_paged"))
    monkeypatch.setitem(
        __import__("shoal.attention.registry", fromlist=["_BACKENDS"])._BACKENDS, "choosy", (__name__, "Choosy")
    )
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        layer = build_with_backend(False, CPU, lambda backend: Attention(context(backend), 32, None))
        assert layer.backend.name == "choosy" and not caplog.messages
        latent = build_with_backend(False, CPU, lambda backend: LatentAttention(context(backend), 40, 24, 0.2))
    assert latent.backend.name == "torch_paged"
    assert caplog.messages == ["attention backend choosy has no latents; the next backend is tried"]


def test_where_there_is_no_other() -> None:
    with pytest.raises(ConfigError, match="caps no logits.*no other that does; leave deterministic mode off") as error:
        build_with_backend(True, CPU, lambda backend: Attention(context(backend), 32, None, softcap=5.0))
    assert not isinstance(error.value, AttentionRefusal)
    layer = build_with_backend(True, CPU, lambda backend: Attention(context(backend), 32, None, sinks=torch.ones(3)))
    assert layer.backend.name == "deterministic"


def test_forms() -> None:
    layer = Attention(context(TorchPagedAttention()), 64, 7)
    assert (layer.form.scale, layer.form.sliding_window, layer.form.is_plain) == (0.125, 7, True)
    other = Attention(context(TorchPagedAttention()), 64, None, scale=0.2, softcap=30.0)
    assert (other.form.scale, other.form.softcap, other.form.is_plain) == (0.2, 30.0, False)
    assert AttentionForm(1.0).arguments().keys() >= {"scale", "sliding_window", "softcap", "sinks"}


def test_scales_of_the_checkpoint() -> None:
    layer = Attention(context(TorchPagedAttention()), 64, None, name="model.layers.3.self_attn")
    assert layer.cache_scales is not None
    tensors = {tensor.name: tensor for tensor in layer.cache_scales.checkpoint_tensors()}
    assert list(tensors) == ["model.layers.3.self_attn.k_scale", "model.layers.3.self_attn.v_scale"]
    assert all(tensor.optional and tensor.shape == (1,) for tensor in tensors.values())
    layer.cache_scales.process_after_load()  # the checkpoint had none
    assert (layer.form.key_scale, layer.form.value_scale) == (1.0, 1.0)
    tensors["model.layers.3.self_attn.k_scale"].destination.fill_(0.5)
    layer.cache_scales.process_after_load()
    assert (layer.form.key_scale, layer.form.value_scale) == (0.5, 1.0)
    tensors["model.layers.3.self_attn.v_scale"].destination.fill_(0.0)
    with pytest.raises(ModelError, match=r"self_attn: scales of the KV cache must be above 0; found \[0.5, 0.0\]"):
        layer.cache_scales.process_after_load()
