"""llama.cpp's server behind `ptkit serve`: adapters are restored into its slots."""
