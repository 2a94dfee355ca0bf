"""Perplexity and accuracy on tasks, measured the same way for dense and pruned models."""
