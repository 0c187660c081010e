"""Kernel ridge regression with leave-one-out selection of the ridge: one solver a file, and what they share."""
