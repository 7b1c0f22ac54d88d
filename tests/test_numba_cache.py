import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest

from ssl_dist import numba_cache

SHOW = """
import numpy as np
from ssl_dist.config import Views
from ssl_dist.views.draw import draw_patch, numeric_recipe
recipe = numeric_recipe(Views().groups[0], 8)
print([draw_patch(recipe, np.uint64(key), 0) for key in range(20)])
"""


def test_the_digest_follows_every_source_that_compiles(tmp_path):
    (tmp_path / "a.py").write_text("@njit\n")
    (tmp_path / "b.py").write_text("plain\n")
    before = numba_cache.digest(tmp_path)
    (tmp_path / "b.py").write_text("other\n")
    assert numba_cache.digest(tmp_path) == before
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("@njit\n")
    with_sub = numba_cache.digest(tmp_path)
    assert with_sub != before
    (tmp_path / "steps.py").write_text("from numba.extending import intrinsic\n")
    assert numba_cache.digest(tmp_path) != with_sub


def plus_one(x):
    return x + 1


@pytest.mark.parametrize("given", [True, False])
def test_where_a_function_is_kept(tmp_path, monkeypatch, given):
    """And functions of others are kept where numba keeps them."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
        numba.config.reload_config()
    before, environment = numba.config.CACHE_DIR, dict(os.environ)
    ours = numba_cache.njit(cache=True)(plus_one)
    expected = tmp_path / "given" if given else Path(numba_cache._folder())
    assert Path(ours.stats.cache_path).is_relative_to(expected)
    assert before == numba.config.CACHE_DIR and dict(os.environ) == environment
    monkeypatch.undo()
    numba.config.reload_config()


def test_a_user_without_a_home_has_the_systems_folder(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    unknown = tmp_path / "file"
    unknown.touch()
    monkeypatch.setattr(numba_cache, "PACKAGE", unknown)  # nothing can be made below a file
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert numba_cache._writable("numba-0") == tmp_path / f"ssl_dist-{os.getuid()}" / "numba-0"


@pytest.mark.slow
def test_a_change_in_a_called_file_is_seen(tmp_path):
    shutil.copytree(numba_cache.PACKAGE, tmp_path / "ssl_dist", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(tmp_path)}

    def show():
        return subprocess.run(
            [sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        ).stdout

    first = show()
    assert show() == first
    keys = Path(tmp_path, "ssl_dist", "keys.py")
    keys.write_text(keys.read_text().replace("0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5BB"))
    assert show() != first
