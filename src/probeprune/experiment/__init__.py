"""Experiments: subjects x measures, one JSON line a measurement, resumable."""
