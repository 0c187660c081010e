"""Opening a stored kernel: find the store, check that it is one, read the manifest beside it.

Nothing is written, and no entry of the kernel is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import obstore
import zarr
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url
from zarr.storage import ObjectStore

from nntk_dist.errors import ArgumentError, StoreError, first_line
from nntk_dist.store.backends import BACKENDS
from nntk_dist.store.stored_kernel import StoredKernel

SCHEMA = "nntk-kernel"
VERSION = 1
STORE_NAME = "kernel.zarr"
MANIFEST_NAME = "manifest.json"
GROUPS_NAME = "groups.json"


def open_kernel(path: str | Path, group: str | None = None) -> StoredKernel:
    """Open the kernel of a run, read-only.

    Reads the store's attributes and the manifest; entries stay in the store. Credentials of object stores come from the
    cloud's usual environment variables.

    Args:
        path: a run directory, or the `kernel.zarr` in it; a local path or a URL such as `s3://bucket/prefix`, with
            any scheme of `nntk_dist.store.backends.BACKENDS`.
        group: the group of parameters, if the run has a kernel for each of several.

    Returns:
        The kernel; its arrays are read when they are indexed.

    Raises:
        StoreError: there is nothing, it is not an NNTK kernel, a newer version wrote it, or the manifest is broken.
        ArgumentError: the run has groups and none of them is given, or no such group.

    Example:
        >>> kernel = open_kernel("runs/digits")  # doctest: +SKIP
        >>> kernel  # doctest: +SKIP
        StoredKernel('runs/digits', 1437 × 1437, statistic both, complete)
        >>> kernel[:2, :2]  # doctest: +SKIP
    """
    location = str(path).rstrip("/") or "/"
    if (names := _group_names(location)) or group is not None:
        if group not in names:
            allowed = ", ".join(names) or "none, it has one kernel"
            raise ArgumentError(f"group is {group!r}; allowed for the run at '{location}': {allowed}")
        location = f"{location}/{group}"
    parent, _, last = location.rpartition("/")
    candidates = ((location, STORE_NAME), (parent or ".", last)) if _object_store(location) is not None else ()
    for root, name in candidates:
        store = _object_store(root)
        if store is not None and name and _read_bytes(store, f"{name}/zarr.json") is not None:
            root_group = zarr.open_group(ObjectStore(store, read_only=True), path=name, mode="r", zarr_format=3)
            _check_schema(root_group, location)
            return StoredKernel(location, root_group, _read_manifest(store, root), store)
    raise StoreError(
        f"no kernel at '{location}': expected a run directory that holds {STORE_NAME}, or such a store itself; "
        "'nntk run CONFIG' makes one"
    )


def open_groups(path: str | Path) -> dict[str, StoredKernel]:
    """Open the kernels of all groups of parameters of a run.

    Args:
        path: a run directory, as `open_kernel` takes it.

    Returns:
        The kernel of each group, by its name.

    Raises:
        StoreError: the run has no groups, or as `open_kernel`.
    """
    names = _group_names(str(path).rstrip("/"))
    if not names:
        raise StoreError(f"no run of groups of parameters at '{path}': it holds no {GROUPS_NAME}; use open_kernel")
    return {name: open_kernel(path, name) for name in names}


def _group_names(location: str) -> list[str]:
    """The groups of a run; none if it is not one of groups."""
    store = _object_store(location)
    content = None if store is None else _read_bytes(store, GROUPS_NAME)
    try:
        return [] if content is None else list(json.loads(content)["groups"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{GROUPS_NAME} in '{location}' is broken ({error}); restore it") from error


def _object_store(root: str) -> Any:
    """The folder or bucket `root`; None if it does not exist."""
    scheme, separator, rest = root.partition("://")
    try:
        if separator:
            # obstore also opens addresses that can only be read, such as https
            return (BACKENDS.get(scheme) if scheme in BACKENDS else from_url)(root) if rest else None
        folder = Path(root).expanduser().absolute()
        return LocalStore(folder) if folder.is_dir() else None
    except (BaseError, OSError, ValueError) as error:
        raise StoreError(
            f"cannot open '{root}' ({first_line(error)}); give a local path or s3://bucket/prefix"
        ) from error


def _read_bytes(store: Any, path: str) -> bytes | None:
    """The content of a file; None if it does not exist."""
    try:
        return bytes(obstore.get(store, path).bytes())
    except FileNotFoundError:
        return None
    except (BaseError, OSError) as error:
        raise StoreError(
            f"cannot read '{path}' in {store} ({first_line(error)}); check the address and your access to it"
        ) from error


def _check_schema(group: zarr.Group, location: str) -> None:
    schema, version = group.attrs.get("schema"), group.attrs.get("version")
    if schema != SCHEMA or not isinstance(version, int):
        raise StoreError(
            f"the zarr group at '{location}' is not an NNTK kernel: its attributes have schema {schema!r} and version "
            f"{version!r}, expected {SCHEMA!r} and a number; give the path of a run directory"
        )
    if version > VERSION:
        raise StoreError(
            f"the kernel at '{location}' has store version {version}, this library reads up to {VERSION}; upgrade "
            "nntk-dist"
        )


def _read_manifest(store: Any, root: str) -> Mapping[str, Any]:
    content = _read_bytes(store, MANIFEST_NAME)
    try:
        manifest = json.loads(content) if content is not None else {}
    except ValueError as error:
        raise StoreError(f"{MANIFEST_NAME} in '{root}' is not valid JSON ({error}); restore it or run again") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{MANIFEST_NAME} in '{root}' is not a JSON object; restore it or run again")
    return manifest
