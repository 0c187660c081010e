"""The driver: runs, resumes, searches draws, verifies, and shows progress."""
