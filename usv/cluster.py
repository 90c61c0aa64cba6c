"""Ray, which is optional: joining a cluster or starting one on this machine, for data/prepare.py, data/generate.py and usv.evaluate."""

from __future__ import annotations

import os
import socket

STORE = 200 << 20  # bytes of the object store of a cluster started here; nothing large goes through it


def connect(address: str | None, workers: int | None, gpu: bool) -> int:
    """Join the cluster of --address, or start one on this machine; returns for how many workers there is room, at most `workers`.

    ValueError where ray is not installed, no cluster answers, or it has no GPU where `gpu` asks for one a worker.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 else: on a machine with other work two workers got a second of CPU a minute
        import ray
    except ImportError:
        raise ValueError('--engine ray: the package ray is not installed; pip install "usv[ray]", or leave --engine out') from None
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "://" not in host:  # ray itself asks for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"--engine ray --address {address}: no cluster answers ({error}); see `ray status`, or leave --engine out") from None
    own = {} if address else {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": workers or None}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f" --address {address}: no cluster" if address else ": no Ray"
        raise ValueError(f"--engine ray{where} answers ({str(error).splitlines()[0][:200]}); see `ray status`, or leave --engine out") from None
    kind = "GPU" if gpu else "CPU"
    room = int(ray.cluster_resources().get(kind, 0))
    if not room:
        ray.shutdown()
        raise ValueError(f"--engine ray: the cluster has no {kind}")
    return min(room, workers or room)
