"""dry_run=true: parameters as published, activations as autograd keeps them, and nothing loaded."""

from pathlib import Path

import pytest
import torch
from runs import composed as settings

from usv.config import SettingError
from usv.sparse.cost import ModelShape
from usv.training.dry_run import GIB, activation_bytes, report, transformer_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "experiment, transformer, vae, tokens",
    [  # parameter counts of the published checkpoints; tokens: (81−1)/4+1 frames of 30×52, (121−1)/4+1 of 22×40
        ("usv_wan", 1_418_996_800, 126_892_531, 32_760),
        ("usv_wan_few_step", 1_418_996_800, 126_892_531, 32_760),
        ("usv_wan_14b", 14_288_491_584, 126_892_531, 32_760),
        ("usv_wan22_5b", 4_999_787_712, 704_688_668, 27_280),
        ("usv_wan22_a14b", 14_288_491_584, 126_892_531, 32_760),
    ],
)
def test_experiments_without_weights(experiment, transformer, vae, tokens, capsys):
    config = settings(f"experiment={experiment}")
    found = report(config)
    teacher = next(role for name, role in found["roles"].items() if name.startswith("teacher"))
    assert (teacher.parameters, found["roles"]["VAE"].parameters, found["tokens"]) == (transformer, vae, tokens)
    assert found["roles"]["text encoder"].parameters == 5_680_910_336
    assert found["bytes"] < 0.92 * found["capacity"], "the experiment must fit the hardware it names"
    text = capsys.readouterr().out
    assert "an estimate" in text and "utilisation 0.35" in text and "nothing was loaded" in text
    assert ("other expert" in text) == (experiment == "usv_wan22_a14b")


def test_lora_and_zero_cut_what_they_say():
    full, lora = (report(settings("experiment=usv_wan", *more)) for more in ([], ["lora.rank=64"]))
    student = lora["roles"]["student"]
    # rank · (in + out) for q, k, v, out and the FFN's two layers of 30 blocks, attn1 and attn2
    adapters = 30 * 64 * (8 * (1536 + 1536) + 2 * (1536 + 8960))
    gates = 30 * 12 * (1536 + 1)
    assert student.trained == adapters + gates and student.optimiser == 8 * student.trained
    assert lora["bytes"] < 0.92 * 24e9 < full["bytes"]
    alone, spread = (
        report(settings("experiment=usv_wan", "runtime=zero3", f"dry_run_devices={n}", "optim.batch_size=8"))
        for n in (1, 8)
    )
    assert spread["roles"]["student"].optimiser == alone["roles"]["student"].optimiser / 8
    assert spread["seconds"] == pytest.approx(alone["seconds"] / 8)
    clip = ["experiment=usv_wan", "lora.rank=64", "runtime=ddp", "dry_run_devices=4"]
    shared = report(settings(*clip, "runtime.sequence_parallel=4"))["roles"]["student"]
    assert shared.activations == pytest.approx(student.activations / 4) and shared.weights == student.weights


@pytest.mark.parametrize("bf16", [True, False])
def test_activations_are_what_autograd_keeps(bf16):
    """Bytes of distinct saved tensors that are no weights, of one more block, against the formula."""
    from diffusers import WanTransformer3DModel

    from usv.models.forward import SparseTransformer
    from usv.sparse.grid import Tile

    def saved(layers: int) -> int:
        torch.manual_seed(0)
        model = SparseTransformer(
            WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64,
                freq_dim=16, ffn_dim=512, num_layers=layers, rope_max_seq_len=64,
            ),
            Tile(3, 4, 4),
        )  # fmt: skip
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            model(torch.randn(1, 16, 3, 32, 32), torch.tensor([500.0]), torch.randn(1, 4, 64))
        return sum(size for size, _ in kept.values())

    shape = ModelShape(128, 4, 512, 1, 4)
    weights = 2 * (8 * 128 * 128 + 2 * 128 * 512) * bf16  # autocast's copies, counted apart
    assert saved(3) - saved(2) - weights == pytest.approx(activation_bytes(shape, 768, bf16, False), rel=0.1)


def test_a_folder_is_believed_before_the_settings(tiny_wan):
    config = settings(f"model.path={tiny_wan}", "model.architecture.num_layers=7")
    assert transformer_config(config)["num_layers"] == 2


def test_validation_is_counted(capsys):
    """A second network beside base and teacher: with adapters, whose training is light, that is what decides."""
    lora, full = (report(settings("experiment=usv_wan_14b", *more)) for more in ([], ["lora.rank=0"]))
    words = capsys.readouterr().out
    assert "while validating" in words
    roles = {name: role.total for name, role in lora["roles"].items()}
    assert lora["bytes"] > sum(roles.values()) and full["bytes"] == sum(role.total for role in full["roles"].values())


def test_refusals_say_what_to_do():
    with pytest.raises(SettingError, match="embedded default model.path=data/wan-mini"):
        transformer_config(settings("model.path=/no/such/model"))
    with pytest.raises(SettingError, match="dry_run_gpu: got h1000, accepted: h100"):
        report(settings("dry_run_gpu=h1000"))
    with pytest.raises(SettingError, match="sequence_parallel: got 3 on dry_run_devices=4"):
        report(settings("runtime=ddp", "runtime.sequence_parallel=3", "dry_run_devices=4"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["policy.budget=0.01"], "policy.budget: got 0.01, but the sparsest plan still costs"),
        (["policy.budgets=[0.01,0.6]"], "policy.budgets: got 0.01"),
        (["policy.input=content", "optim.accumulate=2"], "policy.input: got content"),
        (["optim.optimizer=muon", "runtime=zero2"], "optim.optimizer: got muon with runtime=zero2"),
        (["policy.cost=/no/such.json"], "python -m usv.bench costs"),
    ],
)
def test_what_a_run_refuses_has_no_price(words, said):
    with pytest.raises(ValueError, match=said):
        report(settings(*words))


def test_checkpointing_keeps_one_block():
    shape = ModelShape(1536, 12, 8960, 30, 512)
    whole, cut = (activation_bytes(shape, 32760, True, c) for c in (False, True))
    assert whole / 30 < cut < whole / 10 and 5 < cut / GIB < 10
