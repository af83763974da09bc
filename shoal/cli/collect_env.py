"""`shoal collect-env`: what a bug report needs to say of the machine. No secret is printed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from shoal import env
from shoal.cli.client_options import CollectEnvOptions
from shoal.cli.command import Command
from shoal.config.sizes import format_size
from shoal.version import __version__

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pyzmq", "pydantic", "fastapi",
    "uvicorn", "uvloop", "httpx", "prometheus-client", "ray",
)  # fmt: skip
# Vector extensions that decide which CPU kernels run.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16")
_TORCH_PROBE = """
import json, torch
facts = {"version": torch.__version__, "cuda build": torch.version.cuda or "none", "threads": torch.get_num_threads()}
facts["cuda usable"] = torch.cuda.is_available()
facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
if facts["cuda usable"]:
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(facts))
"""

Report = dict[str, dict[str, str]]


def collect() -> Report:
    """The report by section; every value is text for people."""
    return {
        "shoal": _shoal(),
        "cpu": _cpu(),
        "memory": _memory(),
        "gpu": _gpus(),
        "torch": probe_torch(sys.executable),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": env.relevant_variables(),
    }


def _shoal() -> dict[str, str]:
    return {
        "version": __version__,
        "installed at": str(Path(__file__).resolve().parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {_distribution()}",
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown distribution")
    except OSError:
        return "no os-release"


def _cpu() -> dict[str, str]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": f"{psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical, {usable} usable here",
        "vector extensions": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of those that matter",
    }


def _memory() -> dict[str, str]:
    memory = psutil.virtual_memory()
    facts = {"total": format_size(memory.total), "available": format_size(memory.available)}
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(limit_file):
            text = Path(limit_file).read_text(encoding="ascii").strip()
            if text.isdecimal() and int(text) < memory.total:
                facts["limit of this container"] = format_size(int(text))
    shared = Path("/dev/shm")
    if shared.is_dir():
        facts["shared memory (/dev/shm)"] = format_size(shutil.disk_usage(shared).total)
    return facts


def _gpus() -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not found: no NVIDIA driver, or it is outside this container"}
    query = "index,name,memory.total,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"does not work: {error}"}
    if done.returncode != 0:
        return {"nvidia-smi": f"does not work: {(done.stderr or done.stdout).strip()}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if not rows:
        return {"nvidia-smi": "sees no GPU"}
    return {
        f"gpu {index}": f"{name}, {memory}, driver {driver}, compute capability {capability}"
        for index, name, memory, driver, capability in rows
    }


def probe_torch(python: str) -> dict[str, str]:
    """What torch says of itself, asked in a process of its own: a broken build may crash, and must not crash us."""
    try:
        done = subprocess.run([python, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"state": "broken: importing it takes more than 120 s"}
    if done.returncode == 0:
        return {key: str(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"the process ended with code {done.returncode}"
    if "No module named 'torch'" in reason:
        return {"state": "not installed; pip install 'shoal[engine]' brings it (router and client work without)"}
    return {"state": f"broken: {reason}"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run(options: CollectEnvOptions) -> int:
    report = collect()
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    for section, facts in report.items():
        print(f"{section}:")
        for name, value in facts.items():
            print(f"  {name}: {value}")
    return 0


COMMAND = Command(
    name="collect-env",
    description="Print versions, CPU, memory and GPUs: what a bug report needs. Keys and tokens are not printed.",
    sections=(CollectEnvOptions,),
    run=_run,
)
