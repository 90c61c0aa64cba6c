"""What one forward executes: tokens in tiles, the plan, its cost, the attention, and how ranks share a sample."""
