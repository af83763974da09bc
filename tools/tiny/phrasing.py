"""Turns an intent into one of its many sentences: templates, politeness, punctuation, casing and typing slips."""

import functools
import random
import re
from dataclasses import dataclass, field

from .splits import HELD_OUT

CHINESE, ENGLISH = 0, 1

_PLACEHOLDER = re.compile(r"(\{\w+\})")
_NOT_WORD = re.compile(r"[\W_]+")

_PREFIXES = (
    "请|请问|请问，|你好，|您好，|你好！|麻烦|麻烦你|帮我|请帮我|能不能|可以|我想知道"
    "|我想问一下，|问一下，|想问下|那|嗯，|请你|那么，"
    "|嗨，|打扰一下，|hi，|现在".split("|"),
    "Please |please |Can you |Could you |Could you please |Hi, |Hello! |Hey, |I'd like to know: "
    "|Quick question: |So, "
    "|OK, |Um, |Hello, |I have a question. |Sorry, |Well, |Hi there! |Now |Excuse me, ".split("|"),
)
_SUFFIXES = (
    "，谢谢|谢谢|，谢谢你|吧|呢|呀|啊|，可以吗|，好吗|~|！|，麻烦了|。谢谢！|，拜托|吗|哦".split("|"),
    (" please|, please| thanks|. Thank you!| for me|, thanks| now|, ok| please!|, thank you| again|, will you").split(
        "|"
    ),
)
_FILLERS = (
    "到底|究竟|大概|一般|都|真的|其实|主要|还|又|这边|那儿|一般来说|今天|现在|嘛|平时".split("|"),
    "really|actually|just|then|exactly|maybe|well|also|please|now|so|simply|like|usually|generally".split("|"),
)
_ENDINGS = (("？", "?", "。", "", "！", "...", "", " ", "??"), ("?", ".", "", "!", "...", "", " ?", "??"))


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `key` names what decides its split, `kind` the line it counts in."""

    kind: str
    question: str
    answer: str
    key: tuple[object, ...]
    language: int


@dataclass(frozen=True)
class Intent:
    """The sentences that mean one thing in one language; those of `held_out` never reach the training corpus.

    `dressed` says whether politeness may be put around the sentence: a greeting takes none. `exact` keeps typing slips
    out, where one lost character ("up", "down") would change what is asked.
    """

    name: str
    language: int
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    dressed: bool = True
    exact: bool = False
    train_plain: frozenset[str] = field(init=False)
    held_out_plain: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_plain", frozenset(map(plain, self.train)))
        object.__setattr__(self, "held_out_plain", frozenset(map(plain, self.held_out)))


def intent(
    name: str, language: int, train: str, held_out: str = "", dressed: bool = True, exact: bool = False
) -> Intent:
    """An intent from sentences separated by bars."""
    split = [tuple(part.strip() for part in text.split("|") if part.strip()) for text in (train, held_out)]
    return Intent(name, language, split[0], split[1], dressed, exact)


@functools.lru_cache(maxsize=200_000)
def plain(text: str) -> str:
    """A sentence without case, punctuation and spaces: two that differ in no more than that count as the same."""
    return _NOT_WORD.sub("", text).lower()


def phrase(
    rng: random.Random, meaning: Intent, split: str, slip: bool = False, keep_case: bool = False, **fill: object
) -> tuple[str, str]:
    """Return a question for the intent, its placeholders filled from `fill`, and the name of its phrasing.

    The held-out side is asked as written, or with one typing slip. The training side is dressed up; where that
    or a slip would happen to spell a sentence of the other side, the sentence stays as written.
    """
    if split == HELD_OUT:
        index = rng.randrange(len(meaning.held_out))
        template = meaning.held_out[index]
        slipped = _slip(rng, template) if slip else template
        if plain(slipped) not in meaning.train_plain:
            template = slipped
        return _fill(template, fill), f"{meaning.name}.{meaning.language}.held_out.{index}"
    index = rng.randrange(len(meaning.train))
    template = meaning.train[index]
    changed = _dress(rng, template, meaning)
    if plain(changed) not in meaning.held_out_plain:
        template = changed
    text = _fill(template, fill)
    if meaning.dressed and meaning.language == ENGLISH and not keep_case:
        text = _recase(rng, text)
    return text, f"{meaning.name}.{meaning.language}.train.{index}"


def _fill(template: str, fill: dict[str, object]) -> str:
    for name, value in fill.items():
        template = template.replace("{" + name + "}", str(value))
    return template


def _dress(rng: random.Random, text: str, meaning: Intent) -> str:
    language = meaning.language
    if rng.random() < 0.5:
        stripped = text.rstrip("？?。.!！")
        if stripped and not stripped.endswith("}"):
            text = stripped + rng.choice(_ENDINGS[language])
    if meaning.dressed:
        if rng.random() < 0.22:
            prefix = rng.choice(_PREFIXES[language])
            if language == ENGLISH and text[:1].isupper() and text[1:2] != "'" and not text.startswith("I "):
                text = text[0].lower() + text[1:]
            text = prefix + text
        if rng.random() < 0.18 and not text.endswith("}"):
            text = text.rstrip("？?。.!！ ") + rng.choice(_SUFFIXES[language])
        if rng.random() < 0.15:
            text = _filled(rng, text, language)
    if not meaning.exact:
        for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 1, 2))):
            text = _slip(rng, text)
    return text


def _filled(rng: random.Random, text: str, language: int) -> str:
    """Put a word that means little between two words (in English) or beside the placeholder (in Chinese)."""
    filler = rng.choice(_FILLERS[language])
    if language == CHINESE:
        return text.replace("}", "}" + filler, 1) if "}" in text and not text.endswith("}") else filler + text
    words = text.split(" ")
    words.insert(rng.randint(0, len(words) - 1), filler)
    return " ".join(words)


def _slip(rng: random.Random, template: str) -> str:
    """One typing slip outside the placeholders: a character lost, doubled, swapped, or cut off the end."""
    pieces = _PLACEHOLDER.split(template)
    longest = max(range(0, len(pieces), 2), key=lambda index: len(pieces[index]))
    text = pieces[longest]
    is_chinese = any("一" <= character <= "鿿" for character in text)
    if len(text) < (5 if is_chinese else 9):
        return template
    position = rng.randrange(len(text) - 1)
    choice = rng.random()
    if choice < 0.45:
        text = text[:position] + text[position + 1 :]
    elif choice < 0.6:
        text = text[:position] + text[position + 1] + text[position] + text[position + 2 :]
    elif choice < 0.7:
        text = text[:position] + text[position] + text[position:]
    elif choice < 0.8 and not is_chinese:
        text = text[:position] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[position + 1 :]
    elif longest == len(pieces) - 1:
        text = text[:-1] if is_chinese else text[: -rng.randint(1, 3)]
    pieces[longest] = text
    return "".join(pieces)


def _recase(rng: random.Random, text: str) -> str:
    choice = rng.random()
    if choice < 0.2:
        return text.lower()
    if choice < 0.23:
        return text.upper()
    if choice < 0.26:
        return text.title()
    return text
