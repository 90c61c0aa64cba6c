"""usv/models/lora.py: student, teacher and critic on one base, none in another's way."""

import pytest
import tiny
import torch
from diffusers import WanPipeline

from usv.config import LoraConfig
from usv.models import lora
from usv.objectives.distribution import Critic
from usv.objectives.protocol import Prompt
from usv.objectives.velocity import guided_velocity
from usv.sparse.grid import Tile


@pytest.fixture
def student(tiny_wan):
    torch.manual_seed(0)
    transformer = WanPipeline.from_pretrained(tiny_wan).transformer
    model = lora.adapt(transformer, Tile(*tiny.TILE), 4, 8.0, LoraConfig().targets)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_critic_learns_beside_the_student_and_the_teacher(student, checkpointing):
    config = student.config
    x = torch.randn(2, config.in_channels, 3, 8, 8)
    text, timestep = torch.randn(2, tiny.TEXT, config.text_dim), torch.tensor([300.0, 700.0])
    teacher, mine = lora.Teacher(student), lambda: student(x, timestep, text)[0].detach()
    before, taught = mine(), teacher(x, timestep, text)[0]
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    branch = lora.Branch(student, 4, 8.0)
    with branch.active():
        torch.testing.assert_close(branch(x, timestep, text)[0], taught)  # it begins at the teacher
    assert {name for name, p in student.named_parameters() if p.requires_grad} - set(f"transformer.{n}" for n in branch.weights) == learning
    if checkpointing:
        student.transformer.enable_gradient_checkpointing()
        student.train()
    critic, generator = Critic(branch, 1e-2, 3.0), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(12):
        losses.append(critic.learn(x, Prompt(text), generator)["loss/critic"])
        critic.step()
    assert sum(losses[-3:]) < sum(losses[:3])
    torch.testing.assert_close(mine(), before, rtol=0, atol=0)
    torch.testing.assert_close(teacher(x, timestep, text)[0], taught, rtol=0, atol=0)
    assert all(p.grad is None for name, p in student.named_parameters() if ".critic." not in name)
    with branch.active():
        assert (branch(x, timestep, text)[0] - taught).abs().max() > 1e-3
    taught = lambda x_t, t: guided_velocity(teacher, x_t, t, text, text[0] * 0, 2.0)  # noqa: E731
    judged = critic.loss(x.clone().requires_grad_(), Prompt(text), taught, generator)
    assert torch.isfinite(judged) and judged > 0


def test_adapters_of_the_critic_are_not_the_students(student):
    alone = lora.merged(student.state_dict(), 2.0)
    branch = lora.Branch(student, 4, 8.0)
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter)
    state = student.state_dict()
    together = lora.merged(state, 2.0)
    assert alone.keys() == together.keys() and all(torch.equal(alone[n], together[n]) for n in alone)
    assert not any(".critic." in n for n in state if lora.is_adapter(n))
    kept = {n: v.clone() for n, v in branch.state_dict().items()}
    for parameter in branch.parameters():
        torch.nn.init.zeros_(parameter)
    branch.load_state_dict(kept)
    assert all(torch.equal(v, kept[n]) for n, v in branch.state_dict().items())
    with pytest.raises(KeyError):
        branch.load_state_dict({})
