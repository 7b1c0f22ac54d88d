"""torchrun without its own traceback, as the ranks have printed what ended them, and with rank 0 on machine 0."""

import os
import sys
from dataclasses import astuple, dataclass, field

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.run import main


def _node_rank() -> int:
    """That of torchrun_multi.sh; started by other means there is one machine."""
    return int(os.environ.get("SSL_DIST_NODE_RANK", "0"))


@dataclass(frozen=True)
class Machine(dynamic_rendezvous._NodeDesc):
    """A machine in a rendezvous. torchrun numbers them in their order, which is that of their names: rank 0, and with
    it the progress of a training, would be on any of them. The order of these is that of NODE_RANK."""

    node_rank: int = field(default_factory=_node_rank)

    def __lt__(self, other: "Machine") -> bool:
        return (self.node_rank, *astuple(self)) < (other.node_rank, *astuple(other))


if __name__ == "__main__":
    dynamic_rendezvous._NodeDesc = Machine
    try:
        main()
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
