"""What every layer may use: errors, files, numbers, the machine. Imports nothing of klfast's other packages."""
