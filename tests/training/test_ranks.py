"""Two real processes over gloo: every runtime gives what one process gives, whoever saved a checkpoint anyone resumes it,
a dead process ends the run with a message and loses nothing.

Rounding: two ranks sum a batch's gradient in another order. AdamW's first steps divide it by its own size, so a difference in
the last bits of a gradient near zero becomes a visible share of lr (1e-3) in that weight: losses and gradient norms agree to 1e-5
relative (1e-7 was seen), weights to a twentieth of the distance that lr · steps allows.

What runs here is every runtime with all weights and with adapters, with and without checkpointing, clips whole and divided over ranks,
and distribution matching; what is refused is in tests/training/test_usv_wan.py. On one process checkpointing is in tests/training/test_train.py.
"""

import copy
import faulthandler
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import family_worlds
import pytest
import tiny
import torch
from processes import started
from safetensors.torch import load_file

from usv.config import (
    DataConfig,
    LoggerConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    RuntimeConfig,
    SettingError,
    TrainConfig,
)  # fmt: skip
from usv.sampling.checkpoint import read_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, LR = 6, 1e-3
SLOWLY = -1
os.environ.setdefault("DS_ACCELERATOR", "cpu")
SERVER = multiprocessing.get_context("forkserver")  # imports torch, diffusers and DeepSpeed once, then forks quickly
SERVER.set_forkserver_preload(["train", "deepspeed"])


def settings(model, shards, folder, runtime, steps=STEPS, **more) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder), seed=3,
        model=ModelConfig(str(model), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=2),
        policy=PolicyConfig("gumbel", budget=0.8, bins=2, warm_down=[0.0, 0.4], freeze_at=0.7),
        data=DataConfig(str(shards), drop_text=0.2, validation_clips=2),
        optim=OptimConfig(steps=steps, batch_size=4, lr=LR, warmup=2, weight_decay=0.01),
        runtime=RuntimeConfig(name=runtime, **{"precision": "fp32", "checkpoint_seconds": 1e9, "zero3_persist": 200, **more}),
        logger=LoggerConfig("none", every=1, validate_every=100, videos=False),
    )  # fmt: skip


def work(rank, world, port, config, stop, out):
    """One process: train, and on rank 0 leave the exact losses and gradient norms in `out`."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(f"{out}.{rank}.log", "w", buffering=1)
    faulthandler.dump_traceback_later(200, file=sys.stderr)  # where a process hangs, before the parent gives up
    import train as program
    from usv.training.ranks import RankError, lost_ranks

    seen, original = {}, program.log_step

    def spy(run, record, tracker):
        seen[run.step] = record.values["loss/velocity"], record.values["optim/gradient_norm"]
        original(run, record, tracker)
        if stop == SLOWLY:
            time.sleep(0.3)
        if stop == run.step:
            signal.raise_signal(signal.SIGINT)

    program.log_step = spy
    try:
        with lost_ranks(world):
            program.train(config)
    except RankError as error:
        sys.stdout.write(f"RankError: {error}\n")
        sys.stdout.flush()
        os._exit(3)
    if rank == 0:
        Path(out).write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # no destructors of process groups, which wait for one another


def begin(world, config, stop, out):
    return started(world, work, config, stop, str(out), context=SERVER)


def run(world, config, stop=None):
    """{step: (loss, norm)} of a run that ended well."""
    out = Path(config.output_dir + ".json")
    processes = begin(world, config, stop, out)
    for process in processes:
        process.join(240)
    logs = [Path(f"{out}.{r}.log").read_text()[-3000:] for r in range(world)]
    assert [p.exitcode for p in processes] == [0] * world, "\n".join(logs)
    return {int(step): tuple(pair) for step, pair in json.loads(out.read_text()).items()}


@pytest.fixture(scope="module")
def world(tiny_wan, tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return lambda name, runtime, **more: settings(tiny_wan, tiny_shards, folder / name, runtime, **more)


@pytest.fixture(scope="module")
def reference(world):
    return whole_run(world("reference", "single"))


def whole_run(config):
    """(losses, weights, config.json) of one process."""
    student = config.output_dir + "/student"
    return run(1, config), load_file(student + "/student.safetensors"), read_config(student)


def assert_same(config, losses, reference, first=1):
    whole, weights, record = reference
    assert sorted(losses) == list(range(first, STEPS + 1))
    for step, (loss, norm) in losses.items():
        assert loss == pytest.approx(whole[step][0], rel=1e-5), f"step {step}"
        assert norm == pytest.approx(whole[step][1], rel=1e-5), f"step {step}"
    mine = load_file(config.output_dir + "/student/student.safetensors")
    assert mine.keys() == weights.keys()
    worst = max(float((mine[name] - weights[name]).abs().max()) for name in weights)
    assert worst < LR * STEPS / 20
    assert read_config(config.output_dir + "/student")["plan"] == record["plan"]


@pytest.mark.parametrize("runtime", ["ddp", "zero2", "zero3"])
def test_two_ranks_equal_one(world, reference, runtime):
    config = world(f"two_{runtime}", runtime)
    assert_same(config, run(2, config), reference)


@pytest.mark.parametrize("runtime", ["ddp", "zero2", "zero3"])
def test_a_step_in_parts_on_two_ranks_equals_one(world, reference, runtime):
    """optim.accumulate: of four clips each rank works on its two one after the other."""
    config = world(f"parts_{runtime}", runtime)
    config.optim.accumulate = 2
    assert_same(config, run(2, config), reference)


@pytest.mark.parametrize("runtime", ["ddp", "zero2", "zero3"])
def test_checkpointing_on_two_ranks_changes_nothing(world, reference, runtime):
    """Under zero3 the recomputed forward gathers the weights it needs again."""
    config = world(f"checkpointing_{runtime}", runtime, gradient_checkpointing=True)
    assert_same(config, run(2, config), reference)


@pytest.mark.parametrize("runtime", ["ddp", "zero2", "zero3"])
def test_two_ranks_in_bf16_end_with_videos(world, runtime):
    """The whole of a run, validation's videos with their text encoder included, as on machines that multiply bf16."""
    config = world(f"bf16_{runtime}", runtime, steps=2, precision="bf16")
    config.logger.videos = True
    losses = run(2, config)
    assert all(math.isfinite(x) for pair in losses.values() for x in pair)
    assert len(list(Path(config.output_dir, "validation").glob("step000002_*_student.mp4"))) == 2


def adapted(world, name, runtime, **more):
    config = world(name, runtime, **more)
    config.lora = LoraConfig(rank=4)
    return config


@pytest.fixture(scope="module")
def adapted_reference(world):
    """As `reference`, with adapters."""
    return whole_run(adapted(world, "adapted", "single"))


def test_adapters_learn_also_with_checkpointing(world, adapted_reference):
    config = adapted(world, "adapted_checkpointing", "single", gradient_checkpointing=True)
    assert_same(config, run(1, config), adapted_reference)
    assert any(".lora_B." in name and tensor.abs().max() > 0 for name, tensor in adapted_reference[1].items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("runtime", ["ddp", "zero2"])
def test_adapters_on_two_ranks_equal_one(world, adapted_reference, runtime, checkpointing):
    config = adapted(world, f"adapted_{runtime}_{checkpointing}", runtime, gradient_checkpointing=checkpointing)
    assert_same(config, run(2, config), adapted_reference)


@pytest.mark.parametrize(
    "runtime, ranks, checkpointing", [("ddp", 4, False), ("ddp", 2, True), ("zero2", 2, True), ("zero3", 2, True)]
)
def test_clips_shared_by_two_ranks_equal_one(world, reference, runtime, ranks, checkpointing):
    """Sequence parallelism: of 4 ranks two pairs, each with half of the batch."""
    name = f"shared_{runtime}_{ranks}"
    config = world(name, runtime, sequence_parallel=2, gradient_checkpointing=checkpointing)
    assert_same(config, run(ranks, config), reference)


@pytest.mark.parametrize("runtime", ["ddp", "zero2"])
def test_adapters_on_shared_clips_equal_one(world, adapted_reference, runtime):
    config = adapted(world, f"adapted_shared_{runtime}", runtime, sequence_parallel=2, gradient_checkpointing=True)
    assert_same(config, run(2, config), adapted_reference)


@pytest.fixture(scope="module")
def joint(world, tmp_path_factory):
    """HunyuanVideo, whose text and video attend to each other in two lists of blocks: (the settings' maker, what `reference` gives)."""
    tiny_world = family_worlds.make("hunyuan_video", tmp_path_factory.mktemp("joint"))

    def make(name, runtime, **more):
        config = world(name, runtime, **more)
        config.model, config.data.path = copy.deepcopy(tiny_world.model), str(tiny_world.shards)
        return config

    return make, whole_run(make("joint", "single"))


@pytest.mark.parametrize("runtime, sharing", [("zero2", 1), ("zero2", 2), ("ddp", 2)])
def test_joint_attention_on_two_ranks_equals_one(joint, runtime, sharing):
    make, wanted = joint
    config = make(f"joint_{runtime}_{sharing}", runtime, sequence_parallel=sharing, gradient_checkpointing=sharing > 1)
    assert_same(config, run(2, config), wanted)


@pytest.fixture(scope="module")
def sizes(world, tiny_wan, tiny_shards, tmp_path_factory):
    """Clips of two lengths: (the settings' maker, what `reference` gives)."""
    longer = tiny.save_shards(tmp_path_factory.mktemp("longer") / "shards", tiny_wan, clips=7, seed=2, frames=9)

    def make(name, runtime, **more):
        config = world(name, runtime, **more)
        config.data.mix = {str(tiny_shards): 1.0, str(longer): 1.0}
        return config

    return make, whole_run(make("sizes", "single"))


@pytest.mark.parametrize("runtime, sharing", [("ddp", 2), ("zero3", 1)])
def test_clips_of_two_sizes_on_two_ranks_equal_one(sizes, runtime, sharing):
    make, wanted = sizes
    config = make(f"sizes_{runtime}", runtime, sequence_parallel=sharing)
    assert_same(config, run(2, config), wanted)
    assert "buckets: (16, 5, 8, 8) " in Path(config.output_dir + ".json.0.log").read_text()


def judged(world, name, runtime, **more):
    config = world(name, runtime, **more)
    d = config.objective
    d.name, d.student_timesteps, d.matching_weight, d.critic_updates, d.critic_warmup = "distribution", [1000.0, 600.0], 0.5, 2, 1
    return config


@pytest.fixture(scope="module")
def judged_reference(world):
    """As `reference`, with distribution matching."""
    return whole_run(judged(world, "judged", "single"))


@pytest.mark.parametrize("runtime, sharing", [("ddp", 1), ("ddp", 2), ("zero2", 1), ("zero3", 1)])
def test_distribution_matching_on_two_ranks_equals_one(world, judged_reference, runtime, sharing):
    """Every rank holds the same critic, which learned from the samples of all."""
    config = judged(world, f"judged_{runtime}_{sharing}", runtime, sequence_parallel=sharing)
    assert_same(config, run(2, config), judged_reference)
    mine, whole = (
        torch.load(folder + "/state/trainer.pt", weights_only=True)["objective"]["critic"]["model"]
        for folder in (config.output_dir, str(Path(config.output_dir).parent / "judged"))
    )
    worst = max(float((mine[name] - whole[name]).abs().max()) for name in whole)
    assert worst < config.objective.critic_lr * 2 * (STEPS + 1) / 20


def judged_adapters(world, name, runtime, **more):
    config = judged(world, name, runtime, **more)
    config.lora = LoraConfig(rank=4)
    return config


@pytest.fixture(scope="module")
def judged_adapters_reference(world):
    return whole_run(judged_adapters(world, "judged_adapters", "single"))


@pytest.mark.parametrize(
    "runtime, ranks, sharing, checkpointing", [("single", 1, 1, True), ("ddp", 2, 1, False), ("ddp", 2, 2, True), ("zero2", 2, 1, True)]
)
def test_a_critic_of_adapters_is_the_same_everywhere(world, judged_adapters_reference, runtime, ranks, sharing, checkpointing):
    """Student, teacher and critic on one base; checkpointing runs each one's layers again with its own adapters."""
    more = {"sequence_parallel": sharing, "gradient_checkpointing": checkpointing}
    config = judged_adapters(world, f"judged_adapters_{runtime}_{sharing}", runtime, **more)
    assert_same(config, run(ranks, config), judged_adapters_reference)
    assert not any(".critic." in name for name in judged_adapters_reference[1])


@pytest.mark.parametrize(
    "first, second", [(("zero3", 2), ("single", 1)), (("single", 1), ("zero2", 2)), (("ddp", 2), ("zero3", 2))]
)
def test_any_runtime_resumes_any_other(world, reference, first, second):
    name = f"{first[0]}_{second[0]}"
    early = run(first[1], world(name, first[0]), stop=3)
    config = world(name, second[0])
    late = run(second[1], config)
    assert sorted(early) == [1, 2, 3]
    assert_same(config, late, reference, first=4)


def test_a_dead_rank_ends_the_run_with_a_message_and_loses_nothing(world, reference):
    """Rank 1 killed without warning while a checkpoint follows every step; one process goes on as if nothing had been."""
    config = world("dead", "ddp", checkpoint_seconds=0.0)
    out = Path(config.output_dir + ".json")
    processes = begin(2, config, SLOWLY, out)
    log, deadline = Path(config.output_dir) / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(30)
    if processes[0].is_alive():
        processes[0].kill()
        pytest.fail("rank 0 hangs after rank 1 died")
    said = Path(f"{out}.0.log").read_text()
    assert processes[0].exitcode == 3 and "another of the 2 processes has ended" in said and "resume=auto" in said, (
        said[-2000:]
    )
    config = world("dead", "single")
    late = run(1, config)
    assert 1 < min(late) < STEPS
    assert_same(config, late, reference, first=min(late))


def test_launch_and_settings_must_fit(world, monkeypatch):
    from usv.training.ranks import start

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="runtime.name: got single on 2 processes, accepted: ddp"):
        start(world("x", "single"))
    config = world("x", "ddp")
    config.optim.batch_size = 3
    with pytest.raises(SettingError, match="optim.batch_size: got 3, accepted: multiples of the 2 processes"):
        start(config)
    with pytest.raises(SettingError, match="runtime.sequence_parallel: got 3 on 2 processes, accepted: divisors of 2"):
        start(world("x", "ddp", sequence_parallel=3))
