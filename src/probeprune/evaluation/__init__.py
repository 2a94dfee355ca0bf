"""Measuring: perplexity, accuracy on tasks, and cost, alike for dense and pruned models."""
