"""What the examples, the experiments and the benchmarks are made with.

`imdb` and `cifar` load data, from `sources`; `options` has parts of command lines;
`comparison` keeps what several optimizers did; `record` describes the machine and
writes JSON; `plots` has the colours and the style of all pictures.
"""
