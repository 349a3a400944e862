"""Text through any supported model by transformers, one decoder block in memory at a time."""
