"""Which key/value blocks every query block attends to, and where the blocks lie.

A block is a run of consecutive tokens given by its start and size. Fixed tiles, a partial last tile and the variable
clusters of SVG2 (https://arxiv.org/abs/2505.18875) differ only in these two integers, so one description, and one
kernel, serves all of them. `kv_num_blocks` and `kv_indices` are named as in FlexAttention's BlockMask.

Shape letters: B batch, H heads, M query blocks, N key blocks, K slots of a list, S tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._checks import check_layout, check_lists, looks_at_values, require

TENSORS = ("kv_num_blocks", "kv_indices", "q_starts", "q_sizes", "kv_starts", "kv_sizes")


@dataclass(frozen=True)
class BlockSelection:
    """For each query block a list of key/value blocks, and the layout of both sides.

    Attributes:
        kv_num_blocks: (B, H, M) int32, how many slots of each list are used.
        kv_indices: (B, H, M, K) int32, the listed key blocks, distinct within a list. Slots from `kv_num_blocks` on are
            never read and may hold anything.
        q_starts, q_sizes: (M,) or (B, H, M) int32, first token and number of tokens of each query block.
        kv_starts, kv_sizes: (N,) or (B, H, N) int32, the same for key blocks.
        q_max, kv_max: a bound on the sizes that the host knows, 0 if it knows none. A promise that lets the GPU kernels
            choose a tile without asking the device; give it for tiles of one size (a smaller last one included) or for
            blocks of at most 64 tokens. Attention checks it wherever it looks at values. `from_mask` fills it in where the sizes lie on the CPU.

    Blocks of one side must not overlap; they need not cover the sequence: an uncovered query row attends to nothing, an
    uncovered key is attended by nobody. A size may be 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit the others.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_starts: Tensor
    q_sizes: Tensor
    kv_starts: Tensor
    kv_sizes: Tensor
    q_max: int = 0
    kv_max: int = 0

    def __post_init__(self):
        check_lists(self.kv_num_blocks, self.kv_indices)
        batch, heads, num_q = self.kv_num_blocks.shape
        check_layout("q", self.q_starts, self.q_sizes, batch, heads, num_q)
        check_layout("kv", self.kv_starts, self.kv_sizes, batch, heads, None)
        for name in TENSORS:
            device = getattr(self, name).device
            require(device == self.kv_indices.device, name, device, f"the device of kv_indices ({self.kv_indices.device})")

    @property
    def num_q_blocks(self) -> int:
        return self.q_sizes.shape[-1]

    @property
    def num_kv_blocks(self) -> int:
        return self.kv_sizes.shape[-1]

    @property
    def capacity(self) -> int:
        return self.kv_indices.shape[-1]

    @classmethod
    def from_mask(cls, mask: Tensor, q_sizes: Tensor, kv_sizes: Tensor, capacity: int | None = None) -> "BlockSelection":
        """Lists the True entries of a block mask, in ascending order.

        Args:
            mask: (B, H, M, N) bool, True where query block m attends to key block n.
            q_sizes: (M,) or (B, H, M) integers, sizes of consecutive query blocks that start at token 0.
            kv_sizes: (N,) or (B, H, N), the same for key blocks.
            capacity: slots of each list (K). Default N, which always suffices and needs no look at the data; a smaller
                one saves memory and drops nothing only if no row holds more True entries, which the caller promises.

        Raises:
            ValueError: mask is not a 4-D bool tensor, sizes do not fit it, or capacity is not in 1..N.
        """
        require(mask.dim() == 4 and mask.dtype == torch.bool, "mask", f"{tuple(mask.shape)} {mask.dtype}", "(B, H, M, N) torch.bool")
        num_kv = mask.shape[-1]
        capacity = num_kv if capacity is None else capacity
        require(1 <= capacity <= max(num_kv, 1), "capacity", capacity, f"an integer in 1..{num_kv}")
        # A stable sort of "not listed" moves listed blocks to the front and keeps them ascending, without a host sync.
        order = torch.argsort(mask.logical_not().to(torch.uint8), dim=-1, stable=True)[..., :capacity]
        counts = mask.sum(-1).clamp(max=capacity)
        return cls(counts.to(torch.int32), order.to(torch.int32).contiguous(), *_consecutive(q_sizes, mask.device),
                   *_consecutive(kv_sizes, mask.device), known_bound(q_sizes), known_bound(kv_sizes))  # fmt: skip

    def used_slots(self) -> Tensor:
        """(B, H, M, K) bool, True where a slot of `kv_indices` is in use."""
        slots = torch.arange(self.capacity, device=self.kv_indices.device, dtype=torch.int32)
        return slots < self.kv_num_blocks.unsqueeze(-1)

    def to_mask(self) -> Tensor:
        """(B, H, M, N) bool, the inverse of `from_mask`."""
        used = self.used_slots()
        # Unused slots point at an extra column that is cut off again, so that their content is never looked at.
        target = torch.where(used, self.kv_indices, self.num_kv_blocks).long()
        mask = torch.zeros(*self.kv_num_blocks.shape, self.num_kv_blocks + 1, dtype=torch.bool, device=target.device)
        return mask.scatter_(-1, target, True)[..., :-1]

    def density(self) -> Tensor:
        """Executed token pairs / all token pairs of the covered sequences, a 0-dim float64 tensor (no host sync)."""
        q_BHM, kv_BHN = (self._per_head(x).double() for x in (self.q_sizes, self.kv_sizes))
        executed = torch.einsum("bhm,bhmn,bhn->", q_BHM, self.to_mask().double(), kv_BHN)
        return executed / (q_BHM.sum(-1) * kv_BHN.sum(-1)).sum().clamp(min=1)

    def transpose(self) -> "BlockSelection":
        """The same block pairs listed from the side of the key blocks: lists of query blocks, capacity M."""
        mask = self.to_mask().transpose(-1, -2)
        order = torch.argsort(mask.logical_not().to(torch.uint8), dim=-1, stable=True)
        counts = mask.sum(-1).to(torch.int32)
        return BlockSelection(counts, order.to(torch.int32).contiguous(), self.kv_starts, self.kv_sizes, self.q_starts,
                              self.q_sizes, self.kv_max, self.q_max)  # fmt: skip

    def to(self, device) -> "BlockSelection":
        """The same selection on another device."""
        return BlockSelection(*(x.to(device) for x in self.tensors()), self.q_max, self.kv_max)

    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors in the order of the attributes."""
        return tuple(getattr(self, name) for name in TENSORS)

    def _per_head(self, x: Tensor) -> Tensor:
        return x.expand(*self.kv_num_blocks.shape[:2], x.shape[-1])


def known_bound(sizes: Tensor) -> int:
    """The largest block if `sizes` can be read without waiting for a device and one tile shape fits all, else 0."""
    sizes = torch.as_tensor(sizes)
    if not looks_at_values(sizes, debug=False) or sizes.device.type != "cpu" or sizes.numel() == 0:
        return 0
    largest = int(sizes.max())
    regular = sizes.dim() == 1 and bool((sizes[:-1] == largest).all())
    # Irregular large blocks get loops of their own length: padding each to the largest would waste their products.
    return largest if regular or largest <= 64 else 0


def regular_tile(starts: Tensor, sizes: Tensor, length: int) -> int:
    """The tile size if the blocks (M,), or those of every head (B, H, M), are equal tiles that cover 0..length (the last may be
    smaller), else 0. Looks at the values."""
    if starts.numel() == 0:
        return 0
    starts, sizes = starts.cpu().numpy(), sizes.cpu().numpy()  # NumPy: of a few hundred integers, in a fraction of the time
    tile, count = int(sizes.flat[0]), starts.shape[-1]
    if not (count - 1) * tile < length <= count * tile:
        return 0
    wanted = np.arange(count) * tile
    return tile if (starts == wanted).all() and (sizes == np.minimum(length - wanted, tile)).all() else 0


def _consecutive(sizes: Tensor, device) -> tuple[Tensor, Tensor]:
    sizes = torch.as_tensor(sizes, device=device).to(torch.int32)
    starts = sizes.cumsum(-1, dtype=torch.int32) - sizes
    return starts.contiguous(), sizes.contiguous()


def inverted_lists(kv_num_blocks: Tensor, kv_indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """For each key block the list entries that name it, as offsets into one array: counted, not sorted; no atomics, no host sync.

    Args:
        kv_num_blocks: (B, H, M) int32. kv_indices: (B, H, M, K) int32. num_kv: N.

    Returns:
        offsets: (B, H, N + 1) int32 and entries: (B, H, M * K) int32. entries[offsets[n] : offsets[n + 1]] are the flat
        positions m * K + slot, ascending, whose key block is n: both the query block and the slot of its gate. Entries from
        offsets[N] on are not written.
    """
    batch, heads, num_q, capacity = kv_indices.shape
    device = kv_indices.device
    used = torch.arange(capacity, device=device, dtype=torch.int32) < kv_num_blocks.unsqueeze(-1)
    block = torch.where(used, kv_indices, num_kv).long()
    # The place of an entry is known without sorting: behind those of earlier key blocks, and of earlier query blocks for its own.
    pair = (block * num_q + torch.arange(num_q, device=device).unsqueeze(-1)).flatten(2)
    listed = torch.zeros(batch, heads, (num_kv + 1) * num_q, dtype=torch.bool, device=device).scatter_(-1, pair, True)
    rank = listed.view(batch, heads, num_kv + 1, num_q).cumsum(-1, dtype=torch.int32)
    totals = rank[..., :num_kv, num_q - 1] if num_q else rank.new_zeros(batch, heads, num_kv)
    offsets = torch.nn.functional.pad(totals.cumsum(-1, dtype=torch.int32), (1, 0))
    place = offsets.gather(-1, block.flatten(2)) + rank.flatten(2).gather(-1, pair) - 1
    last = num_q * capacity - 1  # free if any slot is unused
    place = torch.where(used.flatten(2), place, last).long()
    entries = torch.empty(batch, heads, num_q * capacity, dtype=torch.int32, device=device)
    position = torch.arange(num_q * capacity, device=device, dtype=torch.int32)
    return offsets, entries.scatter_(-1, place, position.expand_as(entries))
