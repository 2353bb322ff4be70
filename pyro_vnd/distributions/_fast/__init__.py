"""Fast paths: each does what the plain code beside it does, for a gain that `benchmarks.fast_paths` shows.

`name` is the fast path and `plain_name` the plain code, with the same arguments. Values and gradients are equal, which
tests hold them to. Where torch traces operations, in `torch.func` or a compilation, the fast path hands over to the
plain code: hand-written autograd functions then need no rules for that, which would take as much time as they save.

Other fast paths are measured there, too, but are no functions of arrays with a plain one beside them. They are a
choice that a class makes with what it alone knows, and stay in it: `Cut.put`, `CutMask` and its KL (which laws are
random still), `MaskSchedule.draw` (numpy for a few numbers), `Completion` of a decoder (which codes are whole),
`IsotropicNormal` (one deviation for all pixels), `Width.spread` (blocks of one size) and `quiet_lookups` (which
parameters Pyro knows already).
"""
