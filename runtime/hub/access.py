"""Bundles on the hub, fetched into the user's cache; and whatever the hub's library says, as one line."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

from edgeskip.runtime.bundle.manifest import MANIFEST, Bundle
from edgeskip.runtime.errors import BackendError, BundleError, EdgeskipError
from edgeskip.runtime.files import trusted_folder
from edgeskip.runtime.packages import install
from edgeskip.runtime.reading import kind_of, read_json

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether it has the shape owner/name."""
    return bool(_ID.fullmatch(name))


def names_a_repository(name: str) -> bool:
    """Whether this can only be a hub id: owner/name, where there is no folder `owner` that it could be in."""
    path = Path(name)
    return is_hub_id(name) and not path.exists() and not path.parent.exists()


def local_bundle(bundle: str | Path) -> str | Path:
    """Where a bundle is here: its folder, or the one that it was fetched to where it is named by its hub id.

    Raises:
        BackendError: the hub's library is not installed.
        BundleError: as `download_bundle`.
    """
    return download_bundle(bundle) if isinstance(bundle, str) and names_a_repository(bundle) else bundle


def require_hub() -> None:
    """Looks for the hub's library.

    Raises:
        BackendError: it is not installed.
    """
    if util.find_spec("huggingface_hub") is None:
        raise BackendError("the hub", "huggingface_hub not installed", fix=install("hub"))


def download_bundle(name: str) -> Path:
    """The folder of a bundle on the hub, such as owner/name: fetched into the user's cache, or found there as it was
    last fetched if the hub is not reached. Only files that its manifest names are fetched.

    Raises:
        BackendError: the hub's library is not installed.
        BundleError: no such repository, one that is gated or no bundle, or the hub was not reached.
    """
    require_hub()
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    # where the bundle is here, it is of no matter that the hub was not reached
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    folder, place = trusted_folder("bundles") / name.replace("/", "--"), f"{name} on the hub"
    with hub_errors(name, BundleError):
        snapshot_download(name, local_dir=folder, allow_patterns=[MANIFEST])
        if not kind_of(folder / MANIFEST, BundleError):
            fix = f"make one with `edgeskip export {name} FOLDER`"
            raise BundleError(place, f"no {MANIFEST}, so not a bundle", fix=fix)
        manifest = read_json(folder / MANIFEST, BundleError)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict):
            raise BundleError(place, f"its {MANIFEST} names no files", fix="have it exported again")
        if sys.stderr.isatty():
            enable_progress_bars()
        snapshot_download(name, local_dir=folder, allow_patterns=[re.sub(r"([*?[])", r"[\1]", file) for file in files])
    return folder


def upload_bundle(bundle: Bundle, name: str, card: str, *, private: bool) -> str:
    """Uploads a bundle in one commit, to a repository that is made if there is none; returns its page's address.

    Raises:
        BackendError: the hub's library is not installed.
        BundleError: nobody is logged in, who is may not do this, or the transfer failed.
    """
    require_hub()
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub_errors(name, BundleError):
        address = str(api.create_repo(name, private=private, exist_ok=True))
        added = [CommitOperationAdd(file, str(bundle.path(file))) for file in (*bundle.manifest.files, MANIFEST)]
        added.append(CommitOperationAdd("README.md", card.encode()))
        api.create_commit(name, added, commit_message=f"A bundle of edgeskip {bundle.manifest.edgeskip_version}")
    return address


@contextmanager
def hub_errors(
    name: str,
    error: type[EdgeskipError],
    *,
    login: str = "log in with `hf auth login`",
    unreached: str = "check the network",
) -> Iterator[None]:
    """What the hub's library raises, as one line.

    Args:
        name: the repository.
        error: what to raise.
        login: how one shows who one is.
        unreached: what to do where the hub was not reached, and what is asked for is not here.

    Raises:
        error: in the place of the library's.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{name} on the hub"
    try:
        yield
    except GatedRepoError:
        raise error(place, "access is gated", fix=f"accept its licence on its page, then {login}") from None
    except RevisionNotFoundError:
        raise error(place, "no such revision", fix="give another") from None
    except RepositoryNotFoundError:
        fix = f"check the name, or {login}"
        raise error(place, f"no such model, and no folder {name!r} here", fix=fix) from None
    except HFValidationError:
        raise error(name, "neither a folder nor a valid hub id", wanted="a folder, or owner/name") from None
    except LocalTokenNotFoundError:
        raise error(place, "you are not logged in", fix=login) from None
    except LocalEntryNotFoundError:
        raise error(place, "not in the local cache and the hub was not reached", fix=unreached) from None
    except OfflineModeIsEnabled:
        raise error(place, "not reached, as HF_HUB_OFFLINE says", fix="unset it") from None
    except HfHubHTTPError as caught:
        status = getattr(caught.response, "status_code", None)
        if status == 401:
            raise error(place, "you are not logged in", fix=login) from None
        if status == 403:
            raise error(place, "you may not do this", fix=f"{login}, as somebody who may") from None
        raise error(place, f"the hub refuses ({type(caught).__name__}, status {status})", fix="try again") from None
    except EdgeskipError:
        raise
    except Exception as caught:
        known = ("httpx", "httpx2", "httpcore", "requests", "hf_xet")
        if not isinstance(caught, OSError) and type(caught).__module__.partition(".")[0] not in known:
            raise
        found = "not reached" if "Connect" in type(caught).__name__ else "the transfer failed"
        raise error(place, f"{found} ({type(caught).__name__})", fix="check the network") from None
