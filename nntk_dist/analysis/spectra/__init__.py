"""Eigenvalues and leading eigenvectors of a symmetric kernel: one solver a file, and what solvers return."""
