"""Measuring: perplexity and cost, alike for dense and pruned models."""
