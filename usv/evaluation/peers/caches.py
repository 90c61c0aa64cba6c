"""Feature caches on a WanPipeline, each as a context: what diffusers offers through `enable_cache`, and cache-dit.

All of them skip work in some forwards; how much was still computed is counted at the query projection of every
self-attention, so a cache's "density" is attention calls executed / attention calls of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from diffusers import WanPipeline


class Unavailable(Exception):
    """A peer that cannot run here; the message says why and what to do."""


@dataclass
class Running:
    """What an entered method tells the run. steps: None is the model's own number.

    executed: attention density and merged fraction so far. measuring: seconds so far that only counting took.
    """

    steps: int | None = None
    executed: Callable[[], tuple[float, float]] = lambda: (1.0, 0.0)
    measuring: Callable[[], float] = lambda: 0.0


@contextmanager
def attention_calls(transformer: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Yields a function: self-attentions computed / those that a dense model would have computed in the same forwards."""
    counts = {"attention": 0, "forward": 0}

    def counter(name: str) -> Callable:
        def count(*_, **__) -> None:
            counts[name] += 1

        return count

    hooks = [block.attn1.to_q.register_forward_hook(counter("attention")) for block in transformer.blocks]
    hooks.append(transformer.register_forward_hook(counter("forward")))
    try:
        yield lambda: counts["attention"] / max(counts["forward"] * len(transformer.blocks), 1)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cached(pipe: WanPipeline, config, separate: bool = False) -> Iterator[Running]:
    """A cache of diffusers. `separate`: keep its state apart for the two forwards of guidance (see `branches_apart`)."""
    pipe.transformer.enable_cache(config)
    apart = branches_apart(pipe.transformer) if separate else []
    try:
        with attention_calls(pipe.transformer) as share:
            yield Running(executed=lambda: (share(), 0.0))
    finally:
        for hook in apart:
            hook.remove()
        pipe.transformer.disable_cache()


def branches_apart(transformer: torch.nn.Module) -> list:
    """Give each forward of a step its own state of pyramid attention broadcast.

    diffusers keeps one state for both forwards of guidance: with a skip of two the unconditional forward would always
    reuse the attention of the conditional one. The published method broadcasts over steps.
    """
    registries = [module._diffusers_hook for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    found = (registry.get_hook("pyramid_attention_broadcast") for registry in registries)
    hooks = [hook for hook in found if hook is not None]
    states: list[list] = [[hook.state for hook in hooks]]
    seen = {"timestep": None, "branch": 0}

    def swap(module, args, kwargs) -> None:
        timestep = float(kwargs["timestep"].max())
        if seen["timestep"] is not None and timestep > seen["timestep"]:  # another video
            states[1:] = []
            states[0] = [type(hook.state)() for hook in hooks]
        seen["branch"] = seen["branch"] + 1 if timestep == seen["timestep"] else 0
        seen["timestep"] = timestep
        if seen["branch"] == len(states):
            states.append([type(hook.state)() for hook in hooks])
        for hook, state in zip(hooks, states[seen["branch"]]):
            hook.state = state

    return [transformer.register_forward_pre_hook(swap, with_kwargs=True)]


def first_block_cache(pipe: WanPipeline, threshold: float):
    """First block cache: the rest of a forward is skipped where the first block's update has hardly changed."""
    from diffusers.hooks import FirstBlockCacheConfig

    return cached(pipe, FirstBlockCacheConfig(threshold=threshold))


def pyramid_attention_broadcast(pipe: WanPipeline, skip: int):
    """PAB (arXiv 2408.12588): self-attention every `skip` steps between timesteps 800 and 100."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip, current_timestep_callback=lambda: pipe.current_timestep
    )
    return cached(pipe, config, separate=True)


def taylor_seer(pipe: WanPipeline, interval: int, lite: bool = False):
    """TaylorSeer (arXiv 2503.06923): attention and feed-forward outputs extrapolated between every `interval`-th step.

    The modules are named, since the defaults of diffusers 0.42 match none of Wan's. lite: only the last projection.
    """
    from diffusers.hooks import TaylorSeerCacheConfig

    names = None if lite else [r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn"]
    config = TaylorSeerCacheConfig(
        cache_interval=interval, taylor_factors_dtype=torch.float32, cache_identifiers=names, use_lite_mode=lite
    )
    return cached(pipe, config)


def sea_cache(pipe: WanPipeline, threshold: float):
    """SeaCache (arXiv 2602.18993): skips where a spectral indicator of the latents has hardly changed."""
    from diffusers.hooks import SeaCacheConfig

    return cached(pipe, SeaCacheConfig(threshold=threshold))


def mag_cache(pipe: WanPipeline, threshold: float, steps: int, ratios: Callable[[], list[float]]):
    """MagCache (arXiv 2506.09045) with the magnitude ratios of this model, see `magnitude_ratios`."""
    from diffusers.hooks import MagCacheConfig

    return cached(pipe, MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios()))


def magnitude_ratios(pipe: WanPipeline, steps: int, sample: Callable[[], object]) -> list[float]:
    """One ratio for each step, mean of both branches of guidance, measured while `sample()` generates once."""
    from diffusers.hooks import MagCacheConfig

    # One step more than there are: at the last one diffusers would print the ratios and forget them.
    config = MagCacheConfig(num_inference_steps=steps + 1, calibrate=True)
    head = pipe.transformer.blocks[0]
    pipe.transformer.enable_cache(config)
    hook = head._diffusers_hook.get_hook("mag_cache_leader_block_hook")
    kept: list[list[float]] = []
    original = hook.reset_state

    def keep(module):  # the pipeline resets its caches when it ends
        kept.extend(list(state.calibration_ratios) for state in hook.state_manager._state_cache.values())
        return original(module)

    hook.reset_state = keep
    try:
        sample()
        keep(head)
    finally:
        pipe.transformer.disable_cache()
    runs = [ratios for ratios in kept if len(ratios) == steps]
    if not runs:
        raise Unavailable(f"calibration of MagCache saw {[len(ratios) for ratios in kept]} ratios, expected {steps} of each branch")
    return [sum(column) / len(column) for column in zip(*runs)]


@contextmanager
def cache_dit(pipe: WanPipeline, threshold: float, warm_up: int) -> Iterator[Running]:
    """DBCache of cache-dit: the first block is computed, the rest reused while its residual changes less than `threshold`."""
    try:
        version("cache-dit")
    except PackageNotFoundError:
        raise Unavailable("not installed: pip install cache-dit") from None
    import cache_dit as library

    config = library.DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=warm_up)
    library.enable_cache(pipe, cache_config=config)
    try:
        with attention_calls(pipe.transformer) as share:
            yield Running(executed=lambda: (share(), 0.0))
    finally:
        library.disable_cache(pipe)
