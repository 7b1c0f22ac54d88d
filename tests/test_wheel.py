"""What pip installs works without the checkout: the package with its configs, and the source distribution."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ssl_dist.config import shipped

ROOT = Path(__file__).parents[1]

COMMANDS = """
import ssl_dist
from ssl_dist import cli
from ssl_dist.config import shipped
print(ssl_dist.__file__)
print(shipped.CONFIGS)
for line in (
    "convert digits --out data/digits",
    "explain configs/digits/relational-conv4.yaml data.reader=arrays",
    "study configs/studies/relational-figure2b.yaml --dry-run",
):
    assert cli.main(line.split()) == 0, line
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source distribution and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")

    def build(kind, source):
        command = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        subprocess.run([sys.executable, "-c", command], cwd=source, check=True, capture_output=True)

    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    source = tmp_path_factory.mktemp("source")  # building writes into it
    for name in filter(None, tracked.decode().split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    build("sdist", source)
    [archive] = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(source / "unpacked", filter="data")
    [unpacked] = (source / "unpacked").iterdir()
    build("wheel", unpacked)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a command of the unpacked wheel in a folder of its own."""
    [wheel] = built.glob("*.whl")
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_an_installed_package_has_its_configs(installed):
    done = installed("-c", COMMANDS)
    assert done.returncode == 0, done.stderr
    package, configs, *said = done.stdout.splitlines()
    assert Path(configs) == Path(package).parent / "configs" and ROOT not in Path(package).parents
    assert {"method", "relational-2-1:"} <= {line.split()[0] for line in said if line}, said


@pytest.mark.slow
def test_nothing_of_the_package_is_left_out(built):
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ssl_dist").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    configs = {f"ssl_dist/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert package | configs <= held and not any("test" in name.split("/")[0] for name in held)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"configs/digits/relational-conv4.yaml", "launch/install.sh", "slurm/submit.py", "LICENSE"} <= names


def test_a_config_by_the_name_that_the_readme_has(tmp_path, monkeypatch):
    """In any folder the package's own, but not in the place of a file that is there."""
    monkeypatch.chdir(tmp_path)
    name = "configs/digits/relational-conv4.yaml"
    assert shipped.found(name) == shipped.CONFIGS / "digits" / "relational-conv4.yaml"
    assert shipped.found("configs/none.yaml") == Path("configs/none.yaml")
    assert shipped.found("digits/relational-conv4.yaml") == Path("digits/relational-conv4.yaml")
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("mine")
    assert shipped.found(name) == Path(name)
