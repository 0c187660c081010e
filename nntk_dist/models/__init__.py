"""A model as a function of its parameters: selecting them, evaluating it, its noise, black boxes. No gradients."""
