"""The only reader of os.environ. Every variable that Shoal heeds has one typed accessor here; a bad value is an error.

Options (flags) have a variable each, SHOAL_ and the option's name: `option_values` hands them to the config floor raw.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from shoal.errors import ConfigError

PREFIX = "SHOAL_"
_OWN_NAMES = ("SHOAL_HOST_IP", "SHOAL_LOG_LEVEL", "SHOAL_API_KEY", "SHOAL_CLUSTER_TOKEN", "SHOAL_CACHE_DIR")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off", "")
_RELEVANT_PREFIXES = (PREFIX, "VLLM_", "CUDA_", "NCCL_", "GLOO_", "OMP_", "KMP_", "MKL_", "RAY_", "HF_", "TORCH")
_RELEVANT_NAMES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "NVIDIA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "NO_COLOR")
_SHARED_PREFIXES = (
    PREFIX, "VLLM_", "NCCL_", "GLOO_", "TP_", "UCX_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_",
    "NVIDIA_TF32_OVERRIDE", "OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "HF_", "TRANSFORMERS_",
    "TOKENIZERS_", "SAFETENSORS_",
)  # fmt: skip
_PER_NODE = ("SHOAL_HOST_IP", "VLLM_HOST_IP", "CUDA_VISIBLE_DEVICES", "NCCL_HOSTID")
# A path of this host says nothing about another; files that a user names for NCCL are the same everywhere or not set.
_PATH_NAME = re.compile("(HOME|CACHE|CACHE_DIR|DIR|PATH|ROOT)$")
_SECRET = re.compile("KEY|TOKEN(?!IZER)|SECRET|PASSWORD")
_LOG_LEVELS = ("debug", "info", "warning", "error")
# Kubernetes puts these into every pod beside a Service named "shoal"; they are no settings.
_SERVICE_LINK = re.compile(r"SHOAL_(.+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)")


def api_key() -> str | None:
    """SHOAL_API_KEY: the key that `shoal chat` and `shoal complete` present, and that a server asks for."""
    return _text("SHOAL_API_KEY")


def log_level() -> str | None:
    """SHOAL_LOG_LEVEL: debug, info, warning or error."""
    value = _text("SHOAL_LOG_LEVEL")
    if value is None:
        return None
    if value.lower() not in _LOG_LEVELS:
        raise ConfigError(f"SHOAL_LOG_LEVEL must be one of {', '.join(_LOG_LEVELS)}; got {value!r}")
    return value.lower()


def host_ip() -> str | None:
    """SHOAL_HOST_IP (or VLLM_HOST_IP): the address under which the other machines reach this one."""
    return _text("SHOAL_HOST_IP") or _text("VLLM_HOST_IP")


def cache_directory() -> Path:
    """What is kept between runs: in SHOAL_CACHE_DIR, else XDG_CACHE_HOME/shoal, else ~/.cache/shoal."""
    explicit = _text("SHOAL_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    return Path(_text("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shoal"


def hub_cache() -> Path:
    """Where downloaded Hugging Face models lie: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    explicit = _text("HF_HUB_CACHE") or _text("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    cache_home = _text("XDG_CACHE_HOME") or "~/.cache"
    return Path(_text("HF_HOME") or f"{cache_home}/huggingface").expanduser() / "hub"


def hub_offline() -> bool:
    """HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: nothing may be asked of the Hugging Face hub."""
    return _flag("HF_HUB_OFFLINE") or _flag("TRANSFORMERS_OFFLINE")


def cuda_visible_devices() -> list[str] | None:
    """CUDA_VISIBLE_DEVICES: the devices named, [] when it is set but empty (or -1), None when it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    devices = [device.strip() for device in value.split(",") if device.strip()]
    # CUDA itself stops at the first id that is not valid; -1 is the customary way to hide all.
    return devices[: devices.index("-1")] if "-1" in devices else devices


def in_kubernetes() -> bool:
    """KUBERNETES_SERVICE_HOST, which every container of a pod has."""
    return _text("KUBERNETES_SERVICE_HOST") is not None


def no_color() -> bool:
    """NO_COLOR, set to anything but nothing (no-color.org), or TERM=dumb."""
    return bool(_text("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def omp_num_threads() -> int | None:
    """OMP_NUM_THREADS: threads of one process's computations. A list counts by its first."""
    value = _text("OMP_NUM_THREADS")
    if value is None:
        return None
    first = value.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS must be a number of threads, 1 or more; got {value!r}")
    return int(first)


def startup_timeout() -> float | None:
    """TORCH_DISTRIBUTED_INIT_TIMEOUT: seconds for each phase of the start."""
    return _seconds("TORCH_DISTRIBUTED_INIT_TIMEOUT")


def step_timeout() -> float | None:
    """NCCL_TIMEOUT, else GLOO_TIMEOUT: seconds that one step may take."""
    return _seconds("NCCL_TIMEOUT") or _seconds("GLOO_TIMEOUT")


def ray_address() -> str | None:
    """RAY_ADDRESS: the Ray cluster to join ("host:port", or "auto")."""
    return _text("RAY_ADDRESS")


def has_ray_authentication() -> bool:
    """Whether RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH say how to reach a cluster that is not Shoal's."""
    return any(_text(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def cluster_token() -> str | None:
    """SHOAL_CLUSTER_TOKEN: what a machine shows to join a cluster."""
    return _text("SHOAL_CLUSTER_TOKEN")


def socket_interface() -> tuple[str, str] | None:
    """NCCL_SOCKET_IFNAME, else GLOO_SOCKET_IFNAME: which one it is, and its value (NCCL's rules for names)."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = _text(name)
        if value is not None:
            return name, value
    return None


def option_values() -> dict[str, str]:
    """The SHOAL_* variables by option name ("SHOAL_MAX_MODEL_LEN" -> "max_model_len"), unparsed, no service links."""
    values = {}
    for name, value in os.environ.items():
        if not name.startswith(PREFIX) or name == "SHOAL_HOST_IP" or _is_service_link(name, value):
            continue
        values[name.removeprefix(PREFIX).lower()] = value
    return values


def unknown_names(option_names: Iterable[str]) -> list[str]:
    """One warning for each SHOAL_* variable that is neither an option's nor one of Shoal's own."""
    known = {*_OWN_NAMES, *(PREFIX + name.upper() for name in option_names)}
    warnings = []
    for name, value in sorted(os.environ.items()):
        if not name.startswith(PREFIX) or name in known or _is_service_link(name, value):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else "Shoal does not know this name."
        warnings.append(f"environment variable {name} is not used: {hint}")
    return warnings


def relevant_variables() -> dict[str, str]:
    """What is set of everything that changes how Shoal and its libraries work; secrets only say that they are set."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(_RELEVANT_PREFIXES) or name in _RELEVANT_NAMES:
            found[name] = "(set)" if _SECRET.search(name) else value
    return found


def shared_variables() -> dict[str, str]:
    """What of this process's environment the workers on all hosts shall have, unless their host sets it itself.

    All that changes how Shoal and its libraries work, but for what belongs to one host (its addresses, devices, paths)
    and for secrets.
    """
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHARED_PREFIXES)
        and name not in _PER_NODE
        and not _SECRET.search(name)
        and not _PATH_NAME.search(name)
        and not _is_service_link(name, value)
    }


def initial_environment() -> dict[str, str]:
    """What this process was started with, before libraries changed it (Ray sets OMP_NUM_THREADS for its workers)."""
    pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    return {
        os.fsdecode(name): os.fsdecode(value) for name, _, value in (pair.partition(b"=") for pair in pairs) if name
    }


def subprocess_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy of the whole environment with `changes`: what a process that Shoal starts is given."""
    return {**os.environ, **(changes or {})}


def c_compiler() -> str | None:
    """CC: the C compiler that Triton starts; None: it looks for one."""
    return _text("CC")


def triton_cache_directory() -> Path:
    """Where Triton keeps compiled kernels: TRITON_CACHE_DIR, else .triton/cache in TRITON_HOME or at home."""
    explicit = _text("TRITON_CACHE_DIR")
    return Path(explicit) if explicit else Path(_text("TRITON_HOME") or "~").expanduser() / ".triton" / "cache"


def set_triton_cache_directory(path: Path) -> None:
    """For this process and its children, whatever the user set."""
    os.environ["TRITON_CACHE_DIR"] = str(path)


def set_default(name: str, value: str) -> None:
    """Set a variable for this process and its children unless the user set it: for libraries that read their own."""
    os.environ.setdefault(name, value)


def export_log_level(level: str) -> None:
    """Let the processes that this one starts log as much as it does: what a flag says counts more than the variable."""
    os.environ["SHOAL_LOG_LEVEL"] = level


def _text(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def _seconds(name: str) -> float | None:
    value = _text(name)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name} must be a number of seconds above 0; got {value!r}")
    return seconds


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise ConfigError(f"{name} must be 1 or 0 (or true/false, yes/no, on/off); got {os.environ[name]!r}")
    return value in _TRUE


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name)) or (name.endswith("_PORT") and value.startswith(("tcp://", "udp://")))
