"""The table of random streams: the purpose of each stream, and the counters that each use of it takes.

A random number is a pure function of (seed, stream, group, draw, index); see `nntk_dist.sampling.philox`. Two uses of
one stream must differ in group, draw, index or seed. This module lists every use, so that a new use can take free
counters. It generates no numbers.

| stream | group | draw | index | used by |
|---|---|---|---|---|
| PARAMETER | draw of the kernel (a pair counts once) | 0: normals, `LAW_DRAW`: one uniform | parameter | `draws` |
| RADIUS | draw of the kernel (a pair counts once) | 0 | 0 | shrinkage of `autodiff` |
| EXAMPLE | example id | group of draws | layer, unit | noise of `activation` |
| PILOT | example id | group of pilot draws | layer, unit | pilot noise of `activation` |
| PILOT | draw of a trial; from `PILOT_WEIGHTS` on: pilot draw | as PARAMETER | parameter | `weight` |
| MODEL | random function | module | as requested; from `BRIDGE_COUNTER` on: bridges | noise of the model |
| SKETCH | coordinate on one side of a tensor | tensor and side | column | sketches of gradients |
| SAMPLE | `ROW_SAMPLE` … `LEAVE_ONE_OUT_SAMPLE` | 0 | example | samples of rows, columns, tiles, pivots |
| PROBE | draw of a segment; from `CHORD_GROUP` on: chords | 0 | parameter | probes of the model |
| ATTENTION | row of Q or K; `REFERENCE_GROUP`: examples | `QUERY_DRAW`, `KEY_DRAW` | parameter | scores of draws |

Checks of layer formulas use the stream PROBE too, under the fixed seeds 0, 1 and 2.
"""

from enum import IntEnum
from typing import Final


class Stream(IntEnum):
    """The purpose of a random number. Numbers of different streams are independent."""

    PARAMETER = 0
    RADIUS = 1
    EXAMPLE = 2
    MODEL = 3
    SKETCH = 4
    SAMPLE = 5
    PROBE = 6
    ATTENTION = 7
    PILOT = 8


# PARAMETER: draw numbers.
LAW_DRAW: Final = 1  # the uniform number of a law; the normals of a perturbation are draw 0

# MODEL: counters of one module. Tables use smaller counters; the bridges between their entries use those from here on.
BRIDGE_COUNTER: Final = 1 << 46

# PILOT: groups. No kernel has both estimators.
PILOT_WEIGHTS: Final = 1 << 20  # first pilot draw of `weight`; the draws of its trials use smaller numbers

# SAMPLE: groups.
ROW_SAMPLE: Final = 0  # rows of the entries that calibrate the standard errors
COLUMN_SAMPLE: Final = 1  # and their columns
VERIFIED_SAMPLE: Final = 2  # tiles that `verify` computes again
KRYLOV_SAMPLE: Final = 1 << 24  # start of a block Krylov iteration, one group for each vector
PIVOT_SAMPLE: Final = 1 << 25  # pivots of a Cholesky factor, one group for each stripe
LEAVE_ONE_OUT_SAMPLE: Final = 1 << 26  # examples for exact leave-one-out predictions

# PROBE: groups.
CHORD_GROUP: Final = 1 << 20  # first group of long chords; segments of the integrated gradient use smaller ones

# ATTENTION: draw numbers and groups.
QUERY_DRAW: Final = 0
KEY_DRAW: Final = 1
REFERENCE_GROUP: Final = 1 << 20  # choice of the reference batch; the rows of Q and K use smaller groups
