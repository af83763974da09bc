"""Pieces of any shape out of a safetensors file, compared with slicing the whole; broken files are named."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shoal.errors import ModelError
from shoal.weights import safetensors_file
from shoal.weights.safetensors_file import SafetensorsFile


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    bounds = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return shape, tuple(slice(*each) for each in bounds)


@pytest.mark.parametrize("block_bytes", [16, 200, 1 << 20])
def test_any_piece_of_any_tensor(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_BLOCK_BYTES", block_bytes)

    @settings(max_examples=60)
    @given(pieces(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.booleans())
    def check(
        piece: tuple[tuple[int, ...], tuple[slice, ...]], dtype: torch.dtype, convert: bool, strided: bool
    ) -> None:
        shape, index = piece
        tensor = torch.randn(shape).to(dtype)
        save_file({"other": torch.ones(3, dtype=torch.uint8), "w": tensor}, tmp_path / "a.safetensors")
        file = SafetensorsFile(tmp_path / "a.safetensors")
        expected = tensor[index]
        wanted_dtype = torch.float32 if convert else dtype
        destination = torch.full(expected.shape, 7.0, dtype=wanted_dtype)
        if strided:
            destination = torch.full((*expected.shape[:-1], expected.shape[-1] + 2), 7.0, dtype=wanted_dtype)
            destination = destination[..., 1:-1]
        file.read_into("w", index, destination)
        assert torch.equal(destination, expected.to(wanted_dtype))
        assert file.num_bytes_read == expected.nbytes
        assert (file.shape("w"), file.dtype("w"), set(file.names())) == (shape, dtype, {"other", "w"})
        file.close()

    check()


def test_a_number_and_an_empty_tensor(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(2.5), "none": torch.empty(0, 4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    scale = torch.zeros(())
    file.read_into("scale", (), scale)
    assert scale.item() == 2.5
    file.read_into("none", (slice(0, 0), slice(0, 4)), torch.empty(0, 4))
    assert file.num_bytes_read == 4


def test_tensors_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    """So that a disk reads on."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * place, 4 * place + 4]}
        for name, place in (("a", 2), ("b", 0), ("c", 1))
    }
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<3f", 0, 1, 2))
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.names() == ["b", "c", "a"]
    destination = torch.zeros(1)
    file.read_into("a", (slice(0, 1),), destination)
    assert destination.item() == 2


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "do not begin with a header"),
        (b"no json", "Expecting value"),
        (b"[1, 2]", "its header is a list"),
        (json.dumps({"w": entry(dtype="F3")}).encode(), "tensor w is of type F3; known: F64, F32"),
        (json.dumps({"w": entry(shape=[2, 3])}).encode(), r"tensor w of shape \[2, 3\] is said to take 16 bytes"),
        (json.dumps({"w": entry(shape=[3, 2], data_offsets=[0, 24])}).encode(), "tensor w ends at byte .* of"),
        (json.dumps({"w": {"dtype": "F32"}}).encode(), "KeyError: 'data_offsets'"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelError, match=f"a.safetensors is not a whole safetensors file: .*{message}.*download it"):
        SafetensorsFile(path)


def test_a_header_as_long_as_the_world(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + bytes(100))
    with pytest.raises(ModelError, match="do not begin with a header"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100, 100)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as opened:
        opened.truncate(2000)
    with pytest.raises(ModelError, match="it ended at byte 2000 while it was read"):
        file.read_into("w", (slice(0, 100), slice(0, 100)), torch.empty(100, 100))


def test_columns_are_read_alone(tmp_path: Path) -> None:
    """What the process asks the kernel for is the piece, not the matrix."""
    save_file({"w": torch.ones(64, 4096)}, tmp_path / "a.safetensors")

    def asked_for() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    file = SafetensorsFile(tmp_path / "a.safetensors")
    destination = torch.empty(64, 1024)
    before = asked_for()
    file.read_into("w", (slice(0, 64), slice(1024, 2048)), destination)
    assert math.isclose(asked_for() - before, destination.nbytes, abs_tol=8192)
    assert torch.equal(destination, torch.ones(64, 1024))
