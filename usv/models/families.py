"""Which transformer is of which family; a new family's file is named here, and nowhere else.

Files are imported when first asked for: diffusers takes seconds to import, and a user of one family pays for one.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from torch import nn

from usv.models.protocol import Family

FILES = ("wan", "hunyuan_video", "cogvideox", "ltx", "hunyuan_video15", "ltx2", "mochi")  # each holds FAMILIES


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """All families."""
    return tuple(family for name in FILES for family in import_module(f"usv.models.{name}").FAMILIES)


def family_or_none(transformer: nn.Module) -> Family | None:
    return next((family for cls in type(transformer).__mro__ for family in families() if cls in family.transformers), None)


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer. ValueError for a class of none."""
    if (family := family_or_none(transformer)) is not None:
        return family
    known = ", ".join(cls.__name__ for family in families() for cls in family.transformers)
    raise ValueError(f"transformer: got a {type(transformer).__name__}, accepted: {known}")
