"""Text to token ids and back, and chat templates: a thin, strict face of Hugging Face's tokenizers.

Loaded by whoever talks to people: the API server and LLM. transformers is imported here only, when a tokenizer is
loaded: it takes seconds and brings torch along.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from shoal.engine.chat import normalize_messages
from shoal.engine.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
)
from shoal.engine.pieces import DecoderRules, PieceTable
from shoal.errors import ConfigError, InvalidRequestError, ModelError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
)
# What the first Qwen was trained on, as its own code renders it.
CHATML = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_NO_TEMPLATE = (
    "the model has no chat template; pass one (--chat-template FILE for the server, chat_template=... for LLM.chat), "
    "or send a plain prompt to completions"
)


def load_tokenizer(path: str, *, trust_remote_code: bool = False, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model directory. `chat_template` (Jinja text) replaces the model's own.

    Raises ModelError when the directory holds no tokenizer, or one that cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"no tokenizer at {path}: it is not a directory; give --tokenizer a directory that exists")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES) and not any(directory.glob("*.tiktoken")):
        raise ModelError(
            f"no tokenizer files in {path} (looked for {', '.join(_TOKENIZER_FILES)}); "
            "copy them next to the weights, point --tokenizer at their directory, "
            "or use --skip-tokenizer-init with token ids"
        )
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        hint = "" if trust_remote_code else _remote_code_hint(directory)
        raise ModelError(f"cannot read the tokenizer in {path}: {type(error).__name__}: {error}{hint}") from error
    if _talks_chatml(directory) and not backend.chat_template:
        return Tokenizer(backend, chat_template=chat_template or CHATML, end_of_turn="<|im_end|>")
    return Tokenizer(backend, chat_template=chat_template)


def _talks_chatml(directory: Path) -> bool:
    """The first Qwen says so in this file; its template is in code."""
    try:
        settings = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("chat_format") == "chatml"


def _remote_code_hint(directory: Path) -> str:
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if "auto_map" not in settings:
        return ""
    return "; it brings Python code of its own: read that code, then allow it with --trust-remote-code"


class Tokenizer:
    """Encodes, decodes and renders chats."""

    def __init__(self, backend: Any, *, chat_template: str | None = None, end_of_turn: str | None = None) -> None:
        """end_of_turn: a special token that ends an answer beside the end of text."""
        self.backend = backend
        # Our own length check names the limit of the engine; the tokenizer's warning would name another.
        backend.model_max_length = int(1e30)
        self._chat_template = chat_template
        self._fast = bool(getattr(backend, "is_fast", False))
        self.vocab_size = len(backend)
        self.bos_token_id: int | None = backend.bos_token_id
        self.eos_token_id: int | None = backend.eos_token_id
        self.pad_token_id: int | None = backend.pad_token_id
        self.special_token_ids: frozenset[int] = self._find_special_ids()
        turn_end = None if end_of_turn is None else self.special_token_id(end_of_turn)
        self.end_token_ids = frozenset(id_ for id_ in (self.eos_token_id, turn_end) if id_ is not None)
        self._tables = self._build_tables()
        self._direct = self._prepare_direct_encoding()

    def _prepare_direct_encoding(self) -> Any | None:
        """The Rust tokenizer, where transformers adds nothing to its encoding: a third of the time, and no settings
        that each call writes, so threads do not meet. None where a class has ideas of its own."""
        if not self._fast or type(self.backend)._encode_plus.__qualname__ != "TokenizersBackend._encode_plus":
            return None
        rust = self.backend.backend_tokenizer
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = bool(self.backend.split_special_tokens)
        return rust

    def _find_special_ids(self) -> frozenset[int]:
        added = {id_ for id_, token in self.backend.added_tokens_decoder.items() if token.special}
        # Code of a model's own may keep them to itself.
        own = getattr(self.backend, "special_tokens", None)
        if isinstance(own, dict):
            added |= {id_ for id_ in own.values() if isinstance(id_, int)}
        return frozenset(added | {id_ for id_ in self.backend.all_special_ids if id_ is not None})

    def _build_tables(self) -> dict[bool, PieceTable] | None:
        """The tables by skip_special_tokens, or None where the decoder needs more than one token at a time."""
        if not self._fast:
            return None
        decoder = self.backend.backend_tokenizer.decoder
        rules = DecoderRules.from_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        if rules is None:
            return None
        token_of = self.backend.backend_tokenizer.id_to_token
        return {
            False: PieceTable(rules, token_of, frozenset()),
            True: PieceTable(rules, token_of, self.special_token_ids),
        }

    # --- text to ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the tokenizer's own beginning (and end) tokens unless told otherwise."""
        try:
            if self._direct is not None:
                # As a batch of one: computes no offsets, and lets other threads run meanwhile.
                [encoding] = self._direct.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return list(encoding.ids)
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens))
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the text cannot be tokenized: {error}; send valid Unicode") from error

    def encode_cut(self, text: str, pair: str | None, max_tokens: int | None) -> tuple[list[int], int]:
        """Token ids of one text, or of two with what the tokenizer puts between them, cut at their ends (of two, the
        longer first) to `max_tokens` with the tokenizer's own tokens still around them; and how many of the ids belong
        to the first segment, where the tokenizer tells segments apart. Raises InvalidRequestError."""
        try:
            rust = self._direct
            if rust is None:
                return self._encode_cut_slowly(text, pair, max_tokens)
            parts = [rust.encode(part, add_special_tokens=False) for part in (text, pair) if part is not None]
            lengths = [len(part.ids) for part in parts]
            if max_tokens is not None:
                lengths = cut_lengths(lengths, max_tokens - rust.num_special_tokens_to_add(pair is not None))
            for part, length in zip(parts, lengths, strict=True):
                part.truncate(length)
            encoding = rust.post_process(*parts, add_special_tokens=True)
            segments = encoding.type_ids
            return list(encoding.ids), segments.index(1) if 1 in segments else len(segments)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the text cannot be tokenized: {error}; send valid Unicode") from error

    def _encode_cut_slowly(self, text: str, pair: str | None, max_tokens: int | None) -> tuple[list[int], int]:
        encoded = self.backend(
            text, pair, truncation=max_tokens is not None, max_length=max_tokens, return_token_type_ids=True
        )
        ids, segments = list(encoded["input_ids"]), list(encoded.get("token_type_ids") or [])
        return ids, segments.index(1) if 1 in segments else len(ids)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is spelt exactly so."""
        token_id = self.backend.convert_tokens_to_ids(text)
        return token_id if token_id in self.special_token_ids else None

    # --- ids to text -----------------------------------------------------------------------------------------------

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of all ids together, without cosmetic changes to spaces."""
        options = {} if self._fast else {"spaces_between_special_tokens": spaces_between_special_tokens}
        text: str = self.backend.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False, **options
        )
        return text

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """A new incremental decode that goes on after the prompt."""
        if self._tables is None:
            return WindowDetokenizer(
                lambda ids: self.decode(
                    ids,
                    skip_special_tokens=skip_special_tokens,
                    spaces_between_special_tokens=spaces_between_special_tokens,
                ),
                prompt_token_ids,
            )
        table = self._tables[skip_special_tokens]
        if table.rules.byte_level:
            return ByteLevelDetokenizer(table, prompt_token_ids)
        return ByteFallbackDetokenizer(table, prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a running text, as bytes: a part of a character where it is one."""
        if self._tables is None:
            return self.decode([token_id], skip_special_tokens=False).encode("utf-8", "replace")
        piece = self._tables[False][token_id]
        return piece.encode("utf-8", "replace") if isinstance(piece, str) else piece

    def token_text(self, token_id: int) -> str:
        """What one token adds to a running text; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    # --- chats -----------------------------------------------------------------------------------------------------

    @property
    def has_own_template(self) -> bool:
        """Whether the operator gave a template (--chat-template)."""
        return bool(self._chat_template)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template or self.backend.chat_template)

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation: OpenAI messages in, the template's rendering out.

        chat_template: Jinja text that replaces the model's for this call. Raises InvalidRequestError when there is no
        template, or when it refuses the messages.
        """
        template = chat_template or self._chat_template
        if template is None and not self.backend.chat_template:
            raise InvalidRequestError(_NO_TEMPLATE, "messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other; set one of them to false",
                "continue_final_message",
            )
        conversation = normalize_messages(messages)
        try:
            rendered: str = self.backend.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **_template_arguments(chat_template_kwargs),
            )
        except Exception as error:  # a template is a program: it fails with errors of any kind
            raise InvalidRequestError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}", "messages"
            ) from error
        return rendered

    def check_chat_template(self) -> None:
        """Raise ConfigError for a template, the model's or --chat-template's, that is not Jinja at all.

        One that only refuses a conversation of a single "user" message is none of our business.
        """
        if not self.has_chat_template:
            return
        try:
            self.apply_chat_template([{"role": "user", "content": "hi"}])
        except InvalidRequestError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                fault = error.__cause__
                raise ConfigError(f"the chat template is not valid, line {fault.lineno}: {fault.message}") from error


def cut_lengths(lengths: list[int], most: int) -> list[int]:
    """One or two lengths, the longer one made shorter first, until they are `most` together."""
    most = max(most, 0)
    if len(lengths) == 1:
        return [min(lengths[0], most)]
    first, second = lengths
    shorter = min(first, second, most // 2)
    if first <= second:
        first = min(first, max(shorter, most - second))
        return [first, min(second, most - first)]
    second = min(second, max(shorter, most - first))
    return [min(first, most - second), second]


_RESERVED_ARGUMENTS = frozenset({
    "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "return_tensors", "return_dict", "padding", "truncation", "max_length", "tokenizer_kwargs",
})  # fmt: skip


def _template_arguments(arguments: dict[str, Any] | None) -> dict[str, Any]:
    reserved = _RESERVED_ARGUMENTS & set(arguments or {})
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot hold {', '.join(sorted(reserved))}: it sets variables of the template",
            "chat_template_kwargs",
        )
    return arguments or {}
