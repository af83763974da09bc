"""API keys: who is who, what is refused, and that no error has a secret in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import AuthenticationError, ConfigError, NotFoundError
from shoal.router.admission import ApiKey, ApiKeys, read_api_keys

SECRET = "sk-very-secret-123"
ENTRY = {"key": SECRET, "name": "alice"}


def test_everybody_comes_in_without_keys() -> None:
    assert ApiKeys().authenticate(None) == ApiKeys().authenticate("Bearer x") == ApiKey(name="")


def test_each_secret_has_its_key() -> None:
    alice = {**ENTRY, "priority": -1, "weight": 2, "requests_per_minute": 60, "tokens_per_minute": 1e6,
             "max_concurrent": 4, "models": ["m"]}  # fmt: skip
    keys = ApiKeys.parse([alice, {"key": "other", "name": "bob"}], "keys.yaml")
    assert keys.names == ["alice", "bob"] and len(keys) == 2
    assert keys.authenticate(f"Bearer {SECRET}") == ApiKey(
        name="alice",
        priority=-1,
        weight=2.0,
        requests_per_minute=60,
        tokens_per_minute=1e6,
        max_concurrent=4,
        models=("m",),
    )
    assert keys.authenticate("bearer   other ") == ApiKey(name="bob")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "missing"), ("", "missing"), ("Bearer", "missing"), ("Bearer  ", "missing"), (SECRET, "missing"),
        (f"Basic {SECRET}", "missing"), ("Bearer wrong", "wrong"), (f"Bearer {SECRET}x", "wrong"),
        (f"Bearer {SECRET[:-1]}", "wrong"), ("Bearer \ud800ü", "wrong"),
    ],
)  # fmt: skip
def test_others_are_refused(header: str | None, message: str) -> None:
    keys = ApiKeys.parse([ENTRY], "keys.yaml")
    with pytest.raises(AuthenticationError, match=f"{message}; send the header Authorization: Bearer KEY") as caught:
        keys.authenticate(header)
    assert SECRET not in str(caught.value)


def test_secrets_are_not_kept() -> None:
    keys = ApiKeys.parse([ENTRY], "keys.yaml")
    assert SECRET not in repr(vars(keys)) and SECRET.encode() not in repr(vars(keys)).encode()


def test_models_of_a_key() -> None:
    key = ApiKey(name="alice", models=("a", "b"))
    key.check_model("a")
    ApiKey(name="bob").check_model("anything")
    with pytest.raises(NotFoundError, match="key 'alice' may not use the model 'c'; it may use: a, b") as caught:
        key.check_model("c")
    assert caught.value.param == "model" and caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "expected a list of keys, each with `key` and `name`; found a str"),
        (None, "found a NoneType"),
        ({"key": []}, "it under `keys:`; found key"),
        ({"keys": [ENTRY], "more": 1}, "found more"),
        ([], "the list of keys is empty"),
        (["x"], "key 1: expected `object`, got `str`"),
        ([{"name": "alice"}], r"key 1 \(alice\): object missing required field `key`; fields are: key, name, pri"),
        ([{"key": SECRET}], "key 1: object missing required field `name`"),
        ([{**ENTRY, "limit": 1}], r"key 1 \(alice\): object contains unknown field `limit`; fields are"),
        ([{**ENTRY, "priority": "high"}], r"\(alice\): expected `int`, got `str` - at `\$.priority`"),
        ([{"key": 123, "name": "alice"}], r"got `int` - at `\$.key`; put a key of digits into quotes"),
        ([{**ENTRY, "name": ""}], "key 1: name is empty"),
        ([{**ENTRY, "key": ""}], "key must be of visible ASCII characters"),
        ([{**ENTRY, "key": SECRET + " x"}], "key must be of visible ASCII characters"),
        ([{**ENTRY, "weight": 0}], "weight must be above 0; got 0$"),
        ([{**ENTRY, "weight": float("inf")}], "weight must be above 0; got inf"),
        (
            [{**ENTRY, "requests_per_minute": 0}],
            "requests_per_minute must be above 0; got 0; leave it away for no limit",
        ),
        ([{**ENTRY, "tokens_per_minute": float("nan")}], "tokens_per_minute must be above 0; got nan"),
        ([{**ENTRY, "max_concurrent": 0}], "max_concurrent must be 1 or more; got 0; leave it away"),
        ([ENTRY, {**ENTRY, "key": "x"}], "key.yaml: the name 'alice' is there twice"),
        ([ENTRY, {**ENTRY, "name": "bob"}], "'bob' and 'alice' have the same secret"),
    ],
)
def test_what_is_wrong_is_named(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.parse(content, "key.yaml")
    assert str(caught.value).startswith("key.yaml: ") and SECRET not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(json.dumps([ENTRY]))
    assert read_api_keys(path).names == ["alice"]
    path.write_text(f"keys:\n  - key: {SECRET}\n    name: alice\n    models: [a]\n")
    assert read_api_keys(path).authenticate(f"Bearer {SECRET}").models == ("a",)
    path.write_text(f"keys:\n  - key: {SECRET}\n   name: [alice\n")
    with pytest.raises(ConfigError, match=r"keys, line 3 is neither YAML nor JSON") as caught:
        read_api_keys(path)
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the file of API keys .*keys: "):
        read_api_keys(path)
    with pytest.raises(ConfigError, match="cannot read the file of API keys .*none: No such file"):
        read_api_keys(tmp_path / "none")
