"""The pipeline class of an enabled pipeline: a subclass of its own whose call has the student's defaults and refuses what a student cannot do."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from usv.patterns.processors import unwrap
from usv.sampling.checkpoint import CheckpointError, other_grid
from usv.sampling.sampler import StudentScheduler
from usv.sampling.styles import load_lora_weights

logger = logging.getLogger("usv")


def unguided(signature: inspect.Signature, guidance: Mapping[str, float]) -> dict[str, float]:
    """The arguments of a pipeline's call that make one forward a step of it, where its defaults make more. guidance: see `Family`."""
    defaults = {name: signature.parameters[name].default for name in guidance if name in signature.parameters}
    return {name: guidance[name] for name, value in defaults.items() if isinstance(value, (int, float)) and value != guidance[name]}


def folded(sampling: Mapping) -> bool:
    """Whether guidance is folded into a student's weights, as it is but for a router's, whose weights are the base's."""
    return "guidance_scale" not in sampling


@contextmanager
def own_call(pipe: DiffusionPipeline, unguided: bool) -> Iterator[None]:
    """A call of an enabled pipeline itself, which has checked its arguments; one of whose parts asks for guidance does not where it is folded in."""
    guider = getattr(pipe, "guider", None) if unguided else None
    own = getattr(guider, "_enabled", False)
    planned = [unwrap(getattr(pipe, place))._planned for place in pipe._usv.originals]
    for each in planned:
        each.called = True
    if own:
        guider.disable()
    try:
        yield
    finally:
        for each in planned:
            each.called = False
        if own:
            guider.enable()


def student_pipeline(base: type, sampling: dict, guidance: Mapping[str, float], low: Mapping | None = None) -> type:
    """A subclass of the pipeline whose call has the student's defaults. guidance: see `Family`."""
    signature = inspect.signature(base.__call__)

    def call(self, *args, **kwargs):
        given = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        given.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        for scale, off in guidance.items() if folded(sampling) else ():
            if given.get(scale) not in (None, off):
                raise CheckpointError(f"{scale}: got {given[scale]}, accepted: {off}; guidance is folded into the student's weights")
        if sampling.get("student_timesteps") and not isinstance(self.scheduler, StudentScheduler):
            raise CheckpointError(f"scheduler: got a {type(self.scheduler).__name__}, accepted beside a few-step student: its own, which usv.enable brings")
        if given.get("negative_prompt") and folded(sampling):
            logger.warning("usv: negative_prompt is not used: guidance is folded into the student's weights")
        defaults = unguided(signature, guidance) if folded(sampling) else {"guidance_scale": sampling["guidance_scale"]}
        if not folded(sampling) and low is not None:
            defaults["guidance_scale_2"] = low["guidance_scale"]
        defaults |= {key: sampling.get(key) for key in ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length")}
        defaults = {key: value for key, value in defaults.items() if value is not None and key in signature.parameters}
        given = {**defaults, **given}
        if (note := other_grid(sampling, given)) is not None:
            logger.warning("usv: %s", note)
        if given.get("num_frames") is not None:
            given["num_frames"] = frames_argument(self, given["num_frames"])
        with own_call(self, folded(sampling)):
            return base.__call__(self, **given)

    def save_pretrained(self, *args, **kwargs):
        """The pipeline as it is without the student; `usv.export` writes one with it."""
        logger.warning("usv: save_pretrained writes the pipeline without its student; python -m usv.export writes it with")
        state = self._usv
        held, originals = {place: getattr(self, place) for place in state.originals}, {place: state.brought_along(self, place, moved=False) for place in state.originals}
        scheduler, kind = self.scheduler, type(self)
        try:
            self.__class__ = state.original_class
            for place, original in originals.items():
                setattr(self, place, original)
            self.scheduler = state.scheduler
            return self.save_pretrained(*args, **kwargs)
        finally:
            for place, student in held.items():
                setattr(self, place, student)
            self.scheduler, self.__class__ = scheduler, kind

    body = {"__call__": call, "save_pretrained": save_pretrained, "__module__": base.__module__}
    if hasattr(base, "load_lora_weights"):
        body["load_lora_weights"] = lambda self, *args, **kwargs: load_lora_weights(base, self, *args, **kwargs)
    return type(base.__name__, (base,), body)


def frames_result(pipe: DiffusionPipeline, num_frames: int) -> int:
    """Frames that `pipe(num_frames=…)` really makes: diffusers rounds to k · factor + 1, also at factor 1."""
    factor = pipe.vae_scale_factor_temporal
    return num_frames if num_frames % factor == 1 else num_frames // factor * factor + 1


def frames_argument(pipe: DiffusionPipeline, num_frames: int) -> int:
    """The argument that makes a stock pipeline make `num_frames` frames; an enabled one takes the number itself."""
    return num_frames - 1 if getattr(pipe, "vae_scale_factor_temporal", None) == 1 else num_frames
