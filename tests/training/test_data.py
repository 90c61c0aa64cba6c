"""ShardDataset: order, ranks, exact resume, caption dropping, several folders."""

import json

import pytest
import torch
from shard_folders import LENGTH, WIDTH, latents_of, make_folder, same, take, text_of

from usv.training.data import DataError, ShardDataset


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "clips")


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
