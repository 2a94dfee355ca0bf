"""Training: recovery of pruned models, and LoRAPrune, which prunes while it trains."""
