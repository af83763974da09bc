"""The detokenizer against the tokenizers' own decode of everything: random ids, real texts, any split into steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.detokenizer import ByteFallbackDetokenizer, ByteLevelDetokenizer, WindowDetokenizer
from tests.engine.tokenizers_for_tests import KINDS, TEXTS, hugging_face, tokenizer


def expected_text(kind: str, prompt: list[int], output: list[int], skip: bool) -> str:
    """What Hugging Face's decode of prompt and output shows beyond its decode of the prompt."""
    decode = hugging_face(kind).backend_tokenizer.decode
    before = decode(prompt, skip_special_tokens=skip)
    whole = decode(prompt + output, skip_special_tokens=skip)
    assert whole.startswith(before), "the prompt must end with a whole character for this comparison"
    return whole[len(before) :]


def streamed(kind: str, prompt: list[int], chunks: list[list[int]], skip: bool) -> list[str]:
    detokenizer = tokenizer(kind).detokenizer(prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, position = [], 0
    for size in sizes:
        chunks.append(ids[position : position + size])
        position += size
    return [*chunks, ids[position:]]


def test_each_kind_gets_the_detokenizer_that_fits() -> None:
    kinds = {kind: type(tokenizer(kind).detokenizer([])) for kind in KINDS}
    assert kinds == {
        "byte_level": ByteLevelDetokenizer,
        "llama": ByteFallbackDetokenizer,
        "gemma": ByteFallbackDetokenizer,
        "metaspace": ByteFallbackDetokenizer,
        "word_piece": WindowDetokenizer,
    }


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids_in_random_steps_equal_the_full_decode(kind: str, skip: bool, data: st.DataObject) -> None:
    size = tokenizer(kind).vocab_size
    # A few ids that the vocabulary lacks: models pad their embeddings.
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=12))
    assert "".join(streamed(kind, [], split(ids, sizes), skip)) == expected_text(kind, [], ids, skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma", "byte_level"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_runs_of_bytes_equal_the_full_decode(kind: str, skip: bool, data: st.DataObject) -> None:
    """Mostly byte tokens, whole characters and noise, with skipped tokens among them."""
    backend = hugging_face(kind)
    if kind == "byte_level":
        from shoal.engine.pieces import _BYTE_OF_CHARACTER

        of_byte = {byte: backend.convert_tokens_to_ids(char) for char, byte in _BYTE_OF_CHARACTER.items()}
        rare = backend.convert_tokens_to_ids("<|im_end|>")
    else:
        of_byte = {byte: backend.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
        rare = backend.convert_tokens_to_ids("</s>")
    piece = st.one_of(
        st.sampled_from("é你😀ก").map(lambda char: [of_byte[byte] for byte in char.encode()]),
        st.integers(0, 255).map(lambda byte: [of_byte[byte]]),
        st.sampled_from([[rare], [260], [270]]),
    )
    # Under the 32 bytes from which on a run is shown character by character.
    ids = [id_ for part in data.draw(st.lists(piece, max_size=8)) for id_ in part][:31]
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=12))
    assert "".join(streamed(kind, [], split(ids, sizes), skip)) == expected_text(kind, [], ids, skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_text_after_a_prompt_equals_the_full_decode(kind: str, skip: bool, data: st.DataObject) -> None:
    """The prompt is context: the first token keeps its leading space."""
    encode = tokenizer(kind).encode
    prompt = encode(data.draw(st.sampled_from(TEXTS[:1] + TEXTS[3:5])))
    ids = encode(data.draw(st.sampled_from(TEXTS) | st.text(max_size=12)), add_special_tokens=False)
    if kind == "word_piece" and not ids:
        return
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=8))
    assert "".join(streamed(kind, prompt, split(ids, sizes), skip)) == expected_text(kind, prompt, ids, skip)


def test_a_prompt_of_skipped_tokens_only_is_no_context() -> None:
    llama = tokenizer("llama")
    begin = hugging_face("llama").convert_tokens_to_ids("<s>")
    ids = llama.encode("The fox", add_special_tokens=False)
    assert "".join(streamed("llama", [begin], [ids], True)) == "The fox"
    assert "".join(streamed("llama", [begin], [ids], False)) == " The fox"


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("text", TEXTS)
def test_valid_text_never_shows_a_replacement_character_on_the_way(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=False)
    deltas = streamed(kind, [], [[id_] for id_ in ids], False)
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == expected_text(kind, [], ids, False)


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_at_once_where_nothing_can_change_it(kind: str) -> None:
    ids = tokenizer(kind).encode("The quick brown fox", add_special_tokens=False)
    *deltas, rest = streamed(kind, [], [[id_] for id_ in ids], False)
    assert rest == ""
    tokens = hugging_face(kind).convert_ids_to_tokens(ids)
    settled = [delta for delta, token in zip(deltas, tokens, strict=True) if token != "▁" and token[:3] != "<0x"]
    assert len(settled) > 3
    assert all(settled)


def test_the_character_that_a_byte_level_prompt_begins_is_shown_when_it_is_complete() -> None:
    ids = tokenizer().encode("龘")  # three byte tokens
    assert len(ids) == 3
    assert streamed("byte_level", ids[:2], [ids[2:]], True) == ["龘", ""]
    plain = tokenizer().encode("fox")
    assert "".join(streamed("byte_level", ids[:2], [plain], True)) == "fox", "broken off in the prompt: not ours"


def test_an_unfinished_character_is_flushed_as_the_full_decode_shows_it() -> None:
    for kind in ("byte_level", "llama"):
        ids = tokenizer(kind).encode("fox 😀", add_special_tokens=False)[:-1]
        deltas = streamed(kind, [], [[id_] for id_ in ids], True)
        assert "\ufffd" not in "".join(deltas[:-1])
        assert "\ufffd" in deltas[-1]
        assert "".join(deltas) == expected_text(kind, [], ids, True)


def test_a_long_run_of_byte_tokens_is_not_held_back_for_ever() -> None:
    """A script without tokens of its own streams on, and a cut in it spoils one character, not the whole run."""
    text = "😀" * 40
    ids = [id_ for id_ in tokenizer("llama").encode(text, add_special_tokens=False)]
    ids = ids[len(ids) - 160 :]
    deltas = streamed("llama", [], [[id_] for id_ in ids[:-1]], True)
    held = [len("".join(deltas[: index + 1]).encode()) for index in range(len(deltas) - 1)]
    assert all(index + 1 - shown <= 32 for index, shown in enumerate(held))
    assert "".join(deltas) == "😀" * 39 + "\ufffd"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_a_round_trip(text: str) -> None:
    ids = tokenizer().encode(text)
    assert "".join(streamed("byte_level", [], [[id_] for id_ in ids], False)) == text


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=40), prompt=st.sampled_from([b"", b"The prompt, ", "你好".encode()]))
def test_a_window_over_bytes_equals_the_full_decode_and_holds_back_three_bytes_at_most(
    data: bytes, prompt: bytes
) -> None:
    """As tokenizers written in Python decode (the first Qwen's): each id a byte here."""
    detokenizer = WindowDetokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"), list(prompt))
    shown = ""
    for index, byte in enumerate(data):
        shown += detokenizer.push([byte])
        assert len(data[: index + 1].decode("utf-8", "replace")) - len(shown) <= 3
    assert shown + detokenizer.flush() == data.decode("utf-8", "replace")
