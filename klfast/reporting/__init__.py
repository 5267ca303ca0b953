"""Tables and plots of sweeps and plans."""
