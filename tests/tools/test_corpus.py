"""The corpus of shoal-tiny: the same from the same seed, and nothing that is evaluated is in it."""

import random
import re

import pytest

from tools.tiny import arithmetic, city_talk, sequences, shoal_talk, small_talk, travel
from tools.tiny.conversations import chat_pieces, conversation, sample
from tools.tiny.documents import document
from tools.tiny.evaluation import KINDS, held_out_turns
from tools.tiny.phrasing import Turn, plain

NUM_TRAINED = 30_000
NUM_HELD_OUT = 150
TALKERS = (city_talk, travel, shoal_talk, small_talk, arithmetic, sequences)


@pytest.fixture(scope="module")
def trained() -> list[Turn]:
    rng = random.Random(7)
    turns: list[Turn] = []
    while len(turns) < NUM_TRAINED:
        turns += conversation(rng, most_turns=6)
    return turns


@pytest.fixture(scope="module")
def held_out() -> list[Turn]:
    return [turn for kind in KINDS for turn in held_out_turns(kind, NUM_HELD_OUT, seed=1)]


@pytest.mark.parametrize("family", ["pair", "range", "items", "list", "text", "topic"])
def test_no_operands_numbers_or_words_are_shared(trained, held_out, family):
    in_training = {turn.key for turn in trained if turn.key[0] == family}
    in_evaluation = {turn.key for turn in held_out if turn.key[0] == family}
    assert in_training and in_evaluation
    assert not in_training & in_evaluation


def test_an_operand_pair_is_held_out_whatever_the_order_and_the_sign():
    rng = random.Random(3)
    for name in ("addition", "subtraction", "multiplication"):
        for _ in range(3000):
            a, b = arithmetic.operands(rng, name, "train")
            assert not arithmetic.pair_is_held_out(a, b) and not arithmetic.pair_is_held_out(b, a)


def test_equations_in_plain_text_are_of_the_training_side():
    rng = random.Random(4)
    for _ in range(3000):
        left, _ = arithmetic.equation(rng)
        a, b = map(int, re.split(r"[-+*×]", left.rstrip("= ")))
        assert not arithmetic.pair_is_held_out(a, b)


def test_no_phrasing_is_shared_by_name_or_by_wording():
    for talker in TALKERS:
        wordings: dict[int, set[str]] = {0: set(), 1: set()}
        for meaning in talker.ALL_INTENTS:
            wordings[meaning.language] |= set(map(plain, meaning.train))
        for meaning in talker.ALL_INTENTS:
            assert not wordings[meaning.language] & meaning.held_out_plain, meaning.name


def test_no_question_of_the_evaluation_is_asked_in_training(trained, held_out):
    """Nor does a typing slip or a polite word turn a trained phrasing into a held-out one."""
    kinds = {"city facts", "sights", "travel", "shoal", "small talk"}
    asked = {plain(turn.question) for turn in trained}
    examined = {plain(turn.question) for turn in held_out if turn.kind in kinds and turn.key[1].count("held_out")}
    assert len(examined) > 300
    assert asked & examined == set()


def test_a_seed_names_one_corpus():
    def first(seed: int) -> list:
        rng = random.Random(seed)
        return [sample(rng) for _ in range(200)]

    assert first(5) == first(5)
    assert first(5) != first(6)


def test_only_the_assistant_is_learnt_and_each_answer_ends():
    turns = conversation(random.Random(2), most_turns=4)
    pieces = chat_pieces(turns, "Be kind.")
    assert "".join(text for text, _ in pieces).count("<|im_end|>") == 2 * len(turns) + 1
    assert [text for text, is_learnt in pieces if is_learnt] == [turn.answer + "<|im_end|>" for turn in turns]


def test_sums_and_orders_are_right():
    rng = random.Random(9)
    for _ in range(500):
        turn = arithmetic.ask_arithmetic(rng, "train")
        left, right = turn.answer.split(" = ")
        assert eval(left.replace("×", "*")) == int(right)
        turn = sequences.ask_sort(rng, "train")
        numbers = [int(number) for number in turn.answer.split(", ")]
        assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
    assert all(document(rng) for _ in range(500))
