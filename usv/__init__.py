"""USV: learned sparsification of video diffusion transformers.

    import usv
    usv.enable(pipe, "outputs/usv_mini/student")      # pipe: a diffusers WanPipeline
"""

_PUBLIC = ("disable", "enable", "set_budget", "summary")
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    # diffusers takes seconds to import: `import usv` alone, or a metric, should not pay for it
    if name in _PUBLIC:
        from usv.sampling import budget, enable

        return getattr(budget if name in ("enable", "set_budget") else enable, name)
    raise AttributeError(f"module 'usv' has no attribute {name!r}")
