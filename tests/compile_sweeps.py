"""python -m tests.compile_sweeps: compile the relation head's kernels without a GPU; a JSON line for each."""

import json
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from ssl_dist.kernels import relation_cuda
from tests.test_kernels_relation import Problem

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """What Triton asks a GPU when it compiles for it."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


def main():
    compile_only = JITFunction.run

    def launch(kernel, *arguments, grid, warmup, **constants):
        code = compile_only(kernel, *arguments, grid=grid, warmup=True, **constants).asm
        floats = [value for value in constants.values() if isinstance(value, float)]
        exact = [value for value in floats if _is_in(code["ptx"], value)]
        print(json.dumps({
            "kernel": kernel.__name__, "architecture": architecture, "dtype": str(dtype), **usage(code["cubin"]),
            "rounded": [] if dtype == torch.float32 else [value for value in floats if value not in exact],
        }), flush=True)  # fmt: skip

    JITFunction.run = launch
    for architecture in (80, 90):
        driver.set_active(Driver(architecture))
        for dtype in (torch.float32, torch.float64):
            Problem(3, 4, 256, 1.5, 0.3, dtype=dtype).by_sweep(loss_of=relation_cuda.relation_loss)


def usage(cubin):
    """Registers of a thread, and bytes that they are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


def _is_in(ptx, value):
    """Whether a constant is in the code as a float64, with either sign."""
    return any(f"0d{struct.pack('>d', x).hex().upper()}" in ptx for x in (value, -value))


if __name__ == "__main__":
    main()
