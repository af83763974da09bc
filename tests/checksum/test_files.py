"""Which files count."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shoal.checksum import list_files
from shoal.errors import NotFoundError


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_contents_count_and_what_tools_keep_does_not(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "model.safetensors", "onnx/model.onnx", "B", "a")
    write(tmp_path, ".git/HEAD", "onnx/.git/HEAD", "model.safetensors.lock", ".cache/huggingface/download/x.metadata")
    write(tmp_path, ".gitattributes", ".cache/else", "lock")
    listing = list_files(tmp_path)
    expected = [
        ".cache/else",
        ".gitattributes",
        "B",
        "a",
        "config.json",
        "lock",
        "model.safetensors",
        "onnx/model.onnx",
    ]
    assert list(listing.files) == expected and listing.skipped == {}
    assert listing.files["onnx/model.onnx"].read_text() == "onnx/model.onnx"


def test_a_list_may_name_what_would_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, "poetry.lock", "a", "uv.lock")
    assert list(list_files(tmp_path, also=["poetry.lock", "no.lock", "a"]).files) == ["a", "poetry.lock"]


def test_a_file_alone(tmp_path: Path) -> None:
    write(tmp_path, "one.safetensors", "two")
    assert list_files(tmp_path / "one.safetensors").files == {"one.safetensors": tmp_path / "one.safetensors"}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none cannot be read: No such file"):
        list_files(tmp_path / "none")


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """As the hub's client lays a model out: files under their hash, snapshots of links to them."""
    repo = tmp_path / "models--org--name"
    write(repo, "blobs/aaaa", "blobs/bbbb", "blobs/left-over", "refs/main", ".no_exist/rev/x", ".locks/aaaa.lock")
    snapshot = repo / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/aaaa")
    (snapshot / "model.safetensors").symlink_to("../../blobs/bbbb")
    return repo


def test_snapshots_of_the_hub_are_links_to_files(hub_cache: Path) -> None:
    listing = list_files(hub_cache / "snapshots" / "rev")
    assert {name: path.read_text() for name, path in listing.files.items()} == {
        "config.json": "blobs/aaaa",
        "model.safetensors": "blobs/bbbb",
    }
    whole = list_files(hub_cache)
    assert list(whole.files) == ["refs/main", "snapshots/rev/config.json", "snapshots/rev/model.safetensors"]


def test_a_blob_that_is_gone_is_named(hub_cache: Path) -> None:
    (hub_cache / "blobs" / "bbbb").unlink()
    listing = list_files(hub_cache / "snapshots" / "rev")
    assert list(listing.files) == ["config.json"]
    assert "a link to ../../blobs/bbbb" in listing.skipped["model.safetensors"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, "model/a", "elsewhere/b")
    (tmp_path / "model" / "more").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "model")
    (tmp_path / "model" / "self").symlink_to(".")
    listing = list_files(tmp_path / "model")
    assert list(listing.files) == ["a", "more/b"]
    assert set(listing.skipped) == {"self", "more/up"} and "it lies in" in listing.skipped["self"]


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert list_files(tmp_path).skipped == {"pipe": "a pipe, not a file", "socket": "a socket, not a file"}
