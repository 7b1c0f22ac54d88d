"""torchrun whose ranks are forked with everything imported: torch's own agent, at a fifth of the CPU time of starts.

What the agent does is torchrun's: rendezvous, environment, watching, ending the other ranks when one fails. Only the
start differs: a rank is a fork of the agent, and the agent one of the server that tests/ranks.py preloads.
"""

import multiprocessing
import os
import signal
import sys

_context = multiprocessing.get_context("forkserver")


class ForkedTorchrun:
    """Like the subprocess.Popen of launch/torchrun.py. arguments: torchrun's options, then those of `main`, which each
    rank calls with them; its standard error goes to the file `stderr`."""

    def __init__(self, options, main, arguments, environment, stderr):
        self._stderr, self.returncode = stderr, None
        self._process = _context.Process(target=_agent, args=(options, main, arguments, environment, stderr))
        self._process.start()

    def communicate(self, timeout):
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        assert self.returncode is not None, f"torchrun has not ended within {timeout} s"
        return "", self._stderr.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()


def _agent(options, main, arguments, environment, stderr):
    """The part of `torchrun` behind its options, with a function in the place of a script; see launch/torchrun.py."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.environ |= environment
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    config, _, _ = config_from_args(parse_args([*options, "--start-method", "fork", "script"]))
    try:
        elastic_launch(config, _rank)(main, arguments)
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _rank(main, arguments):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # a fork has the handlers of the agent
    if code := main(*arguments):
        sys.exit(code)
