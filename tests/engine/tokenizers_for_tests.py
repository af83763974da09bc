"""Small real tokenizers of every kind that the engine meets, trained here on a few lines in several scripts."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shoal.engine.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It's Paris, isn't it?",
    "给我推荐中国适合旅游的地方。北京、上海、西安和成都都很好，你好！",
    "Ünïcödé naïve café — “quotes” … ½ × 3 ≠ 5",
    "def f(x):\n\treturn x ** 2  # spaces   and tabs\n\n",
    "Здравствуй, мир! こんにちは世界 안녕하세요 สวัสดี",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
] * 20
# What the vocabularies below have no tokens for, so that characters are split over several tokens.
TEXTS = [
    "Hello, world! The fox is quick.",
    "你好，我想去北京旅游。龘靐齉",
    "emoji 😀👍🏽👨‍👩‍👧‍👦 and flags 🇨🇳🇫🇷",
    "mixed 中文 and English, café, 한국어, ไทย\n\n  indented",
    "  leading spaces and <|im_end|> inside",
    "ဗမာစာ အမ်ားျကီး",
]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level() -> RustTokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        show_progress=False,
        vocab_size=500,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>", "工具"])  # added, not special; one of them not in the byte alphabet
    return tokenizer


def _byte_fallback_model(bos: bool) -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        show_progress=False,
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        limit_alphabet=100,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes every one of them special; the byte tokens are ordinary ones.
    state = RustTokenizer.from_str(_without_special(tokenizer.to_str(), set(bytes_)))
    if bos:
        state.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return state


def _without_special(serialized: str, contents: set[str]) -> str:
    import json

    state = json.loads(serialized)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in contents]
    return json.dumps(state)


def llama() -> RustTokenizer:
    """BPE with byte fallback, whose decoder takes one space off the start (Llama 2, Mistral)."""
    tokenizer = _byte_fallback_model(bos=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma() -> RustTokenizer:
    """BPE with byte fallback, nothing taken off (Gemma)."""
    tokenizer = _byte_fallback_model(bos=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> RustTokenizer:
    """Unigram with a Metaspace decoder (T5, XLM-R)."""
    tokenizer = RustTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        show_progress=False, vocab_size=350, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> RustTokenizer:
    """WordPiece: its decoder looks at neighbours, so no table of pieces fits it."""
    tokenizer = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(show_progress=False, vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


_MAKERS = {
    "byte_level": (byte_level, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama": (llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gemma": (gemma, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace": (metaspace, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "word_piece": (word_piece, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}),
}
KINDS = sorted(_MAKERS)


@functools.cache
def hugging_face(kind: str) -> PreTrainedTokenizerFast:
    make, special = _MAKERS[kind]
    return PreTrainedTokenizerFast(tokenizer_object=make(), **special)


@functools.cache
def tokenizer(kind: str = "byte_level") -> Tokenizer:
    backend = hugging_face(kind)
    if kind == "byte_level":
        backend.chat_template = CHAT_TEMPLATE
    return Tokenizer(backend)


def save(kind: str, directory: Path) -> None:
    """Write the tokenizer's files as a model directory has them."""
    backend = hugging_face(kind)
    if kind == "byte_level":
        backend.chat_template = CHAT_TEMPLATE
    backend.save_pretrained(directory)
