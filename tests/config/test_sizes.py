from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.sizes import format_size, parse_size
from shoal.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 1024**2),
        ("4GiB", 4 * 1024**3),
        ("4 gib", 4 * 1024**3),
        ("4g", 4 * 1024**3),
        ("2GB", 2 * 1000**3),
        ("1.5KiB", 1536),
        ("17", 17),
        ("17B", 17),
        (17, 17),
        (" 1TiB ", 1024**4),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "size") == size


@pytest.mark.parametrize("text", ["", "GiB", "4 GiBs", "-1GiB", "1e9", "four", "4,5GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="kv_cache_memory must be a size such as 512MiB"):
        parse_size(text, "kv_cache_memory")


def test_nothing_is_too_little():
    for text in ("0", "0GiB", 0):
        with pytest.raises(ConfigError, match="more than 0 bytes"):
            parse_size(text, "size")


@given(st.integers(1, 2**60))
def test_bytes_stay_exact(size):
    assert parse_size(str(size), "size") == size


@given(st.integers(1024, 2**50))
def test_a_formatted_size_is_near(size):
    assert parse_size(format_size(size), "size") == pytest.approx(size, rel=0.06)


def test_small_sizes():
    assert format_size(17) == "17 bytes"
    assert format_size(1536) == "1.5 KiB"
    assert format_size(4 * 1024**3) == "4 GiB"
