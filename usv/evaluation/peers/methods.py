"""What is compared: the dense model, fewer steps, feature caches, token merging, training-free patterns, students.

Every method is a name, a family, its settings in words, and a context that makes a pipeline run it and undoes that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from diffusers import WanPipeline

import usv
from usv.config import ModelConfig
from usv.evaluation.clips import requests
from usv.evaluation.compare_patterns import CALIBRATION_SEED, temporal_share
from usv.evaluation.evaluate import opened
from usv.evaluation.matched_density import settings_for
from usv.evaluation.peers import caches
from usv.evaluation.peers.caches import Running
from usv.models.forward import SparseTransformer
from usv.patterns import PATTERNS
from usv.sampling.checkpoint import Student, twin
from usv.sampling.enable import Record
from usv.sampling.generate import generate, latent_size
from usv.sampling.held import hold
from usv.sparse.grid import Tile, TokenGrid
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, Rung, SparsityPlan, timestep_bins

FAMILIES = ("dense", "fewer steps", "cache", "merging", "pattern", "fixed density", "ours")
WARM_UP = {"dense_layers": 0.03, "dense_steps": 0.2}  # as published, for all patterns
CLUSTERS = {"q_clusters": 100, "k_clusters": 200}  # published 100 and 500, the latter for 30,000 tokens and more


@dataclass(frozen=True)
class Method:
    """name, one of FAMILIES, settings in words, and `enter(pipe)`: a context that runs it and yields a `Running`.

    training_free: it approximates the dense model, so its videos are measured against the dense twins too.
    own_pipeline: it leaves traces, so it gets a pipeline of its own. compiles: at each new batch size.
    """

    name: str
    family: str
    settings: str
    enter: Callable[[WanPipeline], AbstractContextManager[Running]]
    training_free: bool = True
    own_pipeline: bool = False
    compiles: bool = False


def all_methods(model: ModelConfig, checkpoints: dict[str, str], density: float, fixed: float) -> list[Method]:
    """Every method in the order of FAMILIES. `density`: of the patterns' sparse calls; `fixed`: of the uniform plan."""
    methods = [dense("dense", model.num_inference_steps)]
    methods += [dense(f"dense_{n}_steps", n) for n in (20, 10, 5) if n < model.num_inference_steps]
    methods += cache_methods(model)
    methods += [merging(model, rung) for rung in (1, 2)]
    methods += [pattern(model, name, density) for name in PATTERNS] + [pattern(model, "tile_top_k", density, "flex_compiled")]
    if checkpoints:
        methods.append(fixed_density(next(iter(checkpoints.values())), fixed))
    return methods + [ours(name, path) for name, path in checkpoints.items()]


def dense(name: str, steps: int) -> Method:
    """The model itself, by its own UniPC scheduler."""

    @contextmanager
    def enter(pipe: WanPipeline) -> Iterator[Running]:
        yield Running(steps)

    return Method(name, "dense" if name == "dense" else "fewer steps", f"{steps} guided UniPC steps", enter, name != "dense")


def cache_methods(model: ModelConfig) -> list[Method]:
    """Feature caches at two settings where one number moves them: diffusers' default and a faster one."""
    steps, measured = model.num_inference_steps, {}

    def ratios(pipe: WanPipeline) -> list[float]:
        if "ratios" not in measured:
            prompts = requests(model, 1).prompts
            measured["ratios"] = caches.magnitude_ratios(pipe, steps, lambda: generate(pipe, model, prompts, [CALIBRATION_SEED], 1))
        return measured["ratios"]

    def mag(pipe: WanPipeline, threshold: float):
        return caches.mag_cache(pipe, threshold, steps, lambda: ratios(pipe))

    def cache(name: str, settings: str, enter: Callable, **options) -> Method:
        return Method(name, "cache", settings, lambda pipe: enter(pipe, **options), own_pipeline=name.startswith("cache_dit"))

    return [
        cache("first_block_cache", "diffusers, threshold 0.05", caches.first_block_cache, threshold=0.05),
        cache("first_block_cache_fast", "diffusers, threshold 0.15", caches.first_block_cache, threshold=0.15),
        cache("mag_cache", "diffusers, threshold 0.06, ratios of this model", mag, threshold=0.06),
        cache("mag_cache_fast", "diffusers, threshold 0.24, ratios of this model", mag, threshold=0.24),
        cache("pab", "diffusers, self-attention every 2nd step", caches.pyramid_attention_broadcast, skip=2),
        cache("taylor_seer", "diffusers, interval 5, order 1", caches.taylor_seer, interval=5),
        cache("taylor_seer_lite", "diffusers, interval 5, order 1, lite", caches.taylor_seer, interval=5, lite=True),
        cache("sea_cache", "diffusers, threshold 0.25", caches.sea_cache, threshold=0.25),
        cache("cache_dit", "cache-dit, first block, threshold 0.08, warm-up 8", caches.cache_dit, threshold=0.08, warm_up=8),
    ]


def merging(model: ModelConfig, merge: int) -> Method:
    """Token merging as in ToMe (arXiv 2210.09461): one rung in every layer, on the dense model's weights and attention."""

    @contextmanager
    def enter(pipe: WanPipeline) -> Iterator[Running]:
        transformer, record = pipe.transformer, Record()
        plan = SparsityPlan.uniform(Rung(0, merge), timestep_bins(1, model.flow_shift), len(transformer.blocks))
        sparse = SparseTransformer(twin(transformer), Tile(*model.tile, cell=tuple(model.cell))).to(transformer.device)  # the blocks of others stay of their own class
        pipe.transformer = hold(Student(sparse, plan), record, folded=False)
        try:
            yield Running(executed=lambda: (record.mean_density(), record.mean_merged()))
        finally:
            pipe.transformer = transformer

    merged = MERGE_LADDER[merge]
    return Method(f"merge_{merged:g}", "merging", f"{merged:.0%} of the tokens merged in every layer, dense weights", enter)


def pattern(model: ModelConfig, name: str, density: float, impl: str = "auto") -> Method:
    """A training-free pattern whose sparse calls execute `density`; layers and steps of the warm-up stay dense.

    impl: of the kernel; with flex_compiled FlexAttention computes the same selection.
    """
    found: dict[str, dict] = {}

    @contextmanager
    def enter(pipe: WanPipeline) -> Iterator[Running]:
        if "options" not in found:
            found["options"] = pattern_options(pipe, model, name, density)
        usv.enable(pipe, attention=name, impl=impl, **WARM_UP, **found["options"])
        record = pipe._usv.record
        try:
            yield Running(
                executed=lambda: (record.mean_density(), 0.0), measuring=lambda: record.stage_seconds()["measure"]
            )
        finally:
            usv.disable(pipe)

    settings = f"density {density:g} after {WARM_UP['dense_steps']:.0%} dense steps"
    if impl == "flex_compiled":
        return Method(f"{name}_flex", "pattern", settings + ", attention by FlexAttention", enter, compiles=True)
    return Method(name, "pattern", settings, enter)


def pattern_options(pipe: WanPipeline, model: ModelConfig, name: str, density: float) -> dict:
    """Options that execute `density`; only svg has to run a prompt for them, with a fifth of the steps."""
    grid = TokenGrid(*(side // patch for side, patch in zip(latent_size(pipe, model), pipe.transformer.config.patch_size)))
    if name == "svg2":
        return {"density": density} | {each: min(count, grid.num_tokens // 4) for each, count in CLUSTERS.items()}
    short = replace(model, num_inference_steps=max(2, model.num_inference_steps // 5))

    def measure(tried: dict) -> tuple[float, float]:
        usv.enable(pipe, attention=name, **WARM_UP, **tried)
        try:
            generate(pipe, short, requests(model, 1).prompts, [CALIBRATION_SEED], 1)
            record = pipe._usv.record
            return record.sparse_density(), temporal_share(record, tried, grid)
        finally:
            usv.disable(pipe)

    return settings_for(name, density, grid, measure)


@contextmanager
def enabled(pipe: WanPipeline, student: Student) -> Iterator[Running]:
    """A student, sampled as its checkpoint says."""
    usv.enable(pipe, student)
    record = pipe._usv.record
    try:
        steps = student.sampling["num_inference_steps"]
        yield Running(steps, executed=lambda: (record.mean_density(), record.mean_merged()))
    finally:
        usv.disable(pipe)


def ours(name: str, path: str) -> Method:
    """A student folder, or FOLDER@timesteps, loaded once."""
    loaded: dict[str, Student] = {}

    def enter(pipe: WanPipeline):
        if "student" not in loaded:
            loaded["student"] = opened(pipe, path)
        return enabled(pipe, loaded["student"])

    return Method(name, "ours", path, enter, training_free=False)


def fixed_density(path: str, density: float) -> Method:
    """VSA's setting (arXiv 2505.13389): one density everywhere, nothing merged, on the weights of a student."""
    rung, loaded = min(range(len(DENSITY_LADDER)), key=lambda i: abs(DENSITY_LADDER[i] - density)), {}

    def enter(pipe: WanPipeline):
        if "student" not in loaded:
            student = opened(pipe, path)
            student.plan = replace(
                SparsityPlan.uniform(Rung(rung, 0), student.plan.edges, student.plan.num_layers), steps=student.plan.steps
            )
            loaded["student"] = student
        return enabled(pipe, loaded["student"])

    settings = f"density {DENSITY_LADDER[rung]:g} in every layer, nothing merged, weights of {path}"
    return Method(f"fixed_density_{DENSITY_LADDER[rung]:g}", "fixed density", settings, enter, training_free=False)
