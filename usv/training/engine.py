"""The trained network with its optimiser and running average, in every runtime (usv/training/ranks.py)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel

from usv.config import SettingError, TrainConfig
from usv.models.families import family_of
from usv.sampling.generate import load_pipeline, single_precision_rope
from usv.training.dry_run import meta_transformer, transformer_config
from usv.training.feasible import check_optimizer
from usv.training.optim import MuonAdamW
from usv.training.ranks import Ranks, precision


class Teacher(torch.nn.Module):
    """Stands for a pipeline of which training needs the transformer alone: the shards hold what its other parts make."""

    vae = text_encoder = scheduler = None

    def __init__(self, transformer: torch.nn.Module, scale_spatial: int, scale_temporal: int):
        super().__init__()
        self.transformer = transformer
        self.vae_scale_factor_spatial, self.vae_scale_factor_temporal = scale_spatial, scale_temporal


def frozen_pipeline(config: TrainConfig, ranks: Ranks) -> WanPipeline | Teacher:
    """The teacher and what validation decodes with. On a GPU under bf16 the teacher is bf16 and no text encoder is loaded: the
    shards hold the embeddings. With weights=random, and of other families than Wan, only a transformer, which validates without videos."""
    m = config.model
    if m.transformer != "WanTransformer3DModel":
        return other_family(config, ranks)
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


def other_family(config: TrainConfig, ranks: Ranks) -> Teacher:
    """The transformer of model.transformer, pretrained from model.path or random of model.numbers. SettingError where it cannot be had."""
    m, half = config.model, ranks.device.type == "cuda" and precision(config) == "bf16"
    network = meta_transformer(config)  # refuses a class that is not there
    family_of(network)
    if m.weights == "random":
        torch.manual_seed(config.seed)
        transformer = type(network).from_config(transformer_config(config))
    else:
        try:
            transformer = type(network).from_pretrained(m.path, subfolder="transformer", torch_dtype=torch.bfloat16 if half else torch.float32)
        except (OSError, ValueError) as error:
            raise SettingError(
                f"model.path={m.path}: no {m.transformer} could be loaded ({str(error).splitlines()[0][:200]}); give a diffusers folder or a "
                "reachable hub id"
            ) from None
    return Teacher(transformer, m.codec.scale_spatial, m.codec.scale_temporal).to(ranks.device)


def make_optimizer(config: TrainConfig, named: list) -> torch.optim.Optimizer:
    """What optim.optimizer names, over (name, parameter). SettingError where it is not installed or does not fit the runtime."""
    o = config.optim
    kind, parameters = torch.optim.AdamW, [p for _, p in named]
    check_optimizer(config)
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
        self.accumulate, self.parts = config.optim.accumulate, 0
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

    def backward(self, loss: torch.Tensor) -> None:
        """The gradient of a part of a step's clips, of `optim.accumulate` equal ones; loss: its mean over them."""
        self.parts += 1
        if not loss.requires_grad:  # a router's step whose plan is dense yet: no gate takes part
            loss = loss + sum(0 * p.sum() for _, p in self.trained)
        if not self.zero:
            (loss / self.accumulate if self.accumulate > 1 else loss).backward()
            return
        buffer = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None and self.parts == 1:  # zero3 keeps the last step's gradient of a parameter that takes no part in this one
            buffer.zero_()
        self.forward.backward(loss)  # divides by the number of parts itself
        if self.parts < self.accumulate:
            self.forward.step()  # only counts

    def step(self, lr: float) -> float:
        """Mean over ranks, clip, step. Returns the gradient's norm; not finite: nothing was stepped, on no rank."""
        self.parts = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.zero:
            self.forward.step()
            return float(self.forward.get_global_grad_norm()) if self.forward.was_step_applied() else math.nan
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
