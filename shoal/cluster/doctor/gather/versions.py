"""Versions of what is installed; torch's own facts come from a process of its own, which a broken build may crash."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

import msgspec

from shoal.cluster.doctor.facts import TorchFacts, VersionFacts
from shoal.cluster.doctor.gather.programs import ProgramError, run
from shoal.version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "ray", "pyzmq", "msgspec", "triton")
_TORCH_SECONDS = 90.0
_TORCH_PROBE = """
import json, torch
facts = {"state": "ok", "version": torch.__version__, "cuda": torch.version.cuda or ""}
try:
    facts["has_gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
except AttributeError:
    facts["has_gloo"] = False
if facts["cuda"]:
    try:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:
        pass
    try:
        facts["num_devices"] = torch.cuda.device_count()
        torch.cuda.init()
        facts["cuda_usable"] = facts["num_devices"] > 0
    except Exception as error:
        facts["cuda_reason"] = (str(error).splitlines() or [type(error).__name__])[0]
print(json.dumps(facts))
"""


def gather_versions(driver: str, driver_cuda: str, *, load: bool) -> VersionFacts:
    """load: torch, in a process of its own; else whether it works stays open."""
    return VersionFacts(
        shoal=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        torch=probe_torch() if load else _installed_torch(),
        driver=driver,
        driver_cuda=driver_cuda,
    )


def probe_torch(python: str = sys.executable, timeout: float = _TORCH_SECONDS) -> TorchFacts:
    """What torch says when it is loaded."""
    try:
        output = run([python, "-c", _TORCH_PROBE], timeout)
        return msgspec.json.decode(output.splitlines()[-1], type=TorchFacts)
    except ProgramError as error:
        if "No module named 'torch'" in str(error):
            return TorchFacts()
        reason = str(error).replace(python, "loading torch")
        return TorchFacts(state="broken", reason=reason, version=_version("torch") or "")
    except (msgspec.MsgspecError, IndexError) as error:
        return TorchFacts(state="broken", reason=f"it does not say what it is: {error}")


def _installed_torch() -> TorchFacts:
    """From the files of the package alone. cuda_usable says no more than that the build has CUDA."""
    version = _version("torch")
    if version is None:
        return TorchFacts()
    cuda = ""
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "version.py"
        if path.is_file():
            found = re.search(r"^cuda[^=\n]*=\s*'([\d.]+)'", path.read_text(encoding="utf-8"), re.MULTILINE)
            cuda = found[1] if found else ""
            named = re.search(r"^__version__[^=\n]*=\s*'([^']+)'", path.read_text(encoding="utf-8"), re.MULTILINE)
            version = named[1] if named else version
    return TorchFacts(state="ok", version=version, cuda=cuda, cuda_usable=bool(cuda), has_gloo=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
