"""A search over Lookahead's `k` and `alpha` with KerasTuner."""
