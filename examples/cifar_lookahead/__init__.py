"""SGD and Adam, each with and without Lookahead, on a convolutional network."""
