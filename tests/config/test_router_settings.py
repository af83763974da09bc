from __future__ import annotations

import pytest

from shoal.config.router_settings import BackendSpec, SettingsSource, normal_url
from shoal.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """Settings of a command line, and a file if its text is given."""

    def load_settings(*arguments: str, file: str | None = None):
        given = list(arguments)
        if file is not None:
            path = tmp_path / "router.yaml"
            path.write_text(file, encoding="utf-8")
            given += ["--config", str(path)]
        return SettingsSource.of(given).load()

    return load_settings


def test_flags(load):
    settings = load(
        "--backend", "http://a:1", "https://b/v1/=2.5", "--alias", "gpt=m", "--policy", "prefix-aware", "--port", "0"
    )
    assert settings.backends == (BackendSpec(url="http://a:1"), BackendSpec(url="https://b", weight=2.5))
    assert settings.aliases == {"gpt": "m"} and settings.options.policy == "prefix-aware" and settings.keys is None
    assert (settings.options.host, settings.options.port) == ("127.0.0.1", 0)


def test_the_key_of_servers_that_have_none_of_their_own(load):
    file = "backends:\n  - http://a\n  - {url: http://b, api_key: its-own}\n"
    settings = load("--backend", "http://c", "--backend-api-key", "of-all", file=file)
    assert [spec.api_key for spec in settings.backends] == ["of-all", "of-all", "its-own"]


FILE = """\
policy: round-robin
port: 7000
backends:
  - http://a:1=3
  - url: http://b:2
    weight: 2
    api_key: secret
    models: [m, n]
    kind: openai
aliases: {gpt: m}
golden:
  prompt: "1 + 1 ="
  text: " 2"
keys:
  - {key: one, name: first}
"""


def test_a_file(load, monkeypatch):
    monkeypatch.setenv("SHOAL_PORT", "6000")
    monkeypatch.setenv("SHOAL_DEADLINE", "9")
    settings = load("--port", "8000", "--backend", "http://c", file=FILE)
    assert [(spec.url, spec.weight) for spec in settings.backends] == [
        ("http://c", 1),
        ("http://a:1", 3),
        ("http://b:2", 2),
    ]
    last = settings.backends[-1]
    assert (last.api_key, last.models, last.kind) == ("secret", ("m", "n"), "openai")
    assert settings.options.port == 8000 and settings.options.deadline == 9 and settings.options.policy == "round-robin"
    assert settings.golden.text == " 2" and settings.aliases == {"gpt": "m"}
    assert settings.keys == [{"key": "one", "name": "first"}] and "line 14" in settings.keys_source


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("backends:\n  - http://a\n  - nowhere\n", "line 3: backends[1] must be a URL"),
        ("backends:\n  - url: http://a\n    weight: 0\n", "line 3: backends[0].weight must be a number above 0; got 0"),
        ("backends:\n  - url: http://a\n    wieght: 1\n", "line 3: backends[0].wieght is not known"),
        ("backends:\n  - weight: 1\n", "line 2: backends[0] has no url"),
        (
            "backends:\n  - url: http://a\n    kind: vllm\n",
            "line 3: backends[0].kind must be one of auto, shoal, openai",
        ),
        ("backends: http://a\n", "line 1: backends must be a list"),
        ("\nplicy: x\nbackends: [http://a]", "line 2: plicy is not an option; did you mean policy?"),
        ("backends: [http://a]\nport: high\n", "line 2: port must be an integer"),
        ("backends: [http://a]\nbackends: [http://b]", "line 2: backends is there a second time"),
        ("backends: [http://a]\naliases: [x]", "line 2: aliases must be"),
        ("backends: [http://a]\ngolden: {text: x}", "line 2: golden.text needs golden.prompt"),
        ("backends: [http://a\nkeys: {", "is not YAML"),
        ("- a\n", "must hold"),
        ("backends: [http://a, http://a/v1]", "http://a is named twice"),
        ("policy: round-robin", "no server to route to"),
        ("", "no server to route to"),
    ],
)
def test_files_that_are_wrong(load, file, message):
    with pytest.raises(ConfigError) as caught:
        load(file=file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no server to route to: give --backend URL"),
        (["--backend", "ftp://a"], "--backend must be a URL"),
        (["--backend", "http://a=x"], "the weight must be a number above 0; got 'x'"),
        (["--backend", "http://a=nan"], "the weight must be a number above 0"),
        (["--backend", "http://a", "http://a/"], "named twice"),
        (["--backend", "http://a", "--alias", "gpt"], "--alias must be NAME=MODEL; got 'gpt'"),
        (["--backend", "http://a:99999"], "must be a URL"),
        (["--backend", "http://a", "--golden-prompt", "of"], "did you mean off?"),
        (["--config", "/no/such/file"], "cannot read the config file /no/such/file"),
    ],
)
def test_command_lines_that_are_wrong(load, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert message in str(caught.value)


def test_errors_show_no_keys(load):
    with pytest.raises(ConfigError) as caught:
        load(file="backends:\n  - {url: http://a, api_key: [hush]}\n")
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load(file="keys:\n  - key: hush}{\n   x: [\n")
    assert "hush" not in str(caught.value)


def test_a_change_is_seen(tmp_path):
    path = tmp_path / "router.yaml"
    path.write_text("backends: [http://a]", encoding="utf-8")
    source = SettingsSource.of(["--config", str(path)])
    before = source.fingerprint()
    assert before == source.fingerprint()
    path.with_suffix(".new").write_text("backends: [http://b]", encoding="utf-8")
    path.with_suffix(".new").replace(path)
    assert source.fingerprint() != before
    assert source.load().backends[0].url == "http://b"
    path.unlink()
    assert source.fingerprint() is None


def test_what_counts_from_the_next_start_on():
    one, other = (SettingsSource.of(["--backend", "http://a", "--port", port]).load() for port in ("1", "2"))
    assert one.differences_that_wait(other) == ["port"] and one.differences_that_wait(one) == []


def test_names_of_servers():
    assert [normal_url(text) for text in ("http://a/", "http://a/v1", "http://a/v1/", " http://a")] == ["http://a"] * 4
