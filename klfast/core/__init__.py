"""Errors, files, numbers and the machine, for every layer above. Imports none of klfast's other packages."""
