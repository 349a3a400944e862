"""Model directories as Hugging Face libraries, vLLM and others load them: shards, config, companions, model card."""
