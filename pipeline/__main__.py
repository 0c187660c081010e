"""`python -m pipeline`, the same as the command line `nntk`.

The library installs without the packages of the command line; this module says so in one line if they are missing.
"""

import sys


def main() -> None:
    """Start the command line."""
    try:
        from pipeline.cli.commands import main as start
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("nntk_dist", "pipeline"):
            raise
        sys.stderr.write(f"error: nntk needs the package '{error.name}'; run: pip install 'nntk-dist[pipeline]'\n")
        sys.exit(2)
    start()


if __name__ == "__main__":
    main()
