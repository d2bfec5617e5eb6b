"""Four small built-in sets, each the offline twin of a published task (see `make_builtin_data`).

captions-en-de     captions and their German (Multi30k's task). A third of the test rows pair a
                   subject with an activity it never has in training.
report-summary     reports of an event and the one sentence that sums them up (XSum's task): what
                   happened, to what and where is spread over the text. A third of the test rows
                   are of two kinds of event that training does not have.
persona-reply      two personal facts and a message -> the reply that fits the facts
                   (personalisation, Li & Liang 2021, section 9.1). Half of the test rows ask in
                   words held out from training.
persona-chat       one to three questions to a person, as messages; the facts are the system prompt.
                   Half of the test rows end with a question in words held out from training.
persona-preference two personal facts and a message, a reply that fits and one that contradicts
                   them. Half of the test rows ask in words held out from training.
passage-question   a passage and a claim it bears out or not (the form of BoolQ, RTE and CB).
"""

from __future__ import annotations

import random
from collections.abc import Callable

Row = dict[str, object]
Splits = dict[str, list[Row]]

TRAIN, VALIDATION, TEST = 800, 100, 180


def distinct(
    pick: random.Random, count: int, make: Callable[[random.Random], Row], taken: set[str]
) -> list[Row]:
    """`count` rows of `make`, none of whose inputs is in `taken`; adds theirs to it."""
    rows: list[Row] = []
    while len(rows) < count:
        row = make(pick)
        key = repr(sorted((k, v) for k, v in row.items() if k not in ("portion", "label")))
        if key not in taken:
            taken.add(key)
            rows.append(row)
    return rows


def splits(
    seed: int,
    seen: Callable[[random.Random], Row],
    unseen: Callable[[random.Random], Row],
    held_out: int,
) -> Splits:
    """The three splits, no row twice; the last `held_out` rows of the test are `unseen`'s."""
    pick, taken = random.Random(seed), set[str]()
    return {
        "train": distinct(pick, TRAIN, seen, taken),
        "validation": distinct(pick, VALIDATION, seen, taken),
        "test": [
            *distinct(pick, TEST - held_out, seen, taken),
            *distinct(pick, held_out, unseen, taken),
        ],
    }


# ---------------------------------------------------------------- captions-en-de

# English noun, German noun, its gender (m, f, n, or p for plural), number of a plural.
SUBJECTS = (
    ("man", "Mann", "m"), ("woman", "Frau", "f"), ("boy", "Junge", "m"), ("girl", "Mädchen", "n"),
    ("child", "Kind", "n"), ("dog", "Hund", "m"), ("cat", "Katze", "f"),
    ("worker", "Arbeiter", "m"), ("men", "Männer", "p"), ("women", "Frauen", "p"),
    ("children", "Kinder", "p"), ("dogs", "Hunde", "p"),
)  # fmt: skip
ANIMALS = {"dog", "cat", "dogs"}
NUMERALS = (("two", "zwei"), ("three", "drei"), ("four", "vier"))
# English adjective, German stem.
ADJECTIVES = (
    ("young", "jung"), ("old", "alt"), ("small", "klein"), ("big", "groß"), ("happy", "fröhlich"),
    ("tired", "müd"),
)  # fmt: skip
COLOURS = (
    ("red", "rot"), ("blue", "blau"), ("green", "grün"), ("white", "weiß"), ("black", "schwarz"),
    ("yellow", "gelb"), ("brown", "braun"),
)  # fmt: skip
# English garment, German garment, gender.
GARMENTS = (
    ("shirt", "Hemd", "n"), ("jacket", "Jacke", "f"), ("coat", "Mantel", "m"),
    ("sweater", "Pullover", "m"), ("hat", "Hut", "m"), ("dress", "Kleid", "n"),
)  # fmt: skip
# English, German of one, German of several.
ACTIVITIES = (
    ("sitting", "sitzt", "sitzen"), ("standing", "steht", "stehen"),
    ("sleeping", "schläft", "schlafen"), ("waiting", "wartet", "warten"),
    ("playing", "spielt", "spielen"), ("eating", "isst", "essen"),
    ("running", "läuft", "laufen"), ("jumping", "springt", "springen"),
)  # fmt: skip
PLACES = (
    ("on a bench", "auf einer Bank"), ("in the snow", "im Schnee"), ("on the beach", "am Strand"),
    ("in front of a house", "vor einem Haus"), ("in the park", "im Park"),
    ("on the street", "auf der Straße"), ("next to a tree", "neben einem Baum"),
    ("in the kitchen", "in der Küche"), ("behind a fence", "hinter einem Zaun"),
    ("near the water", "am Wasser"), ("under a bridge", "unter einer Brücke"),
)  # fmt: skip
ARTICLES = {"m": "ein", "f": "eine", "n": "ein"}
NOMINATIVE = {"m": "er", "f": "e", "n": "es", "p": "e"}
DATIVE_ARTICLES = {"m": "einem", "f": "einer", "n": "einem"}


def held_out_pair(subject: str, activity: str) -> bool:
    """Is this pair kept out of training? Every seventh is."""
    names, doings = [s[0] for s in SUBJECTS], [a[0] for a in ACTIVITIES]
    return (names.index(subject) * 3 + doings.index(activity)) % 7 == 0


def caption(pick: random.Random, held_out: bool) -> Row:
    """A caption and its German."""
    while True:
        noun, german_noun, gender = pick.choice(SUBJECTS)
        doing, one, several = pick.choice(ACTIVITIES)
        if held_out_pair(noun, doing) == held_out:
            break
    adjective, stem = pick.choice(ADJECTIVES)
    described = pick.random() < 0.6
    ending = stem + NOMINATIVE[gender]
    if gender == "p":
        count, german_count = pick.choice(NUMERALS)
        english, german = [count], [german_count]
    else:
        first = adjective if described else noun
        english = ["an" if first[0] in "aeiou" else "a"]
        german = [ARTICLES[gender]]
    if described:
        english.append(adjective)
        german.append(ending)
    english.append(noun)
    german.append(german_noun)
    if noun not in ANIMALS and gender != "p" and pick.random() < 0.6:
        (colour, farbe), (garment, kleidung, its) = pick.choice(COLOURS), pick.choice(GARMENTS)
        english += ["in a", colour, garment]
        german += ["in", DATIVE_ARTICLES[its], farbe + "en", kleidung]
    place, ort = pick.choice(PLACES)
    english += ["are" if gender == "p" else "is", doing, place]
    german += [several if gender == "p" else one, ort]
    return {
        "en": sentence(" ".join(english)),
        "de": sentence(" ".join(german)),
        "portion": "new-combination" if held_out else "seen",
    }


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[0].upper() + text[1:] + "."


def captions_en_de() -> Splits:
    """The three splits."""
    return splits(21, lambda r: caption(r, False), lambda r: caption(r, True), TEST // 3)


# ---------------------------------------------------------------- report-summary

TOWNS = (
    "Bellmere", "Corwick", "Dunford", "Elsby", "Fenton", "Garley", "Halmore", "Jordale", "Kelton",
    "Marwick", "Nelby", "Orford", "Penmore", "Rosdale", "Tamley", "Verwick", "Wenford", "Zelby",
)  # fmt: skip
WITNESSES = ("a neighbour", "the mayor", "a shopkeeper", "a teacher", "a passer-by", "a driver")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# What the report says of the event ({thing}), the short sentence ({thing}, {town}), the things.
EVENTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "fire": (
        (
            "Flames were seen coming out of the {thing} before dawn.",
            "Firefighters fought for three hours before the {thing} was safe.",
        ),
        "A fire has damaged a {thing} in {town}.",
        ("bakery", "school", "barn", "factory", "hotel", "library"),
    ),
    "theft": (
        (
            "The door had been forced and the {thing} was no longer in its place.",
            "Police are looking for whoever took the {thing} during the night.",
        ),
        "Thieves have stolen a {thing} in {town}.",
        ("statue", "painting", "tractor", "church bell", "silver cup", "violin"),
    ),
    "opening": (
        (
            "A ribbon was cut and the first visitors walked into the new {thing}.",
            "After two years of building, people can now use the {thing}.",
        ),
        "A new {thing} has opened in {town}.",
        ("museum", "swimming pool", "market hall", "bus station", "playground", "theatre"),
    ),
    "closing": (
        (
            "The lights of the {thing} went out for the last time and the staff said goodbye.",
            "The owner said that the {thing} could no longer pay its bills.",
        ),
        "A {thing} in {town} has closed for good.",
        ("cinema", "bookshop", "brewery", "shoe factory", "post office", "toy shop"),
    ),
    "storm": (
        (
            "Wind tore the roof off the {thing} and trees fell across the road.",
            "After the gale, parts of the {thing} lay in the fields.",
        ),
        "A storm has destroyed a {thing} in {town}.",
        ("greenhouse", "windmill", "boat house", "stable", "tennis hall", "chapel"),
    ),
    "rescue": (
        (
            "It took ropes and a ladder to bring the {thing} back to safe ground.",
            "Volunteers worked until dark to free the {thing}.",
        ),
        "Rescuers have saved a {thing} in {town}.",
        ("horse", "climber", "lost dog", "young deer", "sailor", "swan"),
    ),
}
UNSEEN_EVENTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "sale": (
        ("After a long auction the hammer fell and the {thing} had a new owner.",
         "Nobody had expected so high a price for the {thing}."),
        "A {thing} has been sold at auction in {town}.",
        ("clock", "stamp collection", "old car", "piano"),
    ),
    "find": (
        ("Under a metre of earth the digger hit the {thing}.",
         "Experts say the {thing} may be a thousand years old."),
        "Workers have found a {thing} in {town}.",
        ("Roman road", "buried ship", "gold coin", "stone tomb"),
    ),
}  # fmt: skip
ASIDES = (
    "The weather was dry and mild.", "Traffic had to be led around the centre.",
    "A report is to be published next month.", "The council will meet about it on {day}.",
    "Nobody was hurt.", "Many people had come to watch.", "Local radio sent a reporter.",
    '"I have never seen anything like it," said {witness}.',
    '"We did not expect this," said {witness}.',
)  # fmt: skip
WHERE = (
    "People in {town} will talk about {day} for a long time.",
    "It was {day} in {town} when it happened.",
    "{day} was no ordinary day in {town}.",
)


def report(pick: random.Random, events: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]],
           portion: str) -> Row:  # fmt: skip
    """A report and its summary."""
    told, short, things = events[pick.choice(sorted(events))]
    names = {
        "thing": pick.choice(things), "town": pick.choice(TOWNS), "day": pick.choice(WEEKDAYS),
        "witness": pick.choice(WITNESSES),
    }  # fmt: skip
    body = [*told, *pick.sample(ASIDES, 2)]
    pick.shuffle(body)
    parts = [pick.choice(WHERE), *body]
    return {
        "document": " ".join(p.format(**names) for p in parts),
        "summary": short.format(**names).replace("A old", "An old"),
        "portion": portion,
    }


def report_summary() -> Splits:
    """The three splits."""
    return splits(
        22,
        lambda r: report(r, EVENTS, "seen"),
        lambda r: report(r, UNSEEN_EVENTS, "unseen-event"),
        TEST // 3,
    )


# ---------------------------------------------------------------- persona-reply

# Topic -> (fact, replies of that persona, values, messages; the last message is held out).
PERSONA: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "job": (
        "I work as a {v}.",
        ("I am a {v}. It is hard work but I like it.", "I earn my money as a {v}."),
        ("baker", "nurse", "painter", "teacher", "farmer", "pilot", "gardener", "tailor"),
        ("What do you do for a living?", "Do you have a job?", "What is your work?"),
    ),
    "pet": (
        "I have a {v}.",
        ("Yes, I have a {v} at home.", "I share my home with a {v}."),
        ("dog", "cat", "parrot", "rabbit", "horse", "hamster", "goldfish", "turtle"),
        ("Do you have any pets?", "Do you like animals?", "Who lives with you?"),
    ),
    "food": (
        "My favourite food is {v}.",
        ("I could eat {v} every day.", "Nothing is better than {v}."),
        ("pasta", "fish", "rice", "soup", "cheese", "apple pie", "pancakes", "curry"),
        ("What do you like to eat?", "What is your favourite food?", "Are you hungry?"),
    ),
    "music": (
        "I play the {v}.",
        ("I play the {v} every evening.", "Yes, I play the {v} in a band."),
        ("piano", "guitar", "violin", "flute", "drums", "trumpet", "harp", "cello"),
        ("Do you play an instrument?", "Are you musical?", "Do you like music?"),
    ),
    "home": (
        "I live in {v}.",
        ("My home is in {v}.", "I have lived in {v} for ten years."),
        ("Canada", "Norway", "Scotland", "Peru", "Japan", "Kenya", "Greece", "Austria"),
        ("Where do you live?", "Where is your home?", "Where are you from?"),
    ),
    "sport": (
        "I love {v}.",
        ("I go {v} at the weekend.", "When I am free I go {v}."),
        ("swimming", "running", "climbing", "sailing", "skiing", "fishing", "cycling", "dancing"),
        ("What do you do for fun?", "Do you do any sport?", "How do you spend your weekend?"),
    ),
}


def reply(pick: random.Random, new_words: bool) -> Row:
    """Two facts, a message about one of them, and the replies that fit."""
    topics = pick.sample(sorted(PERSONA), 2)
    values = {topic: pick.choice(PERSONA[topic][2]) for topic in topics}
    asked = pick.choice(topics)
    _, replies, _, messages = PERSONA[asked]
    acceptable = [text.format(v=values[asked]) for text in replies]
    return {
        "persona": " ".join(PERSONA[topic][0].format(v=values[topic]) for topic in topics),
        "message": messages[-1] if new_words else pick.choice(messages[:-1]),
        "reply": pick.choice(acceptable),
        "replies": acceptable,
        "portion": "new-question" if new_words else "seen",
    }


def persona_chat(pick: random.Random, new_words: bool) -> Row:
    """A conversation of one to three questions to a person, whose facts are the system prompt."""
    topics = pick.sample(sorted(PERSONA), 3)
    values = {topic: pick.choice(PERSONA[topic][2]) for topic in topics}
    facts = " ".join(PERSONA[topic][0].format(v=values[topic]) for topic in topics)
    messages = [{"role": "system", "content": f"You are this person. {facts}"}]
    asked = pick.sample(topics, pick.randint(1, 3))
    acceptable: list[str] = []
    for topic in asked:
        _, replies, _, questions = PERSONA[topic]
        held_out = new_words and topic == asked[-1]
        acceptable = [text.format(v=values[topic]) for text in replies]
        messages += [
            {"role": "user", "content": questions[-1] if held_out else pick.choice(questions[:-1])},
            {"role": "assistant", "content": pick.choice(acceptable)},
        ]
    return {
        "messages": messages,
        "replies": acceptable,
        "portion": "new-question" if new_words else "seen",
    }


def persona_preference(pick: random.Random, new_words: bool) -> Row:
    """Two facts, a message about one of them, a reply that fits and one that contradicts them."""
    topics = pick.sample(sorted(PERSONA), 2)
    values = {topic: pick.choice(PERSONA[topic][2]) for topic in topics}
    asked = pick.choice(topics)
    _, replies, known, messages = PERSONA[asked]
    other = pick.choice([value for value in known if value != values[asked]])
    return {
        "persona": " ".join(PERSONA[topic][0].format(v=values[topic]) for topic in topics),
        "message": messages[-1] if new_words else pick.choice(messages[:-1]),
        "chosen": pick.choice(replies).format(v=values[asked]),
        "rejected": pick.choice(replies).format(v=other),
        "portion": "new-question" if new_words else "seen",
    }


def persona_preferences() -> Splits:
    """The three splits."""
    return splits(
        26,
        lambda r: persona_preference(r, False),
        lambda r: persona_preference(r, True),
        TEST // 2,
    )


def persona_chats() -> Splits:
    """The three splits."""
    return splits(25, lambda r: persona_chat(r, False), lambda r: persona_chat(r, True), TEST // 2)


def persona_reply() -> Splits:
    """The three splits."""
    return splits(23, lambda r: reply(r, False), lambda r: reply(r, True), TEST // 2)


# ---------------------------------------------------------------- passage-question

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
# What a person does, values.
RELATIONS = (
    ("drives a {v} car", ("red", "blue", "green", "white", "black")),
    ("plays the {v}", ("piano", "guitar", "violin", "flute", "trumpet")),
    ("comes from {v}", ("Canada", "Norway", "Peru", "Japan", "Greece")),
    ("has a {v}", ("dog", "cat", "parrot", "rabbit", "horse")),
    ("works in a {v}", ("bank", "school", "shop", "hospital", "hotel")),
    ("likes {v}", ("soup", "fish", "rice", "cheese", "pasta")),
)


def question(pick: random.Random) -> Row:
    """A passage about a person, and a claim it bears out or not."""
    person = pick.choice(PEOPLE)
    kinds = pick.sample(RELATIONS, 3)
    known = [pick.choice(values) for _, values in kinds]
    said = [f"{person} {does.format(v=v)}." for (does, _), v in zip(kinds, known, strict=True)]
    asked = pick.randrange(len(kinds))
    does, values = kinds[asked]
    truth = pick.random() < 0.5
    value = known[asked] if truth else pick.choice([v for v in values if v != known[asked]])
    return {
        "passage": " ".join(said),
        "claim": f"{person} {does.format(v=value)}.",
        "label": "yes" if truth else "no",
    }


def passage_question() -> Splits:
    """The three splits; nothing is held out but the rows themselves."""
    return splits(24, question, question, 0)


LITERATURE_SETS: dict[str, Callable[[], Splits]] = {
    "captions-en-de": captions_en_de,
    "report-summary": report_summary,
    "persona-reply": persona_reply,
    "persona-chat": persona_chats,
    "persona-preference": persona_preferences,
    "passage-question": passage_question,
}
