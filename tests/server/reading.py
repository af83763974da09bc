"""What a client has of an answer in the end, to compare two of them."""

from __future__ import annotations

import json
from typing import Any


def whole(data: bytes) -> dict[str, Any]:
    body = json.loads(data)
    body.pop("created")
    return dict(body)


def joined(data: bytes, *, cached: bool = True) -> dict[str, Any]:
    """All that a stream says, whatever the pieces. cached: with the counts of tokens from the prefix cache."""
    *events, done, rest = data.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    result: dict[str, Any] = {"heads": set(), "usages": [], "choices": {}}
    last_usage: dict[str, Any] | None = None
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert "error" not in chunk
        result["heads"].add((chunk["id"], chunk["object"], chunk["model"]))
        if (usage := chunk.get("usage")) is not None:
            counted = usage["completion_tokens"]
            assert last_usage is None or counted >= last_usage["completion_tokens"], "counts never go back"
            last_usage = usage
            if not cached:
                del usage["prompt_tokens_details"]
        if not chunk["choices"]:
            result["usages"].append(chunk["usage"])
        for choice in chunk["choices"]:
            kept = result["choices"].setdefault(
                choice["index"],
                {"text": "", "roles": [], "token_ids": [], "prompts": [], "logprobs": {}, "ends": [], "num_lists": 0},
            )
            assert not kept["ends"], "nothing comes after the end"
            if "delta" in choice:
                kept["text"] += choice["delta"].get("content", "")
                if "role" in choice["delta"]:
                    assert kept["text"] == "" and not kept["token_ids"]
                    kept["roles"].append(choice["delta"]["role"])
            kept["text"] += choice.get("text", "")
            kept["token_ids"] += choice.get("token_ids") or []
            for holder in (chunk, choice):
                if "prompt_token_ids" in holder:
                    kept["prompts"].append(holder["prompt_token_ids"])
            for name, values in (choice["logprobs"] or {}).items():
                kept["logprobs"].setdefault(name, []).extend(values or [])
            if choice["finish_reason"] is not None:
                kept["ends"].append((choice["finish_reason"], choice.get("stop_reason")))
    return result
