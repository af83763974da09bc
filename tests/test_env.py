from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal import env
from shoal.errors import ConfigError


def test_log_level_is_checked(monkeypatch):
    assert env.log_level() is None
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "Debug")
    assert env.log_level() == "debug"
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="SHOAL_LOG_LEVEL must be one of debug.*'loud'"):
        env.log_level()


def test_own_host_ip_counts_more_than_the_other_engines(monkeypatch):
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    assert env.host_ip() is None
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")
    assert env.host_ip() == "10.0.0.1"
    monkeypatch.setenv("SHOAL_HOST_IP", "10.0.0.2")
    assert env.host_ip() == "10.0.0.2"


@pytest.mark.parametrize(
    ("value", "devices"),
    [(None, None), ("", []), ("-1", []), ("0,1", ["0", "1"]), ("0,-1,1", ["0"]), ("GPU-abc", ["GPU-abc"])],
)
def test_visible_devices(monkeypatch, value, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert env.cuda_visible_devices() == devices


def test_triton_cache_directory(monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.triton_cache_directory() == Path.home() / ".triton/cache"
    monkeypatch.setenv("TRITON_HOME", "/x")
    assert env.triton_cache_directory() == Path("/x/.triton/cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/y/kernels")
    assert env.triton_cache_directory() == Path("/y/kernels")


def test_cache_directory(monkeypatch):
    for name in ("SHOAL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.cache_directory() == Path.home() / ".cache/shoal"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert env.cache_directory() == Path("/x/shoal")
    monkeypatch.setenv("SHOAL_CACHE_DIR", "~/kept")
    assert env.cache_directory() == Path.home() / "kept"
    assert env.unknown_names([]) == []


def test_hub_cache_follows_hugging_faces_order(monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.hub_cache() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert env.hub_cache() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/home")
    assert env.hub_cache() == Path("/home/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert env.hub_cache() == Path("/hub")


def test_switches_and_numbers_say_what_is_wrong(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "no")
    monkeypatch.setenv("HF_HUB_OFFLINE", "perhaps")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE must be 1 or 0.*'perhaps'"):
        env.hub_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not env.hub_offline()
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert env.omp_num_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        env.omp_num_threads()


def test_unknown_names_are_told_with_the_nearest(monkeypatch):
    monkeypatch.setenv("SHOAL_MAX_MODLE_LEN", "8")
    monkeypatch.setenv("SHOAL_PORT", "8001")
    (warning,) = env.unknown_names(["max_model_len", "port"])
    assert "SHOAL_MAX_MODLE_LEN" in warning and "SHOAL_MAX_MODEL_LEN" in warning


def test_kubernetes_service_links_are_no_settings(monkeypatch):
    links = {
        "SHOAL_PORT": "tcp://10.0.0.7:80",
        "SHOAL_SERVICE_HOST": "10.0.0.7",
        "SHOAL_SERVICE_PORT": "80",
        "SHOAL_SERVICE_PORT_HTTP": "80",
        "SHOAL_PORT_80_TCP": "tcp://10.0.0.7:80",
        "SHOAL_PORT_80_TCP_ADDR": "10.0.0.7",
        "SHOAL_ROUTER_SERVICE_HOST": "10.0.0.8",
    }
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    assert env.option_values() == {}
    assert env.unknown_names(["port"]) == []


def test_secrets_are_not_in_the_report(monkeypatch):
    monkeypatch.setenv("SHOAL_API_KEY", "hush")
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    report = env.relevant_variables()
    assert "hush" not in report.values()
    assert report["SHOAL_API_KEY"] == report["HF_TOKEN"] == "(set)"
    assert report["NCCL_DEBUG"] == "INFO"


def test_what_workers_on_other_hosts_are_given(monkeypatch):
    shared = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_DISABLE": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_SOMETHING": "1",
        "SHOAL_LOG_LEVEL": "debug",
        "TOKENIZERS_PARALLELISM": "false",
    }
    of_this_host = {
        "SHOAL_HOST_IP": "10.0.0.1",
        "VLLM_HOST_IP": "10.0.0.1",
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_HOME": "/usr/local/cuda",
        "NCCL_HOSTID": "a",
        "HF_HOME": "/data",
        "HF_HUB_CACHE": "/data/hub",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "LD_LIBRARY_PATH": "/usr/lib",
        "PATH": "/bin",
    }
    secrets = {"SHOAL_CLUSTER_TOKEN": "hush", "SHOAL_API_KEY": "hush", "HF_TOKEN": "hush"}
    for name, value in {**shared, **of_this_host, **secrets}.items():
        monkeypatch.setenv(name, value)
    given = env.shared_variables()
    assert {name: given.get(name) for name in shared} == shared
    assert not given.keys() & {*of_this_host, *secrets}


def test_the_interface_is_named_as_for_nccl_or_gloo(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert env.socket_interface() is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert env.socket_interface() == ("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert env.socket_interface() == ("NCCL_SOCKET_IFNAME", "^docker")


def test_nobody_else_reads_the_environment():
    root = Path(env.__file__).parent
    readers = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if path.name != "env.py" and re.search(r"\bos\.(environ|getenv|putenv)\b", path.read_text(encoding="utf-8"))
    ]
    assert readers == []
