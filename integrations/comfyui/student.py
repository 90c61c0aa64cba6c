"""A student's plan on ComfyUI's Wan: which tokens and blocks each layer computes, by its block patches and attention override.

    wrapper of the model  →  timestep, grid → rungs      patch of block i  →  tile order, merging      override  →  sparse self-attention

Equations are usv's own (usv.models.tokens, usv.models.attend); ComfyUI's blocks run them. Shape letters: B batch, S tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor, nn

from usv.flow import shift_sigma
from usv.models.attend import Attend
from usv.models.tokens import Tokens
from usv.sampling.record import CELL, CheckpointError, check_record, plan_of
from usv.sampling.wan_file import read_gates, read_record, wan_name
from usv.sparse.grid import Tile, TileLayout, TokenGrid, tile_layout
from usv.sparse.plan import Rung, SparsityPlan, layer_plan

PATCH = (1, 2, 2)  # of every Wan model
UNCOND = 1  # in cond_or_uncond
OVERRIDE = "optimized_attention_override"


def read(path: str) -> tuple[dict, dict[str, Tensor]]:
    """What a file says of its student: record and coarse gates. CheckpointError for a file of somebody else, or damaged."""
    record = read_record(path)
    if not isinstance(record, dict) or not {"transformer", "tile", "plan", "sampling"} <= set(record):
        raise CheckpointError(f"{path}: no usable record of a student; the file is damaged, use another")
    check_record(record, path)
    return record, read_gates(path)


def sigmas_of(sampling: dict) -> Tensor:
    """Noise levels from 1 down to 0: a few-step student's own, or those of the teacher's steps under its shift, as diffusers' UniPC has them."""
    if steps := sampling.get("student_timesteps"):
        return torch.tensor([*steps, 0.0]) / 1000
    number, shift = sampling.get("num_inference_steps") or 50, sampling.get("flow_shift") or 1.0
    levels = torch.linspace(1, 0.001, number + 1, dtype=torch.float64)[:-1]
    return torch.cat((shift_sigma(levels, shift).float(), torch.zeros(1)))


@dataclass
class Run:
    """What the layers of one forward share. rungs: one a layer; tokens: as the latest block left them, and what ComfyUI was given for them."""

    plan: SparsityPlan
    tile: Tile
    gates: nn.ModuleList
    rungs: tuple[Rung, ...] = ()
    layout: TileLayout | None = None
    tokens: Tokens | None = None
    given: Tensor | None = None
    densities: list[float] = field(default_factory=list)  # executed by the sparse layers of the latest forward

    def begin(self, latents: Tensor, sigma: Tensor) -> None:
        sides = (-(-side // patch) for side, patch in zip(latents.shape[-3:], PATCH))
        self.layout = tile_layout(TokenGrid(*sides), self.tile, str(latents.device))
        self.rungs = self.plan.at(1000 * float(sigma.max()))
        self.tokens = self.given = None
        self.densities.clear()

    def of(self, img: Tensor) -> Tokens:
        """ComfyUI's row-major hidden states (B, S, C) as tokens, merged as the block before left them where nothing came between."""
        if self.given is img:
            return self.tokens
        if img.shape[1] != self.layout.grid.num_tokens:
            raise ValueError(f"USV Student: got {img.shape[1]} tokens for {self.layout.grid}, accepted: the video's own; reference latents and other frames beside it have no plan")
        return Tokens.begin(img, self.layout)


def apply(model, record: dict, gates: dict[str, Tensor], path: str):
    """A clone of ComfyUI's model patcher that runs the student. CheckpointError for a model of another number of layers or width."""
    blocks = model.get_model_object("diffusion_model").blocks
    plan = plan_of(record, path)
    _check_weights(model.get_model_object("diffusion_model"), record, path)
    if plan.num_layers != len(blocks):
        raise CheckpointError(f"{path}: got a model of {len(blocks)} layers, accepted: {plan.num_layers}, the model that the student was trained from")
    if record.get("family", "wan") != "wan":
        raise CheckpointError(f"{path}: got a student of the family {record['family']}, accepted: wan; others have blocks of their own")
    run = Run(plan, Tile(*record["tile"], cell=tuple(record.get("cell", CELL))), _gates(gates, blocks, path))
    patched = model.clone()
    folded = "guidance_scale" not in record["sampling"]
    before = patched.model_options.get("model_function_wrapper")
    patched.set_model_unet_function_wrapper(_wrapper(run, folded, before))
    replaced = patched.model_options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {})
    for index, block in enumerate(blocks):
        if ("double_block", index) in replaced:
            raise CheckpointError(f"USV Student: got a model whose block {index} another node replaces, accepted: USV Student first")
        patched.set_model_patch_replace(_patch(run, index, block), "dit", "double_block", index)
    return patched


def _check_weights(network: nn.Module, record: dict, path: str) -> None:
    """CheckpointError where the model's weights are not those that the student runs on: the file's, or of adapters the base's."""
    own = network.state_dict()
    for name, values in record["base"].items():
        name = wan_name(name)
        if name not in own or own[name].element_size() < 2:  # another shape is told apart below; fp8 cannot be compared
            continue
        if not record.get("adapters"):
            with safe_open(path, "pt") as file:
                values = file.get_tensor(name).flatten()[: len(values)].tolist()
        if not torch.allclose(own[name].flatten()[: len(values)].float().cpu(), torch.tensor(values), rtol=2**-7, atol=1e-6):
            raise CheckpointError(f"{path}: got a model with other weights ({name}), accepted: {'the base, with this file as its LoRA' if record.get('adapters') else 'this file, by Load Diffusion Model'}")


def _gates(state: dict[str, Tensor], blocks: nn.ModuleList, path: str) -> nn.ModuleList:
    """The coarse gates, one a layer, width to heads."""
    found = []
    for index, block in enumerate(blocks):
        weight, bias = (state.get(f"gates.{index}.{name}") for name in ("weight", "bias"))
        attention = block.self_attn
        if weight is None or bias is None or tuple(weight.shape) != (attention.num_heads, attention.dim):
            raise CheckpointError(f"{path}: gate of layer {index}: got {None if weight is None else list(weight.shape)}, accepted: {[attention.num_heads, attention.dim]}, those of the model")
        gate = nn.Linear(attention.dim, attention.num_heads)
        gate.load_state_dict({"weight": weight, "bias": bias})
        found.append(gate)
    return nn.ModuleList(found).requires_grad_(False)


def _wrapper(run: Run, folded: bool, before: Callable | None) -> Callable:
    def wrapper(apply_model: Callable, arguments: dict) -> Tensor:
        if folded and UNCOND in arguments["cond_or_uncond"]:
            raise ValueError("USV Student: got a forward without the prompt (cfg above 1), accepted: cfg=1.0; guidance is folded into the student's weights")
        run.begin(arguments["input"], arguments["timestep"])
        try:
            if before is not None:
                return before(apply_model, arguments)
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            run.tokens = run.given = None
    return wrapper


def _patch(run: Run, index: int, block: nn.Module) -> Callable:
    """ComfyUI's replacement of a block: the block itself on tokens in tile order, merged where the rung says so."""

    def patch(arguments: dict, extra: dict) -> dict:
        original, plan = extra["original_block"], layer_plan(run.rungs[index], run.layout.num_blocks)
        if plan is None:
            return original(arguments)
        vec = arguments["vec"]
        if vec.ndim == 4 and vec.shape[1] > 1:
            raise ValueError(f"USV Student: got timesteps of {vec.shape[1]} frames, accepted: one for the video")
        tokens = run.of(arguments["img"])
        tokens = tokens.merged(plan.merged_fraction) if plan.merged_fraction else tokens.unmerged()
        pe = arguments["pe"][:, tokens.order]
        if tokens.merge_map is not None:
            pe = pe[0][tokens.merge_map.kept_index]
        states = tokens.states()
        gate = run.gates[index].to(states)
        attend = Attend(None, run.layout, plan, gate, tokens.merge_map)
        options = dict(arguments["transformer_options"])
        options[OVERRIDE] = _override(attend, _attention_input(block, states, vec), options.get(OVERRIDE))
        out = original({**arguments, "img": states, "pe": pe, "transformer_options": options})
        run.tokens = tokens.parted(out["img"])
        run.given = run.tokens.row_major()
        run.densities.append(float(attend.stats.density))
        return {**out, "img": run.given}
    return patch


def _attention_input(block: nn.Module, x: Tensor, vec: Tensor) -> Tensor:
    """(B, S, C), what the block's self-attention is given, which the gates read: its norm, modulated."""
    modulation = block.modulation.to(x)
    parts = (modulation.unsqueeze(0) + vec).unbind(2) if vec.ndim == 4 else (modulation + vec).chunk(6, dim=1)
    return torch.addcmul(parts[0], block.norm1(x), 1 + parts[1])


def _override(attend: Attend, hidden: Tensor, before: Callable | None) -> Callable:
    """ComfyUI's attention override of one block: sparse at the first call, which is self-attention; cross-attention stays what it was."""

    def override(func: Callable, *args, **kwargs) -> Tensor:
        if attend.stats is not None:
            return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)
        (q, k, v), heads = args[:3], args[3] if len(args) > 3 else kwargs["heads"]
        if not kwargs.get("skip_reshape"):
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, hidden)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)
    return override
