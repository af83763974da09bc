"""What nvidia-smi says: GPUs, who holds their memory, how they are linked, the driver."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from shoal import env
from shoal.cluster.doctor.facts import Gpu, GpuFacts, GpuLink, GpuProcess
from shoal.cluster.doctor.gather.programs import ProgramError, run

_SECONDS = 25.0
_DEVICES = Path("/dev/nvidiactl")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CUDA = re.compile(r"CUDA Version:\s*([\d.]+)")


def gather_gpus() -> tuple[GpuFacts, str, str]:
    """GPUs, the driver's version, and the newest CUDA that it runs."""
    if not _DEVICES.exists() and not _is_installed():
        return GpuFacts(), "", ""
    form = "--format=csv,noheader,nounits"
    commands = (
        ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.used,driver_version", form],
        ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", form],
        ["nvidia-smi", "topo", "-m"],
        ["nvidia-smi"],
    )
    with ThreadPoolExecutor(len(commands)) as pool:
        listed, held, links, header = pool.map(_try, commands)
    if isinstance(listed, ProgramError):
        return GpuFacts(state="broken", reason=str(listed)), "", ""
    gpus, driver = parse_gpus(listed, held if isinstance(held, str) else "")
    found = _CUDA.search(header) if isinstance(header, str) else None
    facts = GpuFacts(
        state="ok" if gpus else "none",
        gpus=gpus,
        links=parse_links(links) if isinstance(links, str) else [],
        visible=env.cuda_visible_devices(),
    )
    return facts, driver, found[1] if found else ""


def parse_gpus(listed: str, held: str) -> tuple[list[Gpu], str]:
    """Of the two queries' lines (MiB), GPUs and the driver's version."""
    processes: dict[str, list[GpuProcess]] = {}
    for uuid, pid, name, used in _rows(held, 4):
        if pid.isdecimal():
            amount = int(used) << 20 if used.isdecimal() else 0
            process = GpuProcess(int(pid), _name(int(pid), name), amount, _is_shoal(int(pid)))
            processes.setdefault(uuid, []).append(process)
    rows = _rows(listed, 6)
    gpus = [
        Gpu(int(index), uuid, name, _mebibytes(total), _mebibytes(used), processes.get(uuid, []))
        for index, uuid, name, total, used, _ in rows
    ]
    return gpus, rows[0][5] if rows else ""


def parse_links(text: str) -> list[GpuLink]:
    """The matrix of `nvidia-smi topo -m`: a row and a column for each GPU, others behind them."""
    links = []
    columns: list[str] = []
    for line in _ESCAPE.sub("", text).splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not columns and "GPU0" in cells[1:]:
            columns = cells[1:]
        elif columns and re.fullmatch(r"GPU\d+", cells[0]):
            first = int(cells[0][3:])
            for name, kind in zip(columns, cells[1:], strict=False):
                if re.fullmatch(r"GPU\d+", name) and first < int(name[3:]):
                    links.append(GpuLink(first, int(name[3:]), kind))
    return links


def _is_installed() -> bool:
    try:
        run(["nvidia-smi", "-L"], _SECONDS)
    except ProgramError as error:
        return "is not installed" not in str(error)
    return True


def _try(command: list[str]) -> str | ProgramError:
    try:
        return run(command, _SECONDS)
    except ProgramError as error:
        return error


def _rows(text: str, num_cells: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == num_cells]


def _mebibytes(text: str) -> int:
    return int(float(text)) << 20 if text.replace(".", "", 1).isdecimal() else 0


def _name(pid: int, named: str) -> str:
    """ "" where the driver's pid is of another namespace: it may be some other process's here."""
    if "Not Found" in named or not psutil.pid_exists(pid):
        return ""
    return Path(named).name


def _is_shoal(pid: int) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return any(word in ("shoal.engine", "shoal.worker") for word in psutil.Process(pid).cmdline())
    return False
