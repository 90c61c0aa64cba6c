"""Two real processes over gloo, for tests of what they share."""

import multiprocessing
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from usv.models.families import FILES

SERVER = multiprocessing.get_context("forkserver")  # imports once, then forks quickly
SERVER.set_forkserver_preload(["usv.models.forward", *(f"usv.models.{name}" for name in FILES)])


def started(world: int, target, *args, context=SERVER) -> list:
    """`world` processes of target(rank, world, port, *args), begun, with a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=target, args=(rank, world, port, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _begin(rank: int, world: int, port: int, work, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    work(rank, *args)
    dist.barrier()
    os._exit(0)  # no destructors of process groups, which wait for one another


def two(work, *args) -> None:
    """Calls work(rank, *args) in two processes, where it may use torch.distributed. Both must end well."""
    processes = started(2, _begin, work, args)
    for process in processes:
        process.join(200)
    assert [p.exitcode for p in processes] == [0, 0]


def mean(tensors: dict) -> dict:
    """Over both processes, as runtimes average gradients."""
    for value in tensors.values():
        dist.all_reduce(value)
        value /= 2
    return tensors
