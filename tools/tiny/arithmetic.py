"""Addition, subtraction and a little multiplication; an operand pair is on one side of the split, whatever the sign."""

import random

from .phrasing import CHINESE, ENGLISH, Turn, intent, phrase
from .splits import HELD_OUT, is_held_out

_BARE = "{a}{sign}{b}=|{a} {sign} {b} =|{a}{sign}{b}|{a} {sign} {b}|{a} {sign} {b} = ?|{a}{sign}{b}=?|{a} {sign} {b}?"
_CHINESE = (
    _BARE + "|{a}{word}{b}等于多少|{a} {word} {b} 等于多少|{a}{sign}{b}等于多少|{a} {sign} {b} 等于多少"
    "|计算{a}{sign}{b}|计算 {a} {sign} {b}|算一下{a}{word}{b}|{a}{word}{b}是多少"
    "|{a}{sign}{b}等于几|帮我算{a}{sign}{b}|帮我算一下 {a} {sign} {b}|{a}{word}{b}|求{a}{sign}{b}"
    "|{a}{word}上{b}等于多少|请计算：{a}{sign}{b}|{a} {sign} {b} 的结果是多少|{a}{sign}{b}是多少"
    "|{a}{word}{b}等于几|算算{a}{sign}{b}|{a}{sign}{b}的答案|口算：{a}{sign}{b}|计算题：{a} {sign} {b}"
)
_CHINESE_HELD_OUT = "请你算出{a}{word}{b}的结果|告诉我{a}{sign}{b}等于多少|我想知道 {a} {sign} {b} 的答案"
_ENGLISH = (
    _BARE + "|What is {a} {sign} {b}?|What is {a}{sign}{b}?|What's {a} {sign} {b}?|What is {a} {word} {b}?"
    "|Calculate {a} {sign} {b}|Compute {a} {sign} {b}|{a} {word} {b}"
    "|How much is {a} {sign} {b}?|How much is {a} {word} {b}?|What does {a} {sign} {b} equal?"
    "|Work out {a} {sign} {b}|Solve {a} {sign} {b}|{a} {word} {b} is what?"
    "|What do you get for {a} {sign} {b}?|Give me the result of {a} {sign} {b}"
    "|What is the result of {a} {sign} {b}?|Calculate {a} {word} {b}|Find {a} {sign} {b}"
    "|Evaluate {a} {sign} {b}|{a} {word} {b} equals|What does {a} {word} {b} make?"
)
_ENGLISH_HELD_OUT = (
    "Tell me the answer to {a} {sign} {b}|Could you work out {a} {word} {b}?|I need the result of {a} {sign} {b}"
)
_PHRASINGS = (
    intent("arithmetic", CHINESE, _CHINESE, _CHINESE_HELD_OUT),
    intent("arithmetic", ENGLISH, _ENGLISH, _ENGLISH_HELD_OUT),
)
_SPECIAL = {
    "addition": (
        intent(
            "addition",
            CHINESE,
            "{a}和{b}的和是多少|{a}与{b}的和|求{a}与{b}之和|{a}和{b}加起来是多少|把{a}和{b}加起来",
            exact=True,
        ),
        intent(
            "addition",
            ENGLISH,
            "Add {a} and {b}|What is the sum of {a} and {b}?|The sum of {a} and {b}|Add {b} to {a}|Sum {a} and {b}",
            exact=True,
        ),
    ),
    "subtraction": (
        intent(
            "subtraction",
            CHINESE,
            "{a}和{b}的差是多少|{a}与{b}的差|{a}比{b}多多少|从{a}里减去{b}|{a}减去{b}是多少",
            exact=True,
        ),
        intent(
            "subtraction",
            ENGLISH,
            "Subtract {b} from {a}|What is the difference of {a} and {b}?|Take {b} away from {a}|{a} take away {b}",
            exact=True,
        ),
    ),
    "multiplication": (
        intent(
            "multiplication", CHINESE, "{a}和{b}的积是多少|{a}与{b}的积|{a}乘以{b}等于多少|{a}乘{b}得多少", exact=True
        ),
        intent(
            "multiplication",
            ENGLISH,
            "Multiply {a} by {b}|What is the product of {a} and {b}?|Multiply {a} and {b}"
            "|What is {a} multiplied by {b}?",
            exact=True,
        ),
    ),
}
_SIGNS = {"addition": ("+", "+", "＋"), "subtraction": ("-", "-", "−", "－"), "multiplication": ("*", "×", "x", "×")}
_WORDS = {"addition": ("加", "plus"), "subtraction": ("减", "minus"), "multiplication": ("乘", "times")}
ALL_INTENTS = [*_PHRASINGS, *(one for pair in _SPECIAL.values() for one in pair)]


def pair_is_held_out(a: int, b: int) -> bool:
    """Whether the pair {a, b} belongs to the evaluation. The tables up to twelve are always trained."""
    low, high = sorted((a, b))
    return high > 12 and is_held_out("pair", low, high)


def _operand(rng: random.Random) -> int:
    num_digits = rng.choice((1, 2, 2, 3, 3, 3))
    return rng.randint(0 if num_digits == 1 else 10 ** (num_digits - 1), 10**num_digits - 1)


def _factors(rng: random.Random, is_wide: bool) -> tuple[int, int]:
    """A pair of the table up to 12, or two digits by one. `is_wide` adds three by one: with more pairs than a small
    model can remember, it has to learn how to multiply."""
    choice = rng.random()
    if choice < 0.3:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    elif choice < 0.7 or not is_wide:
        a, b = rng.randint(10, 99), rng.randint(2, 9)
    else:
        a, b = rng.randint(100, 999), rng.randint(2, 9)
    return (b, a) if rng.random() < 0.2 else (a, b)


def operands(rng: random.Random, name: str, split: str) -> tuple[int, int]:
    """Draw a pair of `split`: up to three digits each."""
    while True:
        if name == "multiplication":
            a, b = _factors(rng, is_wide=split != HELD_OUT)
        else:
            a, b = _operand(rng), _operand(rng)
        if name == "subtraction" and a < b and rng.random() < 0.75:
            a, b = b, a
        if pair_is_held_out(a, b) == (split == HELD_OUT):
            return a, b


def solve(name: str, a: int, b: int) -> int:
    """The result."""
    return {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[name]


def ask_arithmetic(rng: random.Random, split: str, name: str | None = None, phrasing_split: str = "train") -> Turn:
    """A sum, a difference or a product of a pair of `split`, in a phrasing of `phrasing_split`."""
    name = name or rng.choice(
        ("addition", "addition", "subtraction", "subtraction", "multiplication", "multiplication")
    )
    language = rng.randrange(2)
    a, b = operands(rng, name, split)
    meaning = _PHRASINGS[language]
    if phrasing_split != HELD_OUT and rng.random() < 0.2:
        meaning = _SPECIAL[name][language]
    question, _ = phrase(
        rng, meaning, phrasing_split, a=a, b=b, sign=rng.choice(_SIGNS[name]), word=_WORDS[name][language]
    )
    sign = {"addition": "+", "subtraction": "-", "multiplication": "×"}[name]
    return Turn(name, question, f"{a} {sign} {b} = {solve(name, a, b)}", ("pair", *sorted((a, b))), language)


def equation(rng: random.Random) -> tuple[str, str]:
    """Both sides of a bare equation, for the plain-text part of the corpus."""
    name = rng.choice(("addition", "subtraction", "multiplication"))
    a, b = operands(rng, name, "train")
    sign = {"addition": "+", "subtraction": "-", "multiplication": rng.choice("×*")}[name]
    space = rng.choice((" ", " ", ""))
    return f"{a}{space}{sign}{space}{b}{space}=", f"{space}{solve(name, a, b)}"
