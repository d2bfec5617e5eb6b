"""Measurements anyone can repeat: ptkit beside its peers, in one run, on their own machine."""
