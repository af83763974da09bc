"""A prompt's blocks: alike in every process, and a conversation's begin with those of its earlier turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.policies import BLOCK_BYTES, prefix_blocks, read_prompt
from shoal.router.policies.prompt import MAX_BLOCKS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return {
        "model": "m",
        "messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)],
        **fields,
    }


TEXTS = st.lists(st.text(max_size=900), min_size=1, max_size=6)


@given(TEXTS, st.text(max_size=900))
def test_a_conversation_begins_with_its_earlier_turns(texts: list[str], more: str) -> None:
    earlier, later = read_prompt(CHAT, chat(*texts)), read_prompt(CHAT, chat(*texts, more))
    assert later.blocks[: len(earlier.blocks)] == earlier.blocks
    assert len(earlier.blocks) == min(earlier.num_bytes // BLOCK_BYTES, MAX_BLOCKS)
    assert later.num_bytes > earlier.num_bytes


@given(st.text(min_size=BLOCK_BYTES, max_size=5 * BLOCK_BYTES), st.data())
def test_a_change_changes_its_block_and_all_after_it(text: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text) - 1))
    other = text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :]
    one, two = (prefix_blocks(COMPLETIONS, {"prompt": prompt}) for prompt in (text, other))
    same = len(text[:place].encode()) // BLOCK_BYTES
    assert one[:same] == two[:same]
    assert not set(one[same:]) & set(two[same:])


def test_the_hashes_are_the_same_in_every_process() -> None:
    body = chat("You are helpful. " * 20, "What is a shoal?", tools=[{"name": "f", "b": 1, "a": [1.5, None, True]}])
    program = (
        "import json, sys; from shoal.router.policies import prefix_blocks; "
        "print(json.dumps(prefix_blocks('/v1/chat/completions', json.load(sys.stdin))))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(body), capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert json.loads(done.stdout) == prefix_blocks(CHAT, body)
    # A change here makes routers of two versions side by side disagree: let it be on purpose.
    assert prefix_blocks(COMPLETIONS, {"model": "m", "prompt": "a" * 600}) == [150580467401400740, 16222810659239748062]


def test_what_renders_alike_has_the_same_blocks() -> None:
    text = "The same text. " * 60
    plain = prefix_blocks(CHAT, chat(text, "hello"))
    assert prefix_blocks(CHAT, chat([{"type": "text", "text": text}], "hello")) == plain
    assert prefix_blocks(CHAT, chat(text, "hello", temperature=0.5, stream=True, max_tokens=3)) == plain
    assert prefix_blocks(CHAT + "/", chat(text, "hello")) == plain
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    turned = [{"function": {"parameters": {}, "name": "f"}, "type": "function"}]
    assert prefix_blocks(CHAT, chat(text, tools=tools)) == prefix_blocks(CHAT, chat(text, tools=turned))


def test_what_renders_otherwise_has_others() -> None:
    text = "The same text. " * 60
    plain = prefix_blocks(CHAT, chat(text))
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    for other in (
        chat(text, tools=[{"name": "f"}]),
        {"model": "m", "messages": [{"role": "user", "content": text}]},
        {
            "model": "m",
            "messages": [{"role": "assistant", "content": None, "tool_calls": calls}, *chat(text)["messages"]],
        },
        chat([{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": text}]),
        {**chat(text), "model": "another"},
        chat(text, cache_salt="mine"),
    ):
        assert not set(prefix_blocks(CHAT, other)) & set(plain)


def test_completions() -> None:
    text = "abcdefgh" * 100
    one = read_prompt(COMPLETIONS, {"prompt": text})
    assert (len(one.blocks), one.num_bytes, one.num_token_ids) == (3, 800, None)
    several = read_prompt(COMPLETIONS, {"prompt": [text, "another"]})
    assert several.blocks == one.blocks and several.num_bytes == 800 + 1 + 7
    ids = read_prompt(COMPLETIONS, {"prompt": list(range(200))})
    assert (len(ids.blocks), ids.num_bytes, ids.num_token_ids) == (3, 800, 200)
    lists = read_prompt(COMPLETIONS, {"prompt": [list(range(200)), [1, 2]]})
    assert lists.blocks == ids.blocks and lists.num_token_ids == 202
    assert not set(ids.blocks) & set(one.blocks)


def test_an_image_counts_by_its_digest() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    shape = read_prompt(CHAT, chat([image, {"type": "text", "text": "What is this?"}]))
    assert shape.num_bytes < 100


def test_long_prompts_are_hashed_up_to_a_bound() -> None:
    shape = read_prompt(COMPLETIONS, {"prompt": "x" * 1_000_000})
    assert len(shape.blocks) == MAX_BLOCKS and shape.num_bytes == 1_000_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON, "tool_calls": JSON, "name": JSON})


@given(st.fixed_dictionaries({}, optional={
    "model": JSON, "messages": JSON | st.lists(MESSAGE | JSON, max_size=4), "prompt": JSON, "tools": JSON,
    "cache_salt": JSON,
}))  # fmt: skip
def test_no_body_is_too_odd(body: dict[str, Any]) -> None:
    """The server answers for what is wrong in a body; here it has blocks or none, the same ones each time."""
    for path in (CHAT, COMPLETIONS, "/tokenize", ""):
        assert read_prompt(path, body) == read_prompt(path, body)


def test_nesting_that_is_too_deep_to_encode() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert read_prompt(CHAT, {"messages": [{"role": "user", "content": [deep]}]}).blocks == []
    while deep:  # taken apart by hand: the interpreter's own way down is deep as well
        deep = deep[0]


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], None, "lone \ud800 half", [2**40], [-1], [True]])
def test_prompts_at_the_edges(prompt: Any) -> None:
    assert prefix_blocks(COMPLETIONS, {"prompt": prompt}) == []
