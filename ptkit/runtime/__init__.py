"""How a KV prefix meets the frozen model: base loading, training, compiling, generation."""
