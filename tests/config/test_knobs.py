from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shoal.cli.client_options import CLIENT_SECTIONS
from shoal.config.knobs import NOT_YET, KnobTable
from shoal.config.options import CacheOptions, ModelOptions, ServerOptions, option
from shoal.config.sources import SERVE_SECTIONS
from shoal.errors import ConfigError

TABLE = KnobTable(SERVE_SECTIONS)


def test_every_field_is_a_knob_with_help():
    names = [field.name for section in SERVE_SECTIONS for field in dataclasses.fields(section)]
    assert [knob.name for knob in TABLE.knobs] == names
    assert all(knob.help.endswith((".", ")")) for knob in TABLE.knobs)


@pytest.mark.parametrize("section", [*SERVE_SECTIONS, *CLIENT_SECTIONS])
def test_defaults_are_values_that_the_knob_itself_takes(section):
    for knob in KnobTable([section]).knobs:
        assert knob.from_value(knob.default, knob.name) == knob.default


def test_nothing_that_exists_is_called_missing():
    assert not set(NOT_YET) & set(TABLE.by_name)


def test_unknown_names_get_the_nearest_right_one():
    with pytest.raises(ConfigError, match="max_modle_len is not an option; did you mean max_model_len?"):
        TABLE.find("max_modle_len", str)
    with pytest.raises(ConfigError, match="no name is near"):
        TABLE.find("xyzzy", str)
    with pytest.raises(ConfigError, match="speculative_config is not supported: .*speculative decoding"):
        TABLE.find("speculative-config", str)


def test_dashes_underscores_and_aliases_find_the_same_knob():
    knob = TABLE.by_name["kv_cache_memory"]
    assert TABLE.find("kv-cache-memory", str) is knob
    assert TABLE.find("kv_cache_memory_bytes", str) is knob


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("port", "8000", "port must be an integer from 0 to 65535; got '8000' \\(str\\)"),
        ("port", True, "port must be an integer.*got True \\(bool\\)"),
        ("port", 70000, "from 0 to 65535; got 70000"),
        ("enforce_eager", 1, "enforce_eager must be true or false; got 1 \\(int\\)"),
        ("gpu_memory_utilization", float("nan"), "gpu_memory_utilization must be a number from 0.01 to 1"),
        ("gpu_memory_utilization", 1.5, "from 0.01 to 1; got 1.5"),
        ("max_model_len", 0, "an integer, 1 or more; got 0"),
        ("served_model_name", [1], "a list of strings; got \\[1\\]"),
        ("host", None, "host must be a string; got None"),
        ("dtype", "bfloat61", "must be one of auto, .*; got 'bfloat61'; did you mean bfloat16?"),
    ],
)
def test_wrong_values_say_what_would_work(name, value, wanted):
    with pytest.raises(ConfigError, match=wanted):
        TABLE.by_name[name].from_value(value, name)


def test_values_become_their_declared_type():
    knobs = TABLE.by_name
    assert knobs["gpu_memory_utilization"].from_value(1, "") == 1.0
    assert type(knobs["gpu_memory_utilization"].from_value(1, "")) is float
    assert knobs["model"].from_value(Path("/models/x"), "") == "/models/x"
    assert knobs["served_model_name"].from_value("a", "") == ["a"]
    assert knobs["served_model_name"].from_value(("a", "b"), "") == ["a", "b"]
    assert knobs["deterministic"].from_value(None, "") is None
    assert knobs["kv_cache_memory"].from_value(4096, "") == 4096


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("shutdown_timeout", "2.5", 2.5),
        ("deterministic", "none", None),
        ("deterministic", "Yes", True),
        ("enforce_eager", "off", False),
        ("max_model_len", "None", None),
        ("api_key", "k,1", ["k,1"]),
        ("allowed_origins", '["a", "b"]', ["a", "b"]),
    ],
)
def test_text_is_parsed(name, text, value):
    assert TABLE.by_name[name].from_text(text, name) == value


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("port", "eighty", "port must be an integer from 0 to 65535; got 'eighty'"),
        ("enforce_eager", "maybe", "true or false; got 'maybe'"),
        ("allowed_origins", '["a"', "begins like a JSON list"),
        ("allowed_origins", "[1]", "a list of strings"),
        ("host", "none", None),
    ],
)
def test_text_that_does_not_parse(name, text, wanted):
    if wanted is None:  # "none" is a value like any other where None is not allowed
        assert TABLE.by_name[name].from_text(text, name) == text
        return
    with pytest.raises(ConfigError, match=wanted):
        TABLE.by_name[name].from_text(text, name)


def test_build_makes_one_instance_a_section():
    model, cache, server = KnobTable([ModelOptions, CacheOptions, ServerOptions]).build({"port": 1, "block_size": 32})
    assert (model, cache.block_size, server.port) == (ModelOptions(), 32, 1)


def test_two_options_of_one_name_are_our_own_bug():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other:
        """Other."""

        port: int = option(1, "Port.")

    with pytest.raises(AssertionError):
        KnobTable([ServerOptions, Other])
