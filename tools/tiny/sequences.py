"""Counting, sorting and copying; what is counted, sorted or copied is on one side of the split."""

import random

from .phrasing import CHINESE, ENGLISH, Turn, intent, phrase
from .splits import TRAIN, matches

_COUNT = {
    "from": (
        intent(
            "count.from",
            CHINESE,
            "从{a}数到{b}|请从{a}数到{b}|从 {a} 数到 {b}|从{a}开始数到{b}|由{a}数到{b}|{a}数到{b}"
            "|从{a}到{b}数数|数数，从{a}到{b}|列出{a}到{b}的数字|写出从{a}到{b}的数",
            "数一数从{a}到{b}的数字|帮我从{a}一直数到{b}",
        ),
        intent(
            "count.from",
            ENGLISH,
            "Count from {a} to {b}|Count {a} to {b}|Count up from {a} to {b}|Please count from {a} to {b}"
            "|List the numbers from {a} to {b}|Count from {a} up to {b}|Can you count from {a} to {b}?"
            "|Numbers from {a} to {b}|Write the numbers from {a} to {b}|Start at {a} and count to {b}",
            "Could you count starting from {a} to {b}?|Say the numbers from {a} to {b}",
        ),
    ),
    "to": (
        intent(
            "count.to",
            CHINESE,
            "数到{b}|数到 {b}|请数到{b}|帮我数到{b}|数数到{b}|从一数到{b}|你能数到{b}吗|从头数到{b}"
            "|数数，数到{b}|一直数到{b}",
            "给我数到{b}|试着数到{b}",
        ),
        intent(
            "count.to",
            ENGLISH,
            "Count to {b}|Count up to {b}|Count to {b} please|Can you count to {b}?|Please count to {b}"
            "|Count numbers to {b}|Count until {b}|Count till {b}",
            "I want you to count to {b}|Could you count up to {b}?",
        ),
    ),
    "down": (
        intent(
            "count.down",
            CHINESE,
            "从{b}倒数到{a}|从{b}倒着数到{a}|倒数：从{b}到{a}|从{b}往回数到{a}|请从{b}倒数到{a}",
            "帮我从{b}倒着数回{a}",
            exact=True,
        ),
        intent(
            "count.down",
            ENGLISH,
            "Count down from {b} to {a}|Count backwards from {b} to {a}|Count back from {b} to {a}"
            "|Count down {b} to {a}|Please count down from {b} to {a}",
            "Could you count backwards starting from {b} to {a}?",
            exact=True,
        ),
    ),
}
_ITEMS = (
    intent(
        "count.items",
        CHINESE,
        "数一数有几个：{items}|有几个：{items}|一共有多少个：{items}|下面有几个东西：{items}"
        "|数数有多少个：{items}|{items} 一共有几个|请数一数：{items}|{items}，有几个|多少个：{items}"
        "|这里有多少个：{items}|{items} 有多少个|计数：{items}",
        "帮我数一下这里有几个：{items}|这一串里有多少个：{items}",
    ),
    intent(
        "count.items",
        ENGLISH,
        "How many items in: {items}|How many items are in this list: {items}|Count the items: {items}"
        "|How many words: {items}|How many are there: {items}|How many items in: {items}?"
        "|Count these: {items}|How many things are here: {items}|{items} - how many items?"
        "|How many items are there in: {items}|Number of items: {items}|Count the words: {items}",
        "Tell me how many items there are: {items}|What is the number of items in: {items}",
    ),
)
_WORDS = (
    (
        "苹果|香蕉|橙子|葡萄|西瓜|桃子|梨|猫|狗|鸟|鱼|马|牛|羊|兔子|熊猫|花|树|草|山|河|海|星星|月亮"
        "|太阳|书|笔|纸|桌子|椅子|杯子|碗|车|船|飞机|火车|球|帽子|鞋|手"
    ).split("|"),
    (
        "apple|banana|orange|grape|pear|peach|melon|cat|dog|bird|fish|horse|cow|sheep|rabbit|panda"
        "|flower|tree|grass|hill|river|sea|star|moon|sun|book|pen|paper|table|chair|cup|bowl|car|ship"
        "|plane|train|ball|hat|shoe|hand"
    ).split("|"),
)
NUMBER_WORDS = (
    tuple("零|一|二|三|四|五|六|七|八|九|十|十一|十二".split("|")),
    tuple("zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve".split("|")),
)
_SORT = {
    "up": (
        intent(
            "sort.up",
            CHINESE,
            "把{items}从小到大排序|从小到大排序：{items}|将{items}按从小到大的顺序排列"
            "|请从小到大排列：{items}|排序：{items}|给这些数排序：{items}|把这些数字从小到大排：{items}"
            "|升序排列：{items}|{items} 从小到大排序|对{items}排序|把下面的数字排序：{items}"
            "|把 {items} 升序排列|从小到大：{items}",
            "请将{items}由小到大排好|帮我把这些数按从小到大排列：{items}",
            exact=True,
        ),
        intent(
            "sort.up",
            ENGLISH,
            "Sort {items}|Sort these numbers: {items}|Sort the numbers {items}"
            "|Sort {items} in ascending order|Sort in ascending order: {items}"
            "|Order these numbers from smallest to largest: {items}|Arrange {items} from small to large"
            "|Put {items} in order|Sort: {items}|Please sort these numbers: {items}"
            "|Sort from smallest to largest: {items}|Sort this list: {items}"
            "|Sort {items} from low to high",
            "Could you arrange these numbers in ascending order: {items}|Order {items} from the smallest "
            "to the largest",
            exact=True,
        ),
    ),
    "down": (
        intent(
            "sort.down",
            CHINESE,
            "把{items}从大到小排序|从大到小排序：{items}|将{items}按从大到小的顺序排列"
            "|请从大到小排列：{items}|降序排列：{items}|{items} 从大到小排序|把 {items} 降序排列"
            "|从大到小：{items}",
            "请将{items}由大到小排好|帮我把这些数按从大到小排列：{items}",
            exact=True,
        ),
        intent(
            "sort.down",
            ENGLISH,
            "Sort {items} in descending order|Sort in descending order: {items}"
            "|Order these numbers from largest to smallest: {items}|Arrange {items} from large to small"
            "|Sort from largest to smallest: {items}|Sort {items} from high to low"
            "|Sort these numbers in descending order: {items}",
            "Could you arrange these numbers in descending order: {items}|Order {items} from the largest "
            "to the smallest",
            exact=True,
        ),
    ),
}
_COPY = (
    intent(
        "copy",
        CHINESE,
        "重复：{text}|请重复：{text}|跟我说：{text}|复述：{text}|照着写一遍：{text}|抄写：{text}"
        "|复制：{text}|跟我念：{text}|请复制下面的内容：{text}|重复一遍：{text}"
        "|把这句话重复一遍：{text}|原样输出：{text}|请原样重复：{text}|请说：{text}",
        "请你把下面的话照样说一遍：{text}|跟着我重复：{text}",
    ),
    intent(
        "copy",
        ENGLISH,
        "Repeat after me: {text}|Repeat: {text}|Copy this: {text}|Say: {text}"
        "|Repeat the following: {text}|Please repeat: {text}|Copy: {text}|Say this: {text}"
        "|Please copy this: {text}|Echo: {text}|Repeat this: {text}|Write this again: {text}"
        "|Repeat exactly: {text}|Output the following: {text}",
        "Please say the following back to me: {text}|Could you repeat this text: {text}",
    ),
)
ALL_INTENTS = [*(one for pair in (*_COUNT.values(), *_SORT.values()) for one in pair), *_ITEMS, *_COPY]
# The 3755 characters of GB 2312's first level, which cover everyday Chinese.
_COMMON = "".join(
    bytes((high, low)).decode("gb2312")
    for high in range(0xB0, 0xD8)
    for low in range(0xA1, 0xFF)
    if (high, low) < (0xD7, 0xFA)
)
_FREQUENT = (
    "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又"
    "如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿"
    "者向情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相"
)
_SPOKEN = (
    (
        "今天|天气|很好|我们|一起|去|公园|散步|喜欢|吃|苹果|学习|中文|朋友|明天|见面|老师|学生|北京"
        "|上海|读书|写字|听|音乐|看|电影|早上|晚上|工作|休息|快乐|开心|大家|你好|谢谢|再见|什么|可以"
        "|非常|漂亮|小鸟|飞|天空|大海|蓝色|红色"
    ).split("|"),
    (
        "the|a|quick|brown|fox|jumps|over|lazy|dog|today|is|nice|we|go|to|park|and|eat|an|apple|learn"
        "|music|friend|tomorrow|see|you|teacher|student|read|book|write|hello|world|good|morning"
        "|night|blue|red|green|sky|sea|little|bird|flies|high|I|like|this|that|time|work|rest|happy"
        "|home|city|road|light|water|open|close|fast|slow|new|old"
    ).split("|"),
)


def ask_count(rng: random.Random, split: str, phrasing_split: str = "train", most: int = 20) -> Turn:
    """Counting up, counting down, or counting things; never more than `most`."""
    language = rng.randrange(2)
    if rng.random() < 0.4:
        return _count_items(rng, split, phrasing_split, language)
    kind = rng.choice(("from", "from", "to", "to", "down"))
    while True:
        a = 1 if kind == "to" or rng.random() < 0.2 else rng.randint(0, most - 1)
        b = rng.randint(a + 1, min(a + 19, most))
        if matches(split, "range", a, b):
            break
    shown = {"a": a, "b": b}
    if b <= 12 and rng.random() < 0.25:
        shown = {"a": NUMBER_WORDS[language][a], "b": NUMBER_WORDS[language][b]}
    numbers = list(range(a, b + 1))
    if kind == "from" and split == TRAIN and rng.random() < 0.15:  # from five to one: down as well
        shown = {"a": shown["b"], "b": shown["a"]}
        numbers.reverse()
    question, _ = phrase(rng, _COUNT[kind][language], phrasing_split, a=shown["a"], b=shown["b"])
    if kind == "down":
        numbers.reverse()
    return Turn("counting", question, ", ".join(map(str, numbers)), ("range", a, b), language)


def _count_items(rng: random.Random, split: str, phrasing_split: str, language: int) -> Turn:
    while True:
        number = rng.randint(1, 12)
        if rng.random() < 0.6:
            items = [rng.choice(_WORDS[language])] * number
        else:
            items = rng.choices(_WORDS[language], k=number)
        if matches(split, "items", *items):
            break
    if language == CHINESE:
        separator = rng.choice(("、", "、", " ", "，"))
        reply = f"一共有 {number} 个。"
    else:
        separator = rng.choice((" ", " ", ", ", ","))
        reply = "There is 1 item." if number == 1 else f"There are {number} items."
    question, _ = phrase(rng, _ITEMS[language], phrasing_split, keep_case=True, items=separator.join(items))
    return Turn("counting", question, reply, ("items", *items), language)


def ask_sort(rng: random.Random, split: str, phrasing_split: str = "train") -> Turn:
    """Two to six numbers of two digits (in training also of one), in order."""
    language = rng.randrange(2)
    length = rng.choice((2, 3, 4, 5, 5, 6, 6))
    lowest, highest = 10, 99
    if split == TRAIN:
        lowest, highest = rng.choice(((10, 99), (10, 99), (10, 99), (10, 99), (0, 99), (0, 9)))
    while True:
        numbers = [rng.randint(lowest, highest) for _ in range(length)]
        if matches(split, "list", *sorted(numbers)):
            break
    kind = rng.choice(("up", "up", "down"))
    separator = rng.choice((("、", "、", "，", " ", ", ", ","), (", ", ", ", " ", ",", ", "))[language])
    question, _ = phrase(rng, _SORT[kind][language], phrasing_split, items=separator.join(map(str, numbers)))
    reply = ", ".join(map(str, sorted(numbers, reverse=kind == "down")))
    return Turn("sorting", question, reply, ("list", *sorted(numbers)), language)


def ask_copy(rng: random.Random, split: str, phrasing_split: str = "train") -> Turn:
    """A text to be said again: words, digits, letters or characters."""
    language = rng.randrange(2)
    while True:
        text = _text_to_copy(rng, language)
        if matches(split, "text", text):
            break
    question, _ = phrase(rng, _COPY[language], phrasing_split, keep_case=True, text=text)
    return Turn("copying", question, text, ("text", text), language)


def _text_to_copy(rng: random.Random, language: int) -> str:
    choice = rng.random()
    if choice < 0.15:
        return "".join(rng.choices("0123456789", k=rng.randint(1, 14)))
    if choice < 0.25:
        return " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 5)))
    if choice < 0.35:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 8)))
    if choice < 0.42:
        return " ".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))
    if language == CHINESE:
        if choice < 0.6:
            return "".join(rng.choices(_FREQUENT, k=rng.randint(1, 15)))
        if choice < 0.7:
            return "".join(rng.choices(_COMMON, k=rng.randint(1, 6)))
        if choice < 0.85:
            return "".join(rng.choices(_SPOKEN[CHINESE], k=rng.randint(1, 6))) + rng.choice(("", "。", "！", "？"))
        return rng.choice((" ", "、")).join(rng.choices(_WORDS[CHINESE], k=rng.randint(1, 5)))
    if choice < 0.75:
        sentence = " ".join(rng.choices(_SPOKEN[ENGLISH], k=rng.randint(1, 12)))
        return (sentence.capitalize() if rng.random() < 0.3 else sentence) + rng.choice(("", "", ".", "!", "?"))
    return rng.choice((" ", ", ")).join(rng.choices(_WORDS[ENGLISH], k=rng.randint(1, 8)))


def common_characters() -> str:
    """Everyday Chinese characters, the most frequent first, for the tokenizer."""
    return _FREQUENT + _COMMON
