"""A training run put together from its settings: networks, costs, policy, data, and what another run's student lends."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from usv import flow
from usv.config import ObjectiveConfig, SettingError, TrainConfig
from usv.files import reason_of
from usv.models import lora
from usv.models.families import family_of
from usv.models.forward import SparseTransformer
from usv.models.protocol import sides_of
from usv.objectives.distribution import Critic, Head
from usv.policy.baselines import CalibrationPolicy, HandRulePolicy
from usv.policy.fixed import EntropyPolicy, StaticPolicy
from usv.policy.gumbel import GumbelPolicy
from usv.sampling.budget import shape_of
from usv.sampling.checkpoint import Student, load_student
from usv.sampling.fingerprint import fingerprint
from usv.sampling.generate import latent_size, takes_image
from usv.sparse.cost import ModelShape, rung_costs
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.measured import device_name, read_costs
from usv.sparse.plan import RUNGS, SparsityPlan, executed_densities, timestep_bins
from usv.training.buckets import of_shape, open_shards
from usv.training.data import ShardDataset
from usv.training.engine import Engine, frozen_pipeline
from usv.training.feasible import check_budget, check_content, check_density, check_sharing, check_size
from usv.training.ranks import Ranks
from usv.training.run import Run
from usv.training.shards import find_shards

IMAGE_TEXT = 512  # tokens of the text beside image embeddings, in diffusers' Wan attention


def build(config: TrainConfig, accelerator, ranks: Ranks) -> Run:
    """Pipeline, teacher, student, policy, data, optimiser. All that can be wrong with the settings shows here."""
    run = Run(config, ranks)
    prepare_folder(run.folder, ranks.rank)
    m = config.model
    run.pipe = frozen_pipeline(config, ranks)
    transformer = run.pipe.transformer
    run.base = fingerprint(transformer)
    tile = Tile(*m.tile, cell=tuple(m.cell))
    torch.manual_seed(config.seed)
    if config.lora.rank:
        student = lora.adapt(transformer, tile, config.lora.rank, config.lora.alpha, config.lora.targets)
        run.teacher = lora.Teacher(student)
    elif config.optim.train == "router":
        student = SparseTransformer(transformer.requires_grad_(False), tile)
        run.teacher = lora.Teacher(student)
    else:
        run.teacher = SparseTransformer(transformer, tile).eval().requires_grad_(False)
        copy = type(transformer).from_config(transformer.config)
        copy.load_state_dict(transformer.state_dict())
        student = SparseTransformer(copy, tile)
    check_sharing(config, student.family)
    if config.runtime.gradient_checkpointing:
        student.transformer.enable_gradient_checkpointing()
    student.sequence_group = ranks.sequence
    if isinstance(run.teacher, SparseTransformer):
        run.teacher.sequence_group = ranks.sequence
    run.conditions = conditions_of(run, config)
    run.num_layers = student.num_layers
    latent_shape = _latent_shape(run.pipe, m)
    layout = tile_layout(student.grid_of(latent_shape), tile)
    shape = ModelShape.of(transformer.config, m.max_sequence_length, student.family.joint)
    costs = rung_costs(shape, layout)
    if config.policy.cost is not None:
        costs = measured_costs(config, student)
    run.costs, run.shape, run.layout = dict(zip(RUNGS, costs)), shape, layout
    check_content(config, run.share.world)
    check_budget(config, run.costs, run.num_layers)
    split = float(flow.unshift_sigma(torch.tensor(m.boundary, dtype=torch.float64), m.flow_shift))
    run.span = {None: (0.0, 1.0), "high": (split, 1.0), "low": (0.0, split)}[m.expert]
    run.edges = timestep_bins(config.policy.bins, m.flow_shift, *run.span)
    check_density(config, layout.num_blocks)
    run.policy = make_policy(config, run.edges, run.num_layers, costs, layout.num_blocks)
    run.engine = Engine(config, accelerator, ranks, student)
    run.student = run.engine
    open_data(run, config, student, latent_shape)
    run.empty = run.data.empty.to(run.device)
    warm_start(run, config)
    return run


def conditions_of(run: Run, config: TrainConfig) -> tuple[str, ...]:
    """What the transformer is given beside the text, by name: its family says it, of TI2V-5B the pipeline that its folder names.
    SettingError for what cannot be trained with them."""
    transformer, o = run.pipe.transformer, config.objective
    names = family_of(transformer).conditions(transformer)
    length, by_timestep = config.model.max_sequence_length, takes_image(run.pipe) and "image_latents" not in names
    if "image_embeds" in names and length != IMAGE_TEXT:
        raise SettingError(f"model.max_sequence_length: got {length}, accepted: {IMAGE_TEXT} for a model of image embeddings, which are told from the text by it")
    if by_timestep and run.objective.few_steps:
        raise SettingError(
            f"objective: got {o.name} for a first frame that is given by its timesteps (TI2V-5B), accepted: velocity; the others "
            "take what is said of that frame for a part of the video"
        )
    return names + ("image_latents",) * by_timestep


def open_data(run: Run, config: TrainConfig, student: SparseTransformer, latent_shape: tuple[int, ...]) -> None:
    """Training and held-out clips. With folders of several sizes every batch has one; costs and validation are at the configured one."""
    d, ranks = config.data, run.ranks
    source, weights = (list(d.mix), list(d.mix.values())) if d.mix else (d.path, None)
    run.data = open_shards(
        source, run.clips_a_step, weights=weights, latent_shape=latent_shape, model=config.model.path,
        text_length=config.model.max_sequence_length, fps=config.model.fps, seed=config.seed, rank=run.share.rank, world_size=run.share.world, drop_text=d.drop_text,
        conditions=run.conditions,
    )  # fmt: skip
    for shape in run.data.shapes:
        grid = student.grid_of(shape)
        if ranks.sequence is not None:
            ranks.sequence.check(student.config.num_attention_heads, tile_layout(grid, student.tile).num_blocks)
    if len(run.data.shapes) > 1 and ranks.first:
        print(run.data.describe())
    held_out = of_shape(source)[latent_shape]
    clips = sum(shard.count for shard in find_shards(held_out, "val")[0])
    if clips < d.validation_clips and ranks.first:
        print(f"validation: {clips} clips, data.validation_clips={d.validation_clips} were asked for; the split val has no more")
    run.validation = ShardDataset(
        held_out, min(clips, d.validation_clips), split="val", drop_text=0.0, shuffle=False, repeat=False,
        latent_shape=latent_shape, model=config.model.path, conditions=run.conditions,
    )  # fmt: skip
    next(iter(run.validation))  # a held-out clip that cannot be used shows now, not at the first validation


def inherit_steps(settings: ObjectiveConfig, few_steps: bool, plan: SparsityPlan) -> None:
    """A plan that decides its steps decides what is trained, too."""
    if not plan.steps:
        return
    if not few_steps:
        raise SettingError(
            f"objective: got {settings.name}, accepted: trajectory with objective.guide=teacher, or distribution, since the plan of objective.init "
            "decides its few steps"
        )
    settings.student_timesteps = plan.student_timesteps()


def warm_start(run: Run, config: TrainConfig) -> None:
    """Weights, and with policy=inherit the plan, of the student that objective.init names; guide and critic where the objective needs them."""
    o, start = config.objective, None
    if o.init is not None:
        start = load_student(o.init, run.pipe.transformer)
        refuse_other_kind(config, start)
        if start.router or not run.router:  # gates of other weights say nothing to a router
            run.engine.load_weights(start.model.state_dict() | (start.adapters or {}))
        if config.policy.name == "inherit":
            run.plan = start.plan.only(config.policy.axes)
            inherit_steps(o, run.objective.few_steps, start.plan)
            run.edges = start.plan.edges
    if run.objective.needs.guide:
        run.guide = start if o.guide is None else load_student(o.guide, run.pipe.transformer)
        if run.guide_timesteps and not set(o.student_timesteps) <= set(run.guide_timesteps):
            raise SettingError(
                f"objective.student_timesteps: got {o.student_timesteps}, accepted: some of {run.guide_timesteps}, since objective.guide is a "
                f"student of few steps ({o.guide or o.init}), which is right at its own alone; or objective.guide=teacher"
            )
        if run.guide_timesteps:
            o.solver_steps = 1  # each of its answers is where its flow ends
        run.guide.model.to(run.device).eval().requires_grad_(False)
        run.guide.model.sequence_group = run.ranks.sequence
    if run.objective.needs.critic:
        run.objective.critic = make_critic(run, config)


def make_critic(run: Run, config: TrainConfig) -> Critic:
    """A copy of the teacher that learns, or adapters beside the student's; with a head where the adversarial term is asked for."""
    o = config.objective
    if config.lora.rank:
        model = lora.Branch(run.engine.model, config.lora.rank, config.lora.alpha)
        transformer = run.engine.model.transformer
    else:
        model = SparseTransformer(type(run.pipe.transformer).from_config(run.pipe.transformer.config), run.teacher.tile).to(run.device)
        model.load_state_dict(run.teacher.state_dict())
        model.sequence_group = run.ranks.sequence
        transformer = model.transformer
        if config.runtime.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
    head = Head(transformer.proj_out.in_features).to(run.device) if o.adversarial_weight else None
    return Critic(
        model, o.critic_lr, config.model.flow_shift, run.ranks.average_gradients, run.engine.autocast,
        head, transformer.proj_out, o.adversarial, o.adversarial_weight,
    )  # fmt: skip


def refuse_other_kind(config: TrainConfig, start: Student) -> None:
    """SettingError where the student of objective.init cannot go on as what is trained now."""
    mine, theirs = config.lora, start.lora if start.adapters is not None else None
    if mine.rank and theirs is None:
        raise SettingError(f"objective.init: got {config.objective.init}, whose weights are whole, accepted with lora.rank: a student of adapters")
    wanted = {"rank": mine.rank, "alpha": mine.alpha, "targets": list(mine.targets)}
    if mine.rank and theirs | {"targets": sorted(theirs["targets"])} != wanted | {"targets": sorted(wanted["targets"])}:
        raise SettingError(f"objective.init: got adapters of {theirs}, accepted with lora={wanted}: the same")
    if config.optim.train == "router" and not start.router and config.policy.name != "inherit":
        raise SettingError(f"objective.init: got {config.objective.init}, whose weights a router does not take, accepted: a router's student, or with policy=inherit any, for its plan")
    if config.policy.name == "inherit" and start.sampling.get("flow_shift", config.model.flow_shift) != config.model.flow_shift:
        raise SettingError(
            f"model.flow_shift: got {config.model.flow_shift:g} with policy=inherit, accepted: {start.sampling['flow_shift']:g}, that of {config.objective.init}, "
            "at whose timesteps its plan changes"
        )
    if start.sampling.get("expert") != config.model.expert:
        raise SettingError(f"objective.init: got a student of the expert {start.sampling.get('expert')}, accepted: of {config.model.expert}")


def measured_costs(config: TrainConfig, student) -> list[float]:
    """Costs of the rungs in seconds of this machine, from `policy.cost`. CostsError where they are of something else."""
    m = config.model
    wanted = {
        "device": device_name(), "num_layers": student.num_layers, "transformer": shape_of(student), "tile": list(m.tile), "cell": list(m.cell), "height": m.height,
        "width": m.width, "num_frames": m.num_frames,
    }  # fmt: skip
    return read_costs(config.policy.cost, wanted).rung_costs()


def make_policy(config: TrainConfig, edges, num_layers: int, costs, num_blocks: int):
    """The policy that the settings name."""
    p = config.policy
    if p.name in ("static", "inherit"):  # inherit: run.plan is fixed before the first step
        return StaticPolicy(edges, num_layers, costs, axes=p.axes)
    if p.name == "hand_rule":
        policy = HandRulePolicy(edges, num_layers, costs, axes=p.axes)
        policy.decode(p.budget)  # refuses at once what it cannot reach
        return policy
    if p.name == "calibration":
        return CalibrationPolicy(edges, num_layers, costs, p.probes, axes=p.axes, merge_layers=p.merge_layers)
    if p.name == "entropy":
        return EntropyPolicy(edges, num_layers, costs, p.gamma, axes=p.axes)
    policy = GumbelPolicy(
        edges, num_layers, costs, p.probes, p.input, axes=p.axes, steps=p.steps,
        most_density=p.most_density, merge_layers=p.merge_layers, densities=executed_densities(num_blocks),
    )  # fmt: skip
    for name, budget in [("policy.budget", p.budget), *(("policy.budgets", b) for b in p.budgets)]:
        try:
            policy.decode(budget)  # refuses at once what no plan reaches: with policy.cost the cheapest rung may be a dense one
        except ValueError as error:
            raise SettingError(f"{name}: got {budget}, which no plan of this size and these costs meets ({error})") from None
    return policy


def prepare_folder(folder: Path, rank: int = 0) -> None:
    """Make the output folder and prove that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{rank}.{os.getpid()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # the first rank tidies up meanwhile
    except OSError as error:
        raise SettingError(f"output_dir={folder}: cannot be written ({reason_of(error)}); give a folder you may write to") from None


def _latent_shape(pipe, m) -> tuple[int, ...]:
    config = pipe.transformer.config
    check_size(m, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal, sides_of(config))
    channels = getattr(config, "out_channels", None) or config.in_channels  # of what is denoised; conditions add to in_channels
    return channels, *latent_size(pipe, m)
