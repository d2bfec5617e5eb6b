"""Adapters on the Hugging Face Hub, by id."""

from __future__ import annotations

import re
from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import CONFIG, INFO, WEIGHTS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `user/repo` or `user/repo@revision`."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def fetch_adapter(hub_id: str) -> Path:
    """Download the adapter `user/repo[@revision]` and return its folder in the Hub's cache.

    Only the adapter's own files are asked for; whatever else the repository holds stays there.
    Raises AdapterError when the repository, revision or files are missing, not public for the
    token in use, or the Hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = hub_id.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS, INFO]
        )
    except GatedRepoError as error:
        raise AdapterError(
            f"{hub_id} is gated: ask for access on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{repository} has no revision `{revision}`") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            f"no such adapter: {hub_id} is neither a folder here nor a repository on the Hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{hub_id} is neither a folder here nor in the Hub's cache, and the Hub cannot be "
            "reached"
        ) from error
    except HFValidationError as error:
        raise AdapterError(f"`{hub_id}` is not a valid hub id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise AdapterError(f"cannot fetch {hub_id} from the Hub: {first_line}") from error
    if not (Path(folder) / CONFIG).is_file():
        raise AdapterError(f"{hub_id} is on the Hub but holds no adapter ({CONFIG} is missing)")
    return Path(folder)
