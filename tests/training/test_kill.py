"""SIGKILL at random moments: before and after steps, in the middle of saves, of validation and of its videos, again and again in one run.

Nothing is lost beyond the last checkpoint, here of every step; from there on losses are bit-equal to a run that nobody killed.
USV_KILLS=12 pytest tests/training/test_kill.py kills that often in each setting instead of twice.
"""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch

KILLS = int(os.environ.get("USV_KILLS", "2"))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])
EVENTS = ("os.replace", "os.fsync", "os.unlink", "torch.save", "usv.sampling.checkpoint.save_file", "usv.video.av.open", "train.step", "train.validate")


def work(config, kill_at: int, out: str) -> None:
    """Train; die at the event of that number, counted over all of EVENTS, before it or in its middle. Losses go to `out` as they are."""
    from importlib import import_module

    torch.set_num_threads(1)
    import train as program

    count = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in EVENTS:
        module, attribute = name.rsplit(".", 1)
        owner = import_module("usv.video").av if module == "usv.video.av" else import_module(module)
        setattr(owner, attribute, dying(getattr(owner, attribute)))
    original = program.log_step

    def log_step(run, record, tracker):
        with open(out, "a") as file:
            file.write(f"{run.step} {record.values['loss/velocity']!r} {record.values['optim/gradient_norm']!r}\n")
        original(run, record, tracker)

    program.log_step = log_step
    program.train(config)
    Path(f"{out}.events").write_text(str(count))
    os._exit(0)


def once(config, kill_at: int, out: Path) -> int:
    process = SERVER.Process(target=work, args=(config, kill_at, str(out)))
    process.start()
    process.join(300)
    return process.exitcode


def rows(out: Path) -> list[tuple]:
    return [(int(step), loss, norm) for step, loss, norm in map(str.split, out.read_text().splitlines())]


@pytest.mark.parametrize("policy, objective", [("gumbel", "velocity"), ("static", "consistency")])
def test_killed_at_random_moments(make, tmp_path, policy, objective):
    def settings(name):
        config = make(tmp_path / name, policy, steps=4, keep=1)
        config.runtime.checkpoint_seconds, config.logger.validate_every = 0.0, 2
        config.objective.name, config.objective.student_timesteps = objective, [] if objective == "velocity" else [1000.0, 500.0]
        return config

    assert once(settings("whole"), -1, tmp_path / "whole.txt") == 0
    whole, total = {step: pair for step, *pair in rows(tmp_path / "whole.txt")}, int((tmp_path / "whole.txt.events").read_text())
    draw, killed, number = random.Random(KILLS), 0, 0
    while killed < KILLS:
        number += 1
        config, out = settings(f"run{number}"), tmp_path / f"run{number}.txt"
        out.write_text("")
        for attempt in range(KILLS + 1):
            last = max((step for step, *_ in rows(out)), default=0)
            begun = len(rows(out))
            code = once(config, draw.randint(1, total) if killed < KILLS else -1, out)
            fresh = rows(out)[begun:]
            assert code in (0, -signal.SIGKILL)
            assert all(whole[step] == pair for step, *pair in fresh), f"attempt {attempt}: another loss"
            assert not fresh or fresh[0][0] >= last, "more than the step that was being saved is lost"
            killed += code != 0
            if code == 0:
                break
        assert code == 0 and max(step for step, *_ in rows(out)) == 4
        left = [p for p in Path(config.output_dir).rglob(".*") if p.name != ".lock"]
        assert not left, f"half-written files stay behind: {left}"
        logged = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "loss/velocity" in line] == [1, 2, 3, 4], "each step once"
    print(f"{killed} kills in {number} runs of {policy}, {objective}: {total} events a run")
