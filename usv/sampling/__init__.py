"""From a checkpoint to videos: enabling a pipeline, the sampler, generation, export."""
