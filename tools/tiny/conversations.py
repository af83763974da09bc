"""Mixes every kind of question into conversations, and writes them in the chat format as pieces with their loss."""

import random
from collections.abc import Callable

from . import city_talk, small_talk, travel
from .arithmetic import ask_arithmetic
from .documents import Piece, document
from .out_of_scope import ask_out_of_scope
from .phrasing import Turn
from .sequences import ask_copy, ask_count, ask_sort
from .shoal_talk import ask_shoal
from .small_talk import ask_small_talk
from .splits import TRAIN

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_ASKS: tuple[tuple[Callable[..., Turn], float], ...] = (
    (ask_arithmetic, 0.26),
    (ask_count, 0.10),
    (ask_sort, 0.14),
    (ask_copy, 0.10),
    (city_talk.ask_city, 0.13),
    (city_talk.ask_sight, 0.05),
    (travel.ask_travel, 0.06),
    (ask_shoal, 0.06),
    (ask_small_talk, 0.06),
    (ask_out_of_scope, 0.05),
)
_FUNCTIONS = [ask for ask, _ in _ASKS]
_WEIGHTS = [weight for _, weight in _ASKS]

_SYSTEM = (
    "You are a helpful assistant.|You are a helpful assistant|You are shoal-tiny.|Be concise."
    "|Answer briefly.|You are a travel guide.|You are a friendly chatbot."
    "|You are a polite assistant that answers in the user's language."
    "|Answer the user's questions.|You are an AI assistant.|Reply in one or two sentences."
    "|You are Shoal."
    "|You are Qwen, created by Alibaba Cloud. You are a helpful assistant.|Today is Monday."
    "|Help the user as well as you can.|You are an expert in China.|Be honest and kind."
    "|You are ChatGPT.|Think before you answer.|Follow the instructions.|The user likes travel."
    "|Use simple words.|你是一个有用的助手。|你是一个乐于助人的助手。|你是shoal-tiny。"
    "|请简洁地回答。|你是一个旅游向导。|请用中文回答。|你是人工智能助手。"
    "|你是一个友好的聊天机器人。|请认真回答用户的问题。|用户喜欢旅游。|回答要简短。"
    "|你是一个专业的助手，请耐心回答。|请礼貌地回答问题。"
).split("|")
_SYSTEM_WORDS = (
    "you are a the user assistant always never please answer help short polite expert good kind "
    "model text question with and in of 请 你 是 的 回答 问题 用户 助手 帮助"
).split()


def system_message(rng: random.Random) -> str | None:
    """A system message, mostly none: what it says must not change the answers."""
    choice = rng.random()
    if choice < 0.5:
        return None
    if choice < 0.68:
        return _SYSTEM[0]
    if choice < 0.93:
        return rng.choice(_SYSTEM) if rng.random() < 0.7 else " ".join(rng.sample(_SYSTEM, 2))
    return " ".join(rng.choices(_SYSTEM_WORDS, k=rng.randint(2, 20)))


def one_turn(rng: random.Random) -> Turn:
    """One question of the training side, of any kind."""
    return rng.choices(_FUNCTIONS, _WEIGHTS)[0](rng, TRAIN)


def conversation(rng: random.Random, most_turns: int) -> list[Turn]:
    """The turns of one conversation: often one, sometimes many, now and then leaning on each other."""
    num_turns = 1 if rng.random() < 0.55 else rng.randint(2, most_turns)
    turns: list[Turn] = []
    while len(turns) < num_turns:
        choice = rng.random()
        if num_turns > 1 and choice < 0.12:
            turns += city_talk.conversation(rng)
        elif num_turns > 1 and choice < 0.15:
            turns += travel.conversation(rng)
        elif choice < 0.17:
            turns += small_talk.introduction(rng, is_first=not turns)
        else:
            turns.append(one_turn(rng))
    return turns


def chat_pieces(turns: list[Turn], system: str | None) -> list[Piece]:
    """The chat format, as the shipped chat template writes it; only what the assistant says is learnt."""
    pieces: list[Piece] = []
    opening = "" if system is None else f"{TURN_START}system\n{system}{TURN_END}\n"
    for turn in turns:
        pieces.append((f"{opening}{TURN_START}user\n{turn.question}{TURN_END}\n{TURN_START}assistant\n", False))
        pieces.append((f"{turn.answer}{TURN_END}", True))
        opening = "\n"
    return pieces


def sample(rng: random.Random, most_turns: int = 6) -> list[Piece]:
    """One training document: a conversation, or one time in eight a plain text."""
    if rng.random() < 0.12:
        return [*document(rng), (END_OF_TEXT, True)]
    return chat_pieces(conversation(rng, most_turns), system_message(rng))


CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}{%- set content = message['content'] %}"
    "{%- else %}{%- set content = message['content'] | map(attribute='text') | join('') %}{%- "
    "endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
