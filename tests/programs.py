"""Shell scripts that stand in for programs, and running a program with a deadline."""

import os
import subprocess
import textwrap
import time

DEADLINE = 60  # seconds


def script(path, body):
    """An executable bash script; replaces what is at `path`, also a link."""
    path.unlink(missing_ok=True)
    path.write_text("#!/bin/bash\n" + textwrap.dedent(body))
    path.chmod(0o755)
    return path


def run(*command, **env):
    """Run to the end, in this environment without what the tests set, plus `env`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        env=environment | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE,
    )


def wait_for(path, text=""):
    """Wait until the file exists and contains `text`."""
    end = time.monotonic() + DEADLINE
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} is missing or does not contain {text!r}"
        time.sleep(0.02)
