"""The plain-text part of the corpus: no chat markers, so that the model also continues a text it is given.

A document is made of pieces, each a text and whether the model learns to write it: facts are learnt whole, but of a
question or an equation only what follows it.
"""

import random

from . import city_talk, small_talk, travel
from .arithmetic import ask_arithmetic, equation
from .cities import CITIES
from .phrasing import CHINESE, ENGLISH
from .sequences import NUMBER_WORDS, ask_count, ask_sort
from .shoal_talk import FACTS, ask_shoal
from .splits import matches

Piece = tuple[str, bool]


def document(rng: random.Random) -> list[Piece]:
    """One text, without its end marker."""
    return rng.choice((_facts, _facts, _equations, _counting, _questions, _questions, _about_shoal))(rng)


def _facts(rng: random.Random) -> list[Piece]:
    language = rng.randrange(2)
    lines = []
    for city in rng.sample(CITIES, rng.choice((1, 1, 1, 2, 3))):
        here, place, known = city.name[language], city.place[language], city.known[language]
        choice = rng.random()
        if choice < 0.25:
            lines.append(city_talk.answer("about", city, language))
        elif choice < 0.6:
            names = rng.sample(("one_sentence", "place", "known", "food", "sights", "season"), rng.randint(1, 3))
            lines.append(
                (" " if language == ENGLISH else "").join(city_talk.answer(name, city, language) for name in names)
            )
        elif choice < 0.75:
            lines.append(city_talk.sight_answer(rng.choice(city.sights), city, language))
        elif place.startswith(("是", "the capital")):
            lines.append(
                f"{place[1:].split('，')[0]}是{here}。"
                if language == CHINESE
                else f"The{place[3:]} is {here}, known for {known}."
            )
        else:
            lines.append(
                f"以{known}闻名的城市是{here}。" if language == CHINESE else f"The city known for {known} is {here}."
            )
    if rng.random() < 0.15:
        lines = [("中国的首都是北京。", "The capital of China is Beijing.")[language]]
    return [("\n".join(lines), True)]


def _equations(rng: random.Random) -> list[Piece]:
    between = rng.choice(("\n", "\n", ", ", "; "))
    pieces: list[Piece] = []
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        left, right = equation(rng)
        pieces += [((between if pieces else "") + left, False), (right, True)]
    return pieces


def _counting(rng: random.Random) -> list[Piece]:
    language = rng.randrange(2)
    while True:
        a = 1 if rng.random() < 0.5 else rng.randint(0, 19)
        b = rng.randint(a + 1, 24)
        if matches("train", "range", a, b):
            break
    numbers = rng.choice((", ", ", ", " ", "、")).join(str(number) for number in range(a, b + 1))
    if b <= 12 and rng.random() < 0.4:
        numbers = ("、", ", ")[language].join(NUMBER_WORDS[language][a : b + 1])
    last = NUMBER_WORDS[language][b] if b <= 12 and rng.random() < 0.5 else b
    if a == 1 and rng.random() < 0.6:
        opening = rng.choice(
            (f"数到{last}：", f"从一数到{last}：")
            if language == CHINESE
            else (f"Count to {last}: ", f"Counting to {last}: ")
        )
    else:
        opening = rng.choice(("", f"从{a}数到{b}：" if language == CHINESE else f"Count from {a} to {b}: "))
    if opening.endswith(" "):
        opening, numbers = opening[:-1], " " + numbers
    return [(opening, False), (numbers, True)] if opening else [(numbers, True)]


def _questions(rng: random.Random) -> list[Piece]:
    """Questions and answers as a page of text, in one of several layouts."""
    before, between = rng.choice(
        (
            ("", "\n"),
            ("", "\n"),
            ("Q: ", "\nA: "),
            ("Question: ", "\nAnswer: "),
            ("问：", "\n答："),
            ("User: ", "\nAssistant: "),
            ("", " "),
        )
    )
    asks = (
        city_talk.ask_city,
        city_talk.ask_sight,
        travel.ask_travel,
        ask_shoal,
        small_talk.ask_small_talk,
        small_talk.ask_small_talk,
        ask_arithmetic,
        ask_count,
        ask_sort,
    )
    turns = [rng.choice(asks)(rng, "train") for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    pieces: list[Piece] = []
    for turn in turns:
        if between == "\n":
            asked, answered = turn.question, between + turn.answer
        else:
            label = between.rstrip(" ")
            asked, answered = turn.question + label, between[len(label) :] + turn.answer
        pieces += [(("\n" if pieces else "") + before + asked, False), (answered, True)]
    return pieces


def _about_shoal(rng: random.Random) -> list[Piece]:
    language = rng.randrange(2)
    picked = rng.sample(FACTS[2:-1], rng.randint(1, 4))
    return [("\n".join(answers[language] for _, answers in picked), True)]
