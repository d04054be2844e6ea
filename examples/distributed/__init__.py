"""One model on several devices or processes: an example for each engine."""
