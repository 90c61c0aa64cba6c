"""Joint attention shared by two real processes gives one process's output and gradients: text before, behind, padded, a given first frame.

Bounds: those of tests/sparse/test_sequence_parallel.py. ltx2, whose audio asks all of the video's tokens, is refused.
"""

import copy
import multiprocessing
import os
import socket
from datetime import timedelta

import family_cases
import pytest
import torch
import torch.distributed as dist

from usv.models.forward import SparseTransformer
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung
from usv.sparse.sequence_parallel import SequenceGroup

SERVER = multiprocessing.get_context("forkserver")
CASES = ("cogvideox_rope", "hunyuan_video", "hunyuan_video_replace")


def found(case: str, group=None) -> dict[str, torch.Tensor]:
    """Output and gradients of a dense, a sparse and merging layers."""
    torch.manual_seed(0)
    transformer, arguments = getattr(family_cases, case)()
    model = SparseTransformer(transformer, Tile(2, 2, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.sequence_group = None if group is None else SequenceGroup(*group)
    rungs = [Rung(), Rung(1, 0), Rung(2, 1), Rung(2, 1)][: model.num_layers]
    out, _ = model.run(copy.deepcopy(arguments), rungs)
    names, leaves = zip(*model.named_parameters())
    grads = torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)
    return {"output": out.detach(), **{n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, grads)}}


def work(rank: int, port: int, file: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    results = {case: found(case, (rank, 2, dist.group.WORLD)) for case in CASES}
    for values in results.values():
        for value in values.values():
            dist.all_reduce(value)
            value /= 2
    if rank == 0:
        torch.save(results, file)
    dist.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    file = tmp_path_factory.mktemp("shared") / "results.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [SERVER.Process(target=work, args=(rank, port, str(file))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [p.exitcode for p in processes] == [0, 0]
    return torch.load(file)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(shared, case):
    wanted = found(case)
    for name, value in wanted.items():
        bound = 1e-5 if name == "output" else 5e-5
        worst = float((shared[case][name] - value).abs().max())
        assert worst <= bound * max(1.0, float(value.abs().max())), f"{name}: {worst}"


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="sequence_group: got one for a ltx2, accepted: None"):
        found("ltx2", (0, 2))
