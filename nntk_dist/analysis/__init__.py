"""What is done with a finished kernel: spectrum, ridge regression, iterative solvers. No models and no stores."""
