"""Adapters: the student as low-rank updates of a frozen base, which with the adapters off is the teacher, with others the critic.

    y = W x + (alpha / rank) · B A x,     A (rank, in) random, B (out, rank) zero at first: training starts at the teacher

One copy of the weights serves all, in the precision they were loaded in; adapters and coarse gates are fp32. Source: LoRA
(arXiv 2106.09685), by peft's layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from usv.models.families import family_of
from usv.models.forward import SparseTransformer
from usv.sparse.grid import Tile

NAME, CRITIC = "default", "critic"  # of the adapters among peft's; diffusers' files leave the first out


# of a block of any family: projections of attention, of video and text, and of the FFN
PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2", "proj_mlp", "proj_out",
)  # fmt: skip


def layers_of(transformer, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers of the blocks that end in one of `targets`."""
    inside, ends = tuple(f"{blocks.attribute}." for blocks in family_of(transformer).blocks), tuple(f".{target}" for target in targets)
    return [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(inside) and n.endswith(ends)]


def adapt(transformer, tile: Tile, rank: int, alpha: float, targets: Sequence[str]) -> SparseTransformer:
    """The transformer, frozen, with trainable adapters on the layers whose names end in one of `targets`, and coarse gates.

    ValueError where no layer matches.
    """
    names = layers_of(transformer, targets)
    if not names:
        raise ValueError(
            f"lora.targets: got {list(targets)}, which no layer of the blocks ends in; accepted: e.g. to_q, to_v, ffn.net.2"
        )
    transformer.requires_grad_(False)
    _add(transformer, NAME, rank, alpha, names)
    return SparseTransformer(transformer, tile)


def _add(transformer, name: str, rank: int, alpha: float, targets: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Trainable fp32 adapters of one name, in force from now on; their parameters by name."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
    transformer.add_adapter(config, adapter_name=name)
    added = {n: p for n, p in transformer.named_parameters() if ".lora_" in n and f".{name}." in n}
    for parameter in added.values():
        parameter.data = parameter.data.float()
    return added


def _layers(transformer) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in transformer.named_modules() if hasattr(m, "lora_A") and hasattr(m, "enable_adapters")}


@contextmanager
def base_only(transformer) -> Iterator[None]:
    """The transformer without its adapters, which `adapters_of` does not see either; harmless where it has none."""
    layers, configs = _layers(transformer).values(), vars(transformer).pop("peft_config", None)
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also drops requires_grad, which a graph in flight must keep
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        if configs is not None:
            transformer.peft_config = configs


class Teacher:
    """The frozen base behind a student's adapters, called as a dense SparseTransformer is."""

    def __init__(self, student: SparseTransformer):
        self.student, self.tile = student, student.tile

    @torch.no_grad()
    def __call__(self, latents, timestep, text, **conditions):
        with base_only(self.student.transformer):
            return self.student(latents, timestep, text, **conditions)


class Branch:
    """A network of its own on a student's frozen base, by adapters of its own: the critic, dense.

    Called, and its graph run backward, inside `active()` only: under gradient checkpointing the backward runs layers again.

    Args:
        student: made by `adapt`; its adapters stay in force outside `active()`, and trainable throughout.
        rank, alpha: of the adapters, which lie on the layers of the student's.
    """

    def __init__(self, student: SparseTransformer, rank: int, alpha: float):
        self.student, self.layers = student, _layers(student.transformer)
        learning = [p for p in student.transformer.parameters() if p.requires_grad]
        self.weights = _add(student.transformer, CRITIC, rank, alpha, list(self.layers))
        self._use(NAME)
        for parameter in learning:  # peft lets only the latest adapters learn
            parameter.requires_grad_(True)

    def _use(self, name: str) -> None:
        for layer in self.layers.values():
            layer._active_adapter = [name]  # as above: the switch that leaves requires_grad alone

    @contextmanager
    def active(self) -> Iterator[None]:
        self._use(CRITIC)
        try:
            yield
        finally:
            self._use(NAME)

    def __call__(self, latents, timestep, text, **conditions):
        return self.student(latents, timestep, text, **conditions)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.weights.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """KeyError for adapters of another kind."""
        for name, parameter in self.weights.items():
            parameter.copy_(state[name])


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state dict belongs to the student's adapters."""
    return ".lora_" in name and f".{CRITIC}." not in name


def merged(state: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict with adapters as one without: W + scale · B A in fp32, under the names that the base has alone."""
    out = {}
    for name, value in state.items():
        if ".lora_" not in name:
            out[name.replace(".base_layer.", ".")] = value
    for name in (n for n in state if ".lora_A." in n and is_adapter(n)):
        layer = name.split(".lora_A.")[0]
        low, high = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        out[f"{layer}.weight"] = out[f"{layer}.weight"].float() + scale * (high.float() @ low.float())
    return out


def diffusers_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters of a SparseTransformer's state dict as diffusers names them: transformer.blocks.0.attn1.to_q.lora_A.weight."""
    return {name.replace(f".{NAME}.", "."): value for name, value in state.items() if is_adapter(name)}


def from_diffusers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `diffusers_names`; other tensors keep their names."""
    return {
        n.replace(".lora_A.", f".lora_A.{NAME}.").replace(".lora_B.", f".lora_B.{NAME}."): v for n, v in tensors.items()
    }


# ---- adapters that a user loaded into a pipeline: styles ----------------------------------------------------------------------------------


def adapters_of(transformer: torch.nn.Module) -> tuple[str, ...]:
    """Names of the adapters in a transformer."""
    return tuple(getattr(transformer, "peft_config", None) or ())


def _tuned(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers with adapters, of any kind that peft has, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def fused_in(transformer: torch.nn.Module) -> set[str]:
    """Names of the adapters whose update the weights hold now and that can be taken out again."""
    if not adapters_of(transformer):
        return set()
    return {name for layer in _tuned(transformer).values() for name in layer.merged_adapters}


def clean_state(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The transformer's state dict as it is without its adapters, fused ones taken out; the transformer stays as it is."""
    state, layers = transformer.state_dict(), _tuned(transformer) if adapters_of(transformer) else {}
    for name, layer in layers.items():
        prefix, base = f"{name}.", {n: t for n, t in state.items() if n.startswith(f"{name}.base_layer.")}
        state = {n: t for n, t in state.items() if not n.startswith(prefix)}
        base = {n.replace(".base_layer.", "."): t for n, t in base.items()}
        for adapter in layer.merged_adapters:
            weight = base[f"{prefix}weight"]
            base[f"{prefix}weight"] = (weight.float() - layer.get_delta_weight(adapter).float()).to(weight.dtype)
            if getattr(layer, "lora_bias", {}).get(adapter):
                base[f"{prefix}bias"] = base[f"{prefix}bias"] - (layer.lora_B[adapter].bias * layer.scaling[adapter]).to(base[f"{prefix}bias"])
        state |= base
    return state


def carry(source: torch.nn.Module, target: torch.nn.Module, shared: bool = False) -> None:
    """Give `target`, a transformer of the same class without adapters, all adapters of `source` as they are there: weights of their own,
    scales, which of them act, whether they are fused. shared: whether somebody else has the target's weights, which fusing writes into."""
    from peft import inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    target._prepare_lora_hotswap_kwargs = getattr(source, "_prepare_lora_hotswap_kwargs", None)
    if not adapters_of(source):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes updates of biases for damage, a second adapter for an accident
        for name in adapters_of(source):
            weights = get_peft_model_state_dict(source, adapter_name=name)
            inject_adapter_in_model(copy.deepcopy(source.peft_config[name]), target, name, low_cpu_mem_usage=True, state_dict=weights)
    twins = _tuned(target)
    if shared and fused_in(source):
        own_weights(target)
    for place, layer in _tuned(source).items():
        twin = twins[place]
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if not name.startswith("base_layer."):
                owner, _, leaf = name.rpartition(".")
                own = tensor.detach().clone()
                setattr(twin.get_submodule(owner), leaf, torch.nn.Parameter(own, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else own)
        for name in ("scaling", "_active_adapter", "_disable_adapters"):
            setattr(twin, name, copy.deepcopy(getattr(layer, name)))
        if layer.merged_adapters:
            twin.merge(adapter_names=list(layer.merged_adapters))
    target._hf_peft_config_loaded = True


def own_weights(transformer: torch.nn.Module) -> None:
    """Copy the weights that fusing writes into, where another transformer has the same ones."""
    for layer in _tuned(transformer).values():
        base = layer.get_base_layer()
        for name, parameter in base.named_parameters(recurse=False):
            setattr(base, name, copy.deepcopy(parameter))  # of whatever kind it is


def scales_as_tensors(transformer: torch.nn.Module) -> None:
    """The scales of a transformer's adapters as 0-d tensors, so that compiled blocks take another scale without being compiled anew."""
    for layer in _tuned(transformer).values() if adapters_of(transformer) else ():
        for name, scale in layer.scaling.items():
            if not torch.is_tensor(scale):
                layer.scaling[name] = torch.tensor(float(scale), device=layer.get_base_layer().weight.device)
