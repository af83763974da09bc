"""The table of known GPUs: memory, bandwidth, rates, links. Figures are the vendors' own, dense (without sparsity).

`memory_mib` is what nvidia-smi shows of the card with ECC as it comes; CUDA itself keeps about 0.6 % of it.
"""

from __future__ import annotations

import dataclasses

MIB = 1 << 20
CUDA_SHARE = 0.994


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """nominal_gb: as the card is called. bandwidth: GB/s. bf16, fp16, fp8: TFLOP/s; 0: the card has none.

    nvlink: GB/s in one direction, to all others of a machine; 0: PCIe. pcie: GB/s in one direction. served: whether
    Shoal runs there.
    """

    name: str
    nominal_gb: int
    memory_mib: int
    bandwidth: float
    bf16: float
    fp16: float
    fp8: float = 0
    nvlink: float = 0
    pcie: float = 31.5
    served: bool = True

    @property
    def memory_bytes(self) -> int:
        """What CUDA reports."""
        return int(self.memory_mib * MIB * CUDA_SHARE)


def _gpu(name: str, nominal_gb: int, memory_mib: int, bandwidth: float, rate: float, **more: float | bool) -> Gpu:
    """rate: bf16, and fp16 where that is not said."""
    values: dict[str, float | bool] = {"bf16": rate, "fp16": rate, **more}
    return Gpu(name=name, nominal_gb=nominal_gb, memory_mib=memory_mib, bandwidth=bandwidth, **values)  # type: ignore[arg-type]


# Variants of one name stand together, the smallest memory first.
GPUS = (
    _gpu("B200", 192, 183359, 8000, 2250, fp8=4500, nvlink=900, pcie=63),
    _gpu("H200", 141, 143771, 4800, 989, fp8=1979, nvlink=450, pcie=63),
    _gpu("H100", 80, 81559, 3350, 989, fp8=1979, nvlink=450, pcie=63),
    _gpu("H100-PCIe", 80, 81559, 2000, 756, fp8=1513, pcie=63),
    _gpu("H100-NVL", 94, 95830, 3938, 835, fp8=1671, nvlink=300, pcie=63),
    _gpu("H800", 80, 81559, 3350, 989, fp8=1979, nvlink=200, pcie=63),
    _gpu("H20", 96, 97871, 4000, 148, fp8=296, nvlink=450, pcie=63),
    _gpu("A100", 40, 40960, 1555, 312, nvlink=300),
    _gpu("A100", 80, 81920, 2039, 312, nvlink=300),
    _gpu("A100-PCIe", 40, 40960, 1555, 312),
    _gpu("A100-PCIe", 80, 81920, 1935, 312),
    _gpu("A800", 80, 81920, 2039, 312, nvlink=200),
    _gpu("A40", 48, 46068, 696, 149.7),
    _gpu("A30", 24, 24576, 933, 165),
    _gpu("A10", 24, 23028, 600, 125),
    _gpu("L40S", 48, 46068, 864, 362, fp8=733),
    _gpu("L40", 48, 46068, 864, 181, fp8=362),
    _gpu("L20", 48, 46068, 864, 119.5, fp8=239),
    _gpu("L4", 24, 23034, 300, 121, fp8=242),
    _gpu("T4", 16, 15360, 320, 0, fp16=65, pcie=15.8),
    _gpu("V100", 16, 16384, 900, 0, fp16=125, nvlink=150, pcie=15.8),
    _gpu("V100", 32, 32768, 900, 0, fp16=125, nvlink=150, pcie=15.8),
    _gpu("RTX3090", 24, 24576, 936, 71),
    _gpu("RTX4090", 24, 24564, 1008, 165, fp8=330),
    _gpu("RTX5090", 32, 32607, 1792, 209.5, fp8=419, pcie=63),
    _gpu("RTXA6000", 48, 49140, 768, 155),
    _gpu("RTX6000Ada", 48, 49140, 960, 364, fp8=728),
    _gpu("MI300X", 192, 196592, 5300, 1307, fp8=2615, nvlink=448, pcie=63, served=False),
)

# Words of names as drivers and people write them that say nothing more.
_NOISE = (
    "nvidia",
    "geforce",
    "tesla",
    "quadro",
    "amd",
    "instinct",
    "graphics",
    "generation",
    "hbm3e",
    "hbm3",
    "hbm2e",
    "hbm2",
    "hbm",
)


def normalise(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3", "h100-sxm" -> "h100": letters and digits alone, without what says nothing."""
    text = name.lower()
    for word in _NOISE:
        text = text.replace(word, " ")
    kept = [word for word in text.replace("-", " ").replace("_", " ").split() if not _is_size(word)]
    text = "".join(kept)
    for form in ("sxm2", "sxm3", "sxm4", "sxm5", "sxm", "smx"):
        text = text.removesuffix(form)
    return text


def _is_size(word: str) -> bool:
    digits = word.removesuffix("gib").removesuffix("gb")
    return digits != word and digits.replace(".", "", 1).isdigit()


def variants(name: str) -> list[Gpu]:
    """The known cards of a name, however it is written; none: it is not known."""
    wanted = normalise(name)
    aliases = {"3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090", "a6000": "rtxa6000", "6000ada": "rtx6000ada"}
    wanted = aliases.get(wanted, wanted)
    return [gpu for gpu in GPUS if gpu.name.lower().replace("-", "") == wanted]


def known_names() -> list[str]:
    return list(dict.fromkeys(gpu.name for gpu in GPUS))
