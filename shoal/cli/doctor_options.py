"""Options of `shoal doctor`."""

from __future__ import annotations

import dataclasses

from shoal.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What is looked at."""

    model: str | None = option(None, "Model to look for on every machine: a directory, or a downloaded one's name.")
    cluster: bool = option(False, "Look at all nodes of the cluster, and at what is between them.")
    quick: bool = option(False, "Leave out all that --skip can: an answer within seconds.")
    skip: list[str] = option(
        [],
        "What to leave out: torch (loading it), gpus (nvidia-smi), links (bandwidth, loss, packet sizes), collectives "
        "(an all-reduce), sums (hashing the model's files).",
    )
    json: bool = option(False, "Print findings and facts as JSON.")
    head_port: int = option(
        6379, "Port of the head that this machine would be, whose ports must be free.", minimum=1, maximum=65528
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory that the model shall have.", minimum=0.01, maximum=1
    )
