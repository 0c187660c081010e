"""What is written down about a run: manifest, ledger, lock. No arrays."""
