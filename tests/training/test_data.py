"""ShardDataset: order, ranks, exact resume, caption dropping, errors. Shards are written here, without any model."""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import shards
from strange import altered

from usv.training.data import DataError, ShardDataset
from usv.training.shards import model_identity

SHAPE, LENGTH, WIDTH = (4, 3, 2, 2), 6, 5


def latents_of(number: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).half()


def text_of(number: int) -> torch.Tensor:
    return torch.full((1 + number % LENGTH, WIDTH), float(number + 1))


def make_folder(folder: Path, counts=(5, 3, 6), first=0, labels=True, text=True, shape=SHAPE, **changes) -> Path:
    """A folder as data/prepare.py writes it: sample n has latents_of(n), text_of(n), caption `clip n`."""
    number, names = first, {}
    for i, count in enumerate(counts):

        def samples(start=number, count=count):
            for n in range(start, start + count):
                info = {"caption": f"clip {n}", **({"subject": n % 3, "motion": n % 2} if labels else {})}
                yield f"{n:08d}", {"latents": latents_of(n, shape), **({"text": text_of(n)} if text else {})}, info

        names[f"train-{i:05d}.tar"] = shards.write_shard(
            folder / f"train-{i:05d}.tar", samples(), report={"skipped": []}
        )
        number += count
    index = {
        "format": 1, "model": {"name": "m", "vae": "v", "text_encoder": "t"}, "latent_shape": list(shape),
        "text_dim": WIDTH if text else None, "max_sequence_length": LENGTH,
        "splits": {"train": {"num_samples": number - first, "shards": names}}, **changes,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    save_file({"text": torch.full((1, WIDTH), -1.0)}, folder / "empty.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "clips")


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) if k != "captions" else x[k] == y[k] for k in x)
        for x, y in zip(a, b)
    )


def test_batch_holds_what_was_written(folder):
    batches = take(ShardDataset(folder, 4, seed=3, drop_text=0.0), 3)
    for batch in batches:
        assert batch["latents"].dtype == batch["text"].dtype == torch.float32
        assert batch["text"].shape == (4, LENGTH, WIDTH)
        for row, n in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["latents"][row], latents_of(n).float())
            valid = text_of(n).shape[0]
            assert torch.equal(batch["text"][row, :valid], text_of(n)) and not batch["text"][row, valid:].any()
            assert batch["captions"][row] == f"clip {n}"
            assert (batch["subject"][row], batch["motion"][row]) == (n % 3, n % 2)


def test_every_sample_once_an_epoch_and_another_order_each(folder):
    numbers = torch.cat([b["index"] for b in take(ShardDataset(folder, 7, seed=1), 4)])
    first, second = numbers[:14], numbers[14:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(14))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(14))
    other = torch.cat([b["index"] for b in take(ShardDataset(folder, 7, seed=2), 2)])
    assert other.tolist() != first.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_order_does_not_depend_on_the_number_of_ranks(folder, world_size):
    """Global batches of 6 over 14 samples straddle epochs; their union, in rank order, is always the same."""
    reference = take(ShardDataset(folder, 6, seed=5, drop_text=0.5), 7)
    ranks = [
        take(ShardDataset(folder, 6 // world_size, seed=5, drop_text=0.5, rank=r, world_size=world_size), 7)
        for r in range(world_size)
    ]
    for step, whole in enumerate(reference):
        for name in ("index", "latents", "text"):
            assert torch.equal(torch.cat([batches[step][name] for batches in ranks]), whole[name])
    lengths = {len(ShardDataset(folder, 6 // world_size, rank=r, world_size=world_size)) for r in range(world_size)}
    assert lengths == {2}


def test_resume_is_exact_mid_epoch_also_on_other_ranks(folder):
    whole = take(ShardDataset(folder, 4, seed=7, drop_text=0.3), 9)
    stopped = ShardDataset(folder, 4, seed=7, drop_text=0.3)
    take(stopped, 5)
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["epoch"] == 1 and state["position"] == 5 * 4 - 14
    resumed = ShardDataset(folder, 4, seed=7, drop_text=0.3)
    resumed.load_state_dict(state)
    assert same(take(resumed, 4), whole[5:])
    pair = [ShardDataset(folder, 2, seed=7, drop_text=0.3, rank=r, world_size=2) for r in range(2)]
    for dataset in pair:
        dataset.load_state_dict(state)
    joined = [torch.cat([a["index"], b["index"]]) for a, b in zip(*(take(d, 4) for d in pair))]
    assert [j.tolist() for j in joined] == [b["index"].tolist() for b in whole[5:]]


def test_state_counts_a_batch_once_it_is_handed_out(folder):
    dataset = ShardDataset(folder, 4)
    stream = iter(dataset)
    assert dataset.state_dict()["position"] == 0
    next(stream)
    assert dataset.state_dict()["position"] == 4


def test_state_of_other_data_or_seed_is_refused(folder, tmp_path):
    state = ShardDataset(folder, 4, seed=1).state_dict()
    with pytest.raises(DataError, match="seed was 1 .* is 2 now"):
        ShardDataset(folder, 4, seed=2).load_state_dict(state)
    more = make_folder(tmp_path / "more", counts=(5, 3, 7))
    with pytest.raises(DataError, match="num_samples was 14"):
        ShardDataset(more, 4, seed=1).load_state_dict(state)


def test_caption_dropping_uses_the_empty_prompt_and_changes_by_epoch(tmp_path):
    folder = make_folder(tmp_path / "many", counts=(400,))
    dataset = ShardDataset(folder, 400, drop_text=0.25)
    dropped = []
    for batch in take(dataset, 2):
        out = torch.tensor([caption == "" for caption in batch["captions"]])
        assert (batch["text"][out][:, 0] == -1).all() and not batch["text"][out][:, 1:].any()
        assert (batch["text"][~out][:, 0] > 0).all()
        assert 0.15 < out.float().mean() < 0.35
        dropped.append(set(batch["index"][out].tolist()))
    assert dropped[0] != dropped[1]
    assert not any(c == "" for b in take(ShardDataset(folder, 400, drop_text=0.0), 1) for c in b["captions"])


def test_cache_changes_nothing_but_reading(folder):
    cached, uncached = ShardDataset(folder, 5, seed=2), ShardDataset(folder, 5, seed=2, cache_bytes=0)
    assert same(take(cached, 6), take(uncached, 6))
    assert len(cached._cache) == 14 and not uncached._cache
    for path in folder.glob("*.tar"):
        path.unlink()
    take(cached, 3)
    with pytest.raises(DataError):
        take(uncached, 3)


def test_single_pass_is_the_same_each_time_and_may_be_cut_short(folder):
    dataset = ShardDataset(folder, 4, drop_text=0.0, repeat=False, shuffle=False)
    take(dataset, 1)
    passes = [list(dataset), list(dataset)]
    assert same(*passes) and len(passes[0]) == len(dataset) == 3
    assert torch.cat([b["index"] for b in passes[0]]).tolist() == list(range(12))


def test_folders_globs_and_single_shards_combine(tmp_path):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", first=100, labels=False)
    both = ShardDataset([tmp_path / "a", tmp_path / "b"], 28, drop_text=0.0)
    assert both.num_samples == 28
    [batch] = take(both, 1)
    assert set(batch["captions"]) == {f"clip {n}" for n in [*range(14), *range(100, 114)]}
    assert "subject" not in batch, "labels that only some samples have must not appear"
    assert ShardDataset(str(tmp_path / "*"), 4).num_samples == 28
    assert ShardDataset(str(tmp_path / "a" / "train-0000[01].tar"), 4).num_samples == 8
    assert ShardDataset(tmp_path / "a" / "train-00002.tar", 4).num_samples == 6


def test_data_without_text_gives_captions_only(tmp_path):
    folder = make_folder(tmp_path / "clips", text=False)
    [batch] = take(ShardDataset(folder, 14, drop_text=0.5), 1)
    assert "text" not in batch and 0 < batch["captions"].count("") < 14


def test_shards_are_webdataset_shards(folder):
    import webdataset

    dataset = webdataset.WebDataset(str(folder / "train-00000.tar"), shardshuffle=False, empty_check=False)
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == [f"{n:08d}" for n in range(5)], "the report must not show up as a sample"
    assert json.loads(samples[3]["json"])["caption"] == "clip 3"


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


# ---- several datasets, remote data -----------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """Samples 0–3 and 4–13."""
    return [make_folder(tmp_path / "few", (4,)), make_folder(tmp_path / "many", (6, 4), first=4)]


def test_weights_are_shares_whatever_the_sizes(pair):
    """Half of every epoch from each of 4 and 10 samples; within its own stream no sample comes back before all were seen."""
    dataset = ShardDataset(pair, 1, seed=1, drop_text=0.0, weights=[1.0, 1.0])
    numbers = [int(b["index"]) for b in take(dataset, 14 * 5)]
    for epoch in range(5):
        part = numbers[14 * epoch : 14 * (epoch + 1)]
        assert sum(n < 4 for n in part) == 7
    orders = [dataset.order(epoch)[0] for epoch in range(5)]
    assert [n for order in orders for n in order.tolist()] == numbers
    counts = torch.bincount(torch.tensor(numbers), minlength=14)
    assert counts[:4].max() - counts[:4].min() <= 1 and counts[4:].max() - counts[4:].min() <= 1
    assert orders[0].tolist() != orders[1].tolist()
    uneven = ShardDataset(pair, 1, weights=[3.0, 1.0])
    assert sum(int(n) < 4 for n in uneven.order(0)[0]) == 11  # 10.5, the larger remainder first


def test_weighted_order_resumes_exactly_on_any_number_of_ranks(pair):
    whole = take(ShardDataset(pair, 4, seed=2, weights=[2.0, 1.0]), 9)
    first = ShardDataset(pair, 4, seed=2, weights=[2.0, 1.0])
    take(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [ShardDataset(pair, 2, seed=2, rank=r, world_size=2, weights=[2.0, 1.0]) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for batch, left, right in zip(whole[4:], *(take(rank, 5) for rank in ranks)):
        assert torch.equal(batch["index"], torch.cat([left["index"], right["index"]]))
        assert torch.equal(batch["text"], torch.cat([left["text"], right["text"]]))
    with pytest.raises(DataError, match="streams was"):
        ShardDataset(pair, 4, seed=2, weights=[1.0, 1.0]).load_state_dict(state)
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(DataError, match="one above 0 for each"):
            ShardDataset(pair, 4, weights=weights)


def test_remote_shards_are_those_at_home(folder, tmp_path):
    """Through fsspec's memory file system: the same batches, each shard fetched once and whole, errors that name the URL."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/clips", recursive=True)
    cache = tmp_path / "cache"
    remote = ShardDataset("memory://bucket/clips", 4, seed=3, cache_folder=cache)
    assert same(take(remote, 5), take(ShardDataset(folder, 4, seed=3), 5))
    assert len(list(cache.iterdir())) == 3 and not list(cache.glob(".*"))
    single = ShardDataset("memory://bucket/clips/train-00001.tar", 1, shuffle=False, repeat=False, cache_folder=cache)
    assert [int(b["index"]) for b in single] == [0, 1, 2]
    memory.rm("/bucket/clips/train-00002.tar")
    again = ShardDataset("memory://bucket/clips", 14, cache_folder=tmp_path / "empty")
    with pytest.raises(DataError, match="memory://bucket/clips/train-00002.tar: cannot be fetched"):
        take(again, 1)
    assert not list((tmp_path / "empty").glob(".*"))
    with pytest.raises(DataError, match="memory://bucket/none/index.json: cannot be read"):
        ShardDataset("memory://bucket/none", 4)


# ---- files that were changed by accident or by strangers -------------------------------------------------------------


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
