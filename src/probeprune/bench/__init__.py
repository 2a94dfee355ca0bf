"""Measured speed and memory of pruned models beside the dense one: prefill and decode, interleaved."""
