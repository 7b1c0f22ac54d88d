"""torchrun without a traceback of its own: ranks that were stopped or met a mistake have said so themselves."""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

EXPLAINED = {2, 75}  # exit codes of a rank: a user's mistake, stopped on request

if __name__ == "__main__":
    try:
        main()
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        if not any(failure.exitcode in EXPLAINED for failure in error.failures.values()):
            print(error, file=sys.stderr)
        sys.exit(1)
