"""SHA-256 of plain values and of files; of large ones remembered, so that gigabytes are not read for every notebook."""

import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

from sinkstudy.paths import CACHE, atomic

REMEMBERED = CACHE / "digests.json"
LARGE = 1 << 16  # bytes; smaller files are read each time
SETTLED = 2.0  # seconds: a file changed so shortly before it is read could change again with the same times


def of_values(values: Any) -> str:
    """The digest of plain values; of others, that of the text for them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The digest of a file's content, from memory if its place, size and times of change are those noted then.

    The time of the last change of its entry (ctime) goes up with every write, and no program sets it back.
    """
    of = path.stat()
    if of.st_size < LARGE:
        return _read(path)
    known, key = _known(), str(path.resolve())
    mark = [of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino]
    kept = known.get(key)
    if isinstance(kept, list) and kept[:-1] == mark and isinstance(kept[-1], str) and len(kept[-1]) == 64:
        return kept[-1]
    began = time.time()
    digest = _read(path)
    if began - of.st_ctime > SETTLED:
        known[key] = _new[key] = [*mark, digest]
    return digest


def remember() -> None:
    """Keep what was read on disk, for the next command. What cannot be written is read again then."""
    if not _new:
        return
    try:
        with atomic(REMEMBERED) as temporary:
            temporary.write_text(json.dumps(_stored() | _new))
        _new.clear()
    except OSError:
        pass


_new: dict[str, list] = {}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored() -> dict:
    try:
        found = json.loads(REMEMBERED.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_known = cache(_stored)
