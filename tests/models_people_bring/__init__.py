"""A table of the kinds of models and inputs that people bring, each small, with what is right for it.

    case            a row of the table: a model, its examples, its options, and what is right
    recurrent, attention, layers, control_flow, precision, wrappers, inputs, outputs, refused    the rows
    test_every_case crosses the table with the public functions

What is right is computed by an independent oracle (`tests.oracles.autograd_loop` by default), or is an error of the
library with a message. Kernels themselves are checked in `tests.library`.
"""
