"""Set-up, tests, benchmarks and studies: for people who work on this project, never imported by the packages."""
