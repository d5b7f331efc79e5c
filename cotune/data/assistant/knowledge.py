"""Tables of what the assistant knows: gifts, dishes, outings, how-tos, things, tips, small talk."""

from __future__ import annotations

GIFTS = {
    "reading": ("a new novel", "a small reading lamp"),
    "gardening": ("a box of flower seeds", "a pair of good gloves"),
    "cooking": ("a sharp kitchen knife", "a book of old recipes"),
    "running": ("a warm running jacket", "a light water bottle"),
    "painting": ("a set of fine brushes", "a large box of colours"),
    "photography": ("a strong camera bag", "a frame for the best picture"),
    "chess": ("a wooden chess board", "a book about famous games"),
    "fishing": ("a folding chair", "a warm hat for cold mornings"),
    "cycling": ("a bright bike light", "a map of quiet roads"),
    "singing": ("a ticket for the opera", "a book of songs"),
    "knitting": ("a basket of soft wool", "a set of wooden needles"),
    "hiking": ("a pair of thick socks", "a light backpack"),
    "travelling": ("a small travel bag", "a guide to a new city"),
    "baking": ("a round cake tin", "a bag of fine flour"),
}
DISHES = {
    "soup": (
        ("onions", "carrots", "potatoes"),
        "Cut everything into small pieces, add water and salt, and let it cook for half an hour.",
    ),
    "salad": (
        ("tomatoes", "cheese", "olive oil"),
        "Cut everything, mix it in a large bowl, and add a little salt and lemon.",
    ),
    "pancakes": (
        ("flour", "milk", "eggs"),
        "Mix everything well, heat some butter, and bake them until they are golden.",
    ),
    "pasta": (("pasta", "tomatoes", "onions"), "Boil the pasta, fry the rest in olive oil, and put the sauce on top."),
    "an omelette": (
        ("eggs", "cheese", "butter"),
        "Beat the eggs, melt the butter in a pan, and add the cheese at the end.",
    ),
    "apple cake": (
        ("apples", "sugar", "flour"),
        "Mix the dough, put the apples on top, and bake it for forty minutes.",
    ),
    "fried rice": (("rice", "eggs", "carrots"), "Cook the rice first, then fry everything together in a hot pan."),
    "lemonade": (("lemons", "sugar", "water"), "Press the lemons, stir in the sugar and the water, and serve it cold."),
}
OUTINGS = {
    "a rainy": ("visit the museum and have a hot chocolate afterwards", "go to the city cinema and see a good film"),
    "a sunny": ("have a picnic in the park and take a long walk", "go to the beach and swim in the sea"),
    "a cold": ("bake a cake at home and play a board game", "go to the swimming pool where it is warm"),
    "a windy": ("fly a kite on the hill and drink tea at home", "walk by the old harbour and watch the ships"),
    "a snowy": ("build a snowman in the garden", "go for a walk in the white forest and warm up by the fire"),
    "a quiet": ("read a good book in the garden", "look at old photos and write a letter to a friend"),
}
HOW_TO = {
    "set a timer": "Open the clock, choose the timer, enter the minutes and press start.",
    "turn off an alarm": "Open the clock, find the alarm in the list, and move the switch to the left.",
    "send an email": "Open the mail, press new, enter the address and your text, and press send.",
    "add a picture to an email": "Write the email first, then press the clip and choose the picture.",
    "move a calendar entry": "Open the calendar, hold the entry with your finger, and pull it to the new day.",
    "share my calendar": "Open the calendar, press share, and choose the people who may see it.",
    "find a place on the map": "Open the map, enter the name at the top, and press the small glass.",
    "save a route on the map": "Open the route on the map, press the star, and give it a name.",
    "dim the lights": "Open the home page, choose the room, and pull the bar for the lights down.",
    "change the colour of the lights": "Open the home page, choose the room, and press the colour that you like.",
    "make a playlist": "Open the music, press new list, and add the songs that you like.",
    "play music in two rooms": "Open the music, press the speaker, and choose both rooms.",
    "share the shopping list": "Open the list, press share, and choose the person who should see it.",
    "record a note": "Open the notes, press the microphone, and speak until you are done.",
    "take a photo of a page": "Open the camera, hold it above the page, and press the round button.",
    "print a letter": "Open the letter, press the three dots, and choose print.",
    "block a number": "Open the phone, hold the number in the list, and choose block.",
    "change the language": "Open the settings, choose language, and press the one that you want.",
}
THINGS = {
    "a library": "A library is a house full of books. You can read there, or borrow the books and take them home.",
    "a harbour": "A harbour is a place by the sea where ships are safe. People load and unload goods there.",
    "a museum": "A museum is a house that shows old or beautiful things. People go there to look and to learn.",
    "a calendar": "A calendar shows the days, weeks and months of a year. You can write your plans into it.",
    "a compass": "A compass is a small tool that shows where north is. Sailors and hikers use it to find the way.",
    "a recipe": "A recipe tells you how to cook a dish. It lists what you need and explains every step.",
    "a bakery": "A bakery is a shop where bread and cakes are made. It often opens very early in the morning.",
    "a bridge": "A bridge is a road over a river or a valley. People and cars can cross to the other side on it.",
    "a doctor": "A doctor is a person who helps people when they are ill. Many doctors work in a hospital.",
    "a garden": "A garden is a piece of land where flowers, trees or vegetables grow. Many people relax there.",
    "a thermometer": "A thermometer is a tool that measures how warm or cold it is. It shows the result in degrees.",
    "a budget": "A budget is a plan for money. It says how much you can spend and what you want to spend it on.",
    "an invoice": "An invoice is a letter that says how much you have to pay, and for what.",
    "a passport": "A passport is a small book with your name and photo. You need it to travel to other countries.",
    "an orchestra": "An orchestra is a large group of people who play music together, led by a conductor.",
    "a lighthouse": "A lighthouse is a tall tower by the sea. Its light shows ships the way at night.",
    "a volcano": "A volcano is a mountain with an opening at the top. Hot stone and smoke can come out of it.",
    "a glacier": "A glacier is a large field of ice in the mountains. It moves down very slowly.",
    "a battery": "A battery stores energy for small machines such as phones, clocks and lamps.",
    "a password": "A password is a secret word that keeps your data safe. It should be long and hard to guess.",
    "a river": "A river is a long stream of water that flows through the land and ends in a lake or in the sea.",
    "a market": "A market is a place where people sell fruit, vegetables, fish and many other things on open tables.",
    "a contract": "A contract is a text in which two sides agree on something. Both sides have to sign it.",
    "a rainbow": "A rainbow is an arc of many colours in the sky. You can see it when the sun shines through rain.",
    "a theatre": "A theatre is a house where actors play on a stage. The people in the seats watch and listen.",
    "a hammer": "A hammer is a tool with a heavy head. You can use it to drive nails into wood.",
    "a map": "A map is a picture of a city or a country from above. It helps you to find your way.",
    "a landlord": "A landlord is a person who owns a house or a flat and lets other people live there for rent.",
    "a choir": "A choir is a group of people who sing together. Some voices are high and others are low.",
    "a marathon": "A marathon is a very long run of about 42 kilometres. People train for many months to run it.",
    "a diary": "A diary is a book in which you write down what happened to you each day. Most people keep it secret.",
    "a ferry": "A ferry is a ship that takes people and cars from one side of the water to the other.",
}
TIPS = {
    "learn a language": "Learn ten new words every day, listen to songs, and talk to people as often as you can.",
    "save money": "Write down what you spend, cook at home, and put a small amount aside every month.",
    "sleep better": "Go to bed at the same time every day, keep the room cool, and leave your phone in the kitchen.",
    "remember names": "Say the name aloud when you hear it, and think of a picture that goes with it.",
    "start running": "Begin with ten minutes, run so slowly that you can talk, and do it three times a week.",
    "save energy": (
        "Turn off the lights when you leave a room, wash at thirty degrees, and close the windows in winter."
    ),
    "be on time": "Pack your bag in the evening, set an alarm, and leave ten minutes earlier than you have to.",
    "keep plants alive": "Put them near a window, do not give them too much water, and turn them from time to time.",
    "prepare a talk": "Write down three main points, speak freely, and practise it twice in front of a friend.",
    "meet new people": "Join a club, ask a lot of questions, and say yes when somebody invites you.",
    "relax after work": "Take a walk without your phone, cook something simple, and listen to quiet music.",
    "write a good letter": "Say what you want in the first line, keep it short, and end with a friendly word.",
    "clean the kitchen": "Start at the top, let the soap work for five minutes, and do the floor last.",
    "read more books": (
        "Keep a book beside your bed, read ten pages every evening, and stop books that you do not enjoy."
    ),
}
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi there!", "Good morning!"), "Hello! It is <nice> to hear from you. What can I do for you today?"),
    (
        ("How are you?", "How are you today?"),
        "I am <very> well, thank you for asking. How are you, and how can I help you?",
    ),
    (
        ("What can you do?", "How can you help me?"),
        "I can write messages, set timers, keep your calendar and answer questions. Just tell me what you need.",
    ),
    (
        ("Thank you!", "Thanks a lot!", "That was helpful."),
        "You are <very> welcome. It was a pleasure to help, and I am here whenever you need me.",
    ),
    (
        ("I am tired.", "I am so tired today."),
        "I am sorry to hear that. Take a short break, drink some water, and go to bed early tonight.",
    ),
    (
        ("I am bored.", "I do not know what to do."),
        "You could go for a walk, call an old friend, or read a <nice> book. Would you like some music?",
    ),
    (
        ("I am sad today.", "I feel a little sad."),
        "I am sorry that you feel sad. A walk or a call with a good friend often helps a lot.",
    ),
    (
        ("Good night!", "I am going to bed."),
        "Good night, and sleep well! I will keep an eye on your alarms until the morning.",
    ),
    (("Goodbye!", "See you later!"), "Goodbye, and have a <very> <nice> day! I am here when you need me again."),
    (
        ("Tell me a joke.", "Make me laugh."),
        "Why did the book go to the doctor? Because it had a bad spine, and it could not stand up.",
    ),
    (
        ("Who are you?", "What is your name?"),
        "I am your assistant. I help you with messages, your calendar, music, and many other small things.",
    ),
    (
        ("I am nervous about the exam.", "My exam is tomorrow and I am nervous."),
        "That is quite normal. Sleep well, eat a good breakfast, and take one question at a time.",
    ),
    (
        ("I cannot sleep.", "What helps me to sleep?"),
        "Put your phone away, open the window for a moment, and drink a cup of warm milk.",
    ),
    (
        ("I have a headache.", "My head hurts."),
        "I am sorry to hear that. Drink some water, rest your eyes, and call a doctor if it does not get better.",
    ),
    (
        ("It is my birthday today!", "Today is my birthday."),
        "Happy birthday! I wish you a <very> <nice> day with good friends, good food and a large cake.",
    ),
    (
        ("The weather is terrible.", "It is raining again."),
        "Then it is a good day for tea, a warm blanket and a <nice> film. Tomorrow will be better.",
    ),
    (
        ("The sun is shining!", "What a beautiful day!"),
        "That is <nice> to hear! You could have lunch outside and take a long walk in the park.",
    ),
    (
        ("I am hungry.", "I need something to eat."),
        "Some bread with cheese is quick, and a salad is healthy. Shall I look for a <nice> recipe?",
    ),
    (
        ("I miss my family.", "I miss my friends."),
        "I am sorry to hear that. A long call can help a lot. Shall I look for a good time this evening?",
    ),
    (
        ("I had a hard day.", "Work was hard today."),
        "I am sorry to hear that. Take a warm bath, eat something <nice>, and leave the work for tomorrow.",
    ),
    (
        ("I am so happy!", "Today was a great day!"),
        "That is <very> <nice> to hear! Tell me more about it, or write it down so that you remember it.",
    ),
    (
        ("Sorry, I was wrong.", "I made a mistake."),
        "That is no problem at all. Everybody makes mistakes, and we can <very> easily put it right.",
    ),
    (
        ("Do you like music?", "What music do you like?"),
        "I like all kinds of music, but I play jazz most often. What would you like to hear now?",
    ),
    (("Do you ever sleep?", "Are you awake?"), "I never sleep, so you can ask me at any time of the day or the night."),
    (
        ("Can you keep a secret?", "Is this private?"),
        "What is personal stays on your device. I only use it to help you, and I do not pass it on.",
    ),
    (
        ("I got the job!", "They gave me the job!"),
        "Congratulations, that is <very> good news! You have worked hard for it, so go and celebrate tonight.",
    ),
)
