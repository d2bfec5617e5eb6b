"""Places and names that commands are given, looked at before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from ptkit.errors import AdapterError, DataError, ModelError, UserError


def require_there(*paths: Path | None) -> None:
    """Raise DataError where no data file is at one of `paths`."""
    for path in paths:
        if path is not None and not path.exists():
            from ptkit.formats.places import no_such_file

            raise DataError(no_such_file(path))


def require_writable(option: str, path: Path | None) -> None:
    """Raise UserError where `path`, the value of `option`, can be no file that is written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; name a file")
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{option} {path}: {parent} is a file; name a folder")
            return


def require_file(option: str, path: Path | None) -> None:
    """Raise UserError where `path`, the value of `option`, is no file."""
    if path is not None and not path.is_file():
        raise UserError(f"{option} {path}: no such file")


def require_adapters(*places: str | Path | None, whole: bool = False) -> None:
    """Raise AdapterError, or HubError, unless each of `places` is an adapter, a run or a hub id.

    What a hub id names is fetched (whole: with its recipe and card); a second look finds it in the
    Hub's cache.
    """
    from ptkit.formats.places import find_adapter

    for place in places:
        if place is not None:
            find_adapter(Path(place), whole=whole)


def require_something(place: str | Path) -> None:
    """Raise AdapterError, or HubError, where nothing is at `place`: no folder, no file of whatever
    library, no repository on the Hub, which is fetched."""
    from ptkit.formats.hub import fetch_foreign, is_on_hub, missing_here

    if is_on_hub(str(place)):
        fetch_foreign(str(place))
    elif not Path(place).exists():
        raise AdapterError(missing_here(str(place)))


def require_model(model: str | None) -> None:
    """Raise ModelError where the base `model` is a path and nothing is there."""
    if model is None or not model.startswith((".", "/", "~")):
        return
    if not Path(model).expanduser().exists():
        raise ModelError(f"cannot load the base model `{model}`: no such folder")


def require_free(out: Path, *sources: str | Path, force: bool) -> None:
    """Raise UserError where `out` exists and is not to be replaced, or may not be: what is read
    from `sources` would be deleted with it."""
    from ptkit.formats.atomic import require_free

    require_free(out, replace=force)
    for source in sources:
        if out.is_dir() and out.resolve() in Path(source).resolve().parents:
            raise UserError(
                f"{source} is in {out}, and would be deleted with all else there; give --out a "
                "folder of its own"
            )
