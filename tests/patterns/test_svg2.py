import pytest
import torch
from pattern_reference import masked_attention, qkv
from usv_kernels import Clusters

from usv.patterns import SVG, SVG2, PatternState, attend, executed_pairs, svg2
from usv.patterns.protocol import Clock, plan_recall
from usv.sparse.grid import TokenGrid

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
GRID = TokenGrid(3, 6, 8)


def plan_of(q, k, settings, grid=GRID, state=None):
    return settings.plan(q, k, None, grid, state or PatternState(), None, Clock(q.device))


def token_mask(q, k, settings):
    """(B, H, S, S) by definition: clusters, float64 scores, and a loop for top-p."""
    length, dim = q.shape[2:]
    state = PatternState(num_steps=9)
    q_clusters, k_clusters = settings._cluster(q, k, state)
    mask = torch.zeros(*q.shape[:2], length, length, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            q_of, k_of = q_clusters.assignment[b, h], k_clusters.assignment[b, h]
            centroids_k = torch.stack([k[b, h, k_of == c].double().mean(0) for c in range(settings.k_clusters)])
            sizes = torch.tensor([int((k_of == c).sum()) for c in range(settings.k_clusters)]).double()
            for row in range(settings.q_clusters):
                if not (q_of == row).any():
                    continue
                centroid = q[b, h, q_of == row].double().mean(0)
                logits = (centroids_k @ centroid / dim**0.5).masked_fill(sizes == 0, -1e9)
                weight = sizes * (logits - logits.max()).exp()
                weight = weight / weight.sum()
                total, kept = 0.0, 0
                for c in weight.argsort(descending=True).tolist():
                    if total >= settings.top_p and kept >= settings.floor * settings.k_clusters:
                        break
                    mask[b, h, (q_of == row)[:, None] & (k_of == c)] = True
                    total, kept = total + float(weight[c]), kept + 1
    return mask


@pytest.mark.parametrize(("top_p", "floor"), [(0.9, 0.1), (0.5, 0.0), (0.05, 0.4)])
def test_output_is_attention_over_the_clusters_that_cross_top_p(top_p, floor):
    q, k, v = qkv(2, 2, GRID.num_tokens, 16, scale=2.0)
    settings = SVG2(top_p=top_p, floor=floor, q_clusters=9, k_clusters=20, **NO_WARM_UP)
    mask = token_mask(q, k, settings)
    out, stats = attend(q, k, v, GRID, settings, PatternState())
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert stats.density == pytest.approx(mask.double().mean().item(), abs=1e-12)
    assert 0.02 < stats.density < 0.98
    assert stats.seconds["cluster"] > 0 and stats.seconds["permute"] > 0


def test_computed_pairs_are_selected_pairs():
    q, k, _ = qkv(2, 2, GRID.num_tokens, 16, scale=2.0)
    settings = SVG2(top_p=0.6, q_clusters=9, k_clusters=20, **NO_WARM_UP)
    plan = plan_of(q, k, settings)
    done, total = executed_pairs(plan.selection)
    assert done == int(token_mask(q, k, settings).sum())
    assert total == 4 * GRID.num_tokens**2
    assert len(plan.selection.kv_sizes.unique()) > 3, "clusters of one size would not show padding"


def test_unlisted_keys_are_never_read():
    q, k, v = qkv(1, 1, GRID.num_tokens, 16, scale=3.0)
    settings = SVG2(num_kept=1, q_clusters=4, k_clusters=8, **NO_WARM_UP)
    plan = plan_of(q, k, settings)
    unlisted = sorted(set(range(8)) - set(plan.selection.kv_indices.flatten().tolist()))
    assert unlisted, "the case must leave a cluster out"
    clusters = torch.repeat_interleave(plan.selection.kv_sizes[0, 0].long())
    poisoned = plan.kv_order[0, 0][torch.isin(clusters, torch.tensor(unlisted))]
    expected, _ = attend(q, k, v, GRID, settings, PatternState())
    v[:, :, poisoned] = float("nan")
    out, _ = attend(q, k, v, GRID, settings, PatternState())
    assert len(poisoned) and torch.equal(out, expected)


def test_duplicates_empty_clusters_and_views():
    values = qkv(1, 1, 3, 16)[0]
    kind = torch.randint(3, (GRID.num_tokens,), generator=torch.Generator().manual_seed(0))
    x = values[:, :, kind].expand(2, 2, -1, -1)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)  # (B, S, H, D) memory
    v = qkv(2, 2, GRID.num_tokens, 16)[0]
    settings = SVG2(top_p=1.0, floor=0.0, q_clusters=8, k_clusters=12, **NO_WARM_UP)
    plan = plan_of(x, x, settings)
    assert (plan.selection.q_sizes == 0).sum() == 2 * 2 * 5 and (plan.selection.kv_sizes == 0).sum() == 2 * 2 * 9
    listed = plan.selection.to_mask()
    assert not (listed & (plan.selection.kv_sizes == 0)[:, :, None]).any()
    out, stats = attend(x, x, v, GRID, settings, PatternState())
    dense = masked_attention(x, x, v, torch.tensor(True))
    torch.testing.assert_close(out.double(), dense, rtol=1e-5, atol=1e-5)
    assert stats.density == 1.0


def clusters(scores, sizes):
    """Key clusters whose centroid scores against the query centroid [1] are `scores` + log(size)."""
    sizes = torch.tensor(sizes).view(1, 1, -1)
    assignment = torch.repeat_interleave(sizes[0, 0])[None, None]
    return Clusters(assignment, torch.tensor(scores).view(1, 1, -1, 1), sizes)


def selected(settings, scores, sizes):
    ones = torch.ones(1, 1, 1, dtype=torch.int64)
    one = Clusters(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1), ones)
    selection = settings.select(one, clusters(scores, sizes))
    return selection.to_mask()[0, 0, 0].nonzero().flatten().tolist()


def test_top_p_ties_floors_and_sizes():
    four = {"q_clusters": 1, "k_clusters": 4}
    # Equal mass of a quarter each: p = 0.5 is crossed by the second, of equals the first indices are taken.
    assert selected(SVG2(top_p=0.5, floor=0.0, **four), [0.0] * 4, [3] * 4) == [0, 1]
    assert selected(SVG2(top_p=0.51, floor=0.0, **four), [0.0] * 4, [3] * 4) == [0, 1, 2]
    assert selected(SVG2(top_p=0.01, floor=0.0, **four), [0.0] * 4, [3] * 4) == [0]
    assert selected(SVG2(top_p=0.01, floor=0.75, **four), [0.0] * 4, [3] * 4) == [0, 1, 2]
    # Size-weighted: the nearest cluster has one token, the large one holds the mass.
    assert selected(SVG2(top_p=0.5, floor=0.0, **four), [1.0, 0.0, 0.0, 0.0], [1, 2, 100, 2]) == [2]
    assert selected(SVG2(top_p=1.0, **four), [5.0, 0.0, 0.0, 0.0], [1, 0, 2, 2]) == [0, 2, 3]


def test_choice_by_count_and_by_tokens():
    four = {"q_clusters": 1, "k_clusters": 4}
    assert selected(SVG2(num_kept=2, **four), [0.0, 1.0, 2.0, 3.0], [1, 1, 1, 1]) == [2, 3]
    # Budget of 5 tokens of 10: the best (log 3 + 2) fits, the second (4 more tokens) does not, and ends the list.
    assert selected(SVG2(density=0.5, **four), [0.0, 1.5, 2.0, 0.0], [1, 4, 3, 2]) == [2]
    assert selected(SVG2(density=0.7, **four), [0.0, 1.5, 2.0, 0.0], [1, 4, 3, 2]) == [1, 2]
    assert selected(SVG2(density=0.1, **four), [0.0, 1.5, 2.0, 0.0], [1, 4, 3, 2]) == [2], "at least one"
    assert selected(SVG2(density=1.0, **four), [0.0, 1.5, 2.0, 0.0], [1, 4, 0, 5]) == [0, 1, 3]


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_density_stays_within_its_budget(density):
    q, k, v = qkv(1, 2, GRID.num_tokens, 16)
    settings = SVG2(density=density, q_clusters=9, k_clusters=48, **NO_WARM_UP)
    _, stats = attend(q, k, v, GRID, settings, PatternState())
    assert density - 0.08 < stats.density <= density


def test_centroids_are_cached_by_layer_and_branch(monkeypatch):
    calls = []
    real = svg2.kmeans

    def spy(x, k, iters, init=None):
        result = real(x, k, min(iters, 3), init)
        calls.append((iters, init, result.centroids))
        return result

    monkeypatch.setattr(svg2, "kmeans", spy)
    q, k, v = qkv(1, 2, GRID.num_tokens, 8)
    settings = SVG2(q_clusters=4, k_clusters=6, **NO_WARM_UP)
    state = PatternState(num_layers=2, num_steps=4)

    def call(layer, step, branch, batch=1):
        state.layer, state.step, state.branch = layer, step, branch
        calls.clear()
        attend(*(x.expand(batch, -1, -1, -1) for x in (q, k, v)), GRID, settings, state)
        return list(calls)

    first = call(0, 0, 0)
    assert [c[0] for c in first] == [50, 50] and all(c[1] is None for c in first)
    other_branch, other_layer = call(0, 0, 1), call(1, 0, 0)
    assert [c[0] for c in other_branch + other_layer] == [50] * 4
    second = call(0, 1, 0)
    assert [c[0] for c in second] == [2, 2]
    assert all(torch.equal(a[2], b[1]) for a, b in zip(first, second)), "starts from the previous step's centroids"
    third = call(0, 2, 0)
    assert all(torch.equal(a[2], b[1]) for a, b in zip(second, third))
    assert [c[0] for c in call(0, 2, 0, batch=2)] == [50, 50], "centroids of another batch are of no use"
    call(0, 3, 0, batch=2)
    assert sorted(state.centroids) == [(0, 1), (1, 0)], "the last step leaves nothing behind"


def test_recall_beats_bands_on_scattered_clusters_at_equal_density():
    generator = torch.Generator().manual_seed(3)
    kind = torch.randint(12, (GRID.num_tokens,), generator=generator)
    centres = torch.randn(12, 16, generator=generator) * 2
    x = (centres[kind] + 0.1 * torch.randn(GRID.num_tokens, 16, generator=generator)).expand(1, 1, -1, -1)
    v = qkv(1, 1, GRID.num_tokens, 16)[0]
    band = SVG(density=0.25, block=8, sink=False, **NO_WARM_UP)
    clustered = SVG2(density=0.25, q_clusters=12, k_clusters=12, **NO_WARM_UP)
    stats = [attend(x, x, v, GRID, pattern, PatternState(recall_rows=64))[1] for pattern in (band, clustered)]
    assert stats[1].density <= stats[0].density
    assert stats[1].recall > 0.9 > 0.6 > stats[0].recall


def test_recall_is_the_kept_share_of_dense_mass():
    q, k, _ = qkv(2, 2, GRID.num_tokens, 16, scale=2.0)
    settings = SVG2(top_p=0.6, floor=0.0, q_clusters=9, k_clusters=20, **NO_WARM_UP)
    mask = token_mask(q, k, settings)
    probs = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1)
    expected = (probs * mask).sum(-1).mean()
    measured = plan_recall(q, k, plan_of(q, k, settings), None, rows=GRID.num_tokens)
    assert float(measured) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p: got 0.0, accepted: a fraction in \(0, 1\]"),
        ({"top_p": 1.2}, "top_p: got 1.2"),
        ({"floor": -0.1}, "floor: got -0.1"),
        ({"num_kept": 501}, r"num_kept: got 501, accepted: an integer in 1..500 \(k_clusters\)"),
        ({"num_kept": 3, "density": 0.5}, "density: got 0.5, accepted: None where num_kept is given"),
        ({"density": 0.0}, "density: got 0.0"),
        ({"iters": 0}, "iters: got 0"),
        ({"dense_steps": 2}, "dense_steps: got 2"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SVG2(**options)


def test_more_clusters_than_tokens_is_refused():
    q, k, v = qkv(1, 1, GRID.num_tokens, 8)
    with pytest.raises(ValueError, match="k_clusters: got 500, accepted: 1..144, the video tokens"):
        attend(q, k, v, GRID, SVG2(**NO_WARM_UP), PatternState())
