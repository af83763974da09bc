from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.flags import flag_usage, help_text, parse_flags, section_title
from shoal.config.knobs import KnobTable
from shoal.config.sources import SERVE_SECTIONS
from shoal.errors import ConfigError

TABLE = KnobTable(SERVE_SECTIONS)


def parse(line: str, positional: str | None = "model") -> dict:
    return parse_flags(shlex.split(line), TABLE, positional)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("/models/x", {"model": "/models/x"}),
        ("--model /models/x", {"model": "/models/x"}),
        ("/models/x --port 8009", {"model": "/models/x", "port": 8009}),
        ("--port=8009 /models/x", {"model": "/models/x", "port": 8009}),
        ("--max_model_len 4096", {"max_model_len": 4096}),
        ("--port 1 --port 2", {"port": 2}),
        ("--enforce-eager m", {"enforce_eager": True, "model": "m"}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--enable-prefix-caching=false", {"enable_prefix_caching": False}),
        ("--deterministic", {"deterministic": True}),
        ("--served-model-name a b --port 1", {"served_model_name": ["a", "b"], "port": 1}),
        ("--api-key a --api-key b", {"api_key": ["a", "b"]}),
        ("""--allowed-origins '["x", "y"]'""", {"allowed_origins": ["x", "y"]}),
        ("--api-key a -- m", {"api_key": ["a"], "model": "m"}),
        ("--kv-cache-memory-bytes 4GiB", {"kv_cache_memory": "4GiB"}),
        (
            "--trust-remote-code --gpu-memory-utilization 0.95",
            {"trust_remote_code": True, "gpu_memory_utilization": 0.95},
        ),
    ],
)
def test_what_a_command_line_sets(line, values):
    assert parse(line) == values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max-modle-len 4", "--max-modle-len is not an option; did you mean --max-model-len?"),
        ("--max_modle_len 4", "did you mean --max-model-len?"),
        ("--no-enable-prefix-cachin", "did you mean --no-enable-prefix-caching?"),
        ("--no-port 3", "--no-port is not an option; --port N takes a value"),
        ("--xyzzy", "--xyzzy is not an option"),
        ("-x", "-x is not an option"),
        ("-q gqtq", "must be one of .*; got .gqtq.; did you mean gptq"),
        ("--reasoning-parser deepseek", "--reasoning-parser is not supported: reasoning parsers"),
        ("--port", "--port needs a value: --port N"),
        ("--port --host x", "--port needs a value"),
        ("--port x", "--port must be an integer from 0 to 65535; got 'x'"),
        ("--port -1", "--port must be an integer from 0 to 65535; got -1"),
        ("--api-key", "--api-key needs at least one value"),
        ("--no-enforce-eager=1", "--no-enforce-eager takes no value"),
        ("--enforce-eager=perhaps", "--enforce-eager must be true or false"),
        ("a b", "unexpected argument 'b' after MODEL"),
        ("--model a b", "unexpected argument 'b' after MODEL"),
        ("--dtype fp8", "--dtype must be one of"),
    ],
)
def test_what_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        parse(line)


def test_a_command_without_a_bare_argument_refuses_one():
    with pytest.raises(ConfigError, match="unexpected argument 'x'"):
        parse("x", positional=None)


@given(st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_any_command_line_is_parsed_or_refused(arguments):
    try:
        values = parse_flags(arguments, TABLE, "model")
    except ConfigError:
        return
    assert set(values) <= set(TABLE.by_name)


def test_help_names_every_flag_section_and_default():
    text = help_text(TABLE, width=100)
    for knob in TABLE.knobs:
        assert flag_usage(knob) in text
    for section in SERVE_SECTIONS:
        assert section_title(section) in text
    assert "Default: 8000." in text and "--no-enforce-eager" in text
    assert max(map(len, text.splitlines())) <= 100
