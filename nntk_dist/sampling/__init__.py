"""Random numbers and perturbations: the counter-based generator, its streams, laws, designs and draws. No models."""
