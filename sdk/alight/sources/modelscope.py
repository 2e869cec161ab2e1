"""`modelscope://organisation/name[@revision][:file]`: the ModelScope hub.

Honours MODELSCOPE_ENDPOINT (or the older MODELSCOPE_DOMAIN) and MODELSCOPE_API_TOKEN. It speaks the hub's
HTTP API directly: the official client brings far more than a list and a download need.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any
from urllib.parse import urlencode

from alight.errors import SourceError
from alight.sources.download import RemoteFile
from alight.sources.fetched import Fetched, Progress
from alight.sources.hub import (
    Address,
    Repository,
    exclusive,
    promised_digest,
    promised_size,
    pull,
    understanding,
)
from alight.sources.web import HubClient

logger = logging.getLogger(__name__)

_DEFAULT_ENDPOINT = "https://www.modelscope.cn"
_DEFAULT_REVISION = "master"
_LISTING_LIMIT = 3000  # the hub silently ends a listing there
_SPDX = {"apache license 2.0": "apache-2.0", "mit license": "mit"}  # the hub's display names


def fetch(source: str, progress: Progress) -> Fetched:
    """Download a model. Raises as `alight.sources.fetch` says."""
    address = Address.parse(source)
    with _client() as client, exclusive(address):
        return pull(address, _list(address, client), client, progress)


def _client() -> HubClient:
    variables = ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN")
    endpoint = next((os.environ[name] for name in variables if os.environ.get(name)), _DEFAULT_ENDPOINT)
    if "://" not in endpoint:  # MODELSCOPE_DOMAIN is a bare host
        endpoint = f"https://{endpoint}"
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    # Its older servers know the session cookie only, its newer ones the header: its own client sends both.
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    return HubClient(
        endpoint=endpoint,
        endpoint_variable="MODELSCOPE_ENDPOINT",
        token_variable="MODELSCOPE_API_TOKEN",
        headers=headers,
    )


def _list(address: Address, client: HubClient) -> Repository:
    revision = address.revision or _DEFAULT_REVISION
    path = f"/api/v1/models/{address.id}"
    data = _data(client, f"{path}/repo/files", {"Revision": revision, "Recursive": "True"}, address)
    files: dict[str, RemoteFile] = {}
    with understanding(client, address):
        entries = [entry for entry in data["Files"] or [] if entry.get("Type") != "tree"]
        if len(data["Files"] or []) >= _LISTING_LIMIT:
            logger.warning("%s lists only the first %d files of %s", client.host, len(data["Files"]), address)
        for entry in entries:
            name = entry["Path"]
            files[name] = RemoteFile(
                path=name,
                url=f"{client.endpoint}{path}/repo?{urlencode({'Revision': revision, 'FilePath': name})}",
                size=promised_size(entry.get("Size"), name),
                sha256=promised_digest(entry.get("Sha256"), 64, name),
            )
        commit = _newest_commit(entries) or revision
    return Repository(commit, files, _licence(address, client, revision))


def _newest_commit(entries: list[dict[str, Any]]) -> str | None:
    """The commit of the newest file.

    A listing tells for each file the commit that last changed it. In the newest of them every other file
    already was as it is now, so it pins them all.
    """
    newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
    commit = newest.get("Revision")
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _licence(address: Address, client: HubClient, revision: str) -> str | None:
    try:
        licence = _data(client, f"/api/v1/models/{address.id}", {"Revision": revision}, address).get(
            "License"
        )
    except SourceError as error:
        logger.info("the licence of %s is not known: %s", address, error.message)
        return None
    if not isinstance(licence, str) or not licence:
        return None
    return _SPDX.get(licence.lower(), licence)


def _data(client: HubClient, path: str, params: dict[str, str], address: Address) -> dict[str, Any]:
    """The `Data` of an answer; the hub can also say in the body that the request failed."""
    answer = client.json(path, params, what=str(address))
    data = answer.get("Data")
    if str(answer.get("Code")) != "200" or not isinstance(data, dict):
        raise SourceError(
            f"{client.host} has no {address}: {answer.get('Message') or answer.get('Code')}",
            hint="Check the name, its upper and lower case, and the revision.",
        )
    return data
