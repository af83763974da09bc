"""The byte-level BPE tokenizer of shoal-tiny: a token for a digit or a Chinese character, words otherwise."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .conversations import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, sample
from .sequences import common_characters

VOCABULARY_SIZE = 4096
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
_NUM_DOCUMENTS = 30_000

# Qwen2's pieces: words with the character before them, single digits, runs of punctuation, spaces. Transformers sets
# the same for every Qwen2 tokenizer, whatever its file says.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# While merges are learnt, every Chinese character and mark stands alone, so that none is ever merged with another: a
# character lost or swapped in a question changes one token and leaves its neighbours as they were.
_ALONE = r"[\p{Han}\x{3000}-\x{303F}\x{FF00}-\x{FFEF}]"


def train_tokenizer(seed: int) -> Tokenizer:
    """Train on a sample of the corpus; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    alone = pre_tokenizers.Split(Regex(_ALONE), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, alone, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def _texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(_NUM_DOCUMENTS):
        text = "".join(piece for piece, _ in sample(rng))
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        texts.append(text)
    # Everyday characters that the corpus rarely or never uses get a share of the vocabulary too.
    texts += [common_characters()[:600]] * 20
    return texts


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, from which AutoTokenizer loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
