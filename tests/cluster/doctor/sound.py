"""Facts of machines without a fault, for tests to break."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.cluster.doctor.facts import (
    Gpu,
    GpuFacts,
    GpuLink,
    InterfaceFacts,
    Limit,
    ModelFacts,
    ModelFile,
    NetworkFacts,
    NodeFacts,
    PortUse,
    SystemFacts,
    TorchFacts,
    VersionFacts,
)

GIB = 1 << 30


def gpu(index: int, used: int = 0, **more: Any) -> Gpu:
    facts = {"name": "NVIDIA L20", "uuid": f"GPU-{index}aaa", "total_bytes": 46 * GIB, "used_bytes": used, **more}
    return Gpu(index=index, **facts)


def node(number: int = 1, *, num_gpus: int = 2) -> NodeFacts:
    """node1 (10.0.0.1) with GPUs, a CUDA build of torch and Ray."""
    address = f"10.0.0.{number}"
    return NodeFacts(
        hostname=f"node{number}",
        address=address,
        versions=VersionFacts(
            shoal="1.0.0",
            python="3.11.7",
            packages={"ray": "2.60.0", "torch": "2.12.0"},
            torch=TorchFacts(
                state="ok",
                version="2.12.0",
                cuda="12.8",
                nccl="2.27.3",
                cuda_usable=True,
                num_devices=num_gpus,
                has_gloo=True,
            ),
            driver="570.86.15",
            driver_cuda="12.8",
        ),
        gpus=GpuFacts(state="ok", gpus=[gpu(index) for index in range(num_gpus)], links=[GpuLink(0, 1, "PIX")]),
        system=SystemFacts(
            hostname=f"node{number}",
            host_addresses=[address],
            num_cpus=64,
            num_usable_cpus=64,
            memory_bytes=512 * GIB,
            available_bytes=500 * GIB,
            shm_bytes=64 * GIB,
            shm_free_bytes=64 * GIB,
            limits={"nofile": Limit(65536, 1 << 20), "memlock": Limit(-1, -1), "nproc": Limit(-1, -1)},
        ),
        network=NetworkFacts(
            interfaces=[
                InterfaceFacts("lo", ["127.0.0.1"], 65536, 0, "loopback"),
                InterfaceFacts("eth0", [address], 1500, 25000, "physical"),
            ],
            address=address,
            interface="eth0",
            why="by the default route, or as the only one",
        ),
        ports=[PortUse("head", 6379, "tcp", "free"), PortUse("workers", 10002, "tcp", "free")],
        model=ModelFacts(
            name="/models/m",
            path="/models/m",
            files=[
                ModelFile("model.safetensors", 1000, 1000),
                ModelFile("config.json", 10),
                ModelFile("tokenizer.json", 10),
            ],
            weights=["model.safetensors"],
            weight_bytes=1000,
        ),
    )


def change(facts: NodeFacts, part: str, **changes: Any) -> NodeFacts:
    """The same with other values in one of its parts."""
    return msgspec.structs.replace(facts, **{part: msgspec.structs.replace(getattr(facts, part), **changes)})
