"""The shapes world: prompts with a ground truth, and the small models trained on its renderings."""
