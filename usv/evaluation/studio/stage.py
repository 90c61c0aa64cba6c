"""What the page asks for: clips of one prompt and seed, dense and at a budget, with what was executed; and the plan of any budget at once.

One pipeline makes both, one after the other, so that their seconds are of one process. Nothing here knows a page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from threading import Lock

import torch

import usv
from usv.config import ModelConfig, SettingError
from usv.evaluation.own import model_of, sized
from usv.policy.dial import BudgetError, dial_of
from usv.sampling.budget import plan_at
from usv.sampling.checkpoint import Student, load_student, read_config
from usv.sampling.generate import best_place, check_images, generate, latent_size, load_pipeline
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.sparse.plan import SparsityPlan

KEPT = 16  # dense clips kept, so that only the student is made anew when the budget moves
MOST_PROMPT = 2000  # characters
MOST_SEED = 2**53 - 1  # of a number in a browser


@dataclass(frozen=True)
class Take:
    """One clip and what it took.

    video: (T, 3, H, W) in [0, 1]. seconds: text, denoising and decoding. denoising: seconds of that alone. density: of attention, of the
    tokens left, and merged: share of tokens, both as executed, means over forwards.
    """

    video: torch.Tensor
    seconds: float
    denoising: float
    forwards: int
    density: float = 1.0
    merged: float = 0.0


class Stage:
    """A pipeline, its student, and the clips that were made. Calls from several threads wait for one another."""

    def __init__(self, pipe, model: ModelConfig, student: Student):
        self.pipe, self.model, self.student = pipe, model, student
        self._dense: dict[tuple[str, int], Take] = {}
        self._lock = Lock()
        self._layout = tile_layout(student.model.grid_of(latent_size(pipe, model)), student.model.tile)
        self._shape = ModelShape.of(pipe.transformer.config, model.max_sequence_length, student.model.family.joint)
        try:
            self.reach: tuple[float, float] | None = dial_of(student.policy, student.plan.edges).reach()
            self.fixed = None
        except BudgetError as error:
            self.reach, self.fixed = None, str(error)

    @classmethod
    def open(cls, ckpt: str, model: str) -> Stage:
        """From a student's folder and a model's. CheckpointError, SettingError."""
        read_config(ckpt)  # a wrong checkpoint shows before the model is loaded
        settings = sized(model_of(model), None, {"student": ckpt})
        dtype, device = best_place()
        pipe = load_pipeline(settings.path, dtype, device)
        check_images(pipe, ())
        student = load_student(ckpt, pipe.transformer)
        if student.sampling.get("flow_shift"):
            settings = replace(settings, flow_shift=student.sampling["flow_shift"])
        return cls(pipe, settings, student)

    @property
    def own_budget(self) -> float:
        """What the plan that the student was saved with costs."""
        return self.cost(self.student.executed_plan())

    def cost(self, plan: SparsityPlan) -> float:
        """FLOPs of a mean forward under a plan as a share of the dense one's."""
        return plan_cost(plan, self._shape, self._layout)

    def plan(self, budget: float | None) -> SparsityPlan:
        """The plan of a budget; None: the student's own. BudgetError, which names what can be reached; nothing is computed but the plan."""
        return plan_at(self.student, self.student.plan, budget)

    def dense(self, prompt: str, seed: int) -> Take:
        """The dense model's clip, made once for each of the last prompts and seeds. SettingError."""
        prompt, seed = asked(prompt, seed)
        with self._lock:
            if (prompt, seed) not in self._dense:
                made = generate(self.pipe, self.model, [prompt], [seed])
                self._dense[prompt, seed] = take(made)
                for old in list(self._dense)[:-KEPT]:
                    del self._dense[old]
            return self._dense[prompt, seed]

    def sparse(self, prompt: str, seed: int, budget: float | None) -> Take:
        """The student's clip at a budget; None: at its own. SettingError, BudgetError."""
        prompt, seed = asked(prompt, seed)
        self.plan(budget)
        with self._lock:
            usv.enable(self.pipe, self.student, budget=budget)
            try:
                made = generate(self.pipe, self.model, [prompt], [seed], num_inference_steps=self.student.sampling["num_inference_steps"])
                record = self.pipe._usv.record
                return take(made, record.mean_density(), record.mean_merged())
            finally:
                usv.disable(self.pipe)


def asked(prompt: str, seed) -> tuple[str, int]:
    """A prompt and a seed as they are used. SettingError for what is none."""
    prompt = (prompt or "").strip()
    if not prompt or len(prompt) > MOST_PROMPT:
        raise SettingError(f"prompt: got {'nothing' if not prompt else f'{len(prompt)} characters'}, accepted: a line of at most {MOST_PROMPT} characters")
    if isinstance(seed, bool) or not isinstance(seed, (int, float)) or seed != seed or not 0 <= seed <= MOST_SEED or int(seed) != seed:
        raise SettingError(f"seed: got {seed!r}, accepted: a whole number from 0 to {MOST_SEED}")
    return prompt, int(seed)


def take(made, density: float = 1.0, merged: float = 0.0) -> Take:
    """Of a generation of one clip."""
    return Take(made.videos[0], sum(made.seconds.values()), made.seconds["denoise"], made.forwards, density, merged)
