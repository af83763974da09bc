"""Tokenizer: a strict face of Hugging Face's, from files; chats; and errors that say what would work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.engine.tokenizer import Tokenizer, load_tokenizer
from shoal.errors import ConfigError, InvalidRequestError, ModelError
from tests.engine.tokenizers_for_tests import CHAT_TEMPLATE, KINDS, TEXTS, hugging_face, save, tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save("byte_level", path)
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Tokenizer:
    return load_tokenizer(str(directory))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_are_hugging_faces(kind: str, text: str, special: bool) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=special)
    assert ids == hugging_face(kind)(text, add_special_tokens=special)["input_ids"]
    for skip in (True, False):
        expected = hugging_face(kind).decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer(kind).decode(ids, skip_special_tokens=skip) == expected


def test_a_loaded_tokenizer_knows_its_tokens(loaded: Tokenizer) -> None:
    backend = hugging_face("byte_level")
    assert loaded.vocab_size == len(backend)
    assert loaded.eos_token_id == backend.convert_tokens_to_ids("<|im_end|>")
    assert loaded.special_token_id("<|im_end|>") == loaded.eos_token_id
    assert loaded.special_token_id("fox") is None
    assert loaded.special_token_id("<tool call>") is None, "added, but shown as text"
    assert loaded.special_token_id("no such token") is None


def test_the_bytes_of_tokens_join_to_the_text(loaded: Tokenizer) -> None:
    ids = loaded.encode(TEXTS[2])
    assert b"".join(loaded.token_bytes(id_) for id_ in ids) == TEXTS[2].encode()
    assert "\ufffd" in "".join(loaded.token_text(id_) for id_ in ids)
    llama = tokenizer("llama")
    assert llama.token_text(llama.encode(" fox")[-1]).strip() != ""


def test_text_that_is_not_unicode_is_refused(loaded: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="valid Unicode"):
        loaded.encode("half of a pair: \ud83d")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_directory_without_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer files in .*tokenizer\.json.*--skip-tokenizer-init"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    save("byte_level", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_code_in_the_directory_runs_only_when_allowed(tmp_path: Path) -> None:
    save("byte_level", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "own_code.py").write_text("raise SystemExit('ran')")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_tokenizer(str(tmp_path))


# A tokenizer of the kind that the first Qwen brings: Python code in the model directory, ids that are bytes.
OWN_CODE = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_size = 257

    def get_vocab(self):
        return {chr(0x4E00 + id_): id_ for id_ in range(256)} | {"<|endoftext|>": 256}

    def _tokenize(self, text, **kwargs):
        return [chr(0x4E00 + byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return 256 if token == "<|endoftext|>" else ord(token) - 0x4E00

    def _convert_id_to_token(self, index):
        return "<|endoftext|>" if index == 256 else chr(0x4E00 + index)

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        ids = [id_ for id_ in token_ids if id_ < 256 or not skip_special_tokens]
        return b"".join(bytes([id_]) if id_ < 256 else b"<|endoftext|>" for id_ in ids).decode("utf-8", "replace")
"""


def test_a_tokenizer_written_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = tmp_path / "own_model"
    model.mkdir()
    (model / "own_code.py").write_text(OWN_CODE)
    settings = {"auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]}, "eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(model), trust_remote_code=True)
    ids = loaded.encode("你好 😀!")
    assert bytes(ids) == "你好 😀!".encode()
    assert loaded.eos_token_id == 256 == loaded.special_token_id("<|endoftext|>")
    detokenizer = loaded.detokenizer(loaded.encode("prompt"))
    deltas = [detokenizer.push([id_]) for id_ in [*ids, 256]]
    assert [delta for delta in deltas if delta] == ["你", "好", " ", "😀", "!"]
    assert detokenizer.flush() == ""


# --- chats -----------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "你好"}]


def test_the_models_template_renders_a_chat(loaded: Tokenizer) -> None:
    assert loaded.has_chat_template
    assert loaded.apply_chat_template(HELLO) == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_continuing_the_final_message_leaves_it_open(loaded: Tokenizer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Sure, the"}]
    text = loaded.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant\nSure, the")
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        loaded.apply_chat_template(messages, continue_final_message=True)


def test_content_parts_become_text(loaded: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in loaded.apply_chat_template([{"role": "user", "content": parts}])


def test_templates_and_variables_of_the_call(loaded: Tokenizer) -> None:
    template = "{{ mood }}:{{ messages[0].content }}"
    text = loaded.apply_chat_template(HELLO, chat_template=template, chat_template_kwargs={"mood": "calm"})
    assert text == "calm:你好"
    with pytest.raises(InvalidRequestError, match="cannot hold tokenize"):
        loaded.apply_chat_template(HELLO, chat_template_kwargs={"tokenize": True})


def test_a_template_given_at_loading_replaces_the_models(directory: Path) -> None:
    assert (
        load_tokenizer(str(directory), chat_template="X{{ messages[0].content }}").apply_chat_template(HELLO) == "X你好"
    )


def test_no_template_says_how_to_pass_one(loaded: Tokenizer) -> None:
    plain = tokenizer("llama")
    assert not plain.has_chat_template
    with pytest.raises(InvalidRequestError, match="--chat-template FILE"):
        plain.apply_chat_template(HELLO)
    assert plain.apply_chat_template(HELLO, chat_template=CHAT_TEMPLATE).startswith("<|im_start|>user")


def test_arguments_of_tool_calls_reach_the_template_as_objects(loaded: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "成都"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = "{{ messages[1].tool_calls[0].function.arguments.city }}|{{ tools[0].function.name }}"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert loaded.apply_chat_template(messages, chat_template=template, tools=tools) == "成都|weather"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hi", "list of objects"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], "no role"),
        ([{"role": "user", "content": 5}], "string or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image_url.*text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text must be a string"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "function object"),
    ],
)
def test_messages_that_cannot_be_read(loaded: Tokenizer, messages: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        loaded.apply_chat_template(messages)  # type: ignore[arg-type]


def test_a_template_that_refuses_or_breaks(loaded: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        loaded.apply_chat_template(HELLO, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="chat template failed"):
        loaded.apply_chat_template(HELLO, chat_template="{% for %}")


def test_a_template_that_is_not_jinja_is_found_before_the_first_chat(tmp_path: Path) -> None:
    save("byte_level", tmp_path)
    load_tokenizer(str(tmp_path)).check_chat_template()
    with pytest.raises(ConfigError, match="chat template is not valid, line 2"):
        load_tokenizer(str(tmp_path), chat_template="{{ messages }}\n{% oops").check_chat_template()
    refusing = "{{ raise_exception('no') }}"
    load_tokenizer(str(tmp_path), chat_template=refusing).check_chat_template()
