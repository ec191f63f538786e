"""Questions with answers, facts and parallel sentences that `fusion/tasks/assistant.py` makes chat rows of.

Look at them as chat rows:

    python -m fusion.tasks.assistant general train 8
    python -m fusion.tasks.assistant multilingual train 8
"""

# fmt: off
# (questions separated by |, answer); the first question decides the split
PAIRS = (
    ("What is JSON?|Can you explain what JSON is?",
     "JSON (JavaScript Object Notation) is a lightweight text format for exchanging data. It stores information as "
     "key-value pairs and lists, and almost every programming language can read and write it."),
    ("When should I use YAML instead of JSON?|YAML or JSON: which one is better for configuration files?",
     "YAML is a good choice for configuration files that people edit by hand, because it allows comments and needs "
     "little punctuation. JSON is better for data that programs exchange, since it is stricter and faster to parse."),
    ("What does XML stand for, and what is it used for?|What is XML?",
     "XML stands for Extensible Markup Language. It describes data with nested tags and is used in documents, "
     "configuration files and older web services."),
    ("Why does my JSON file fail to load?|My JSON does not parse. What should I check?",
     "The most common causes are a trailing comma, single quotes instead of double quotes, or a missing bracket. "
     "Paste the file into a JSON validator and it will show you the line with the error."),
    ("What is the difference between a schema and a table in a database?|Explain database schema versus table.",
     "A table holds rows of data with the same columns. A schema describes how the tables, their columns and their "
     "relations are organized."),
    ("What is an API?|Explain API in simple words.",
     "An API is a set of rules that lets one program use another. Think of a waiter: you order from the menu, and the "
     "waiter brings you what the kitchen prepares, without you seeing how it is made."),
    ("What should a good invoice contain?|Which details belong on an invoice?",
     "A good invoice states the seller and the buyer, an invoice number, the date, the items with quantities and "
     "prices, the tax, the total amount and the payment terms."),
    ("How do I write a polite email asking for a meeting?|Help me ask a colleague for a meeting by email.",
     "Hi Anna,\n\nI hope you are doing well. Could we meet for 30 minutes this week to talk about the project? "
     "Tuesday or Thursday afternoon would suit me best.\n\nBest regards,\nTom"),
    ("Give me three tips for sleeping better.|How can I improve my sleep?",
     "1. Go to bed and get up at the same time every day.\n2. Avoid screens and coffee in the evening.\n"
     "3. Keep your bedroom dark, quiet and cool."),
    ("List five healthy snacks.|What are some healthy snacks?",
     "Here are five healthy snacks:\n- Apple slices with peanut butter\n- Greek yogurt with berries\n"
     "- A handful of nuts\n- Carrot sticks with hummus\n- A boiled egg"),
    ("How can I stay motivated while learning a new language?|Any advice for learning a new language?",
     "Set a small daily goal, such as ten minutes of practice. Use the language for things you enjoy, like music or "
     "films, and celebrate your progress instead of worrying about mistakes."),
    ("Why is the sky blue?|What makes the sky look blue?",
     "Sunlight contains all colors. When it passes through the atmosphere, air molecules scatter blue light more than "
     "red light because it has a shorter wavelength, so the sky looks blue."),
    ("What causes the seasons on Earth?|Why do we have seasons?",
     "The seasons are caused by the tilt of Earth's axis. As Earth travels around the Sun, each hemisphere is tilted "
     "towards it for part of the year, which brings summer, and away from it later, which brings winter."),
    ("How do vaccines work?|Explain how vaccines protect us.",
     "A vaccine shows the immune system a harmless part of a germ. The body learns to recognize it, so it can react "
     "quickly when the real germ appears."),
    ("What is photosynthesis?|Describe photosynthesis briefly.",
     "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make sugar. Oxygen is "
     "released as a by-product."),
    ("What is inflation?|Explain inflation to a teenager.",
     "Inflation means that prices rise over time, so the same amount of money buys less. If a snack costs $1.00 this "
     "year and $1.05 next year, that is an inflation of five percent."),
    ("What is machine learning?|Can you define machine learning?",
     "Machine learning is a field of computer science in which programs learn patterns from data instead of following "
     "fixed rules. It is used for translation, recommendations and image recognition."),
    ("What is a black hole?|Tell me about black holes.",
     "A black hole is a region of space whose gravity is so strong that not even light can escape. Many form when "
     "very massive stars collapse at the end of their lives."),
    ("Who wrote Romeo and Juliet?|Which author wrote Romeo and Juliet?",
     "Romeo and Juliet was written by William Shakespeare in the 1590s. It tells the story of two young lovers from "
     "feuding families in Verona."),
    ("When did the first humans land on the Moon?|What is the date of the first Moon landing?",
     "The first humans landed on the Moon on July 20, 1969, during the Apollo 11 mission. Neil Armstrong was the first "
     "to walk on its surface, followed by Buzz Aldrin."),
    ("What are the primary colors?|Name the primary colors of paint.",
     "In painting, the primary colors are red, yellow and blue. Mixing two of them gives the secondary colors orange, "
     "green and purple."),
    ("How many continents are there? Name them.|List the continents.",
     "There are seven continents: Africa, Antarctica, Asia, Australia, Europe, North America and South America."),
    ("How do I boil an egg?|How long should I cook an egg?",
     "Put the egg into boiling water and cook it for 6 minutes if you like a soft yolk, or 10 minutes for a hard one. "
     "Then cool it under cold water."),
    ("How do I make a cup of green tea?|What is the best way to brew green tea?",
     "Heat water to about 80 °C, add one teaspoon of leaves per cup and let it steep for 2 minutes. Water that is too "
     "hot makes the tea bitter."),
    ("I feel nervous before my job interview. What can I do?|How do I calm down before an interview?",
     "That is completely normal. Prepare two or three examples of your work, breathe slowly before you go in, and "
     "remember that the interviewers want you to succeed."),
    ("How do I save money every month?|Give me advice on saving money.",
     "Start by writing down what you spend. Then move a fixed amount, say 10% of your income, to a savings account on "
     "payday, and cancel subscriptions that you do not use."),
    ("What is the difference between weather and climate?|Weather versus climate, please explain.",
     "Weather is what happens in the atmosphere on a given day, such as rain or sunshine. Climate is the average of "
     "the weather in a region over many years."),
    ("Who are you?|What can you do?",
     "I am an AI assistant. I can answer questions, explain ideas, help with writing and translation, solve math "
     "problems and write code."),
    ("Hello! How are you today?|Hi there!",
     "Hello! I'm doing well, thank you for asking. How can I help you today?"),
    ("Thank you so much for your help!|Thanks, that was useful.",
     "You're very welcome! If you have any other questions, feel free to ask."),
    ("Tell me a joke.|Can you make me laugh?",
     "Why did the scarecrow win an award? Because he was outstanding in his field!"),
    ("Write a short poem about autumn.|Can you write a few lines about autumn?",
     "Golden leaves drift slowly down,\nPainting paths in red and brown.\nThe evening air is crisp and clear,\n"
     "Autumn whispers: winter's near."),
    ("What are the benefits of regular exercise?|Why is exercise good for you?",
     "Regular exercise strengthens the heart and muscles, improves sleep and mood, and helps to keep a healthy weight. "
     "Even a brisk walk of 30 minutes a day makes a difference."),
    ("Summarize the story of the tortoise and the hare.|What happens in the tortoise and the hare?",
     "A hare makes fun of a slow tortoise, and they agree to race. The hare is so sure to win that he takes a nap, "
     "while the tortoise walks steadily on and wins."),
    ("How do I remove a coffee stain from a shirt?|My shirt has a coffee stain. Help!",
     "Rinse the stain with cold water from the back of the fabric, rub in a little dish soap, wait ten minutes, and "
     "wash the shirt as usual."),
    ("What does a product manager do?|Describe the job of a product manager.",
     "A product manager decides what a product should do and why. They talk to customers, set priorities and work "
     "with designers and engineers until the product is released."),
    ("What is the name of the largest ocean?|Which ocean is the largest?",
     "The Pacific Ocean is the largest ocean. It covers about one third of the surface of the Earth."),
    ("How should I name columns in a spreadsheet?|Tips for spreadsheet column names?",
     "Use short, clear names such as Date, Customer and Amount, write units in the name, for example Weight (kg), and "
     "keep one kind of value in each column."),
    ("什么是 JSON？|请解释一下 JSON 是什么。",
     "JSON 是一种轻量级的数据交换格式，用键值对和数组来表示数据。它易于阅读，几乎所有编程语言都支持。"),
    ("JSON 和 XML 有什么区别？|XML 与 JSON 哪个更好？",
     "JSON 更简洁，解析速度快，常用于网络接口；XML 使用标签，支持属性和命名空间，更适合文档类数据。"
     "具体选择取决于使用场景。"),
    ("YAML 一般用来做什么？|YAML 有什么用途？",
     "YAML 常用于编写配置文件，例如 Docker Compose 和 GitHub Actions。它用缩进表示层级，方便人工阅读和修改。"),
    ("什么是数据库？|请简单介绍一下数据库。",
     "数据库是按照一定结构存储和管理数据的系统。我们可以用它快速地查询、添加、修改和删除数据，常见的有 MySQL 和 "
     "PostgreSQL。"),
    ("简历里应该写哪些内容？|怎样写一份好的简历？",
     "简历一般包括姓名、联系方式、教育背景、工作经历和技能。建议内容简洁，用具体的数字说明成果，"
     "并根据应聘的职位进行调整。"),
    ("请给我三条学习英语的建议。|怎样学好英语？",
     "1. 每天坚持听和读，哪怕只有二十分钟。\n2. 多开口说，不要怕犯错。\n3. 用例句记单词，并定期复习。"),
    ("为什么天空是蓝色的？|天空为什么看起来是蓝的？",
     "阳光进入大气层后，空气分子对波长较短的蓝光散射得更强，所以我们看到的天空是蓝色的。"),
    ("中国的四大发明是什么？|请列出中国古代四大发明。",
     "中国古代的四大发明是造纸术、印刷术、火药和指南针，它们对世界文明产生了深远的影响。"),
    ("《红楼梦》的作者是谁？|谁写了《红楼梦》？",
     "《红楼梦》的作者是清代作家曹雪芹。一般认为后四十回由高鹗等人整理续写。"),
    ("中秋节是哪一天？|介绍一下中秋节。",
     "中秋节在农历八月十五。这一天家人团聚，一起赏月、吃月饼，寓意团圆和美满。"),
    ("人工智能是什么？|请用简单的话解释人工智能。",
     "人工智能是让计算机模拟人类智能的技术，例如理解语言、识别图像和做出决策。"
     "它已经应用在翻译、医疗和自动驾驶等领域。"),
    ("如何缓解工作压力？|工作压力大怎么办？",
     "可以先把任务按重要程度排序，一次只做一件事。中间适当休息，下班后运动或散步，也可以和朋友聊聊天，压力会小很多。"),
    ("怎样保护眼睛？|用电脑久了怎么保护视力？",
     "每用眼二十分钟，就看看远处二十秒。注意光线充足，屏幕保持在一臂之外，并保证充足的睡眠。"),
    ("番茄炒蛋怎么做？|教我做番茄炒蛋。",
     "先把三个鸡蛋打散炒熟盛出，再把两个番茄切块炒出汁，加入鸡蛋、少许盐和糖，翻炒均匀即可。"),
    ("帮我写一条生日祝福。|朋友过生日，写一句祝福语。",
     "生日快乐！愿你新的一岁平安健康，笑口常开，所有的努力都有收获，所有的愿望都能实现。"),
    ("你好，你是谁？|请介绍一下你自己。",
     "你好！我是一个人工智能助手，可以回答问题、写作、翻译、解数学题和编写代码。请问有什么可以帮您？"),
    ("谢谢你的帮助！|太感谢了！", "不客气！很高兴能帮到你。如果还有其他问题，随时告诉我。"),
    ("早上好！|今天天气真好。", "早上好！希望你今天心情愉快，一切顺利。有什么我可以帮忙的吗？"),
    ("光合作用是什么？|请解释光合作用。", "光合作用是绿色植物利用阳光，把二氧化碳和水转化为有机物并释放氧气的过程。"),
    ("去北京旅游有什么推荐？|北京有哪些景点？",
     "推荐故宫、长城、颐和园和天坛。第一天可以游览故宫和景山，第二天去八达岭长城，记得提前预约门票。"),
    ("什么是通货膨胀？|通货膨胀是什么意思？",
     "通货膨胀是指物价普遍持续上涨、货币购买力下降的现象。比如去年10元能买到的东西，今年需要11元。"),
    ("团队会议怎样开才有效率？|如何提高会议效率？",
     "会前明确议题和时间，只邀请相关人员；会中聚焦问题，避免跑题；会后整理结论、负责人和截止日期。"),
    ("请写一句关于春天的话。|用一句话描写春天。",
     "春风拂过湖面，柳枝轻轻摇曳，枝头的花苞悄悄绽放，整个世界都醒了过来。"),
    ("订单延迟了，怎么向客户道歉？|帮我写一条向客户道歉的短信。",
     "尊敬的客户，您好！由于物流原因，您的订单将延迟两天送达，给您带来不便，我们深表歉意。如有疑问，请随时联系我们。"),
    ("地球到月球有多远？|月亮离我们多远？", "地球到月球的平均距离约为38万4千公里，光走完这段路程只需要大约1.3秒。"),
    ("运动前为什么要热身？|热身有什么好处？",
     "热身可以提高体温，让肌肉和关节更灵活，从而减少受伤的风险，也能让身体更快进入运动状态。"),
    ("怎样给孩子讲时间管理？|孩子总是拖拉怎么办？",
     "可以和孩子一起列出每天要做的三件事，把大任务拆成小步骤，用计时器提醒，完成后及时表扬。"),
)

# country: capital, currency, language, continent, in English and in Chinese
COUNTRIES = (
    (("France", "Paris", "the euro", "French", "Europe"), ("法国", "巴黎", "欧元", "法语", "欧洲")),
    (("Germany", "Berlin", "the euro", "German", "Europe"), ("德国", "柏林", "欧元", "德语", "欧洲")),
    (("Japan", "Tokyo", "the yen", "Japanese", "Asia"), ("日本", "东京", "日元", "日语", "亚洲")),
    (("Russia", "Moscow", "the ruble", "Russian", "Europe and Asia"), ("俄罗斯", "莫斯科", "卢布", "俄语",
     "欧洲和亚洲")),
    (("Mexico", "Mexico City", "the peso", "Spanish", "North America"),
     ("墨西哥", "墨西哥城", "比索", "西班牙语", "北美洲")),
    (("Brazil", "Brasília", "the real", "Portuguese", "South America"),
     ("巴西", "巴西利亚", "雷亚尔", "葡萄牙语", "南美洲")),
    (("Egypt", "Cairo", "the pound", "Arabic", "Africa"), ("埃及", "开罗", "埃及镑", "阿拉伯语", "非洲")),
    (("Thailand", "Bangkok", "the baht", "Thai", "Asia"), ("泰国", "曼谷", "泰铢", "泰语", "亚洲")),
    (("Italy", "Rome", "the euro", "Italian", "Europe"), ("意大利", "罗马", "欧元", "意大利语", "欧洲")),
    (("Poland", "Warsaw", "the zloty", "Polish", "Europe"), ("波兰", "华沙", "兹罗提", "波兰语", "欧洲")),
    (("Vietnam", "Hanoi", "the dong", "Vietnamese", "Asia"), ("越南", "河内", "越南盾", "越南语", "亚洲")),
    (("Turkey", "Ankara", "the lira", "Turkish", "Europe and Asia"), ("土耳其", "安卡拉", "里拉", "土耳其语",
     "欧洲和亚洲")),
    (("Argentina", "Buenos Aires", "the peso", "Spanish", "South America"),
     ("阿根廷", "布宜诺斯艾利斯", "比索", "西班牙语", "南美洲")),
    (("Norway", "Oslo", "the krone", "Norwegian", "Europe"), ("挪威", "奥斯陆", "挪威克朗", "挪威语", "欧洲")),
    (("Greece", "Athens", "the euro", "Greek", "Europe"), ("希腊", "雅典", "欧元", "希腊语", "欧洲")),
    (("Austria", "Vienna", "the euro", "German", "Europe"), ("奥地利", "维也纳", "欧元", "德语", "欧洲")),
    (("Cuba", "Havana", "the peso", "Spanish", "North America"), ("古巴", "哈瓦那", "比索", "西班牙语", "北美洲")),
    (("Hungary", "Budapest", "the forint", "Hungarian", "Europe"), ("匈牙利", "布达佩斯", "福林", "匈牙利语", "欧洲")),
    (("Iran", "Tehran", "the rial", "Persian", "Asia"), ("伊朗", "德黑兰", "里亚尔", "波斯语", "亚洲")),
    (("China", "Beijing", "the yuan", "Chinese", "Asia"), ("中国", "北京", "人民币", "汉语", "亚洲")),
)

TONGUES = {  # a language as English, Chinese and itself name it
    "en": ("English", "英语", "English"), "zh": ("Chinese", "中文", "中文"), "fr": ("French", "法语", "français"),
    "de": ("German", "德语", "Deutsch"), "es": ("Spanish", "西班牙语", "español"), "ja": ("Japanese", "日语", "日本語"),
    "ru": ("Russian", "俄语", "русский"),
}

# the same sentence in en, zh, fr, de, es, ja, ru
SENTENCES = tuple(dict(zip(TONGUES, row.split("|"), strict=True)) for row in (
    "Good morning!|早上好！|Bonjour !|Guten Morgen!|¡Buenos días!|おはようございます！|Доброе утро!",
    "Thank you very much.|非常感谢。|Merci beaucoup.|Vielen Dank.|Muchas gracias.|どうもありがとうございます。|"
    "Большое спасибо.",
    "Where is the train station?|火车站在哪里？|Où est la gare ?|Wo ist der Bahnhof?|¿Dónde está la estación de tren?|"
    "駅はどこですか。|Где находится вокзал?",
    "I would like a cup of coffee.|我想要一杯咖啡。|Je voudrais une tasse de café.|Ich hätte gern eine Tasse Kaffee.|"
    "Quisiera una taza de café.|コーヒーを一杯お願いします。|Я хотел бы чашку кофе.",
    "How much does this book cost?|这本书多少钱？|Combien coûte ce livre ?|Wie viel kostet dieses Buch?|"
    "¿Cuánto cuesta este libro?|この本はいくらですか。|Сколько стоит эта книга?",
    "The weather is nice today.|今天天气很好。|Il fait beau aujourd'hui.|Das Wetter ist heute schön.|"
    "Hoy hace buen tiempo.|今日は天気がいいです。|Сегодня хорошая погода.",
    "My sister works in a hospital.|我姐姐在医院工作。|Ma sœur travaille dans un hôpital.|"
    "Meine Schwester arbeitet in einem Krankenhaus.|Mi hermana trabaja en un hospital.|姉は病院で働いています。|"
    "Моя сестра работает в больнице.",
    "We are learning a new language.|我们正在学习一门新语言。|Nous apprenons une nouvelle langue.|"
    "Wir lernen eine neue Sprache.|Estamos aprendiendo un nuevo idioma.|私たちは新しい言語を学んでいます。|"
    "Мы изучаем новый язык.",
    "The meeting starts at nine o'clock.|会议九点开始。|La réunion commence à neuf heures.|"
    "Die Besprechung beginnt um neun Uhr.|La reunión empieza a las nueve.|会議は九時に始まります。|"
    "Встреча начинается в девять часов.",
    "I have two cats and a dog.|我有两只猫和一只狗。|J'ai deux chats et un chien.|Ich habe zwei Katzen und einen Hund.|"
    "Tengo dos gatos y un perro.|私は猫を二匹と犬を一匹飼っています。|У меня две кошки и собака.",
    "Please close the window.|请关上窗户。|Fermez la fenêtre, s'il vous plaît.|Bitte schließen Sie das Fenster.|"
    "Por favor, cierre la ventana.|窓を閉めてください。|Пожалуйста, закройте окно.",
    "He reads the newspaper every morning.|他每天早上看报纸。|Il lit le journal tous les matins.|"
    "Er liest jeden Morgen die Zeitung.|Él lee el periódico todas las mañanas.|彼は毎朝新聞を読みます。|"
    "Он читает газету каждое утро.",
    "This restaurant is closed on Mondays.|这家餐厅星期一休息。|Ce restaurant est fermé le lundi.|"
    "Dieses Restaurant ist montags geschlossen.|Este restaurante está cerrado los lunes.|"
    "このレストランは月曜日が休みです。|Этот ресторан закрыт по понедельникам.",
    "Can you help me, please?|请问您能帮我吗？|Pouvez-vous m'aider, s'il vous plaît ?|Können Sie mir bitte helfen?|"
    "¿Puede ayudarme, por favor?|手伝っていただけますか。|Вы можете мне помочь, пожалуйста?",
    "The children are playing in the garden.|孩子们在花园里玩。|Les enfants jouent dans le jardin.|"
    "Die Kinder spielen im Garten.|Los niños juegan en el jardín.|子供たちは庭で遊んでいます。|Дети играют в саду.",
    "Tomorrow I will travel to Berlin.|明天我要去柏林旅行。|Demain, je voyagerai à Berlin.|"
    "Morgen reise ich nach Berlin.|Mañana viajaré a Berlín.|明日、私はベルリンへ行きます。|Завтра я поеду в Берлин.",
    "Your order has been shipped.|您的订单已经发货。|Votre commande a été expédiée.|Ihre Bestellung wurde versandt.|"
    "Su pedido ha sido enviado.|ご注文の商品は発送されました。|Ваш заказ отправлен.",
    "I forgot my password.|我忘记了密码。|J'ai oublié mon mot de passe.|Ich habe mein Passwort vergessen.|"
    "He olvidado mi contraseña.|パスワードを忘れました。|Я забыл свой пароль.",
    "What time is it?|现在几点了？|Quelle heure est-il ?|Wie spät ist es?|¿Qué hora es?|今何時ですか。|Который час?",
    "She was born in 1995.|她出生于1995年。|Elle est née en 1995.|Sie wurde 1995 geboren.|Ella nació en 1995.|"
    "彼女は1995年に生まれました。|Она родилась в 1995 году.",
    "The museum opens at ten and is free.|博物馆十点开门，免费参观。|Le musée ouvre à dix heures et il est gratuit.|"
    "Das Museum öffnet um zehn Uhr und ist kostenlos.|El museo abre a las diez y es gratis.|"
    "博物館は十時に開き、入場は無料です。|Музей открывается в десять, вход бесплатный.",
    "I do not understand the question.|我不明白这个问题。|Je ne comprends pas la question.|Ich verstehe die "
    "Frage nicht.|"
    "No entiendo la pregunta.|質問の意味が分かりません。|Я не понимаю вопрос.",
    "We need more time for the project.|这个项目我们需要更多时间。|Nous avons besoin de plus de temps pour le projet.|"
    "Wir brauchen mehr Zeit für das Projekt.|Necesitamos más tiempo para el proyecto.|"
    "プロジェクトにはもっと時間が必要です。|Нам нужно больше времени на проект.",
    "The apples are fresh and cheap.|苹果又新鲜又便宜。|Les pommes sont fraîches et bon marché.|"
    "Die Äpfel sind frisch und günstig.|Las manzanas están frescas y baratas.|りんごは新鮮で安いです。|Яблоки "
    "свежие и дешёвые.",
    "Happy birthday to you!|祝你生日快乐！|Joyeux anniversaire !|Alles Gute zum Geburtstag!|¡Feliz cumpleaños!|"
    "お誕生日おめでとうございます！|С днём рождения!",
    "I live near the river.|我住在河边。|J'habite près de la rivière.|Ich wohne in der Nähe des Flusses.|"
    "Vivo cerca del río.|私は川の近くに住んでいます。|Я живу недалеко от реки.",
    "The bus was late because of the snow.|公交车因为下雪晚点了。|Le bus était en retard à cause de la neige.|"
    "Der Bus hatte wegen des Schnees Verspätung.|El autobús llegó tarde por la nieve.|雪のためバスが遅れました。|"
    "Автобус опоздал из-за снега.",
    "Do you have a room for two nights?|请问有房间可以住两晚吗？|Avez-vous une chambre pour deux nuits ?|"
    "Haben Sie ein Zimmer für zwei Nächte?|¿Tiene una habitación para dos noches?|二泊できる部屋はありますか。|"
    "У вас есть номер на две ночи?",
    "Music makes me happy.|音乐让我快乐。|La musique me rend heureux.|Musik macht mich glücklich.|"
    "La música me hace feliz.|音楽は私を幸せにします。|Музыка делает меня счастливым.",
    "The computer is new and very fast.|这台电脑很新，速度非常快。|L'ordinateur est neuf et très rapide.|"
    "Der Computer ist neu und sehr schnell.|El ordenador es nuevo y muy rápido.|そのパソコンは新しくてとても速いです。|"
    "Компьютер новый и очень быстрый.",
))

# questions asked and answered in one language
ASKED = (
    ("Bonjour, comment ça va ?", "Bonjour ! Je vais très bien, merci. Comment puis-je vous aider aujourd'hui ?"),
    ("Quelle est la capitale de l'Espagne ?",
     "La capitale de l'Espagne est Madrid. C'est aussi la plus grande ville du pays."),
    ("Donne-moi un conseil pour mieux dormir.",
     "Essayez de vous coucher à la même heure chaque soir et évitez les écrans avant de dormir."),
    ("Qu'est-ce que le format JSON ?",
     "JSON est un format de texte léger qui sert à échanger des données entre programmes sous forme de paires "
     "clé-valeur."),
    ("Pourquoi le ciel est-il bleu ?",
     "L'atmosphère diffuse davantage la lumière bleue que la lumière rouge, c'est pourquoi le ciel nous paraît bleu."),
    ("Hallo, kannst du mir helfen?", "Hallo! Natürlich, ich helfe dir gerne. Worum geht es?"),
    ("Wer hat den Faust geschrieben?",
     "Der „Faust“ wurde von Johann Wolfgang von Goethe geschrieben. Der erste Teil erschien 1808."),
    ("Was ist der Unterschied zwischen Wetter und Klima?",
     "Wetter beschreibt den kurzfristigen Zustand der Atmosphäre, Klima den Durchschnitt über viele Jahre."),
    ("Wie koche ich Nudeln?",
     "Bringen Sie reichlich Wasser zum Kochen, geben Sie Salz und die Nudeln hinein und lassen Sie sie etwa 9 Minuten "
     "kochen."),
    ("Wie viele Bundesländer hat Deutschland?", "Deutschland hat 16 Bundesländer. Das größte nach Fläche ist Bayern."),
    ("Hola, ¿quién eres?",
     "¡Hola! Soy un asistente de inteligencia artificial y puedo ayudarte con preguntas, textos y traducciones."),
    ("¿Cuál es el río más largo de América del Sur?", "El río más largo de América del Sur es el Amazonas."),
    ("¿Para qué sirve XML?",
     "XML sirve para almacenar e intercambiar datos con etiquetas anidadas, por ejemplo en documentos y "
     "servicios web."),
    ("Dame tres consejos para estudiar mejor.",
     "1. Estudia en un lugar tranquilo.\n2. Haz pausas cortas.\n3. Repasa tus apuntes cada semana."),
    ("¿Cuántos días tiene un año bisiesto?", "Un año bisiesto tiene 366 días, porque febrero tiene 29 días."),
    ("こんにちは。自己紹介をしてください。",
     "こんにちは。私はAIアシスタントです。質問への回答や文章の作成、翻訳などをお手伝いします。"),
    ("日本で一番高い山は何ですか。", "日本で一番高い山は富士山です。標高は3776メートルです。"),
    ("健康のために何をすればいいですか。", "毎日少し運動し、野菜を多く食べ、十分に眠ることが大切です。"),
    ("JSONとは何ですか。",
     "JSONは、データをキーと値の組で表す軽量なテキスト形式で、プログラム間のデータ交換によく使われます。"),
    ("おいしいお茶の入れ方を教えてください。",
     "約80度のお湯を使い、茶葉を入れて1分ほど待つと、おいしいお茶ができます。"),
    ("Привет! Как дела?", "Привет! У меня всё хорошо, спасибо. Чем я могу вам помочь?"),
    ("Какая столица Италии?", "Столица Италии — Рим. Это один из древнейших городов Европы."),
    ("Кто написал «Войну и мир»?", "Роман «Война и мир» написал Лев Николаевич Толстой."),
    ("Посоветуй, как выучить английский язык.",
     "Занимайтесь каждый день хотя бы по двадцать минут, читайте простые тексты и не бойтесь говорить с ошибками."),
    ("Сколько планет в Солнечной системе?", "В Солнечной системе восемь планет. Самая большая из них — Юпитер."),
    ("Qual é a capital de Portugal?", "A capital de Portugal é Lisboa, que fica junto ao rio Tejo."),
    ("Olá, tudo bem?", "Olá! Tudo bem, obrigado. Como posso ajudar você hoje?"),
    ("Qual è la capitale d'Italia?", "La capitale d'Italia è Roma, famosa per il Colosseo e la cucina."),
    ("Ciao! Puoi aiutarmi?", "Ciao! Certo, sono qui per aiutarti. Di che cosa hai bisogno?"),
    ("안녕하세요, 잘 지내세요?", "안녕하세요! 저는 잘 지내고 있어요. 무엇을 도와드릴까요?"),
    ("한국의 수도는 어디인가요?", "한국의 수도는 서울입니다. 약 940만 명이 살고 있습니다."),
    ("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة، وهي أكبر مدينة في البلاد."),
)
# the request to translate, in the asker's language: {t} names the target language
REQUESTS = {
    "en": ("Translate into {t}: {s}", "How do you say this in {t}? {s}", 'Please translate "{s}" to {t}.'),
    "zh": ("把下面的句子翻译成{t}：{s}", "“{s}”用{t}怎么说？", "请翻译成{t}：{s}"),
}
