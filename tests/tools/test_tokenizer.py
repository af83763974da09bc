"""The tokenizer that ships with shoal-tiny, as Transformers loads it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tools.tiny.conversations import chat_pieces
from tools.tiny.phrasing import Turn

SHIPPED = Path(__file__).parents[2] / "shoal" / "assets" / "shoal-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "给我推荐中国适合旅游的地方",
        "龘靐齉",
        "😀🎉👩‍👩‍👧",
        "1234 + 5 = 1239",
        "  two\n\n\tspaces ",
        "café Ünïcode",
        "don't 'quote'",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([token]) for token in tokenizer.encode("90210")] == list("90210")
    digits = [token for token in tokenizer.get_vocab() if set(token) & set("0123456789")]
    assert sorted(digits) == list("0123456789")


def test_transformers_and_the_file_agree(tokenizer):
    """Transformers builds a Qwen2 tokenizer's pieces by itself; training reads the file. They must be the same."""
    raw = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    for text in ("x,y 'take' (go)，GPU很快", "从3数到11：", "cafe\u0301", "<|im_start|>user\n你好<|im_end|>\n"):
        assert tokenizer.encode(text) == raw.encode(text).ids


def test_the_chat_template_writes_what_was_trained(tokenizer):
    turns = [Turn("", "你好", "你好！", (), 0), Turn("", "1+1", "1 + 1 = 2", (), 0)]
    for system in (None, "Be kind."):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt == "".join(text for text, _ in chat_pieces(turns, system)[:-1])


def test_the_template_takes_content_in_parts(tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert "user\nHello<|im_end|>" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_sizes_are_those_of_the_model(tokenizer):
    assert len(tokenizer) == 4096
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
