"""Lists of sums, against sha256sum itself."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.checksum import format_sum, parse_sums
from shoal.errors import ConfigError

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
needs_sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")


@pytest.mark.parametrize(
    "text",
    [
        f"{A}  one\n{B}  two/three four\n",
        f"{A.upper()} *one\r\n{B} *two/three four\r\n",
        f"# made by hand\n\nSHA256 (one) = {A}\nSHA256 (two/three four) = {B}",
        f"SHA2-256 (./one)= {A}\n{B}  ././two/three four\n",
    ],
)
def test_all_formats_say_the_same(text: str) -> None:
    assert parse_sums(text, "SUMS") == {"one": A, "two/three four": B}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{A}  one\nnonsense\n", "SUMS, line 2: no sum: 'nonsense'"),
        (f"{A[:40]}  one\n", "SUMS, line 1: 40 hexadecimal digits are no SHA-256, which has 64"),
        ("SHA1 (one) = 86f7e437faa5a7fce15d1ddcb9eaeaea377667b8\n", "a sum by SHA1; only SHA-256 is compared"),
        (f"{A}  one\n{B}  ./one\n", "SUMS, line 2: one has another sum further up"),
        ("\n# nothing\n", "SUMS holds no sums"),
        (f"\\{A}  a\\tb\n", r"\\t in an escaped name"),
        (f"{A}\tone\n", "no sum"),
    ],
)
def test_what_is_no_list_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sums(text, "SUMS")


def test_bsd_names_may_hold_parentheses() -> None:
    assert parse_sums(f"SHA256 (a (b) = c) = {A}", "SUMS") == {"a (b) = c": A}


names = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0") | st.sampled_from("\\\n\r "), min_size=1
).filter(lambda name: not name.startswith("./"))


@given(st.dictionaries(names, st.sampled_from([A, B]), min_size=1))
def test_what_is_written_is_read_again(sums: dict[str, str]) -> None:
    assert parse_sums("".join(format_sum(name, digest) + "\n" for name, digest in sums.items()), "SUMS") == sums


@needs_sha256sum
def test_sha256sum_writes_the_same_lines_and_reads_ours(tmp_path: Path) -> None:
    odd = [
        b"plain",
        b"with space ",
        b" lead",
        b"back\\slash",
        b"new\nline",
        "雪".encode(),
        b"\xff\xfe",
        b"*star",
        b"#x",
    ]
    for name in odd:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    theirs = subprocess.run(["sha256sum", "--", *odd], cwd=tmp_path, capture_output=True, check=True).stdout
    ours = b"".join(
        os.fsencode(format_sum(os.fsdecode(name), hashlib.sha256(name).hexdigest())) + b"\n" for name in odd
    )
    assert ours == theirs
    done = subprocess.run(["sha256sum", "--check", "--strict", "-"], cwd=tmp_path, input=ours, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK\n") == len(odd), done
    found = parse_sums(os.fsdecode(theirs), "SUMS")
    assert set(found) == {os.fsdecode(name) for name in odd}
    tagged = subprocess.run(["sha256sum", "--tag", "--", *odd], cwd=tmp_path, capture_output=True, check=True).stdout
    assert parse_sums(os.fsdecode(tagged), "SUMS") == found
