"""Where compiled functions are kept between runs.

numba's own cache looks at the file of a compiled function and not at the compiled functions it calls: after a change in
`color.py` alone, `render.py` would silently go on with the old code. So the cache's folder is named by a digest of all
files that hold compiled functions, and any change starts a new one.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).parent


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit for functions of this package; `cache=True` keeps them in the folder of these sources, unless
    NUMBA_CACHE_DIR is set. Functions of others in the process, and its environment, are left alone."""

    def compiled(function: Callable[..., Any]) -> Any:
        if "NUMBA_CACHE_DIR" in os.environ:
            return numba.njit(**options)(function)
        former = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = _folder()  # type: ignore[attr-defined] # read when the function is declared
        try:
            return numba.njit(**options)(function)
        finally:
            numba.config.CACHE_DIR = former  # type: ignore[attr-defined]

    return compiled


@functools.cache
def _folder() -> str:
    return str(_writable(f"numba-{digest(PACKAGE)}"))


def digest(package: Path) -> str:
    """Hex digits of the hash of all sources below `package` that hold compiled functions or steps of them."""
    sha256 = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        if b"njit" in source or b"numba.extending" in source:
            sha256.update(path.relative_to(package).as_posix().encode() + b"\0" + source)
    return sha256.hexdigest()[:16]


def _writable(name: str) -> Path:
    """The folder `name` in the first place that can be written: beside the package, the user's cache, the system's."""
    bases = [PACKAGE / "__pycache__", Path(tempfile.gettempdir(), f"ssl_dist-{os.getuid()}")]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # stays as it is for a user without home
    if os.path.isabs(home):
        bases.insert(1, Path(home, "ssl_dist"))
    for base in bases:
        folder = base / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="ssl_dist-"))
