from __future__ import annotations

import logging

import pytest

from shoal.config.options import CacheOptions, ModelOptions, ParallelOptions, SchedulerOptions, ServerOptions
from shoal.config.sources import (
    SERVE_SECTIONS,
    options_from_arguments,
    options_from_kwargs,
    warn_about_environment,
)
from shoal.errors import ConfigError


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def serve(*arguments: str) -> tuple[ModelOptions, CacheOptions, SchedulerOptions, ParallelOptions, ServerOptions]:
    return tuple(options_from_arguments(arguments, SERVE_SECTIONS, "model"))


def test_nothing_given_is_all_defaults():
    assert serve() == (ModelOptions(), CacheOptions(), SchedulerOptions(), ParallelOptions(), ServerOptions())
    assert options_from_kwargs({}) == [ModelOptions(), CacheOptions(), SchedulerOptions(), ParallelOptions()]


def test_flag_over_file_over_environment_over_default(monkeypatch, config_file):
    monkeypatch.setenv("SHOAL_PORT", "1")
    monkeypatch.setenv("SHOAL_HOST", "env")
    monkeypatch.setenv("SHOAL_BLOCK_SIZE", "32")
    file = config_file("port: 2\nhost: file\n")
    *_, server = serve("--config", file, "--port", "3")
    assert (server.port, server.host, server.response_role) == (3, "file", "assistant")
    _, cache, _, _, server = serve()
    assert (server.port, server.host, cache.block_size) == (1, "env", 32)
    assert options_from_kwargs({"block_size": 64})[1].block_size == 64


def test_file_takes_dashes_underscores_and_aliases(config_file):
    file = config_file(
        "model: /models/x\nmax-model-len: 4096\nkv_cache_memory_bytes: 4096\nserved-model-name: [a, b]\n"
        "enable_prefix_caching: false\ndeterministic: null\ngpu-memory-utilization: 1\n"
    )
    model, cache, _, _, server = serve(f"--config={file}")
    assert (model.model, model.max_model_len, model.deterministic) == ("/models/x", 4096, None)
    assert (cache.kv_cache_memory, cache.enable_prefix_caching, cache.gpu_memory_utilization) == (4096, False, 1.0)
    assert server.served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-modle-len: 4", "config.yaml, line 1: max-modle-len is not an option; did you mean max-model-len\\?"),
        ("max_modle_len: 4", "max_modle_len is not an option; did you mean max_model_len\\?"),
        ("port: '8000'", "config.yaml, line 1: port must be an integer.*got '8000' \\(str\\)"),
        ("enforce_eager: 'yes'", "enforce_eager must be true or false"),
        ("model: {pth: x}", "line 1: model.pth is not known; there is path, type"),
        ("model: {path: 3}", "line 1: model.path must be a string; got 3"),
        ("port: 1\ncommunication: tcp", "line 2: communication must hold protocol, interface or timeout"),
        ("communication:\n  protocol: udp", "line 2: communication.protocol must be one of auto, tcp, rdma; got 'udp'"),
        ("communication: {timeout: 5}\nstep_timeout: 6", "line 1: communication sets step_timeout, .* elsewhere"),
        ("nodes: []", "line 1: nodes names no machine"),
        ("nodes:\n  - port: 8000", "line 2: nodes\\[0\\] has no `host:`"),
        ("nodes:\n  - host: a\n    port: 0", "line 3: nodes\\[0\\].port must be an integer from 1 to 65535; got 0"),
        ("- port", "must hold `name: value` lines; found"),
        ("1: 2", "1 is not an option"),
        ("port: 1\nport: [", "line 2 is not YAML|line 3 is not YAML"),
        ("port: 1\nmax-model-len: 2\nmax_model_len: 3", "a second time"),
        ("config: other.yaml", "config is not an option"),
    ],
)
def test_what_a_file_may_not_say(config_file, text, message):
    with pytest.raises(ConfigError, match=message):
        serve("--config", config_file(text))


def test_files_that_cannot_be_read(tmp_path, config_file):
    with pytest.raises(ConfigError, match="cannot read .*missing.yaml: No such file"):
        serve("--config", str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        serve("--config", str(tmp_path))
    with pytest.raises(ConfigError, match="--config needs a value"):
        serve("--config")
    with pytest.raises(ConfigError, match="twice"):
        serve("--config", "a", "--config", "b")
    assert serve("--config", config_file("# nothing\n"))[0] == ModelOptions()


def test_variables_are_checked_and_named(monkeypatch):
    monkeypatch.setenv("SHOAL_PORT", "eighty")
    with pytest.raises(ConfigError, match="SHOAL_PORT must be an integer from 0 to 65535; got 'eighty'"):
        serve()
    monkeypatch.setenv("SHOAL_PORT", "  ")
    assert serve()[4].port == 8000


def test_keywords_are_checked(monkeypatch):
    for kwargs, message in [
        ({"modle": "x"}, "modle is not an option; did you mean model?"),
        ({"max_model_len": "4096"}, "max_model_len must be an integer, 1 or more; got '4096'"),
        ({"port": 1}, "port is not an option"),
        ({"kv_cache_memory": 1, "kv_cache_memory_bytes": 2}, "a second time"),
        ({"quantization": "q4_k_m"}, "quantization must be one of gptq"),
        ({"speculative_config": "{}"}, "not supported"),
        ({"tensor_parallel_size": 0}, "1 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            options_from_kwargs(kwargs)


def test_a_model_swallowed_by_a_list_flag_is_noticed(tmp_path):
    with pytest.raises(ConfigError, match=f"--served-model-name took the directory {tmp_path}.*put the model first"):
        serve("--served-model-name", "name", str(tmp_path))
    assert serve(str(tmp_path), "--served-model-name", "name")[0].model == str(tmp_path)


def test_unused_variables_are_told(monkeypatch, caplog):
    monkeypatch.setenv("SHOAL_PROT", "1")
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)
    with caplog.at_level("WARNING"):
        warn_about_environment()
    assert "SHOAL_PROT is not used: did you mean SHOAL_PORT?" in caplog.text


def test_groups_of_a_file_are_options(config_file):
    file = config_file(
        "nodes:\n  - {host: 10.0.0.1, port: 8000}\n  - {host: 'fd00::2', port: 8001}\n  - third.example\n"
        "model: {path: /models/x, type: large}\ncommunication: {protocol: tcp, interface: eth1, timeout: 30}\n"
        "max-model-len: 64\n"
    )
    model, _, _, parallel, server = serve("--config", file)
    assert (model.model, model.max_model_len, server.model_label) == ("/models/x", 64, "large")
    assert parallel.nodes == ["10.0.0.1:8000", "[fd00::2]:8001", "third.example"]
    assert (parallel.communication_protocol, parallel.communication_interface) == ("tcp", "eth1")
    assert parallel.step_timeout == 30.0
    assert serve("--config", file, "--step-timeout", "5")[3].step_timeout == 5.0
