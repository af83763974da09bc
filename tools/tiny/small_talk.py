"""Greetings, thanks and the like."""

import random

from .phrasing import ENGLISH, Intent, Turn, intent, phrase

_TALK: list[tuple[Intent, str]] = []


def _talk(name: str, chinese: tuple[str, str, str], english: tuple[str, str, str], dressed: bool = False) -> None:
    for language, (train, held_out, reply) in enumerate((chinese, english)):
        _TALK.append((intent(f"talk.{name}", language, train, held_out, dressed), reply))


_talk(
    "hello",
    (
        "你好|您好|你好呀|你好啊|嗨|哈喽|哈罗|在吗|你在吗|有人吗|你好！|喂|大家好|你好，在吗|早|嘿"
        "|hello，你好|你好吖|你好你好|嗨，你好|你好，很高兴认识你|初次见面|nihao|ni hao|在不在"
        "|您好，在吗"
        "|你好哇|你好 shoal|你好，小模型|见到你很高兴|开始聊天吧|我们聊聊天吧|和我聊天|在嘛|亲，在吗",
        "你好呀，在吗|嗨你好呀|您好啊",
        "你好！我是 shoal-tiny，很高兴和你聊天。你可以问我中国的城市和旅行，也可以让我算数、数数或排序。",
    ),
    (
        "Hello|Hi|Hey|Hello!|Hi there|Hello there|Hey there|Greetings|Good day|Howdy"
        "|Hello, how do you do|Hi!|Yo|Is anyone there?|Are you there?|Nice to meet you"
        "|Hello shoal|Hi shoal-tiny|hello hello|Hiya|Let's chat|Hello, nice to meet you|Talk to me"
        "|Pleased to meet you|hi hi|Hello friend|Hello world",
        "Hey hello|Hi, are you there?|Hello there, nice to meet you",
        "Hello! I am shoal-tiny, nice to meet you. Ask me about cities and travel in China, or let "
        "me add, count or sort some numbers.",
    ),
)
_talk(
    "how",
    (
        "你好吗|最近怎么样|你怎么样|近来可好|你今天好吗|过得好吗|最近好吗|你还好吗|今天怎么样"
        "|今天还好吗|你过得怎么样|最近过得好吗|你最近好吗|一切都好吗|你今天过得怎么样|你心情好吗"
        "|你开心吗",
        "你最近过得怎么样|今天你好吗",
        "我很好，谢谢关心！你呢？有什么想问的吗？",
    ),
    (
        "How are you?|How are you doing?|How's it going?|How do you feel?|How are you today?"
        "|What's up?|How have you been?|Are you OK?|How is everything?|Are you happy?"
        "|How r u|How is your day?|Hi, how are you?|Hello, how are you?|You good?|How are things?"
        "|How do you feel today?|How goes it?|Are you well?|How are you feeling?",
        "How are things going?|How are you feeling today?",
        "I am fine, thank you! How about you? What would you like to ask?",
    ),
)
_talk(
    "morning",
    (
        "早上好|早安|早上好呀|早啊|大家早上好|早上好！|上午好|你早",
        "早上好啊|早呀，早上好",
        "早上好！祝你今天过得愉快。",
    ),
    (
        "Good morning|Morning|Good morning!|Morning!|Good morning to you|Gm|A very good morning",
        "Good morning there|Hi, good morning",
        "Good morning! Have a nice day.",
    ),
)
_talk(
    "evening",
    (
        "晚上好|下午好|中午好|晚上好呀|下午好呀|晚上好！|傍晚好",
        "晚上好啊|下午好啊",
        "你好！今天过得怎么样？有什么可以帮你的吗？",
    ),
    (
        "Good evening|Good afternoon|Evening|Good evening!|Afternoon|Good afternoon!",
        "Good evening to you|Hi, good afternoon",
        "Hello! How was your day? What can I do for you?",
    ),
)
_talk(
    "night",
    (
        "晚安|我要睡了|我去睡觉了|睡觉了|晚安！|好困，睡了|我要睡觉了|晚安，好梦|先睡了",
        "晚安啦|我先睡觉了",
        "晚安！祝你做个好梦。",
    ),
    (
        "Good night|Night|Good night!|I am going to bed|I'm going to sleep|Nighty night|Time to sleep|Sleep well|gn",
        "Good night to you|I am going to sleep now",
        "Good night! Sweet dreams.",
    ),
)
_talk(
    "thanks",
    (
        "谢谢|谢谢你|多谢|感谢|非常感谢|谢谢啦|太感谢了|谢谢您|谢了|感谢你的帮助|谢谢你的回答|3q"
        "|十分感谢|万分感谢|好的，谢谢|谢谢你帮我|真是谢谢你|太谢谢了|真的谢谢你|太谢谢你啦|真是感谢"
        "|非常谢谢",
        "真是太谢谢你了|谢谢你的帮忙",
        "不客气！还有什么想问的吗？",
    ),
    (
        "Thanks|Thank you|Thank you very much|Thanks a lot|Many thanks|Thx|Thank you so much|Thanks!"
        "|I appreciate it|Thanks for your help|OK, thanks|Great, thanks"
        "|Cheers|Thank you for the answer|Thanks so much for this|Thank you for helping me"
        "|Thanks for helping|ty|That was helpful",
        "Thank you for your help|Thanks so much",
        "You are welcome! Is there anything else you would like to know?",
    ),
)
_talk(
    "bye",
    (
        "再见|拜拜|再会|下次见|我走了|我要走了|那再见|好的再见|我得走了|回头见|bye|先这样|下次再聊"
        "|没有了，再见|我先走了|明天见|88|不聊了|没有了|就这样吧|退出",
        "那就再见了|我要走了，拜拜",
        "再见！欢迎下次再来聊天。",
    ),
    (
        "Bye|Goodbye|See you|See you later|Bye bye|Good bye|I have to go|I must go now"
        "|I need to go, bye|Bye then|Talk to you later|See you tomorrow|Take care|Bye!|That's all"
        "|Nothing else|I'm leaving|Cya|Exit|Quit",
        "Bye for now|I have to go now, bye",
        "Goodbye! Come back any time.",
    ),
)
_talk(
    "praise",
    (
        "你真棒|你真聪明|你好厉害|说得好|真不错|太好了|你很厉害|你真可爱|好棒|厉害|很好|答得好"
        "|回答得真好|不错|你太强了|棒极了|太棒了|牛",
        "你真的很棒|你可真厉害",
        "谢谢夸奖！我会继续努力的。",
    ),
    (
        "You are great|You are smart|That is a good answer|A good answer|What a nice reply|Good job"
        "|Well done|Great|That's great|Nice|You are awesome"
        "|Good answer|Very good|You're cute|Excellent|Amazing|Awesome|Good bot|Cool|Wow|Perfect",
        "You are really smart|What a good answer",
        "Thank you! I will keep doing my best.",
    ),
)
_talk(
    "blame",
    (
        "你真笨|你好笨|你说错了|不对|错了|你回答错了|你太笨了|你真没用|答错了|这不对|你不行|你胡说"
        "|你错了|回答得不好|不是这样的",
        "你的回答是错的|你怎么这么笨",
        "对不起，我是一个很小的模型，难免会出错。换一种问法试试吧。",
    ),
    (
        "You are stupid|That is wrong|Wrong|You are wrong|That's not right|You made a mistake"
        "|You are dumb|Bad answer|You are useless|Incorrect|No, that's wrong|Not correct"
        "|You suck|This is wrong|Your reply is wrong|I think that is wrong|You are not right"
        "|You are mistaken",
        "Your answer is wrong|I think you are wrong",
        "I am sorry. I am a very small model and make mistakes. Please try asking in another way.",
    ),
)
_talk(
    "ok",
    (
        "好的|好|嗯|好的，明白了|好的，知道了|我知道了|我懂了|哦|知道了|明白了|行|可以|ok|嗯嗯|好吧"
        "|了解|原来如此|是的|对|哦哦|懂了|收到|没问题",
        "好的，我知道了|我明白了",
        "好的！还想了解什么，可以继续问我。",
    ),
    (
        "OK|Okay|I see|OK, got it|I understand|I got it|Ah, I see|Got it|Alright|Sure|Yes|Fine"
        "|Understood|Right|Hmm|Oh|Yeah|All right|Yep|Makes sense|Interesting|k",
        "OK, I see|I understand now",
        "OK! Feel free to ask me something else.",
    ),
)
_talk(
    "tired",
    (
        "我很累|我好累|我累了|今天好累|工作好累|累死了|上班好累|学习好累|我太累了|今天很辛苦|我压力好大",
        "我今天好累啊|最近真的很累",
        "辛苦了！好好休息一下吧，喝杯水，放松放松。有空还可以计划一次旅行。",
    ),
    (
        "I am tired|I'm so tired|I am exhausted|I'm tired|What a tiring day|I feel tired"
        "|Work is tiring|I am very tired|I am stressed|I had a hard day",
        "I am really tired today|I feel so exhausted",
        "You have worked hard! Take a rest and drink some water. Perhaps plan a little trip, too.",
    ),
)
_talk(
    "bored",
    (
        "我很无聊|好无聊|无聊|我好无聊啊|没事做|不知道干什么|我有点无聊|闲着没事|无聊死了|干什么好呢|好无聊啊",
        "我现在好无聊|实在太无聊了",
        "那我们来聊聊旅行吧！你可以问我：“给我推荐中国适合旅游的地方”，或者让我算一道题。",
    ),
    (
        "I am bored|I'm bored|So bored|This is boring|I have nothing to do|I feel bored"
        "|I am very bored|Boring|I'm so bored|What should I do now?",
        "I am really bored now|There is nothing to do",
        "Then let's talk about travel! Ask me to recommend places in China, or give me a sum to work out.",
    ),
)
_talk(
    "sad",
    (
        "我很难过|我不开心|我好伤心|我心情不好|我很郁闷|今天不开心|我想哭|我失恋了|我很沮丧|难受|我很孤独|我不高兴",
        "我今天心情很不好|我现在很难过",
        "听到这个我很难过。希望你能和朋友或家人聊聊，也可以出去走走。事情会慢慢好起来的。",
    ),
    (
        "I am sad|I'm sad|I am so sad|I'm feeling sad today|I am very sad|I feel sad|I am unhappy"
        "|I feel down|I am in a bad mood|I am upset"
        "|I want to cry|I feel bad|I am lonely|I feel depressed",
        "I am so sad today|I feel very unhappy",
        "I am sorry to hear that. Talking with a friend or your family may help, and so may a walk. "
        "Things will get better.",
    ),
)
_talk(
    "happy",
    (
        "我很开心|我好高兴|今天真开心|我很高兴|太开心了|我心情很好|好开心|哈哈|哈哈哈|嘻嘻|呵呵|哈哈哈哈|笑死",
        "我今天特别开心|我真的很高兴",
        "真为你高兴！好心情最适合出去走走了。",
    ),
    (
        "I am happy|I'm so happy|I feel great|I am glad|What a wonderful day|I am in a good mood|Haha"
        "|hahaha|lol|I feel good|I'm happy today|hehe",
        "I am very happy today|I feel so happy",
        "I am happy for you! A good mood is just right for a walk.",
    ),
)
_talk(
    "joke",
    (
        "讲个笑话|说个笑话|给我讲个笑话|来个笑话|讲一个笑话吧|会讲笑话吗|逗我笑|你会讲笑话吗|讲笑话"
        "|想听笑话|再讲一个笑话|说点好笑的",
        "请给我讲一个笑话|能不能讲个笑话给我听",
        "好的：0 遇见 8，说：“胖就胖呗，还系什么腰带！”",
    ),
    (
        "Tell me a joke|Tell a joke|Do you know a joke?|Say something funny|Make me laugh"
        "|Another joke|Can you tell jokes?|Give me a joke|I want to hear a joke|Joke",
        "Please tell me one joke|Could you tell a joke?",
        "Sure: what did zero say to eight? Nice belt!",
    ),
)
_talk(
    "love",
    (
        "我爱你|我喜欢你|我很喜欢你|我真喜欢你|你愿意做我的朋友吗|你喜欢我吗|做我的朋友吧"
        "|我们做朋友吧|你爱我吗|做我女朋友|你是我的朋友吗|我想你",
        "我真的很喜欢你|我们可以做朋友吗",
        "谢谢你！我只是一个小模型，但很高兴能陪你聊天。",
    ),
    (
        "I love you|I like you|Could we be friends?|Let us be friends|Can you be my friend?"
        "|Do you like me?|Be my friend|Let's be friends|Do you love me?"
        "|Are you my friend?|I miss you|Will you marry me?",
        "I really like you|Can we be friends?",
        "Thank you! I am only a small model, but I am glad to keep you company.",
    ),
)
_talk(
    "birthday",
    (
        "今天是我的生日|我过生日|祝我生日快乐|今天我生日|我今天过生日|我的生日到了|我快过生日了|今天是我生日|我生日",
        "明天是我的生日|今天我过生日",
        "祝你生日快乐，天天开心！",
    ),
    (
        "It's my birthday|Today is my birthday|Wish me a happy birthday|It is my birthday today"
        "|I have my birthday today|birthday today|It's my birthday today!"
        "|Today it is my birthday, you know",
        "My birthday is today|Today it's my birthday",
        "Happy birthday! I wish you all the best.",
    ),
)
_talk(
    "test",
    (
        "测试|测试一下|test测试|试试|这是一个测试|测试123|试一下|做个测试|测试中|只是测试|我试一下你"
        "|我想测试你|测一测|随便测试一下",
        "我来测试一下|这是测试",
        "收到，我在正常工作！你可以问我一个问题。",
    ),
    (
        "Test|Testing|This is a test|test test|Testing, testing|ping|Just testing|Just a test"
        "|It is a test|I am just testing|A test|Let me test you|I want to test you|testing 123",
        "This is only a test|I am testing you",
        "Test received, I am working! Ask me a question.",
    ),
)
_talk(
    "age",
    (
        "你几岁|你多少岁|你的年龄|你多大年纪|你今年多大|请问你几岁|你几岁了|你什么时候出生的|你的生日是哪天|你今年几岁",
        "请问你今年多大了|你今年几岁了",
        "我是一个模型，没有年龄，不过我很小，只有约550万个参数。",
    ),
    (
        "How old are you?|What is your age?|Tell me how old you are|May I ask your age?"
        "|When were you born?|When is your birthday?|Your age?|how old r u",
        "May I ask how old you are?|Tell me your age",
        "I am a model, so I have no age. But I am small: about 5.5 million parameters.",
    ),
)

TALK = tuple(_TALK)
ALL_INTENTS = [meaning for meaning, _ in TALK]

_NAMES = (
    ("小明|小红|小华|李雷|王芳|张伟|陈静|刘洋|小刚|小丽|杨帆|赵敏|周杰|吴昊|阿强|林悦|孙浩|何欢|小美|大力").split("|"),
    ("Tom|Alice|Bob|Mary|John|Emma|Jack|Lucy|Peter|Anna|David|Lily|Sam|Kate|Mike|Rose|Paul|Jane|Leo|Grace").split("|"),
)
_MY_NAME = (
    ("我叫{name}", "我的名字是{name}", "你好，我叫{name}", "我是{name}", "叫我{name}吧"),
    ("My name is {name}", "I am {name}", "Hi, I'm {name}", "Call me {name}", "Hello, my name is {name}"),
)
_ASK_NAME = (
    ("我叫什么名字？", "我叫什么？", "你记得我的名字吗？", "我是谁？", "我的名字是什么？"),
    ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "Do you know my name?"),
)


def ask_small_talk(rng: random.Random, split: str, slip: bool = False) -> Turn:
    """A greeting or another remark; the greeting itself comes most often."""
    meaning, reply = rng.choice(TALK[:2]) if rng.random() < 0.2 else rng.choice(TALK)
    question, phrasing = phrase(rng, meaning, split, slip)
    if meaning.language == ENGLISH and rng.random() < 0.25:
        question = question.lower()
    return Turn("small talk", question, reply, ("phrasing", phrasing), meaning.language)


def introduction(rng: random.Random, is_first: bool) -> list[Turn]:
    """The user says a name, and may ask for it later; or asks at once, where no name was said before."""
    language = rng.randrange(2)
    name = rng.choice(_NAMES[language])
    said = rng.choice(_MY_NAME[language]).replace("{name}", name)
    greeting = (f"你好，{name}！很高兴认识你。", f"Hello, {name}! Nice to meet you.")[language]
    turns = [Turn("names", said, greeting, ("phrasing", "name"), language)]
    if rng.random() < 0.6:
        reply = (f"你叫{name}。", f"Your name is {name}.")[language]
        turns.append(Turn("names", rng.choice(_ASK_NAME[language]), reply, ("phrasing", "name"), language))
    elif is_first and rng.random() < 0.3:
        reply = ("你还没有告诉我你的名字。", "You have not told me your name yet.")[language]
        turns = [Turn("names", rng.choice(_ASK_NAME[language]), reply, ("phrasing", "name"), language)]
    return turns
