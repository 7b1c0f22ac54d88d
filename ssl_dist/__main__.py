"""The program `ssl-dist`, which is `python -m ssl_dist` as well."""

import sys

from ssl_dist import process
from ssl_dist.cli import main


def program() -> int:
    """Run the command that the words after the program's name say. Returns its exit code."""
    process.prepare()
    return main()


if __name__ == "__main__":
    sys.exit(program())
