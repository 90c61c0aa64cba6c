"""Are the gates' gradients real? On the embedded model, against differences of the loss itself."""

import pytest
import torch
from embedded import clips, wan_mini

from usv import flow
from usv.models.forward import Probe
from usv.objectives.regression import velocity_loss
from usv.objectives.velocity import guided_velocity
from usv.sparse.plan import Rung

CASES, CLIPS = 24, 1


@pytest.fixture(scope="module")
def world():
    """The teacher, real clips' latents, and the embeddings of their captions."""
    pipe, model = wan_mini()
    return model, *clips(pipe, CLIPS)


def case(number, world):
    """Noise level, layer, axis and direction of one case, the teacher's velocity, and rungs of a network on its way down."""
    model, x0, text, empty = world
    generator = torch.Generator().manual_seed(number)
    sigma = flow.shift_sigma((number % 8 + torch.rand(1, generator=generator)) / 8, 3.0).expand(CLIPS)
    x_t = flow.interpolate(x0, torch.randn(x0.shape, generator=generator), sigma)
    wanted = guided_velocity(model, x_t, 1000 * sigma, text, empty, 3.0)
    rungs = [Rung(int(d), int(m)) for d, m in zip(torch.randint(0, 5, (8,), generator=generator), torch.randint(0, 3, (8,), generator=generator))]
    layer, axis = int(torch.randint(8, (1,), generator=generator)), ("density", "merge")[number % 2]
    fields = {"density": rungs[layer].density, "merge": rungs[layer].merge}
    other = Rung(**{**fields, axis: fields[axis] + 1})
    return (x_t, 1000 * sigma, text), wanted, rungs, layer, other


def loss_of(model, inputs, wanted, rungs, probes=None):
    velocity, _ = model(*inputs, rungs, probes)
    return velocity_loss(velocity, wanted).mean()


def test_probe_gradients_agree_with_the_loss(world):
    """Sign of d loss / d mix at one half, which the policy learns from, against loss(other) − loss(rung): at least 90%."""
    agree = 0
    for number in range(CASES):
        inputs, wanted, rungs, layer, other = case(number, world)
        changed = [other if i == layer else r for i, r in enumerate(rungs)]
        with torch.no_grad():
            difference = float(loss_of(world[0], inputs, wanted, changed) - loss_of(world[0], inputs, wanted, rungs))
        mix = torch.tensor(0.5, requires_grad=True)
        loss_of(world[0], inputs, wanted, rungs, {layer: Probe(other, mix)}).backward()
        agree += (float(mix.grad) > 0) == (difference > 0)
    assert agree >= 0.9 * CASES
