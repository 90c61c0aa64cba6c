"""usv.evaluate --engine ray: as many actors as there are GPUs, or cores, each one process of a crew (usv/sampling/ranks.py).

They are to each other what processes of torchrun are: clips are spread over them, and the first makes the report. All machines see the same
folders under the same names.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from usv.cluster import connect

ROOT = Path(__file__).resolve().parents[2]


class Member:
    """One process of the crew."""

    def __init__(self, path: list[str], folder: str):
        sys.path[:0] = path  # before anything of the repository is unpacked
        os.chdir(folder)

    def place(self) -> tuple[str, int]:
        """Where the others find this one: its machine, and a port that is free there."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, rank: int, world: int, place: tuple[str, int], packed: bytes):
        # a worker sees no GPU but its own
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=place[0], MASTER_PORT=str(place[1]))
        function, arguments = pickle.loads(packed)
        return function(*arguments)


def on_ray(function: Callable, arguments: tuple, clips: int, batch_size: int, workers: int | None = None, address: str | None = None) -> dict:
    """`function(*arguments)`, one of usv.evaluate's, by as many actors as there are batches for, at most `workers`.

    ValueError as `usv.cluster.connect`, and whatever the function raises; RuntimeError when a worker dies, which ends the run for all.
    """
    import torch

    gpu = torch.cuda.is_available()
    room = connect(address, workers, gpu)
    import ray

    try:
        world = max(1, min(room, -(-clips // batch_size)))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker knows the repository only once `path` is set
        member = ray.remote(Member).options(num_cpus=1, num_gpus=int(gpu))
        crew = [member.remote([str(ROOT), str(ROOT / "kernels")], os.getcwd()) for _ in range(world)]
        place, packed = ray.get(crew[0].place.remote()), pickle.dumps((function, arguments))
        return ray.get([actor.run.remote(rank, world, place, packed) for rank, actor in enumerate(crew)])[0]
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"--engine ray: a worker died, most often for lack of memory; use fewer --workers and run the command again: {str(error).splitlines()[-1][:300]}") from None
    except ray.exceptions.RayTaskError as error:
        known = isinstance(error.cause, ValueError | OSError)
        raise (error.cause if known else RuntimeError(f"--engine ray: {str(error.cause).splitlines()[-1][:300]}")) from None
    finally:
        ray.shutdown()
