"""How a run lies on its ranks: single, ddp, zero2, zero3. On the roof; accelerate and DeepSpeed are known here and in train.py.

    global batch --rows of rank r--> forward, backward --mean of gradients over ranks--> clip --> one AdamW step, or a skipped one

Every runtime gives the losses and weights of one process at the same global batch, to rounding: data order, noise and
decisions are drawn for the whole batch on every rank and sliced (`usv.data`, `usv.flow.Share`). Weights are fp32 under bf16 autocast.

    single, ddp   every rank holds all weights. Gradients are averaged once after the backward, not by DDP's hooks: a step calls
                  the student several times (rollouts, probes), which DDP's one-forward-one-backward bookkeeping refuses.
    zero2, zero3  DeepSpeed partitions gradients and moments, at 3 also the weights. Checkpoints hold whole tensors by name,
                  so what two ranks of zero3 saved, one process resumes, and the reverse.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from diffusers import WanPipeline, WanTransformer3DModel
from transformers.integrations import unset_hf_deepspeed_config

from usv.config import SettingError, TrainConfig
from usv.cpu import fast_dtype
from usv.dry_run import transformer_config
from usv.flow import Share
from usv.generate import load_pipeline, single_precision_rope
from usv.optim import MuonAdamW
from usv.sequence_parallel import SequenceGroup

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
    if config.optim.batch_size % (world // sharing):
        raise SettingError(
            f"optim.batch_size: got {config.optim.batch_size}, accepted: multiples of the {world} processes"
            + (f" / {sharing} that share a sample" if sharing > 1 else "")
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
        kwargs_handlers=[patience],
    )
    if plugin:  # else transformers would partition the text encoder of a pipeline loaded later, which no engine gathers
        unset_hf_deepspeed_config()
    joined = dist.is_initialized()  # accelerate misreports DeepSpeed's processes on a CPU as one
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    return accelerator, Ranks(rank, world, accelerator.device, _sequence_group(rank, world, sharing))


def _sequence_group(rank: int, world: int, size: int) -> SequenceGroup | None:
    """The `size` neighbouring ranks that share a sample; None for one. Collective."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return SequenceGroup(rank % size, size, groups[rank // size])


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
    mine = batch // (world // r.sequence_parallel)  # DeepSpeed only checks that these fit
    stage = {"zero2": 2, "zero3": 3}[r.name]
    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True}
    if r.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # the plan changes which modules run from step to step: no prefetching along the last step's trace
        zero |= {"stage3_param_persistence_threshold": r.zero3_persist, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": mine, "train_batch_size": mine * world, "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": False}, "fp16": {"enabled": False},
    }  # fmt: skip


def frozen_pipeline(config: TrainConfig, ranks: Ranks) -> WanPipeline:
    """The teacher and what validation decodes with. On a GPU under bf16 the teacher is bf16 and no text encoder is loaded: the
    shards hold the embeddings. With weights=random only a transformer, which validates without videos."""
    m = config.model
    if m.weights == "random":
        torch.manual_seed(config.seed)
        transformer = WanTransformer3DModel.from_config(transformer_config(config))
        single_precision_rope(transformer)
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
        pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = m.codec.scale_spatial, m.codec.scale_temporal
        return pipe.to(str(ranks.device))
    gpu = ranks.device.type == "cuda"
    half = gpu and precision(config) == "bf16"
    return load_pipeline(m.path, torch.bfloat16 if half else torch.float32, str(ranks.device), text=not gpu, expert=m.expert)


def make_optimizer(config: TrainConfig, named: list) -> torch.optim.Optimizer:
    """What optim.optimizer names, over (name, parameter). SettingError where it is not installed or does not fit the runtime."""
    o = config.optim
    kind, parameters = torch.optim.AdamW, [p for _, p in named]
    if o.optimizer != "adamw" and config.runtime.name.startswith("zero"):  # a partition is neither a matrix nor 8 bits
        raise SettingError(
            f"optim.optimizer: got {o.optimizer} with runtime={config.runtime.name}, accepted: adamw there, or runtime=single | ddp"
        )
    if o.optimizer == "muon":
        return MuonAdamW(named, o.lr, tuple(o.betas), o.weight_decay)
    if o.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise SettingError(
                f"optim.optimizer: got adamw8bit, which needs a package ({error}); pip install bitsandbytes, or adamw"
            ) from None
    return kind(parameters, lr=o.lr, betas=tuple(o.betas), weight_decay=o.weight_decay)


class Engine:
    """The trained network with its optimiser and its running average.

    `trained` are names and parameters that learn, `average` their exponential moving average: whole tensors, under zero3
    this rank's partition of each.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, ranks: Ranks, model: torch.nn.Module):
        self.config, self.ranks, self.model = config, ranks, model
        self.zero = config.runtime.name.startswith("zero")
        self.bf16 = precision(config) == "bf16"
        # of the fp32 weights of diffusers' norms under a CPU's autocast: not the fastest way, and right
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = make_optimizer(config, self.trained)
        if self.zero:
            self.forward, wrapped = accelerator.prepare(model, optimizer)
            self.optimizer = wrapped.optimizer  # DeepSpeed's; its `.optimizer` is ours
        else:
            self.forward = accelerator.prepare_model(model, evaluation_mode=True)  # autocast and device, without DDP
            self.optimizer = optimizer
        self.reset_average()

    def __call__(self, *args, **kwargs):
        with self.autocast():
            return self.forward(*args, **kwargs)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def update(self, loss: torch.Tensor, lr: float) -> float:
        """Backward, mean over ranks, clip, step. Returns the gradient's norm; not finite: nothing was stepped, on no rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.zero:
            return self._update_zero(loss)
        loss.backward()
        parameters = [p for _, p in self.trained]
        for p in parameters:  # gates of layers that ran dense: every runtime treats them as zero
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.ranks.average_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.grad_clip))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update_zero(self, loss: torch.Tensor) -> float:
        buffer = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:  # zero3 keeps the last step's gradient of a parameter that takes no part in this one
            buffer.zero_()
        self.forward.backward(loss)
        self.forward.step()
        return float(self.forward.get_global_grad_norm()) if self.forward.was_step_applied() else math.nan

    # ---- average and whole tensors ----

    def reset_average(self) -> None:
        """Begin the running average at the weights as they are."""
        self.average = [_local(p).detach().clone() for _, p in self.trained]

    @torch.no_grad()
    def update_average(self, rate: float) -> None:
        torch._foreach_lerp_(self.average, [_local(p).detach() for _, p in self.trained], rate)

    def whole(self, shard: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The tensor of `parameter`'s shape of which every rank holds a shard; collective under zero3."""
        if not hasattr(parameter, "ds_tensor"):
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.ranks.world)]
        dist.all_gather(shards, shard.contiguous()) if self.ranks.world > 1 else shards[0].copy_(shard)
        return torch.cat([s.flatten() for s in shards])[: parameter.ds_numel].view(parameter.ds_shape)

    def shard(self, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """This rank's part of a whole tensor, padded as DeepSpeed pads it."""
        if not hasattr(parameter, "ds_tensor"):
            return tensor
        size = parameter.ds_tensor.numel()
        flat = torch.nn.functional.pad(tensor.flatten(), (0, size * self.ranks.world - tensor.numel()))
        return flat[self.ranks.rank * size : (self.ranks.rank + 1) * size]

    @torch.no_grad()
    def weights(self, averaged: bool = False, trained: bool = False) -> dict[str, torch.Tensor]:
        """Whole state dict of the model, or only of what is trained, on the CPU; collective. `averaged`: the running average."""
        state = {} if trained else {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        for (name, p), mean in zip(self.trained, self.average):
            state[name] = self.whole(mean if averaged else _local(p).detach(), p).cpu().clone()
        return state

    @torch.no_grad()
    def load_weights(self, state: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None = None) -> None:
        """Put whole weights in their place on every rank; the average begins at them, or at `average`."""
        missing = [name for name, p in self.trained if name not in state]
        wrong = [n for n, p in self.trained if n in state and state[n].shape != getattr(p, "ds_shape", p.shape)]
        if missing or wrong:
            raise ValueError(
                f"weights: {len(missing)} missing, {len(wrong)} of another shape, e.g. {(missing + wrong)[0]}"
            )
        for index, (name, p) in enumerate(self.trained):
            value = state[name].to(device=self.ranks.device, dtype=torch.float32)
            _local(p).copy_(self.shard(value, p).view_as(_local(p)))
            if p.data.shape == value.shape:  # zero3 keeps small tensors whole beside their partition
                p.data.copy_(value)
            if self.zero:
                self._set_zero(p, value, None)
            mean = value if average is None else average[name].to(value)
            self.average[index].copy_(self.shard(mean, p).view_as(self.average[index]))

    # ---- optimiser ----

    def moments(self) -> dict[str, dict]:
        """State of the optimiser by parameter name, whole tensors on the CPU; collective. Empty before the first step."""
        if not self.zero:
            state = self.optimizer.state
            return {
                n: {k: v.cpu() if torch.is_tensor(v) else v for k, v in state[p].items()}
                for n, p in self.trained
                if p in state
            }
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.optimizer.optimizer.state
        steps = [float(state["step"]) for state in inner.values() if "step" in state]
        if not steps:
            return {}
        count = torch.tensor(steps[0])
        keys = ("exp_avg", "exp_avg_sq")
        return {
            n: {"step": count.clone(), **{k: safe_get_full_optimizer_state(p, k).detach().cpu() for k in keys}}
            for n, p in self.trained
        }

    @torch.no_grad()
    def load_moments(self, saved: dict[str, dict]) -> None:
        """Inverse of `moments`, in any runtime and on any number of ranks."""
        if not saved:
            return
        if not self.zero:
            for name, p in self.trained:
                self.optimizer.state[p] = {k: _place(k, v, p) for k, v in saved[name].items()}
            return
        flats = (
            getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
            or self.optimizer.single_partition_of_fp32_groups
        )
        count = next(iter(saved.values()))["step"]
        for flat in flats:
            self.optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(count)), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat),
            }  # fmt: skip
        if self.config.runtime.name == "zero2":
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.trained:
            for key in ("exp_avg", "exp_avg_sq"):
                self._set_zero(p, saved[name][key].to(self.ranks.device), key)

    def _set_zero(self, p: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        """Whole fp32 master weight (key None) or moment into DeepSpeed's partition on this rank."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if hasattr(p, "ds_tensor"):
            place, _ = self.optimizer._get_fp32_opt_state_partition(p, False, key)
            place.copy_(self.shard(value, p)[: place.numel()].to(place))
        elif key is None:
            safe_set_full_fp32_param(p, value)
        else:
            safe_set_full_optimizer_state(p, value, key)


def _local(p: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, or its partition under zero3."""
    return p.ds_tensor if hasattr(p, "ds_tensor") else p.data


def _place(key: str, value, p: torch.nn.Parameter):
    return value.to(p.device) if torch.is_tensor(value) and key != "step" else value


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
