from __future__ import annotations

import pytest

from shoal.config.model_path import resolve_model_path
from shoal.errors import ModelError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--org--name"

    def snapshot(commit: str, main: bool = False):
        (folder / "snapshots" / commit).mkdir(parents=True)
        if main:
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    return snapshot


def test_a_directory_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert resolve_model_path("model") == resolve_model_path("./model") == tmp_path / "model"


def test_a_downloaded_model_is_found_by_its_name(hub):
    hub("older")
    newest = hub("newest", main=True)
    assert resolve_model_path("org/name") == newest


def test_the_only_snapshot_needs_no_reference(hub):
    only = hub("only")
    assert resolve_model_path("org/name") == only


def test_several_snapshots_need_one(hub):
    hub("one"), hub("two")
    with pytest.raises(ModelError, match="2 snapshots of org/name and no refs/main; name one by its path: .*/one"):
        resolve_model_path("org/name")


def test_nothing_is_downloaded(hub):
    with pytest.raises(ModelError, match="neither a directory nor a model.*downloads nothing.*hf download org/name"):
        resolve_model_path("org/name")


def test_a_wrong_path_says_where_it_stops_being_right(tmp_path):
    (tmp_path / "Qwen2-7B").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ModelError, match=f"Qwen2-8B does not exist \\({tmp_path} exists and holds Qwen2-7B\\)"):
        resolve_model_path(str(tmp_path / "Qwen2-8B"))
    with pytest.raises(ModelError, match=f"does not exist \\({tmp_path} exists\\); a downloaded"):
        resolve_model_path(str(tmp_path / "nothing" / "like" / "it"))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file; a Hugging Face directory .* would work"):
        resolve_model_path(str(tmp_path / "model.gguf"))
