from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal import network
from shoal.errors import ConfigError

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_without_one_it_says_how_to_make_one_and_where_to_put_it(home):
    ways = f"SHOAL_CLUSTER_TOKEN.*--token-file.*{home}/.shoal/cluster-token"
    with pytest.raises(ConfigError, match=f"openssl rand -hex 32.*shoal node start --head.*{ways}"):
        network.load_token()


def test_the_head_makes_one_that_only_its_user_can_read(home):
    token = network.create_token()
    path = home / ".shoal" / "cluster-token"
    assert network.default_token_path() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64 and network.load_token() == token
    assert network.create_token() == token, "an existing one stays"
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster-token"]


def test_of_several_that_make_one_at_once_all_have_the_same(home):
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: network.create_token(), range(16)))
    assert tokens == {network.load_token()}


def test_what_counts_most(home, monkeypatch, tmp_path):
    network.create_token()
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", TOKEN)
    assert network.load_token() == TOKEN
    file = tmp_path / "other"
    other = network.create_token(file)
    assert network.load_token(str(file)) == other != TOKEN
    with pytest.raises(ConfigError, match="cannot read the cluster token in .*missing"):
        network.load_token(str(tmp_path / "missing"))


def test_a_token_that_others_can_read(home, tmp_path, caplog):
    path = network.default_token_path()
    network.create_token()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        network.load_token()
    # A mounted secret is often readable by all; its owner chose the place.
    assert network.load_token(str(path))
    assert "other users" in caplog.text


@pytest.mark.parametrize("token", ["short", "with spaces in it, as prose has", "ünicode-is-no-token-at-all"])
def test_what_is_no_token(monkeypatch, token):
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", token)
    with pytest.raises(ConfigError, match="SHOAL_CLUSTER_TOKEN must be 16 or more printable") as error:
        network.load_token()
    assert token not in str(error.value)
