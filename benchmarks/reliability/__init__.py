"""What trainings survive, with these optimizers and with their peers.

`_properties` asks, once for all; a script a peer says how that is made, stepped, saved
and loaded: `ours`, `tfa`, `optax_lookahead`, `timm_lookahead`,
`pytorch_optimizer_lookahead`. `python -m benchmarks.reliability` runs them.
"""
