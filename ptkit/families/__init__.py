"""Families of models, each checked at small size: which methods work there, and do as they say."""
