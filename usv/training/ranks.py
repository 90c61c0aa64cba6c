"""How a run lies on its ranks: single, ddp, zero2, zero3. accelerate and DeepSpeed are known here, in engine.py and in train.py.

    global batch --rows of rank r--> forward, backward --mean of gradients over ranks--> clip --> one AdamW step, or a skipped one

Every runtime gives the losses and weights of one process at the same global batch, to rounding: data order, noise and
decisions are drawn for the whole batch on every rank and sliced (`usv.training.data`, `usv.flow.Share`). Weights are fp32 under bf16 autocast.

    single, ddp   every rank holds all weights. Gradients are averaged once after the backward, not by DDP's hooks: a step calls
                  the student several times (rollouts, probes), which DDP's one-forward-one-backward bookkeeping refuses.
    zero2, zero3  DeepSpeed partitions gradients and moments, at 3 also the weights. Checkpoints hold whole tensors by name,
                  so what two ranks of zero3 saved, one process resumes, and the reverse.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from usv.config import SettingError, TrainConfig
from usv.cpu import fast_dtype
from usv.flow import Share
from usv.sparse.sequence_parallel import SequenceGroup, group_of

BUCKET = 1 << 26  # elements of gradient averaged by one call


class RankError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and what they do together. sequence: those it shares its samples with, if any."""

    rank: int
    world: int
    device: torch.device
    sequence: SequenceGroup | None = None

    @property
    def share(self) -> Share:
        """Which samples of a global batch are this process's."""
        size = 1 if self.sequence is None else self.sequence.size
        return Share(self.rank // size, self.world // size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks of each number, the same on every rank."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.world).tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Whether any rank says so, the same on every rank."""
        return [value > 0 for value in self.mean([float(flag) for flag in flags])]

    def texts(self, mine: str) -> list[str]:
        """A short text of every rank, in their order, the same on every rank."""
        if self.world == 1:
            return [mine]
        found: list = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def average_gradients(self, parameters) -> None:
        """Mean of the gradients over ranks, a bucket at a time."""
        if self.world == 1:
            return
        bucket: list[torch.Tensor] = []
        for grad in [*(p.grad for p in parameters), None]:
            if bucket and (grad is None or sum(g.numel() for g in bucket) + grad.numel() > BUCKET):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                flat /= self.world
                for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                    g.copy_(mean.view_as(g))
                bucket = []
            if grad is not None:
                bucket.append(grad)


def precision(config: TrainConfig) -> str:
    """accelerate's name of the precision."""
    if config.runtime.precision == "auto":
        bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else fast_dtype() == torch.bfloat16
        return "bf16" if bf16 else "no"
    return {"fp32": "no", "bf16": "bf16"}[config.runtime.precision]


def launched() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(config: TrainConfig) -> tuple[Accelerator, Ranks]:
    """Join the processes of the run. SettingError where the runtime and the launch do not fit."""
    name, world = config.runtime.name, launched()
    if config.model.experts > 1 and config.model.expert is None:
        raise SettingError("model.expert: got none for a model of two experts, accepted: high | low; one is trained a run")
    if config.logger.name == "trackio" and find_spec("trackio") is None:
        raise SettingError("logger=trackio: not installed; pip install trackio, or logger=wandb or none")
    if name == "single" and world > 1:
        raise SettingError(
            f"runtime.name: got single on {world} processes, accepted: ddp | zero2 | zero3, e.g. runtime=ddp"
        )
    sharing = config.runtime.sequence_parallel
    if world % sharing:
        raise SettingError(
            f"runtime.sequence_parallel: got {sharing} on {world} processes, accepted: divisors of {world}"
        )
    if config.optim.batch_size % (world // sharing * config.optim.accumulate):
        raise SettingError(
            f"optim.batch_size: got {config.optim.batch_size}, accepted: multiples of the {world} processes"
            + (f" / {sharing} that share a sample" if sharing > 1 else "")
            + (f" × optim.accumulate={config.optim.accumulate}" if config.optim.accumulate > 1 else "")
        )
    if name == "single":
        # without a GPU the CPU: of other devices, a laptop's among them, the kernels know none
        accelerator = Accelerator(mixed_precision=precision(config), cpu=not torch.cuda.is_available())
        return accelerator, Ranks(0, 1, accelerator.device)
    # a rank that waits for rank 0's validation videos must not give up; a dead rank is noticed by its closed connection
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    cpu = not torch.cuda.is_available()
    plugin = None
    if name != "ddp":
        _alone_if_not_launched()
        if cpu:  # to accelerate, "cpu" excludes DeepSpeed; without a GPU it takes the CPU by itself
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            os.environ["ACCELERATE_USE_CPU"], cpu = "false", False
            import deepspeed.ops

            # compiled at start (over a minute, and a build that was killed leaves a lock on which the next run hangs)
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, world), zero3_init_flag=False)
    accelerator = Accelerator(
        mixed_precision="no" if plugin else precision(config),
        cpu=cpu,
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=config.optim.accumulate if plugin else 1,  # DeepSpeed's own count; elsewhere the parts are ours
        kwargs_handlers=[patience],
    )
    if plugin:  # else transformers would partition the text encoder of a pipeline loaded later, which no engine gathers
        unset_hf_deepspeed_config()
    joined = dist.is_initialized()  # accelerate misreports DeepSpeed's processes on a CPU as one
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    return accelerator, Ranks(rank, world, accelerator.device, group_of(rank, world, sharing))


def _alone_if_not_launched() -> None:
    """DeepSpeed wants a process group even for one process started without a launcher."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def deepspeed_config(config: TrainConfig, world: int) -> dict:
    """DeepSpeed's own settings for ours. Weights stay fp32: the forward runs under our autocast, as in the other runtimes."""
    r, batch = config.runtime, config.optim.batch_size
    parts = config.optim.accumulate
    mine = batch // (world // r.sequence_parallel * parts)  # DeepSpeed only checks that these fit
    stage = {"zero2": 2, "zero3": 3}[r.name]
    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True}
    if r.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # the plan changes which modules run from step to step: no prefetching along the last step's trace
        zero |= {"stage3_param_persistence_threshold": r.zero3_persist, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": mine, "train_batch_size": mine * parts * world, "gradient_accumulation_steps": parts,
        "gradient_clipping": config.optim.grad_clip, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": False}, "fp16": {"enabled": False},
    }  # fmt: skip


@contextmanager
def lost_ranks(ranks_expected: int) -> Iterator[None]:
    """Turns the communication errors that a dead process causes in the others into one RankError."""
    try:
        yield
    except RuntimeError as error:
        words = ("connection closed", "connection reset", "nccl", "gloo", "socket", "broken pipe", "timed out", "peer")
        if ranks_expected > 1 and any(word in str(error).lower() for word in words):
            raise RankError(
                f"another of the {ranks_expected} processes has ended ({str(error).splitlines()[0][:160]}); its own message is the "
                "reason. Start the same command again: runtime.resume=auto goes on from the last checkpoint"
            ) from None
        raise
