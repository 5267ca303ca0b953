"""Models in the formats of other engines: a measured plan for each of them."""
