"""What is known of each of diffusers' video transformers: how it attends, where its long attentions are, how its call tells
the token grid; and which are refused, with the reason.

Classes are known by name, so that a diffusers without the newest of them still works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from usv.patterns.processors.joint import (
    CogVideoXProcessor,
    EasyAnimateProcessor,
    HunyuanVideo15Processor,
    HunyuanVideoProcessor,
    MochiProcessor,
    MotifVideoProcessor,
)
from usv.patterns.processors.run import Processor
from usv.patterns.processors.separate import (
    AllegroProcessor,
    AnyFlowProcessor,
    CosmosProcessor,
    HeliosProcessor,
    Kandinsky5Processor,
    Kandinsky6Processor,
    LTX2Processor,
    LTXProcessor,
    WanProcessor,
)
from usv.patterns.protocol import require
from usv.sparse.grid import TokenGrid
from usv.sparse.packed import packed_grid


@dataclass(frozen=True)
class Family:
    """attention: in words, for the table. processor: of its long self-attentions. lists: of blocks, in the order of execution,
    and the place of the attention in a block. grid: (config, arguments of the forward by name) -> TokenGrid. branch: whether it is
    no denoiser but a control branch beside one, whose forwards are not counted."""

    attention: str
    processor: type[Processor]
    lists: tuple[tuple[str, str], ...]
    grid: Callable[[object, dict], TokenGrid]
    branch: bool = False

    def attentions(self, transformer: nn.Module) -> list[nn.Module]:
        return [block.get_submodule(place) for blocks, place in self.lists for block in getattr(transformer, blocks)]


def _patch(config) -> tuple[int, int, int]:
    """Tokens' extents (t, h, w) in latents."""
    patch = config.patch_size
    return (getattr(config, "patch_size_t", None) or 1, patch, patch) if isinstance(patch, int) else tuple(patch)


def _divide(sides: tuple[int, ...], patch: tuple[int, int, int]) -> TokenGrid:
    require(not any(side % p for side, p in zip(sides, patch)), "latents", f"(T, H, W) = {tuple(sides)}",
            f"multiples of the patch {patch}")  # fmt: skip
    return TokenGrid(*(side // p for side, p in zip(sides, patch)))


def _channels_first(config, call: dict) -> TokenGrid:
    """Latents (B, C, T, H, W)."""
    return _divide(call["hidden_states"].shape[-3:], _patch(config))


def _of_controls(config, call: dict) -> TokenGrid:
    """Latents (B, C, T, H, W) of a control branch."""
    return _divide(call["controls_latents"].shape[-3:], _patch(config))


def _frames_first(config, call: dict) -> TokenGrid:
    """Latents (B, T, C, H, W)."""
    shape = call["hidden_states"].shape
    return _divide((shape[1], *shape[-2:]), _patch(config))


def _channels_last(config, call: dict) -> TokenGrid:
    """Latents (B, T, H, W, C)."""
    return _divide(call["hidden_states"].shape[1:4], _patch(config))


def _packed(config, call: dict) -> TokenGrid:
    """Tokens (B, S, C), packed by the pipeline."""
    return packed_grid(call)


_CROSS = "self; text by cross-attention"
_WAN = Family(_CROSS, WanProcessor, (("blocks", "attn1"),), _channels_first)
_COG = Family("joint; text before", CogVideoXProcessor, (("transformer_blocks", "attn1"),), _frames_first)
_HUNYUAN_BLOCKS = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))
_HUNYUAN = Family("joint; text after", HunyuanVideoProcessor, _HUNYUAN_BLOCKS, _channels_first)

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    # a forward runs all vace_blocks, then all blocks
    "WanVACETransformer3DModel": Family(_CROSS, WanProcessor, (("vace_blocks", "attn1"), ("blocks", "attn1")), _channels_first),
    "WanAnimateTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": Family(_CROSS, AnyFlowProcessor, (("blocks", "attn1"),), _frames_first),
    "HeliosTransformer3DModel": Family(
        "self; history before; text by cross-attention", HeliosProcessor, (("blocks", "attn1"),), _channels_first
    ),
    "CogVideoXTransformer3DModel": _COG,
    "ConsisIDTransformer3DModel": _COG,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": Family(
        "joint; history before, text after", HunyuanVideoProcessor, _HUNYUAN_BLOCKS, _channels_first
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        "joint; text after", HunyuanVideo15Processor, (("transformer_blocks", "attn"),), _channels_first
    ),
    "LTXVideoTransformer3DModel": Family(
        "self; conditions before; text by cross-attention", LTXProcessor, (("transformer_blocks", "attn1"),), _packed
    ),
    "LTX2VideoTransformer3DModel": Family(
        "self; conditions after; text and audio by cross-attention", LTX2Processor,
        (("transformer_blocks", "attn1"),), _packed,
    ),
    "CosmosTransformer3DModel": Family(_CROSS, CosmosProcessor, (("transformer_blocks", "attn1"),), _channels_first),
    "CosmosControlNetModel": Family(_CROSS, CosmosProcessor, (("control_blocks", "attn1"),), _of_controls, branch=True),
    "Kandinsky5Transformer3DModel": Family(
        _CROSS, Kandinsky5Processor, (("visual_transformer_blocks", "self_attention"),), _channels_last
    ),
    "Kandinsky6Transformer3DModel": Family(
        "self; text and audio by cross-attention", Kandinsky6Processor,
        (("visual_transformer_blocks", "video_dec_block.self_attention"),), _channels_last,
    ),
    "EasyAnimateTransformer3DModel": Family(
        "joint; text before", EasyAnimateProcessor, (("transformer_blocks", "attn1"),), _channels_first
    ),
    "MochiTransformer3DModel": Family("joint; text after", MochiProcessor, (("transformer_blocks", "attn1"),), _channels_first),
    "MotifVideoTransformer3DModel": Family("joint; text after", MotifVideoProcessor, _HUNYUAN_BLOCKS, _channels_first),
    "AllegroTransformer3DModel": Family(_CROSS, AllegroProcessor, (("transformer_blocks", "attn1"),), _channels_first),
}  # fmt: skip

_UNET = ("UNet", "a UNet attends within a frame and along time apart: no sequence holds all tokens of the video")
_LINEAR = ("linear", "linear attention makes no score matrix, so there are no blocks to leave out")

# class of the denoiser -> (its attention, why it is refused)
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("UNetMotionModel", "UNet2DConditionModel", "UNet3DConditionModel", "I2VGenXLUNet",
                     "UNetSpatioTemporalConditionModel"), _UNET),
    "LatteTransformer3DModel": ("within a frame, then along time", "no sequence holds all tokens of the video"),
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "AnyFlowFARTransformer3DModel": ("causal, over a cache", "chunks attend causally to a cache of the chunks before, so a call's queries are not all of its keys"),
    "Cosmos3OmniTransformer": ("joint; text before, packed", "text, video, sound and actions are packed into one sequence with causal text"),
    "Kandinsky6SRTransformer3DModel": ("self; its own sparsity", "it was trained with, and always runs, its own NABLA or sliding-tile masks"),
}  # fmt: skip


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a transformer, by its class or the nearest known base class; None if it is not known."""
    return next((FAMILIES[cls.__name__] for cls in type(transformer).__mro__ if cls.__name__ in FAMILIES), None)


def refusal(name: str) -> str:
    """Why a denoiser's class is refused, as the end of a sentence."""
    return REFUSED[name][1] if name in REFUSED else "its attention is not known here"


def call_arguments(transformer: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a forward by name."""
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def token_grid(transformer: nn.Module, *args, **kwargs) -> TokenGrid:
    """The grid after patchify of a call of the transformer with these arguments. ValueError where patches do not fit."""
    return family_of(transformer).grid(transformer.config, call_arguments(transformer, args, kwargs))
