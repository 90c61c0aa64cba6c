"""Self-attention of video and text together: CogVideoX and ConsisID, EasyAnimate (text before), HunyuanVideo, FramePack,
HunyuanVideo-1.5, Mochi, MotifVideo (text after). Text rows and columns are dense, padding is listed by nobody."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from usv.patterns.processors.run import Processor, heads, norm, project, project_out, refuse_mask, rotate_pairs
from usv.patterns.protocol import Text


class CogVideoXProcessor(Processor):
    """Joint attention of a CogVideoX or ConsisID block, text before video."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        refuse_mask(attention_mask, "CogVideoX attends to all text tokens")
        num_text = encoder_hidden_states.shape[1]
        q, k, v = heads(attn, *project(attn, torch.cat((encoder_hidden_states, hidden_states), 1)))
        q, k = norm(attn.norm_q, q), norm(attn.norm_k, k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat((x[:, :num_text], apply_rotary_emb(x[:, num_text:], image_rotary_emb, sequence_dim=1)), 1)
                for x in (q, k)
            )
        out = project_out(attn, self.attention(q, k, v, Text(num_text, before=True)))
        return out[:, num_text:], out[:, :num_text]


class EasyAnimateProcessor(Processor):
    """Joint attention of an EasyAnimate block, text before video; padding of the text is attended as the model does."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        refuse_mask(attention_mask, "EasyAnimate attends to all text tokens")
        num_text = encoder_hidden_states.shape[1]
        video, text = _video_and_text(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            video = [*(apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in video[:2]), video[2]]
        out = self.attention(*(torch.cat(pair, 1) for pair in zip(text, video)), Text(num_text, before=True))
        return _outputs(attn, out[:, num_text:], out[:, :num_text])


class HunyuanVideoProcessor(Processor):
    """Joint attention of a HunyuanVideo block, double (text has its own projections) or single; text after video, and
    FramePack's history before it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        num_video, num_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        video, text = _video_and_text(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            video = [*(apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in video[:2]), video[2]]
        history = self.beside(video[0])
        num_history = 0 if history is None else history.num
        if num_history:  # what is dense lies together: video, history, text
            video = [torch.cat((x[:, num_history:], x[:, :num_history]), 1) for x in video]
        dense = Text(num_history + num_text, False, self._valid(attention_mask, num_video, num_history))
        out = self.attention(*(torch.cat(pair, 1) for pair in zip(video, text)), dense)
        video, text = out[:, :num_video], out[:, num_video:]
        if num_history:
            video = torch.cat((video[:, num_video - num_history :], video[:, : num_video - num_history]), 1)
        return _outputs(attn, video, text)

    @staticmethod
    def _valid(attention_mask: Tensor | None, num_video: int, num_history: int) -> Tensor | None:
        """attention_mask: (B, 1, 1, S + T), True for real tokens; the video is all real, padding ends the text."""
        if attention_mask is None:
            return None
        return attention_mask[:, 0, 0, num_video:].sum(-1) + num_history


class MotifVideoProcessor(HunyuanVideoProcessor):
    """Joint attention of a MotifVideo block, double or single, text after video. In its decoder layers the whole encoded
    video stands where the text is, and is dense."""


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """Joint attention of a HunyuanVideo-1.5 block, text after video: image, byT5 and MLLM tokens, then the padding of all
    three. The block hands over the text's mask (B, T) alone; diffusers makes a (B, 1, N, N) mask of it, this does not."""

    @staticmethod
    def _valid(attention_mask: Tensor | None, num_video: int, num_history: int) -> Tensor | None:
        return None if attention_mask is None else attention_mask.bool().sum(-1) + num_history


class MochiProcessor(Processor):
    """Joint attention of a Mochi block, text after video. As diffusers does, real text tokens are moved before the padding."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
        num_video = hidden_states.shape[1]
        video, text = _video_and_text(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:  # tables (S, H, D / 2), fp32
            cos, sin = (table.repeat_interleave(2, -1) for table in image_rotary_emb)
            video = [*(rotate_pairs(x.float(), cos, sin).to(x.dtype) for x in video[:2]), video[2]]
        real = attention_mask.bool()
        first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :, None, None]
        text = [x.take_along_dim(first, 1) for x in text]
        dense = Text(text[0].shape[1], False, real.sum(-1))
        out = self.attention(*(torch.cat(pair, 1) for pair in zip(video, text)), dense)
        return _outputs(attn, out[:, :num_video], out[:, num_video:])


def _video_and_text(attn, video: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Normed queries, keys and values (B, ·, H, D) of both; the text's by its own projections where there are any."""
    own = getattr(attn, "add_q_proj", None) is not None
    both = []
    for x, added in ((video, False), (text, own)):
        qkv = [attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)] if added else project(attn, x)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        q, k, v = heads(attn, *qkv)
        both.append([norm(norms[0], q), norm(norms[1], k), v])
    return both[0], both[1]


def _outputs(attn, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    added = getattr(attn, "to_add_out", None)
    return project_out(attn, video), text if added is None else added(text)
