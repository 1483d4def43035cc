"""What the native module was built from, so that one of other sources is not called with structures it does not know.

`setup.py` runs this file by itself, where no dependency is installed.
"""

from hashlib import sha256
from pathlib import Path


def sources_digest(folder: Path) -> str:
    """A hash of the names and the contents of the C++ sources in ``folder``; empty if there are none, as in a wheel."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h", ".inl"))
    found = sha256()
    for path in files:
        found.update(b"%s %d\n" % (path.name.encode(), path.stat().st_size) + path.read_bytes())
    return found.hexdigest()[:16] if files else ""
