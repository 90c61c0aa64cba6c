"""Several processes that generate: `torchrun --nproc_per_node N infer.py …`. Prompts are spread over them; with sequence_parallel=K each K share a video.

    rank            0     1     2     3          K = 2: ranks 0, 1 take the batches 0, 2, 4 …, ranks 2, 3 the batches 1, 3, 5 …

Each process writes the videos it has made and rank 0 the report of all. A video depends on its prompt and seed alone, so it is the same
one whoever makes it; processes that share one run the student with heads and tokens exchanged as in training
(`usv.sparse.sequence_parallel`), equal to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from usv.config import SettingError
from usv.sparse.sequence_parallel import SequenceGroup, group_of


@dataclass(frozen=True)
class Crew:
    """This process among those of the run. share: which of the `shares` parts of the batches it makes; sequence: with whom it does, if with any."""

    rank: int = 0
    world: int = 1
    share: int = 0
    shares: int = 1
    sequence: SequenceGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the videos of its share."""
        return self.sequence is None or self.sequence.rank == 0

    def mine(self, count: int, batch_size: int) -> list[int]:
        """Which of `count` videos this process makes: every `shares`-th batch."""
        return [i for i in range(count) if i // batch_size % self.shares == self.share]

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, in their order, the same on all."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """End the process group; harmless where there is none."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def in_turn(made: Sequence[Sequence]) -> list:
    """What every share made of its batches (`Crew.mine`), one list a share, in the order of the batches."""
    return [each[turn] for turn in range(max(map(len, made))) for each in made if turn < len(each)]


def join(sequence_parallel: int = 1) -> Crew:
    """Join the processes that the launcher started. SettingError where they cannot be divided into groups of `sequence_parallel`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % sequence_parallel:
        raise SettingError(
            f"sequence_parallel: got {sequence_parallel} on {world} processes, accepted: divisors of {world}; torchrun --nproc_per_node {sequence_parallel} infer.py … starts as many"
        )
    if world == 1:
        return Crew()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # a process that has fewer prompts waits for the others at the end; one that has died is noticed by its closed connection
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=12))
    rank = dist.get_rank()
    return Crew(rank, world, rank // sequence_parallel, world // sequence_parallel, group_of(rank, world, sequence_parallel))
