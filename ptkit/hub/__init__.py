"""Adapters that travel: their cards, the Hugging Face Hub, and checks of what arrives."""
