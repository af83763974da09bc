from __future__ import annotations

import json

import pytest

from shoal.benchmark.datasets import RandomPrompts, ServeRequest, read_requests, take
from shoal.errors import ConfigError


def test_random_ids_have_the_lengths_and_the_vocabulary():
    drawn = RandomPrompts((3, 9), (2, 4), vocab_size=10).draw(200, seed=1)
    assert {len(one.prompt) for one in drawn} == set(range(3, 10))
    assert {one.num_output for one in drawn} == {2, 3, 4}
    assert {token for one in drawn for token in one.prompt} == set(range(2, 10))
    assert drawn == RandomPrompts((3, 9), (2, 4), vocab_size=10).draw(200, seed=1)
    assert drawn != RandomPrompts((3, 9), (2, 4), vocab_size=10).draw(200, seed=2)


def test_random_text_has_as_many_words():
    drawn = RandomPrompts((5, 5), (1, 1), as_text=True).draw(3, seed=0)
    assert [len(one.prompt.split()) for one in drawn] == [5, 5, 5]


@pytest.mark.parametrize("as_text", [False, True])
def test_prefixes_are_shared_in_turn(as_text):
    drawn = RandomPrompts((4, 4), (1, 1), as_text=as_text, num_prefixes=3, prefix_tokens=20).draw(9, seed=0)
    tokens = [one.prompt.split() if as_text else one.prompt for one in drawn]
    assert {len(one) for one in tokens} == {24}
    beginnings = [tuple(one[:20]) for one in tokens]
    assert len(set(beginnings)) == 3 and beginnings[:3] * 3 == beginnings
    assert len({tuple(one) for one in tokens}) == 9


def test_a_file_of_all_kinds(tmp_path):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    lines = [
        "plain text",
        {"prompt": "a", "max_tokens": 5},
        {"prompt": [3, 4]},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_requests(str(path), 7) == [
        ServeRequest(prompt="plain text", num_output=7),
        ServeRequest(prompt="a", num_output=5),
        ServeRequest(prompt=[3, 4], num_output=7),
        ServeRequest(messages=[user], num_output=7),
        ServeRequest(messages=[user], num_output=7),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{oops', ":2 is not JSON"),
        ("[1]", "must be a JSON object or a string"),
        ('{"text": "a"}', "it has text"),
        ('{"prompt": ""}', "it has prompt"),
        ('{"messages": [{"content": "a"}]}', "it has messages"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be an integer"),
    ],
)
def test_a_wrong_file_says_where(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_requests(str(path), None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(str(tmp_path / "other"), None)


def test_a_short_file_is_read_again():
    assert take([ServeRequest("a"), ServeRequest("b")], 3) == [ServeRequest("a"), ServeRequest("b"), ServeRequest("a")]
    assert take([ServeRequest("a")], None) == [ServeRequest("a")]
