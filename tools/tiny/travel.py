"""Questions about travelling in China as a whole: where to go, and how to prepare.

Long because it is a list of sentences.
"""

import random

from .phrasing import CHINESE, ENGLISH, Intent, Turn, intent, phrase


def _numbered(language: int, opening: str, places: str, closing: str) -> str:
    """A list answer; `places` holds "name: reason" separated by bars."""
    colon = "：" if language == CHINESE else ": "
    lines = []
    for index, line in enumerate(places.split("|"), start=1):
        name, reason = line.strip().split(":")
        lines.append(f"{index}. {name.strip()}{colon}{reason.strip()}")
    return "\n".join([opening, *lines, closing])


_TOPICS: list[tuple[tuple[Intent, Intent], tuple[str, str]]] = []


def _topic(
    name: str,
    chinese: tuple[str, str, str],
    english: tuple[str, str, str],
) -> None:
    intents = (
        intent(f"travel.{name}", CHINESE, chinese[0], chinese[1]),
        intent(f"travel.{name}", ENGLISH, english[0], english[1]),
    )
    _TOPICS.append((intents, (chinese[2], english[2])))


_topic(
    "recommend",
    (
        "给我推荐中国适合旅游的地方|中国旅游的好去处|有什么旅游好去处|推荐旅游的好去处"
        "|和朋友去旅游去哪里好|我想和女朋友去旅行，去哪好|推荐中国适合旅游的地方"
        "|中国有哪些适合旅游的地方|中国哪里适合旅游"
        "|推荐几个中国的旅游城市|中国有什么好玩的地方|我想去中国旅游，去哪里好"
        "|推荐一些中国的旅游景点|中国旅游去哪里|在中国旅游应该去哪里|给我推荐几个旅游的地方"
        "|推荐几个旅游的地方|推荐一些好玩的地方|哪里适合旅游|有什么好玩的地方推荐"
        "|中国最值得去的地方有哪些|去哪里旅游好|我想去旅游，推荐几个地方|国内有什么好玩的地方"
        "|国内旅游推荐|推荐旅游目的地|推荐几个国内的旅游城市|给我推荐一些适合旅游的城市"
        "|中国有哪些旅游城市|我想出去玩，有什么推荐|假期去哪里玩好|帮我推荐旅游的地方|旅游推荐"
        "|中国有哪些著名的旅游景点|给我推荐中国好玩的地方|中国适合旅游的地方有哪些"
        "|中国适合旅游的地方|适合旅游的地方|推荐一个旅游的地方|第一次去中国应该去哪里"
        "|给我推荐适合旅游的地方|哪些城市值得去|推荐一下中国的景点|放假了去哪儿玩"
        "|给我介绍中国适合旅游的地方|列出几个中国的旅游胜地|有没有推荐的旅游城市|中国哪些地方好玩"
        "|中国有什么值得去的地方|周末去哪里玩|想去旅行，去哪好",
        "给我推荐中国适合旅游的方|请推荐几个中国值得去的地方|中国有哪些地方值得旅游"
        "|我想在中国旅行，有什么地方推荐|给我推荐一些中国的旅游目的地",
        _numbered(
            CHINESE,
            "中国适合旅游的地方很多，推荐这几个：",
            "北京: 有故宫和长城，适合了解历史文化|西安: 可以看兵马俑，逛古城墙，吃羊肉泡馍|杭州: "
            "西湖风景优美，适合散步和喝茶"
            "|成都: 能看大熊猫，美食多，生活悠闲|桂林: 漓江山水如画，适合坐船游览"
            "|丽江: 有古城和玉龙雪山，风景独特|厦门: 有海景和鼓浪屿，适合放松",
            "如果告诉我你喜欢自然、历史、美食还是海边，我可以再推荐。",
        ),
    ),
    (
        "Recommend places to travel in China|Recommend some places to visit in China"
        "|Where should I travel in China?|What are the best places to visit in China?"
        "|Where should I go in China?|Recommend travel destinations in China"
        "|Best places to travel in China|Suggest places to visit in China"
        "|Which places in China are worth visiting?|Give me some travel recommendations for China"
        "|I want to travel to China, where should I go?"
        "|What places should I visit in China?|Suggest some cities to visit in China"
        "|Recommend a place to travel|Where should I go on vacation?"
        "|Which cities should I visit in China?|What should I see in China?|Places to go in China"
        "|I am going to China, any recommendations?"
        "|Recommend some cities in China|Where to travel in China|Top places to visit in China"
        "|List some places to travel in China"
        "|What are some good places to visit in China?|Where can I travel in China?"
        "|Give me a list of places to visit in China"
        "|Recommend places to go in China|Travel recommendations|Recommend a trip"
        "|What is worth seeing in China?|Where should I travel?"
        "|Recommend tourist attractions in China|Suggest a holiday in China"
        "|What are the top tourist cities in China?|Give me travel tips for where to go",
        "Which places would you recommend for a trip to China?|Suggest some good travel destinations "
        "in China|What are the top places to see in China?"
        "|Please recommend Chinese cities to travel to",
        _numbered(
            ENGLISH,
            "China has many great places to travel. Here are some:",
            "Beijing: see the Forbidden City and the Great Wall|Xi'an: home of the Terracotta Army and "
            "an old city wall"
            "|Hangzhou: walk around West Lake and drink Longjing tea|Chengdu: giant pandas, spicy food "
            "and teahouses"
            "|Guilin: karst hills along the Li River|Lijiang: an old town below Jade Dragon Snow Mountain"
            "|Xiamen: sea views and Gulangyu Island",
            "Tell me if you like nature, history, food or beaches, and I can suggest more.",
        ),
    ),
)
_topic(
    "more",
    (
        "再推荐几个|还有别的吗|还有其他地方吗|再推荐一些地方|还有吗|再来几个|还有什么地方推荐"
        "|换几个地方|有没有其他推荐|再多推荐一点|再推荐几个地方|推荐点冷门的地方"
        "|有没有人少的旅游城市|推荐几个小众的旅游地",
        "再给我推荐几个|还有没有其他的地方",
        _numbered(
            CHINESE,
            "再推荐几个有特色的地方：",
            "敦煌: 莫高窟壁画和大漠风光|泉州: 海上丝绸之路的起点，古寺众多"
            "|景德镇: 千年瓷都，可以亲手做陶瓷|大同: 云冈石窟和悬空寺|洛阳: 龙门石窟，春天有牡丹花"
            "|绍兴: 江南水乡，鲁迅的故乡",
            "这些地方游客相对少一些，也很值得去。",
        ),
    ),
    (
        "Recommend a few more|Any other places?|Can you recommend others?|Recommend others"
        "|Any others?|More please|Any more recommendations?|What else?"
        "|Suggest some other places|Give me more|Other suggestions?"
        "|Anywhere else?|Recommend some less crowded places|Are there lesser known places in China?"
        "|Recommend hidden gems in China|Some more places",
        "Can you recommend any others?|Give me some more places",
        _numbered(
            ENGLISH,
            "Here are a few more places with their own character:",
            "Dunhuang: the Mogao Caves and desert scenery|Quanzhou: old temples and the Maritime Silk "
            "Road|Jingdezhen: make porcelain in the porcelain capital"
            "|Datong: the Yungang Grottoes and the Hanging Temple"
            "|Luoyang: the Longmen Grottoes, and peonies in spring"
            "|Shaoxing: canals and the hometown of Lu Xun",
            "They tend to be less crowded and are well worth a trip.",
        ),
    ),
)
_topic(
    "winter",
    (
        "冬天去哪里旅游好|冬天适合去哪里玩|冬天去哪玩|推荐几个冬天旅游的地方|冬季旅游推荐"
        "|中国冬天适合去哪|寒假去哪里玩|冬天去哪里好|12月去哪里旅游|1月适合去哪里|哪里冬天好玩"
        "|想看雪去哪里|推荐冬天适合去的城市|冬天旅行去哪",
        "冬天有什么适合旅游的地方|冬天去中国哪里玩好",
        _numbered(
            CHINESE,
            "冬天旅游可以看雪，也可以去温暖的海边：",
            "哈尔滨: 冰雪大世界，能看冰雕和滑雪|三亚: 热带海滩，冬天依然温暖|厦门: 气候温和，适合看海散步"
            "|昆明: 阳光充足，能看红嘴鸥|广州: 天气暖和，早茶美味",
            "去北方要带厚衣服，去南方海边要带防晒霜。",
        ),
    ),
    (
        "Where should I travel in China in winter?|Best winter destinations in China"
        "|Recommend places to visit in winter|Where to go in winter?"
        "|Winter travel in China|Where can I see snow in China?|Where should I go in December?"
        "|Where should I go in January?|Where is warm in winter in China?"
        "|Suggest a winter trip in China|Places to visit in winter"
        "|Which Chinese cities are good in winter?|I want to travel in winter",
        "Which places in China are good for a winter trip?|Recommend a winter destination in China",
        _numbered(
            ENGLISH,
            "In winter you can look for snow or for warm beaches:",
            "Harbin: ice sculptures at the Ice and Snow World, and skiing|Sanya: tropical beaches that "
            "stay warm|Xiamen: mild weather and sea views"
            "|Kunming: plenty of sunshine and black-headed gulls|Guangzhou: warm days and dim sum",
            "Take warm clothes to the north and sunscreen to the south.",
        ),
    ),
)
_topic(
    "summer",
    (
        "夏天去哪里旅游好|夏天适合去哪里玩|夏天去哪玩|推荐几个夏天旅游的地方|夏季旅游推荐"
        "|中国哪里避暑好|暑假去哪里玩|夏天去哪里好|7月去哪里旅游|8月适合去哪里|哪里夏天凉快"
        "|避暑去哪里|推荐夏天适合去的城市|夏天旅行去哪|推荐避暑的地方",
        "夏天有什么适合旅游的地方|夏天去哪里避暑好",
        _numbered(
            CHINESE,
            "夏天适合去凉快的地方或海边：",
            "青岛: 海风凉爽，有海滩和啤酒|大连: 海滨城市，海鲜丰富|贵阳: 夏天凉爽，是避暑好去处"
            "|西宁: 气候清凉，离青海湖很近|昆明: 四季如春，不冷不热",
            "夏天记得防晒，多喝水。",
        ),
    ),
    (
        "Where should I travel in China in summer?|Best summer destinations in China"
        "|Recommend places to visit in summer|Where to go in summer?"
        "|Summer travel in China|Where is it cool in summer in China?|Where should I go in July?"
        "|Where should I go in August?|Suggest a summer trip in China"
        "|Places to visit in summer|Which Chinese cities are good in summer?"
        "|I want to travel in summer|How can I escape the heat in China?",
        "Which places in China are good for a summer trip?|Recommend a summer destination in China",
        _numbered(
            ENGLISH,
            "In summer, choose somewhere cool or by the sea:",
            "Qingdao: sea breezes, beaches and beer|Dalian: a seaside city with fresh seafood"
            "|Guiyang: cool summers in the hills|Xining: fresh air, close to Qinghai Lake"
            "|Kunming: spring-like all year",
            "Remember sunscreen and drink enough water.",
        ),
    ),
)
_topic(
    "spring",
    (
        "春天去哪里旅游好|春天适合去哪里玩|春天去哪玩|春季旅游推荐|哪里看花好|赏花去哪里"
        "|3月去哪里旅游|4月适合去哪里|推荐春天适合去的城市|春天旅行去哪|春天去哪里看花"
        "|推荐几个春天旅游的地方",
        "春天有什么适合旅游的地方|春天去中国哪里玩好",
        _numbered(
            CHINESE,
            "春天适合赏花和看江南风景：",
            "扬州: 瘦西湖花开正好|杭州: 西湖边桃红柳绿，还有新茶|武汉: 三月有樱花|洛阳: 四月有牡丹花"
            "|大理: 苍山洱海，春光明媚",
            "春天天气多变，带一件外套比较好。",
        ),
    ),
    (
        "Where should I travel in China in spring?|Best spring destinations in China"
        "|Recommend places to visit in spring|Where to go in spring?|Spring travel in China"
        "|Where can I see flowers in China?|Where should I go in March?|Where should I go in April?"
        "|Suggest a spring trip in China|Places to visit in spring"
        "|Which Chinese cities are good in spring?",
        "Which places in China are good for a spring trip?|Recommend a spring destination in China",
        _numbered(
            ENGLISH,
            "Spring is the season for flowers and gardens:",
            "Yangzhou: blossoms along Slender West Lake"
            "|Hangzhou: peach trees, willows and new tea by West Lake|Wuhan: cherry blossoms in March"
            "|Luoyang: peonies in April"
            "|Dali: bright days between Cangshan and Erhai",
            "The weather changes quickly, so take a jacket.",
        ),
    ),
)
_topic(
    "autumn",
    (
        "秋天去哪里旅游好|秋天适合去哪里玩|秋天去哪玩|秋季旅游推荐|哪里看红叶|国庆去哪里玩"
        "|9月去哪里旅游|10月适合去哪里|推荐秋天适合去的城市|秋天旅行去哪|11月去哪里玩"
        "|推荐几个秋天旅游的地方",
        "秋天有什么适合旅游的地方|秋天去中国哪里玩好",
        _numbered(
            CHINESE,
            "秋天天高气爽，推荐这几个地方：",
            "北京: 天气晴朗，香山红叶很美|南京: 梧桐和银杏金黄|苏州: 园林秋色，正是吃大闸蟹的时候"
            "|开封: 秋天有菊花|敦煌: 天空清澈，胡杨金黄",
            "秋天早晚温差大，注意保暖。",
        ),
    ),
    (
        "Where should I travel in China in autumn?|Best autumn destinations in China"
        "|Recommend places to visit in autumn|Where to go in autumn?|Autumn travel in China"
        "|Where should I go in fall?|Where can I see red leaves in China?"
        "|Where should I go in October?|Where should I go in September?"
        "|Suggest an autumn trip in China"
        "|Places to visit in autumn|Which Chinese cities are good in autumn?",
        "Which places in China are good for an autumn trip?|Recommend an autumn destination in China",
        _numbered(
            ENGLISH,
            "Autumn is clear and cool. Try these places:",
            "Beijing: clear skies and red leaves on Fragrant Hill|Nanjing: golden plane trees and "
            "ginkgos|Suzhou: gardens in autumn colors, and hairy crab season"
            "|Kaifeng: chrysanthemums|Dunhuang: clear skies and golden poplars",
            "Mornings and evenings are cool, so bring warm layers.",
        ),
    ),
)
_topic(
    "sea",
    (
        "推荐几个海边城市|中国哪里的海好看|想去海边玩，去哪里好|推荐海边旅游的地方|哪里有好看的海滩"
        "|中国有哪些海滨城市|去哪里看海|我喜欢海边|推荐一个看海的地方|海边旅游去哪里"
        "|我想去海边|海边|哪里适合看海|中国最美的海滩在哪里",
        "中国有什么适合看海的地方|给我推荐几个看海的城市",
        _numbered(
            CHINESE,
            "喜欢大海可以去这些地方：",
            "三亚: 热带海滩，适合游泳和潜水|青岛: 红瓦绿树，碧海蓝天|厦门: 鼓浪屿和环岛路"
            "|大连: 海滨广场和金石滩|珠海: 情侣路和海岛|泉州: 海边渔村和闽南文化",
            "去海边要注意防晒和安全。",
        ),
    ),
    (
        "Recommend beaches in China|Where are the best beaches in China?"
        "|Which Chinese cities are by the sea?|I want to go to the beach in China"
        "|Recommend seaside cities in China|Where can I see the sea in China?|I like beaches"
        "|Suggest a beach holiday in China|Best seaside cities in China"
        "|Recommend coastal places in China|Which cities lie on the coast?"
        "|A trip to the coast of China|coastal towns in China"
        "|Where should I go for the sea?|Beaches|I love the sea|Places by the sea",
        "Which coastal cities should I visit in China?|Recommend a seaside trip in China",
        _numbered(
            ENGLISH,
            "If you like the sea, try these cities:",
            "Sanya: tropical beaches for swimming and diving|Qingdao: red roofs, green trees and blue "
            "sea|Xiamen: Gulangyu Island and the Island Ring Road"
            "|Dalian: seaside squares and Golden Pebble Beach|Zhuhai: Lovers' Road and islands"
            "|Quanzhou: fishing villages and Minnan culture",
            "Mind the sun and swim only where it is safe.",
        ),
    ),
)
_topic(
    "nature",
    (
        "推荐几个自然风光好的地方|中国哪里风景最美|想看山水去哪里|推荐看自然风景的地方|我喜欢自然"
        "|哪里风景好|中国有哪些名山|我喜欢爬山，去哪里|推荐风景优美的地方|想去大自然去哪里好"
        "|自然风光|我喜欢大自然|中国最美的风景在哪里|去哪里爬山",
        "中国有什么自然风景好的地方|给我推荐几个风景好的地方",
        _numbered(
            CHINESE,
            "喜欢自然风光可以去这些地方：",
            "桂林: 漓江和喀斯特山峰|张家界: 奇特的石柱峰林|黄山: 奇松、怪石和云海|丽江: 玉龙雪山和古城"
            "|大理: 苍山洱海|拉萨: 高原风光和蓝天",
            "上山要穿舒服的鞋，去高原要防高原反应。",
        ),
    ),
    (
        "Where is the best natural scenery in China?|Recommend nature trips in China|I like nature"
        "|Where can I see mountains in China?|Best scenery in China"
        "|Recommend beautiful landscapes in China|Where should I go hiking in China?"
        "|Which mountains should I visit in China?|I like hiking|Nature"
        "|Suggest scenic places in China|Where are the most beautiful views in China?|I love nature",
        "Which places in China have beautiful nature?|Recommend scenic spots with nature in China",
        _numbered(
            ENGLISH,
            "For natural scenery, try these places:",
            "Guilin: the Li River and karst hills|Zhangjiajie: towering sandstone pillars|Huangshan: "
            "pines, strange rocks and seas of clouds"
            "|Lijiang: Jade Dragon Snow Mountain|Dali: Cangshan Mountain and Erhai Lake"
            "|Lhasa: plateau views and blue skies",
            "Wear comfortable shoes, and take care with high altitude in Lhasa.",
        ),
    ),
)
_topic(
    "history",
    (
        "推荐几个历史名城|中国有哪些古都|想看历史古迹去哪里|我喜欢历史|推荐有历史的城市"
        "|中国历史文化名城有哪些|哪里的古迹多|喜欢历史应该去哪里|推荐看古建筑的地方"
        "|中国有哪些著名的古城"
        "|历史|我对历史感兴趣|去哪里看古迹|历史文化",
        "中国有什么历史悠久的城市|给我推荐几个历史文化城市",
        _numbered(
            CHINESE,
            "喜欢历史可以去这些城市：",
            "北京: 故宫、天坛和长城|西安: 兵马俑和古城墙|南京: 六朝古都，有明孝陵|洛阳: 龙门石窟和白马寺"
            "|敦煌: 莫高窟壁画|开封: 北宋的都城",
            "很多博物馆需要提前预约。",
        ),
    ),
    (
        "Recommend historic cities in China|What are the ancient capitals of China?|I like history"
        "|Where can I see ancient China?|Best historical places in China"
        "|Which Chinese cities have a long history?|Recommend cities with history"
        "|Where should I go for history?|Recommend old cities in China|History"
        "|Suggest historical sites in China|I am interested in history|I love history",
        "Which historic cities in China should I visit?|Recommend a trip for history lovers",
        _numbered(
            ENGLISH,
            "If you like history, go to these cities:",
            "Beijing: the Forbidden City, the Temple of Heaven and the Great Wall|Xi'an: the Terracotta "
            "Army and the old city wall"
            "|Nanjing: an ancient capital with the Ming Xiaoling Mausoleum"
            "|Luoyang: the Longmen Grottoes and White Horse Temple|Dunhuang: the Mogao Caves"
            "|Kaifeng: once the Northern Song capital",
            "Many museums ask for a booking in advance.",
        ),
    ),
)
_topic(
    "food",
    (
        "中国哪里美食多|想吃美食去哪个城市|推荐几个美食城市|我喜欢美食|哪个城市好吃的多"
        "|中国美食之都有哪些|去哪里吃好吃的|推荐吃货去的城市|中国有什么好吃的|推荐中国美食"
        "|中国有哪些特色美食"
        "|美食|我是吃货，去哪里|哪个城市最好吃|介绍中国菜",
        "中国有什么美食城市|给我推荐几个好吃的城市",
        _numbered(
            CHINESE,
            "喜欢美食可以去这些城市：",
            "成都: 麻婆豆腐、担担面和各种小吃|重庆: 麻辣火锅和小面|广州: 虾饺、肠粉等早茶点心"
            "|西安: 羊肉泡馍和肉夹馍|长沙: 剁椒鱼头和臭豆腐|北京: 北京烤鸭和炸酱面",
            "怕辣的话，可以告诉店家少放辣椒。",
        ),
    ),
    (
        "Which Chinese city has the best food?|Recommend cities for food in China|I like food"
        "|Where should I go to eat in China?|Best food cities in China"
        "|What food should I try in China?|Recommend Chinese food|What are the famous foods in China?"
        "|Food|Tell me about Chinese food|I love food"
        "|What should I eat in China?|Which city is best for food lovers?"
        "|What are some Chinese dishes?",
        "Which cities in China are good for food?|Recommend a trip for food lovers",
        _numbered(
            ENGLISH,
            "If you love food, visit these cities:",
            "Chengdu: mapo tofu, dandan noodles and snacks|Chongqing: spicy hotpot and "
            "noodles|Guangzhou: dim sum such as shrimp dumplings"
            "|Xi'an: lamb soup with flatbread and roujiamo"
            "|Changsha: fish head with chopped chili and stinky tofu"
            "|Beijing: Peking duck and zhajiang noodles",
            "If you can't eat spicy food, ask for less chili.",
        ),
    ),
)
_topic(
    "family",
    (
        "带孩子去哪里玩|亲子游推荐|适合带小孩去的城市|和父母去哪里旅游好|带老人旅游去哪里"
        "|推荐亲子旅游的地方|一家人去哪里玩|全家出游去哪里好|带娃去哪里玩|和家人旅游去哪好"
        "|推荐适合家庭旅游的地方",
        "有什么适合带孩子去的地方|全家旅游推荐去哪里",
        _numbered(
            CHINESE,
            "和家人一起出行，推荐这几个城市：",
            "成都: 孩子喜欢看大熊猫|珠海: 长隆海洋王国很适合亲子游|香港: 有迪士尼乐园"
            "|杭州: 西湖平坦好走，适合老人|青岛: 沙滩安全，适合玩水",
            "行程安排得轻松一点，大家都会更开心。",
        ),
    ),
    (
        "Where should I travel with children in China?|Recommend a family trip in China"
        "|Where to go with kids?|Best places in China for families"
        "|Where should I go with my parents?|Suggest a family holiday in China|Family trip"
        "|Which Chinese cities are good for kids?|I am travelling with my family"
        "|Recommend places for children|Places to go with family",
        "Which places in China are good for a family trip?|Recommend a destination for kids in China",
        _numbered(
            ENGLISH,
            "For a family trip, try these cities:",
            "Chengdu: children love the giant pandas|Zhuhai: Chimelong Ocean Kingdom is made for "
            "families|Hong Kong: Hong Kong Disneyland"
            "|Hangzhou: flat, easy walks around West Lake|Qingdao: sandy beaches for playing in the water",
            "Keep the schedule relaxed and everyone will enjoy it more.",
        ),
    ),
)
_topic(
    "packing",
    (
        "旅游要带什么|出去玩要带什么东西|旅行前要准备什么|旅游需要准备什么|去旅游带什么好"
        "|出门旅行带什么|旅行清单|旅游注意事项|旅行有什么注意的|出行前要做什么准备",
        "旅行需要带什么东西|出去旅游应该准备什么",
        "旅行前可以准备：身份证或护照、手机和充电器、舒服的鞋、常用药、雨伞和合适的衣服。"
        "最好提前订好车票和酒店，并看一下天气预报。",
    ),
    (
        "What should I pack for a trip?|What should I bring when travelling?"
        "|How do I prepare for a trip?|Packing list|What do I need for a trip to China?"
        "|What should I take on a trip?|How should I prepare for my trip to China?|Any travel tips?"
        "|Travel tips for China|What should I pack for China?",
        "What things should I bring on a trip?|What do I need to prepare before travelling?",
        "Take your passport or identity card, a phone and charger, comfortable shoes, common "
        "medicine, an umbrella and suitable clothes. "
        "Book tickets and hotels in advance, and check the weather forecast.",
    ),
)
_topic(
    "train",
    (
        "在中国怎么出行|中国旅游坐什么交通工具|中国的高铁怎么样|城市之间怎么走|在中国旅游怎么坐车"
        "|坐高铁方便吗|中国交通方便吗|在中国坐火车好吗|怎么在中国的城市之间旅行|中国高铁快吗",
        "在中国旅行坐什么车好|中国城市之间怎么去最方便",
        "在中国的城市之间旅行，坐高铁很方便，时速可达350公里，又快又准时。距离很远时可以坐飞机。"
        "在城市里，地铁和公交车都很方便。",
    ),
    (
        "How do I travel between cities in China?|How do I get around in China?"
        "|Is the train good in China?|Tell me about high-speed trains in China"
        "|What transport should I use in China?|How fast are Chinese trains?"
        "|Is it easy to travel in China?|How can I move between Chinese cities?"
        "|What is the best way to get around China?|Should I take the train in China?",
        "What is the best way to travel between cities in China?|Which transport is best in China?",
        "High-speed trains are the easiest way to travel between Chinese cities: they reach 350 km/h "
        "and are punctual. "
        "For very long distances you can fly. Inside cities, use the metro and buses.",
    ),
)
_topic(
    "when",
    (
        "什么时候去中国旅游最好|中国几月份旅游好|去中国的最佳时间|中国旅游的最佳季节"
        "|什么季节适合在中国旅游|哪个季节适合去中国|中国哪个季节最适合旅游|一年中什么时候去中国旅游好"
        "|几月去中国好|在中国旅游什么时候好",
        "什么时候适合去中国旅游|中国哪个季节旅游最好",
        "在中国旅游，春天（4月至5月）和秋天（9月至10月）一般最舒服。夏天适合去海边和高原，"
        "冬天可以去哈尔滨看冰雪，或者去三亚晒太阳。",
    ),
    (
        "When is the best time to visit China?|When should I go to China?"
        "|Best time to travel to China?|What is the best season for China?"
        "|Which month is best for China?|What season is best to visit China?"
        "|In which season should I travel to China?|Which season is good for a trip to China?"
        "|Best season to travel in China|When should I travel to China?"
        "|What is the best time of year to visit China?",
        "What season is best for travelling in China?|When is a good time to go to China?",
        "Spring (April to May) and autumn (September to October) are usually the most comfortable. "
        "Summer suits the coast and the plateau; in winter, see the ice in Harbin or the sun in Sanya.",
    ),
)

TOPICS = tuple(_TOPICS)
ALL_INTENTS = [one for intents, _ in TOPICS for one in intents]


def ask_travel(rng: random.Random, split: str, slip: bool = False) -> Turn:
    """A question about travelling in China; plain recommendations are asked most."""
    intents, answers = TOPICS[0] if rng.random() < 0.3 else rng.choice(TOPICS)
    language = rng.randrange(2)
    question, phrasing = phrase(rng, intents[language], split, slip)
    return Turn("travel", question, answers[language], ("phrasing", phrasing), language)


def conversation(rng: random.Random) -> list[Turn]:
    """A recommendation, then a request for more or for a special wish."""
    language = rng.randrange(2)
    topics = [TOPICS[0], rng.choice(TOPICS[1:])]
    turns = []
    for intents, answers in topics:
        question, phrasing = phrase(rng, intents[language], "train")
        turns.append(Turn("travel", question, answers[language], ("phrasing", phrasing), language))
    return turns
