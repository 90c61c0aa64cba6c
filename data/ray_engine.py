"""The jobs of a plan on a Ray cluster: one actor a GPU, or a CPU core, each with VAE, text encoder and, for a teacher, the transformer.

The cluster's machines see the same folders under the same names: repository, model, videos, --out. Jobs, their order and what stands
in a shard are the plan's, so a cluster writes the bytes that one process writes. An actor that dies takes nothing along: a shard
appears by one rename, and the one it was at goes to another.
"""

from __future__ import annotations

import pickle
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import shards
from shard_plan import Job, Settings

from usv.cluster import connect

TRIES = 3  # of a shard whose worker died
POLL = 1.0  # seconds between two looks at the progress


class Writer:
    """One actor: everything that `writing` keeps for a process."""

    def __init__(self, path: list[str], packed: bytes, threads: int | None):
        sys.path[:0] = path  # before anything of the repository is unpacked
        settings, plan = pickle.loads(packed)
        import torch
        import writing

        if threads is not None:
            torch.set_num_threads(threads)
        self.writing, self.settings, self.clips = writing, settings, 0
        writing.start_worker(settings, plan, self)

    def put(self, count: int) -> None:
        self.clips += count

    def done(self) -> int:
        """Clips of the shard at hand so far; answered beside the work."""
        return self.clips

    def empty(self) -> None:
        self.writing.write_empty(self.settings)

    def write(self, job: tuple) -> tuple[str, int, int]:
        from shard_plan import Job

        self.clips = 0
        self.empty()
        return self.writing.write_job(Job(*job))


def write_on_ray(settings: Settings, plan: dict, todo: list[Job], advance: Callable[[int], None], done: Callable[[tuple], None]) -> None:
    """Write the missing shards. advance: told of clips as they are made; done: of every shard.

    RuntimeError when workers die again and again over one shard, else what a worker's job raises.
    """
    room = connect(settings.address, settings.workers, settings.device.startswith("cuda"))
    import ray

    try:
        _Crew(settings, plan, min(room, max(1, len(todo)))).work(todo, advance, done)
    finally:
        ray.shutdown()  # actors and, if it was started here, the cluster
    for path in settings.out.glob(shards.TEMPORARY):  # of workers that died
        path.unlink(missing_ok=True)


class _Crew:
    """The actors of one run, and which shard each is at."""

    def __init__(self, settings: Settings, plan: dict, size: int):
        import ray

        cuda = settings.device.startswith("cuda")
        actor = ray.remote(Writer).options(num_cpus=1, num_gpus=int(cuda), max_concurrency=2)  # the second thread answers `done`
        path = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker knows the repository only once `path` is set
        given = {name: getattr(settings, name) for name in ("out", "model", "videos")}
        places = {name: place.absolute() for name, place in given.items() if place is not None and shards.is_local(place)}
        packed = ray.put(pickle.dumps((replace(settings, **places), plan)))
        self.hire = lambda: actor.remote(path, packed, None if cuda else 1)
        self.size, self.shown, self.finished = size, 0, 0
        self.asked: dict = {}  # actor -> its answer to `done`, on the way
        self.clips: dict = {}  # actor -> clips of the shard at hand, as last heard

    def work(self, todo: list[Job], advance: Callable[[int], None], done: Callable[[tuple], None]) -> None:
        """All jobs, each by whoever is free; a shard whose worker died goes to a new one."""
        import ray

        waiting, tries, at = deque(todo), Counter(), {}
        idle = deque(self.hire() for _ in range(self.size))
        if not todo:
            ray.get(idle[0].empty.remote())
        while waiting or at:
            while waiting and idle:
                actor, job = idle.popleft(), waiting.popleft()
                at[actor.write.remote(astuple(job))] = actor, job
            for reference in ray.wait(list(at), timeout=POLL)[0]:
                actor, job = at.pop(reference)
                try:
                    done(ray.get(reference))
                    self.finished += len(job.clips)
                    self.clips[actor] = 0
                    idle.appendleft(actor)  # before one that is still loading
                except ray.exceptions.RayActorError as error:
                    tries[job.name] += 1
                    if tries[job.name] == TRIES or isinstance(error, ray.exceptions.ActorUnschedulableError):
                        raise RuntimeError(f"{tries[job.name]} workers died over {job.name}, most often for lack of memory; use fewer --workers and run the command "
                                           f"again (finished shards are kept): {_line(error)}") from None  # fmt: skip
                    waiting.append(job)
                    idle.append(self.hire())
                except ray.exceptions.RayTaskError as error:
                    known = isinstance(error.cause, ValueError | OSError | RuntimeError)
                    raise (error.cause if known else RuntimeError(f"{job.name}: {_line(error.cause)}")) from None
            self.show([actor for actor, _ in at.values()], advance)

    def show(self, busy: list, advance: Callable[[int], None]) -> None:
        """Move the bar to where the work is: after a death that is backwards. An actor is asked again when it has answered."""
        import ray

        self.asked |= {actor: actor.done.remote() for actor in busy if actor not in self.asked}
        for actor, reference in list(self.asked.items()):
            if ray.wait([reference], timeout=0)[0]:
                del self.asked[actor]
                try:
                    self.clips[actor] = ray.get(reference)
                except ray.exceptions.RayError:  # it died; its shard's turn comes
                    self.clips[actor] = 0
        clips = self.finished + sum(self.clips.get(actor, 0) for actor in busy)
        advance(clips - self.shown)
        self.shown = clips


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
