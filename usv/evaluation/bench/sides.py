"""What is compared: the dense model, students from checkpoints, and uniform plans on the model's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from usv.config import ModelConfig
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, load_student
from usv.sampling.generate import latent_size
from usv.sparse.attention import AttentionStats
from usv.sparse.cost import ModelShape, rung_flops
from usv.sparse.grid import Tile, TileLayout, tile_layout
from usv.sparse.plan import LayerPlan, Rung, layer_plan, merged_tokens

TIMESTEP = 500.0  # of sides that are the same at all timesteps


@dataclass(frozen=True)
class Side:
    """A network and the rungs it runs at each of the timesteps it is measured at; a row None is dense."""

    name: str
    model: SparseTransformer
    timesteps: tuple[float, ...]
    rows: tuple[tuple[Rung | LayerPlan, ...] | None, ...]

    @classmethod
    def of(cls, name: str, student: Student) -> Side:
        """A student at its few steps, or at the middle of every bin of its plan: all are equally likely."""
        edges = student.plan.edges
        middles = [(low + high) / 2 for low, high in zip((0.0, *edges), edges)]
        timesteps = tuple(student.sampling.get("student_timesteps") or middles)
        return cls(name, student.model, timesteps, tuple(student.plan.at(t) for t in timesteps))


@dataclass(frozen=True)
class Inputs:
    """Random latents (B, C, T, H, W) and text (B, L, D)."""

    latents: torch.Tensor
    text: torch.Tensor

    @classmethod
    def random(cls, shape: Sequence[int], batch: int, text_length: int, text_dim: int, like: torch.Tensor) -> Inputs:
        """Standard normal from seed 0, with dtype and device of `like`."""
        generator = torch.Generator().manual_seed(0)
        latents, text = (
            torch.randn(s, generator=generator).to(like) for s in ((batch, *shape), (batch, text_length, text_dim))
        )
        return cls(latents, text)

    def run(self, side: Side, index: int = 0) -> dict[int, AttentionStats]:
        """One forward without gradient at a side's timestep; the statistics of its sparse layers."""
        timestep = torch.full((len(self.latents),), side.timesteps[index], device=self.latents.device)
        with torch.no_grad():
            return side.model(self.latents, timestep, self.text, side.rows[index])[1]


def pipeline_sides(
    pipe, model: ModelConfig, checkpoints: dict[str, str], densities, merges, batch_size: int
) -> tuple[list[Side], Inputs]:
    """Dense first, then one side a checkpoint, then every density with every merged fraction."""
    base = SparseTransformer(pipe.transformer, Tile(*model.tile, cell=tuple(model.cell))).to(pipe.device).eval()
    shape = pipe.transformer.config.in_channels, *latent_size(pipe, model)
    weight = base.transformer.patch_embedding.weight  # diffusers keeps others in fp32 whatever the model's dtype
    inputs = Inputs.random(shape, batch_size, model.max_sequence_length, base.config.text_dim, weight)
    sides = [Side("dense", base, (TIMESTEP,), (None,))]
    for name, path in checkpoints.items():
        sides.append(Side.of(name, load_student(path, pipe.transformer)))
    return sides + uniform_sides(base, layout_of(base, inputs), densities, merges), inputs


def uniform_sides(model: SparseTransformer, layout: TileLayout, densities, merges) -> list[Side]:
    """Every density with every merged fraction, the same in all layers. (1, 0) is the sparse code with every block."""
    sides = []
    for density in densities:
        for merged in merges:
            plan = LayerPlan.of(density, merged, layout.num_blocks)
            name = f"density {density:g}" + (f", {merged:.0%} merged" if merged else "")
            sides.append(Side(name, model, (TIMESTEP,), ((plan,) * model.num_layers,)))
    return sides


def layout_of(model: SparseTransformer, inputs: Inputs) -> TileLayout:
    return tile_layout(model.grid_of(inputs.latents.shape), model.tile, str(inputs.latents.device))


def executed(side: Side, inputs: Inputs) -> dict[str, float]:
    """Density of attention (of the tokens left) and merged fraction as they ran, mean over timesteps and layers; and the ratio
    of FLOPs dense / side by the cost model."""
    layout = layout_of(side.model, inputs)
    shape = ModelShape.of(side.model.config, inputs.text.shape[1])
    densities, merged, flops = [], [], 0.0
    for index, row in enumerate(side.rows):
        stats = inputs.run(side, index)
        for layer, rung in enumerate(row or (Rung(),) * side.model.num_layers):
            densities.append(float(stats[layer].density) if layer in stats else 1.0)
            merged.append(sum(merged_tokens(layer_plan(rung, layout.num_blocks), layout)) / layout.grid.num_tokens)
            flops += rung_flops(shape, layout, rung)
    dense = rung_flops(shape, layout, Rung()) * len(densities)
    return {
        "density": sum(densities) / len(densities),
        "merged": sum(merged) / len(merged),
        "flops_ratio": dense / flops,
    }
