"""Adam, LazyOptimizer and Lookahead on an LSTM that reads film reviews."""
