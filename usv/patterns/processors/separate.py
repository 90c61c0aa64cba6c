"""Self-attention over video tokens alone, text in another attention: Wan and its kin, LTX, LTX-2, Cosmos, Kandinsky, Allegro,
AnyFlow, Helios. Condition and history tokens that lie beside the grid stay dense."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from usv.patterns.processors.run import Processor, heads, norm, project, project_out, refuse_mask, rotate_pairs
from usv.patterns.protocol import require


class WanProcessor(Processor):
    """Wan, and what has its blocks: VACE, Animate, SkyReels-V2, ChronoEdit."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        refuse_mask(attention_mask, "a pattern has no causal order of frames (SkyReels-V2's causal_block_size)")
        q, k, v = project(attn, hidden_states)
        q, k, v = heads(attn, attn.norm_q(q), attn.norm_k(k), v)
        q, k = (rotate_pairs(x, *rotary_emb) for x in (q, k))
        return project_out(attn, self.attention(q, k, v))


class AnyFlowProcessor(Processor):
    """AnyFlow: Wan with complex rotary tables (1, 1, S, D / 2), one for queries and one for keys."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        refuse_mask(attention_mask, "AnyFlow attends to all frames")
        q, k, v = project(attn, hidden_states)
        q, k, v = heads(attn, norm(attn.norm_q, q), norm(attn.norm_k, k), v)
        q, k = (self._rotate(x, rotary_emb[name]) for x, name in ((q, "query"), (k, "key")))
        return project_out(attn, self.attention(q, k, v))

    @staticmethod
    def _rotate(x: Tensor, table: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.transpose(1, 2).to(torch.float64).unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(3, 4).type_as(x).transpose(1, 2)


class HeliosProcessor(Processor):
    """Helios: history tokens before the video, their keys optionally amplified."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, original_context_length=None
    ):
        refuse_mask(attention_mask, "Helios attends to all of video and history")
        q, k, v = project(attn, hidden_states)
        q, k, v = heads(attn, attn.norm_q(q), attn.norm_k(k), v)
        cos, sin = rotary_emb.unsqueeze(-2).chunk(2, dim=-1)
        q, k = (rotate_pairs(x, cos, sin) for x in (q, k))
        history = self.beside(q)
        if attn.is_amplify_history and history is not None:
            scale = 1.0 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1.0)
            scale = scale.view(1, 1, -1, 1) if attn.history_scale_mode == "per_head" else scale
            k = torch.cat((k[:, : history.num] * scale, k[:, history.num :]), 1)
        return project_out(attn, self.attention(q, k, v, history))


class LTXProcessor(Processor):
    """LTX-Video: packed row-major tokens, condition tokens before them."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        refuse_mask(attention_mask, "LTX-Video attends to all video tokens")
        q, k, v = project(attn, hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:  # tables (B, S, H · D) in fp32
            q, k = (rotate_pairs(x.float(), *image_rotary_emb).to(x.dtype) for x in (q, k))
        q, k, v = heads(attn, q, k, v)
        return project_out(attn, self.attention(q, k, v, self.beside(q)))


class LTX2Processor(Processor):
    """`attn1` of LTX-2: the video's own attention, the long one of six; condition tokens after the video. The others,
    audio and text, stay as they are."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None, key_rotary_emb=None,
        perturbation_mask=None, all_perturbed=None,
    ):  # fmt: skip
        refuse_mask(attention_mask, "a pattern takes no mask of conditions (LTX2InContextPipeline's attention strength and mask)")
        gates = None if attn.to_gate_logits is None else 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool((perturbation_mask == 0).all())
        if all_perturbed:  # spatio-temporal guidance leaves the attention out
            out = attn.to_v(hidden_states)
        else:
            q, k, value = project(attn, hidden_states)
            q, k = attn.norm_q(q), attn.norm_k(k)
            if query_rotary_emb is not None:
                q, k = (self._rotate(attn, x, query_rotary_emb) for x in (q, k))
            q, k, v = heads(attn, q, k, value)
            out = self.attention(q, k, v, self.beside(q)).to(q.dtype)
            if perturbation_mask is not None:
                out = torch.lerp(value, out, perturbation_mask)
        if gates is not None:
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return project_out(attn, out)

    @staticmethod
    def _rotate(attn, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Interleaved tables are (B, S, H · D); split ones (B, H, S, D / 2), of a head's first and second half."""
        if attn.rope_type == "interleaved":
            return rotate_pairs(x.float(), *tables).to(x.dtype)
        cos, sin = (table.transpose(1, 2) for table in tables)
        first, second = x.unflatten(2, (attn.heads, -1)).float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(2).to(x.dtype)


class CosmosProcessor(Processor):
    """`attn1` of Cosmos 1, 2 and 2.5."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        refuse_mask(attention_mask, "Cosmos attends to all video tokens")
        q, k, v = heads(attn, *project(attn, hidden_states))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for x in (q, k))
        return project_out(attn, self.attention(q, k, v).type_as(q))


class AllegroProcessor(Processor):
    """`attn1` of Allegro; its rotary tables are looked up by the position along each axis."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, image_rotary_emb=None
    ):
        from diffusers.models.embeddings import apply_rotary_emb_allegro

        refuse_mask(attention_mask, "Allegro's pipeline attends to all video tokens")
        q, k, v = heads(attn, *project(attn, hidden_states))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb_allegro(x.transpose(1, 2), *image_rotary_emb).transpose(1, 2) for x in (q, k))
        return project_out(attn, self.attention(q, k, v).to(q.dtype))


class Kandinsky5Processor(Processor):
    """`self_attention` of a visual block of Kandinsky 5."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, sparse_params=None):
        require(sparse_params is None, "attention_type", "'nabla', a sparsity of the model's own",
                "a Kandinsky 5 transformer whose config says another attention_type, as 'regular'")  # fmt: skip
        q, k, v = _kandinsky(attn, hidden_states)
        q, k = attn.query_norm(q.float()).type_as(q), attn.key_norm(k.float()).type_as(k)
        if rotary_emb is not None:  # the model itself rounds rotated vectors to bfloat16, whatever its dtype
            q, k = (_rotate_by_matrices(x, rotary_emb).to(torch.bfloat16).type_as(x) for x in (q, k))
        return attn.out_layer(self.attention(q, k, v))


class Kandinsky6Processor(Processor):
    """`self_attention` of the video half of a Kandinsky 6 block; audio and both crossings stay dense."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, rotary_emb_kv=None, attn_mask=None
    ):
        refuse_mask(attn_mask, "Kandinsky 6 attends to all video tokens")
        q, k, v = _kandinsky(attn, hidden_states)
        q, k = attn.query_norm(q), attn.key_norm(k)
        q, k = (x if table is None else _rotate_by_matrices(x, table).to(x.dtype)
                for x, table in ((q, rotary_emb), (k, rotary_emb_kv)))  # fmt: skip
        return attn.out_layer(self.attention(q, k, v))


def _kandinsky(attn, x: Tensor) -> list[Tensor]:
    projections = (attn.to_query, attn.to_key, attn.to_value)
    return [projection(x).unflatten(-1, (attn.num_heads, -1)) for projection in projections]


def _rotate_by_matrices(x: Tensor, table: Tensor) -> Tensor:
    """table: (…, D / 2, 2, 2), a rotation of each neighbouring pair; fp32."""
    return (table * x.unflatten(-1, (-1, 1, 2)).float()).sum(-1).flatten(-2)
