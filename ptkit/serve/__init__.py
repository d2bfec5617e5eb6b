"""An OpenAI-compatible server whose every request picks its adapter."""
