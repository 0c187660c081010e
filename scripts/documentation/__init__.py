"""What the documentation site is built with: hooks of MkDocs, and pages that are made from the code."""
