"""The facts that shoal-tiny knows about places: 42 Chinese cities, each in Chinese and in English."""

from dataclasses import dataclass

SEASONS = {
    "spring": ("春季（3月至5月）", "spring (March to May)"),
    "mild": ("春季和秋季（4月至5月、9月至10月）", "spring and autumn (April to May and September to October)"),
    "summer": ("夏季（6月至8月）", "summer (June to August)"),
    "autumn": ("秋季（9月至11月）", "autumn (September to November)"),
    "winter": ("冬季（12月至次年2月）", "winter (December to February)"),
    "warm": ("4月至10月", "April to October"),
    "cool": ("10月至次年3月", "October to March"),
    "late": ("5月至10月", "May to October"),
}


@dataclass(frozen=True)
class City:
    """One city; a pair is (Chinese, English), and `sights` and `food` are tuples of pairs."""

    name: tuple[str, str]
    place: tuple[str, str]
    known: tuple[str, str]
    sights: tuple[tuple[str, str], ...]
    food: tuple[tuple[str, str], ...]
    season: tuple[str, str]


def _city(name: str, place: str, known: str, sights: str, food: str, season: str) -> City:
    def pair(text: str) -> tuple[str, str]:
        chinese, english = text.split("/")
        return chinese.strip(), english.strip()

    def pairs(text: str) -> tuple[tuple[str, str], ...]:
        return tuple(pair(part) for part in text.split(","))

    return City(pair(name), pair(place), pair(known), pairs(sights), pairs(food), SEASONS[season])


CITIES = (
    _city(
        "北京/Beijing",
        "是中国的首都，也是直辖市/the capital of China",
        "悠久的历史和皇家建筑/its long history and imperial architecture",
        "故宫/the Forbidden City,八达岭长城/the Badaling Great Wall,天坛/the Temple of Heaven,颐和园/the Summer Palace",
        "北京烤鸭/Peking duck,炸酱面/zhajiang noodles,铜锅涮肉/copper-pot mutton hotpot",
        "mild",
    ),
    _city(
        "上海/Shanghai",
        "是中国东部的直辖市/a municipality on the east coast of China",
        "外滩夜景和现代都市风貌/the Bund skyline and its modern city life",
        "外滩/the Bund,豫园/Yu Garden,东方明珠塔/the Oriental Pearl Tower,上海博物馆/the Shanghai Museum",
        "小笼包/soup dumplings,生煎包/pan-fried pork buns,本帮红烧肉/Shanghai braised pork",
        "mild",
    ),
    _city(
        "广州/Guangzhou",
        "是广东省的省会/the capital of Guangdong Province",
        "早茶文化和千年商贸历史/dim sum and a long history of trade",
        "广州塔/Canton Tower,陈家祠/the Chen Clan Ancestral Hall,沙面岛/Shamian Island,越秀公园/Yuexiu Park",
        "虾饺/shrimp dumplings,肠粉/rice noodle rolls,白切鸡/white cut chicken",
        "cool",
    ),
    _city(
        "深圳/Shenzhen",
        "位于广东省，毗邻香港/in Guangdong Province, next to Hong Kong",
        "科技创新和年轻的都市活力/technology and its young, fast-growing city life",
        "世界之窗/Window of the World,大梅沙海滨公园/Dameisha Beach,深圳湾公园/Shenzhen Bay Park,"
        "莲花山公园/Lianhuashan Park",
        "椰子鸡/coconut chicken hotpot,沙井蚝/Shajing oysters,光明乳鸽/Guangming roast pigeon",
        "cool",
    ),
    _city(
        "杭州/Hangzhou",
        "是浙江省的省会/the capital of Zhejiang Province",
        "西湖美景和龙井茶/West Lake and Longjing tea",
        "西湖/West Lake,灵隐寺/Lingyin Temple,雷峰塔/Leifeng Pagoda,西溪湿地/Xixi Wetland",
        "西湖醋鱼/West Lake vinegar fish,东坡肉/Dongpo pork,龙井虾仁/Longjing shrimp",
        "mild",
    ),
    _city(
        "苏州/Suzhou",
        "位于江苏省/in Jiangsu Province",
        "古典园林和江南水乡/classical gardens and canals",
        "拙政园/the Humble Administrator's Garden,虎丘/Tiger Hill,平江路/Pingjiang Road,留园/the Lingering Garden",
        "松鼠桂鱼/squirrel-shaped mandarin fish,苏式汤面/Suzhou noodle soup,阳澄湖大闸蟹/Yangcheng Lake hairy crab",
        "mild",
    ),
    _city(
        "南京/Nanjing",
        "是江苏省的省会/the capital of Jiangsu Province",
        "六朝古都的历史和梧桐大道/its past as an ancient capital and its plane-tree avenues",
        "中山陵/the Sun Yat-sen Mausoleum,夫子庙/the Confucius Temple area,明孝陵/the Ming Xiaoling Mausoleum,"
        "玄武湖/Xuanwu Lake",
        "盐水鸭/salted duck,鸭血粉丝汤/duck blood and vermicelli soup,皮肚面/pork skin noodles",
        "mild",
    ),
    _city(
        "成都/Chengdu",
        "是四川省的省会/the capital of Sichuan Province",
        "大熊猫、川菜和悠闲的茶馆生活/giant pandas, Sichuan food and a relaxed teahouse life",
        "成都大熊猫繁育研究基地/the Chengdu Panda Base,武侯祠/Wuhou Shrine,宽窄巷子/Kuanzhai Alley,"
        "杜甫草堂/Du Fu Thatched Cottage",
        "麻婆豆腐/mapo tofu,担担面/dandan noodles,夫妻肺片/fuqi feipian",
        "mild",
    ),
    _city(
        "重庆/Chongqing",
        "是中国西南部的直辖市/a municipality in southwest China",
        "山城夜景和麻辣火锅/its mountain-city night views and spicy hotpot",
        "洪崖洞/Hongya Cave,解放碑/Jiefangbei,磁器口古镇/Ciqikou Old Town,长江索道/the Yangtze River Cableway",
        "重庆火锅/Chongqing hotpot,重庆小面/Chongqing noodles,酸辣粉/hot and sour noodles",
        "mild",
    ),
    _city(
        "西安/Xi'an",
        "是陕西省的省会/the capital of Shaanxi Province",
        "兵马俑和十三朝古都的历史/the Terracotta Army and its past as the capital of thirteen dynasties",
        "兵马俑/the Terracotta Army,大雁塔/the Giant Wild Goose Pagoda,西安城墙/the Xi'an City Wall,"
        "钟楼/the Xi'an Bell Tower",
        "羊肉泡馍/lamb soup with flatbread,肉夹馍/roujiamo,凉皮/cold liangpi noodles",
        "mild",
    ),
    _city(
        "武汉/Wuhan",
        "是湖北省的省会/the capital of Hubei Province",
        "长江、东湖和樱花/the Yangtze River, East Lake and cherry blossoms",
        "黄鹤楼/Yellow Crane Tower,东湖/East Lake,湖北省博物馆/the Hubei Provincial Museum,"
        "武汉长江大桥/the Wuhan Yangtze River Bridge",
        "热干面/hot dry noodles,豆皮/stuffed bean skin,武昌鱼/Wuchang fish",
        "mild",
    ),
    _city(
        "长沙/Changsha",
        "是湖南省的省会/the capital of Hunan Province",
        "湘菜和热闹的夜生活/Hunan food and lively nightlife",
        "岳麓山/Yuelu Mountain,橘子洲/Orange Isle,湖南博物院/the Hunan Museum,太平街/Taiping Street",
        "臭豆腐/stinky tofu,剁椒鱼头/fish head with chopped chili,糖油粑粑/sweet sticky rice cakes",
        "mild",
    ),
    _city(
        "桂林/Guilin",
        "位于广西壮族自治区/in the Guangxi Zhuang Autonomous Region",
        "漓江山水和喀斯特地貌/the Li River and its karst hills",
        "漓江/the Li River,象鼻山/Elephant Trunk Hill,阳朔西街/West Street in Yangshuo,"
        "龙脊梯田/the Longji Rice Terraces",
        "桂林米粉/Guilin rice noodles,啤酒鱼/beer fish,油茶/Guilin oil tea",
        "warm",
    ),
    _city(
        "昆明/Kunming",
        "是云南省的省会/the capital of Yunnan Province",
        "四季如春的气候和鲜花/spring-like weather all year and its flowers",
        "滇池/Dianchi Lake,石林/the Stone Forest,翠湖公园/Green Lake Park,西山/the Western Hills of Kunming",
        "过桥米线/crossing-the-bridge noodles,汽锅鸡/steam-pot chicken,鲜花饼/flower cakes",
        "mild",
    ),
    _city(
        "大理/Dali",
        "位于云南省/in Yunnan Province",
        "苍山洱海和白族文化/Cangshan Mountain, Erhai Lake and Bai culture",
        "洱海/Erhai Lake,苍山/Cangshan Mountain,大理古城/Dali Old Town,崇圣寺三塔/the Three Pagodas",
        "乳扇/fried milk fans,喜洲粑粑/Xizhou flatbread,酸辣鱼/sour and spicy fish",
        "spring",
    ),
    _city(
        "丽江/Lijiang",
        "位于云南省/in Yunnan Province",
        "古城、雪山和纳西文化/its old town, a snow mountain and Naxi culture",
        "丽江古城/Lijiang Old Town,玉龙雪山/Jade Dragon Snow Mountain,束河古镇/Shuhe Old Town,黑龙潭/Black Dragon Pool",
        "腊排骨火锅/cured rib hotpot,鸡豆凉粉/chickpea jelly,纳西烤鱼/Naxi grilled fish",
        "mild",
    ),
    _city(
        "厦门/Xiamen",
        "位于福建省/in Fujian Province",
        "海岛风光和鼓浪屿/its island scenery and Gulangyu",
        "鼓浪屿/Gulangyu Island,南普陀寺/Nanputuo Temple,环岛路/the Island Ring Road,曾厝垵/Zengcuo'an",
        "沙茶面/satay noodles,海蛎煎/oyster omelette,土笋冻/sandworm jelly",
        "mild",
    ),
    _city(
        "青岛/Qingdao",
        "位于山东省/in Shandong Province",
        "海滨风光和青岛啤酒/its seaside and Tsingtao beer",
        "栈桥/Zhanqiao Pier,崂山/Mount Lao,八大关/Badaguan,青岛啤酒博物馆/the Tsingtao Beer Museum",
        "辣炒蛤蜊/spicy stir-fried clams,鲅鱼水饺/mackerel dumplings,海鲜烧烤/grilled seafood",
        "summer",
    ),
    _city(
        "大连/Dalian",
        "位于辽宁省/in Liaoning Province",
        "海滨浪漫风光和广场/its seaside scenery and city squares",
        "星海广场/Xinghai Square,老虎滩海洋公园/Tiger Beach Ocean Park,金石滩/Golden Pebble Beach,"
        "棒棰岛/Bangchui Island",
        "大连海参/Dalian sea cucumber,焖子/pan-fried starch jelly,咸鱼饼子/salted fish with corn cakes",
        "summer",
    ),
    _city(
        "哈尔滨/Harbin",
        "是黑龙江省的省会/the capital of Heilongjiang Province",
        "冰雪大世界和俄式建筑/its ice festival and Russian-style buildings",
        "冰雪大世界/Harbin Ice and Snow World,圣索菲亚教堂/Saint Sophia Cathedral,中央大街/Central Street,"
        "太阳岛/Sun Island",
        "锅包肉/sweet and sour crispy pork,红肠/Harbin red sausage,铁锅炖/iron pot stew",
        "winter",
    ),
    _city(
        "三亚/Sanya",
        "位于海南省/in Hainan Province",
        "热带海滩和碧海蓝天/tropical beaches and blue sea",
        "亚龙湾/Yalong Bay,天涯海角/Tianya Haijiao,蜈支洲岛/Wuzhizhou Island,南山寺/Nanshan Temple",
        "文昌鸡/Wenchang chicken,清补凉/qingbuliang dessert,椰子饭/coconut rice",
        "cool",
    ),
    _city(
        "拉萨/Lhasa",
        "是西藏自治区的首府/the capital of the Tibet Autonomous Region",
        "布达拉宫和高原阳光/the Potala Palace and plateau sunshine",
        "布达拉宫/the Potala Palace,大昭寺/Jokhang Temple,八廓街/Barkhor Street,罗布林卡/Norbulingka",
        "酥油茶/butter tea,糌粑/tsampa,藏面/Tibetan noodles",
        "late",
    ),
    _city(
        "敦煌/Dunhuang",
        "位于甘肃省/in Gansu Province",
        "莫高窟壁画和大漠风光/the Mogao Caves and desert scenery",
        "莫高窟/the Mogao Caves,鸣沙山/the Singing Sand Dunes,月牙泉/Crescent Moon Spring,玉门关/Yumen Pass",
        "驴肉黄面/donkey meat yellow noodles,杏皮水/apricot peel juice,胡羊焖饼/lamb stewed with pancakes",
        "late",
    ),
    _city(
        "洛阳/Luoyang",
        "位于河南省/in Henan Province",
        "龙门石窟和牡丹花/the Longmen Grottoes and peonies",
        "龙门石窟/the Longmen Grottoes,白马寺/White Horse Temple,老君山/Laojun Mountain,洛阳博物馆/the Luoyang Museum",
        "洛阳水席/Luoyang water banquet,牛肉汤/Luoyang beef soup,浆面条/sour bean-milk noodles",
        "spring",
    ),
    _city(
        "开封/Kaifeng",
        "位于河南省/in Henan Province",
        "北宋都城的历史和菊花/its past as the Northern Song capital and its chrysanthemums",
        "清明上河园/Millennium City Park,开封府/Kaifeng Prefecture,铁塔/the Iron Pagoda,大相国寺/Daxiangguo Temple",
        "灌汤包/Kaifeng soup dumplings,桶子鸡/bucket chicken,杏仁茶/almond tea",
        "autumn",
    ),
    _city(
        "张家界/Zhangjiajie",
        "位于湖南省/in Hunan Province",
        "奇特的石英砂岩峰林/its towering sandstone pillars",
        "武陵源/Wulingyuan,天门山/Tianmen Mountain,袁家界/Yuanjiajie,黄龙洞/Yellow Dragon Cave",
        "土家三下锅/Tujia three-in-one pot,岩耳炖鸡/rock-ear mushroom chicken,葛根粉/kudzu noodles",
        "mild",
    ),
    _city(
        "黄山/Huangshan",
        "位于安徽省/in Anhui Province",
        "奇松、怪石、云海和徽派古村/odd pines, strange rocks, seas of clouds and old Huizhou villages",
        "黄山风景区/the Yellow Mountain scenic area,宏村/Hongcun Village,西递/Xidi Village,屯溪老街/Tunxi Old Street",
        "臭鳜鱼/stinky mandarin fish,毛豆腐/hairy tofu,黄山烧饼/Huangshan sesame cakes",
        "mild",
    ),
    _city(
        "济南/Jinan",
        "是山东省的省会/the capital of Shandong Province",
        "众多泉水/its many springs",
        "趵突泉/Baotu Spring,大明湖/Daming Lake,千佛山/Thousand Buddha Mountain,黑虎泉/Black Tiger Spring",
        "把子肉/Jinan braised pork,油旋/spiral pancakes,甜沫/savory millet porridge",
        "mild",
    ),
    _city(
        "天津/Tianjin",
        "是中国北方的直辖市/a municipality in north China",
        "相声、海河风光和西式老建筑/crosstalk comedy, the Hai River and old Western-style buildings",
        "天津之眼/the Tianjin Eye,五大道/the Five Great Avenues,古文化街/Ancient Culture Street,"
        "意大利风情区/the Italian Style Town",
        "狗不理包子/Goubuli buns,煎饼果子/jianbing,十八街麻花/fried dough twists",
        "mild",
    ),
    _city(
        "泉州/Quanzhou",
        "位于福建省/in Fujian Province",
        "海上丝绸之路和闽南文化/the Maritime Silk Road and Minnan culture",
        "开元寺/Kaiyuan Temple,洛阳桥/Luoyang Bridge,清源山/Qingyuan Mountain,泉州西街/Quanzhou West Street",
        "面线糊/rice-vermicelli paste soup,姜母鸭/ginger duck,肉粽/pork rice dumplings",
        "mild",
    ),
    _city(
        "扬州/Yangzhou",
        "位于江苏省/in Jiangsu Province",
        "瘦西湖和淮扬菜/Slender West Lake and Huaiyang cuisine",
        "瘦西湖/Slender West Lake,个园/Ge Garden,何园/He Garden,大明寺/Daming Temple",
        "扬州炒饭/Yangzhou fried rice,狮子头/lion's head meatballs,大煮干丝/braised shredded tofu",
        "spring",
    ),
    _city(
        "贵阳/Guiyang",
        "是贵州省的省会/the capital of Guizhou Province",
        "凉爽的夏天和酸辣小吃/cool summers and sour-spicy snacks",
        "甲秀楼/Jiaxiu Tower,黔灵山公园/Qianling Mountain Park,青岩古镇/Qingyan Old Town,花溪公园/Huaxi Park",
        "酸汤鱼/sour soup fish,肠旺面/changwang noodles,丝娃娃/siwawa vegetable wraps",
        "summer",
    ),
    _city(
        "乌鲁木齐/Urumqi",
        "是新疆维吾尔自治区的首府/the capital of the Xinjiang Uygur Autonomous Region",
        "天山风光和多民族文化/the Tianshan Mountains and a mix of cultures",
        "天山大峡谷/the Tianshan Grand Canyon,国际大巴扎/the International Grand Bazaar,红山公园/Hongshan Park,"
        "新疆博物馆/the Xinjiang Museum",
        "大盘鸡/big plate chicken,烤羊肉串/lamb skewers,手抓饭/lamb pilaf",
        "late",
    ),
    _city(
        "西宁/Xining",
        "是青海省的省会/the capital of Qinghai Province",
        "清凉的夏天和附近的青海湖/cool summers and nearby Qinghai Lake",
        "塔尔寺/Kumbum Monastery,东关清真大寺/Dongguan Mosque,青海省博物馆/the Qinghai Museum,日月山/Riyue Mountain",
        "手抓羊肉/hand-grabbed mutton,甜醅/sweet fermented oats,青海老酸奶/Qinghai yogurt",
        "summer",
    ),
    _city(
        "兰州/Lanzhou",
        "是甘肃省的省会/the capital of Gansu Province",
        "黄河风光和牛肉面/the Yellow River and beef noodles",
        "中山桥/Zhongshan Bridge,白塔山/White Pagoda Hill,甘肃省博物馆/the Gansu Museum,水车博览园/Waterwheel Park",
        "兰州牛肉面/Lanzhou beef noodles,灰豆子/sweet grey pea soup,牛奶鸡蛋醪糟/milk and egg rice wine soup",
        "late",
    ),
    _city(
        "大同/Datong",
        "位于山西省/in Shanxi Province",
        "云冈石窟和古建筑/the Yungang Grottoes and ancient buildings",
        "云冈石窟/the Yungang Grottoes,悬空寺/the Hanging Temple,华严寺/Huayan Temple,大同古城墙/the Datong City Wall",
        "刀削面/knife-cut noodles,浑源凉粉/Hunyuan jelly noodles,羊杂汤/lamb offal soup",
        "late",
    ),
    _city(
        "景德镇/Jingdezhen",
        "位于江西省/in Jiangxi Province",
        "千年瓷都的陶瓷艺术/porcelain made there for over a thousand years",
        "古窑民俗博览区/the Ancient Kiln Museum,陶溪川/Taoxichuan,御窑博物馆/the Imperial Kiln Museum,"
        "瑶里古镇/Yaoli Old Town",
        "瓷泥煨鸡/clay-baked chicken,饺子粑/jiaozi rice dumplings,冷粉/cold rice noodles",
        "mild",
    ),
    _city(
        "绍兴/Shaoxing",
        "位于浙江省/in Zhejiang Province",
        "水乡风光、黄酒和鲁迅故里/its canals, yellow rice wine and the writer Lu Xun",
        "鲁迅故里/Lu Xun's hometown,兰亭/the Orchid Pavilion,沈园/Shen Garden,绍兴东湖/Shaoxing East Lake",
        "梅干菜扣肉/pork with preserved vegetables,茴香豆/fennel beans,醉鸡/drunken chicken",
        "mild",
    ),
    _city(
        "沈阳/Shenyang",
        "是辽宁省的省会/the capital of Liaoning Province",
        "清朝早期的皇宫和工业历史/its early Qing palace and industrial history",
        "沈阳故宫/Shenyang Imperial Palace,张氏帅府/Marshal Zhang's Mansion,北陵公园/Beiling Park,"
        "中国工业博物馆/the China Industrial Museum",
        "老边饺子/Laobian dumplings,鸡架/chicken rack,熏肉大饼/smoked pork pancake",
        "mild",
    ),
    _city(
        "珠海/Zhuhai",
        "位于广东省，毗邻澳门/in Guangdong Province, next to Macau",
        "海滨大道和宜居环境/its seaside roads and pleasant living",
        "情侣路/Lovers' Road,珠海渔女/the Fisher Girl statue,长隆海洋王国/Chimelong Ocean Kingdom,"
        "外伶仃岛/Wailingding Island",
        "横琴蚝/Hengqin oysters,斗门重壳蟹/Doumen crab,白蕉海鲈/Baijiao sea bass",
        "cool",
    ),
    _city(
        "香港/Hong Kong",
        "是中国的特别行政区/a special administrative region of China",
        "维多利亚港夜景、购物和美食/the Victoria Harbour skyline, shopping and food",
        "维多利亚港/Victoria Harbour,太平山顶/Victoria Peak,香港迪士尼乐园/Hong Kong Disneyland,"
        "天坛大佛/the Tian Tan Buddha",
        "菠萝包/pineapple buns,港式奶茶/Hong Kong milk tea,烧鹅/roast goose",
        "cool",
    ),
    _city(
        "澳门/Macau",
        "是中国的特别行政区/a special administrative region of China",
        "中西合璧的老街区和葡式美食/its mix of Chinese and Portuguese streets and food",
        "大三巴牌坊/the Ruins of St. Paul's,妈阁庙/A-Ma Temple,议事亭前地/Senado Square,澳门塔/Macau Tower",
        "葡式蛋挞/Portuguese egg tarts,猪扒包/pork chop buns,葡国鸡/Macanese Portuguese chicken",
        "cool",
    ),
)
