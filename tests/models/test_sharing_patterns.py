"""usv/sampling/shared_pattern.py: two processes that share a forward under a pattern give one process's output, and leave no trace."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from family_cases import cogvideox, hunyuan_video, mochi, wan_vace
from processes import two

from usv.config import SettingError
from usv.patterns import make_pattern
from usv.patterns.processors import attach
from usv.sampling.patterns import PatternRecord
from usv.sampling.shared_pattern import share_pattern
from usv.sparse.sequence_parallel import SequenceGroup, ShardError


def wan():
    g = torch.Generator().manual_seed(0)
    call = {"hidden_states": torch.randn(2, 16, 5, 8, 8, generator=g), "timestep": torch.tensor([400.0, 400.0]), "encoder_hidden_states": torch.randn(2, 4, 64, generator=g)}
    return tiny.make_transformer(), call


CASES = {case.__name__: case for case in (wan, wan_vace, cogvideox, hunyuan_video, mochi)}  # text beside, before, after and padded; two lists of blocks
PATTERNS = {
    "tile_top_k": {"tile": (1, 2, 2), "density": 0.5}, "svg2": {"q_clusters": 4, "k_clusters": 4, "density": 0.5}, "svg": {"density": 0.9, "block": 4},
}  # fmt: skip


def progress(timestep):
    return 0, 2, None


def under(case, pattern):
    torch.manual_seed(0)
    transformer, arguments = CASES[case]()
    transformer = transformer.eval().requires_grad_(False)
    record = PatternRecord()
    options = {"dense_layers": 0.0, "dense_steps": 0.0}
    attached = attach(transformer, make_pattern(pattern, **options, **PATTERNS[pattern]), progress, record, recall_rows=4)
    return transformer, arguments, attached, record


def ask(transformer, arguments):
    out = transformer(**arguments, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


COMBINATIONS = [("wan", "tile_top_k"), ("wan", "svg"), ("wan", "svg2"), *((case, "tile_top_k") for case in list(CASES)[1:])]


def work(rank: int, file: str) -> None:
    """What a process makes of every combination while it shares, and what is left when it does not any more."""
    results = {}
    for case, pattern in COMBINATIONS:
        transformer, arguments, attached, record = under(case, pattern)
        classes = [type(module) for module in transformer.modules()]
        share_pattern(SimpleNamespace(transformer=transformer), SequenceGroup(rank, 2, dist.group.WORLD))
        out = ask(transformer, arguments)
        facts = (record.mean_density(), record.mean_recall(), record.forwards, len(record.calls))
        attached.undo()
        clean = [type(module) for module in transformer.modules()] == classes and "forward" not in vars(transformer)
        clean = clean and all(a.processor is original for a, original in zip(attached.attentions, attached.originals))
        results[case, pattern] = out, facts, clean, ask(transformer, arguments)
    torch.save(results, f"{file}.{rank}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    file = tmp_path_factory.mktemp("sharing") / "results"
    two(work, str(file))
    return [torch.load(f"{file}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_two_processes_give_the_output_of_one(shared, combination):
    transformer, arguments, attached, record = under(*combination)
    wanted = ask(transformer, arguments)
    facts = (record.mean_density(), record.mean_recall(), record.forwards, len(record.calls))
    attached.undo()
    dense = ask(transformer, arguments)
    assert record.mean_density() < 1 and not torch.equal(wanted, dense)
    for found, theirs, clean, after in (results[combination] for results in shared):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert theirs == pytest.approx(facts, rel=1e-5)
        assert clean and torch.equal(after, dense)


def test_what_cannot_be_shared_is_refused_and_stays_as_it_was():
    transformer, arguments, attached, _ = under("wan", "tile_top_k")
    wanted = ask(transformer, arguments)
    with pytest.raises(ShardError, match="runtime.sequence_parallel: got 3, but the model has 2 heads"):
        share_pattern(SimpleNamespace(transformer=transformer), SequenceGroup(0, 3))
        ask(transformer, arguments)
    attached.undo()
    with pytest.raises(SettingError, match="sequence_parallel: got a WanTransformer3DModel under no pattern, accepted: 1"):
        share_pattern(SimpleNamespace(transformer=transformer), SequenceGroup(0, 2))
    transformer, _, _, _ = under("wan", "tile_top_k")
    assert torch.equal(ask(transformer, arguments), wanted)
