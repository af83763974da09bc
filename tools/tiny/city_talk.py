"""Questions about one city, or about one sight, and the sentences that answer them."""

import random

from .cities import CITIES, City
from .phrasing import CHINESE, ENGLISH, Intent, Turn, intent, phrase
from .splits import HELD_OUT

_INTENTS: dict[str, tuple[Intent, Intent]] = {}


def _ask(name: str, chinese: str, chinese_held_out: str, english: str, english_held_out: str) -> None:
    _INTENTS[name] = (
        intent(f"city.{name}", CHINESE, chinese, chinese_held_out),
        intent(f"city.{name}", ENGLISH, english, english_held_out),
    )


_ask(
    "about",
    "介绍一下{city}|介绍{city}|说说{city}|讲讲{city}|{city}怎么样|跟我说说{city}这个城市"
    "|{city}是个什么样的城市|我想了解{city}|给我讲讲{city}"
    "|谈谈{city}|{city}介绍|请介绍一下{city}这座城市|你知道{city}吗|{city}|关于{city}，你知道什么"
    "|简单介绍{city}|描述一下{city}|聊聊{city}"
    "|你对{city}了解多少|{city}是什么地方|给我介绍一下{city}|我对{city}很感兴趣"
    "|能说说{city}的情况吗|详细介绍一下{city}|{city}这个城市怎么样",
    "向我介绍一下{city}|和我聊一聊{city}|想多了解一点{city}",
    "Tell me about {city}|Introduce {city}|What do you know about {city}?|Describe {city}"
    "|What is {city} like?|Tell me about the city of {city}"
    "|Give me an introduction to {city}|{city}|I want to know about {city}|Talk about {city}"
    "|Tell me something about {city}"
    "|Give me some information about {city}|What can you tell me about {city}?"
    "|I'd like to learn about {city}|Say something about {city}"
    "|What kind of city is {city}?|What is {city}?|Do you know {city}?|Tell me more about {city}"
    "|How is {city}?|Information on {city}"
    "|Let's talk about {city}|Give me an overview of {city}|I am interested in {city}"
    "|Can you introduce {city}?",
    "Please tell me a bit about {city}|Could you describe {city} to me?|I want to learn more about {city}",
)
_ask(
    "one_sentence",
    "用一句话介绍{city}|一句话介绍{city}|用一句话说说{city}|用一句话描述{city}|一句话概括{city}"
    "|用一句话概括一下{city}|请用一句话介绍一下{city}"
    "|一句话说说{city}|用一句话讲讲{city}|简短地介绍一下{city}|用一句话告诉我{city}是什么样的"
    "|一句话形容{city}|用简短的一句话介绍{city}",
    "用一句话来介绍{city}|只用一句话介绍一下{city}",
    "Describe {city} in one sentence|Introduce {city} in one sentence"
    "|Tell me about {city} in one sentence|In one sentence, what is {city}?"
    "|Sum up {city} in one sentence|One sentence about {city}|Give me one sentence about {city}"
    "|Briefly introduce {city}"
    "|Summarize {city} in a sentence|In one sentence, describe {city}"
    "|Describe {city} in a single sentence|Briefly describe {city}"
    "|In one sentence, tell me about {city}",
    "Give me a one sentence description of {city}|Use one sentence to introduce {city}",
)
_ask(
    "place",
    "{city}在哪里|{city}在哪|{city}在哪个省|{city}属于哪个省|{city}位于哪里|{city}是哪个省的"
    "|{city}在中国的什么地方|{city}在什么地方|{city}位于中国哪里"
    "|{city}属于什么省|{city}是哪里的城市|{city}在什么省|告诉我{city}在哪里|{city}的位置"
    "|{city}在中国哪个地方|{city}地处哪里|{city}归哪个省管|哪个省有{city}|{city}的具体位置"
    "|请问{city}在哪儿|{city}在哪儿|知道{city}在哪里吗|能告诉我{city}在哪个省吗",
    "{city}位于哪个省|你知道{city}在哪儿吗|{city}具体在哪里",
    "Where is {city}?|Which province is {city} in?|What province is {city} in?"
    "|Where is {city} located?|Where in China is {city}?"
    "|Where can I find {city}?|In which province is {city}?|{city} is in which province?"
    "|Tell me where {city} is|What is the location of {city}?"
    "|Where does {city} lie?|What part of China is {city} in?|Which part of China is {city} in?"
    "|Do you know where {city} is?"
    "|Where is the city of {city}?|{city} belongs to which province?",
    "Which Chinese province is {city} located in?|Please tell me where {city} is located|In what province is {city}?",
)
_ask(
    "known",
    "{city}以什么闻名|{city}有什么特色|{city}以什么出名|{city}最有名的是什么|{city}因为什么出名"
    "|{city}有什么特点|{city}出名的是什么|{city}为什么有名"
    "|{city}的特色是什么|{city}什么最有名|{city}靠什么出名|{city}有什么有名的|{city}因什么而闻名"
    "|{city}著名的是什么|{city}的名片是什么|{city}的特点",
    "{city}是因为什么而出名的|{city}最著名的是什么|说说{city}有什么特色",
    "What is {city} known for?|What is {city} famous for?|Why is {city} famous?"
    "|What makes {city} special?|What is special about {city}?"
    "|{city} is famous for what?|What's {city} known for?|Why is {city} well known?"
    "|What is {city} best known for?|What makes {city} famous?"
    "|Tell me what {city} is known for|What's special in {city}?|What is {city} most famous for?"
    "|Why do people know {city}?",
    "Tell me what {city} is famous for|For what is {city} known?|What is so special about {city}?",
)
_ask(
    "food",
    "{city}有什么好吃的|{city}有什么美食|{city}的特色美食|{city}的小吃有哪些|去{city}吃什么"
    "|在{city}吃什么好|{city}好吃的有哪些|推荐一下{city}的美食"
    "|{city}特产是什么|{city}有哪些特色菜|到{city}应该吃什么|{city}有什么小吃|{city}的美食有哪些"
    "|{city}什么好吃|介绍一下{city}的美食|{city}必吃美食"
    "|{city}人爱吃什么|我在{city}，吃点什么好|{city}的当地菜|说说{city}的吃的|{city}有啥好吃的"
    "|{city}美食推荐|{city}有什么特色小吃",
    "{city}有哪些好吃的|去{city}必吃什么|给我推荐{city}的美食",
    "What should I eat in {city}?|What food is {city} famous for?"
    "|What is the local food in {city}?|Recommend food in {city}"
    "|What are the local dishes of {city}?|What to eat in {city}|Tell me about the food in {city}"
    "|What dishes should I try in {city}?"
    "|What is good to eat in {city}?|What local food does {city} have?|Food in {city}"
    "|What do people eat in {city}?|Best food in {city}?"
    "|What is the food like in {city}?|What snacks are there in {city}?"
    "|Any food recommendations for {city}?|I am in {city}, what should I eat?"
    "|Which dishes is {city} known for?|What are the specialties of {city}?",
    "What are the must-try foods in {city}?|Which local food should I try in {city}?|What is there to eat in {city}?",
)
_ask(
    "sights",
    "{city}有什么好玩的|{city}有什么景点|{city}有哪些景点|去{city}玩什么|{city}的著名景点"
    "|{city}的旅游景点有哪些|推荐{city}的景点|{city}有哪些好玩的地方"
    "|到{city}应该去哪里|{city}哪里好玩|{city}必去的景点|{city}值得去的地方有哪些|{city}景点推荐"
    "|在{city}可以去哪里玩|{city}有啥好玩的|去{city}看什么"
    "|{city}有什么名胜古迹|{city}好玩吗|{city}有什么可看的|给我推荐{city}的景点"
    "|我要去{city}，推荐几个景点|{city}旅游去哪里|介绍{city}的景点|{city}有什么地方可以逛",
    "{city}有什么值得看的景点|去{city}旅游要去哪些地方|推荐几个{city}好玩的地方",
    "What should I see in {city}?|What are the top sights in {city}?"
    "|What is there to do in {city}?|What to see in {city}"
    "|What are the famous sights in {city}?|Recommend places to visit in {city}"
    "|Where should I go in {city}?|What can I visit in {city}?"
    "|Tell me the attractions of {city}|Top attractions in {city}|Best places to visit in {city}"
    "|What are the attractions in {city}?"
    "|What should I do in {city}?|What can I see in {city}?|Which sights are in {city}?"
    "|I am going to {city}, what should I see?"
    "|Things to do in {city}|List the sights of {city}|Name the attractions of {city}"
    "|Tell me some sights in {city}|Sightseeing in {city}|What are the must-see places in {city}?"
    "|What tourist attractions are there in {city}?",
    "Which places should I visit in {city}?|What are the main attractions in {city}?|Name some sights in {city}",
)
_ask(
    "season",
    "什么时候去{city}最好|{city}什么季节去最好|几月去{city}好|去{city}的最佳时间"
    "|{city}最佳旅游时间|{city}什么时候去合适|{city}哪个季节最美"
    "|去{city}玩什么时候好|什么时候适合去{city}|哪个季节适合去{city}|{city}几月份去好"
    "|{city}最适合什么季节去|何时去{city}最好|{city}最佳旅游季节是什么时候"
    "|{city}什么时候最好玩|什么季节去{city}|{city}哪个月去最合适",
    "什么时候去{city}旅游最合适|{city}最好的旅游季节是哪个|几月份去{city}最好",
    "When is the best time to visit {city}?|What is the best season to visit {city}?"
    "|When should I go to {city}?|Best time to visit {city}?"
    "|Which season is best for {city}?|When is a good time to travel to {city}?"
    "|What is the best time of year for {city}?"
    "|What time of year should I visit {city}?|Which month is best for {city}?"
    "|When should I visit {city}?|Best season for {city}?"
    "|In which season should I go to {city}?|When is it best to go to {city}?|When to visit {city}",
    "What's the best time to go to {city}?|Which season should I visit {city} in?|When is {city} at its best?",
)
_ask(
    "worth",
    "{city}值得去吗|{city}值得一去吗|我应该去{city}吗|{city}适合旅游吗|去{city}旅游好吗"
    "|{city}好不好玩|推荐去{city}吗|{city}值得玩吗|{city}适合去玩吗"
    "|你觉得{city}值得去吗|我想去{city}，值得吗|为什么要去{city}|要不要去{city}|去{city}玩怎么样",
    "{city}值不值得去|{city}是不是值得去旅游",
    "Is {city} worth visiting?|Should I visit {city}?|Should I go to {city}?"
    "|Why should I visit {city}?|Is {city} a good place to travel?"
    "|Is {city} good for a trip?|Is it worth going to {city}?|Would you recommend {city}?"
    "|Do you recommend {city}?|Is {city} worth a trip?"
    "|Is {city} nice to visit?|Why visit {city}?|Why go to {city}?",
    "Is {city} worth seeing?|Would you recommend going to {city}?",
)
_ask(
    "plan",
    "{city}怎么玩|{city}旅游攻略|{city}两日游怎么安排|给我一份{city}的旅游计划"
    "|帮我安排{city}的行程|去{city}玩两天怎么安排|{city}行程推荐|{city}攻略"
    "|制定一个{city}旅行计划|{city}两天怎么玩|做一个{city}的旅游攻略|我想去{city}玩，怎么安排"
    "|周末去{city}怎么玩|{city}旅行怎么安排|规划一下{city}之旅|我想去{city}旅游",
    "帮我做一份{city}旅游攻略|{city}两天的行程怎么安排|给我安排一下{city}的旅行",
    "Plan a trip to {city}|Give me an itinerary for {city}|Plan two days in {city}"
    "|How should I spend two days in {city}?|Make a travel plan for {city}"
    "|Two days in {city}|I want to travel to {city}|Help me plan a trip to {city}"
    "|What is a good itinerary for {city}?|A weekend in {city}"
    "|Plan a weekend in {city}|Travel guide for {city}|I am going to {city} for two days"
    "|Make an itinerary for {city}|{city} travel guide",
    "Create a travel plan for {city}|Help me plan two days in {city}|Plan my trip to {city}",
)
_SIGHT = (
    intent(
        "city.sight",
        CHINESE,
        "介绍一下{sight}|介绍{sight}|{sight}怎么样|说说{sight}|{sight}是什么地方|{sight}在哪里"
        "|{sight}在哪|{sight}在哪个城市|{sight}在什么地方|{sight}位于哪里|哪里有{sight}"
        "|{sight}是哪里的景点|去哪里能看到{sight}|{sight}在中国哪里"
        "|{sight}位于哪个城市|我想去{sight}|想看{sight}去哪里|{sight}是哪个城市的"
        "|看{sight}要去哪个城市|告诉我{sight}在哪里|{sight}",
        "{sight}在哪座城市|想去{sight}应该去哪个城市|你知道{sight}在哪里吗",
    ),
    intent(
        "city.sight",
        ENGLISH,
        "Tell me about {sight}|What is {sight}?|Introduce {sight}|Describe {sight}|Where is {sight}?"
        "|Which city is {sight} in?|Where can I see {sight}?"
        "|In which city is {sight}?|Where can I find {sight}?|Where do I find {sight}?"
        "|To which city should I go to see {sight}?"
        "|What city is {sight} in?|Where is {sight} located?|Which city has {sight}?"
        "|Where should I go to see {sight}?|I want to see {sight}"
        "|Where in China is {sight}?|I want to visit {sight}|Tell me where {sight} is"
        "|Do you know where {sight} is?|{sight}",
        "In what city can I find {sight}?|Which city should I go to for {sight}?|Which Chinese city has {sight}?",
    ),
)
_ABOUT_AGAIN = (
    "那{city}呢|{city}呢|再说说{city}|那么{city}呢|换成{city}呢|如果是{city}呢",
    "And {city}?|What about {city}?|How about {city}?|{city}?|Then {city}?|And what about {city}?",
)
AGAIN = tuple(intent("city.again", language, text, dressed=False) for language, text in enumerate(_ABOUT_AGAIN))
_THERE = {
    "food": (
        "那里有什么好吃的|那里有什么美食|那边吃什么好|有什么好吃的|当地有什么美食|去那里吃什么"
        "|它的美食有哪些|有什么小吃",
        "What should I eat there?|And the food?|What about the food there?|What food is there?"
        "|What is good to eat there?|And the local food?",
    ),
    "sights": (
        "那里有什么好玩的|那里有什么景点|有哪些景点|那边去哪里玩|去那里看什么|有什么好玩的地方"
        "|它有哪些景点|有什么好玩的",
        "What should I see there?|What can I do there?|And the sights?|What are the top sights there?"
        "|What is there to see?|Any sights there?",
    ),
    "season": (
        "什么时候去最好|什么时候去合适|几月去那里好|哪个季节去好|最佳旅游时间是什么时候|那里什么时候去最好",
        "When should I go there?|When is the best time to go?|What is the best season to go there?"
        "|When should I visit?|When to go?",
    ),
    "place": (
        "它在哪里|那里在哪个省|它在哪个省|在什么地方",
        "Where is it?|Which province is it in?|Where is it located?|And where is it?",
    ),
    "plan": (
        "怎么玩|帮我安排一下行程|那里两天怎么玩|做个攻略",
        "Plan a trip there|How should I spend two days there?|Make a plan for me",
    ),
}
THERE = {
    name: tuple(intent(f"city.there.{name}", language, text, dressed=False) for language, text in enumerate(texts))
    for name, texts in _THERE.items()
}


def _listed(language: int, items: tuple[tuple[str, str], ...]) -> str:
    names = [item[language] for item in items]
    between, last = (("、", "和"), (", ", " and "))[language]
    return between.join(names[:-1]) + last + names[-1]


def _food_sentence(city: City, language: int) -> str:
    food = _listed(language, city.food)
    return (f"当地美食有{food}。", f"Try local food such as {food}.")[language]


def answer(name: str, city: City, language: int) -> str:
    """The one answer to the intent `name` for a city; every question that means it gets this answer."""
    here, place, known, season = (pair[language] for pair in (city.name, city.place, city.known, city.season))
    sights = _listed(language, city.sights)
    if language == CHINESE:
        if name == "about":
            return f"{here}{place}，以{known}闻名。主要景点有{sights}。{_food_sentence(city, language)}最佳旅游时间是{season}。"
        if name == "plan":
            first, second, third, fourth = (sight[CHINESE] for sight in city.sights)
            return (
                f"{here}两日游可以这样安排：\n第一天：上午去{first}，下午去{second}，晚上尝尝{city.food[0][0]}。\n"
                f"第二天：上午去{third}，下午去{fourth}，再吃点{city.food[1][0]}。\n建议在{season}去。"
            )
        return {
            "one_sentence": f"{here}{place}，以{known}闻名。",
            "place": f"{here}{place}。",
            "known": f"{here}以{known}闻名。",
            "food": f"在{here}可以尝尝{_listed(language, city.food)}。",
            "sights": f"{here}的主要景点有{sights}。",
            "season": f"去{here}的最佳时间是{season}。",
            "worth": f"{here}很值得去！它以{known}闻名，可以看看{city.sights[0][0]}，尝尝{city.food[0][0]}。",
        }[name]
    if name == "about":
        return (
            f"{here} is {place}, known for {known}. Top sights include {sights}. "
            f"{_food_sentence(city, language)} The best time to visit is {season}."
        )
    if name == "plan":
        first, second, third, fourth = (sight[ENGLISH] for sight in city.sights)
        return (
            f"Here is a two-day plan for {here}:\nDay 1: visit {first} in the morning and {second} in the afternoon, "
            f"then try {city.food[0][1]}.\nDay 2: visit {third} in the morning and {fourth} in the afternoon, "
            f"then try {city.food[1][1]}.\nThe best time to go is {season}."
        )
    return {
        "one_sentence": f"{here} is {place}, known for {known}.",
        "place": f"{here} is {place}.",
        "known": f"{here} is known for {known}.",
        "food": f"In {here}, try {_listed(language, city.food)}.",
        "sights": f"Top sights in {here} include {sights}.",
        "season": f"The best time to visit {here} is {season}.",
        "worth": f"Yes, {here} is worth a visit! It is known for {known}. "
        f"See {city.sights[0][1]} and try {city.food[0][1]}.",
    }[name]


def sight_answer(sight: tuple[str, str], city: City, language: int) -> str:
    """Where a sight is."""
    here, place = city.name[language], city.place[language]
    if language == CHINESE:
        return f"{sight[CHINESE]}在{here}。{here}{place}。"
    name = sight[ENGLISH]
    verb = (
        "are"
        if name.split()[-1] in {"Caves", "Grottoes", "Terraces", "Pagodas", "Hills", "Avenues", "Ruins", "Dunes"}
        else "is"
    )
    if name == "the Ruins of St. Paul's":
        verb = "are"
    place = place if place.startswith("in ") else f"which is {place}"
    if name == "the Western Hills of Kunming":
        verb = "are"
    return f"{name[0].upper()}{name[1:]} {verb} in {here}, {place.removeprefix('in ')}."


def ask_city(rng: random.Random, split: str, slip: bool = False) -> Turn:
    """A question about one city, in one of its meanings."""
    language = rng.randrange(2)
    city = rng.choice(CITIES)
    name = rng.choice(tuple(_INTENTS))
    return ask_about(rng, split, name, city, language, slip)


def ask_about(rng: random.Random, split: str, name: str, city: City, language: int, slip: bool = False) -> Turn:
    """A question that means `name` about this city."""
    shown = city.name[language]
    if language == CHINESE and split != HELD_OUT and rng.random() < 0.06:
        shown = city.name[ENGLISH]
    if split != HELD_OUT and rng.random() < 0.3:
        shown = shown.replace("'", "")  # Xian
    question, phrasing = phrase(rng, _INTENTS[name][language], split, slip, city=shown)
    return Turn("city facts", question, answer(name, city, language), ("phrasing", phrasing), language)


def ask_sight(rng: random.Random, split: str, slip: bool = False) -> Turn:
    """A question for the city that a sight is in."""
    language = rng.randrange(2)
    city = rng.choice(CITIES)
    sight = rng.choice(city.sights)
    shown = sight[language]
    if language == ENGLISH and rng.random() < 0.3:
        shown = shown.removeprefix("the ")
    question, phrasing = phrase(rng, _SIGHT[language], split, slip, sight=shown)
    return Turn("sights", question, sight_answer(sight, city, language), ("phrasing", phrasing), language)


def conversation(rng: random.Random) -> list[Turn]:
    """Several turns about one city or two, the later ones leaning on what was said before."""
    language = rng.randrange(2)
    city = rng.choice(CITIES)
    name = rng.choice(tuple(_INTENTS))
    turns = [ask_about(rng, "train", name, city, language)]
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.4 and name != "plan":
            city = rng.choice(CITIES)
            question, phrasing = phrase(rng, AGAIN[language], "train", city=city.name[language])
        else:
            name = rng.choice(tuple(THERE))
            question, phrasing = phrase(rng, THERE[name][language], "train")
        turns.append(Turn("follow-ups", question, answer(name, city, language), ("phrasing", phrasing), language))
    return turns


ALL_INTENTS = [*(one for pair in _INTENTS.values() for one in pair), *_SIGHT]
