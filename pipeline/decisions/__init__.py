"""What a job fixes before it runs: data, model, layout, solvers, and what a stored run allows."""
