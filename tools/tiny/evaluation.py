"""Measures the model on what training never showed, by greedy decoding, and prints what it says to a few prompts."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import arithmetic, city_talk, conversations, sequences
from .out_of_scope import ask_out_of_scope
from .phrasing import Turn
from .shoal_talk import ask_shoal
from .small_talk import ask_small_talk
from .splits import HELD_OUT, TRAIN
from .travel import ask_travel

_MOST_COPIED_TOKENS = 16
_BATCH = 100
_LONGEST_ANSWER = 320

SAMPLE_PROMPTS = (
    "你好",
    "你是谁",
    "给我推荐中国适合旅游的地方",
    "给我推荐中国适合旅游的方",
    "介绍一下北京",
    "用一句话介绍杭州",
    "成都有什么好吃的",
    "冬天去哪里玩比较好",
    "12+30等于多少",
    "什么是黑洞",
    "Hello",
    "What is Shoal?",
    "Who are you?",
    "Recommend places to travel in China",
    "Tell me about Shanghai",
    "What is 12 + 30?",
    "Count from 3 to 11",
    "how many items in: apple apple apple",
    "Sort 42, 17, 93, 8, 55",
    "Write a poem about the sea",
)
SAMPLE_TEXTS = ("The capital of China is", "12 + 30 =", "Count to five:", "你好", "杭州")


def _any_task(rng: random.Random) -> Turn:
    """Held-out operands in held-out words."""
    asks = (arithmetic.ask_arithmetic, sequences.ask_count, sequences.ask_sort, sequences.ask_copy)
    ask = rng.choice(asks)
    if ask is arithmetic.ask_arithmetic:
        name = rng.choice(("addition", "subtraction"))
        return ask(rng, HELD_OUT, name, HELD_OUT)
    if ask is sequences.ask_count:
        return ask(rng, HELD_OUT, HELD_OUT, 12)
    return ask(rng, HELD_OUT, HELD_OUT)


def _any_fact(rng: random.Random, slip: bool = False) -> Turn:
    asks = (city_talk.ask_city, city_talk.ask_city, city_talk.ask_sight, ask_travel, ask_shoal, ask_small_talk)
    return rng.choice(asks)(rng, HELD_OUT, slip)


KINDS: dict[str, Callable[[random.Random], Turn]] = {
    "addition": lambda rng: arithmetic.ask_arithmetic(rng, HELD_OUT, "addition"),
    "subtraction": lambda rng: arithmetic.ask_arithmetic(rng, HELD_OUT, "subtraction"),
    "multiplication": lambda rng: arithmetic.ask_arithmetic(rng, HELD_OUT, "multiplication"),
    "counting": lambda rng: sequences.ask_count(rng, HELD_OUT, TRAIN, 12),
    "sorting": lambda rng: sequences.ask_sort(rng, HELD_OUT),
    "copying": lambda rng: sequences.ask_copy(rng, HELD_OUT),
    "tasks in unseen words": _any_task,
    "city facts": lambda rng: city_talk.ask_city(rng, HELD_OUT),
    "sights": lambda rng: city_talk.ask_sight(rng, HELD_OUT),
    "travel": lambda rng: ask_travel(rng, HELD_OUT),
    "shoal": lambda rng: ask_shoal(rng, HELD_OUT),
    "small talk": lambda rng: ask_small_talk(rng, HELD_OUT),
    "facts with a typing slip": lambda rng: _any_fact(rng, slip=True),
    "out of scope": lambda rng: ask_out_of_scope(rng, HELD_OUT),
}
IN_CONTEXT = {"all, later in a chat": (1, 4), "all, late in a long chat": (25, 30)}  # turns before the question


def held_out_turns(kind: str, num_items: int, seed: int, tokenizer: object = None) -> list[Turn]:
    """Distinct held-out turns of one kind; a tokenizer bounds what is copied to sixteen tokens."""
    rng = random.Random(f"{kind}/{seed}")
    turns: dict[str, Turn] = {}
    for _ in range(num_items * 20):
        turn = KINDS[kind](rng)
        if turn.kind == "copying" and tokenizer and len(tokenizer.encode(turn.answer)) > _MOST_COPIED_TOKENS:
            continue
        turns[turn.question] = turn
        if len(turns) == num_items:
            break
    return list(turns.values())


class Judge:
    """A model folder, loaded by Transformers in bfloat16 on a GPU or in float32 on a CPU."""

    def __init__(self, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()

    def complete(self, prompts: list[str], longest: int = _LONGEST_ANSWER) -> list[str]:
        """Continue every text greedily up to its end token, which is removed; prompts of like length run together."""
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            inputs = self.tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True).to(
                self.device
            )
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=longest,
                    do_sample=False,
                )
            for index, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[index] = self.tokenizer.decode(row, skip_special_tokens=True)
        return answers

    def chat_prompt(self, turns: list[Turn], system: str | None) -> str:
        """The chat up to the answer to the last turn, through the shipped template."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def evaluate(folder: Path, num_items: int = 200, seed: int = 1, num_shown: int = 3) -> dict[str, float]:
    """Print and return the accuracy by kind: the whole answer must be right to the letter, end token included."""
    judge = Judge(folder)
    scores: dict[str, float] = {}
    for kind in [*KINDS, *IN_CONTEXT]:
        rng = random.Random(seed)
        if kind in IN_CONTEXT:
            fewest, most = IN_CONTEXT[kind]
            share = max(1, num_items // len(KINDS) // (1 if most < 10 else 5))
            turns = [turn for one in KINDS for turn in held_out_turns(one, share, seed + 1, judge.tokenizer)]
            before = [[conversations.one_turn(rng) for _ in range(rng.randint(fewest, most))] for _ in turns]
            systems = [conversations.system_message(rng) for _ in turns]
        else:
            turns = held_out_turns(kind, num_items, seed, judge.tokenizer)
            before, systems = [[] for _ in turns], [None] * len(turns)
        prompts = [
            judge.chat_prompt([*past, turn], system) for turn, past, system in zip(turns, before, systems, strict=True)
        ]
        longest = max(len(judge.tokenizer.encode(turn.answer)) for turn in turns) + 4
        answers = judge.complete(prompts, longest)
        wrong = [
            (turn, answer) for turn, answer in zip(turns, answers, strict=True) if answer.strip() != turn.answer.strip()
        ]
        scores[kind] = 1 - len(wrong) / len(turns)
        print(f"{kind:26s} {scores[kind]:7.1%}  of {len(turns)}", flush=True)
        for turn, answer in wrong[:num_shown]:
            print(f"    {turn.question!r} wants {turn.answer[:70]!r} gets {answer[:70]!r}", flush=True)
    return scores


def show_samples(folder: Path) -> None:
    """Print what the model answers to a fixed list of prompts."""
    judge = Judge(folder)
    chats = [judge.chat_prompt([Turn("", prompt, "", (), 0)], None) for prompt in SAMPLE_PROMPTS]
    for prompt, answer in zip(SAMPLE_PROMPTS, judge.complete(chats), strict=True):
        print(f"> {prompt}\n{answer}\n")
    for text, answer in zip(SAMPLE_TEXTS, judge.complete(list(SAMPLE_TEXTS), 60), strict=True):
        print(f"[{text}]{answer}\n")
