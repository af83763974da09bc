"""Questions that a model of this size cannot answer, and the polite answer that says so."""

import random

from .phrasing import CHINESE, ENGLISH, Turn
from .splits import HELD_OUT, matches

DECLINE = (
    "抱歉，这个问题超出了我的能力，我只是一个很小的模型。我可以介绍中国的城市和旅行、"
    "做简单的加减法、数数、排序、重复文字，或者介绍 Shoal。",
    "Sorry, that is beyond me: I am a very small model. I can tell you about Chinese cities and "
    "travel, add and subtract, count, sort, "
    "repeat text, or explain what Shoal is.",
)

_FRAMES = (
    "写一首关于{topic}的诗|写一篇关于{topic}的文章|解释一下{topic}|什么是{topic}|{topic}是什么"
    "|{topic}的原理是什么|给我讲讲{topic}|{topic}怎么学|怎么学习{topic}|{topic}是谁发明的"
    "|{topic}的历史|为什么会有{topic}|帮我写一个{topic}的程序|{topic}有什么用|{topic}多少钱"
    "|哪里可以买到{topic}|怎么做{topic}|{topic}好不好|你怎么看{topic}|{topic}的未来如何"
    "|告诉我{topic}的最新消息|今天的{topic}怎么样|分析一下{topic}|写一个关于{topic}的故事"
    "|翻译：{topic}|{topic}的英文怎么说|如何提高{topic}|比较一下{topic}|{topic}有哪些种类"
    "|推荐一本关于{topic}的书|推荐几部关于{topic}的电影|你喜欢{topic}吗|介绍一下{topic}"
    "|介绍{topic}|说说{topic}|谁是{topic}|{topic}在哪里|{topic}|用一句话介绍{topic}"
    "|{topic}为什么重要"
    "|我想学{topic}|{topic}难吗|关于{topic}你知道什么|给我推荐{topic}|推荐{topic}|为什么{topic}"
    "|怎样{topic}|{topic}的作者是谁|帮我画{topic}|{topic}什么时候出现的".split("|"),
    "Write a poem about {topic}|Write an essay about {topic}|Explain {topic}|What is {topic}?"
    "|How does {topic} work?|Tell me about {topic}|How do I learn {topic}?"
    "|Who invented {topic}?|What is the history of {topic}?|Why does {topic} exist?"
    "|Write a program for {topic}|What is {topic} used for?|How much does {topic} cost?"
    "|Where can I buy {topic}?|How do I make {topic}?|Is {topic} good?"
    "|What do you think about {topic}?|What is the future of {topic}?"
    "|Tell me the latest news about {topic}"
    "|How is {topic} today?|Analyze {topic}|Write a story about {topic}"
    "|Translate {topic} into French|How can I improve {topic}?|Compare {topic} and something else"
    "|What kinds of {topic} are there?|Recommend a book about {topic}"
    "|Recommend a movie about {topic}|Do you like {topic}?|Describe {topic}|Who is {topic}?"
    "|Where is {topic}?|{topic}|Describe {topic} in one sentence|Why is {topic} important?"
    "|I want to learn {topic}|Is {topic} difficult?|What do you know about {topic}?"
    "|Recommend {topic}|How to {topic}|Who wrote {topic}?|Draw {topic}|When did {topic} begin?"
    "|Introduce {topic}|Define {topic}|Can you explain {topic}?"
    "|Give me an example of {topic}|Summarize {topic}|What does {topic} mean?"
    "|Should I buy {topic}?".split("|"),
)
_TOPICS = (
    "量子力学|相对论|黑洞|人工智能|机器学习|神经网络|区块链|比特币|股票|基金|房价|经济|政治|法律"
    "|医学|癌症|感冒|减肥|健身|瑜伽|足球|篮球|世界杯|奥运会|电影|电视剧|音乐|钢琴|吉他|绘画"
    "|摄影|小说|诗歌|红楼梦|三国演义|西游记|水浒传|李白|鲁迅文学|莎士比亚|爱因斯坦|牛顿|达尔文"
    "|马斯克|乔布斯|恐龙|大象|鲸鱼|猫|狗|鸟类|昆虫|植物|玫瑰|森林|沙漠化|海洋污染|气候变化"
    "|全球变暖"
    "|地震|台风|火山|太阳系|月球|火星|银河|宇宙|时间旅行|外星人|机器人|无人机|电动车|汽车|飞机"
    "|火箭|卫星|手机|电脑|芯片|操作系统|编程|算法|数据库|网络安全|病毒|密码学|微积分|线性代数"
    "|几何"
    "|概率论|统计学|物理|化学|生物|地理|哲学|心理学|社会学|教育|高考|考研|英语|法语|日语|韩语"
    "|德语|面试|简历|工作|创业|营销|广告|管理|会计|税|保险|贷款|结婚|恋爱|离婚|育儿|婴儿|睡眠"
    "|失眠|头痛"
    "|发烧|牙疼|疫苗|蛋糕|面包|咖啡|红酒|巧克力|披萨|汉堡|寿司|意大利面|冰淇淋|巴黎|伦敦|纽约"
    "|东京|首尔|罗马|柏林|莫斯科|悉尼|曼谷|新加坡|洛杉矶|旧金山|芝加哥|多伦多|开罗|马德里|迪拜"
    "|孟买"
    "|美国|英国|法国|德国|日本|韩国|印度|巴西|俄罗斯|加拿大|澳大利亚|埃及|意大利|西班牙|墨西哥"
    "|拿破仑|罗马帝国|文艺复兴|工业革命|二战|冷战|埃及金字塔|埃菲尔铁塔|自由女神|富士山|天气|新闻"
    "|时间|日期|汇率"
    "|彩票|星座|算命|梦|鬼|游戏|王者荣耀|原神|围棋|象棋|扑克|魔术|跳舞|唱歌|游泳|跑步|登山装备"
    "|钓鱼|种花|装修|家具|衣服|鞋子|手表|珠宝|化妆品|护肤|发型|正则表达式|快速排序|二叉树|Python"
    "|Java|Linux"
    "|Excel|微信|抖音|谷歌|苹果公司|特斯拉|华为|云计算|量子计算机|核能|太阳能|风力发电|石油|黄金"
    "|钻石|货币|通货膨胀|民主|自由|幸福|生命的意义|死亡|灵魂|宗教|佛教|基督教|神话|希腊神话|童话"
    "|龙".split("|"),
    "quantum physics|relativity|black holes|artificial intelligence|machine learning"
    "|neural networks|blockchain|bitcoin|the stock market|house prices|economics|politics|law"
    "|medicine|cancer|a cold|losing weight|fitness|yoga|football|basketball|the World Cup"
    "|the Olympics|movies|music|the piano|the guitar|painting|photography|novels|poetry"
    "|Shakespeare|Einstein|Newton|Darwin|Elon Musk|Steve Jobs|Harry Potter|dinosaurs|elephants"
    "|whales|cats|dogs|birds|insects|plants|roses|forests|deserts|the ocean"
    "|climate change|global warming|earthquakes|storms|volcanoes|the solar system|the moon|Mars"
    "|the galaxy|the universe|time travel|aliens|robots|drones|electric cars"
    "|cars|airplanes|rockets|satellites|phones|computers|chips|operating systems|programming"
    "|algorithms|databases|network security|viruses|cryptography|calculus"
    "|linear algebra|geometry|probability|statistics|physics|chemistry|biology|geography"
    "|philosophy|psychology|sociology|education|exams|French|Japanese|Korean|German"
    "|Spanish|job interviews|my resume|work|startups|marketing|advertising|management|accounting"
    "|taxes|insurance|loans|marriage|dating|divorce|parenting|babies|sleep"
    "|headaches|fever|vaccines|cake|bread|coffee|wine|chocolate|pizza|hamburgers|sushi|pasta"
    "|ice cream|Paris|London|New York|Tokyo|Seoul|Rome|Berlin|Moscow|Sydney"
    "|Bangkok|Singapore|Los Angeles|San Francisco|Chicago|Toronto|Cairo|Madrid|Dubai|Mumbai"
    "|America|England|France|Germany|Japan|Korea|India|Brazil|Russia|Canada"
    "|Australia|Egypt|Italy|Spain|Mexico|Napoleon|the Roman Empire|the Renaissance"
    "|the Industrial Revolution|World War II|the Cold War|the pyramids|the Eiffel Tower"
    "|the Statue of Liberty|Mount Fuji|the weather|the news|the time|the date|exchange rates"
    "|the lottery|horoscopes|fortune telling|dreams|ghosts|video games|Minecraft"
    "|chess|poker|magic|dancing|singing|swimming|running|fishing|gardening|furniture|clothes"
    "|shoes|watches|jewelry|makeup|skin care|regular expressions|quicksort"
    "|binary trees|Python|JavaScript|Linux|Excel|Google|Apple|Tesla|Microsoft|cloud computing"
    "|quantum computers|nuclear energy|solar power|wind power|oil|gold|diamonds"
    "|money|inflation|democracy|freedom|happiness|the meaning of life|death|the soul|religion"
    "|mythology|fairy tales|dragons|my homework|a birthday party|a sandwich".split("|"),
)
_WHOLE = (
    "今天天气怎么样|现在几点了|今天几号|今天星期几|明天会下雨吗|帮我写代码|帮我订机票|帮我订酒店"
    "|给我放一首歌|打开灯|今天有什么新闻|谁是美国总统|股票会涨吗|帮我写作业|帮我写一封邮件"
    "|写一首诗"
    "|写个故事|翻译成英文|帮我翻译一段话|画一幅画|我头疼怎么办|附近有什么餐馆|几点了"
    "|法国的首都是哪里|日本的首都是什么|世界上最高的山是什么|地球有多大|人为什么会做梦"
    "|天空为什么是蓝色的|水的化学式是什么"
    "|圆周率是多少|一年有多少天|1234加5678等于多少|12除以4等于多少|根号2是多少|解方程x+2=5"
    "|100除以5|今年是哪一年|你会写代码吗|你会画画吗|你会唱歌吗|你能上网吗|帮我查一下快递"
    "|你会下棋吗"
    "|写一个冒泡排序|什么手机好|怎么赚钱|我应该学什么专业|怎样才能成功|推荐一部电影|推荐一首歌"
    "|推荐一本书|今天吃什么|我该穿什么|讲个故事|唱首歌|给我写一份简历|怎么做红烧肉"
    "|人生的意义是什么"
    "|国外有什么好玩的地方|推荐国外旅游的地方|去欧洲旅游|去日本旅游怎么样|推荐日本适合旅游的地方"
    "|给我推荐美国好玩的地方".split("|"),
    "What is the weather today?|What time is it?|What day is it today?|Will it rain tomorrow?"
    "|Write some code|Book a flight for me|Book a hotel for me|Play a song"
    "|Turn on the light|What is in the news today?|Who is the president of the United States?"
    "|Will stocks go up?|Do my homework|Write an email|Write a poem|Write a story"
    "|Translate this into Chinese|Draw a picture|I have a headache, what should I do?"
    "|Which restaurants are nearby?|What is the capital of France?|What is the capital of Japan?"
    "|What is the highest mountain in the world?|How big is the Earth?|Why do we dream?"
    "|Why is the sky blue?|What is the formula of water?|What is pi?|How many days are in a year?"
    "|What is 1234 + 5678?|What is 12 divided by 4?|What is the square root of 2?|Solve x + 2 = 5"
    "|100 / 5|What year is it?|Can you write code?|Can you draw?|Can you sing?"
    "|Can you browse the internet?|Can you play chess?|Write bubble sort|Which phone is best?"
    "|How do I get rich?|What should I study?|How can I be successful?"
    "|Recommend a movie|Recommend a song|Recommend a book|What should I eat today?"
    "|What should I wear?|Tell me a story|Sing a song|Write my resume|How do I cook pasta?"
    "|What is the meaning of life?|Recommend places to travel in Europe"
    "|Where should I travel in Japan?|Recommend places to visit in America"
    "|Best places to visit in France"
    "|What is the capital of Germany?|What is the tallest building?|Who won the World Cup?"
    "|How far is the moon?|Write a Python function|Fix my code".split("|"),
)
_SYLLABLES = (
    "ba be bo ka ke ki lo la li mo ma mi na ni no ra ri ro sa si so ta ti to va ve vo za zu xu qi an en on el ar"
).split()
_CHARACTERS = (
    "石云山水木火金风雨雪花草竹林江海湖河田村龙虎马牛羊东西南北中上下大小长高青红白黑新安平永和明光天文武德仁义信"
)


def _invented(rng: random.Random, language: int) -> str:
    """A name that means nothing, so that any unknown name is declined."""
    if language == CHINESE:
        return "".join(rng.choice(_CHARACTERS) for _ in range(rng.randint(2, 3))) + rng.choice(
            ("", "", "市", "县", "镇", "山")
        )
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def _impossible_sum(rng: random.Random, language: int) -> str:
    """A division, or a sum of numbers that are too long."""
    if rng.random() < 0.5:
        a, b = rng.randint(1, 999), rng.randint(1, 99)
        return rng.choice(
            (f"{a}除以{b}等于多少", f"{a}÷{b}", f"{a}/{b}等于多少", f"{a} ÷ {b} =", f"计算{a}/{b}")
            if language == CHINESE
            else (
                f"What is {a} divided by {b}?",
                f"{a} / {b}",
                f"Divide {a} by {b}",
                f"What is {a} / {b}?",
                f"{a}/{b}=",
            )
        )
    a, b = (rng.randint(10**3, 10 ** rng.randint(4, 8)) for _ in range(2))
    if rng.random() < 0.5:
        b = rng.randint(0, 999)
    sign = rng.choice(("+", "-", " + ", " - ", "*", " × "))
    return rng.choice(
        (f"{a}{sign}{b}等于多少", f"{a}{sign}{b}", f"计算{a}{sign}{b}", f"{a}{sign}{b}=")
        if language == CHINESE
        else (f"What is {a}{sign}{b}?", f"{a}{sign}{b}", f"Calculate {a}{sign}{b}", f"{a}{sign}{b} =")
    )


def ask_out_of_scope(rng: random.Random, split: str) -> Turn:
    """A question beyond the model: its topic, which the held-out side never shares, and a frame around it."""
    language = rng.randrange(2)
    while True:
        choice = rng.random()
        if choice < 0.06:
            question = topic = _impossible_sum(rng, language)
        elif choice < 0.22:
            question = rng.choice(_WHOLE[language])
            topic = question
        else:
            topic = rng.choice(_TOPICS[language]) if choice < 0.75 else _invented(rng, language)
            if split != HELD_OUT and rng.random() < 0.15:
                topic += ("和", " and ")[language] + rng.choice(_TOPICS[language])
            question = rng.choice(_FRAMES[language]).replace("{topic}", topic)
        parts = topic.split((" and ", "和")[language == CHINESE])
        if all(matches(split, "topic", part) for part in parts):
            break
    if split != HELD_OUT:
        if rng.random() < 0.35:
            question = question.rstrip("?？") + rng.choice(
                (("？", "。", "", "吗", "呢", "，谢谢"), ("?", ".", "", "!", ", please", " please?"))[language]
            )
        if rng.random() < 0.12:
            question = (
                rng.choice(
                    (("请", "你好，", "请问", "帮我", "能不能"), ("Please ", "Hi, ", "Can you ", "Hello, ", "OK, "))[
                        language
                    ]
                )
                + question
            )
        if language == ENGLISH and rng.random() < 0.25:
            question = question.lower()
    return Turn("out of scope", question, DECLINE[language], ("topic", *parts), language)
