"""Mixed-precision plans: a spec for each layer under a budget."""
