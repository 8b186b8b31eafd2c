"""What lies in a folder, on this machine or in a bucket. No more of it is held than one page of a bucket's answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from subject_diffusion.storage import is_local

PAGE = 1000
"""Entries that a bucket is asked for at once, the most that S3 gives."""

Info = dict[str, Any]
"""As fsspec's: at least `name`, with the bucket or from the root of this machine, and `type`: file or directory."""


def is_folder(fs: Any, path: str) -> bool:
    """As `fs.isdir`, for which s3fs would list all of the folder, and hold it."""
    if not _is_of(fs, "s3") or not path:
        return bool(fs.isdir(path))
    try:
        page = fs.call_s3("list_objects_v2", **_of_s3(path, deep=True), MaxKeys=1, **fs.req_kw)
    except FileNotFoundError:
        return False
    return "/" not in path.strip("/") or bool(page.get("Contents"))


def entries(fs: Any, folder: str) -> Iterator[Info]:
    """Files and folders that lie in a folder itself, in no order. A link on this machine has `islink`."""
    if is_local(fs):
        yield from _local_entries(folder)
    elif _is_of(fs, "s3"):
        yield from _s3_entries(fs, folder, deep=False)
    elif _is_of(fs, "gs"):
        yield from _gcs_entries(fs, folder, deep=False)
    else:
        yield from fs.ls(folder, detail=True, refresh=True)


def files_below(
    fs: Any, root: str, is_hidden: Callable[[str], bool], depth: int | None = None, follow_links: bool = False
) -> Iterator[Info]:
    """Every file in a folder and below it, in no order. Those are left out of which a part of the path below it is
    hidden. `depth`: how many parts their paths have at most, default: any number; `follow_links`: to folders, too."""
    if depth is None and (_is_of(fs, "s3") or _is_of(fs, "gs")):  # all at once, not folder by folder
        listed = _s3_entries if _is_of(fs, "s3") else _gcs_entries
        start = len(root.rstrip("/")) + 1
        for info in listed(fs, root, deep=True):
            if info["type"] == "file" and not any(map(is_hidden, info["name"][start:].split("/"))):
                yield info
        return
    waiting = [(root, 1)]
    while waiting:
        folder, level = waiting.pop()
        for info in entries(fs, folder):
            path = info["name"].rstrip("/")
            # A bucket may list the folder itself among what is in it.
            if path == folder.rstrip("/") or is_hidden(os.path.basename(path)):
                continue
            if info["type"] != "directory":
                yield info
            elif (follow_links or not info.get("islink")) and (depth is None or level < depth):
                waiting.append((path, level + 1))


def _is_of(fs: Any, protocol: str) -> bool:
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _local_entries(folder: str) -> Iterator[Info]:
    try:
        listing = os.scandir(folder)
    except OSError:
        if os.path.islink(folder):  # a circle of links ends here
            return
        raise
    with listing:
        for entry in listing:
            kind = "directory" if entry.is_dir() else "file" if entry.is_file() else "other"
            yield {"name": entry.path, "type": kind, "islink": entry.is_symlink()}


def _of_s3(folder: str, *, deep: bool) -> dict[str, Any]:
    bucket, _, key = folder.strip("/").partition("/")
    return {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": "" if deep else "/"}


def _s3_entries(fs: Any, folder: str, *, deep: bool) -> Iterator[Info]:
    asked = _of_s3(folder, deep=deep) | fs.req_kw
    while True:
        page = fs.call_s3("list_objects_v2", **asked, MaxKeys=PAGE)
        for found in page.get("CommonPrefixes", ()):
            yield {"name": f"{asked['Bucket']}/{found['Prefix'].rstrip('/')}", "type": "directory"}
        for found in page.get("Contents", ()):
            kind = "directory" if found["Key"].endswith("/") else "file"
            yield {**found, "name": f"{asked['Bucket']}/{found['Key']}", "type": kind, "size": found["Size"]}
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _gcs_entries(fs: Any, folder: str, *, deep: bool) -> Iterator[Info]:
    bucket, _, key = folder.strip("/").partition("/")
    asked: dict[str, Any] = {"prefix": f"{key}/"} if key else {}
    asked |= {} if deep else {"delimiter": "/"}
    while True:
        page = fs.call("GET", "b/{}/o", bucket, maxResults=PAGE, json_out=True, **asked)
        for prefix in page.get("prefixes", ()):
            yield {"name": f"{bucket}/{prefix.rstrip('/')}", "type": "directory"}
        for found in page.get("items", ()):
            kind = "directory" if found["name"].endswith("/") else "file"
            yield {**found, "name": f"{bucket}/{found['name']}", "type": kind, "size": int(found.get("size", 0))}
        if not page.get("nextPageToken"):
            return
        asked["pageToken"] = page["nextPageToken"]
