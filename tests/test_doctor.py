"""ssl_dist/doctor.py: what is missing is seen, named and given a remedy; only what is required counts."""

import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

from ssl_dist import doctor
from ssl_dist.doctor import Finding


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([Finding("torch", True, "2.15.0")], 0),
        ([Finding("torch", False, "gone", "mend it")], 1),
        ([Finding("ffcv", False, "gone", "mend it", required=False)], 0),
        (
            [
                Finding("ffcv", False, "gone", required=False),
                Finding("torch", False, "gone"),
                Finding("numba", False, ""),
            ],
            1,
        ),
    ],
)
def test_only_what_is_required_counts(findings, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: iter(findings))
    assert doctor.run() == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [str(finding) for finding in findings]
    assert ("missing" in lines[-1]) == bool(code)


def test_a_line_carries_the_remedy_of_what_is_missing():
    assert str(Finding("torch", False, "gone", "mend it")).endswith("->  mend it")
    assert str(Finding("torch", False, "gone")).startswith("MISSING")
    assert str(Finding("torch", False, "gone", required=False)).startswith("note")
    assert "mend it" not in str(Finding("torch", True, "2.15.0", "mend it"))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("import no_such_package_anywhere", "ModuleNotFoundError: No module named 'no_such_package_anywhere'"),
        ("raise OSError('libcudart.so: cannot open\\nsecond line')", "OSError: libcudart.so: cannot open"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named_with_its_reason(body, fault, tmp_path, monkeypatch):
    (tmp_path / "broken_for_doctor.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._module("broken_for_doctor", "reads images", required=True)
    assert not finding.good
    assert finding.text.startswith(fault) and "reads images" in finding.text and "\n" not in finding.text
    assert finding.remedy == "bash launch/install.sh"


def test_a_package_that_is_there_is_named_with_its_version():
    import yaml

    assert doctor._module("yaml", "", required=True) == Finding("yaml", True, yaml.__version__, doctor.INSTALL)


def test_an_old_python_is_refused(monkeypatch):
    assert doctor._python().good
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    assert not doctor._python().good


def test_missing_headers_are_named_as_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._headers().remedy == "sudo apt-get install g++ pkg-config"
    for name, script in {"g++": "", "pkg-config": '[ "$2" = opencv4 ]'}.items():
        (tmp_path / name).write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    finding = doctor._headers()
    assert not finding.good and not finding.required
    assert finding.remedy == "sudo apt-get install libturbojpeg0-dev"


def test_cuda(monkeypatch):
    def torch(*devices):
        return SimpleNamespace(
            __version__="2.15.0",
            version=SimpleNamespace(cuda="13.2"),
            cuda=SimpleNamespace(
                is_available=lambda: bool(devices),
                device_count=lambda: len(devices),
                get_device_name=lambda i: devices[i],
            ),
        )

    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._cuda(torch("H200", "H200")).text == "2 device(s): H200"
    assert doctor._cuda(torch()).good  # a machine without a GPU lacks nothing
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not doctor._cuda(torch()).good  # a GPU that torch cannot use


def test_folder(tmp_path):
    assert doctor._writable(str(tmp_path)).good
    assert not doctor._writable(str(tmp_path / "gone")).good
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "good"), [(64 << 20, False), (8 << 30, True)])
def test_shared_memory(size, good, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total")(size))
    finding = doctor._shared_memory(str(tmp_path))
    assert finding.good is good and not finding.required


@pytest.mark.slow  # imports everything
def test_the_machine_of_the_tests_has_what_is_required():
    answer = subprocess.run([sys.executable, "-m", "ssl_dist.doctor"], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "MISSING" not in answer.stdout
    for name in (
        "python",
        "torch",
        "cuda",
        *doctor.REQUIRED,
        *doctor.OPTIONAL,
        "ffcv",
        "slurm",
        "shared memory",
        "cores",
    ):
        assert any(line[8:].startswith(name) for line in answer.stdout.splitlines()), name
