"""Adapters: the student as low-rank updates of a frozen base, which with the adapters off is the teacher.

    y = W x + (alpha / rank) · B A x,     A (rank, in) random, B (out, rank) zero at first: training starts at the teacher

One copy of the weights serves both, in the precision they were loaded in; adapters and coarse gates are fp32. Source: LoRA
(arXiv 2106.09685), by peft's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from usv.grid import Tile
from usv.models.wan import SparseWan

NAME = "default"  # of the adapter among peft's; diffusers' files leave it out


def adapt(transformer, tile: Tile, rank: int, alpha: float, targets: Sequence[str]) -> SparseWan:
    """The transformer, frozen, with trainable adapters on the layers whose names end in one of `targets`, and coarse gates.

    ValueError where no layer matches.
    """
    from peft import LoraConfig

    names = [
        n
        for n, m in transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith(tuple("." + t for t in targets))
    ]
    names = [n for n in names if n.startswith("blocks.")]
    if not names:
        raise ValueError(
            f"lora.targets: got {list(targets)}, which no layer of the blocks ends in; accepted: e.g. to_q, to_v, ffn.net.2"
        )
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True), adapter_name=NAME
    )
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return SparseWan(transformer, tile)


@contextmanager
def base_only(transformer) -> Iterator[None]:
    """The transformer without its adapters; harmless where it has none."""
    layers = [m for m in transformer.modules() if hasattr(m, "lora_A") and hasattr(m, "enable_adapters")]
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also drops requires_grad, which a graph in flight must keep
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Teacher:
    """The frozen base behind a student's adapters, called as a dense SparseWan is."""

    def __init__(self, student: SparseWan):
        self.student, self.tile = student, student.tile

    @torch.no_grad()
    def __call__(self, latents, timestep, text):
        with base_only(self.student.transformer):
            return self.student(latents, timestep, text)


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state dict belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(state: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict with adapters as one without: W + scale · B A in fp32, under the names that the base has alone."""
    out = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        out[name.replace(".base_layer.", ".")] = value
    for name in (n for n in state if ".lora_A." in n):
        layer = name.split(".lora_A.")[0]
        low, high = state[name], state[name.replace(".lora_A.", ".lora_B.")]
        out[f"{layer}.weight"] = out[f"{layer}.weight"].float() + scale * (high.float() @ low.float())
    return out


def diffusers_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters of a SparseWan's state dict as diffusers names them: transformer.blocks.0.attn1.to_q.lora_A.weight."""
    return {name.replace(f".{NAME}.", "."): value for name, value in state.items() if is_adapter(name)}


def from_diffusers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `diffusers_names`; other tensors keep their names."""
    return {
        (n.replace(".lora_A.", f".lora_A.{NAME}.").replace(".lora_B.", f".lora_B.{NAME}.") if is_adapter(n) else n): v
        for n, v in tensors.items()
    }  # fmt: skip
