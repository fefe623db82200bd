"""Hosts that are played: the agent's own code over drivers that only remember."""
