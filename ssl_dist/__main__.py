"""`python -m ssl_dist` is the command `ssl-dist`."""

import sys

from ssl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
