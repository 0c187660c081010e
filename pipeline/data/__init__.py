"""Data sets by name, ready for a model: stable ids, training and test examples, normalised on the training set alone.

Downloads nothing, knows nothing of configurations or kernels, and holds no state.
"""

from pipeline.data.dataset import Dataset, Split
from pipeline.data.loading import load_dataset

__all__ = ["Dataset", "Split", "load_dataset"]
