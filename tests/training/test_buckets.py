"""usv.training.buckets: batches of one shape, shares, the same order on any number of ranks, exact resume. Shards are written here."""

import json

import pytest
import torch
from shard_folders import LENGTH, make_folder, same, take

from usv.training.buckets import Buckets, of_shape, open_shards
from usv.training.data import DataError, ShardDataset

SMALL, LONG = (4, 3, 2, 2), (4, 5, 2, 4)


@pytest.fixture
def two(tmp_path):
    """10 clips of one shape and 5 of another."""
    make_folder(tmp_path / "clips_a", counts=(5, 5), shape=SMALL)
    make_folder(tmp_path / "clips_b", counts=(2, 3), first=100, shape=LONG)
    return tmp_path


def test_every_batch_has_one_shape_and_buckets_keep_their_share(two):
    data = open_shards(two / "clips_*", 4, seed=3, drop_text=0.0, latent_shape=SMALL)
    assert data.shapes == [SMALL, LONG] and data.num_samples == 15 and "(4, 5, 2, 4) 5 samples 33%" in data.describe()
    batches, seen = take(data, 30), {SMALL: 0, LONG: 0}
    for count, batch in enumerate(batches, 1):
        seen[tuple(batch["latents"].shape[1:])] += 1
        assert batch["latents"].shape[0] == 4
        assert abs(seen[SMALL] - count * 2 / 3) <= 1, "the shares hold at every moment"
        for caption, index in zip(batch["captions"], batch["index"].tolist()):
            assert caption == f"clip {index if index < 10 else index + 90}"
    counts = torch.bincount(torch.cat([b["index"] for b in batches]), minlength=15)
    assert counts.tolist() == [8] * 15, "30 batches of 4 are 8 times 15 clips"


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_take_the_same_bucket_and_resume_mid_epoch(two, world_size):
    """What ranks see together is what one sees; a state of one process goes on, to the bit, on several."""
    settings = dict(seed=5, drop_text=0.4)
    whole = take(open_shards(two / "clips_*", 4, **settings), 12)
    stopped = open_shards(two / "clips_*", 4, **settings)
    assert same(take(stopped, 5), whole[:5])
    state = json.loads(json.dumps(stopped.state_dict()))
    ranks = []
    for rank in range(world_size):
        data = open_shards(two / "clips_*", 4 // world_size, rank=rank, world_size=world_size, **settings)
        data.load_state_dict(state)
        ranks.append(take(data, 7))
    for step, batch in enumerate(whole[5:]):
        for name in ("index", "latents", "text"):
            assert torch.equal(torch.cat([batches[step][name] for batches in ranks]), batch[name])


def test_weights_are_shares_of_the_batches(two):
    data = open_shards([f"{two}/clips_a/", two / "clips_b"], 2, weights=[1, 4], seed=1)
    shapes = [tuple(b["latents"].shape[1:]) for b in take(data, 50)]
    assert shapes.count(LONG) == 40


def test_one_shape_is_a_plain_dataset(two):
    assert isinstance(open_shards(two / "clips_a", 4, latent_shape=SMALL), ShardDataset)
    assert isinstance(open_shards([two / "clips_a", two / "clips_b"], 4), Buckets)
    assert [len(paths) for paths in of_shape([two / "clips_a", two / "clips_b", two / "clips_a"]).values()] == [2, 1]


def test_what_does_not_fit_is_refused(two, tmp_path):
    with pytest.raises(
        DataError, match=r"holds latents \(4, 3, 2, 2\), \(4, 5, 2, 4\), this run is configured for \(4, 9, 9, 9\)"
    ):
        open_shards(two / "clips_*", 4, latent_shape=(4, 9, 9, 9))
    with pytest.raises(DataError, match="name every folder by itself"):
        open_shards([two / "clips_*"], 4, weights=[1.0])
    buckets, plain = open_shards(two / "clips_*", 4), open_shards(two / "clips_a", 4)
    with pytest.raises(DataError, match="latent shapes were one when"):
        buckets.load_state_dict(plain.state_dict())
    with pytest.raises(DataError, match="several latent shapes when"):
        plain.load_state_dict(buckets.state_dict())
    make_folder(tmp_path / "other", shape=(4, 1, 2, 2), max_sequence_length=LENGTH + 1)
    with pytest.raises(DataError, match="text_length is 6 in one and 7 in the other"):
        open_shards([two / "clips_a", tmp_path / "other"], 4)


def test_other_shares_are_no_continuation(two):
    """What the old ones had drawn would be caught up with: nothing but the other shape for a while."""
    of = lambda *weights: open_shards([two / "clips_a", two / "clips_b"], 2, weights=weights, drop_text=0.0)  # noqa: E731
    data = of(3.0, 1.0)
    take(data, 8)
    state = json.loads(json.dumps(data.state_dict()))
    of(6.0, 2.0).load_state_dict(state)
    with pytest.raises(DataError, match="shares of the latent shapes were"):
        of(1.0, 3.0).load_state_dict(state)
    state.pop("shares")
    of(1.0, 3.0).load_state_dict(state)  # of an earlier version, which did not keep them
