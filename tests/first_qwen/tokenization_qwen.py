"""A tokenizer class with the interface of the one that the first Qwen brings: byte pairs ranked by tiktoken.

It stands in a model's directory and runs only where that directory's code is trusted.
"""

import base64

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

_WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


class QWenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}

    def __init__(self, vocab_file, errors="replace", **kwargs):
        with open(vocab_file, "rb") as file:
            pairs = (line.split() for line in file if line.strip())
            self.mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        first = len(self.mergeable_ranks)
        self.errors = errors
        self.special_tokens = {token: first + index for index, token in enumerate(_SPECIAL)}
        self.tokenizer = tiktoken.Encoding(
            "Qwen", pat_str=_WORDS, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )
        self.decoder = {rank: token for token, rank in self.mergeable_ranks.items()}
        self.decoder |= {rank: token for token, rank in self.special_tokens.items()}
        self.eod_id = self.special_tokens["<|endoftext|>"]
        super().__init__(**kwargs)

    def __len__(self):
        return self.tokenizer.n_vocab

    @property
    def vocab_size(self):
        return self.tokenizer.n_vocab

    def get_vocab(self):
        return dict(self.mergeable_ranks)

    def _add_tokens(self, new_tokens, special_tokens=False):
        for token in new_tokens:
            text = token.content if isinstance(token, AddedToken) else token
            if not special_tokens or text not in self.special_tokens:
                raise ValueError(f"{text!r} cannot be added")
        return 0

    def tokenize(self, text, allowed_special="all", disallowed_special=(), **kwargs):
        ids = self.tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return [self.decoder[token_id] for token_id in ids]

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, (str, bytes)):
            return self.special_tokens.get(tokens, self.mergeable_ranks.get(tokens))
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens):
        pieces = (token.encode() if isinstance(token, str) else token for token in tokens)
        return b"".join(pieces).decode("utf-8", self.errors)

    def _convert_id_to_token(self, index):
        return self.decoder[index]

    def _decode(self, token_ids, skip_special_tokens=False, errors=None, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id < self.eod_id]
        return self.tokenizer.decode(ids, errors=errors or self.errors)
