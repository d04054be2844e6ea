"""Comparisons that train a model with and without the wrappers.

Run from the root of the repository::

    python -m examples.imdb_lazy
    python -m examples.cifar_lookahead
"""
