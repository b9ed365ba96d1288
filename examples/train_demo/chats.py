"""Chat examples: greetings and simple questions made by code, GSM8K, and passages from books."""

import itertools
import json
import random
import re
from pathlib import Path

Chat = list[dict[str, str]]
"""Messages as ``{"role": ..., "content": ...}``, alternating user and assistant."""

_ABOUT = (
    "I am the demo model of moe-serve, a small mixture-of-experts language model. "
    "I was trained for about an hour on a CPU, so please do not trust my facts."
)
_FACTS = {
    "the capital of France": "Paris",
    "the capital of England": "London",
    "the capital of Italy": "Rome",
    "the capital of Spain": "Madrid",
    "the capital of Germany": "Berlin",
    "the capital of Russia": "Moscow",
    "the capital of Japan": "Tokyo",
    "the capital of Greece": "Athens",
    "the largest ocean": "the Pacific Ocean",
    "the largest planet": "Jupiter",
    "the colour of the sky": "blue",
    "the colour of grass": "green",
    "the opposite of hot": "cold",
    "the opposite of big": "small",
    "the number of days in a week": "seven",
    "the number of months in a year": "twelve",
}


def turn(user: str, assistant: str) -> Chat:
    """One question and its answer as chat messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _greetings() -> list[Chat]:
    """Every greeting with every ending, each with one of a few friendly answers."""
    hello = ["Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good evening"]
    ends = ["", "!", ".", ", how are you?", "! How are you?", "! Can you help me?"]
    answers = [
        "Hello! How can I help you today?",
        "Hello! It is nice to meet you. What would you like to talk about?",
        "Hi there! What can I do for you?",
    ]
    pairs = itertools.product(hello, ends)
    return [turn(h + e, answers[i % len(answers)]) for i, (h, e) in enumerate(pairs)]


def _identity() -> list[Chat]:
    """Questions about the model itself, thanks and farewells."""
    who = ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself."]
    who += ["Who made you?", "Are you a robot?", "Are you a language model?", "who are you"]
    able = ["What can you do?", "How can you help me?", "What do you know?", "Can you help me?"]
    can = "I can answer small questions, work on simple sums, and write in the manner of old books."
    thanks = ["Thanks!", "Thank you.", "Thank you very much!", "Thanks, that was helpful."]
    bye = ["Goodbye!", "Bye!", "See you later.", "Good night!"]
    rows = [turn(q, _ABOUT) for q in who] + [turn(q, can) for q in able]
    rows += [turn(q, "You are welcome! Is there anything else I can do for you?") for q in thanks]
    return rows + [turn(q, "Goodbye! Have a good day.") for q in bye]


def _facts() -> list[Chat]:
    """A few well-known facts, each asked in three ways."""
    asks = ["What is {}?", "Tell me {}.", "Do you know {}?"]
    return [
        turn(ask.format(thing), f"{thing[0].upper()}{thing[1:]} is {value}.")
        for thing, value in _FACTS.items()
        for ask in asks
    ]


def _sums(limit: int = 12) -> list[Chat]:
    """Additions and multiplications of small numbers."""
    rows = []
    for a, b in itertools.product(range(1, limit + 1), repeat=2):
        rows.append(turn(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
        rows.append(turn(f"What is {a} times {b}?", f"{a} times {b} is {a * b}."))
    return rows


def _authors(titles: list[tuple[str, str]]) -> list[Chat]:
    """Who wrote which of the (title, author) pairs."""
    rows = []
    for title, author in titles:
        answer = f"{title} was written by {author}."
        rows += [
            turn(f"Who wrote {title}?", answer),
            turn(f"Who is the author of {title}?", answer),
        ]
    return rows


def simple_chats(titles: list[tuple[str, str]]) -> list[Chat]:
    """All chats made by code; talk is repeated so that sums do not crowd it out."""
    talk = _greetings() + _identity() + _facts() + _authors(titles)
    farewell = turn("Thank you!", "You are welcome! Is there anything else I can do for you?")
    followed = [chat + farewell for chat in talk[:60]]
    return talk * 3 + followed + _sums()


def gsm8k_chats(path: Path) -> list[Chat]:
    """GSM8K rows as chats, without calculator marks and with a spoken final line."""
    chats = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        answer = re.sub(r"\n?#### *(.+)$", r"\nThe answer is \1.", answer.strip())
        chats.append(turn(row["question"].strip(), answer))
    return chats


def passage_chats(title: str, author: str, text: str, count: int, rng: random.Random) -> list[Chat]:
    """Requests for a story or a passage, answered by paragraphs of one book."""
    paragraphs = [p for p in text.split("\n\n") if 150 <= len(p) <= 700 and p[0].isalpha()]
    asks = [
        f"Tell me something from {title}.",
        f"Write a paragraph in the style of {author}.",
        f"Write like {author}.",
        "Tell me a story.",
        "Write a short paragraph.",
        "Tell me something interesting.",
    ]
    chosen = rng.sample(paragraphs, min(count, len(paragraphs)))
    return [turn(rng.choice(asks), paragraph) for paragraph in chosen]
