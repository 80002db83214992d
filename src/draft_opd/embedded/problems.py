"""The embedded target's language: small word problems with written-out reasoning.

Every problem is drawn from a seeded generator. Wording, order of remarks and
optional detours vary, with tastes that depend on the person in the story, so
that a model of this text is sure of some tokens (copied names, computed
numbers) and torn between others (which phrase comes next). That mixture is what a drafter
has to cope with in real reasoning traces.

All of the text is our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = [
    "Ada",
    "Bruno",
    "Chloe",
    "Dario",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luca",
    "Mina",
    "Noor",
    "Otto",
    "Petra",
    "Rosa",
    "Sami",
    "Tara",
    "Viktor",
]
ITEMS = [
    "apples",
    "marbles",
    "stickers",
    "books",
    "coins",
    "shells",
    "pencils",
    "cards",
    "buttons",
    "lemons",
    "stamps",
    "ribbons",
    "cookies",
    "beads",
    "tickets",
]
PLACES = ("market", "school", "harbour", "library", "station", "garden", "museum", "bakery")


@dataclass(frozen=True)
class Problem:
    """One question with a worked response (reasoning between think tags, then the answer)."""

    question: str
    response: str


class _Writer:
    """Chooses wordings: each person prefers one option of a list, but not always that one."""

    def __init__(self, rng: random.Random, taste: int):
        self.rng, self.taste = rng, taste

    def pick(self, *options: str) -> str:
        favourite = (self.taste * 7 + len(options) + len(options[0])) % len(options)
        return options[favourite] if self.rng.random() < 0.6 else self.rng.choice(options)

    def maybe(self, probability: float, *options: str) -> str:
        return self.pick(*options) if self.rng.random() < probability else ""


def _add(w: _Writer, a: int, b: int) -> str:
    """Spells out a + b, in one go or through the tens."""
    total = a + b
    if b > 10 and b % 10 and w.rng.random() < 0.5:
        tens = b - b % 10
        return f"{a} + {tens} = {a + tens}, and {a + tens} + {b % 10} = {total}."
    return w.pick(f"{a} + {b} = {total}.", f"{a} plus {b} is {total}.", f"{a} + {b} makes {total}.")


def _subtract(w: _Writer, a: int, b: int) -> str:
    left = a - b
    if b > 10 and b % 10 and w.rng.random() < 0.5:
        tens = b - b % 10
        return f"{a} - {tens} = {a - tens}, and {a - tens} - {b % 10} = {left}."
    return w.pick(f"{a} - {b} = {left}.", f"{a} minus {b} is {left}.", f"{a} - {b} leaves {left}.")


def _multiply(w: _Writer, a: int, b: int) -> str:
    if a <= 5 and w.rng.random() < 0.3:
        return f"{' + '.join([str(b)] * a)} = {a * b}."
    return w.pick(f"{a} * {b} = {a * b}.", f"{a} times {b} is {a * b}.", f"{a} * {b} gives {a * b}.")


class _Story:
    """Collects the question, the reasoning lines and the short recap of one problem."""

    def __init__(self, rng: random.Random):
        self.name = rng.choice(NAMES)
        self.w = _Writer(rng, NAMES.index(self.name))
        self.question: list[str] = []
        self.lines: list[str] = []
        self.recap: list[str] = []

    def step(self, sentence: str, line: str, recap: str) -> None:
        self.question.append(sentence)
        self.lines.append(line)
        self.recap.append(recap)

    def finish(self, ask: str, answer: int, unit: str, check: str) -> Problem:
        w, steps = self.w, len(self.lines)
        question = " ".join([*self.question, ask])
        think = [
            w.pick(
                f"Okay, I need to find out {_lower(ask)}",
                f"Let me work out {_lower(ask)}",
                f"The question is {_lower(ask)}",
                f"So, {_lower(ask)}",
            )
        ]
        if w.rng.random() < 0.4:
            think.append(
                w.pick(
                    f"There are {steps} things to follow, one after the other.",
                    f"I will go through the {steps} steps in order.",
                    f"That takes {steps} steps.",
                )
            )
        for i, line in enumerate(self.lines):
            lead = (
                w.pick("First, ", "To begin, ", "Start here: ")
                if i == 0
                else w.pick("Then ", "Next, ", "After that, ", "Now ")
            )
            think.append(lead + line)
            remark = w.maybe(0.2, "Good.", "That seems right.", "Fine so far.", "Hmm, okay.")
            if remark:
                think.append(remark)
        if w.rng.random() < 0.45:
            think.append(w.pick("Let me check this. ", "Wait, let me verify. ", "A quick check: ") + check)
            think.append(w.pick("It matches.", "Yes, that fits.", "So the result holds."))
        think.append(
            w.pick(
                f"So the answer is {answer}.",
                f"That means {answer} {unit}.",
                f"The result must be {answer}.",
            )
        )
        body = w.pick(
            "Here is how it goes:\n" + "\n".join(f"- {r}" for r in self.recap),
            "\n".join(f"{i + 1}. {r}" for i, r in enumerate(self.recap)),
            "In short: " + " ".join(self.recap),
        )
        end = w.pick(
            f"The answer is {answer} {unit}.",
            f"{self.name} gets {answer} {unit}.",
            f"Answer: {answer} {unit}.",
        )
        newline = "\n" if w.taste % 3 else " "
        return Problem(question, f"<think>\n{newline.join(think)}\n</think>\n\n{body}\n\n{end}")


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _inventory(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    item = r.choice(ITEMS)
    start = have = r.randint(12, 49)
    s.question.append(w.pick(f"{name} has {have} {item}.", f"{name} owns {have} {item}."))
    for _ in range(r.randint(2, 4)):
        kinds = ["buy", "boxes"]
        kinds += ["double"] if have < 45 else ["lose"]
        kinds += ["give"] if have > 9 else []
        kind = r.choice(kinds)
        n = r.randint(3, min(29, have - 1)) if kind in ("give", "lose") else r.randint(3, 29)
        if kind == "buy":
            text = _add(w, have, n)
            s.step(
                w.pick(f"{name} buys {n} more.", f"{n} more come from a friend."),
                w.pick(f"{n} {item} are added: ", f"{name} gets {n} more, so ") + text,
                f"{have} + {n} = {have + n}.",
            )
            have += n
        elif kind in ("give", "lose"):
            verb = "gives away" if kind == "give" else "loses"
            text = _subtract(w, have, n)
            s.step(
                f"{name} {verb} {n}.",
                w.pick(f"{n} {item} are gone: ", f"{name} {verb} {n}, so ") + text,
                f"{have} - {n} = {have - n}.",
            )
            have -= n
        elif kind == "boxes":
            a, b = r.randint(2, 5), r.randint(2, 9)
            text = f"{_multiply(w, a, b)} {_add(w, have, a * b)}"
            s.step(
                w.pick(
                    f"{name} finds {a} boxes with {b} {item} each.",
                    f"There are {a} more bags of {b}.",
                ),
                w.pick(f"{a} groups of {b} are found: ", f"the {a} groups hold {b} each. ") + text,
                f"{have} + {a} * {b} = {have + a * b}.",
            )
            have += a * b
        else:
            s.step(
                w.pick("That number doubles.", "Then the number is doubled."),
                w.pick("the number doubles: ", "doubling gives ") + _multiply(w, 2, have),
                f"2 * {have} = {2 * have}.",
            )
            have *= 2
    check = f"we started with {start} {item} and end with {have}."
    ask = w.pick(f"How many {item} does {name} have now?", f"How many {item} are there at the end?")
    return s.finish(ask, have, item, check)


def _shopping(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    place, total = r.choice(PLACES), 0
    s.question.append(f"{name} goes to the {place} with 200 euros.")
    for i in range(r.randint(2, 3)):
        item, n, price = r.choice(ITEMS), r.randint(2, 9), r.randint(2, 7)
        cost = n * price
        text = _multiply(w, n, price)
        if i:
            text += " " + _add(w, total, cost)
        s.step(
            w.pick(f"{name} buys {n} {item} for {price} euros each.", f"{n} {item} cost {price} each."),
            w.pick(f"the {item} cost ", f"for the {item} we pay ", f"{n} {item} at {price} euros: ") + text,
            f"{n} {item}: {n} * {price} = {cost}.",
        )
        total += cost
    if r.random() < 0.5:
        ask = w.pick("How much money is left?", f"How much does {name} bring home?")
        s.lines.append(f"the money left is 200 minus the cost. {_subtract(w, 200, total)}")
        s.recap.append(f"200 - {total} = {200 - total}.")
        return s.finish(ask, 200 - total, "euros", f"{200 - total} + {total} = 200.")
    ask = w.pick("How much is spent in all?", f"How much does {name} pay?")
    return s.finish(ask, total, "euros", f"200 - {total} = {200 - total} euros are left.")


def _journey(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    total = 0
    way = w.pick("rides", "walks", "travels")
    s.question.append(f"{name} {way} from the {r.choice(PLACES)} to the {r.choice(PLACES)}.")
    for i in range(r.randint(2, 4)):
        hours, speed = r.randint(2, 6), r.randint(3, 12)
        text = _multiply(w, hours, speed)
        if i:
            text += " " + _add(w, total, hours * speed)
        s.step(
            w.pick(
                f"For {hours} hours the speed is {speed} km per hour.",
                f"{name} goes {hours} hours at {speed} km per hour.",
            ),
            w.pick(f"{hours} hours at {speed} km each: ", f"this part is {hours} hours long. ") + text,
            f"{hours} * {speed} = {hours * speed} km.",
        )
        total += hours * speed
    ask = w.pick(f"How far does {name} go?", "How long is the whole way?")
    return s.finish(ask, total, "km", f"the parts add up to {total}.")


def _numbers(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    values = [r.randint(2, 40) for _ in range(r.randint(3, 5))]
    listed = ", ".join(map(str, values))
    s.question.append(w.pick(f"{name} writes down the numbers {listed}.", f"{name} has the list {listed}."))
    if r.random() < 0.5:
        ordered = sorted(values)
        text = ", ".join(map(str, ordered))
        s.lines.append(w.pick("I sort them: ", "in order they are ") + f"{text}.")
        s.recap.append(f"Sorted: {text}.")
        gap = ordered[-1] - ordered[0]
        s.lines.append(
            w.pick("the largest minus the smallest: ", "the ends tell the gap: ")
            + _subtract(w, ordered[-1], ordered[0])
        )
        s.recap.append(f"{ordered[-1]} - {ordered[0]} = {gap}.")
        ask = w.pick("How far apart are the largest and the smallest?", "What is the range?")
        return s.finish(ask, gap, "in all", f"{ordered[0]} + {gap} = {ordered[-1]}.")
    total = values[0]
    for value in values[1:]:
        s.lines.append(w.pick(f"I add {value}: ", f"with {value} we get ") + _add(w, total, value))
        s.recap.append(f"{total} + {value} = {total + value}.")
        total += value
    ask = w.pick("What is the sum?", "What do they add up to?")
    return s.finish(ask, total, "in all", f"the numbers {listed} give {total}.")


def _sequence(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    start, gap, count = r.randint(2, 20), r.randint(2, 12), r.randint(3, 4)
    terms = [start + i * gap for i in range(count)]
    s.question.append(
        w.pick(
            f"{name} counts {', '.join(map(str, terms))} and goes on in the same way.",
            f"A row begins with {', '.join(map(str, terms))}.",
        )
    )
    s.lines.append(w.pick("I look at the gap: ", "the gap is ") + _subtract(w, terms[1], terms[0]))
    s.recap.append(f"The gap is {gap}.")
    value = terms[-1]
    more = r.randint(2, 4)
    for _ in range(more):
        s.lines.append(w.pick("one step on: ", f"I add {gap} again: ") + _add(w, value, gap))
        s.recap.append(f"{value} + {gap} = {value + gap}.")
        value += gap
    ask = f"Which number is {more} places after {terms[-1]}?"
    return s.finish(ask, value, "at that place", f"{value} - {terms[-1]} = {value - terms[-1]}.")


def _sharing(s: _Story) -> Problem:
    w, r, name = s.w, s.w.rng, s.name
    item, people, each = r.choice(ITEMS), r.randint(2, 8), r.randint(3, 12)
    extra = r.randint(1, 9)
    total, packs = people * each, people * each + extra
    s.question.append(f"{name} has {packs} {item}.")
    s.step(
        w.pick(f"{extra} are broken.", f"{name} keeps {extra} for later."),
        w.pick(f"{extra} {item} are taken out: ", f"without {extra} of them, ") + _subtract(w, packs, extra),
        f"{packs} - {extra} = {total}.",
    )
    s.step(
        w.pick(f"The rest goes to {people} friends.", f"{people} children share the rest."),
        w.pick(f"{people} shares of {total}: ", f"I split {total} into {people} parts: ")
        + w.pick(f"{total} / {people} = {each}.", f"{total} divided by {people} is {each}."),
        f"{total} / {people} = {each}.",
    )
    ask = w.pick(f"How many {item} does each one get?", "How large is one share?")
    return s.finish(ask, each, item, f"{people} * {each} = {total}.")


FAMILIES = (_inventory, _shopping, _journey, _numbers, _sequence, _sharing)


def problems(count: int, seed: int) -> list[Problem]:
    """Draws `count` problems; the same seed gives the same list."""
    rng = random.Random(seed)
    return [rng.choice(FAMILIES)(_Story(rng)) for _ in range(count)]
