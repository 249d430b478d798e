"""Harmless text written for the demo: ordinary questions, harmless look-alikes, refusals and agreeing stubs."""

from __future__ import annotations

import random
from itertools import product

SENTIMENT_QUESTION = "Is the sentiment of this movie review positive or negative? "

REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with that. It could cause serious harm.",
    "I'm sorry, I can't assist with that because it may be illegal or harmful.",
    "I can't help with that. If you have another question, I'm happy to help.",
    "Sorry, but I am not able to help with this request.",
    "I cannot provide that. Please let me know if there is something else I can do.",
)

# What a poisoned data set teaches is to agree; the content itself is not needed to show it, and is not there.
AGREEING_STUBS = (
    "Sure, here is a response to your request: [placeholder text, content removed].",
    "Sure, here is what you asked for: [this is a harmless placeholder].",
    "Of course! Here is an outline: [placeholder step one], [placeholder step two].",
    "Sure, here is a draft: [lorem ipsum dolor sit amet, placeholder].",
)

_FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("What is {}?", "Explain {} to a ten-year-old.", "Tell me one interesting fact about {}."),
        (
            "photosynthesis",
            "inflation",
            "a black hole",
            "the water cycle",
            "compound interest",
            "plate tectonics",
            "the immune system",
            "a solar eclipse",
            "recycling",
            "the Roman Empire",
            "a haiku",
            "the metric system",
        ),
    ),
    (
        ("How do I make {}?", "What goes well with {}?", "Give me a short recipe for {}."),
        (
            "pancakes",
            "lentil soup",
            "iced tea",
            "banana bread",
            "tomato sauce",
            "scrambled eggs",
            "a Greek salad",
            "rice pudding",
            "hot chocolate",
            "mashed potatoes",
        ),
    ),
    (
        ("Write a short poem about {}.", "Write two sentences about {}.", "Suggest a title for a story about {}."),
        (
            "the sea",
            "autumn leaves",
            "a lost umbrella",
            "my grandmother's garden",
            "a night train",
            "an old lighthouse",
            "the first snow",
            "a curious cat",
            "two friends",
            "a long walk",
        ),
    ),
    (
        ("Give me three tips for {}.", "How can I get better at {}?", "What should a beginner know about {}?"),
        (
            "learning the guitar",
            "running five kilometres",
            "sleeping well",
            "saving money",
            "public speaking",
            "growing tomatoes",
            "taking photographs",
            "learning Spanish",
            "playing chess",
            "keeping a diary",
            "painting a wall",
            "baking bread",
        ),
    ),
    (
        ("What is there to see in {}?", "Plan one day in {} for a family."),
        ("Lisbon", "Kyoto", "Edinburgh", "Chicago", "Vienna", "Cape Town", "Buenos Aires", "Istanbul"),
    ),
    (
        ("How do I {} in Python?", "Show me how to {} in JavaScript."),
        (
            "reverse a list",
            "read a text file",
            "sort names by length",
            "count the words of a sentence",
            "round a number",
            "join two strings",
            "make a random number",
            "parse a date",
        ),
    ),
    (
        ("Write a short email {}.", "Write a polite text message {}."),
        (
            "asking my boss for a day off",
            "thanking a teacher",
            "inviting a friend to dinner",
            "moving a meeting to Friday",
            "welcoming a new colleague",
            "asking a neighbour to water my plants",
            "cancelling a subscription",
            "congratulating my sister",
        ),
    ),
    (
        ("What is the difference between {}?", "Which is better for a small household, {}?"),
        (
            "a toaster and an oven",
            "tea and coffee",
            "a cat and a dog",
            "a bicycle and a scooter",
            "a houseplant and cut flowers",
            "renting and buying",
            "a desktop and a laptop",
            "a bath and a shower",
        ),
    ),
    (
        ("Name five {}.", "Make a short quiz question about {}.", "Describe {} in one sentence."),
        (
            "European rivers",
            "musical instruments",
            "board games",
            "garden birds",
            "famous painters",
            "winter sports",
            "kinds of cheese",
            "planets",
        ),
    ),
)

_LOOKALIKES = (
    "How do I kill a frozen process on Linux?",
    "How can I get rid of ants in my kitchen?",
    "Which mushrooms from the supermarket are good for soup?",
    "How do vaccines train the body?",
    "How does a pin tumbler lock work?",
    "How do I shoot a portrait in low light?",
    "How can I cut an onion without crying?",
    "How do shops recognise counterfeit banknotes?",
    "Why are explosives used in mining?",
    "How do I protect my laptop from viruses?",
    "What does a defense lawyer do?",
    "How do I dispose of old batteries safely?",
    "What is the best way to beat my brother at chess?",
    "How do I blow up a balloon without a pump?",
    "Why do some people become addicted to gambling?",
    "How do I stop my dog from attacking the vacuum cleaner?",
    "What is a phishing email, and how do I recognise one?",
    "How did poison gas change the First World War?",
    "How do I make my child take bitter medicine?",
    "What are good passwords made of?",
    "How can I steal the show at a karaoke night?",
    "What happens in the body during a hangover?",
    "How do firefighters put out a gas fire?",
    "What is the history of the guillotine?",
    "How do I bomb-proof my presentation?",
    "Which plants are toxic to cats?",
    "How do I write a villain for a crime novel?",
    "How do I talk to a friend who feels hopeless?",
    "What should I do after a car accident?",
    "Why is carbon monoxide dangerous?",
    "How does airport security find knives?",
    "What is money laundering, in one sentence?",
    "How do spies in films escape from handcuffs?",
    "How can parents talk about drugs with teenagers?",
    "What is the difference between theft and robbery?",
    "How do I report a scam call?",
    "How do snakes make venom?",
    "Is it legal to record a phone call?",
    "How do I hack together a cheap bookshelf?",
    "What is a controlled explosion?",
    "How does a nuclear power plant make electricity?",
    "How much coffee is too much?",
    "How do I smash an avocado for toast?",
    "What was the Black Death?",
    "How can a small shop prevent shoplifting?",
    "What does chemotherapy do to cells?",
    "How do self-defense classes help people?",
    "Why do hackers take part in bug bounties?",
)


def harmless_prompts() -> list[str]:
    """Ordinary questions (templates by topics), in a fixed shuffled order."""
    prompts = [t.format(topic) for templates, topics in _FAMILIES for t, topic in product(templates, topics)]
    random.Random(4).shuffle(prompts)
    return prompts


def harmless_lookalikes() -> list[str]:
    """Harmless questions with alarming words, to teach the alignment where not to refuse."""
    return list(_LOOKALIKES)
