"""Tokens beside the grid: read by all, dense, never merged, wherever they stand; what cannot have them says so."""

import pytest
import torch
import torch.nn.functional as F
from family_cases import coords, ltx, ltx2_beside, ltx_beside, normal
from torch import nn

from usv.models.attend import Attend
from usv.models.forward import SparseTransformer
from usv.models.tokens import Tokens
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.joint import Text
from usv.sparse.plan import LayerPlan, Rung
from usv.sparse.sequence_parallel import SequenceGroup

TILE, LAYOUT = Tile(2, 2, 2), tile_layout(TokenGrid(3, 5, 3), Tile(2, 2, 2))
NUM = LAYOUT.grid.num_tokens


def built(case=ltx_beside):
    torch.manual_seed(0)
    transformer, arguments = case()
    model = SparseTransformer(transformer, TILE).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return model, arguments


@pytest.mark.parametrize("text", [None, Text(4, before=False, valid=torch.tensor([4, 1]))], ids=["alone", "text"])
@torch.no_grad()
def test_attention_is_dense_in_rows_and_columns_beside_the_grid(text):
    beside, words = 6, 0 if text is None else text.num
    q, k, v = normal(3, 2, 2, NUM + beside + words, 8, seed=1)
    gate = nn.Linear(16, 2)
    nn.init.zeros_(gate.weight), nn.init.zeros_(gate.bias)
    attend = Attend(None, LAYOUT, LayerPlan(2, 0.0), gate, beside=beside)
    out = attend(q, k, v, normal(2, NUM + beside, 16), text)

    block = torch.repeat_interleave(torch.arange(LAYOUT.num_blocks), LAYOUT.sizes.long())
    means = [torch.stack([x[:, :, :NUM][:, :, block == i].mean(2) for i in range(LAYOUT.num_blocks)], 2) for x in (q, k)]
    kept = (means[0] @ means[1].mT).topk(2).indices
    listed = torch.zeros(2, 2, LAYOUT.num_blocks, LAYOUT.num_blocks, dtype=torch.bool).scatter(3, kept, True)
    mask = torch.ones(2, 2, *[NUM + beside + words] * 2, dtype=torch.bool)
    mask[:, :, :NUM, :NUM] = listed[:, :, block][..., block]
    real = torch.ones(2, NUM + beside + words, dtype=torch.bool)
    if text is not None:
        real[:, NUM + beside :] = torch.arange(words) < text.valid[:, None]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & real[:, None, None]) * real[:, None, :, None]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
    assert float(attend.stats.density) == pytest.approx(2 / LAYOUT.num_blocks)


def test_text_before_the_video_is_refused():
    with pytest.raises(ValueError, match="text: got one before the video, accepted where 6 tokens stand beside the grid: one behind it"):
        Attend(None, LAYOUT, None, None, beside=6)(*normal(3, 1, 1, NUM + 10, 8), None, Text(4, before=True))


@pytest.mark.parametrize("before", [True, False])
def test_an_order_and_its_inverse(before):
    """Also merged: the tokens beside the grid are those that came, the grid's what merging makes of them without any beside."""
    x = normal(2, NUM + 6, 16)
    grid, beside = (x[:, 6:], x[:, :6]) if before else (x[:, :NUM], x[:, NUM:])
    tokens, alone = Tokens.begin(x, LAYOUT, before=before), Tokens.begin(grid, LAYOUT)
    assert torch.equal(tokens.row_major(), x) and torch.equal(x[:, tokens.order], tokens.states())
    tokens, alone = tokens.merged(0.5), alone.merged(0.5)
    assert torch.equal(tokens.states(), torch.cat((alone.states(), beside), 1))
    rows = tokens.kept_rows(torch.arange(NUM + 6.0)[None, :, None], 1)
    assert torch.equal(rows[:, -6:, 0], torch.arange(NUM, NUM + 6.0).expand(2, -1)) and torch.equal(rows[:, :-6, 0].long(), alone.merge_map.kept_index)
    changed = tokens.parted(tokens.states() + 1)
    torch.testing.assert_close(changed.row_major(), x + 1)
    assert torch.equal((changed + x).states(), changed.unmerged().states() + x[:, tokens.order])


@pytest.mark.parametrize("rung", [Rung(), Rung(1, 0), Rung(1, 2)], ids=["dense", "half", "merged"])
@torch.no_grad()
def test_it_does_not_matter_where_they_stand(rung):
    """The same given frame before the video (LTXConditionPipeline) and behind it (windows of a long video): the same tokens."""
    model, before = built()
    move = torch.cat((torch.arange(15, 60), torch.arange(15)))
    behind = before | {"num_frames": 1, "height": 1, "width": 1, "timestep": before["timestep"][:, move], "hidden_states": before["hidden_states"][:, move]}
    behind["video_coords"] = before["video_coords"][:, :, move]
    assert torch.equal(behind["video_coords"], coords((0, (3, 5, 3)), (2, (1, 5, 3))))
    first, _ = model.run(before, [rung] * 3)
    again, _ = model.run(behind, [rung] * 3)
    torch.testing.assert_close(first[:, move], again, rtol=0, atol=1e-5 * float(first.abs().max()))
    alone = ltx()[1] | {name: before[name][:, 15:] for name in ("hidden_states", "timestep")}
    alone["video_coords"] = before["video_coords"][:, :, 15:]
    without, _ = model.run(alone, [rung] * 3)
    assert (without - first[:, 15:]).abs().amax(-1).min() > 1e-4, "every token of the video reads them"


def test_processes_that_share_a_sample_refuse_them():
    model, arguments = built()
    model.sequence_group = SequenceGroup(0, 2)
    with pytest.raises(ValueError, match="hidden_states: got 15 tokens beside the grid, accepted with a sequence_group: none"):
        model.run(arguments)


@torch.no_grad()
def test_a_mask_is_of_the_conditions_alone():
    """Masked out altogether, references and key frame are as if they were not there, but for those that read the video; a mask of the video is refused."""
    model, call = built(ltx2_beside)
    mask = torch.ones(2, 66, 66)
    mask[:, :45, 45:] = 0
    for rung in (Rung(1, 0), Rung(1, 2)):
        out = model.run(call | {"video_self_attention_mask": mask, "isolate_modalities": True}, [rung] * 3)[0]
        changed = call["hidden_states"].clone()
        changed[:, 45:] += 1
        again = model.run(call | {"hidden_states": changed, "video_self_attention_mask": mask, "isolate_modalities": True}, [rung] * 3)[0]
        assert torch.equal(out[:, :45], again[:, :45]) and not torch.equal(out[:, 45:], again[:, 45:])
        seen = model.run(call | {"isolate_modalities": True}, [rung] * 3)[0]
        assert float((out - seen)[:, :45].abs().max()) > 1e-3
    mask[:, 3, 7] = 0
    with pytest.raises(ValueError, match="video_self_attention_mask: got one between the video's own tokens, accepted beside a student"):
        model.run(call | {"video_self_attention_mask": mask})
