"""Selection traces: one ``.npz`` a selection, written for requests that ask for one.

A request id comes from the client. It names a file only after everything but letters, digits, ``.``, ``-`` and ``_``
(and leading dots) has been replaced, and an existing file is never overwritten. A trace that cannot be written costs
the trace alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

MAX_NAME = 80


def file_stem(rid: str) -> str:
    """A file name that stands for ``rid`` and can never leave its directory.

    Two ids that would read alike after cleaning get different names (a digest is added when cleaning changed
    anything).
    """
    clean = re.sub(r"[^A-Za-z0-9._-]|^\.+", "_", rid)[:MAX_NAME]
    if clean == rid and clean:
        return clean
    return f"{clean or 'request'}-{hashlib.sha256(rid.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def write_trace(directory: str | Path, rid: str, number: int, arrays: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Write ``<stem>.<number>.npz``; a taken name gets the next free number.

    Returns:
        The file written.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, meta=np.array(json.dumps(meta, sort_keys=True)))
    while True:
        path = directory / f"{file_stem(rid)}.{number}.npz"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            number += 1
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(buffer.getvalue())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path


def try_write_trace(*args: Any, **kwargs: Any) -> Path | None:
    """:func:`write_trace`, with a failure logged instead of raised: the request goes on."""
    try:
        return write_trace(*args, **kwargs)
    except (OSError, ValueError) as error:
        logger.warning("tgvkv: a trace could not be written (%s); the request goes on", error)
        return None


def read_trace(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the meta of a trace file."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files if name != "meta"}
        return arrays, json.loads(str(data["meta"]))
