"""Image to video is trained as it is sampled: data/prepare.py, train.py and the pipeline on tiny random models of Wan 2.1's kinds (CLIP's
image encoder, first and last frame) and Wan 2.2's (no encoder; the first frame given by its timestep)."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import camera_motion
import diffusers
import pytest
import tiny
import torch
from PIL import Image
from runs import interrupt, same, settings

import usv
from usv.config import InferConfig, SettingError
from usv.models import forward
from usv.sampling.checkpoint import CheckpointError, load_student
from usv.sampling.export import export, export_file
from usv.sampling.generate import generate, load_pipeline
from usv.sampling.sampler import StudentScheduler
from usv.sparse import plan as plans
from usv.sparse.plan import Rung, SparsityPlan
from usv.training.data import ShardDataset
from usv.training.remote import DataError
from usv.training.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import infer  # noqa: E402

TRAINED = ["wan21_i2v", "wan22_i2v", "wan22_ti2v"]


class World:
    """A model folder, its shards, and settings of runs on them."""

    def __init__(self, folder, name):
        self.name, self.folder, self.length = name, folder, tiny.IMAGE_MODELS[name][2]
        self.model = tiny.save_image_model(folder / "model", name)
        self.shards = tiny.save_image_shards(folder / "shards", self.model, name)

    def config(self, run, steps=3, videos=False):
        config = settings(self.model, self.shards, self.folder / run, steps=steps)
        config.model = replace(config.model, height=tiny.IMAGE_SIZE, width=tiny.IMAGE_SIZE, num_frames=tiny.IMAGE_FRAMES, max_sequence_length=self.length,
                               tile=[1, 2, 2], guidance_scale=2.0)  # fmt: skip
        config.logger.validate_every, config.logger.videos, config.data.drop_text = 3, videos, 0.0
        return config

    def frames(self, clip):
        """(T, 3, H, W) uint8 of CameraMotion's clip."""
        return camera_motion.sample_clip(clip, 1, tiny.IMAGE_FRAMES, tiny.IMAGE_SIZE).frames

    def images(self, clip):
        """What the pipeline is given of it."""
        names = ("image", "last_image") if self.name == "wan21_flf2v" else ("image",)
        return {name: Image.fromarray(self.frames(clip)[i].permute(1, 2, 0).numpy()) for name, i in zip(names, (0, -1))}

    def call(self, clip=0, **more):
        return {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE, "num_frames": tiny.IMAGE_FRAMES, "guidance_scale": 1.0, "num_inference_steps": 2,
                "max_sequence_length": self.length, "output_type": "latent", "prompt": "a cat", "generator": torch.Generator().manual_seed(3),
                **self.images(clip), **more}  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}
    return lambda name: made.setdefault(name, None) or made.update({name: World(tmp_path_factory.mktemp(name), name)}) or made[name]


@pytest.mark.parametrize("name", tiny.IMAGE_MODELS)
def test_training_feeds_what_the_pipeline_feeds(name, worlds, watched, monkeypatch):
    """The student's inputs in a step of train.py against those of the stock pipeline for the same frame, caption, noise and timestep: bit
    for bit, but for what shards round to fp16."""
    world, seen, taught, batches = worlds(name), [], [], []
    run_forward, clips = forward.run_forward, Run.clips

    def spy(transformer, gates, tile, arguments, *args, **kwargs):
        if torch.is_grad_enabled() or not taught:
            (seen if torch.is_grad_enabled() else taught).append({k: v.detach().clone() for k, v in arguments.items() if torch.is_tensor(v)})
        return run_forward(transformer, gates, tile, arguments, *args, **kwargs)

    monkeypatch.setattr(forward, "run_forward", spy)
    monkeypatch.setattr(Run, "clips", lambda run, batch: batches.append(batch) or clips(run, batch))
    watched(world.config("inputs", steps=1, videos=True))
    assert len(list((world.folder / "inputs" / "validation").glob("*student.mp4"))) == 2
    [trained], [teacher], data = seen, taught, ShardDataset(world.shards, 1)
    for key, value in trained.items():  # both of the teacher's branches, but for the text
        assert key == "encoder_hidden_states" or torch.equal(teacher[key], torch.cat([value, value])), key

    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(world.model)
    pipe.set_progress_bar_config(disable=True)
    fed = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs), with_kwargs=True)
    for row, index in enumerate(batches[0]["index"].tolist()):
        info = data.sample(index)[2]
        level, noisy = trained["timestep"][row].max(), trained["hidden_states"][row : row + 1, :4]
        pipe.scheduler = StudentScheduler([1000.0])
        pipe.scheduler.set_timesteps = lambda *args, level=level, **kwargs: setattr(pipe.scheduler, "timesteps", level[None])
        pipe(**world.call(info["clip"], prompt=info["caption"], num_inference_steps=1, latents=noisy))
        given = fed.pop()
        wanted, image = given["hidden_states"][0], (slice(None), slice(1)) if name == "wan22_ti2v" else slice(4, None)
        wanted[image] = wanted[image].half().float()
        assert torch.equal(trained["hidden_states"][row], wanted)
        assert torch.equal(trained["timestep"][row], given["timestep"][0])
        torch.testing.assert_close(trained["encoder_hidden_states"][row], given["encoder_hidden_states"][0], rtol=1e-5, atol=1e-6)
        images = given["encoder_hidden_states_image"]
        assert (images is None) == ("encoder_hidden_states_image" not in trained)
        if images is not None:
            count = len(images)
            assert torch.equal(trained["encoder_hidden_states_image"][count * row : count * (row + 1)], images.half().float())


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_resume_enable(name, worlds, watched, monkeypatch):
    """Merging and pruning under the learned policy. Then in the pipeline: with every block the student's weights give what they give
    densely, and half of the blocks something else, but for a first frame that is given."""
    world = worlds(name)
    whole, weights, record = watched(world.config("whole"))
    assert len(whole) == 3 and all(loss > 0 for loss, _ in whole.values()) and record["sampling"]["image"] is True
    first, _, _ = watched(world.config("halved"), {2: interrupt})
    rest, resumed, again = watched(world.config("halved"))
    assert {**first, **rest} == whole and same(weights, resumed) and again["plan"] == record["plan"]

    pipe = load_pipeline(str(world.model))
    student, base = load_student(world.folder / "halved" / "student", pipe.transformer), pipe.transformer
    for gate in student.model.gates:
        torch.nn.init.zeros_(gate.weight), torch.nn.init.zeros_(gate.bias)
    pipe.transformer = student.model.transformer
    dense = pipe(**world.call()).frames
    pipe.transformer = base
    made = {}
    for rung in (Rung(1, 0), Rung(1, 1)):
        with monkeypatch.context() as patch:
            if rung.merge == 0:
                patch.setattr(plans, "DENSITY_LADDER", (1.0,) * 6)  # the sparse path with every block
            usv.enable(pipe, replace(student, plan=SparsityPlan.uniform(rung, (1000.0,), 2)))
            made[rung] = pipe(**world.call()).frames
            assert (pipe._usv.record.mean_density() == 1) == (rung.merge == 0)
    every, half = made.values()
    torch.testing.assert_close(every, dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    decoded = [pipe.vae.decode(latents).sample for latents in (every, dense, half)]
    torch.testing.assert_close(decoded[0][:, :, 0], decoded[1][:, :, 0], rtol=0, atol=1e-5)
    assert float((half - dense).abs().max()) > 1e-3
    assert torch.equal(half[:, :, 0], dense[:, :, 0]) == (name == "wan22_ti2v")
    usv.disable(pipe)
    assert pipe.transformer is base

    export(world.folder / "halved" / "student", str(world.model), world.folder / "exported")
    export_file(world.folder / "halved" / "student", str(world.model), world.folder / "one.safetensors")
    exported = diffusers.WanImageToVideoPipeline.from_pretrained(world.folder / "exported")
    exported.set_progress_bar_config(disable=True)
    own, folder, one = (usv.enable(p, world.folder / c)(**world.call()).frames for p, c in ((pipe, "halved/student"), (exported, "exported"), (pipe, "one.safetensors")))
    assert torch.equal(own, folder) and torch.equal(own, one)


@pytest.mark.parametrize("name", TRAINED)
def test_another_image_changes_the_students_velocity(name, worlds):
    world = worlds(name)
    pipe = load_pipeline(str(world.model))
    model = forward.SparseTransformer(copy.deepcopy(pipe.transformer), forward.Tile(1, 2, 2))
    names = json.loads((world.shards / "index.json").read_text())["conditions"]
    batch = next(iter(ShardDataset(world.shards, 2, conditions=list(names))))
    assert list(batch["conditions"]) == list(names) == ["image_embeds", "image_latents"][name != "wan21_i2v" :]
    ask = lambda conditions: model(batch["latents"], torch.tensor([900.0, 900.0]), batch["text"], [Rung(1, 1)] * 2, **conditions)[0].detach()  # noqa: E731
    own = ask(batch["conditions"])
    if name == "wan21_i2v":
        for missing in names:
            with pytest.raises(ValueError, match=f"^{missing}: got none for a transformer of 12 channels beside latents of 4"):
                ask({other: value for other, value in batch["conditions"].items() if other != missing})
    for changed in names:
        other = ask({**batch["conditions"], changed: batch["conditions"][changed].flip(0)})
        assert float((other - own).abs().max()) > 1e-4 * float(own.abs().max()), changed
    if name == "wan22_ti2v":
        torch.testing.assert_close(batch["conditions"]["image_latents"], batch["latents"][:, :, :1], rtol=1e-3, atol=1e-3)
        assert not own[:, :, 0].any() and own[:, :, 1:].any()


@pytest.mark.parametrize("objective, lora", [("consistency", 0), ("trajectory", 0), ("distribution", 2)])
def test_few_steps(objective, lora, worlds, watched):
    """Each objective passes the conditions on (the transformer takes no latents without them), and its student runs in the pipeline."""
    world = worlds("wan22_i2v")
    config = world.config(objective, steps=2)
    config.objective = replace(config.objective, name=objective, student_timesteps=[1000.0, 500.0], solver_steps=2, critic_warmup=1, critic_updates=1)
    config.policy = replace(config.policy, name="static", warm_down=[0.0, 0.0], budget=0.9)
    config.optim.accumulate = 2 if objective == "trajectory" else 1
    config.lora.rank, config.logger.validate_every = lora, 2
    losses, _, record = watched(config)
    assert len(losses) == 2 and record["sampling"]["student_timesteps"] == [1000.0, 500.0]
    pipe = usv.enable(load_pipeline(str(world.model)), world.folder / objective / "student")
    call = world.call()
    del call["num_inference_steps"]
    one, other = (pipe(**{**call, **world.images(clip), "generator": torch.Generator().manual_seed(0)}).frames for clip in (0, 3))
    assert pipe._usv.record.forwards == 4 and one.isfinite().all() and float((one - other).abs().max()) > 1e-3


def test_what_does_not_fit_is_refused_in_one_line(worlds, watched, tiny_wan, tiny_shards, tmp_path):
    world, by_timestep, encoded = worlds("wan22_i2v"), worlds("wan22_ti2v"), worlds("wan21_i2v")
    config = world.config("refused")
    config.data.path = str(tiny_shards)
    config.model.max_sequence_length = tiny.TEXT
    with pytest.raises(DataError, match="image_latents, which this run's model is given"):
        watched(config)
    config = encoded.config("refused")
    config.model.max_sequence_length = 64
    with pytest.raises(SettingError, match="max_sequence_length: got 64, accepted: 512"):
        watched(config)
    config = by_timestep.config("refused")
    config.objective.name = "consistency"
    with pytest.raises(SettingError, match="objective: got consistency .* accepted: velocity"):
        watched(config)
    pipes = {w.name: load_pipeline(str(w.model)) for w in (world, by_timestep)}
    text = diffusers.WanPipeline(**{k: v for k, v in pipes["wan22_ti2v"].components.items() if not k.startswith("image")}, expand_timesteps=True)
    student = usv_student(pipes["wan22_i2v"].transformer, True)
    with pytest.raises(CheckpointError, match="made for another model \\(in_channels: 12 against 4"):
        usv.enable(text, student)
    with pytest.raises(CheckpointError, match="made for another model \\(in_channels: 4 against 12"):
        usv.enable(pipes["wan22_i2v"], usv_student(text.transformer, False))
    with pytest.raises(CheckpointError, match="got a student of image to video for a WanPipeline, accepted: one of text to video"):
        usv.enable(text, usv_student(text.transformer, True))
    with pytest.raises(CheckpointError, match="got a student of text to video for a WanImageToVideoPipeline, accepted: one of image to video"):
        usv.enable(usv.enable(pipes["wan22_ti2v"], usv_student(text.transformer, True)), usv_student(text.transformer, False))
    import prepare

    with pytest.raises(ValueError, match="--max-sequence-length 16: 512 is accepted"):
        prepare.run(prepare.Settings(encoded.model, tmp_path / "out", 64, 64, 9, 8, camera_motion=1, max_sequence_length=16))


def usv_student(transformer, image):
    from usv.sampling.checkpoint import Student

    model = forward.SparseTransformer(copy.deepcopy(transformer), forward.Tile(1, 2, 2)).eval().requires_grad_(False)
    return Student(model, SparsityPlan.uniform(Rung(1, 0), (1000.0,), 2), {"image": image})


def test_infer_takes_an_image(worlds, tiny_wan, tmp_path):
    """Also: an image of another shape is cut to its middle, another image makes another file, and what is missing or too much is said."""
    world, files = worlds("wan22_i2v"), []
    config = InferConfig(model=replace(world.config("x").model, num_inference_steps=1), prompt="a cat", output_dir=str(tmp_path / "videos"))
    for clip in (0, 3):
        path = tmp_path / f"{clip}.png"
        wide = Image.new("RGB", (3 * tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), "red")
        wide.paste(world.images(clip)["image"], (tiny.IMAGE_SIZE, 0))
        wide.save(path)
        report = infer.run(replace(config, image=str(path)))
        files += [video["path"] for video in report["videos"]]
        assert infer.read_images(replace(config, image=str(path)))[0].tobytes() == world.images(clip)["image"].tobytes()
    assert len(set(files)) == 2 and Path(files[0]).read_bytes() != Path(files[1]).read_bytes()
    with pytest.raises(SettingError, match="image, last_image: got none for a WanImageToVideoPipeline .* accepted: the first frame or the first and"):
        infer.run(config)
    with pytest.raises(SettingError, match="last_image: got b.png without image"):
        infer.run(replace(config, last_image="b.png"))
    with pytest.raises(SettingError, match="image=.*no.png: cannot be read"):
        infer.run(replace(config, image=str(tmp_path / "no.png")))
    with pytest.raises(SettingError, match="got the first frame for a WanPipeline .* accepted: none"):
        infer.run(replace(config, image=str(tmp_path / "0.png"), model=replace(config.model, path=str(tiny_wan))))


def test_validation_is_of_the_prepared_frame(worlds):
    """What `generate` makes of a shard's conditions is what the pipeline makes of the picture, to the rounding of shards."""
    world = worlds("wan21_i2v")
    pipe, model = load_pipeline(str(world.model)), replace(world.config("x").model, num_inference_steps=2)
    batch = next(iter(ShardDataset(world.shards, 1, shuffle=False, conditions=["image_latents", "image_embeds"])))
    clip = ShardDataset(world.shards, 1, shuffle=False).sample(0)[2]["clip"]
    told, shown = (generate(pipe, model, batch["captions"], [5], **given).videos for given in ({"conditions": batch["conditions"]}, {"images": list(world.images(clip).values())}))
    torch.testing.assert_close(told, shown, rtol=0, atol=2e-3)
    assert "prepare_latents" not in vars(pipe) and "encode_image" not in vars(pipe)
