"""conf/ and usv/config.py: every file composes into the types, and a wrong word is answered with the nearest right one."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from usv import config as settings
from usv.bounds import LISTS, leaves, range_of
from usv.config import (
    InferConfig,
    SettingError,
    TrainConfig,
    check_numbers,
    check_overrides,
    check_train,
    config_groups,
    keys_of,
    typed,
)
from usv.objectives import check_objective

ROOT = Path(__file__).resolve().parents[1]
GROUPS = config_groups(ROOT / "conf")
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices]


@pytest.fixture(scope="module", autouse=True)
def hydra():
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="infer_schema", node=InferConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def train(*overrides) -> TrainConfig:
    return typed(compose("train", list(overrides)), TrainConfig)


def test_the_default_is_the_main_job():
    config = train()
    assert config.experiment == "usv_mini" and config.model.path == "data/wan-mini" and config.policy.name == "gumbel"
    check_train(config)


def test_infer_composes():
    config = typed(compose("infer", ["ckpt=x", 'prompt="a cat, the camera pans left"']), InferConfig)
    assert config.ckpt == "x" and config.prompt == "a cat, the camera pans left"
    assert config.model == train().model  # what was trained is what is run


@pytest.mark.parametrize("group, choice", CHOICES)
def test_every_choice_composes_and_types(group, choice):
    """Every file under conf/, alone over the default; its values arrive."""
    import yaml

    needed = ["objective.init=my_student"] if choice == "inherit" else []  # a plan is inherited from somewhere
    config = train(f"{group}={choice}", *needed)
    check_train(config)
    check_objective(config)
    for key, value in (yaml.safe_load((ROOT / "conf" / group / f"{choice}.yaml").read_text()) or {}).items():
        if group != "experiment" and key != "defaults":
            arrived = getattr(getattr(config, group), key)
            if isinstance(value, dict) and not isinstance(arrived, dict):
                arrived = {name: getattr(arrived, name) for name in value}
            assert arrived == value
    if group == "experiment":
        assert config.experiment == choice


def test_groups_are_fields_of_the_schema():
    assert set(GROUPS) <= {f.name for f in fields(TrainConfig)}
    assert set(GROUPS) == {"attention", "data", "objective", "experiment", "logger", "model", "optim", "policy", "runtime"}


def test_every_setting_can_be_overridden():
    """No key is swallowed: changing a leaf changes that leaf."""
    changed = train("optim.lr=0.125", "policy.budget=0.5", "model.tile=[1,2,3]", "logger=none", "seed=3", "policy=static")
    assert (changed.optim.lr, changed.policy.budget, changed.model.tile) == (0.125, 0.5, [1, 2, 3])
    assert (changed.logger.name, changed.seed, changed.policy.name) == ("none", 3, "static")


def test_keys_are_all_leaves_and_groups():
    keys = keys_of(TrainConfig)
    assert {"seed", "policy", "policy.budget", "model.tile", "runtime.resume"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert sum(1 for f in fields(TrainConfig)) == sum(1 for k in keys if "." not in k)


@pytest.mark.parametrize(
    "argument, nearest",
    [
        ("policy.budgett=0.3", "'policy.budget'"),
        ("optim.step=10", "'optim.steps'"),
        ("sed=1", "'seed'"),
        ("modle.height=96", "'model.height'"),
        ("runtime.resme=never", "'runtime.resume'"),
        ("+policy.gama=2", "'policy.gamma'"),
    ],
)
def test_unknown_key_names_the_nearest(argument, nearest):
    with pytest.raises(SettingError) as caught:
        check_overrides([argument], TrainConfig, GROUPS)
    assert nearest in str(caught.value) and argument in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argument, nearest",
    [("policy=gumble", "policy=gumbel"), ("experiment=usv_mni", "experiment=usv_mini"), ("model=wan-mini", "model=wan_mini"), ("logger=wandbb", "logger=wandb")],
)
def test_unknown_choice_names_the_nearest_and_all(argument, nearest):
    with pytest.raises(SettingError) as caught:
        check_overrides([argument], TrainConfig, GROUPS)
    group = argument.split("=")[0]
    assert nearest in str(caught.value) and all(choice in str(caught.value) for choice in GROUPS[group])


@pytest.mark.parametrize(
    ("argument", "new"),
    [
        ("distill=trajectory", "objective=trajectory"),
        ("distill=few_step", "objective=distribution"),
        ("distill.init=outputs/x", "objective.init=outputs/x"),
        ("+distill.guide=teacher", "objective.guide=teacher"),
        ("distill.distribution=0.5", "objective=distribution objective.matching_weight=0.5"),
    ],
)
def test_the_old_name_of_the_objective_is_refused_with_the_new(argument, new):
    with pytest.raises(SettingError) as caught:
        check_overrides([argument], TrainConfig, GROUPS)
    assert str(caught.value).endswith(f"is called objective now; write {new}")


def test_the_old_name_in_a_file_is_refused_with_the_new():
    from omegaconf import OmegaConf

    with pytest.raises(SettingError, match="distill: is called objective now"):
        typed(OmegaConf.create({"distill": {"name": "trajectory"}}), TrainConfig)


@pytest.mark.parametrize(
    "arguments",
    [["policy=static", "optim.steps=3"], ["--cfg", "job"], ["hydra.verbose=true"], ["experiment=usv_mini"], ["+seed=1"], ["output_dir=a=b"]],
)
def test_right_arguments_pass(arguments):
    check_overrides(arguments, TrainConfig, GROUPS)


def test_inference_has_its_own_keys():
    check_overrides(["ckpt=x", "prompts=y", "compare=true"], InferConfig, GROUPS)
    with pytest.raises(SettingError, match="did you mean 'prompts?'"):
        check_overrides(["promt=x"], InferConfig, GROUPS)
    with pytest.raises(SettingError):
        check_overrides(["optim.steps=3"], InferConfig, GROUPS)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("policy.name", "other"), ("policy.budget", 0.0), ("policy.budget", 1.5), ("policy.budget", -0.1), ("policy.bins", 0),
        ("policy.freeze_at", 0.0), ("policy.freeze_at", 1.1), ("policy.input", "clip"), ("policy.budgets", [0.3]), ("policy.budgets", [0.4, 0.2]), ("model.cell", [1, 1, 1]),
        ("policy.warm_down", [0.1]), ("policy.warm_down", [0.5, 0.1]), ("policy.warm_down", [-0.1, 0.5]), ("optim.steps", 0),
        ("optim.batch_size", 0), ("model.tile", [4, 4]), ("model.tile", [4, 0, 4]), ("runtime.precision", "fp16"),
        ("logger.name", "tensorboard"), ("logger.mode", "on"), ("logger.every", 0), ("logger.validate_every", 0),
        ("attention.impl", "flash"), ("data.validation_clips", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(setting, value):
    config = train()
    owner, name = config, setting
    while "." in name:
        first, name = name.split(".", 1)
        owner = getattr(owner, first)
    setattr(owner, name, value)
    with pytest.raises(SettingError) as caught:
        check_train(config)
    assert str(caught.value).startswith(f"{setting}: got {value}, accepted: ")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"policy.bins": 1}, "policy.bins: got 1, accepted: at least 2 with policy.steps"),
        ({"objective.name": "distribution"}, "objective.name: got distribution, accepted: consistency with policy.steps"),
        ({"policy.axes": ["merge"]}, "policy.most_density: got 0.25, accepted: 1 where policy.axes leave density alone"),
    ],
)
def test_what_learned_steps_do_not_go_with(changes, refusal):
    config = train("experiment=usv_learned_steps")
    check_train(config)
    for name, value in changes.items():
        owner, key = name.split(".")
        setattr(getattr(config, owner), key, value)
    with pytest.raises(SettingError, match=f"^{refusal}"):
        check_train(config)
        check_objective(config)


def test_wrong_type_is_one_line():
    from omegaconf import OmegaConf

    with pytest.raises(SettingError) as caught:
        typed(OmegaConf.create({"optim": {"steps": "many"}}), TrainConfig)
    assert "many" in str(caught.value) and "\n" not in str(caught.value)


def test_schema_documents_itself():
    for name in dir(settings):
        kind = getattr(settings, name)
        if is_dataclass(kind):
            assert kind.__doc__ and not kind.__doc__.startswith(f"{name}(")


# ---- every number, every name ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def put(config, setting, value):
    owner, _, name = setting.rpartition(".")
    for part in filter(None, owner.split(".")):
        config = getattr(config, part)
    setattr(config, name, value)


@pytest.mark.parametrize("schema", [TrainConfig, InferConfig])
def test_every_number_has_a_range_that_refuses_what_is_none(schema):
    """A new number without a range fails here; NaN, infinity and absurd sizes are refused by the setting's name."""
    numbers = [name for name, value in leaves(schema()) if isinstance(value, int | float) and not isinstance(value, bool)]
    numbers += ["fps"] if schema is InferConfig else ["runtime.threads", "policy.merge_layers", "model.codec.patch_size"]  # None: theirs to choose
    for name in numbers:
        assert range_of(name) is not None, f"say in usv/bounds.py which values {name} may have"
        for value in (NAN, INF, -INF, 10**40, -(10**40), -7):
            config = schema()
            put(config, name, value)
            with pytest.raises(SettingError, match=f"^{name}: got .*, accepted: (from|above) "):
                check_numbers(config)


def test_every_list_of_numbers_has_a_range():
    for name, value in leaves(TrainConfig()):
        # options of a pattern and arguments of a transformer's class are of any kind: who takes them checks them
        if isinstance(value, list | dict) and all(isinstance(v, int | float) for v in value) and name not in ("attention.options", "model.numbers"):
            assert range_of(name, LISTS) is not None, name
            for wrong in ([NAN] * max(1, len(value)), [-1.0] * 3, [0.5] * 10_001):
                config = TrainConfig()
                put(config, name, dict(enumerate(wrong)) if isinstance(value, dict) else wrong)
                with pytest.raises(SettingError, match=f"^{name}: got "):
                    check_numbers(config)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("optim.grad_clip", 0.0), ("optim.grad_clip", -1.0), ("optim.betas", [0.9]), ("optim.betas", [0.9, 1.0]), ("optim.ema", 1.5), ("optim.ema", 1.0),
        ("lora.alpha", 0.0), ("optim.warmup", -5), ("optim.lr", -1e-3), ("model.flow_shift", 0.0), ("model.height", -96), ("model.height", 0),
        ("dry_run_devices", 0), ("dry_run_utilisation", 0.0), ("model.tile", [1000, 1000, 1000]), ("model.fps", 0), ("objective.critic_updates", 0),
        ("output_dir", ""), ("output_dir", " "), ("model.path", ""), ("data.path", ""), ("runtime.resume", ""), ("data.mix", {"a": NAN}),
        ("seed", -1), ("model.num_inference_steps", 0), ("data.drop_text", 1.5), ("policy.gamma", 0.0), ("model.boundary", 1.0),
    ],
)  # fmt: skip
def test_what_trains_nothing_or_the_wrong_way_is_refused(setting, value):
    config = TrainConfig()
    put(config, setting, value)
    with pytest.raises(SettingError, match=f"^{setting}: got .*, accepted: "):
        check_train(config)
