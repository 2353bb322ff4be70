"""Fast paths: each does what the plain code beside it does, for a gain that `benchmarks.fast_paths` shows.

`name` is the fast path and `plain_name` the plain code, with the same arguments. Values and gradients are equal, which
tests hold them to. Where torch traces operations, in `torch.func` or a compilation, the fast path hands over to the
plain code: hand-written autograd functions then need no rules for that, which would take as much time as they save.
"""
