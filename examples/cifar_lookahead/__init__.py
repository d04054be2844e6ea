"""Small pictures: SGD and Adam with and without Lookahead."""
