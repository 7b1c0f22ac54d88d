"""Real processes for tests: `run(function, size, ...)` calls function(rank, size, ...) in each of them."""

import multiprocessing
import os
import queue
import socket
import traceback

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])

TIMEOUT = 60.0


def _child(function, rank, size, store, answers, arguments, port):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    group = size > 1 and port is None
    if port is not None:  # as a launcher would
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if group:
            from datetime import timedelta

            from ssl_dist.distributed import gloo_threads

            with gloo_threads.unobtrusive():
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=20)
                )
        answers.put((rank, function(rank, size, *arguments), None))
        if group:
            dist.destroy_process_group()
    except BaseException:  # the parent prints it
        answers.put((rank, None, traceback.format_exc()))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(function, size, tmp_path, *arguments):
    """Like `run`, but as a launcher: environment variables instead of a process group."""
    return run(function, size, tmp_path, *arguments, port=free_port())


def run(function, size, tmp_path, *arguments, port=None):
    """The ranks' results in the order of ranks. Fails when a rank raises or does not answer in time."""
    answers = _context.Queue()
    store = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
    processes = [
        _context.Process(target=_child, args=(function, rank, size, str(store), answers, arguments, port))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results, faults = {}, []
    try:
        for _ in processes:
            rank, result, fault = answers.get(timeout=TIMEOUT)
            results[rank] = result
            if fault:
                faults.append(f"rank {rank}:\n{fault}")
                break
    except queue.Empty:
        faults.append(f"no answer from ranks {sorted(set(range(size)) - set(results))} within {TIMEOUT} s")
    finally:
        for process in processes:
            if faults:
                process.kill()
            process.join()
    assert not faults, "\n".join(faults)
    return [results[rank] for rank in range(size)]
