"""launch/install.sh: what it installs as whom, when it does nothing, what it says where it cannot.

The tests put scripts in the place of Python, apt-get and sudo, so that they need neither time, rights nor a network.
"""

import shutil
import time
from pathlib import Path

import pytest

from tests.programs import run, script

ROOT = Path(__file__).parent.parent

# What every Debian has, and the scripts here use.
TOOLS = ["bash", "cat", "cp", "dirname", "env", "flock", "grep", "head", "mkdir", "mktemp", "rm", "sha256sum", "tail",
         "touch"]  # fmt: skip
EVERYTHING = ["python3.11-venv", "python3.11-dev", "g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev"]
SLURM = "slurmctld slurmd slurm-client munge iproute2"
PKG_CONFIG_NAMES = {"libopencv-dev": "opencv4", "libturbojpeg0-dev": "libturbojpeg"}


class Machine:
    """A checkout, and a PATH on which nothing is installed but what a test puts there."""

    def __init__(self, folder):
        self.checkout, self.bin, self.log = folder / "checkout", folder / "bin", folder / "log"
        self.venv = self.checkout / ".venv"
        (self.checkout / "launch").mkdir(parents=True)
        self.bin.mkdir()
        self.log.touch()
        for name in ("setup.py", "launch/install.sh", "launch/constraints.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.headers = folder / "include"
        self.put_user(uid=0)

    def put_python(self, name="python3", version="3.11"):
        """It makes environments with itself inside, records the arguments of pip, and does nothing else."""
        return script(
            self.bin / name,
            f"""\
            case "$*" in
            --version) echo "Python {version}" ;;
            *"version_info <"*) case {version} in 3.10) exit 1 ;; esac ;;
            *base_prefix*) echo "/usr {version}" ;;
            *version_info*) echo {version} ;;
            *sysconfig*) echo {self.headers} ;;
            *ensurepip*) [ -e {self.bin}/has-venv ] ;;
            "-m venv "*)
                mkdir -p "$3/bin"
                cp "$0" "$3/bin/python"
                echo "#!$3/bin/python" >"$3/bin/pip"
                echo venv >>{self.log}
                ;;
            "-m pip "*) echo "$@" >>{self.log}; exit "${{PIP_CODE:-0}}" ;;
            *"import torch"*) echo "$2" >>{self.log} ;;
            *) exit 9 ;;
            esac
            """,
        )

    def put_packages(self, names):
        for name in names:
            if name in ("g++", "pkg-config"):
                script(self.bin / name, f'[ -e {self.bin}/has-"$2" ]')
            elif name.endswith("-dev") and name.startswith("python"):
                self.headers.mkdir()
                (self.headers / "Python.h").touch()
            else:
                self.mark(name).touch()

    def mark(self, package):
        """The file that stands for a package, as far as the scripts here ask for it."""
        return self.bin / f"has-{PKG_CONFIG_NAMES.get(package, 'venv')}"

    def put_apt(self, installs=()):
        """It notes who calls it with what, and puts the `installs` there whatever it is asked for."""
        touched = " ".join(str(self.mark(name)) for name in installs)
        script(self.bin / "apt-get", f'echo "$(id) apt-get $*" >>{self.log}; touch {self.log} {touched}')

    def put_user(self, uid, sudo=None):
        """Not root, with a sudo that works, one that refuses ("false") or none."""
        script(self.bin / "id", f'echo "${{AS:-{uid}}}"')
        if sudo is not None:
            script(self.bin / "sudo", f'[ "$1" != -n ] || shift; {sudo} || exit 1; AS=0 "$@"')

    def install(self, **env):
        return run("bash", self.checkout / "launch" / "install.sh", PATH=self.bin, HOME=self.checkout, **env)

    def noted(self):
        return self.log.read_text()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def equipped(machine):
    machine.put_python()
    machine.put_packages(EVERYTHING)
    return machine


def test_install_is_done_once(equipped):
    first = equipped.install()
    assert first.returncode == 0, first.stdout + first.stderr
    noted = equipped.noted()
    assert noted.startswith("venv\n") and "apt-get" not in noted
    assert "--constraint launch/constraints.txt pip setuptools" in noted
    assert "--editable .[ffcv,timm,test,docs]" in noted and noted.endswith("import torch, torchvision, numba, ffcv\n")
    start = time.monotonic()
    again = equipped.install()
    assert time.monotonic() - start < 2
    assert (again.returncode, again.stdout) == (0, "install: nothing to do, .venv is complete\n")
    assert equipped.noted() == noted


@pytest.mark.parametrize("changed", ["setup.py", "launch/constraints.txt"])
def test_a_changed_recipe_is_installed_into_the_same_environment(changed, equipped):
    equipped.install()
    with open(equipped.checkout / changed, "a") as file:
        file.write("# changed\n")
    (equipped.venv / "kept").touch()
    equipped.log.write_text("")
    assert equipped.install().returncode == 0
    assert (equipped.venv / "kept").exists() and "--editable" in equipped.noted() and "venv" not in equipped.noted()
    assert "nothing to do" in equipped.install().stdout


def test_an_environment_of_the_users_own_is_completed_not_removed(equipped):
    run(equipped.bin / "python3", "-m", "venv", equipped.venv, PATH=equipped.bin)
    (equipped.venv / "kept").touch()
    assert equipped.install().returncode == 0
    assert (equipped.venv / "kept").exists()


def test_an_interrupted_install_starts_anew(equipped):
    assert equipped.install(PIP_CODE=3).returncode == 3
    (equipped.venv / "half").touch()
    second = equipped.install()
    assert second.returncode == 0 and "removing .venv" in second.stdout
    assert not (equipped.venv / "half").exists()
    assert "nothing to do" in equipped.install().stdout


def test_a_moved_checkout_gets_a_new_environment(equipped):
    equipped.install()
    moved = equipped.checkout.rename(equipped.checkout.with_name("elsewhere"))
    equipped.checkout, equipped.venv = moved, moved / ".venv"
    assert "removing .venv" in equipped.install().stdout
    assert str(moved) in (equipped.venv / "bin" / "pip").read_text()


def test_another_python_gets_a_new_environment(equipped):
    equipped.install()
    (equipped.venv / "old").touch()
    newer = equipped.put_python("python3.12", "3.12")
    assert "nothing to do" in equipped.install().stdout  # not asked for
    equipped.put_packages(["python3.12-venv"])
    answer = equipped.install(PYTHON=newer)
    assert answer.returncode == 0 and not (equipped.venv / "old").exists(), answer.stderr
    assert "nothing to do" in equipped.install().stdout  # it stays when it is no longer named


def test_an_old_python_is_named(machine):
    machine.put_python(version="3.10")
    machine.put_apt()
    answer = machine.install()
    assert answer.returncode == 2 and "Python 3.10 is too old" in answer.stderr
    answer = machine.install(PYTHON=machine.bin / "python3")
    assert answer.returncode == 2 and "is not Python 3.11 or newer" in answer.stderr
    assert machine.noted() == "" and not machine.venv.exists()


def test_python_itself_is_brought(machine):
    machine.put_packages(EVERYTHING)
    machine.put_python("not-yet")
    script(machine.bin / "apt-get", f'echo "$@" >>{machine.log}; cp {machine.bin}/not-yet {machine.bin}/python3')
    answer = machine.install()
    assert answer.returncode == 0, answer.stderr
    assert machine.noted().splitlines()[1].endswith("--no-install-recommends python3 python3-venv python3-dev")


def test_nothing_can_be_installed_without_apt(machine):
    machine.put_python()
    answer = machine.install()
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    for name in [*EVERYTHING, "no apt-get", "WITHOUT_FFCV=1"]:
        assert name in answer.stderr
    assert not machine.venv.exists()


@pytest.mark.parametrize("sudo", [None, "false"])
def test_a_user_who_may_not_gets_the_command(sudo, machine):
    machine.put_python()
    machine.put_apt()
    machine.put_user(1000, sudo)
    machine.put_packages(["g++"])
    answer = machine.install()
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    names = " ".join(name for name in EVERYTHING if name != "g++")
    assert f"have root run: apt-get update && apt-get install -y --no-install-recommends {names};" in answer.stderr
    assert machine.noted() == ""


@pytest.mark.parametrize(("uid", "sudo"), [(0, None), (1000, "true")])
def test_only_what_is_missing_is_installed(uid, sudo, machine):
    lacking = ["python3.11-venv", "libopencv-dev"]
    machine.put_python()
    machine.put_apt(installs=lacking)
    machine.put_user(uid, sudo)
    machine.put_packages(name for name in EVERYTHING if name not in lacking)
    answer = machine.install()
    assert answer.returncode == 0, answer.stderr
    update, install, *_ = machine.noted().splitlines()
    assert update.startswith("0 apt-get ") and update.endswith(" update")
    assert install.startswith("0 apt-get ") and install.endswith(
        f" install -y --no-install-recommends {' '.join(lacking)}"
    )


def test_what_apt_did_not_bring_is_named(machine):
    machine.put_python()
    machine.put_apt(installs=["libopencv-dev"])
    machine.put_packages(name for name in EVERYTHING if name != "libopencv-dev" and name != "g++")
    answer = machine.install()
    assert answer.returncode == 2 and answer.stderr == "install: still missing after apt-get: g++\n"


def test_the_words_of_a_failing_apt_are_shown(machine):
    machine.put_python()
    script(machine.bin / "apt-get", "echo 'E: no network' >&2; exit 100")
    answer = machine.install()
    assert answer.returncode == 2
    assert "E: no network" in answer.stderr and "apt-get failed" in answer.stderr


def test_without_ffcv_no_headers_are_needed(machine):
    machine.put_python()
    machine.put_packages(["python3.11-venv"])
    answer = machine.install(WITHOUT_FFCV=1)
    assert answer.returncode == 0, answer.stderr
    assert "--editable .[timm,test,docs]" in machine.noted() and "ffcv" not in machine.noted()


def test_slurm_is_brought_for_the_tests_alone(equipped):
    """Also where the rest is complete: that was, perhaps, set up by quickstart.sh."""
    equipped.put_apt()
    assert equipped.install().returncode == 0
    assert "apt-get" not in equipped.noted()
    equipped.log.write_text("")
    answer = equipped.install(WITH_SLURM=1)
    assert answer.returncode == 0 and answer.stdout.endswith("nothing to do, .venv is complete\n")
    assert equipped.noted().splitlines()[1:] == [
        f"0 apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends {SLURM}"
    ]
    assert "nothing to do" in equipped.install().stdout  # the stamp is the same with and without


def test_slurm_that_is_there_is_not_installed(equipped):
    for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip"):
        script(equipped.bin / name, "exit 9")
    assert equipped.install(WITH_SLURM=1).returncode == 0
    assert "apt-get" not in equipped.noted()
    (equipped.bin / "sbatch").unlink()
    assert f"missing: {SLURM}" in equipped.install(WITH_SLURM=1).stdout


def test_a_browser_is_brought_for_the_tests_alone(equipped):
    equipped.put_apt()
    assert equipped.install().returncode == 0
    assert "apt-get" not in equipped.noted()
    answer = equipped.install(WITH_CHROMIUM=1)
    assert answer.returncode == 0 and answer.stdout.endswith("nothing to do, .venv is complete\n")
    assert equipped.noted().endswith(" install -y --no-install-recommends chromium\n")
    equipped.log.write_text("")
    script(equipped.bin / "google-chrome", "exit 9")
    assert equipped.install(WITH_CHROMIUM=1).returncode == 0
    assert equipped.noted() == ""  # one that is there is not installed


def test_without_a_browser_the_set_up_goes_on(equipped):
    answer = equipped.install(WITH_CHROMIUM=1, WITH_SLURM=1)
    assert answer.returncode == 0 and answer.stdout.endswith("install: done, .venv is complete\n"), answer.stderr
    lines = [line for line in answer.stdout.splitlines() if "missing: " in line]
    assert SLURM in lines[0] and lines[1].endswith("go on without: the tests that start a browser are skipped")


@pytest.mark.parametrize("obstacle", ["no apt-get", "no rights", "no network"])
def test_without_slurm_the_set_up_goes_on(obstacle, equipped):
    if obstacle != "no apt-get":
        equipped.put_apt()
    if obstacle == "no rights":
        equipped.put_user(1000, sudo="false")
    if obstacle == "no network":
        script(equipped.bin / "apt-get", "echo 'E: no network' >&2; exit 100")
    answer = equipped.install(WITH_SLURM=1)
    assert answer.returncode == 0 and answer.stdout.endswith("install: done, .venv is complete\n"), answer.stderr
    (line,) = [line for line in answer.stdout.splitlines() if "missing" in line]
    assert SLURM in line and line.endswith("or go on without: the tests that start a Slurm cluster are skipped")
    assert ("E: no network" in answer.stderr) == (obstacle == "no network")


def test_a_daemon_that_a_package_starts_does_not_keep_the_lock(equipped):
    script(equipped.bin / "apt-get", f"{shutil.which('sleep')} 5 >/dev/null 2>&1 &")
    start = time.monotonic()
    assert equipped.install(WITH_SLURM=1).returncode == 0
    assert "waiting" not in equipped.install().stdout
    assert time.monotonic() - start < 5
