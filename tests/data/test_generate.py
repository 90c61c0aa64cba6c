"""data/generate.py: the latents are the pipeline's own; resume, --append and refusals as of data/prepare.py."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import generate  # noqa: E402
import shards  # noqa: E402

from usv.training.data import ShardDataset  # noqa: E402

PROMPTS = ["a dog runs", "snow falls", "a boat", "a red car"]
SIZE = ["--height", str(tiny.SIZE), "--width", str(tiny.SIZE), "--num-frames", str(tiny.FRAMES), "--fps", "8", "--max-sequence-length", str(tiny.TEXT)]


def words(model, out, prompts=None, *more):
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / "prompts.txt"
    file.write_text("\n".join(prompts or PROMPTS))
    return ["--prompts", str(file), "--model", str(model), "--out", str(out), *SIZE, "--clips", "2", "--shard-size", "3", "--num-inference-steps", "3",
            "--guidance-scale", "4", "--flow-shift", "5", "--batch-size", "2", "--seed", "1", *more]  # fmt: skip


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def taught(tiny_wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "shards"
    assert generate.main(words(tiny_wan, out, None, "--split", "val=0.25")) == 0
    return out


def test_latents_are_those_of_the_pipeline(taught, tiny_wan):
    """Each clip is what WanPipeline samples for its prompt and seed, guided away from the empty prompt; the trainer's reader takes them."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.rope.freqs_cos, pipe.transformer.rope.freqs_sin = (x.float() for x in (pipe.transformer.rope.freqs_cos, pipe.transformer.rope.freqs_sin))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{"flow_shift" if isinstance(pipe.scheduler, UniPCMultistepScheduler) else "shift": 5.0})
    seen = []
    for path in sorted(taught.glob("*.tar")):
        seen += [(path.name, *sample) for sample in shards.read_shard(path)]
    assert sorted(info["caption"] for *_, info in seen) == sorted(2 * PROMPTS) and len({info["seed"] for *_, info in seen}) == 8
    for _, _, tensors, info in (seen[0], seen[-1]):
        whole = pipe(
            info["caption"], "", height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES - 1, num_inference_steps=3, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(info["seed"]), output_type="latent", max_sequence_length=tiny.TEXT,
        ).frames[0]  # fmt: skip
        assert tensors["latents"].dtype == torch.float16 and whole.shape == tensors["latents"].shape
        assert (tensors["latents"].float() - whole).abs().max() < 2e-3 * whole.abs().max()
        with torch.no_grad():
            text = pipe.encode_prompt(info["caption"], do_classifier_free_guidance=False, max_sequence_length=tiny.TEXT)[0][0]
        assert torch.equal(tensors["text"], text[: len(tensors["text"])]) and not text[len(tensors["text"]) :].any()
    split = {name: {info["caption"] for file, _, _, info in seen if file.startswith(name)} for name in ("train", "val")}
    assert len(split["val"]) == 1 and not split["val"] & split["train"]
    index = json.loads((taught / "index.json").read_text())
    assert index["teacher"]["guidance_scale"] == 4.0 and index["teacher"]["transformer"] and "prompts" not in index["teacher"]
    batch = next(iter(ShardDataset(taught, 2, model=tiny_wan, latent_shape=(16, 5, 8, 8), text_length=tiny.TEXT, fps=8)))
    assert batch["latents"].shape == (2, 16, 5, 8, 8) and batch["latents"].std() > 0.1


def test_what_is_missing_is_made_again_to_the_same_bytes(taught, tiny_wan, tmp_path):
    out = tmp_path / "shards"
    shutil.copytree(taught, out)
    before = bytes_of(out)
    for name in ("train-00001.tar", "index.json"):
        (out / name).unlink()
    (out / ".train-00001.tar.1.tmp").write_bytes(b"half")
    assert generate.main(words(tiny_wan, out, None, "--split", "val=0.25")) == 0
    assert bytes_of(out) == before and (out / "index.json").exists() and not list(out.glob(".*.tmp"))


def test_append_adds_prompts_and_touches_no_old_shard(taught, tiny_wan, tmp_path, capsys):
    out = tmp_path / "shards"
    shutil.copytree(taught, out)
    before, longer = bytes_of(out), ["a new one", *PROMPTS[1:], "another"]
    assert generate.main(words(tiny_wan, out, longer, "--split", "val=0.25")) == 1
    said = capsys.readouterr().err
    assert "4 prompts, of which the file now lacks 1 and adds 2" in said and "--append adds what is new" in said and bytes_of(out) == before
    assert generate.main(words(tiny_wan, out, longer, "--split", "val=0.25", "--append")) == 0
    after = bytes_of(out)
    assert {name: after[name] for name in before} == before
    added = [info for name in sorted(set(after) - set(before)) for *_, info in shards.read_shard(out / name)]
    assert sorted({info["caption"] for info in added}) == ["a new one", "another"]
    old = [info["seed"] for name in before for *_, info in shards.read_shard(out / name)]
    assert not set(old) & {info["seed"] for info in added}


@pytest.mark.parametrize(
    "change, said",
    [
        (["--prompts", "{}/none.txt"], "generate: --prompts {}/none.txt: no such file; give a text file with one prompt a line"),
        (["--model", "{}/vae-only"], "generate: --model {}/vae-only lacks"),
        (["--model", "{}/hunyuan"], "generate: --model {}/hunyuan: got a HunyuanVideoPipeline, accepted: a WanPipeline"),
        (["--height", "33"], "generate: --height 33: a multiple of 16 is accepted"),
        (["--guidance-scale", "5"], "generate: {}/shards was begun with teacher ="),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "generate: --engine ray"),
    ],
)
def test_wrong_input_is_one_line(taught, tiny_wan, tmp_path, capsys, monkeypatch, change, said):
    shutil.copytree(taught, tmp_path / "shards")
    if change[1].endswith(("vae-only", "hunyuan")):
        folder = Path(change[1].format(tmp_path))
        shutil.copytree(tiny_wan, folder)
        listed = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**listed, "_class_name": "HunyuanVideoPipeline"}))
        if folder.name == "vae-only":
            shutil.rmtree(folder / "transformer")
    if "ray" in change:
        monkeypatch.setitem(sys.modules, "ray", None)
        (tmp_path / "shards" / "train-00000.tar").unlink()
    more = ["--split", "val=0.25", *(word.format(tmp_path) for word in change)]
    assert generate.main(words(tiny_wan, tmp_path / "shards", None, *more)) == 1
    found = capsys.readouterr().err.strip().splitlines()
    assert found[-1].startswith(said.format(tmp_path)) and not [line for line in found if line.startswith("Traceback")]


def test_a_prompt_goes_on_at_a_line_separator(tmp_path):
    """U+2028, which editors and JSON take for a character of the line."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("# none\r\na cat\u2028sits\r\n\r\na dog\x85runs\n".encode())
    assert generate.prompts_of(file, "") == ["a cat\u2028sits", "a dog\x85runs"]
