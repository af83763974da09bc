"""Checks of versions: what is installed on a machine, whether it fits together, whether all have the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.cluster.doctor.facts import NodeFacts, VersionFacts
from shoal.cluster.doctor.findings import Finding, Reporter

GROUP = "versions"
# Ray's nodes speak to each other only in one version of Ray and of Python; ranks do in one of Shoal, torch and NCCL.
_EQUAL: tuple[tuple[str, Callable[[VersionFacts], str], bool], ...] = (
    ("shoal", lambda facts: facts.shoal, True),
    ("Python", lambda facts: facts.python, True),
    ("torch", lambda facts: facts.torch.version, True),
    ("NCCL", lambda facts: facts.torch.nccl, True),
    ("Ray", lambda facts: facts.packages.get("ray") or "", True),
    ("NVIDIA driver", lambda facts: facts.driver, False),
)
_INSTALL = {
    "shoal": "pip install 'shoal=={}' on {}",
    "Python": "make the environment of {1} with Python {0}",
    "torch": "pip install 'torch=={}' on {}",
    "NCCL": "install the same build of torch on {1}: it brings NCCL {0}",
    "Ray": "pip install 'ray=={}' on {}",
    "NVIDIA driver": "install driver {} on {}, or leave it where models run",
}


def check(node: NodeFacts) -> list[Finding]:
    """One machine's versions."""
    report, facts = Reporter(GROUP, node.name), node.versions
    report.ok("shoal", f"shoal {facts.shoal}, Python {facts.python}")
    _check_torch(report, node)
    ray = facts.packages.get("ray")
    if ray:
        report.ok("ray", f"Ray {ray}")
    else:
        report.skip("ray", "Ray is not installed: --nnodes and --nodes work without", "pip install 'shoal[ray]'")
    return report.findings


def check_equal(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """That all machines have the same. The version that most have counts; of two as frequent, the first node's."""
    report = Reporter(GROUP, "")
    equal = []
    for what, read, is_needed in _EQUAL:
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            if version := read(node.versions):
                by_version.setdefault(version, []).append(node.name)
        if len(by_version) == 1:
            equal.append(f"{what} {next(iter(by_version))}")
        if len(by_version) < 2:
            continue
        common = max(by_version, key=lambda version: len(by_version[version]))
        seen = "; ".join(f"{what} {version} on {', '.join(names)}" for version, names in by_version.items())
        others = ", ".join(name for version, names in by_version.items() if version != common for name in names)
        (report.fail if is_needed else report.warn)(
            f"same {what}", f"versions differ: {seen}", _INSTALL[what].format(common, others)
        )
    if not report.findings:
        report.ok("same versions", f"all nodes have {', '.join(equal)}")
    return report.findings


def _check_torch(report: Reporter, node: NodeFacts) -> None:
    facts, gpus = node.versions, node.gpus
    torch = facts.torch
    if torch.state == "missing":
        report.skip("torch", "torch is not installed: what needs it is not checked here", "pip install 'shoal[engine]'")
        return
    if torch.state != "ok":
        report.fail(
            "torch",
            f"torch is broken: {torch.reason}",
            "pip install --force-reinstall 'shoal[engine]'; LD_LIBRARY_PATH must not name another CUDA",
        )
        return
    build = f"built for CUDA {torch.cuda}, NCCL {torch.nccl or 'none'}" if torch.cuda else "a CPU build"
    if gpus.state != "ok" or not gpus.gpus:
        report.ok("torch", f"torch {torch.version}, {build}")
        return
    if not torch.cuda:
        report.fail(
            "torch",
            f"torch {torch.version} is a CPU build, and there are {len(gpus.gpus)} GPUs",
            "install a CUDA build of torch: pip install --force-reinstall torch, with no CPU index configured for pip",
        )
        return
    if _major(torch.cuda) > _major(facts.driver_cuda) > 0:
        report.fail(
            "torch",
            f"torch {torch.version} was built for CUDA {torch.cuda}, and driver {facts.driver} runs CUDA "
            f"{facts.driver_cuda} at most",
            f"install a newer driver, or a torch that is built for CUDA {_major(facts.driver_cuda)}",
        )
        return
    if not torch.cuda_usable:
        report.fail(
            "torch",
            f"torch {torch.version} ({build}) cannot use the GPUs: {torch.cuda_reason or 'it sees none'}",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; after an update of the driver, restart the machine",
        )
        return
    if _minor(torch.cuda) > _minor(facts.driver_cuda) > (0, 0):
        report.warn(
            "torch",
            f"torch {torch.version} was built for CUDA {torch.cuda}, driver {facts.driver} is of CUDA "
            f"{facts.driver_cuda}: it runs, but kernels that are compiled here may not",
            "install a newer driver",
        )
        return
    report.ok("torch", f"torch {torch.version}, {build}; driver {facts.driver} runs CUDA {facts.driver_cuda}")


def _minor(version: str) -> tuple[int, int]:
    """(12, 8) of "12.8"; (0, 0) of what is no version."""
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0) if numbers else (0, 0)


def _major(version: str) -> int:
    return _minor(version)[0]
