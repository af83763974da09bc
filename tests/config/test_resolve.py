from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from shoal.config import resolve as resolve_module
from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config, resolve_device
from shoal.errors import ConfigError, ModelError
from tests.config.model_directory import write_model_directory


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model_directory(tmp_path / "model"))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a driver, as far as `resolve` looks."""
    exists = os.path.exists
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl" or exists(path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu130")


def make(model: str, **kwargs) -> EngineConfig:
    return make_engine_config(**{"model": model, "device": "cpu", **kwargs})


def test_defaults_come_from_the_model_and_the_device(model):
    config = make(model)
    assert (config.dtype, config.max_model_len, config.device) == ("bfloat16", 1024, "cpu")
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (64, 2048)
    assert config.model.path == model
    assert not config.deterministic and config.kv_cache_memory is None
    cuda = make(model, device="cuda")
    assert (cuda.max_num_seqs, cuda.max_num_batched_tokens) == (256, 8192)


def test_json_there_and_back(model):
    config = make(model, kv_cache_memory="64MiB", seed=7, deterministic=True)
    assert EngineConfig.from_json(config.to_json()) == config
    assert EngineConfig.from_json(config.to_json().decode()) == config
    for data in (b"{", b"{}", b"[]", config.to_json().replace(b'"device":"cpu"', b'"device":3')):
        with pytest.raises(ConfigError, match="no EngineConfig of this version"):
            EngineConfig.from_json(data)


@pytest.mark.parametrize(("wanted", "dtype"), [("float", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_as_asked(model, wanted, dtype):
    assert make(model, dtype=wanted).dtype == dtype


@pytest.mark.parametrize("wanted", ["half", "float16"])
def test_float16_needs_a_gpu(model, wanted):
    with pytest.raises(ConfigError, match="dtype float16 does not run on the CPU; bfloat16 and float32 do"):
        make(model, dtype=wanted)
    assert make(model, dtype=wanted, device="cuda").dtype == "float16"


def test_a_float16_checkpoint_runs_in_bfloat16_on_the_cpu(tmp_path):
    model = str(write_model_directory(tmp_path / "half", torch_dtype="float16"))
    assert make(model).dtype == "bfloat16"
    assert make(model, device="cuda").dtype == "float16"


def test_the_embedded_model_is_deterministic_on_the_cpu(model, monkeypatch):
    monkeypatch.setattr(resolve_module, "resolve_model_path", lambda name: Path(model))
    config = make("shoal-tiny")
    assert (config.deterministic, config.dtype) == (True, "float32")
    config = make("shoal-tiny", deterministic=False)
    assert (config.deterministic, config.dtype) == (False, "bfloat16")
    assert make("shoal-tiny", dtype="bfloat16").dtype == "bfloat16"
    config = make("shoal-tiny", device="cuda")
    assert (config.deterministic, config.dtype) == (False, "bfloat16")


@pytest.mark.parametrize("name", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_a_cache_is_of_the_dtype_of_activations_or_of_8_bits(model, name):
    assert make(model, kv_cache_dtype=name).kv_cache_dtype == name  # the model is in bfloat16


@pytest.mark.parametrize(
    ("name", "asked", "dtype"), [("float16", {}, "bfloat16"), ("bfloat16", {"dtype": "float32"}, "float32")]
)
def test_a_cache_of_another_dtype_is_refused(model, name, asked, dtype):
    with pytest.raises(
        ConfigError,
        match=rf"{name} does not go with activations of {dtype}.*auto, fp8, fp8_e4m3, fp8_e5m2 work.*--dtype {name}",
    ):
        make(model, kv_cache_dtype=name, **asked)


def test_a_float16_cache_goes_with_float16(model):
    assert make(model, device="cuda", dtype="half", kv_cache_dtype="float16").kv_cache_dtype == "float16"


def test_max_model_len_has_a_limit(model):
    assert make(model, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len 1025 is longer than .*; up to 1024 works"):
        make(model, max_model_len=1025)


def test_what_is_not_given_adapts_to_what_is(model):
    config = make(model, max_num_batched_tokens=32)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (32, 32)
    config = make(model, max_num_seqs=5000)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (5000, 5000)
    config = make(model, enable_chunked_prefill=False, max_num_seqs=1)
    assert config.max_num_batched_tokens >= config.max_model_len


def test_contradictions_are_refused(model):
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(9\)"):
        make(model, max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ConfigError, match="without chunked prefill a whole prompt must fit"):
        make(model, enable_chunked_prefill=False, max_num_batched_tokens=512)
    with pytest.raises(ConfigError, match="block_size must be 8, 16, 32, 64, 128 or 256; got 24"):
        make(model, block_size=24)


def test_kv_cache_memory_is_a_size(model):
    assert make(model, kv_cache_memory="64MiB").kv_cache_memory == 64 * 1024**2
    with pytest.raises(ConfigError, match="kv_cache_memory must be a size such as"):
        make(model, kv_cache_memory="much")


def test_a_missing_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        make(str(tmp_path / "missing"))
    with pytest.raises(ModelError):
        make(str(tmp_path))


def test_auto_device(gpu, monkeypatch):
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"


def test_auto_device_without_a_torch_that_can(gpu, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert resolve_device("auto") == "cpu"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert resolve_device("auto") == "cpu"
