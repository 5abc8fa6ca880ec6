"""What lies on disk: where a checkpoint comes from, its weights and its tokenizer."""
