"""Strange versions of a JSON value: for each place in it what a damaged file or a stranger may have put there."""

import copy
import random

MARKUP = '"><b title=x>\x00\ud800'
VALUES = (None, True, -1, 0, 3, 1e308, float("nan"), float("inf"), -0.5, 10**30, "", MARKUP, [], {}, [[]], [1, "x"], {"a": {"b": 1}}, [None] * 3)


def places(value, path=()):
    """The paths of all values inside a JSON value, itself included; of long lists the first two places."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from places(value[index], (*path, index))


def altered(value, count: int, seed: int = 0):
    """(what was done, altered copy) of `count` random changes: another value at a place, or a place removed."""
    draw, found = random.Random(seed), list(places(value))
    for _ in range(count):
        path, new = draw.choice(found), draw.choice((*VALUES, "remove"))
        whole = {"": copy.deepcopy(value)}
        owner = whole
        *way, last = ("", *path)
        for name in way:
            owner = owner[name]
        if new == "remove" and path:
            del owner[last]
        else:
            owner[last] = copy.deepcopy(new)
        yield f"{'.'.join(map(str, path))} = {new!r}"[:120], whole[""]
