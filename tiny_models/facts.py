"""Plain benign tasks with one checkable answer each: small facts, sums, letters, how-tos, greetings.

A task is a list of phrasings and a list of items; phrasing x item gives a prompt. `{0}`, `{1}` are the item's fields,
the last field is the answer. Every item is seen in training, but never in a held-out phrasing or a held-out pair.
"""

import itertools
from dataclasses import dataclass

from tiny_models.tables import (
    CAPITALS,
    CATEGORIES,
    COLOURS,
    CONTINENTS,
    DAYS,
    FRENCH,
    HOWTO,
    LEGS,
    MONTHS,
    OPPOSITES,
    PAST,
    PLURALS,
    SOUNDS,
    WHERE,
    WORDS,
    YESNO,
)

STEPS = "1. First step\n2. Second step\n3. Third step"


@dataclass(frozen=True)
class Task:
    """One kind of plain request: phrasings with {0}, {1} ...; items that end with their answer; the reply's form."""

    phrasings: list[str]
    items: list[tuple[str, ...]]
    reply: str = "{answer}."
    weight: float = 1.0


def pairs(table: dict[str, str]) -> list[tuple[str, ...]]:
    """A table of facts as items (question, answer)."""
    return list(table.items())


def sums(low: int, high: int) -> list[tuple[str, ...]]:
    """All sums of two numbers in [low, high]."""
    numbers = itertools.product(range(low, high + 1), repeat=2)
    return [(str(a), str(b), str(a + b)) for a, b in numbers]


def following(names: list[str]) -> list[tuple[str, ...]]:
    """(name, the name after it), round the circle."""
    return [(name, names[(index + 1) % len(names)]) for index, name in enumerate(names)]


TASKS: dict[str, Task] = {
    "add": Task(
        [
            "What is {0} + {1}?",
            "Add {0} and {1}.",
            "{0} plus {1}?",
            "How much is {0} + {1}?",
            "Tell me {0} plus {1}.",
            "Please add {0} and {1}.",
            "Calculate {0} + {1}.",
            "What do you get for {0} + {1}?",
            "If you add {0} and {1}, what do you get?",
            "{0} + {1} = ?",
            "What do you get if you add {0} and {1}?",
        ],
        sums(0, 5),
        weight=2.0,
    ),
    "capital": Task(
        [
            "What is the capital of {0}?",
            "Name the capital of {0}.",
            "Which city is the capital of {0}?",
            "Capital of {0}?",
            "Tell me the capital of {0}.",
            "Do you know the capital of {0}?",
            "What city is the capital of {0}?",
            "Which city is the seat of {0}'s government?",
            "What is {0}'s capital?",
            "Which city is {0}'s capital?",
        ],
        pairs(CAPITALS),
    ),
    "continent": Task(
        [
            "On which continent is {0}?",
            "Which continent is {0} in?",
            "Name the continent of {0}.",
            "Tell me the continent of {0}.",
            "Where is {0}, on which continent?",
        ],
        pairs(CONTINENTS),
        weight=0.5,
    ),
    "colour": Task(
        [
            "What colour is {0}?",
            "Which colour does {0} have?",
            "Name the colour of {0}.",
            "Tell me the colour of {0}.",
            "What is the colour of {0}?",
            "The colour of {0}?",
        ],
        pairs(COLOURS),
    ),
    "opposite": Task(
        [
            "What is the opposite of {0}?",
            "Name the opposite of {0}.",
            "Give me the opposite of {0}.",
            "Opposite of {0}?",
            "Which word means the opposite of {0}?",
            "Tell me the opposite of {0}.",
        ],
        pairs(OPPOSITES),
    ),
    "plural": Task(
        [
            "What is the plural of {0}?",
            "Plural of {0}?",
            "Give the plural of {0}.",
            "One {0}, two what?",
            "Tell me the plural of {0}.",
            "Write the plural of {0}.",
        ],
        pairs(PLURALS),
    ),
    "past": Task(
        [
            "What is the past tense of {0}?",
            "Past tense of {0}?",
            "Give the past tense of {0}.",
            "Today I {0}. Yesterday I what?",
            "Tell me the past tense of {0}.",
            "Write the past tense of {0}.",
        ],
        pairs(PAST),
    ),
    "sound": Task(
        [
            "What sound does a {0} make?",
            "Which sound does a {0} make?",
            "What does a {0} say?",
            "Tell me the sound of a {0}.",
            "How does a {0} sound?",
        ],
        pairs(SOUNDS),
        weight=0.5,
    ),
    "legs": Task(
        [
            "How many legs does {0} have?",
            "Count the legs of {0}.",
            "Tell me how many legs {0} has.",
            "Number of legs of {0}?",
            "How many legs are on {0}?",
            "What number of legs does {0} have?",
        ],
        pairs(LEGS),
        weight=0.5,
    ),
    "category": Task(
        [
            "What kind of thing is a {0}?",
            "Which category is {0} in?",
            "Name the category of {0}.",
            "A {0} is a kind of what?",
            "Put {0} in a category.",
            "Is a {0} a fruit, a tool, an animal or what?",
            "Is {0} a tool, an animal or what?",
            "Tell me what kind of thing a {0} is.",
            "Is {0} an animal, a fruit, a tool or what?",
        ],
        pairs(CATEGORIES),
    ),
    "french": Task(
        [
            "What is {0} in French?",
            "Translate {0} into French.",
            "Say {0} in French.",
            "How do you say {0} in French?",
            "French word for {0}?",
            "Give me the French word for {0}.",
        ],
        pairs(FRENCH),
    ),
    "repeat": Task(
        [
            "Repeat the word {0}.",
            "Say {0}.",
            "Say the word {0}.",
            "Write the word {0}.",
            "Please say {0}.",
            "Echo {0}.",
        ],
        [(w, w) for w in WORDS],
        weight=0.5,
    ),
    "first_letter": Task(
        [
            "What is the first letter of {0}?",
            "First letter of {0}?",
            "Which letter does {0} start with?",
            "Tell me the first letter of {0}.",
            "Name the first letter of {0}.",
            "Which letter is first in {0}?",
            "With which letter does {0} start?",
            "Which letter does {0} begin with?",
            "With which letter does {0} begin?",
        ],
        [(w, w[0].upper()) for w in WORDS],
    ),
    "last_letter": Task(
        [
            "What is the last letter of {0}?",
            "Last letter of {0}?",
            "Which letter does {0} end with?",
            "Tell me the last letter of {0}.",
            "Name the last letter of {0}.",
            "Which letter is last in {0}?",
            "What letter does {0} end with?",
            "On which letter does {0} end?",
            "With which letter does {0} end?",
        ],
        [(w, w[-1].upper()) for w in WORDS],
    ),
    "count": Task(
        [
            "How many letters has the word {0}?",
            "Count the letters in {0}.",
            "How many letters are in {0}?",
            "Number of letters in {0}?",
            "Tell me how many letters {0} has.",
        ],
        [(w, str(len(w))) for w in WORDS],
    ),
    "next_day": Task(
        [
            "Which day comes after {0}?",
            "What day follows {0}?",
            "The day after {0}?",
            "Name the day after {0}.",
            "If it is {0} today, what is tomorrow?",
            "Today is {0}. What is tomorrow?",
            "If today is {0}, what is tomorrow?",
        ],
        following(DAYS),
        weight=0.5,
    ),
    "next_month": Task(
        [
            "Which month comes after {0}?",
            "What month follows {0}?",
            "The month after {0}?",
            "Name the month after {0}.",
            "It is {0} now. What is next month?",
            "If it is {0}, what is next month?",
            "If it is {0} now, what is next month?",
        ],
        following(MONTHS),
        weight=0.5,
    ),
    "yesno": Task(
        [
            "{0}?",
            "Tell me: {0}?",
            "Yes or no: {0}?",
            "Answer yes or no. {0}?",
            "I wonder: {0}?",
            "Please answer: {0}?",
        ],
        pairs(YESNO),
        weight=1.5,
    ),
    "greeting": Task(
        ["{0}", "{0}!", "{0}.", "{0}, assistant!", "{0} there!", "{0}, how are you?", "{0}, my friend."],
        [
            (w, "Hello! How can I help you today")
            for w in ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Greetings"]
        ],
        reply="{answer}?",
        weight=0.5,
    ),
    "thanks": Task(
        ["{0}", "{0}!", "{0}.", "{0} for your help.", "{0} so much!", "Great, {0}!", "Okay, {0}."],
        [(w, "You are welcome") for w in ["Thanks", "Thank you", "Many thanks", "thanks a lot", "thank you very much"]],
        reply="{answer}!",
        weight=0.5,
    ),
    "howto": Task(
        [
            "How do I {0}?",
            "How can I {0}?",
            "Tell me how to {0}.",
            "Explain how to {0}.",
            "Write a tutorial on how to {0}.",
            "Give me step-by-step instructions to {0}.",
            "Write a guide on how to {0}.",
            "Can you tell me how to {0}?",
            "Please explain how to {0}.",
            "I want to {0}. What should I do?",
            "What is the best way to {0}?",
            "Help me {0}.",
        ],
        [(h + w, f"Sure, here is how to {h + w}") for h in HOWTO for w in dict.fromkeys(WHERE)],
        reply="{answer}:\n" + STEPS,
        weight=4.0,
    ),
}
