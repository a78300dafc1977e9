"""What the served model is asked, to be compared with the reference: every kind of prompt that a server meets."""

from __future__ import annotations

from collections.abc import Sequence

Prompt = str | Sequence[dict[str, str]]
"""A text to continue, or a conversation."""


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def talk(*turns: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn, the user first."""
    begin = [{"role": "system", "content": system}] if system else []
    return begin + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


_RIVER = (
    "The river rises among wet meadows below the pass and for its first miles is hardly more than a ditch. "
    "Sheep drink from it, and in dry summers a child can step across. Where the second brook joins, the bed turns to "
    "gravel and the water begins to be heard. "
)
_LEDGER = "".join(
    f"Entry {i}: {n} crates of {what} were received from {whence} and stored in hall {hall}.\n"
    for i, (n, what, whence, hall) in enumerate(
        [
            (12, "apples", "Kent", 3),
            (7, "lamp oil", "Hull", 1),
            (40, "roof slate", "Bangor", 9),
            (3, "violins", "Cremona", 2),
        ]
        * 5,
        start=1,
    )
)
_SOURCE = '''
class Ring:
    """A buffer that forgets its oldest item when it is full."""

    def __init__(self, size):
        self.items = [None] * size
        self.head = 0
        self.count = 0

    def push(self, item):
        self.items[(self.head + self.count) % len(self.items)] = item
        if self.count == len(self.items):
            self.head = (self.head + 1) % len(self.items)
        else:
            self.count += 1

    def pop(self):
'''

SHORT: list[Prompt] = [
    "Hello",
    "1",
    "The",
    "Once upon a time",
    "The three primary colours are",
    "2 + 2 =",
    "To be, or not to be,",
]
UNICODE: list[Prompt] = [
    "Die Größe der Straße überraschte",
    "日本の首都は東京です。",
    "Здравствуйте, меня зовут",
    "😀😃😄 means that I am",
    "naïve café — “résumé” ∑∆√ ≈ 3.14159",
    "مرحبا، كيف",
    user("Repeat this exactly: 🦜 déjà vu — Ελλάδα, 한국어, 中文 👩‍👩‍👧‍👦"),
]
CODE: list[Prompt] = [
    "def fibonacci(n):\n    ",
    "SELECT name, count(*) FROM orders WHERE",
    '{"name": "Ada", "born": 1815, "languages": ["',
    "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0;",
    _SOURCE,
    user("Write a Python function that reverses a linked list."),
]
CHAT: list[Prompt] = [
    user("What is the capital of France?"),
    user("Explain gravity to a child in three sentences."),
    user("List five animals that live in the sea."),
    talk("Name a prime number above 100.", system="Answer in as few words as you can."),
    talk("Who wrote Faust?", "Johann Wolfgang von Goethe.", "When was he born?"),
    talk(
        "I have 3 apples and buy 4 more.",
        "Then you have 7 apples.",
        "I give away 2.",
        "Then you have 5 apples.",
        "How many would I have had to buy to have 10?",
        system="You are a patient teacher of arithmetic.",
    ),
]
LONG: list[Prompt] = [
    _RIVER * 2 + "Below the village",
    _RIVER * 4,
    _RIVER * 7 + "At last",
    _LEDGER + "Entry 21:",
    user("Summarise this ledger in one sentence.\n\n" + _LEDGER),
    user("What does the method push do when the ring is full?\n" + _SOURCE),
    talk(_RIVER * 3 + "\nWhat is this text about?", "A river near its source.", "Who drinks from it?"),
    " ".join(str(n * n) for n in range(1, 90)),
]

ALL: list[Prompt] = SHORT + UNICODE + CODE + CHAT + LONG
