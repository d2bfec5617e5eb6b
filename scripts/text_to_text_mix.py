"""Generated text-to-text documents: 30 % of what `tiny-en` is pre-trained on.

A prefix only elicits what its base model can already do, and a base that has seen nothing but
running text cannot copy a name from its input.  These documents show, in hundreds of shapes, that
a text can consist of an input and an output made from it: records put into words, sentences turned
into records, copying, look-ups, questions with label words, rewriting, restoring a shuffled line.
Names are put together from syllables, so that copying cannot be replaced by remembering.

A document is one example, or two to eight examples of one task in one layout in a row.  Everything
follows from a seed, and only the standard library is used.

Kept out on purpose, so that an adapter's score on them means something: the exact input formats of
E2E (`name : X | area : Y`), of WebNLG (`s | p | o ; s | p | o`) and of this project's own tasks
(`key[value], key[value]`), restaurants and pubs, and the domains of this project's own tasks.
`forbidden(text)` says whether a text has one of the formats.

    python scripts/text_to_text_mix.py --samples 20 --corpus DIR
"""

# ruff: noqa: SIM905
from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from text_to_text_words import (
    ADJECTIVES,
    CATEGORIES,
    DOMAINS,
    FIRST_NAMES,
    INSTRUCTIONS,
    LABELS_NEGATIVE,
    LABELS_POSITIVE,
    NEGATIVE,
    NOUNS,
    OPINION_SUBJECTS,
    POSITIVE,
    SAYINGS,
    TOPICS,
    VERBS,
)

CORPUS_FILES = ("captions", "brown", "textbooks", "masc", "abc")  # parts of file names
Pair = tuple[str, str]


class Document(NamedTuple):
    task: str
    layout: str
    separator: str
    text: str


# ---------------------------------------------------------------- names, values, small helpers

ONSETS = "b br c ch cl d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w y z".split()
VOWELS = "a e i o u a e i o ai ea ou".split()
CODAS = ["", "", "", "n", "l", "r", "s", "m", "k", "nd", "th", "x", "ll", "rt", "st"]


def invented(r: random.Random, low: int = 2, high: int = 3) -> str:
    """An invented word of two or three syllables: 'brastou', 'Velnak'."""
    parts = [r.choice(ONSETS) + r.choice(VOWELS) for _ in range(r.randint(low, high))]
    return "".join(parts) + r.choice(CODAS)


def proper(r: random.Random) -> str:
    return invented(r, 1, 3).capitalize()


def person(r: random.Random) -> str:
    first = r.choice(FIRST_NAMES) if r.random() < 0.5 else proper(r)
    return first if r.random() < 0.3 else f"{first} {proper(r)}"


def place(r: random.Random) -> str:
    kind = r.random()
    if kind < 0.6:
        return proper(r)
    if kind < 0.8:
        return proper(r) + r.choice(["ton", "ville", "ford", "bury", " Bay", " Hill", " Valley"])
    return r.choice("North South East West New Old Port Lake".split()) + " " + proper(r)


def title(r: random.Random) -> str:
    """A title of ordinary words: 'The Silent Lantern'."""
    adjective, noun = r.choice(ADJECTIVES).title(), r.choice(NOUNS).title()
    return r.choice(
        [
            f"The {adjective} {noun}",
            f"{adjective} {noun}",
            f"The {noun} of {proper(r)}",
            f"{noun} and {r.choice(NOUNS).title()}",
            f"{proper(r)}'s {noun}",
        ]
    )


def number(r: random.Random, low: int, high: int) -> str:
    value = r.randint(low, high)
    return f"{value:,}" if value >= 10000 else str(value)


def fill(r: random.Random, template: str) -> str:
    """Replaces {person}, {place}, {title}, {word}, {new}, {int:a-b}, {year}, {pick:a,b,c}."""

    def value(match: re.Match[str]) -> str:
        kind, _, argument = match[1].partition(":")
        if kind == "pick":
            return r.choice(argument.split(","))
        if kind == "int":
            low, high = argument.split("-")
            return number(r, int(low), int(high))
        return {
            "person": lambda: person(r),
            "surname": lambda: proper(r),
            "place": lambda: place(r),
            "title": lambda: title(r),
            "new": lambda: proper(r),
            "year": lambda: str(r.randint(1720, 2021)),
            "noun": lambda: r.choice(NOUNS),
            "adj": lambda: r.choice(ADJECTIVES),
        }[kind]()

    return re.sub(r"\{(\w+(?::[^}]*)?)\}", value, template)


def articles(text: str) -> str:
    """Resolves 'a(n)' by the word that follows."""

    def choose(match: re.Match[str]) -> str:
        word = match[2].lower()
        vowel = word[0] in "aeiou" or re.match(r"(8|11\b|18\b|hour|honest)", word)
        vowel = vowel and not re.match(r"(uni|use|one\b|once|eu)", word)
        return f"{match[1]}{'n' if vowel else ''} {match[2]}"

    return re.sub(r"\b([aA])\(n\) (\w+)", choose, text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listing(parts: Sequence[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def words(r: random.Random, low: int, high: int, new: float = 0.3) -> list[str]:
    """Distinct words, a share of them invented."""
    out: list[str] = []
    for _ in range(r.randint(low, high)):
        word = invented(r) if r.random() < new else r.choice(NOUNS + ADJECTIVES)
        if word not in out:
            out.append(word)
    return out if len(out) > 1 else [*out, invented(r)]


# ---------------------------------------------------------------- records and their sentences


@dataclass
class Attribute:
    keys: list[str]
    options: list[tuple[str, dict[str, list[str]]]]  # value template, forms by vp/pp/adj


@dataclass
class Domain:
    noun: str
    human: bool
    names: list[str]
    attributes: list[Attribute]


@dataclass
class Record:
    domain: Domain
    name: str
    facts: list[tuple[str, str, dict[str, list[str]]]]  # key, value, forms
    pronoun: str


def parse_domains(text: str) -> list[Domain]:
    """Reads the table of domains; its notation is explained where it stands."""
    domains: list[Domain] = []
    for line in filter(str.strip, text.splitlines()):
        if not line.startswith(" "):
            noun, _, kind = line.partition(":")
            domains.append(Domain(noun.strip(), kind.strip() == "human", [], []))
            continue
        keys, _, rest = line.strip().partition(" = ")
        if keys == "name":
            domains[-1].names = rest.split(" | ")
            continue
        options = []
        for option in rest.split(" || "):
            value, *forms = option.split(" ; ")
            table = {f.split(" ", 1)[0]: f.split(" ", 1)[1].split(" | ") for f in forms}
            options.append((value.strip(), table))
        domains[-1].attributes.append(Attribute(keys.split(", "), options))
    return domains


ALL_DOMAINS = parse_domains(DOMAINS)


def record(r: random.Random, domain: Domain, keys: Sequence[int] = ()) -> Record:
    """A random record; `keys` fixes which of an attribute's names is used."""
    count = min(r.choice([1, 2, 2, 3, 3, 3, 4, 4, 5, 6]), len(domain.attributes))
    facts = []
    for index in r.sample(range(len(domain.attributes)), count):
        attribute = domain.attributes[index]
        value, forms = r.choice(attribute.options)
        key = attribute.keys[keys[index] % len(attribute.keys)] if keys else attribute.keys[0]
        facts.append((key, fill(r, value), forms))
    pronoun = r.choice(["he", "she"]) if domain.human else "it"
    return Record(domain, fill(r, r.choice(domain.names)), facts, pronoun)


def form(r: random.Random, fact: tuple[str, str, dict[str, list[str]]], kind: str) -> str:
    return r.choice(fact[2][kind]).replace("{v}", fact[1])


def verbs(r: random.Random, facts: list) -> str:
    return listing([form(r, fact, "vp") for fact in facts])


def split_facts(r: random.Random, facts: list) -> tuple[list[str], list[str], list]:
    """At most two facts as adjectives, two as phrases after the noun; the rest as verb phrases."""
    adjectives, after, rest = [], [], []
    for fact in facts:
        if "adj" in fact[2] and len(adjectives) < 2 and r.random() < 0.7:
            adjectives.append(form(r, fact, "adj"))
        elif "pp" in fact[2] and len(after) < 2 and r.random() < 0.6:
            after.append(form(r, fact, "pp"))
        else:
            rest.append(fact)
    return adjectives, after, rest


def sentences(r: random.Random, rec: Record, plan: int | None = None) -> str:
    """Puts a record into one, two or three sentences."""
    facts = rec.facts[:]
    r.shuffle(facts)
    noun, name, it = rec.domain.noun, rec.name, rec.pronoun
    relative = "who" if rec.domain.human else r.choice(["that", "which"])
    plan = r.randrange(7) if plan is None else plan
    adjectives, after, rest = split_facts(r, facts)
    phrase = " ".join([*adjectives, noun])
    tail = "".join(" " + a for a in after)
    if plan == 0 or (plan == 5 and rec.domain.human):
        first = f"{name} is a(n) {phrase}{tail}"
    elif plan == 1 and rest:
        first = f"{name}, a(n) {phrase}{tail}, {form(r, rest.pop(0), 'vp')}"
    elif plan == 2 and rest:
        take = r.randint(1, min(2, len(rest)))
        first = f"{name} is a(n) {phrase}{tail} {relative} {verbs(r, rest[:take])}"
        rest = rest[take:]
    elif plan == 3 and rest:
        tail = tail.replace(" that ", " which ")
        first = f"the {phrase} {name}{tail and f',{tail},'}"
        first += " " + form(r, rest.pop(0), "vp")
    elif plan == 4 and len(facts) >= 1:
        take = r.randint(1, min(3, len(facts)))
        first, rest = f"{name} {verbs(r, facts[:take])}", facts[take:]
    elif plan == 5:
        first = f"there is a(n) {phrase} {r.choice(['called', 'named', 'known as'])} {name}{tail}"
    elif len(facts) >= 2:
        which = "who" if rec.domain.human else "which"
        first = f"{name}, {which} {form(r, facts[0], 'vp')}, {form(r, facts[1], 'vp')}"
        rest = facts[2:]
    else:
        first = f"{name} is a(n) {phrase}{tail}"
    out = [first]
    while rest:
        take = r.randint(1, min(3, len(rest)))
        subject = r.choice([it, it, f"the {noun}", name if len(out) == 1 else it])
        out.append(f"{subject} {verbs(r, rest[:take])}")
        rest = rest[take:]
    return articles(" ".join(capital(s) + "." for s in out))


# ---------------------------------------------------------------- layouts of a record

Items = list[tuple[str, str]]
KEY_CASES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "Capital": capital,
    "Title": str.title,
    "UPPER": str.upper,
    "snake": lambda k: k.replace(" ", "_"),
    "camel": lambda k: k.split()[0] + "".join(w.title() for w in k.split()[1:]),
}


def joined(between: str, after: str, end: str = "") -> Callable[[Items], str]:
    return lambda items: after.join(f"{k}{between}{v}" for k, v in items) + end


def markdown(items: Items) -> str:
    return "| field | value |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in items)


def triples(pattern: str, after: str) -> Callable[[Items], str]:
    """The first item names the subject; each other one becomes a triple."""
    return lambda items: after.join(
        pattern.format(s=items[0][1], p=k, o=v) for k, v in items[1:] or items
    )


LAYOUTS: dict[str, Callable[[Items], str]] = {
    "colon-semicolon": joined(": ", "; "),
    "colon-comma": joined(": ", ", "),
    "colon-lines": joined(": ", "\n"),
    "colon-tight": joined(":", " ; "),
    "colon-stop": joined(": ", ". ", "."),
    "colon-slash": joined(": ", " / "),
    "colon-bar-tight": joined(":", "|"),
    "equals-comma": joined(" = ", ", "),
    "equals-semicolon": joined("=", "; "),
    "equals-space": lambda items: " ".join(f'{k.replace(" ", "_")}="{v}"' for k, v in items),
    "equals-ampersand": joined("=", " & "),
    "equals-lines": joined(" = ", "\n"),
    "dash-lines": lambda items: "\n".join(f"- {k}: {v}" for k, v in items),
    "star-lines": lambda items: "\n".join(f"* {k} = {v}" for k, v in items),
    "numbered": lambda items: "\n".join(f"{i}. {k}: {v}" for i, (k, v) in enumerate(items, 1)),
    "brackets": lambda items: " ".join(f"[{k}] {v}" for k, v in items),
    "json": lambda items: json.dumps(dict(items), ensure_ascii=False),
    "json-lines": lambda items: json.dumps(dict(items), ensure_ascii=False, indent=1),
    "tags": lambda items: " ".join(f"<{k}>{v}</{k}>" for k, v in items),
    "tag-lines": lambda items: "\n".join(f"<{k}> {v}" for k, v in items),
    "markdown": markdown,
    "csv": lambda items: ",".join(k for k, _ in items) + "\n" + ",".join(v for _, v in items),
    "tabs": joined("\t", "\n"),
    "arrow": joined(" -> ", ", "),
    "arrow-lines": joined(" -> ", "\n"),
    "round": lambda items: ", ".join(f"({k}, {v})" for k, v in items),
    "round-value": lambda items: ", ".join(f"{k} ({v})" for k, v in items),
    "curly": lambda items: " ".join(f"{k}{{{v}}}" for k, v in items),
    "bold": lambda items: " ".join(f"**{k}** {v}" for k, v in items),
    "hash": lambda items: " ".join(f"#{k} {v}" for k, v in items),
    "dash-semicolon": joined(" - ", "; "),
    "quoted": lambda items: ", ".join(f"'{k}': '{v}'" for k, v in items),
    "values-first": lambda items: "; ".join(f"{v} ({k})" for k, v in items),
    "values-comma": lambda items: ", ".join(v for _, v in items),
    "values-slash": lambda items: " / ".join(v for _, v in items),
    "triple-slash": triples("{s} / {p} / {o}", "\n"),
    "triple-angle": triples("<{s}> <{p}> <{o}>", " . "),
    "triple-round": triples("({s}; {p}; {o})", " "),
    "triple-dash": triples("{s} -- {p} -- {o}", "\n"),
    "triple-arrow": triples("{s} > {p} > {o}", "; "),
}
READABLE = [n for n in LAYOUTS if not n.startswith(("values", "triple-angle", "markdown"))]


class RecordStyle:
    """What the examples of one document have in common: domains, layout, naming of keys."""

    def __init__(self, r: random.Random, readable: bool = False) -> None:
        self.domains = [r.choice(ALL_DOMAINS)] if r.random() < 0.6 else ALL_DOMAINS
        self.layout = r.choice(READABLE if readable else list(LAYOUTS))
        self.case = r.choice(["plain"] * 3 + list(KEY_CASES))
        self.typed = r.random() < 0.3
        self.name_key = r.choice(["name", "name", "name", "title", "called", "subject", "entity"])
        self.keys = [r.randrange(6) for _ in range(12)]
        self.plan = r.randrange(7) if r.random() < 0.3 else None

    def pair(self, r: random.Random) -> tuple[str, Record]:
        rec = record(r, r.choice(self.domains), self.keys)
        items = [(k, v) for k, v, _ in rec.facts]
        if self.typed:
            items.insert(0, ("type", rec.domain.noun))
        first = (self.name_key, rec.name)
        spot = 0 if self.layout.startswith("triple") or r.random() < 0.7 else len(items)
        items.insert(spot, first)
        case = KEY_CASES[self.case]
        return LAYOUTS[self.layout]([(case(k), v) for k, v in items]), rec


# ---------------------------------------------------------------- tasks
# A task is a function of (random, corpus lines) that settles what the examples of one document
# share and returns (layout, maker); maker(random) gives one (input, output) pair.

Maker = Callable[[random.Random], Pair]
Task = Callable[[random.Random, Sequence[str]], tuple[str, Maker]]


def to_text(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    style = RecordStyle(r)

    def make(r: random.Random) -> Pair:
        source, rec = style.pair(r)
        return source, sentences(r, rec, style.plan)

    return style.layout, make


def to_record(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    style = RecordStyle(r, readable=True)

    def make(r: random.Random) -> Pair:
        target, rec = style.pair(r)
        return sentences(r, rec), target

    return style.layout, make


def one_field(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    """A question about one fact of a record or of a sentence."""
    style, from_text = RecordStyle(r, readable=True), r.random() < 0.5
    ask = r.choice(
        ["What is the {k} of {n}?", "{k}?", "{n}: {k}?", "Which {k} is given?", "Find the {k}."]
    )

    def make(r: random.Random) -> Pair:
        source, rec = style.pair(r)
        key, value, _ = r.choice(rec.facts)
        text = sentences(r, rec) if from_text else source
        return f"{text}\n{capital(ask.format(k=key, n=rec.name))}", value

    return f"{style.layout}{'-text' if from_text else ''}", make


def yes_no(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    style, labels = (
        RecordStyle(r, readable=True),
        r.choice(
            [
                ("yes", "no"),
                ("Yes", "No"),
                ("true", "false"),
                ("True", "False"),
                ("correct", "wrong"),
            ]
        ),
    )

    def make(r: random.Random) -> Pair:
        source, rec = style.pair(r)
        key, value, forms = r.choice(rec.facts)
        truth = r.random() < 0.5
        if not truth:
            attribute = next(a for a in rec.domain.attributes if key in a.keys)
            for _ in range(8):
                other, other_forms = r.choice(attribute.options)
                other = fill(r, other)
                if other != value:
                    value, forms = other, other_forms
                    break
            else:
                truth = True
        claim = articles(f"{rec.name} {form(r, (key, value, forms), 'vp')}")
        return f"{source}\n{capital(claim)}{r.choice(['.', '. Right?', '?'])}", labels[not truth]

    return style.layout, make


def of_words(name: str) -> Task:
    """Tasks on a list of words: the operation is `name`."""

    def task(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
        glue = r.choice([" ", " ", ", ", " - ", "; ", " / ", "\n", " + "])
        back = r.choice([glue, " ", ", "])
        share, upper = r.choice([0.0, 0.3, 1.0]), r.random() < 0.2
        mark = r.choice(["#", "@", "->", "***", "now:", "here", "!!", "~", "%"])
        times, spot = r.randint(2, 3), r.randrange(4)

        def make(r: random.Random) -> Pair:
            w = words(r, 3, 9, share)
            if upper:
                w = [x.capitalize() for x in w]
            source, k = glue.join(w), r.randrange(len(w))
            if name == "copy":
                return source, source
            if name == "after" or name == "before":
                left, right = w[: max(k, 1)], w[max(k, 1) :]
                text = f"{glue.join(left)} {mark} {glue.join(right)}"
                return text, glue.join(right if name == "after" else left)
            if name == "reverse":
                return source, back.join(w[::-1])
            if name == "sort":
                return source, back.join(sorted(w, key=str.lower))
            if name == "first":
                return source, w[0]
            if name == "last":
                return source, w[-1]
            if name == "nth":
                return source, w[min(spot, len(w) - 1)]
            if name == "upper":
                return source, source.upper()
            if name == "lower":
                return glue.join(w).upper(), glue.join(w).lower()
            if name == "initials":
                return source, back.join(x[0] for x in w)
            if name == "join":
                return source, listing(w)
            if name == "unjoin":
                return listing(w), back.join(w)
            if name == "dedupe":
                doubled = sorted([*w, *r.choices(w, k=2)], key=lambda x: (w.index(x), 0))
                return glue.join(doubled), glue.join(w)
            if name == "remove":
                return f"{source}\nwithout: {w[k]}", glue.join(x for x in w if x != w[k])
            if name == "replace":
                new = invented(r)
                text = f"{source}\n{w[k]} -> {new}"
                return text, glue.join(new if x == w[k] else x for x in w)
            if name == "repeat":
                return source, glue.join(w * times)
            if name == "next":
                return f"{source}\nafter {w[k - 1] if k else w[0]}?", w[k] if k else w[1]
            if name == "count":
                return source, str(len(w))
            raise ValueError(name)

        return repr(glue).strip("'"), make

    return task


def lookup(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    """Pairs of keys and values, then one key."""
    pattern = r.choice(["{k}={v}", "{k}: {v}", "{k} {v}", "{k} -> {v}", "({k},{v})", "{v} for {k}"])
    glue = r.choice([" ", ", ", "; ", "\n"])
    ask = r.choice(["{k}?", "{k}", "What is {k}?", "value of {k}", "{k} ="])
    kinds = r.choice(["letters", "words", "names"])

    def make(r: random.Random) -> Pair:
        count = r.randint(2, 8)
        if kinds == "letters":
            keys = r.sample("abcdefghijklmnopqrstuvwxyz", count)
            values = [str(r.randint(0, 99)) for _ in keys]
        elif kinds == "words":
            keys, values = r.sample(NOUNS, count), [invented(r) for _ in range(count)]
        else:
            keys = list({proper(r) for _ in range(count)})
            values = [r.choice([place, lambda r: r.choice(NOUNS)])(r) for _ in keys]
        at = r.randrange(len(keys))
        listed = glue.join(pattern.format(k=k, v=v) for k, v in zip(keys, values, strict=False))
        return f"{listed}\n{ask.format(k=keys[at])}", values[at]

    return f"{pattern}{glue!r}", make


STORIES = [
    ("{k} lives in {v}.", "Where does {k} live?", "place"),
    ("{k} works in {v}.", "Where does {k} work?", "place"),
    ("{k} has a {adj} {v}.", "What does {k} have?", "noun"),
    ("{k} is looking for the {v}.", "What is {k} looking for?", "noun"),
    ("{k} was born in {v}.", "In which year was {k} born?", "year"),
    ("{k} is {v} years old.", "How old is {k}?", "int:4-90"),
    ("{k} is married to {v}.", "Who is {k} married to?", "person"),
    ("{k} gave the letter to {v}.", "Who got the letter from {k}?", "person"),
    ("{k} likes {v}.", "What does {k} like?", "pick:tea,chess,rain,music,apples,rowing,maps"),
    ("{k} wears a {v} coat.", "What colour is the coat of {k}?", "pick:red,blue,green,black,white"),
]


def story(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    said, question, kind = r.choice(STORIES)
    whole = r.random() < 0.3  # answer with the sentence instead of the word
    full = r.random() < 0.5

    def make(r: random.Random) -> Pair:
        names = [person(r) if full else proper(r) for _ in range(r.randint(2, 5))]
        names = list(dict.fromkeys(names))
        values = [fill(r, "{" + kind + "}") for _ in names]
        lines = [
            articles(fill(r, said.replace("a {", "a(n) {").replace("{k}", k).replace("{v}", v)))
            for k, v in zip(names, values, strict=True)
        ]
        at = r.randrange(len(names))
        answer = lines[at] if whole else values[at]
        return f"{' '.join(lines)} {question.replace('{k}', names[at])}", answer

    return f"story-{kind.partition(':')[0]}{'-whole' if whole else ''}", make


def opinion(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    at = r.randrange(len(LABELS_POSITIVE))
    labels = (LABELS_POSITIVE[at], LABELS_NEGATIVE[at])
    if r.random() < 0.15:
        labels = (invented(r), invented(r))
    area = r.choice(list(OPINION_SUBJECTS))

    def make(r: random.Random) -> Pair:
        good = r.random() < 0.5
        stock = POSITIVE if good else NEGATIVE
        subject, other = r.sample(OPINION_SUBJECTS[area], 2)
        text = r.choice(stock["frames"]).format(
            s=subject, o=other, a=r.choice(stock["adjectives"]), b=r.choice(stock["adjectives"])
        )
        if r.random() < 0.3:
            text += " " + capital(r.choice(stock["extras"]))
        return articles(capital(text)), labels[not good]

    return f"opinion-{area}", make


def topic(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    if r.random() < 0.5:  # which domain is a description about?
        chosen = r.sample(ALL_DOMAINS, r.randint(2, 6))

        def make(r: random.Random) -> Pair:
            rec = record(r, r.choice(chosen))
            return articles(f"{rec.name} {verbs(r, rec.facts)}."), rec.domain.noun

        return "topic-domain", make
    names = r.sample(list(TOPICS), r.randint(2, 5))

    def make_topic(r: random.Random) -> Pair:
        name = r.choice(names)
        a, b, c = r.sample(TOPICS[name], 3)
        return r.choice(SAYINGS).format(a=a, b=b, c=c, p=proper(r)), name

    return "topic-words", make_topic


def category(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    names = r.sample(list(CATEGORIES), r.randint(2, 5))
    style = r.choice(["which", "odd", "is", "pick"])

    def member(r: random.Random, name: str) -> str:
        return person(r) if name == "person" else r.choice(CATEGORIES[name])

    def make(r: random.Random) -> Pair:
        name, other = r.sample(names, 2)
        if style == "which":
            return member(r, name), name
        if style == "odd":
            known = CATEGORIES[name]
            group = r.sample(known, 3) if known else [person(r) for _ in range(3)]
            odd = member(r, other)
            group.insert(r.randrange(4), odd)
            return ", ".join(group), odd
        if style == "is":
            truth = r.random() < 0.5
            word = member(r, name if truth else other)
            return articles(f"Is {word} a(n) {name}?"), "yes" if truth else "no"
        options = [name, other] if r.random() < 0.5 else [other, name]
        return articles(f"{member(r, name)}: a(n) {options[0]} or a(n) {options[1]}?"), name

    return f"category-{style}", make


def rewrite(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
    kind = r.choice(
        "passive active question past future negative "
        "plural polite contract expand ing formal".split()
    )
    formal = [
        ("gonna", "going to"), ("wanna", "want to"), ("gotta", "have to"),
        ("kinda had to", "almost had to"), ("oughta", "ought to"),
    ]  # fmt: skip
    short = [
        ("do not", "don't"), ("is not", "isn't"), ("cannot", "can't"), ("will not", "won't"),
        ("did not", "didn't"), ("was not", "wasn't"), ("would not", "wouldn't"),
    ]  # fmt: skip

    def make(r: random.Random) -> Pair:
        base, third, past, participle, ing = r.choice(VERBS)
        who = person(r)
        thing = f"the {r.choice(ADJECTIVES)} {r.choice(NOUNS)}" if r.random() < 0.5 else (
            f"the {r.choice(NOUNS)}"
        )  # fmt: skip
        active, passive = f"{who} {past} {thing}.", capital(f"{thing} was {participle} by {who}.")
        if kind == "passive":
            return active, passive
        if kind == "active":
            return passive, active
        if kind == "question":
            return active, f"Did {who} {base} {thing}?"
        if kind == "past":
            return f"{who} {third} {thing}.", active
        if kind == "future":
            return f"{who} {third} {thing}.", f"{who} will {base} {thing}."
        if kind == "negative":
            return active, f"{who} did not {base} {thing}."
        if kind == "ing":
            return f"{who} {third} {thing}.", f"{who} is {ing} {thing}."
        if kind == "polite":
            ask = f"{base} {thing}"
            return capital(ask) + ".", f"Could you please {ask}?"
        if kind == "plural":
            one, many = r.choice(
                [("is", "are"), ("was", "were"), ("looks", "look"), ("has become", "have become")]
            )
            adjective, noun = r.choice(ADJECTIVES), r.choice(NOUNS)
            return f"The {noun} {one} {adjective}.", f"The {plural(noun)} {many} {adjective}."
        if kind == "formal":
            loose, strict = r.choice(formal)
            ask = f"I {loose} {base} {thing}." if loose != "gonna" else (
                f"{who} is {loose} {base} {thing}."
            )  # fmt: skip
            return f"{r.choice(['hey', 'so', 'well'])}, {ask}", capital(ask.replace(loose, strict))
        long, quick = r.choice(short)
        subject = "we" if long == "do not" else who
        middle = f"{'a problem for' if long in ('is not', 'was not') else base} {thing}"
        pair = (capital(f"{subject} {long} {middle}."), capital(f"{subject} {quick} {middle}."))
        return pair if kind == "contract" else pair[::-1]

    return f"rewrite-{kind}", make


def plural(noun: str) -> str:
    if re.search(r"(s|x|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


COMMON = set(
    "about after again also although another because been before being between both could does "
    "down during each even every from have having here into itself just like many might more most "
    "much must only other over same should since some such than that their them then there these "
    "they this those through under until upon very well were what when where which while will with "
    "within without would your".split()
)


def of_line(kind: str) -> Task:
    """Tasks on a line of the corpus."""

    def task(r: random.Random, corpus: Sequence[str]) -> tuple[str, Maker]:
        glue = r.choice([", ", " ", " / ", "; ", " - ", "\n", " + "])
        ordered, dots, cut = r.random() < 0.5, r.choice(["...", " ...", "", "…"]), r.randint(3, 7)

        def make(r: random.Random) -> Pair:
            line = r.choice(corpus)
            tokens = line.split()
            if kind == "keywords":
                content = [t.strip(".,;:!?\"'()") for t in tokens]
                content = [t for t in content if len(t) > 3 and t.lower() not in COMMON] or tokens
                chosen = sorted(r.sample(range(len(content)), min(len(content), r.randint(2, 6))))
                if not ordered:
                    r.shuffle(chosen)
                return glue.join(content[i] for i in chosen), line
            if kind == "shuffled":
                mixed = tokens[:14]
                line = " ".join(mixed)
                r.shuffle(mixed)
                return " ".join(mixed), line
            if kind == "half":
                return " ".join(tokens[: max(2, len(tokens) // 2)]) + dots, line
            if kind == "unpunctuate":
                return line, re.sub(r"[^\w\s]", "", line)
            if kind == "punctuate":
                return re.sub(r"[^\w\s]", "", line).lower(), line
            if kind == "copy":
                return line, line
            if kind == "title":
                return line, " ".join(capital(t) for t in tokens)
            if kind == "first-words":
                return line, " ".join(tokens[:cut])
            if kind == "last-words":
                return line, " ".join(tokens[-cut:])
            if kind == "gap":
                spot = r.randrange(len(tokens))
                gapped = " ".join("___" if i == spot else t for i, t in enumerate(tokens))
                return f"{line}\n{gapped}", tokens[spot]
            raise ValueError(kind)

        return f"line-{glue!r}" if kind == "keywords" else "line", make

    return task


# name -> (weight, task)
TASKS: dict[str, tuple[float, Task]] = {
    "to-text": (34, to_text),
    "to-record": (7, to_record),
    "one-field": (5, one_field),
    "yes-no": (4, yes_no),
    "lookup": (4, lookup),
    "story": (5, story),
    "opinion": (5, opinion),
    "topic": (3, topic),
    "category": (3, category),
    "rewrite": (6, rewrite),
    **{
        f"words-{name}": (0.55 if name != "copy" else 3, of_words(name))
        for name in (
            "copy after before reverse sort first last nth upper lower initials join unjoin "
            "dedupe remove replace repeat next count"
        ).split()
    },
    **{
        f"line-{name}": (weight, of_line(name))
        for name, weight in {
            "keywords": 4.0, "shuffled": 1.5, "half": 1.0, "unpunctuate": 0.7, "punctuate": 1.0,
            "copy": 2.0, "title": 0.5, "first-words": 0.5, "last-words": 0.5, "gap": 1.0,
        }.items()
    },
}  # fmt: skip

# before the input, between input and output
SEPARATORS: list[tuple[str, str]] = [
    ("", " => "), ("", " -> "), ("", "\n"), ("", "\n\n"), ("", "\nText: "), ("", "\nAnswer: "),
    ("", "\nOutput: "), ("", "\nIn words: "), ("", "\nA: "), ("", "\n=> "), ("", "\n-> "),
    ("", " = "), ("", " ## "), ("", "\n---\n"), ("", "\nResult: "), ("", ": "), ("", " "),
    ("Input: ", "\nOutput: "), ("Input:\n", "\nOutput:\n"), ("Q: ", "\nA: "), ("In: ", "\nOut: "),
    ("Question: ", "\nAnswer: "), ("Data: ", "\nText: "), ("Source: ", "\nTarget: "),
    ("< ", "\n> "), ("Given: ", "\nResult: "), ("Example: ", "\nSolution: "), ("x: ", "\ny: "),
    ("### Input\n", "\n### Output\n"), ("Prompt: ", "\nResponse: "), ("user: ", "\nmodel: "),
    ("[in] ", " [out] "), ("1) ", "\n2) "), ("From: ", "\nTo: "), ("", "\n>>> "), ("", "\t"),
]  # fmt: skip

FORBIDDEN = re.compile(
    r"\w : [^|\n]+ \| "  # E2E: name : X | area : Y
    r"|^[^|\n]*[^|\s] \| [^|\n]+ \| "  # WebNLG: subject | relation | object
    r"|\w\[[^\]\n]*\]",  # this project's tasks: key[value], key[value]
    re.MULTILINE,
)


def forbidden(text: str) -> bool:
    return FORBIDDEN.search(text) is not None


def induction(r: random.Random) -> Document:
    """A random sequence, two or three times over."""
    kind = r.choice(["words", "new", "digits", "mixed"])
    glue = r.choice([" ", " ", ", ", "\n", " - "])
    length = r.randint(5, 50)
    if kind == "digits":
        items = [str(r.randint(0, 999)) for _ in range(length)]
    else:
        share = {"words": 0.0, "new": 1.0, "mixed": 0.5}[kind]
        items = [
            invented(r, 1, 3) if r.random() < share else r.choice(NOUNS) for _ in range(length)
        ]
    between = r.choice([glue, "\n", "\n\n", " ; "])
    times = 2 if length > 30 else r.randint(2, 3)
    return Document("induction", kind, glue, between.join([glue.join(items)] * times))


def build(
    r: random.Random, corpus: Sequence[str], names: list[str], weights: list[float]
) -> Document:
    if r.random() < 0.07:
        return induction(r)
    name = r.choices(names, weights)[0]
    layout, make = TASKS[name][1](r, corpus)
    before, between = r.choice(SEPARATORS)
    count = 1 if r.random() < 0.4 else r.randint(2, 8)
    instruction = r.choice(INSTRUCTIONS[name]) if r.random() < 0.4 else ""
    every = r.random() < 0.3  # the instruction before every example
    examples: list[str] = []
    size = 0
    for _ in range(count):
        source, target = make(r)
        block = "\n" in source or "\n" in target
        head, middle = before, between
        if source.startswith("|") and head and not head.endswith("\n"):
            head = head.rstrip() + "\n"
        if target.startswith("|") and not middle.endswith("\n"):
            middle = middle.rstrip() + "\n"
        if block and "\n" not in middle:
            middle = "\n" + middle.strip() + " "
            middle = middle if middle.strip() else "\n"
        text = f"{head}{source}{middle}{target}"
        if every and instruction:
            text = f"{instruction}\n{text}"
        size += len(text)
        if examples and size > 1700:
            break
        examples.append(text)
    multiline = any("\n" in e for e in examples)
    several, single = ["\n\n", "\n\n", "\n\n\n", "\n###\n", "\n"], ["\n", "\n", "\n\n"]
    glue = r.choice(several if multiline else single)
    text = glue.join(examples)
    if instruction and not every:
        text = instruction + r.choice(["\n", "\n\n"]) + text
    case = r.random()
    if case < 0.06:
        text = text.lower()
    return Document(name, layout, f"{before}{between}", text)


def usable_lines(lines: Iterable[str]) -> list[str]:
    """Lines of a corpus that are one plain sentence or so, without the marks of a layout."""
    out = []
    for line in lines:
        line = " ".join(line.split())
        marked = re.search(r"[|\[\]{}<>_=#]", line)
        if 25 <= len(line) <= 220 and len(line.split()) >= 5 and not marked:
            out.append(line)
    return out


def read_corpus(directory: Path) -> list[str]:
    lines: list[str] = []
    for path in sorted(directory.glob("*.txt")):
        if any(part in path.name for part in CORPUS_FILES):
            lines += path.read_text(encoding="utf-8").split("\n")
    return usable_lines(lines)


FALLBACK_LINES = ["The old boat drifted slowly past the quiet harbour in the morning."]


def described(seed: int, corpus_lines: Iterable[str] = ()) -> Iterator[Document]:
    """An endless stream of documents with the task, layout and separator of each."""
    r = random.Random(seed)
    corpus = list(corpus_lines) or FALLBACK_LINES
    names = list(TASKS)
    weights = [TASKS[name][0] for name in names]
    while True:
        document = build(r, corpus, names, weights)
        if document.text.strip() and not forbidden(document.text):
            yield document


def documents(seed: int, corpus_lines: Iterable[str] = ()) -> Iterator[str]:
    """An endless stream of documents; the same for the same seed and corpus lines."""
    return (document.text for document in described(seed, corpus_lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print samples of the generated mix.")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="directory of *.txt for the corpus-based tasks")
    parser.add_argument("--task", help="only this task")
    args = parser.parse_args()
    lines = read_corpus(args.corpus) if args.corpus else []
    shown = 0
    for document in described(args.seed, lines):
        if args.task in (None, document.task):
            print(f"=== {document.task} · {document.layout} · {document.separator!r}")
            print(document.text, end="\n\n")
            shown += 1
        if shown >= args.samples:
            break


if __name__ == "__main__":
    main()
