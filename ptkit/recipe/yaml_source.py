"""Reading YAML with line numbers, strictly: no duplicate keys, no tags, YAML 1.2.

In YAML 1.2 `1e-5` is a number and `off` a word, which is what people mean. PyYAML (1.1) reads them
the other way round, and silently keeps the last of two equal keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.tokens import TagToken

from ptkit.errors import RecipeError

KeyPath = tuple[str | int, ...]


@dataclass
class YamlSource:
    """A YAML document as plain data, with the place of every key.

    origins: path of a key -> where it was written, `recipes/x.yaml:12` or `--set a.b=1`.
    key_texts: line and column of a key -> the key as it is written there
    """

    name: str
    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    key_texts: dict[tuple[int, int], str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Where `path`, or the nearest enclosing key that was written, stands."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return f"{self.name}:1"

    def set(self, assignment: str) -> None:
        """Apply `key.path=value` (value in YAML). Raises RecipeError when it has no such place."""
        dotted, sign, text = assignment.partition("=")
        if not sign or not dotted:
            raise RecipeError(f"--set {assignment}: expected KEY=VALUE, such as train.steps=100")
        place: Any = self.data
        path: KeyPath = ()
        parts = dotted.split(".")
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            if isinstance(place, list):
                if not part.isdigit() or int(part) >= len(place):
                    raise RecipeError(
                        f"--set {assignment}: `{'.'.join(map(str, path))}` has entries "
                        f"0 to {len(place) - 1}, found `{part}`"
                    )
                key: str | int = int(part)
            elif isinstance(place, dict):
                key = part
                if not last and not isinstance(place.get(key), dict | list):
                    place[key] = {}
            else:
                raise RecipeError(
                    f"--set {assignment}: `{'.'.join(map(str, path))}` is a value, not a section"
                )
            path = (*path, key)
            if last:
                place[key] = _parse(text, f"--set {assignment}")
                # What was written below an overridden key is gone.
                self.origins = {p: w for p, w in self.origins.items() if p[: len(path)] != path}
                self.origins[path] = f"--set {assignment}"
            else:
                place = place[key]


def read_yaml(path: Path, name: str) -> YamlSource:
    """The mapping in the file `path`. Raises RecipeError (called `name` in it) when malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: is not UTF-8 text") from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> YamlSource:
    """The mapping that `text` holds."""
    document = _load(text, name)
    if not isinstance(document, dict):
        raise RecipeError(f"{name}:1: expected a mapping of keys (`name:`, `task:`, ...)")
    source = YamlSource(name, {}, key_texts=_key_texts(text))
    source.data = _plain(document, (), source)
    return source


def _load(text: str, name: str) -> Any:
    try:
        # A throwaway scan first: custom tags would otherwise become silent special objects.
        for token in YAML(typ="rt").scan(text):
            if isinstance(token, TagToken):
                line = token.start_mark.line + 1
                raise RecipeError(f"{name}:{line}: YAML tags (`!...`) are not allowed in recipes")
        return YAML(typ="rt").load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = str(error.problem).split(" with")[0].replace("found ", "")
        raise RecipeError(f"{name}:{line}: {what}; keep one of the two") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context
        raise RecipeError(f"{name}:{line}: not valid YAML ({problem})") from error
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML ({error})") from error


def _parse(text: str, where: str) -> Any:
    """A single value written in YAML, as plain data."""
    value = _load(text, where)
    return _plain(value, (), YamlSource(where, {}, key_texts=_key_texts(text)))


def _key_texts(text: str) -> dict[tuple[int, int], str]:
    """Line and column of every key that is a scalar -> its text: `01` is not 1, `True` not true."""
    found: dict[tuple[int, int], str] = {}
    seen: set[int] = set()  # an anchor's node is met again at every alias
    todo = [YAML(typ="rt").compose(text)]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, MappingNode):
            for key, value in node.value:
                if isinstance(key, ScalarNode):
                    found[key.start_mark.line, key.start_mark.column] = key.value
                todo.append(value)
        elif isinstance(node, SequenceNode):
            todo += node.value
    return found


def _plain(value: Any, path: KeyPath, source: YamlSource) -> Any:
    """ruamel's annotated containers and scalars as Python's own, noting each key's line."""
    if isinstance(value, dict):
        result = {}
        for key, entry in value.items():
            # Labels in a verbaliser may look like numbers or truth values; they are names.
            name = source.key_texts.get(_place_of_key(value, key), str(key))
            if name in result:
                raise RecipeError(
                    f"{source.name}:{_line_of_key(value, key)}: `{name}` is written twice; keep "
                    "one of the two"
                )
            below = (*path, name)
            source.origins[below] = f"{source.name}:{_line_of_key(value, key)}"
            result[name] = _plain(entry, below, source)
        return result
    if isinstance(value, list):
        items = []
        for i, entry in enumerate(value):
            below = (*path, i)
            source.origins[below] = f"{source.name}:{_line_of_item(value, i)}"
            items.append(_plain(entry, below, source))
        return items
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _place_of_key(mapping: Any, key: Any) -> tuple[int, int]:
    """Line and column of a key, from 0; (-1, -1) for one that is written elsewhere (`<<`)."""
    try:
        line, column = mapping.lc.key(key)
        return int(line), int(column)
    except (AttributeError, KeyError, TypeError):
        return -1, -1


def _line_of_key(mapping: Any, key: Any) -> int:
    line, _ = _place_of_key(mapping, key)
    return (line if line >= 0 else int(getattr(getattr(mapping, "lc", None), "line", 0))) + 1


def _line_of_item(sequence: Any, index: int) -> int:
    position = getattr(sequence, "lc", None)
    try:
        return int(position.item(index)[0]) + 1  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError):
        return int(getattr(position, "line", 0)) + 1
