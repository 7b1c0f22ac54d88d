"""torchrun without its own traceback: the ranks have printed what ended them."""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
