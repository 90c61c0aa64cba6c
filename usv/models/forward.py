"""One sparse forward for every family: diffusers' own forward on a view of the transformer whose blocks run under a plan.

    row-major tokens --tile order--> [block under its rung] × L --inverse order--> row-major tokens        of each list of blocks

A layer at the first rung is diffusers' own block, so plan None is the teacher to rounding. A sparse layer runs the same block with
an `Attend`; a merging layer runs the whole block on the merged tokens and unmerges its *update*, so every token keeps its own
residual. Consecutive layers of one merge rung share one match: between them unmerging and merging again would give the same
states, so the merged tokens stay merged until the run ends. With a `sequence_group` several processes share a sample, each with
whole tiles of its tokens (`usv.sparse.sequence_parallel`); heads are exchanged around attention. Tokens beside the grid, conditions
or history, run with it, dense and unmerged (`usv.models.tokens`). Shape letters: B batch, S tokens of the grid, E beside it, C width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from usv.models.attend import Attend, Dense, any_size
from usv.models.families import family_of
from usv.models.protocol import Blocks, Family
from usv.models.tokens import Tokens
from usv.sparse.attention import AttentionStats, Fine
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import LayerPlan, Rung, layer_plan
from usv.sparse.sequence_parallel import SequenceGroup, shards_of


@dataclass(frozen=True)
class Probe:
    """A layer that runs two rungs and mixes their updates, so that a decision has a gradient.

    update = (1 − mix) · update(rung) + mix · update(other). With mix = 1/2 the derivative of the loss with respect to mix
    equals loss(other) − loss(rung) for a loss quadratic in the update; at an end of the segment it would miss the
    quadratic term, which is all there is near a minimum.
    """

    other: Rung
    mix: torch.Tensor


# What arranges the blocks is Python that a compiler of the whole transformer would trace in vain: blocks are its graphs.
uncompiled = torch.compiler.disable(recursive=False)


class View:
    """A module as its own forward sees it when some of its attributes are others; the module itself stays as it is."""

    def __init__(self, module: nn.Module, attributes: Mapping[str, Any]):
        self.__dict__.update(attributes, _module=module)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class _Layer:
    """A block in the view's lists."""

    def __init__(self, run: Run, index: int, last: bool):
        self.run, self.index, self.last = run, index, last

    @uncompiled
    def __call__(self, *args, **kwargs):
        return self.run.layer(self.index, self.last, args, kwargs)

    def __getattr__(self, name: str):  # a forward may ask its blocks for more than a call
        return getattr(self.run.layers[self.index][1], name)


@lru_cache(maxsize=64)
def _parameters(cls: type) -> inspect.Signature:
    """Of the forward of diffusers' block, without self."""
    own = next(c for c in cls.__mro__ if "forward" in vars(c) and not getattr(c, "_usv", False))
    signature = inspect.signature(own.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@uncompiled
def _bound(cls: type, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a block's call by name. What it takes as *args it does not name, so does not use."""
    signature = _parameters(cls)
    call = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            call.pop(name, None)
        elif parameter.kind is parameter.VAR_KEYWORD:
            call |= call.pop(name, {})
    return dict(call)


@dataclass
class Run:
    """One forward: what all its layers share, and the statistics that they leave.

    rungs: one for each layer. probes: by layer. fine: by layer, or None. dense: by layer, what attends in place of dense attention, or None.
    before: where tokens beside the grid stand (`Family.beside`).
    """

    family: Family
    layers: list[tuple[Blocks, nn.Module]]
    gates: Sequence[nn.Module]
    grid: TokenGrid
    tile: Tile
    rungs: Sequence[Rung | LayerPlan]
    probes: Mapping[int, Probe]
    impl: str
    fine: Sequence[Fine] | None
    group: SequenceGroup | None
    before: bool | None
    checkpointing: bool
    dense: Sequence[Dense] | None = None
    stats: dict[int, AttentionStats] = field(default_factory=dict)
    _ordered: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def lists(self) -> dict[str, list[_Layer]]:
        """The view's lists of blocks."""
        lists: dict[str, list[_Layer]] = {blocks.attribute: [] for blocks in self.family.blocks}
        for index, (blocks, _) in enumerate(self.layers):
            last = index + 1 == len(self.layers) or self.layers[index + 1][0] is not blocks
            lists[blocks.attribute].append(_Layer(self, index, last))
        return lists

    @uncompiled
    def begin(self, x: Tensor) -> Tokens:
        """Row-major hidden states (B, S + E, C) as tokens of this process."""
        if beside := x.shape[1] - self.grid.num_tokens:
            if beside < 0 or self.before is None:
                raise ValueError(f"hidden_states: got {x.shape[1]} tokens, expected {self.grid.num_tokens} of {self.grid}")
            if self.group is not None:
                raise ValueError(f"hidden_states: got {beside} tokens beside the grid, accepted with a sequence_group: none")
        layout = tile_layout(self.grid, self.tile, str(x.device))
        shards = None
        if self.group is not None:
            if self.fine is not None:
                raise ValueError("fine: another fine branch does not run with a sequence_group; accepted: None")
            if not self.family.shared:
                raise ValueError(f"sequence_group: got one for a {self.family.name}, accepted: None; processes cannot share its samples")
            self.group.check(self.family_heads(), layout.num_blocks)
            shards = shards_of(layout, self.group)
        return Tokens.begin(x, layout, shards, bool(self.before))

    def family_heads(self) -> int:
        blocks, block = self.layers[0]
        return blocks.attention(block).heads

    @uncompiled
    def layer(self, index: int, last: bool, args: tuple, kwargs: dict):
        """What the forward gets for its call of a block: what diffusers' block returns, tokens as `Tokens`, row-major after the
        last block of a list."""
        blocks, block = self.layers[index]
        call = _bound(type(block), args, kwargs)
        tokens = call[blocks.video] if isinstance(call[blocks.video], Tokens) else self.begin(call[blocks.video])
        call[blocks.video] = None
        order = tokens.order
        call[blocks.carrier] = self.ordered(call.get(blocks.carrier), blocks.rotary, order)
        for name, dim in _rows(blocks, call):
            call[name] = self.ordered(call[name], lambda value, order, dim=dim: _each(lambda x: x.index_select(dim, order), value), order)
        for name in blocks.pairwise:
            if call.get(name) is not None:
                call[name] = self.ordered(call[name], lambda value, order: value[:, order][:, :, order], order)
        rung = self.rungs[index]
        layer = (self, index, tokens, call, rung, self.probes.get(index))
        if self.checkpointing:
            tokens, others, stats = torch.utils.checkpoint.checkpoint(_run_layer, *layer, use_reentrant=False)
        else:
            tokens, others, stats = _run_layer(*layer)
        if stats is not None:
            self.stats[index] = stats
        values = {**others, blocks.video: tokens.row_major() if last else tokens}
        for name in set(blocks.returns) - set(call):
            values[name] = tokens.to_row_major(values[name])
        return values[blocks.returns[0]] if len(blocks.returns) == 1 else tuple(values[name] for name in blocks.returns)

    @uncompiled
    def ordered(self, value, reorder, order: Tensor):
        """`reorder(value, order)`, once for all layers that are given the same value."""
        known = self._ordered.get(id(value))
        if known is None or known[0] is not value:
            known = self._ordered[id(value)] = (value, reorder(value, order))
        return known[1]


def _each(apply, value):
    """`apply` of a tensor, or of every one of a tuple."""
    return apply(value) if torch.is_tensor(value) else tuple(apply(x) for x in value)


def _rows(blocks: Blocks, call: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The arguments of a call with a row for each video token, and which dimension the rows are."""
    found = []
    for name, (dims, dim) in blocks.per_token.items():
        first = call.get(name)[0] if isinstance(call.get(name), tuple) else call.get(name)
        if torch.is_tensor(first) and dims in (None, first.ndim) and first.shape[dim] > 1:
            found.append((name, dim))
    return found


@uncompiled
def _run_layer(run: Run, index: int, tokens: Tokens, call: dict, rung: Rung | LayerPlan, probe: Probe | None):
    """One block under its rung, or under two rungs mixed: tokens, what else the block returns, statistics."""
    out, others, stats = _run_rung(run, index, tokens, call, rung)
    if probe is not None:
        tokens, rest, _ = _run_rung(run, index, tokens, call, probe.other)
        mix = probe.mix.to(tokens.x.dtype)
        out = out.mixed(tokens, mix)
        others = {name: value + mix * (rest[name] - value) for name, value in others.items()}
    return out, others, stats


@uncompiled
def _run_rung(run: Run, index: int, tokens: Tokens, call: dict, rung: Rung | LayerPlan):
    blocks, _ = run.layers[index]
    plan = layer_plan(rung, tokens.layout.num_blocks)
    if plan is not None and plan.merged_fraction and not blocks.merges:
        plan = replace(plan, merged_fraction=0.0)
    merging = plan is not None and plan.merged_fraction
    return _run_block(run, index, tokens.merged(plan.merged_fraction) if merging else tokens.unmerged(), call, plan)


@uncompiled
def _run_block(run: Run, index: int, tokens: Tokens, call: dict, plan: LayerPlan | None):
    """diffusers' block on the tokens as they are, its self-attention diffusers' own where it is dense and whole."""
    blocks, block = run.layers[index]
    call, attend = {**call, blocks.video: tokens.states()}, None
    if plan is not None or tokens.shards is not None or run.dense is not None:
        fine, dense = (None if of is None else of[index] for of in (run.fine, run.dense))
        beside = 0 if tokens.beside is None else tokens.beside.shape[1]
        attend = Attend(call[blocks.carrier], tokens.layout, plan, run.gates[index], tokens.merge_map, tokens.shards, fine, run.impl, beside=beside, dense=dense)
        call[blocks.carrier] = attend
    if tokens.merge_map is not None:
        for name, dim in _rows(blocks, call):
            call[name] = _each(lambda x, dim=dim: any_size(tokens.kept_rows(x, dim), dim), call[name])
        for each in (call[blocks.video], tokens.merge_map.kept_index, tokens.merge_map.sizes):
            any_size(each, 1)
    out, others = block(**call), {}
    if len(blocks.returns) > 1:
        others = dict(zip(blocks.returns, out, strict=True))
        out = others.pop(blocks.video)
    return tokens.parted(out), others, None if attend is None else attend.stats


@uncompiled
def run_forward(transformer, gates, tile: Tile, arguments, rungs=None, probes=None, impl="auto", fine=None, group=None, dense=None):
    """The transformer's own forward under a plan: what it returns, and the statistics of the sparse layers.

    gates: the coarse gate of each layer. arguments: of the forward, by name. dense: see `Run`. The others: see `SparseTransformer.run`.
    """
    family = family_of(transformer)
    rungs = (Rung(),) * len(gates) if rungs is None else tuple(rungs)
    if len(rungs) != len(gates):
        raise ValueError(f"rungs: got {len(rungs)}, expected one for each of the {len(gates)} layers")
    if (reason := family.refuse(transformer, arguments)) is not None:
        raise ValueError(reason)
    layers = family.layers(transformer)
    for blocks, block in layers:  # also what was set since: fuse_qkv_projections, set_attn_processor
        family.adapt(block, blocks.attention(block))
    run = Run(
        family, layers, gates, family.grid(transformer, arguments), tile, rungs, probes or {}, impl, fine, group,
        family.beside(transformer, arguments), torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False),
        dense,
    )  # fmt: skip
    view = View(transformer, {"gradient_checkpointing": False, **run.lists(), **family.view(transformer, run)})
    cls = next(cls for cls in type(transformer).__mro__ if cls in family.transformers)
    return cls.forward(view, **arguments), run.stats


class SparseTransformer(nn.Module):
    """A transformer of a known family and the coarse gates of its layers.

    Args:
        transformer: the network; its weights are used, not copied. ValueError where its class is of no family.
        tile: tokens of a tile along (t, h, w); a tile is a block of attention.

    `sequence_group`, None at first: the processes that share a sample; all of them make the same calls.
    """

    def __init__(self, transformer: nn.Module, tile: Tile):
        super().__init__()
        self.family = family_of(transformer)
        self.transformer, self.tile = transformer, tile
        self.sequence_group: SequenceGroup | None = None
        kind = {"dtype": transformer.dtype, "device": transformer.device}
        attentions = []
        for blocks, block in self.family.layers(transformer):
            attentions.append(blocks.attention(block))
            self.family.adapt(block, attentions[-1])
        self.gates = nn.ModuleList(nn.Linear(attn.to_q.in_features, attn.heads, **kind) for attn in attentions)
        for gate in self.gates:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    @property
    def config(self):
        return self.transformer.config

    @property
    def num_layers(self) -> int:
        return len(self.gates)

    def grid_of(self, latents_shape: Sequence[int]) -> TokenGrid:
        """The token grid of latents (B, C, T, H, W). ValueError where the patch does not divide them."""
        latents = torch.empty(tuple(latents_shape)[-5:] if len(latents_shape) > 4 else (1, *latents_shape), device="meta")
        return self.family.grid(self.transformer, self.family.inputs(self.transformer, latents, None, None))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        rungs: Sequence[Rung | LayerPlan] | None = None,
        probes: Mapping[int, Probe] | None = None,
        impl: str = "auto",
        fine: Sequence[Fine] | None = None,
        **conditions,
    ) -> tuple[Tensor, dict[int, AttentionStats]]:
        """Velocity at (latents, timestep).

        Args:
            latents: (B, C, T, H, W). timestep: (B,) or per token (B, S). text: (B, L, text_dim).
            conditions: what else the transformer's forward takes, by its names (`Family.inputs`).
            rungs, probes, impl, fine: see `run`.

        Returns:
            (B, C, T, H, W) and the statistics of the sparse layers.
        """
        arguments = self.family.inputs(self.transformer, latents, timestep, text, **conditions)
        sample, stats = self.run(arguments, rungs, probes, impl, fine)
        return self.family.outputs(self.transformer, sample, arguments, **conditions), stats

    def run(
        self,
        arguments: Mapping[str, Any],
        rungs: Sequence[Rung | LayerPlan] | None = None,
        probes: Mapping[int, Probe] | None = None,
        impl: str = "auto",
        fine: Sequence[Fine] | None = None,
    ) -> tuple[Tensor, dict[int, AttentionStats]]:
        """The transformer's own forward under a plan.

        Args:
            arguments: of its forward, by name, as a pipeline gives them.
            rungs: one for each layer, a Rung or the integers themselves; None is dense.
            probes: layer -> Probe, in training.
            impl: how the attention kernel runs.
            fine: one for each layer, in place of the fine branch of the sparse ones: who chooses the blocks
                (`usv.patterns.planned`); None is the student's own tiles.

        Returns:
            the first thing that the forward returns, and the statistics of the sparse layers.
        """
        out, stats = run_forward(self.transformer, self.gates, self.tile, {**arguments, "return_dict": False}, rungs, probes, impl, fine,
                                 self.sequence_group)  # fmt: skip
        return out[0], stats
