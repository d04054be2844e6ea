"""Adam, LazyOptimizer and Lookahead on a table of two million rows."""
