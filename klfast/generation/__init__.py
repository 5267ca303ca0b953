"""Text generation: the loop, cache and positions, settings, sampling, stopping."""
