"""What a sparse forward needs of an architecture: a `Family`, which is a description and a few lines of its attention.

    diffusers' own forward of the transformer  --runs on-->  a view of it whose block lists are ours (usv/models/forward.py)

Tokens in, conditioning, control branches, what happens between blocks, head and tokens out are thus diffusers' own code on its
own modules, and every keyword of every pipeline reaches it. What is ours is the call of a block: its video tokens lie in
tile-major order, and are all of them or those that merging leaves. diffusers' block then runs as it is, dense; or it is handed an
`Attend` in place of the argument that only its self-attention is given (the `carrier`, as a rule the RoPE tables), and its
self-attention, which a `Family` teaches to read one, calls it:

    out = attend(q, k, v, hidden)                  q, k, v (B, H, S, D) after norm and RoPE, hidden (B, S, C) what they were made of
    out = attend(q, k, v, hidden, Text(…))         joint attention: S counts the text too, before or after the video

A plan is an argument on this way, never a context: it holds in a recomputed checkpoint as in the first run. In joint attention
text rows and columns stay dense, padding is listed by nobody, and merging touches video tokens only; so it is with tokens beside the
grid, which a block is given behind the grid's and does not tell from them. docs/adding_a_model.md
adds a family step by step. Shape letters: B batch, S tokens, K those that merging leaves, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from usv.models.attend import Attend
from usv.sparse.grid import TokenGrid
from usv.sparse.joint import Text

__all__ = ["Attend", "Blocks", "Family", "Processor", "Text", "at_positions", "order_pair", "patch_grid", "rotate", "sides_of"]


def at_positions(table: Tensor, positions: Tensor | None) -> Tensor:
    """(S, D) RoPE table -> (1, 1, S, D), or at the tokens that merging leaves (B, K) -> (B, 1, K, D)."""
    return table[None, None] if positions is None else table[positions][:, None]


def order_pair(tables: tuple[Tensor, Tensor] | None, order: Tensor) -> tuple[Tensor, ...] | None:
    """(cos, sin), each (S, D), in another order of the tokens; None (a model without RoPE) stays None."""
    return None if tables is None else tuple(table[order] for table in tables)


def sides_of(config) -> tuple[int, int, int]:
    """(t, h, w) of a transformer's patches, from the config of any family."""
    if isinstance(config.patch_size, int):
        return (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)
    return tuple(config.patch_size)


def patch_grid(latents: Tensor, patch: tuple[int, int, int]) -> TokenGrid:
    """The token grid of latents (B, C, T, H, W). ValueError where the patch does not divide them."""
    sides = tuple(latents.shape[-3:])
    if any(side % p for side, p in zip(sides, patch)):
        raise ValueError(f"latents: got (T, H, W) = {sides}, expected multiples of the patch {tuple(patch)}")
    return TokenGrid(*(side // p for side, p in zip(sides, patch)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of neighbouring pairs, as most of diffusers' video models have it: x (…, D) with cos, sin that broadcast to it, in fp32."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-imaginary, real), -1).flatten(-2) * sin).to(x.dtype)


class Processor:
    """diffusers' attention processor, which a family's own replaces where the carrier is an `Attend`; else it does what it did."""

    def __init__(self, original):
        self.__dict__["original"] = original

    def __getattr__(self, name: str):
        if name == "original" or name.startswith("__"):  # of a copy that is still being made
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value) -> None:  # the attention backend, the parallel config
        setattr(self.original, name, value)


def _inputs(transformer: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor, **conditions) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, **conditions}


def _attn1(block: nn.Module) -> nn.Module:
    return block.attn1


@dataclass(frozen=True)
class Blocks:
    """One list of blocks of a transformer.

    Attributes:
        attribute: of the transformer that holds the list.
        carrier: argument of a block that only its self-attention is given; an `Attend` travels in its place.
        video: argument that holds the video tokens (B, S, C), or (B, T + S, C) where the block's own text is not apart.
        returns: what a block returns, by name: its arguments anew (`video`, text), or else a value with a row for each token.
        per_token: other arguments, tensors or tuples of them, with a row for each video token: name -> (dimensions it has then or None
            for any, which of them is S). Where it has another number of dimensions, or one row, it is one for all tokens.
        pairwise: arguments (B or 1, S, S) with a row and a column for each video token, an additive mask of tokens beside the grid, which
            the attention hands to `Attend` (`bias`).
        rotary: (value of the carrier in row-major order, order) -> the same in that order.
        attention: block -> its self-attention.
        merges: False where tokens of these blocks are never merged.
    """

    attribute: str
    carrier: str
    video: str = "hidden_states"
    returns: tuple[str, ...] = ("hidden_states",)
    per_token: Mapping[str, tuple[int | None, int]] = field(default_factory=dict)
    pairwise: tuple[str, ...] = ()
    rotary: Callable[[Any, Tensor], Any] = order_pair
    attention: Callable[[nn.Module], nn.Module] = _attn1
    merges: bool = True


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        name: e.g. "wan".
        transformers: diffusers' classes of this architecture.
        blocks: their lists of blocks in the order of execution; a plan's layers are counted through all of them.
        grid: (transformer, keyword arguments of its forward) -> TokenGrid of the video tokens. ValueError where there is none.
        adapt: (block, attention) -> None, teaches a block's self-attention to call an `Attend` that it finds in the carrier, and to
            do what it did without one. Called once for each block, may be called again.
        inputs: (transformer, latents (B, C, T, H, W), timestep (B,), text (B, L, E), **conditions) -> keyword arguments of the
            transformer's forward, for training. latents and timestep as in usv/flow.py; text is one matrix a caption, all that
            the pipeline's `encode_prompt` gives packed into it, zero rows behind it. timestep and text may be None: the grid is asked for.
        outputs: (transformer, what its forward returned, its keyword arguments, **conditions as `inputs` had them) -> velocity (B, C, T, H, W) as in usv/flow.py, for training.
        flow_timestep: (transformer, timesteps as its pipelines pass them) -> those of usv/flow.py, 1000 for noise alone: a plan's.
        view: (transformer, run) -> further attributes that the forward shall see replaced, e.g. what runs between blocks.
        beside: (transformer, keyword arguments) -> where the tokens of a call that are not of the grid (conditions, history) stand: True
            before it, False behind it; None where there may be none. They are dense and never merged.
        refuse: (transformer, keyword arguments) -> None, or the reason why this call cannot run sparse.
        joint: whether its attention is over video and text together.
        shared: False where processes cannot share a sample.
        shape_keys: entries of the transformer's config that make a checkpoint fit it.
        zero_padded: whether text is attended whole, zeros behind it (`encoder_hidden_states`), so that its length counts.
        guidance: arguments of pipelines that ask for further forwards a step, and the value at which they do not; a student has
            guidance folded in.
        conditions: transformer -> names of the `**conditions` of `inputs` that training has to give it; data/prepare.py writes them.
    """

    name: str
    transformers: tuple[type, ...]
    blocks: tuple[Blocks, ...]
    grid: Callable[[nn.Module, Mapping[str, Any]], TokenGrid]
    adapt: Callable[[nn.Module, nn.Module], None]
    shape_keys: tuple[str, ...]
    inputs: Callable[..., dict[str, Any]] = _inputs
    outputs: Callable[..., Tensor] = lambda transformer, sample, arguments, **conditions: sample
    flow_timestep: Callable[[nn.Module, Tensor], Tensor] = lambda transformer, timestep: timestep
    joint: bool = False
    shared: bool = True
    view: Callable[[nn.Module, Any], dict[str, Any]] = lambda transformer, run: {}
    refuse: Callable[[nn.Module, Mapping[str, Any]], str | None] = lambda transformer, arguments: None
    beside: Callable[[nn.Module, Mapping[str, Any]], bool | None] = lambda transformer, arguments: None
    zero_padded: bool = False
    guidance: Mapping[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0, "guidance_scale_2": 1.0})
    conditions: Callable[[nn.Module], tuple[str, ...]] = lambda transformer: ()

    @property
    def flows(self) -> bool:
        """Whether its pipelines count time as usv/flow.py does; the scheduler of a few-step student does, so others cannot use it."""
        return self.flow_timestep is type(self).__dataclass_fields__["flow_timestep"].default

    def layers(self, transformer: nn.Module) -> list[tuple[Blocks, nn.Module]]:
        """Every block with the list it is of, in the order of execution."""
        return [(blocks, block) for blocks in self.blocks for block in getattr(transformer, blocks.attribute)]
