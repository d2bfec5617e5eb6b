"""Which base an adapter is used on: the one it names, or the one the user names for it."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from test_chat import FACTS, SHORT
from test_cli import ptkit, refused

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_folder import CONFIG, WEIGHTS
from ptkit.recipe.schema import ModelSection
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN, TINY_EN_FOLDER
from ptkit.serve.build import build_app

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


def plain(source: str, folder: Path, **settings: object) -> Path:
    """A shipped adapter as plain PEFT leaves it: nothing but a name says what its base is."""
    shutil.copytree(SHIPPED / source, folder)
    (folder / "ptkit.json").unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with one adapter whose base goes by the name of a mirror."""
    plain("facts-prefix", tmp_path / "all" / "one", base_model_name_or_path="mirror/tiny-copy")
    return tmp_path / "all"


def test_bank_takes_the_named_base_for_adapters_that_know_it_by_another_name(
    adapters: Path, tmp_path: Path
) -> None:
    for command in ("verify", "load"):
        told = ptkit("bank", command, adapters, cwd=tmp_path, code=2)
        assert "mirror/tiny-copy" in told.stdout + told.stderr
        assert "one" in ptkit("bank", command, adapters, "--model", TINY_EN, cwd=tmp_path).stdout


@pytest.mark.parametrize("how", ["--adapters", "--adapter"])
def test_chat_takes_the_named_base_too(
    how: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = adapters if how == "--adapters" else adapters / "one"
    lines = ["/adapter one", FACTS] if how == "--adapters" else [FACTS]

    def chat(*options: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        done = ptkit("chat", how, place, "--raw", *SHORT, *options, cwd=tmp_path, code=code)
        return done.stdout + done.stderr

    assert "--model" in chat(code=2)
    expected = ptkit(
        "generate", FACTS, "-a", SHIPPED / "facts-prefix", "--raw", *SHORT, cwd=tmp_path
    )
    assert expected.stdout.strip() in chat("--model", TINY_EN)


def test_a_server_takes_the_named_base_for_its_own_folder_only(
    adapters: Path, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    apps = {chosen: build_app(base, adapters, chosen=chosen) for chosen in (False, True)}
    try:
        refusing, taking = (apps[chosen].state.library for chosen in (False, True))
        with pytest.raises(AdapterError, match="--model"):
            refusing.adapters("one")
        with caplog.at_level(logging.WARNING):
            assert taking.adapters("one")[0].name == "one"
        assert any("mirror/tiny-copy" in r.getMessage() for r in caplog.records)
        taking.load("again", path="one", hub=None, replace=False)
        sent = {name: (adapters / "one" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        with pytest.raises(AdapterError, match="mirror/tiny-copy"):
            taking.upload("sent", sent)
        taking.load("again", path="one", hub=None, replace=True)
    finally:
        for app in apps.values():
            app.state.library.engine.close()


@pytest.mark.parametrize("chosen", [False, True])
def test_adapters_of_another_base_are_left_out_and_told_in_one_line(
    chosen: bool, adapters: Path, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(SHIPPED / "facts-prefix", adapters / "mine")
    for number in range(7):
        other = adapters / f"other{number}"
        shutil.copytree(SHIPPED / "facts-prefix", other)
        info = json.loads((other / "ptkit.json").read_text())
        info["base"] |= {"id": "org/large" if number else TINY_EN, "fingerprint": "0" * 16}
        (other / "ptkit.json").write_text(json.dumps(info))
    (adapters / "other6" / WEIGHTS).write_bytes(b"not read")
    with caplog.at_level(logging.WARNING):
        app = build_app(base, adapters, chosen=chosen)
    library = app.state.library
    try:
        # The name alone does not decide where whoever started the server named the base.
        assert library.names() == (["mine", "one"] if chosen else ["mine"])
        left_out = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        told = (
            f"other0 (made for `{TINY_EN}` with other weights); other1, other2, other3, other4, "
            "other5 and 1 more (made for `org/large`)"
        )
        count = 7 if chosen else 8
        one = "" if chosen else "one (made for `mirror/tiny-copy`); "
        line = f"left out: {count} adapters of another base than `{TINY_EN}`: {one}{told}"
        assert left_out == [line]
        with pytest.raises(AdapterError, match="org/large"):
            library.adapters("other3")
        (adapters / "other3").rename(adapters / "gone")
        library.upload("other3", {
            file: (adapters / "mine" / file).read_bytes() for file in (CONFIG, WEIGHTS)
        })  # fmt: skip
        assert library.adapters("other3")
    finally:
        library.engine.close()


def test_a_base_given_in_a_program_is_chosen(adapters: Path, base: Base) -> None:
    app = build_app(base, adapters)
    try:
        assert app.state.library.adapters("one")
    finally:
        app.state.library.engine.close()


def test_generate_loads_the_base_in_the_revision_that_its_adapters_name(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"base_model_name_or_path": TINY_EN}
    first = plain("facts-prefix", tmp_path / "one", **named, revision="v2")
    main = plain("facts-prompt", tmp_path / "two", **named)
    other = plain("facts-prompt", tmp_path / "other", **named, revision="v3")
    asked: list[tuple[str, str | None]] = []

    def loading(
        id: str, *, revision: str | None = None, labels: object = None, device_map: object = None
    ) -> Base:
        asked.append((id, revision))
        return base

    monkeypatch.setattr("ptkit.runtime.base_model.load_base", loading)
    for model in ((), ("--model", TINY_EN)):
        said = ptkit("generate", FACTS, "-a", first, *model, *SHORT, cwd=tmp_path).stderr
        assert "revision v2" in said
    ptkit("generate", FACTS, "-a", main, *SHORT, cwd=tmp_path)
    assert asked == [
        (TINY_EN, "v2"), (TINY_EN, "v2"), (TINY_EN, None)
    ]  # fmt: skip
    for second in (main, other):
        told = refused("generate", FACTS, "-a", first, "-a", second, *SHORT, cwd=tmp_path)
        assert "different revisions" in told
        assert "on v2" in told


def test_generate_refuses_an_adapter_of_another_base(adapters: Path, tmp_path: Path) -> None:
    first = SHIPPED / "facts-prefix"
    told = refused("generate", FACTS, "-a", first, "-a", adapters / "one", *SHORT, cwd=tmp_path)
    assert "mirror/tiny-copy" in told
    assert TINY_EN in told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"dtype": "flaot32"}, "no `dtype` 'flaot32'; did you mean `float32`"),
        ({"attention": "flash"}, "no `attention` 'flash'; known: auto, eager, sdpa"),
        ({"quantize": "nf8"}, "no `quantize` 'nf8'; did you mean `nf4`"),
        ({"device": "gpu0"}, "device `gpu0` is not available here"),
    ],
)
def test_a_word_load_base_does_not_know_is_told_with_those_it_does(
    said: dict[str, str], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        load_base(TINY_EN, **said)


def test_load_base_takes_what_a_recipe_says_of_its_model(base: Base) -> None:
    section = ModelSection(id=TINY_EN, device="cpu", dtype="bfloat16")
    loaded = load_base(**section.model_dump())
    assert (loaded.id, loaded.precision) == (TINY_EN, "bfloat16")
    assert load_base(TINY_EN_FOLDER, device="cpu").fingerprint == base.fingerprint
