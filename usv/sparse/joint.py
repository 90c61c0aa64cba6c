"""Joint attention of video and text: video rows list blocks of the video and all of the text, text rows list everything.

    video row   fine over (its num_kept blocks + text)  +  gate ⊙ coarse over the video          text row   dense

Padding of the text is listed by nobody and its rows are zeros. Shape letters: B batch, H heads, S video tokens, T text tokens, D head
width, M blocks, K slots of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from usv_kernels import BlockSelection


@dataclass(frozen=True)
class Text:
    """Text tokens of a joint sequence.

    num: how many, padding included. before: True if they precede the video, False if they follow it.
    valid: (B,) integers, how many of them are real, the padding following them; None if all are. Padding is attended by
        nobody and attends to nothing: its output rows are zeros.
    columns, rows: (B or 1, T) and (B or 1, T, T + S), added to the logits of the text's keys in rows of the video, and of all keys in
        rows of the text; None adds nothing. Only where a sequence runs sparse.
    """

    num: int
    before: bool
    valid: Tensor | None = None
    columns: Tensor | None = None
    rows: Tensor | None = None

    def video(self, x: Tensor) -> Tensor:
        """(B, H, T + S, D) -> (B, H, S, D), a view."""
        return x[:, :, self.num :] if self.before else x[:, :, : x.shape[2] - self.num]

    def text(self, x: Tensor) -> Tensor:
        """(B, H, T + S, D) -> (B, H, T, D), a view."""
        return x[:, :, : self.num] if self.before else x[:, :, x.shape[2] - self.num :]

    def join(self, video: Tensor, text: Tensor, dim: int = 2) -> Tensor:
        """Inverse of `video` and `text`."""
        return torch.cat((text, video) if self.before else (video, text), dim)

    def key_mask(self, num_video: int) -> Tensor | None:
        """(B, 1, T + S) bool, True for real tokens; None if all are."""
        if self.valid is None:
            return None
        real = torch.arange(self.num, device=self.valid.device) < self.valid[:, None]
        video = real.new_ones(len(real), num_video)
        return torch.cat((real, video) if self.before else (video, real), 1)[:, None]

    def with_columns(self, key_bias: Tensor | None, num_video: int, batch: int) -> Tensor | None:
        """key_bias (B, 1, T + S) or None, of all keys, with `columns` added: that of the video's rows."""
        if self.columns is None:
            return key_bias
        columns = self.columns[:, None].expand(batch, -1, -1)
        columns = self.join(columns.new_zeros(batch, 1, num_video), columns)
        return columns if key_bias is None else key_bias + columns.to(key_bias.dtype)


def with_beside(text: Text | None, num: int) -> Text:
    """The text of a sequence in which `num` more tokens, all real, stand between the video and it: dense like it, they count as text.
    ValueError where the text is before the video."""
    if text is None:
        return Text(num, before=False)
    if text.before:
        raise ValueError(f"text: got one before the video, accepted where {num} tokens stand beside the grid: one behind it")
    return Text(num + text.num, False, None if text.valid is None else text.valid + num)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, text: Text | None = None) -> Tensor:
    """(B, H, ·, D): everything attends to everything but padding."""
    mask = None if text is None else text.key_mask(k.shape[2] - text.num)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]) * mask[..., None]


def list_text(selection: BlockSelection, text: Text, num_video: int) -> BlockSelection:
    """The selection of video rows over the joint keys: blocks of text follow those of the video, listed by every row."""
    batch, heads = selection.kv_indices.shape[:2]
    counts, device = selection.kv_num_blocks, selection.kv_indices.device
    block = selection.kv_max or 64  # no larger than the video's, so that what the host promised of their sizes still holds
    begins = torch.arange(0, text.num, block, device=device, dtype=torch.int32)
    number = torch.arange(len(begins), device=device)
    slots = (counts[..., None] + number).long()
    lists = F.pad(selection.kv_indices, (0, len(begins)))
    lists = lists.scatter(3, slots, (selection.num_kv_blocks + number).to(lists.dtype).expand(slots.shape))
    offset, start = (text.num, 0) if text.before else (0, num_video)
    starts, sizes = selection.kv_starts + offset, selection.kv_sizes
    text_starts, text_sizes = start + begins, (text.num - begins).clamp(max=block)
    if text.valid is not None:
        starts, sizes, text_starts = (x.expand(batch, heads, x.shape[-1]) for x in (starts, sizes, text_starts))
        valid = text.valid.to(device=device, dtype=torch.int32)[:, None, None]
        text_sizes = (valid - begins).clamp(0, block).expand(batch, heads, -1)
    return BlockSelection(
        counts + len(begins), lists, selection.q_starts, selection.q_sizes, torch.cat((starts, text_starts), -1),
        torch.cat((sizes, text_sizes), -1), selection.q_max, selection.kv_max,
    )  # fmt: skip


def text_rows(q: Tensor, k: Tensor, v: Tensor, text: Text, key_bias: Tensor | None) -> Tensor:
    """(B, H, T, D): the rows of the text, dense. key_bias: (B, 1, T + S)."""
    mask = text.key_mask(k.shape[2] - text.num)
    bias = None if key_bias is None else key_bias.to(q.dtype).unsqueeze(-2)
    if text.rows is not None:
        bias = text.rows.to(q.dtype)[:, None] + (0 if bias is None else bias)
    if mask is not None:
        bias = (q.new_zeros(()) if bias is None else bias).masked_fill(~mask.unsqueeze(-2), float("-inf"))
    out = F.scaled_dot_product_attention(text.text(q), k, v, attn_mask=bias)
    if text.valid is None:
        return out
    real = torch.arange(text.num, device=q.device) < text.valid[:, None]
    return out * real[:, None, :, None]
