"""Sentiment of film reviews: Adam with and without LazyOptimizer and Lookahead."""
