"""Shards that are missing, damaged, of another model, or changed by accident or by strangers: refused by name."""

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import shards
from shard_folders import LENGTH, SHAPE, WIDTH, make_folder, same, take
from strange import altered

from usv.training.data import DataError, ShardDataset
from usv.training.shards import model_identity


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "clips")


def test_missing_empty_and_unfinished_folders(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder or shard"):
        ShardDataset(tmp_path / "nowhere", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shards and no index.json; run data/prepare.py"):
        ShardDataset(tmp_path / "empty", 4)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="3 shards but no index.json: preparing was not finished"):
        ShardDataset(folder, 4)
    make_folder(tmp_path / "none", counts=(0,))
    with pytest.raises(DataError, match="no samples"):
        ShardDataset(tmp_path / "none", 4)


def test_unknown_split_small_data_and_bad_arguments(folder):
    with pytest.raises(DataError, match=r"no split 'val', only \['train'\]"):
        ShardDataset(folder, 4, split="val")
    with pytest.raises(DataError, match="make no batch of 8 x 2 ranks"):
        ShardDataset(folder, 8, world_size=2, repeat=False)
    with pytest.raises(DataError, match="0 <= rank < world_size"):
        ShardDataset(folder, 4, rank=2, world_size=2)
    with pytest.raises(DataError, match="drop_text is 10"):
        ShardDataset(folder, 4, drop_text=10)


def test_damaged_shards_are_named(folder):
    path = folder / "train-00001.tar"
    whole = path.read_bytes()

    def read():
        dataset = ShardDataset(folder, 14)
        return take(dataset, 1)

    damages = {
        "cut": whole[: len(whole) // 2],
        "garbage": b"\xff" * len(whole),
        "empty": b"",
        "tensors": whole.replace(b"latents", b"lat\x00nts"),
        "html": b"<html>not found</html>" * 100,
    }
    for name, damaged in damages.items():
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-00001\.tar.*delete that file and run") as error:
            read()
        assert "train-00000" not in str(error.value), name
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.tar is listed in index.json but is not there"):
        read()
    path.write_bytes(whole)
    read()


def test_a_shard_that_was_packed_anew_is_read(folder):
    """By `tar cf new.tar .`, and by macOS, which adds a file of its own to each; what is no sample is passed over."""
    before = take(ShardDataset(folder, 4, shuffle=False, drop_text=0.0), 2)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as old:
            members = [(m.name, old.extractfile(m).read()) for m in old]
        with tarfile.open(path, "w") as new:
            root = tarfile.TarInfo(".")
            root.type = tarfile.DIRTYPE
            new.addfile(root)
            for name, data in [("README.md", b"mine"), *members]:
                for inside, content in ((f"./._{name}", b"mac"), (f"./{name}", data)):
                    member = tarfile.TarInfo(inside)
                    member.size = len(content)
                    new.addfile(member, io.BytesIO(content))
    assert same(before, take(ShardDataset(folder, 4, shuffle=False, drop_text=0.0), 2))


def test_wrong_count_shape_and_index(folder, tmp_path):
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"]["shards"]["train-00000.tar"] = 6
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="5 samples where index.json says 6"):
        take(ShardDataset(folder, 15), 1)
    with pytest.raises(DataError, match=r"has latents \(4, 3, 2, 2\), index.json says \(4, 3, 2, 9\)"):
        take(ShardDataset(make_folder(tmp_path / "other", latent_shape=[4, 3, 2, 9]), 4), 1)
    with pytest.raises(DataError, match="holds latents .* this run needs"):
        ShardDataset(folder, 4, latent_shape=(16, 9, 24, 24))
    with pytest.raises(DataError, match="format 99"):
        ShardDataset(make_folder(tmp_path / "future", format=99), 4)
    with pytest.raises(DataError, match="cannot be mixed: max_sequence_length is 6 in one and 7"):
        ShardDataset([folder, make_folder(tmp_path / "long", max_sequence_length=7)], 4)


def test_another_model_is_refused(tmp_path):
    model = tmp_path / "model"
    for part in ("vae", "text_encoder", "tokenizer"):
        (model / part).mkdir(parents=True)
    (model / "vae" / "config.json").write_text(json.dumps({"latents_std": [1.0, 2.0], "_diffusers_version": "1"}))
    (model / "text_encoder" / "config.json").write_text("{}")
    weights = model / "text_encoder" / "model.safetensors"
    save_file({"w": torch.zeros(4)}, weights)
    identity = model_identity(model)
    folder = make_folder(tmp_path / "clips", model={"name": "model", **identity})
    ShardDataset(folder, 4, model=model)
    (model / "vae" / "config.json").write_text(json.dumps({"latents_std": [1.0, 2.0], "_diffusers_version": "2"}))
    ShardDataset(folder, 4, model=model)  # the version that wrote a config is not the model
    save_file({"w": torch.ones(4)}, weights)
    with pytest.raises(DataError, match="its text_encoder differ.*prepare the data again with --model"):
        ShardDataset(folder, 4, model=model)
    (model / "vae" / "config.json").write_text(json.dumps({"latents_std": [1.0, 3.0]}))
    with pytest.raises(DataError, match="its vae and text_encoder differ"):
        ShardDataset(folder, 4, model=model)


def rewritten(folder, change, name="train-00000.tar"):
    """The folder's first shard with each sample's (tensors, info) as `change` gives them."""
    samples = [(key, *change(dict(tensors), dict(info))) for key, tensors, info in shards.read_shard(folder / name)]
    shards.write_shard(folder / name, samples, report={"skipped": []})
    return folder


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, i: (t | {"latents": t["latents"].to(torch.int8)}, i), "latents of torch.int8"),
        (lambda t, i: (t | {"latents": t["latents"] > 0}, i), "latents of torch.bool"),
        (lambda t, i: (t | {"latents": t["latents"].to(torch.complex64)}, i), "latents of torch.complex64"),
        (lambda t, i: (t | {"latents": t["latents"].double()}, i), "latents of torch.float64"),
        (lambda t, i: (t | {"latents": t["latents"] * float("nan")}, i), "latents that are not finite"),
        (lambda t, i: (t | {"text": t["text"] * float("inf")}, i), "text that are not finite"),
        (lambda t, i: (t | {"text": t["text"].long()}, i), "text of torch.int64"),
        (lambda t, i: (t | {"text": t["text"][0]}, i), "lacks text embeddings"),
        (lambda t, i: (t | {"text": torch.ones(LENGTH + 1, WIDTH)}, i), "text of 7 tokens"),
        (lambda t, i: (t, i | {"caption": None}), "has no caption"),
        (lambda t, i: (t, i | {"caption": 7}), "has no caption"),
        (lambda t, i: ({"latents": t["latents"]}, i), "lacks text embeddings"),
    ],
)
def test_a_sample_that_is_none_is_refused(folder, change, said):
    with pytest.raises(DataError, match=rf"train-00000.tar: sample \d .*{said}") as caught:
        take(ShardDataset(rewritten(folder, change), 14, drop_text=0.0), 1)
    assert "\n" not in str(caught.value)


def test_text_length_and_fps_are_compared_as_sizes_are(tmp_path):
    folder = make_folder(tmp_path / "clips", fps=8)
    ShardDataset(folder, 4, text_length=LENGTH, fps=8)
    with pytest.raises(DataError, match="captions of at most so many tokens: 6, this run needs 512.*model.max_sequence_length"):
        ShardDataset(folder, 4, text_length=512)
    with pytest.raises(DataError, match="frames a second: 8, this run needs 16.*model.fps"):
        ShardDataset(folder, 4, fps=16)
    folder = make_folder(tmp_path / "film", fps=23.976)  # a run names whole ones
    ShardDataset(folder, 4, fps=24), ShardDataset(folder, 4, fps=23.976)
    with pytest.raises(DataError, match="frames a second: 24, this run needs 16"):
        ShardDataset(folder, 4, fps=16)


@pytest.mark.parametrize("written", [{}, {"name": "m"}, {"vae": None, "text_encoder": "t"}])
def test_an_index_that_does_not_say_its_model_is_refused(tmp_path, written):
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    (model / "vae" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="does not say which vae it was written with"):
        ShardDataset(make_folder(tmp_path / "clips", model=written), 4, model=model)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/secret.tar", "a/b.tar", "secret.bin", "..\\x.tar", ""])
def test_an_index_names_shards_of_its_own_folder_only(tmp_path, name):
    make_folder(tmp_path, (2,))
    (tmp_path / "train-00000.tar").rename(tmp_path / "secret.tar")
    with pytest.raises(DataError, match="it names the shard"):
        ShardDataset(make_folder(tmp_path / "clips", splits={"train": {"num_samples": 2, "shards": {name: 2}}}), 1)


def test_altered_indices_and_samples_end_in_a_line(folder):
    """Any value anywhere: a batch as before, or one line; nothing is asked for that a small file could not fill."""
    index, refused = json.loads((folder / "index.json").read_text()), 0
    for said, value in altered(index, 150):
        (folder / "index.json").write_text(json.dumps(value))
        try:
            batch = take(ShardDataset(folder, 2, text_length=LENGTH, latent_shape=SHAPE), 1)[0]
            assert batch["text"].shape == (2, LENGTH, WIDTH), said
        except DataError as error:
            refused += 1
            assert "\n" not in str(error), said
    assert refused > 75
    (folder / "index.json").write_text(json.dumps(index))
    draw, whole = random.Random(0), (folder / "train-00000.tar").read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (folder / "train-00000.tar").write_bytes(damaged)
        try:
            take(ShardDataset(folder / "train-00000.tar", 5), 1)
        except DataError as error:
            assert "\n" not in str(error)


def test_remote_shards_that_were_made_anew_are_fetched_anew(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/again", recursive=True)
    read = lambda: take(ShardDataset("memory://bucket/again", 14, shuffle=False, drop_text=0.0, cache_folder=tmp_path / "cache"), 1)[0]  # noqa: E731
    before = read()
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert same([before], [read()]) and len(list((tmp_path / "cache").iterdir())) == 3, "what did not change is not fetched again"
    make_folder(folder, first=100)
    memory.rm("/bucket/again", recursive=True)
    memory.put(str(folder), "/bucket/again", recursive=True)
    assert read()["captions"][0] == "clip 100" and before["captions"][0] == "clip 0"


def test_no_message_shows_a_password_or_a_signature():
    from usv.training.remote import Remote, masked, masked_settings

    url = "https://me:secret@host.org/a/clips?X-Amz-Signature=abc123"
    remote = Remote(url) / "index.json"
    assert remote.url == "https://me:secret@host.org/a/clips/index.json?X-Amz-Signature=abc123"
    assert (remote.name, remote.parent.url) == ("index.json", url) and (Remote("s3://bucket/clips") / "x.tar").parent.url == "s3://bucket/clips"
    assert (Remote("memory://bucket") / "x").url == "memory://bucket/x"
    for shown in (str(remote), repr(remote), masked(f"cannot open {url}: 403"), str(masked_settings({"data": {"path": url, "mix": {url: 1.0}, "l": [url]}}))):
        assert "secret" not in shown and "abc123" not in shown and "host.org/a/clips" in shown
    assert masked("data/shards@2 and a?b") == "data/shards@2 and a?b" and masked_settings({"seed": 3, "lr": 1e-3}) == {"seed": 3, "lr": 1e-3}
    with pytest.raises(DataError) as caught:
        ShardDataset("memory://user:secret@nowhere/clips?sig=abc123", 4)
    assert "secret" not in str(caught.value) and "abc123" not in str(caught.value) and "delete" not in str(caught.value)
