"""Argument checks: every refusal names the argument, what was given and what is accepted."""

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, name: str, got, expected) -> None:
    """Raises a ValueError `name: got ..., expected ...` unless the condition holds.

    A text that names a size is given as a function: written in advance it would stop torch.compile where the size is symbolic.
    """
    if not condition:
        got, expected = (x() if callable(x) else x for x in (got, expected))
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    require(tuple(tensor.shape) == tuple(shape), name, f"shape {tuple(tensor.shape)}", f"{letters} = {tuple(shape)}")


def check_lists(kv_num_blocks: Tensor, kv_indices: Tensor) -> None:
    """Shapes and dtypes of the block lists."""
    require(kv_indices.dim() == 4, "kv_indices", f"shape {tuple(kv_indices.shape)}", "(B, H, M, K)")
    check_shape("kv_num_blocks", kv_num_blocks, tuple(kv_indices.shape[:3]), "(B, H, M) of kv_indices")
    for name, tensor in (("kv_num_blocks", kv_num_blocks), ("kv_indices", kv_indices)):
        require(tensor.dtype == torch.int32, name, tensor.dtype, "torch.int32")


def check_layout(side: str, starts: Tensor, sizes: Tensor, batch: int, heads: int, count: int | None) -> None:
    """Shapes and dtypes of the starts and sizes of one side; count None accepts any number of blocks."""
    for name, tensor in ((f"{side}_starts", starts), (f"{side}_sizes", sizes)):
        require(tensor.dtype == torch.int32, name, tensor.dtype, "torch.int32")
        blocks = tensor.shape[-1] if tensor.dim() else 0
        expected = blocks if count is None else count
        accepted = ((expected,), (batch, heads, expected))
        require(tuple(tensor.shape) in accepted, name, f"shape {tuple(tensor.shape)}", f"{accepted[0]} or {accepted[1]}")
    require(starts.shape == sizes.shape, f"{side}_sizes", f"shape {tuple(sizes.shape)}", f"{side}_starts' {tuple(starts.shape)}")


def check_attention(q, k, v, selection, key_bias, block_gate) -> None:
    """Shapes, dtypes and devices of the arguments of `block_sparse_attention`; looks at no values."""
    require(q.dim() == 4, "q", f"shape {tuple(q.shape)}", "(B, H, Sq, D)")
    batch, heads, _, dim = q.shape
    require(k.dim() == 4, "k", f"shape {tuple(k.shape)}", "(B, H, Sk, D)")
    check_shape("k", k, (batch, heads, k.shape[2], dim), "(B, H, Sk, D)")
    check_shape("v", v, tuple(k.shape), "the shape of k")
    require(q.dtype in FLOAT_DTYPES, "q", q.dtype, "float64, float32, float16 or bfloat16")
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, name, tensor.dtype, f"q's dtype {q.dtype}")
    lists = selection.kv_indices
    fits = tuple(lists.shape[:2]) == (batch, heads) and lists.shape[3] > 0
    require(fits, "selection.kv_indices", f"shape {tuple(lists.shape)}", lambda: f"({batch}, {heads}, M, K), B and H of q, K at least 1")
    given = [("k", k), ("v", v), ("selection", lists)]
    if key_bias is not None:
        per_head = key_bias.shape[1] if key_bias.dim() == 3 and key_bias.shape[1] in (1, heads) else heads
        check_shape("key_bias", key_bias, (batch, per_head, k.shape[2]), "(B, H or 1, Sk)")
        given.append(("key_bias", key_bias))
    if block_gate is not None:
        check_shape("block_gate", block_gate, tuple(lists.shape), "(B, H, M, K) of selection.kv_indices")
        given.append(("block_gate", block_gate))
    for name, tensor in given:
        require(tensor.device == q.device, name, tensor.device, f"q's device {q.device}")
        if name in ("key_bias", "block_gate"):
            require(tensor.dtype in FLOAT_DTYPES, name, tensor.dtype, "a floating dtype")


def check_values(selection, q_len: int, kv_len: int) -> None:
    """Looks at the integers of a selection: counts, listed indices, block bounds.

    On the CPU a wrong value raises a ValueError, on a GPU the device asserts: see `require_each`.
    """
    counts, lists = selection.kv_num_blocks, selection.kv_indices
    used = selection.used_slots()
    num_kv = selection.num_kv_blocks
    conditions = [
        ("selection.kv_num_blocks", counts, (counts >= 0) & (counts <= selection.capacity), f"counts in 0..{selection.capacity} (capacity K)"),
        ("selection.kv_indices", lists, ~used | ((lists >= 0) & (lists < num_kv)), f"listed indices in 0..{num_kv - 1}"),
    ]
    sides = (("q", selection.q_starts, selection.q_sizes, q_len), ("kv", selection.kv_starts, selection.kv_sizes, kv_len))
    for (side, starts, sizes, length), largest in zip(sides, (selection.q_max, selection.kv_max)):
        # The GPU kernels choose their tile by this promise and never look past it: tokens beyond it would be left out.
        kept = torch.ones_like(sizes, dtype=torch.bool) if largest == 0 else sizes <= largest
        conditions.append((f"selection.{side}_sizes", sizes, kept, f"blocks of at most {largest} tokens ({side}_max)"))
        check_blocks(f"selection.{side}_sizes", starts, sizes, length)
    for name, values, valid, expected in conditions:
        require_each(name, values, valid, expected)


def check_blocks(name: str, starts: Tensor, sizes: Tensor, length: int) -> None:
    """Refuses blocks that do not lie inside 0..length."""
    if starts.device.type == "cpu" and starts.numel():
        first, count = starts.numpy(), sizes.numpy()  # of a few hundred integers, in a third of the time
        if first.min() >= 0 and count.min() >= 0 and np.add(first, count, dtype=np.int64).max() <= length:
            return
    inside = (starts >= 0) & (sizes >= 0) & (starts.long() + sizes <= length)
    require_each(name, starts + sizes, inside, f"blocks inside 0..{length} (start + size)")


def require_each(name: str, values: Tensor, valid: Tensor, expected: str, on_device: bool | None = None) -> None:
    """Refuses `values` (integers) where `valid` is False.

    On the CPU a ValueError names the first of them. `on_device` (default: for tensors elsewhere) makes the condition a
    device-side assertion instead, which costs no synchronisation and aborts the next one.
    """
    if valid.device.type != "cpu" if on_device is None else on_device:
        torch._assert_async(valid.all(), f"{name}: expected {expected}")
    elif not bool(valid.all()):
        raise ValueError(f"{name}: got {values[~valid].flatten()[:4].tolist()}, expected {expected}")


def looks_at_values(x: Tensor, debug: bool) -> bool:
    """Whether integers are checked: always on the CPU, where it is cheap, elsewhere in debug mode. Never in a compiled graph
    or on a tensor without values (fake, meta)."""
    return type(x) is Tensor and x.device.type != "meta" and not torch.compiler.is_compiling() and (debug or x.device.type == "cpu")


def check_range(name: str, values: Tensor, count: int, letter: str, debug: bool) -> None:
    """Refuses integers outside 0..count - 1."""
    if looks_at_values(values, debug):
        if values.device.type == "cpu" and values.numel():
            unsigned = values.numpy().view("u4" if values.dtype == torch.int32 else "u8")  # in which a negative integer is a large one
            if unsigned.max() < count:  # the mask only where it has something to name
                return
        require_each(name, values, (values >= 0) & (values < count), f"values in 0..{count - 1} ({letter} - 1)")
