"""One file per estimator: how features are computed from a model, and how their products are contracted."""
