"""Generating text: the loop, cache and positions, settings, draws, ends."""
