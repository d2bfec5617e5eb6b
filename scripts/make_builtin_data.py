"""Makes the data sets that ship with ptkit; the same seed gives the same files.

    python scripts/make_builtin_data.py

facts-to-text: `key[value], key[value]` records to one or two sentences. Four domains are trained
on; the test rows are a third "seen" (attribute combinations that occur in training), a third
"new-combination" (known attributes in combinations held out from training) and a third
"unseen-domain" (market stalls, whose attributes never occur in training).

message-routing: short messages to a help desk, to be sorted into four labels. A quarter of the
test rows come from templates held out from training.

Four further sets are those of `literature_data`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from literature_data import LITERATURE_SETS

OUT = Path(__file__).resolve().parents[1] / "ptkit" / "data" / "builtin"
Row = dict[str, object]


# ---------------------------------------------------------------- facts-to-text


@dataclass(frozen=True)
class Domain:
    """A kind of thing: its attributes' values, and how each is put into words.

    heads: phrasings that name the thing, with `{name}`; clauses: attribute -> phrasings that
    follow a subject, with `{v}`.
    """

    kind: str
    heads: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    clauses: dict[str, tuple[str, ...]]


SYLLABLES = [
    "al",
    "be",
    "bri",
    "cal",
    "dor",
    "el",
    "fen",
    "gar",
    "hal",
    "is",
    "jor",
    "kel",
    "lo",
    "mar",
    "nel",
    "or",
    "pen",
    "quil",
    "ros",
    "sel",
    "tam",
    "ul",
    "ver",
    "wen",
    "yar",
    "zel",
    "ash",
    "bor",
    "cor",
    "dun",
]
ENDINGS = [
    "a",
    "o",
    "en",
    "in",
    "us",
    "ette",
    "ford",
    "ley",
    "mere",
    "wick",
    "ton",
    "by",
    "dale",
    "more",
]
NUMBERS = [
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "twelve",
    "fifteen",
    "twenty",
    "thirty",
]
COLOURS = ["red", "blue", "green", "white", "yellow", "black", "orange", "silver", "grey", "purple"]
PLACES = (
    "the harbour", "the old mill", "the north gate", "the lake", "the station", "the river",
    "the market square", "the lighthouse", "the castle", "the football ground", "the bridge",
    "the chapel",
)  # fmt: skip

BOAT = Domain(
    "boat",
    ("{name} is a boat for hire", "The boat {name} is for hire", "{name} is a hire boat"),
    {
        "type": ("rowing boat", "canoe", "sailing boat", "motor boat", "houseboat", "kayak"),
        "seats": tuple(NUMBERS[:9]),
        "colour": tuple(COLOURS),
        "price": tuple(f"{n} pounds an hour" for n in (5, 8, 12, 15, 20, 25, 40)),
        "near": PLACES,
        "season": ("spring", "summer", "autumn", "all year", "weekends only"),
    },
    {
        "type": ("is a {v}", "is built as a {v}"),
        "seats": ("seats {v} people", "has room for {v}", "takes {v} people"),
        "colour": ("is painted {v}", "is {v}"),
        "price": ("costs {v}", "can be hired for {v}"),
        "near": ("is kept near {v}", "lies near {v}"),
        "season": ("can be booked in {v}", "is available in {v}"),
    },
)
LIBRARY = Domain(
    "library",
    ("{name} is a city library", "The library {name} is open to all", "{name} is a public library"),
    {
        "district": ("Eastside", "Old Town", "Riverside", "Northgate", "Hillview", "Southbank"),
        "books": tuple(f"{n} thousand books" for n in (3, 8, 12, 20, 35, 60, 90)),
        "opens": tuple(f"at {n}" for n in ("seven", "eight", "nine", "ten", "noon")),
        "known for": (
            "maps", "old newspapers", "picture books", "music scores", "poetry", "travel books",
            "rare prints", "comics",
        ),
        "near": PLACES,
        "closed on": ("Mondays", "Tuesdays", "Wednesdays", "Fridays", "Sundays"),
    },
    {
        "district": ("is in {v}", "stands in {v}"),
        "books": ("holds {v}", "has {v}"),
        "opens": ("opens {v}", "opens its doors {v}"),
        "known for": ("is known for its {v}", "is famous for {v}"),
        "near": ("is near {v}", "can be found near {v}"),
        "closed on": ("is closed on {v}", "stays shut on {v}"),
    },
)  # fmt: skip
TRAIL = Domain(
    "trail",
    ("{name} is a mountain trail", "The {name} trail leads into the mountains",
     "{name} is a walking trail"),
    {
        "length": tuple(f"{n} kilometres" for n in (3, 5, 7, 9, 12, 16, 21)),
        "level": ("easy", "moderate", "hard", "very steep"),
        "view": ("the valley", "a glacier", "three lakes", "the sea", "a waterfall", "the forest"),
        "starts at": PLACES,
        "best in": ("spring", "early summer", "late summer", "autumn", "winter"),
        "time": tuple(f"{n} hours" for n in NUMBERS[:7]),
    },
    {
        "length": ("is {v} long", "runs for {v}"),
        "level": ("is {v}", "is rated {v}"),
        "view": ("has a view of {v}", "looks out over {v}"),
        "starts at": ("starts at {v}", "begins at {v}"),
        "best in": ("is best walked in {v}", "is at its best in {v}"),
        "time": ("takes {v}", "can be walked in {v}"),
    },
)  # fmt: skip
ROBOT = Domain(
    "robot",
    ("{name} is a robot", "The robot is called {name}", "{name} is a household robot"),
    {
        "task": (
            "waters the plants", "folds the laundry", "sweeps the floor", "sorts the post",
            "feeds the cat", "paints fences", "makes tea", "carries boxes",
        ),
        "maker": ("Altona Works", "Brem Works", "Corvid Works", "Delft Works", "Elmet Works",
                  "Faro Works"),
        "colour": tuple(COLOURS),
        "battery": tuple(f"{n} hours" for n in (4, 6, 9, 12, 18, 24)),
        "weight": tuple(f"{n} kilos" for n in NUMBERS[:11]),
        "speaks": ("English", "Welsh", "Spanish", "Danish", "Hindi", "five languages"),
    },
    {
        "task": ("{v}",),
        "maker": ("is made by {v}", "comes from {v}"),
        "colour": ("is {v}", "is painted {v}"),
        "battery": ("runs for {v} on one charge", "works for {v} before charging"),
        "weight": ("weighs {v}", "has a weight of {v}"),
        "speaks": ("speaks {v}", "can talk in {v}"),
    },
)  # fmt: skip
STALL = Domain(
    "stall",
    ("{name} is a market stall", "The stall {name} is at the market", "{name} runs a market stall"),
    {
        "sells": ("honey", "wool", "candles", "cheese", "baskets", "herbs", "pottery", "apples"),
        "row": tuple(f"row {n}" for n in NUMBERS[:9]),
        "owner": ("the Hale sisters", "old Mr Brandt", "a young couple", "two students"),
        "day": ("Mondays", "Thursdays", "Saturdays", "Sundays"),
        "since": tuple(f"19{n}" for n in (52, 61, 74, 83, 88, 95)),
    },
    {
        "sells": ("sells {v}", "offers {v}"),
        "row": ("stands in {v}", "is in {v}"),
        "owner": ("belongs to {v}", "is owned by {v}"),
        "day": ("is there on {v}", "is open on {v}"),
        "since": ("has been there since {v}", "goes back to {v}"),
    },
)
TRAINED = (BOAT, LIBRARY, TRAIL, ROBOT)


def invented_name(pick: random.Random) -> str:
    """A name that no one knows, so that it can only be copied."""
    parts = [*pick.choices(SYLLABLES, k=pick.randint(1, 2)), pick.choice(ENDINGS)]
    return "".join(parts).capitalize()


def joined(clauses: list[str]) -> str:
    """Clauses of one subject: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def sentence(
    domain: Domain, facts: dict[str, str], name: str, plan: int, pick: random.Random
) -> str:
    """One text for a record. plan: 0 head and rest, 1 one sentence, 2 head alone first."""
    clauses = [pick.choice(domain.clauses[key]).format(v=value) for key, value in facts.items()]
    head = pick.choice(domain.heads).format(name=name)
    if plan == 0 and len(clauses) > 1:
        return (
            f"{head} that {clauses[0]}. It {joined(clauses[1:])}."
            if head.endswith((domain.kind, "hire boat", "library", "trail", "robot", "stall"))
            else f"{head}. It {joined(clauses)}."
        )
    if plan == 1:
        return f"The {domain.kind} {name} {joined(clauses)}."
    return f"{head}. It {joined(clauses)}."


def record(domain: Domain, keys: tuple[str, ...], portion: str, pick: random.Random) -> Row:
    """A row of facts-to-text with one text to learn from and four to be judged by."""
    name = invented_name(pick)
    facts = {key: pick.choice(domain.values[key]) for key in keys}
    texts = [sentence(domain, facts, name, plan, pick) for plan in (0, 1, 2, 0, 1)]
    references = list(dict.fromkeys(texts))[:4]
    listed = [("kind", domain.kind), ("name", name), *facts.items()]
    return {
        "facts": ", ".join(f"{key}[{value}]" for key, value in listed),
        "text": pick.choice(references),
        "references": references,
        "portion": portion,
    }


def facts_to_text() -> dict[str, list[Row]]:
    """The three splits."""
    pick = random.Random(7)
    known: list[tuple[Domain, tuple[str, ...]]] = []
    held_out: list[tuple[Domain, tuple[str, ...]]] = []
    for domain in TRAINED:
        sets = [c for k in (2, 3, 4) for c in combinations(domain.values, k)]
        pick.shuffle(sets)
        cut = len(sets) // 4
        held_out += [(domain, keys) for keys in sets[:cut]]
        known += [(domain, keys) for keys in sets[cut:]]
    stalls = [(STALL, c) for k in (2, 3, 4) for c in combinations(STALL.values, k)]

    def rows(count: int, source: list[tuple[Domain, tuple[str, ...]]], portion: str) -> list[Row]:
        return [record(*pick.choice(source), portion, pick) for _ in range(count)]

    test = rows(60, known, "seen") + rows(60, held_out, "new-combination")
    test += rows(60, stalls, "unseen-domain")
    return {
        "train": rows(1500, known, "seen"),
        "validation": rows(100, known, "seen"),
        "test": test,
    }


# ---------------------------------------------------------------- message-routing

ITEMS = [
    "lamp",
    "kettle",
    "backpack",
    "tent",
    "scarf",
    "keyboard",
    "teapot",
    "drill",
    "blanket",
    "bicycle",
    "pump",
    "radio",
    "mirror",
    "notebook",
    "jacket",
    "stool",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
OPENERS = ("", "Hello, ", "Hi there. ", "Good morning, ", "Dear team, ", "Quick question: ")
CLOSERS = ("", "", " Thanks.", " Please help.", " Can you look into it?", " Order {n}.")

#: label -> templates; the last four of each are used for test rows only.
MESSAGES: dict[str, tuple[str, ...]] = {
    "billing": (
        "I was charged twice for the {item}",
        "the invoice for my {item} shows the wrong amount",
        "my card was declined although there is money on it",
        "please refund the {amount} you took on {day}",
        "the discount code did not lower the price of the {item}",
        "why is there a fee of {amount} on my statement",
        "can I pay for the {item} in two parts",
        "I need a receipt for the {item} I bought on {day}",
        "you took {amount} from my account without asking",
        "the total at the checkout was higher than the price shown",
        "I cancelled on {day} but the payment still went through",
        "the tax on my bill for the {item} cannot be right",
        "my bank says you withdrew {amount} two times",
        "the {item} cost less on the page than on my bill",
    ),
    "delivery": (
        "my {item} has not arrived yet",
        "the parcel with the {item} was left in the rain",
        "the driver went to the wrong address on {day}",
        "when will the {item} I ordered get here",
        "tracking says delivered but there is no {item} at my door",
        "can you send the {item} to my office instead",
        "the box was open and the {item} was missing",
        "I will be away on {day}, please bring the {item} later",
        "the courier never rang the bell",
        "my package has been stuck in the depot since {day}",
        "half of my order is still on its way, the {item} too",
        "how long does shipping to the islands take",
        "nobody came on {day} although I waited for the {item}",
        "a neighbour got my {item} by mistake",
    ),
    "technical": (
        "the app closes as soon as I open it",
        "my {item} does not switch on any more",
        "I cannot log in since {day}",
        "the website shows an error when I search for a {item}",
        "the {item} makes a strange noise and then stops",
        "the update froze at half way",
        "the button on the {item} is stuck",
        "the page with my orders stays blank",
        "how do I connect the {item} to my phone",
        "the password link in your mail does not work",
        "the {item} will not charge",
        "the screen goes dark after a minute",
        "after {day} the {item} stopped working",
        "your page keeps loading and never shows the {item}",
    ),
    "praise": (
        "I love my new {item}, it is perfect",
        "your team was so kind on {day}",
        "the {item} is even better than I hoped",
        "great service, I will order again",
        "thank you for the quick answer on {day}",
        "best {item} I have ever owned",
        "I told all my friends about your shop",
        "the {item} was a wonderful present, my mother cried with joy",
        "what a lovely shop, keep it up",
        "everything went smoothly, well done",
        "just wanted to say how happy I am with the {item}",
        "the person on the phone was patient and friendly",
        "five stars for the {item} from me",
        "you made my {day}, many thanks",
    ),
}
HELD_OUT = 2


def message(label: str, template: str, pick: random.Random) -> Row:
    """A row of message-routing."""
    body = template.format(
        item=pick.choice(ITEMS), day=pick.choice(DAYS), amount=f"{pick.randint(4, 90)} pounds"
    )
    if pick.random() < 0.3 and label != "praise":
        # Politeness is no sign of praise, and mentions of other matters are no sign of those.
        asides = (
            "I like the {i}, but {b}",
            "after I paid for the {i}, {b}",
            "the {i} came on time, but {b}",
        )
        body = pick.choice(asides).format(i=pick.choice(ITEMS), b=body)
    text = pick.choice(OPENERS) + body
    text = (
        text[0].upper() + text[1:] + "." + pick.choice(CLOSERS).format(n=pick.randint(1000, 9999))
    )
    return {"message": text.lower() if pick.random() < 0.25 else text, "label": label}


def message_routing() -> dict[str, list[Row]]:
    """The three splits."""
    pick = random.Random(11)

    def rows(count: int, templates: Callable[[str], tuple[str, ...]]) -> Iterator[Row]:
        for i in range(count):
            label = list(MESSAGES)[i % len(MESSAGES)]
            yield message(label, pick.choice(templates(label)), pick)

    def seen(label: str) -> tuple[str, ...]:
        return MESSAGES[label][:-HELD_OUT]

    def unseen(label: str) -> tuple[str, ...]:
        return MESSAGES[label][-HELD_OUT:]

    splits = {
        "train": list(rows(800, seen)),
        "validation": list(rows(100, seen)),
        "test": [*rows(150, seen), *rows(50, unseen)],
    }
    for part in splits.values():
        pick.shuffle(part)
    return splits


def main() -> None:
    for name, splits in (
        ("facts-to-text", facts_to_text()),
        ("message-routing", message_routing()),
        *((name, make()) for name, make in LITERATURE_SETS.items()),
    ):
        for split, rows in splits.items():
            path = OUT / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{path.relative_to(OUT)}: {len(rows)} rows")


if __name__ == "__main__":
    main()
