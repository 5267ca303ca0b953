"""What sweeps and plans say, as tables and plots."""
