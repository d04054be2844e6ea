"""Programs that train one model with and without the wrappers, and compare.

Run them from the root of the repository::

    python -m examples.large_table
    python -m examples.imdb_lazy
    python -m examples.cifar_lookahead
    python -m examples.search_k_alpha
"""
