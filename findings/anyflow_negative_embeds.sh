#!/usr/bin/env bash
# AnyFlowPipeline, one prompt with negative_prompt_embeds at its default guidance_scale of 1.0, at which there is no guidance and a
# negative prompt is documented to be ignored: two videos come back, and the first of them, frames[0], is the negative prompt's.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy ftfy
"$here/venv/bin/python" - <<'PY'
import diffusers, torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

torch.manual_seed(0)
model = AnyFlowTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                                  freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32).eval()
pipe = AnyFlowPipeline(None, None, model, None, FlowMapEulerDiscreteScheduler())
pipe.set_progress_bar_config(disable=True)
prompt, negative = torch.randn(2, 1, 6, 16)


def videos(**text):
    generator = torch.Generator().manual_seed(0)
    return pipe(**text, height=64, width=64, num_frames=9, num_inference_steps=2, output_type="latent", generator=generator).frames


alone, both = videos(prompt_embeds=prompt), videos(prompt_embeds=prompt, negative_prompt_embeds=negative)
of_negative = videos(prompt_embeds=negative)
print("diffusers", diffusers.__version__)
print("videos of one prompt:", len(alone), "- with negative_prompt_embeds beside it:", len(both))
same = [torch.allclose(both[i], other[0], atol=1e-4) for i, other in ((0, of_negative), (1, alone))]
print("the first is the negative prompt's:", same[0], "- the second is the prompt's:", same[1])
assert len(alone) == 1 and len(both) == 2 and all(same), "diffusers does something else now"
PY
