"""Repositories on the Hugging Face Hub, whatever they hold: names, downloads, and what the Hub's
refusals mean.

It runs in vLLM's environment, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptkit.errors import AdapterError, HubError, UserError
from ptkit.formats.sizes import MEGABYTE, in_bytes

#: The most that one adapter's files may be, in megabytes, unless `DOWNLOAD_LIMIT` says otherwise.
MAX_DOWNLOAD_MB = 4000
#: The environment variable that says so: for what is a setting of the machine, not of a command.
DOWNLOAD_LIMIT = "PTKIT_MAX_DOWNLOAD_MB"

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>{_PART}(?:/{_PART})*))?")


@dataclass(frozen=True)
class HubId:
    """`user/repo`, or `user/repo@revision`."""

    repository: str
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> HubId:
        """Raises UserError for anything else: a path, `..`, an address."""
        found = _HUB_ID.fullmatch(text)
        if found is None or ".." in text:
            raise UserError(
                f"`{text}` is not a repository on the Hub; expected `user/repo` or "
                "`user/repo@revision`"
            )
        return cls(found["repository"], found["revision"])

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `user/repo` or `user/repo@revision`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def downloaded(source: HubId, wanted: list[str]) -> Path:
    """Download the files of `source` whose names match `wanted`; their folder in the Hub's cache.

    Raises AdapterError when the repository or revision is missing, or not public for the token in
    use. It raises it too for files larger than the limit (see `DOWNLOAD_LIMIT`), and then downloads
    nothing. Raises HubError when the Hub fails, and AdapterError when it cannot be reached and
    nothing is cached.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(source):
        _require_small(source, wanted)
        return Path(
            snapshot_download(source.repository, revision=source.revision, allow_patterns=wanted)
        )


def _require_small(source: HubId, wanted: list[str]) -> None:
    """Raise AdapterError when what is to be downloaded is larger than the limit."""
    from huggingface_hub import errors, snapshot_download

    limit = _limit_in_bytes()
    try:
        planned = snapshot_download(
            source.repository, revision=source.revision, allow_patterns=wanted, dry_run=True
        )
    except errors.DryRunError:  # the Hub cannot be asked: nothing can be downloaded either
        return
    size = sum(file.file_size or 0 for file in planned if file.will_download)
    if size > limit:
        raise AdapterError(
            f"{source} holds {in_bytes(size)} of an adapter's files, more than the limit of "
            f"{in_bytes(limit)}; to load it all the same, set {DOWNLOAD_LIMIT}="
            f"{-(-size // MEGABYTE)}"
        )


def _limit_in_bytes() -> int:
    text = os.environ.get(DOWNLOAD_LIMIT, str(MAX_DOWNLOAD_MB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise UserError(f"{DOWNLOAD_LIMIT} is `{text}`; expected a number of megabytes above 0")
    return int(limit * MEGABYTE)


def hub_files(source: HubId) -> list[str]:
    """Names of all files of a repository's revision. Raises as `downloaded` does."""
    from huggingface_hub import HfApi

    with hub_errors(source):
        return list(HfApi().list_repo_files(source.repository, revision=source.revision))


@contextmanager
def hub_errors(source: HubId, *, writing: bool = False) -> Iterator[None]:
    """Turn what the Hub's client raises about `source` into errors that name the fix."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise AdapterError(
            f"{source} is gated: ask for access on its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterError(f"{source.repository} has no revision `{source.revision}`") from error
    except errors.RepositoryNotFoundError as error:
        if writing:
            raise UserError(
                f"{source} is not a repository you can write to: check its name, and log in "
                "with `hf auth login`"
            ) from error
        raise AdapterError(
            f"no such adapter: {source} is neither a folder here nor a repository on the Hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{source} is neither a folder here nor in the Hub's cache, and the Hub cannot be "
            "reached"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{source}: offline mode is on (HF_HUB_OFFLINE)") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("you are not logged in to the Hub; run `hf auth login`") from error
    except errors.HFValidationError as error:
        raise UserError(f"`{source}` is not a valid hub id: {error}") from error
    except errors.HfHubHTTPError as error:
        raise _explained(source, error) from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"the connection to the Hub failed for {source}: {first_line}") from error


def _of_the_network(error: BaseException) -> bool:
    """Whether the client hands on its HTTP library's error (which library differs by version),
    as it came or as the cause of one of its own."""
    if isinstance(error, OSError) or type(error).__module__.startswith("http"):
        return True
    return error.__cause__ is not None and _of_the_network(error.__cause__)


_STATUS = {
    401: "the Hub does not accept the token in use; run `hf auth login`",
    403: "the token in use has no right to do this; it needs write access to {source}",
    409: "{source} was changed by somebody else at the same moment; look at it and push again",
    413: "the Hub finds the upload too large",
    429: "the Hub asks for fewer requests (429); wait a few minutes and run the command again",
}


def _explained(source: HubId, error: OSError) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _STATUS:
        kind = HubError if status == 429 else UserError
        return kind(_STATUS[status].format(source=source))
    first_line = str(error).strip().splitlines()[0]
    return HubError(f"the Hub failed for {source}: {first_line}")
