"""Named extensions: importing what a configuration names, and checking the arguments that it gives. No kernels."""
