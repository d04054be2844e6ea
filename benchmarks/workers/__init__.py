"""One program per framework: builds optimizers, runs steps, reports times.

The driver talks to each over pipes, so that runs in different environments
alternate. Only `_problem` and `_serve` are shared, and they need numpy alone.
"""
