"""`ssl-dist doctor`: check what a run needs of this machine, and print the command that fixes each problem.

Imports nothing of the package, so that `python -m ssl_dist.doctor` works where the package cannot be imported.
"""

import ctypes.util
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

INSTALL = "bash launch/install.sh"
OLDEST_PYTHON = (3, 11)
MIN_SHARED_MEMORY_BYTES = 1 << 30  # torch's worker processes and NCCL put their buffers there

REQUIRED = {
    "torchvision": "reads and decodes data sets",
    "numba": "compiles the view kernel",
    "pydantic": "the typed config",
    "yaml": "reads the config",
    "safetensors": "the features file",
    "sklearn": "the embedded digits and evaluators",
    "PIL": "decodes images in convert",
    "matplotlib": "pictures and curves",
    "jinja2": "the page of a report",
    "tqdm": "progress bars",
    "tensorboard": "the log of a run",
    "scipy": "evaluators",
    "submitit": "sends runs to Slurm",
}
OPTIONAL = {
    "timm": "only backbones named timm/<name> need it",
    "triton": "relational on a GPU is slower and takes more memory without it",
    "ffcv": "data.reader=arrays works without it",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is the command or the step that fixes it."""

    name: str
    good: bool
    text: str
    remedy: str = ""
    required: bool = True

    def __str__(self) -> str:
        state = "ok" if self.good else "MISSING" if self.required else "note"
        remedy = f"  ->  {self.remedy}" if self.remedy and not self.good else ""
        return f"{state:<8}{self.name:<15}{self.text}{remedy}"


def run() -> int:
    """Print one line per finding. Returns 0 when everything required is there, else 1."""
    lacking = 0
    for finding in findings():
        print(finding, flush=True)
        lacking += finding.required and not finding.good
    print(f"{lacking} required thing(s) missing" if lacking else "everything required is there")
    return 1 if lacking else 0


def findings() -> Iterator[Finding]:
    yield _python()
    yield from _torch()
    for name, purpose in REQUIRED.items():
        yield _module(name, purpose, required=True)
    for name, purpose in OPTIONAL.items():
        yield _module(name, purpose, required=False)
    yield _headers()
    yield _turbojpeg()
    yield _slurm()
    yield _writable(os.getcwd())
    yield _shared_memory("/dev/shm")
    yield _cores()


def _python() -> Finding:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding(
        "python",
        sys.version_info >= OLDEST_PYTHON,
        f"{platform.python_version()} (at least {oldest})",
        f"install Python {oldest} or newer, then PYTHON=/path/to/it {INSTALL}",
    )


def _try_import(name: str) -> str:
    """Why a package cannot be imported, on one line; empty when it can."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what broken native libraries raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _version(name: str) -> str:
    owners = importlib.metadata.packages_distributions().get(name, [])
    return importlib.metadata.version(owners[0]) if owners else "version unknown"


def _module(name: str, purpose: str, required: bool) -> Finding:
    fault = _try_import(name)
    return Finding(name, not fault, f"{fault} ({purpose})" if fault else _version(name), INSTALL, required)


def _torch() -> Iterator[Finding]:
    finding = _module("torch", "networks and training", required=True)
    yield finding
    if finding.good:
        yield _cuda(importlib.import_module("torch"))


def _cuda(torch: ModuleType) -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("cuda", True, f"{len(names)} device(s): {', '.join(sorted(set(names)))}")
    if shutil.which("nvidia-smi") is None:
        return Finding("cuda", True, "no NVIDIA driver here: training runs on the CPU")
    return Finding(
        "cuda",
        False,
        f"there is an NVIDIA driver, but this torch ({torch.__version__}, CUDA {torch.version.cuda}) cannot use it",
        "compare the CUDA version that nvidia-smi prints with torch's; renew the driver or install another torch build",
        required=False,
    )


def _headers() -> Finding:
    """What FFCV is compiled against; needed once."""
    lacking = [tool for tool in ("g++", "pkg-config") if shutil.which(tool) is None]
    if "pkg-config" not in lacking:
        packages = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
        lacking += [
            debian
            for name, debian in packages.items()
            if subprocess.run(["pkg-config", "--exists", name], check=False).returncode
        ]
    if not lacking:
        return Finding("ffcv headers", True, "g++, pkg-config, OpenCV, libturbojpeg")
    remedy = f"sudo apt-get install {' '.join(lacking)}"
    return Finding("ffcv headers", False, f"no {', '.join(lacking)} (to compile FFCV)", remedy, required=False)


def _turbojpeg() -> Finding:
    name = ctypes.util.find_library("turbojpeg")
    text = name or "not found (the FFCV reader decodes JPEG with it)"
    return Finding("libturbojpeg", bool(name), text, "sudo apt-get install libturbojpeg0", required=False)


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    return Finding("slurm", True, path or "no sbatch here: runs on this machine only, launch/torchrun_single.sh")


def _writable(folder: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder}: {error.strerror}"
        return Finding(
            "folder", False, text, "go to a folder that you may write to, or set run_dir and --out elsewhere"
        )
    free = shutil.disk_usage(folder).free
    return Finding("folder", True, f"{folder} is writable, {free / 1e9:.0f} GB free")


def _shared_memory(path: str) -> Finding:
    if not os.path.isdir(path):
        return Finding("shared memory", True, f"{path} is not there; this system does without")
    size = shutil.disk_usage(path).total
    return Finding(
        "shared memory",
        size >= MIN_SHARED_MEMORY_BYTES,
        f"{path} has {size / 2**30:.1f} GiB",
        "in a container: docker run --shm-size=8g (or --ipc=host)",
        required=False,
    )


def _cores() -> Finding:
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return Finding("cores", True, f"this process may use {allowed} of {total}")


if __name__ == "__main__":
    sys.exit(run())
