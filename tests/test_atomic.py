"""Folders are the old one or the new one, whole, whenever a writer is killed or fails."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptkit.errors import UserError
from ptkit.formats import atomic

#: Everything by which `ptkit.formats.atomic` changes a disk.
CALLS = ("replace", "fsync", "chmod", "unlink", "rmdir", "mkdir", "open")
FILES = st.dictionaries(
    st.sampled_from(["a", "b.json", "sub/c", "sub/deep/d"]), st.binary(max_size=9), min_size=1
)


class Killed(BaseException):
    """The process is gone: from here on nothing it calls has an effect."""


@contextmanager
def ends_at(
    call: int, what: Callable[[], BaseException], *, for_good: bool, exchanges: bool
) -> Iterator[list[str]]:
    """Within this context the `call`-th change of the disk raises `what()`, and with `for_good`
    all after it. Yields the names of the changes so far."""
    made: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kw: Any) -> Any:
            made.append(name)
            if len(made) == call or (for_good and len(made) > call):
                raise what()
            return real(*args, **kw)

        return change

    real_exchange = atomic.exchange
    with ExitStack() as stack:
        for name in CALLS:
            patched = mock.patch.object(os, name, counted(name, getattr(os, name)))
            stack.enter_context(patched)
        swap = counted("exchange", real_exchange) if exchanges else (lambda a, b: False)
        stack.enter_context(mock.patch.object(atomic, "exchange", swap))
        yield made


def write(path: Path, files: dict[str, bytes]) -> None:
    with atomic.folder(path, replace=True) as scratch:
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)


def read(path: Path) -> dict[str, bytes] | None:
    if not path.exists():
        return None
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@settings(max_examples=8, deadline=None)
@given(old=FILES, new=FILES, exchanges=st.booleans(), name=st.sampled_from(["x", "a[1]*"]))
def test_killed_anywhere_the_folder_is_the_old_or_the_new_one(
    old: dict[str, bytes], new: dict[str, bytes], exchanges: bool, name: str
) -> None:
    call, finished = 1, False
    while not finished:
        with home() as folder:
            path = folder / name
            write(path, old)
            with ends_at(call, Killed, for_good=True, exchanges=exchanges) as made:
                try:
                    write(path, new)
                    finished = True
                except Killed:
                    pass
            if exchanges:  # nobody need do anything: there is no moment without it
                assert read(path) in (old, new), made
            state = folder.with_name(folder.name + "-twice")
            shutil.copytree(folder, state)
            try:
                atomic.settle_all(state)
                assert read(state / name) in (old, new), made
                atomic.remove_leftovers(folder)  # without a reader in between
                assert read(path) in (old, new), made
                assert [p.name for p in folder.iterdir()] == [name]
                write(state / name, new)
                assert read(state / name) == new
            finally:
                shutil.rmtree(state)
        call += 1
    assert call > 8, "nothing was tried"


def test_killed_while_it_is_deleted_a_folder_is_whole_or_gone() -> None:
    files = {"a": b"1", "sub/b": b"2", "sub/deep/c": b"3"}
    call, finished = 1, False
    while not finished:
        with home() as folder:
            write(folder / "x", files)
            with ends_at(call, Killed, for_good=True, exchanges=True) as made:
                try:
                    atomic.remove(folder / "x")
                    finished = True
                except Killed:
                    pass
            assert read(folder / "x") in (files, None), made
            atomic.remove_leftovers(folder)
            assert read(folder / "x") in (files, None), made
            assert {p.name for p in folder.iterdir()} <= {"x"}
        call += 1
    assert call > 6, "nothing was tried"


def test_what_a_kill_left_of_a_folder_is_deleted_with_the_next(tmp_path: Path) -> None:
    for name in (".x.0a1b.gone", ".x.2c3d.gone", ".y.4e5f.gone", ".x.6071.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"1")
    atomic.remove(tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.6071.tmp", ".y.4e5f.gone"]
    atomic.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_is_not_deleted(tmp_path: Path) -> None:
    write(tmp_path / "there", {"a": b"1"})
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(UserError, match="is a link to a folder"):
        atomic.remove(tmp_path / "link")
    assert read(tmp_path / "link") == {"a": b"1"}


@pytest.mark.parametrize("place", [".", "..", "in/..", "../x"])
def test_a_folder_is_deleted_by_whatever_path_leads_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write(tmp_path / "x", {"a": b"1"})
    write(tmp_path / "beside", {"a": b"1"})
    for folder in ("x/in", "beside/deep"):
        (tmp_path / folder).mkdir()
    (tmp_path / "x" / "link").symlink_to(tmp_path / "beside" / "deep")
    monkeypatch.chdir(tmp_path / "x" / ("in" if place == ".." else ""))
    atomic.remove(Path(place))
    assert [*tmp_path.iterdir()] == [tmp_path / "beside"]


def test_a_path_through_a_link_is_the_folder_that_the_system_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("x", "other/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x" / "link").symlink_to(tmp_path / "other" / "deep")
    monkeypatch.chdir(tmp_path / "x")
    atomic.remove(Path("link/.."))
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_failing_anywhere_the_folder_is_whole_and_nothing_is_left_beside(
    exchanges: bool, kind: type[BaseException], tmp_path: Path
) -> None:
    old, new = {"a": b"1", "sub/b": b"2"}, {"a": b"3"}
    call, reached = 1, True
    while reached:
        path = tmp_path / str(call) / "x"
        write(path, old)
        with ends_at(call, lambda: kind(5, "failed"), for_good=False, exchanges=exchanges) as made:
            with suppress(kind):
                write(path, new)
            reached = len(made) >= call
        assert read(path) in (old, new), made
        call += 1
    assert call > 8


def test_what_is_published_has_reached_the_disk_before_it_is_seen(tmp_path: Path) -> None:
    """Every file and every folder, the folder's own names included."""
    synced: list[int] = []
    order: list[str] = []
    real, swap = os.fsync, atomic.exchange
    write(tmp_path / "x", {"a": b"1"})

    def sync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    def swapped(a: Path, b: Path) -> bool:
        order.extend(str(p.relative_to(a)) for p in [a, *a.rglob("*")] if p.stat().st_ino in synced)
        return swap(a, b)

    with mock.patch.object(os, "fsync", sync), mock.patch.object(atomic, "exchange", swapped):
        write(tmp_path / "x", {"a": b"2", "sub/b": b"3"})
    assert sorted(order) == [".", "a", "sub", "sub/b"]
    assert os.stat(tmp_path).st_ino in synced


def test_a_reader_never_misses_a_folder_that_is_being_replaced(tmp_path: Path) -> None:
    if not atomic.exchange(_empty(tmp_path / "p"), _empty(tmp_path / "q")):
        pytest.skip("this file system cannot exchange names")
    path, stop, missing = tmp_path / "x", threading.Event(), []
    write(path, {"a": b"0"})

    def looks() -> None:
        while not stop.is_set():
            if not path.exists():
                missing.append(1)

    reader = threading.Thread(target=looks)
    reader.start()
    for number in range(60):
        write(path, {"a": str(number).encode()})
    stop.set()
    reader.join()
    assert not missing


def _empty(path: Path) -> Path:
    path.mkdir()
    return path
