"""`hf://organisation/name[@revision][:file]`: the Hugging Face hub, or a mirror of it.

Honours HF_ENDPOINT, HF_TOKEN (and a login by `hf auth login`), HF_HUB_DISABLE_IMPLICIT_TOKEN and
HF_HUB_OFFLINE. huggingface_hub knows the token and the address of a file; its own downloader is not used,
since it has no hook for progress and does not check digests, and since one downloader serves both hubs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alight.errors import NetworkError, SourceError
from alight.sources.download import RemoteFile
from alight.sources.fetched import Fetched, Progress
from alight.sources.hub import (
    Address,
    Repository,
    download_all,
    exclusive,
    folder_of,
    promised_digest,
    promised_size,
    pull,
    understanding,
)
from alight.sources.web import HubClient

_DEFAULT_ENDPOINT = "https://huggingface.co"


def fetch(source: str, progress: Progress) -> Fetched:
    """Download a model. Raises as `alight.sources.fetch` says."""
    address = Address.parse(source)
    _refuse_if_offline(source)
    with _client() as client, exclusive(address):
        return pull(address, _list(address, client), client, progress)


def fetch_dataset(
    source: str, choose: Callable[[Collection[str], str | None], list[str]], progress: Progress
) -> Path:
    """Download files of a data set, `hf://datasets/organisation/name[@revision][:file]`.

    Files that are there already are not downloaded again: each commit has a folder of its own, which stays.

    Args:
        choose: which of the repository's paths to bring, given the `file` of the address.

    Returns:
        the folder with these files.

    Raises:
        as `alight.sources.fetch`.
    """
    address = Address.of_dataset(source)
    _refuse_if_offline(source)
    with _client() as client, exclusive(address):
        repository = _list(address, client)
        download_all(choose(repository.files, address.file), address, repository, client, progress)
        return folder_of(address, repository)


def _refuse_if_offline(source: str) -> None:
    if _is_on("HF_HUB_OFFLINE"):
        raise NetworkError(
            f"{source} cannot be fetched: HF_HUB_OFFLINE is set", hint="Unset it, or use a local path."
        )


def _client() -> HubClient:
    # The endpoint is read now: huggingface_hub reads the variable only once, when it is imported.
    return HubClient(
        endpoint=os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT,
        endpoint_variable="HF_ENDPOINT",
        token_variable="HF_TOKEN",
        headers=_authorization(),
    )


def _authorization() -> dict[str, str]:
    from huggingface_hub import get_token

    token = None if _is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") else get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _list(address: Address, client: HubClient) -> Repository:
    from huggingface_hub import hf_hub_url

    revision = quote(address.revision or "main", safe="")
    path = f"/api/{address.kind}s/{address.id}/revision/{revision}"
    answer = client.json(path, {"blobs": "true"}, what=str(address))
    files: dict[str, RemoteFile] = {}
    with understanding(client, address):
        commit = promised_digest(answer["sha"], 40, str(address))
        if commit is None:
            raise SourceError(f"{client.host} did not tell the commit of {address}")
        for entry in answer["siblings"]:
            name = entry["rfilename"]
            large = (
                entry.get("lfs") or {}
            )  # large files have a sha256, small ones only the id of their git blob
            files[name] = RemoteFile(
                path=name,
                url=hf_hub_url(
                    address.id, name, repo_type=address.kind, revision=commit, endpoint=client.endpoint
                ),
                size=promised_size(entry.get("size"), name),
                sha256=promised_digest(large.get("sha256"), 64, name),
                git_sha1=None if large else promised_digest(entry.get("blobId"), 40, name),
            )
        return Repository(commit, files, _licence(answer))


def _licence(answer: dict[str, Any]) -> str | None:
    card = answer.get("cardData") or {}
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name") or licence
    if isinstance(licence, list):
        licence = ", ".join(str(one) for one in licence)
    return licence if isinstance(licence, str) else None
