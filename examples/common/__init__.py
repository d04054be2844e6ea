"""Code that the examples, the experiments and the benchmarks share.

`imdb` and `cifar` load data with the helpers in `sources`. `options` adds options to
command lines. `comparison` collects the runs of several optimizers into a table, a JSON
file and a picture. `record` describes the machine and writes JSON. `plots` has the
colours and the style of all pictures.
"""
