"""usv/objectives/velocity.py: guidance folded in, and errors weighted by the length of the sampler's step."""

import torch

from usv import flow
from usv.config import ObjectiveConfig
from usv.objectives import make_objective
from usv.objectives.protocol import Clips, Point, Prompt
from usv.objectives.velocity import guided_velocity


def test_guidance_is_folded_in():
    """Conditional 3, unconditional 1, w = 4: 1 + 4 · 2; at w = 1 the empty prompt is not asked for."""
    asked = []

    def teacher(x, timestep, text):
        asked.append(len(x))
        return text[:, :1, :1, None, None].expand(x.shape), {}

    x, text = torch.zeros(2, 1, 1, 2, 2), torch.full((2, 1, 1), 3.0)
    given = lambda w: guided_velocity(teacher, x, torch.ones(2), text, torch.ones(1, 1), w)  # noqa: E731
    assert torch.equal(given(4.0), torch.full_like(x, 9.0)) and torch.equal(given(1.0), torch.full_like(x, 3.0))
    assert asked == [4, 2]


def test_errors_are_weighted_by_the_samplers_step():
    objective = make_objective(ObjectiveConfig(), 3.0)
    sigma, x = torch.tensor([0.2, 0.9]), torch.randn(2, 1, 1, 2, 2)
    point = Point(x, sigma, Prompt(torch.zeros(2, 1, 1)), x, 0.5)

    class World:
        def taught(self, text):
            return lambda x, timestep: x * timestep.view(-1, 1, 1, 1, 1)

    generator = torch.Generator()
    assert objective.point(World(), point, generator) is point
    wanted = objective.target(World(), point, None, generator)
    torch.testing.assert_close(wanted, x * 1000 * sigma.view(-1, 1, 1, 1, 1))
    loss, values = objective.loss(World(), Clips(x, point.prompt), point, wanted + torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1, 1), wanted, generator)
    torch.testing.assert_close(loss, (flow.slope(sigma, 3.0) * torch.tensor([1.0, 4.0])).mean(), rtol=1e-3, atol=0)
    assert values == {} and objective.update(World(), None, generator) == {}
