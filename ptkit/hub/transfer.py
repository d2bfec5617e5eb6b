"""Adapters to and from the Hugging Face Hub; huggingface_hub does the transport.

Its settings hold (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). One commit holds all
files, so a push that is cut off leaves the repository as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import ADAPTER_FILES, CARD, INT8_WEIGHTS, read_texts, weights_path
from ptkit.formats.hub import fetch_adapter
from ptkit.formats.hub_repository import HubId, hub_errors
from ptkit.formats.places import find_adapter
from ptkit.hub.card import card_text, named
from ptkit.hub.published import public_base, say_places, with_public_base
from ptkit.hub.push_exported import exported_contents, is_exported
from ptkit.hub.verify import Check, check_files


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be. url: of the commit or pull request; None for a dry run."""

    repository: str
    revision: str | None
    files: dict[str, int]
    url: str | None


@dataclass(frozen=True)
class Pulled:
    """What was downloaded: the folder it is in now, and the checks it passed."""

    path: Path
    checks: tuple[Check, ...]


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Upload the adapter in `path` to the Hub repository `user/repo`, made if it is not there.

    path: an adapter or run, or what `ptkit export --as vllm` wrote below `adapters/NAME`
    private: of a repository that is made; default: the account's own
    revision: branch to commit to, made if it is not there; create_pr: propose the commit instead
    dry_run: check everything here, ask the Hub nothing
    base_model: the base's id on the Hub, where the adapter names a place on this machine. What is
        uploaded then names it, and the files here stay

    A folder without a card gets one, and the card in it the repository's name. Raises AdapterError
    for an adapter that is damaged or not what its record says. Raises UserError when its base is a
    place on this machine or the Hub refuses, HubError when it fails.
    """
    target = HubId.read(repository)
    if target.revision is not None:
        raise UserError(f"`{repository}`: give the revision with --revision")
    if is_exported(Path(path)):
        contents = exported_contents(Path(path), target, base_model)
        return _pushed(contents, target, private, revision, create_pr, message, dry_run=dry_run)
    folder = find_adapter(Path(path))
    faults = [c.detail for c in check_files(folder, str(path)) if c.passed is False]
    if faults:
        raise AdapterError(f"{path} is not pushed: " + "; ".join(faults))
    texts, files = read_texts(folder), read_adapter(folder)
    base = public_base(files.base_id, base_model, str(path))
    say_places(texts, files.info, str(path))
    card = texts.get(CARD)
    if card is None:
        files = replace(files, texts=texts)
        weights = weights_path(folder)
        card = card_text(
            target.name,
            files,
            weights.stat().st_size,
            int8=weights.name == INT8_WEIGHTS,
            license=files.info.card.license,
            language=files.info.card.language,
        )
    card = named(card, target.repository)
    present = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    changed = {CARD: card}
    if base is not None and base != files.base_id:
        changed = with_public_base(files, {**texts, CARD: card}, base)
    contents = {path.name: path for path in present}
    contents |= {name: text.encode() for name, text in changed.items()}
    if not dry_run and changed.keys() == {CARD} and card != texts.get(CARD):
        atomic.write_text(folder / CARD, card)
    return _pushed(contents, target, private, revision, create_pr, message, dry_run=dry_run)


def _pushed(
    contents: Mapping[str, Path | bytes],
    target: HubId,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    *,
    dry_run: bool,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in contents.items()
    }
    if dry_run:
        return Pushed(target.repository, revision, sizes, None)
    api = HfApi()
    with hub_errors(target, writing=True):
        api.create_repo(target.repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(target.repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            target.repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message or "Upload adapter with ptkit",
            revision=revision,
            create_pr=create_pr,
        )
    url = commit.pr_url or commit.commit_url
    return Pushed(target.repository, revision, sizes, url)


def pull(source: str, out: str | Path | None = None, *, force: bool = False) -> Pulled:
    """Download the adapter `user/repo[@revision]` from the Hub to the folder `out`.

    out: default `adapters/REPO`

    Only the files ptkit reads are asked for, and the folder appears complete or not at all. Raises
    UserError when it exists and `force` is False. Raises AdapterError when the adapter is damaged,
    pickled, or not what its record says, HubError when the Hub fails.
    """
    wanted = HubId.read(source)
    folder = Path(out) if out is not None else Path("adapters") / wanted.name
    if folder.exists() and not force:
        raise UserError(f"{folder} exists; choose another place with --out, or pass --force")
    cached = fetch_adapter(source, whole=True)
    checks = tuple(check_files(cached, str(cached)))
    faults = [check.detail for check in checks if check.passed is False]
    if faults:
        raise AdapterError(f"{source} is not kept: " + "; ".join(faults))
    with atomic.folder(folder, replace=force) as scratch:
        for name in ADAPTER_FILES:
            if (cached / name).is_file():
                atomic.write_bytes(scratch / name, (cached / name).read_bytes())
    return Pulled(folder, checks)
