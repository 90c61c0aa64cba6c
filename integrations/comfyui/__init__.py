"""ComfyUI: a student of `python -m usv.export --comfyui` run by its plan. Put this folder into ComfyUI's custom_nodes, `pip install` usv beside it.

    Load Diffusion Model (the file)  →  USV Student (the same file)  →  SamplerCustom (cfg 1, the node's sigmas)
    Load Diffusion Model (the base)  →  LoraLoaderModelOnly (the file, strength 1)  →  USV Student (the same file)  →  …

Sampler: `lcm` for a few-step student, `uni_pc` else. Written for ComfyUI at commit a125cd84: its `optimized_attention_override`, block
patches (`patches_replace["dit"]`) and model function wrapper.
"""

from __future__ import annotations

from .student import apply, read, sigmas_of

FOLDERS = ("diffusion_models", "loras")


class USVStudent:
    """Plan, gates and steps of a student for a model that has its weights."""

    CATEGORY = "USV"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL", "SIGMAS", "INT", "INT", "INT")
    RETURN_NAMES = ("model", "sigmas", "width", "height", "length")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        import folder_paths

        files = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder) if name.endswith(".safetensors")]
        return {"required": {"model": ("MODEL",), "student": (sorted(set(files)),)}}

    def run(self, model, student: str):
        """The model with the student's plan, the noise levels it is sampled at, and the size of the videos it was trained on."""
        import folder_paths

        path = next((found for folder in FOLDERS if (found := folder_paths.get_full_path(folder, student))), None)
        if path is None:
            raise FileNotFoundError(f"USV Student: got {student}, accepted: a file in models/{' or models/'.join(FOLDERS)}")
        record, gates = read(path)
        sampling = record["sampling"]
        return (apply(model, record, gates, path), sigmas_of(sampling), *(int(sampling.get(key) or 0) for key in ("width", "height", "num_frames")))


NODE_CLASS_MAPPINGS = {"USVStudent": USVStudent}
NODE_DISPLAY_NAME_MAPPINGS = {"USVStudent": "USV Student"}
