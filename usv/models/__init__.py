"""Video transformers with an explicit plan argument, on diffusers' own weights and classes."""
