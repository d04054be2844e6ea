"""DLRM on click data of Criteo's shape: Adam, LazyOptimizer, row-wise Adagrad."""
