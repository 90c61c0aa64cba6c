"""kmeans: nearest centroids by distance, means against float64, empty clusters, offsets, chunks, refusals."""

import pytest
import torch
from companion_checks import DEVICE, DTYPES, IMPLS, SCALES, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import kmeans
from usv_kernels.kmeans import _assign, _update
from usv_kernels.kmeans import cpu as cpu_backend
from usv_kernels.kmeans import reference as reference_backend

__all__ = ["poisoned"]
ALL = [*IMPLS, pytest.param("reference", DEVICE, id="reference")]


def distances(x, centroids):
    """(B, H, S, K) squared, in float64."""
    return (x.double().unsqueeze(3) - centroids.double().unsqueeze(2)).square().sum(-1)


def assert_nearest(assignment, x, centroids):
    """Ties are compared by distance: the excess over the smallest one is at most twice that of eager float32."""
    exact = distances(x, centroids)
    low, c = x.float(), centroids.float()
    products = low @ c.transpose(-1, -2)
    eager = (low.square().sum(-1, keepdim=True) - 2 * products + c.square().sum(-1).unsqueeze(2)).argmin(-1)

    def excess(choice):
        return exact.gather(-1, choice[..., None])[..., 0] - exact.amin(-1)

    # Floor: a few roundings of what is compared, x.(c - o) - (c - o).(c + o) / 2 with the mean centroid o, for the centroid chosen and
    # the nearest; the excess is twice a difference of scores.
    mean = c.mean(2, keepdim=True)
    away = (c - mean).norm(dim=-1)
    size = (low.norm(dim=-1)[..., None] + (c + mean).norm(dim=-1).unsqueeze(2) / 2) * away.unsqueeze(2)
    both = size.gather(-1, torch.stack([assignment, exact.argmin(-1)], -1)).sum(-1)
    floor = 8 * torch.finfo(torch.float32).eps * both
    assert (excess(assignment) <= 2 * excess(eager).max() + floor).all()


def assert_means(clusters, x, before):
    """Error of the means at most twice that of eager float32 sums; clusters without tokens keep their centroid."""
    index = clusters.assignment[..., None].expand(x.shape)
    counts = torch.zeros_like(clusters.counts).scatter_add_(
        2, clusters.assignment, torch.ones_like(clusters.assignment)
    )
    assert torch.equal(clusters.counts, counts) and (counts.sum(-1) == x.shape[2]).all()

    def means(dtype):
        total = torch.zeros(before.shape, dtype=dtype, device=x.device).scatter_add_(2, index, x.to(dtype))
        return torch.where(counts[..., None] > 0, total / counts.clamp(min=1)[..., None], before.to(dtype)).double()

    exact = means(torch.float64)
    allowed = 2 * (means(torch.float32) - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert clusters.centroids.dtype == torch.float32
    assert (clusters.centroids.double() - exact).abs().max() <= allowed
    empty = counts == 0
    assert torch.equal(clusters.centroids[empty], before.float()[empty])


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_one_iteration(impl, device, dtype, scale, poisoned):
    torch.manual_seed(0)
    x = (torch.randn(2, 2, 90, 24, device=device) * scale).to(dtype)
    init = torch.randn(2, 2, 7, 24, device=device) * scale
    init[:, :, 3] = 1e3 * scale  # nobody's nearest
    found = kmeans(x, 7, 1, init, impl=impl)
    assert_nearest(found.assignment, x, init)
    assert_means(found, x, init)
    assert (found.counts[:, :, 3] == 0).all()


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_iterations_and_strides(impl, device, dim):
    """A transposed view; the objective never rises; the last iteration continues from the one before."""
    torch.manual_seed(1)
    x = torch.randn(1, 70, 2, dim, device=device).transpose(1, 2)
    before, losses = kmeans(x, 5, 2, impl=impl), []
    after = kmeans(x, 5, 3, impl=impl)
    assert_nearest(after.assignment, x, before.centroids)
    assert_means(after, x, before.centroids)
    for found in (before, after):
        losses.append(distances(x, found.centroids).gather(-1, found.assignment[..., None]).sum().item())
    assert losses[1] <= losses[0] * (1 + 1e-6)
    assert torch.equal(kmeans(x.contiguous(), 5, 2, impl=impl).assignment, before.assignment)


@pytest.mark.parametrize(("impl", "device"), ALL)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), length=st.integers(1, 80), dim=st.integers(1, 40))
def test_random_shapes(impl, device, data, length, dim):
    k = data.draw(st.integers(1, min(length, 70)))
    x = torch.randn(1, 2, length, dim, device=device)
    init = torch.randn(1, 2, k, dim, device=device)
    found = kmeans(x, k, 1, init, impl=impl)
    assert_nearest(found.assignment, x, init)
    assert_means(found, x, init)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_duplicates_and_ties(impl, device):
    x = torch.ones(1, 1, 70, 16, device=device)
    found = kmeans(x, 70, 2, impl=impl)  # as many clusters as tokens, all equal, and more than one Triton block of them
    assert found.assignment.eq(0).all() and found.counts[0, 0].tolist() == [70] + [0] * 69
    assert torch.equal(found.centroids, x)
    halfway = torch.zeros(1, 1, 12, 16, device=device)
    centroids = torch.stack([halfway[0, 0, 0] + 2, halfway[0, 0, 0] + 1, halfway[0, 0, 0] - 1])[None, None]
    assert kmeans(halfway, 3, 0, centroids, impl=impl).assignment.eq(1).all()


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_centroids_finer_than_the_tokens_dtype(impl, device, dtype):
    """1000 and 1000.24 are one number in 16 bits, and yet their distances to 3072 differ by 994."""
    x = torch.zeros(1, 1, 2, 16, device=device)
    x[..., 0] = torch.tensor([3072.0, -3072.0])
    init = torch.zeros(1, 1, 4, 16, device=device)
    init[..., 0] = torch.tensor([1000.0, 1000.24, -1000.0, -1000.24])
    assert kmeans(x.to(dtype).repeat(1, 1, 2, 1), 4, 0, init, impl=impl).assignment.flatten().tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_assignment_only(impl, device):
    x, init = torch.randn(1, 2, 20, 16, device=device), torch.randn(1, 2, 4, 16, device=device)
    found = kmeans(x, 4, 0, init, impl=impl)
    assert torch.equal(found.centroids, init) and found.counts.sum().item() == 40
    assert_nearest(found.assignment, x, init)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_common_offset_does_not_cancel(impl, device):
    """Keys share a large mean; |x|^2 - 2 x.c + |c|^2 in float32 loses the clusters there, we must not."""
    torch.manual_seed(2)
    x, init = torch.randn(1, 1, 200, 16).to(device), torch.randn(1, 1, 8, 16).to(device)
    moved = kmeans(x.double() + 4096, 8, 0, init.double() + 4096, impl="reference")
    found = kmeans(x + 4096, 8, 0, init + 4096, impl=impl)
    exact = distances(x + 4096, init + 4096)
    excess = exact.gather(-1, found.assignment[..., None])[..., 0] - exact.amin(-1)
    assert excess.max() <= 16 * torch.finfo(torch.float32).eps * exact.max()
    assert (moved.assignment == found.assignment).float().mean() > 0.9


@pytest.mark.parametrize(("backend", "name"), [(cpu_backend, "LIMIT"), (reference_backend, "CHUNK")])
def test_chunks(backend, name, monkeypatch):
    """Chunks of any length give the same result, and no distance matrix of all tokens ever exists."""
    x, centroids = torch.randn(2, 1, 101, 8), torch.randn(2, 1, 6, 8)
    whole = backend.assign(x, centroids)
    means, counts = backend.update(x, whole, centroids)
    monkeypatch.setattr(backend, name, 100)
    widest, argmin, baddbmm = [], torch.cdist, torch.baddbmm
    monkeypatch.setattr(torch, "cdist", lambda *a, **k: widest.append(argmin(*a, **k)) or widest[-1])
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: widest.append(baddbmm(*a, **k)) or widest[-1])
    assert torch.equal(backend.assign(x, centroids), whole)
    assert len(widest) > 1 and max(w.shape[-2] for w in widest) < 101
    again, counts_again = backend.update(x, whole, centroids)
    torch.testing.assert_close(again, means)
    assert torch.equal(counts, counts_again)


@pytest.mark.parametrize("limit", [1, 40, 2 * 37 * 6, 10**6])
def test_heads_in_groups(limit, monkeypatch):
    """One head in chunks, some together or all: the same assignment, for transposed views too."""
    x, centroids = torch.randn(2, 37, 5, 8).transpose(1, 2), torch.randn(2, 5, 6, 8)
    monkeypatch.setattr(cpu_backend, "LIMIT", limit)
    found = cpu_backend.assign(x, centroids)
    assert torch.equal(found, reference_backend.assign(x, centroids))


def test_float64():
    x = torch.randn(1, 1, 30, 4, dtype=torch.float64)
    for impl in ("cpu", "reference"):
        found = kmeans(x, 3, 4, impl=impl)
        mean = torch.stack([x[0, 0][found.assignment[0, 0] == i].mean(0) for i in range(3)])
        torch.testing.assert_close(found.centroids[0, 0], mean, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration_and_repetition(impl, device):
    x, centroids = torch.randn(1, 2, 40, 16, device=device), torch.randn(1, 2, 4, 16, device=device)
    assignment = _assign(x, centroids, impl)
    torch.library.opcheck(_assign, (x, centroids, impl))
    torch.library.opcheck(_update, (x, assignment, centroids, impl))
    compiled = torch.compile(lambda x: tuple(kmeans(x, 4, 2, impl=impl)), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(kmeans(x, 4, 2, impl=impl), compiled(x), strict=True))


def test_refusals():
    x = torch.randn(1, 2, 8, 4)
    for bad, name in (
        ((x, 9, 1), "k"), ((x, 0, 1), "k"), ((x[0], 2, 1), "x"), ((x.int(), 2, 1), "x"), ((x, 2, 0), "iters"),
        ((x, 2, -1, x[:, :, :2]), "iters"), ((x, 2, 1, x[:, :, :3]), "init"), ((x, 2, 1, None, "fast"), "impl"),
        ((torch.randn(1, 1, 4, 200), 2, 1, None, "triton"), "x"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            kmeans(*bad)


def test_tiles_of_every_target():
    """What no machine at hand runs: smaller tiles where operands lie in registers, no tf32x3 where there is none."""
    from usv_kernels._gpus import GPUS
    from usv_kernels.kmeans.triton import assign_tile

    for dtype in DTYPES:
        for dim in (16, 24, 64, 128):
            tiles = {name: assign_tile(dim, dtype, gpu)[0] for name, gpu in GPUS.items()}
            assert {t for t, tile in tiles.items() if tile["PRECISION"] == "tf32x3"} == {t for t in GPUS if t.startswith("sm_")}
            small = {t for t, tile in tiles.items() if tile["BLOCK_K"] < tiles["sm_90"]["BLOCK_K"]}
            assert small == {t for t, gpu in GPUS.items() if gpu.unit not in ("wgmma", "tcgen05")} and all(t["BLOCK_D"] >= dim and t["BLOCK_K"] >= 16 for t in tiles.values())
