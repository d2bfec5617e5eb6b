"""What is read from and written to disk: safetensors, JSON and YAML only."""
