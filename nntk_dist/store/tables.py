"""The tables of a run, such as eigenvalues and predictions: Parquet files in the folder `tables` beside the store.

They become pandas data frames; pandas and pyarrow are needed only when a table is read.
"""

import io
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError

from nntk_dist.errors import StoreError, Unavailable, first_line, nearest_name

if TYPE_CHECKING:  # in the extra `analysis`
    import pandas

TABLES_FOLDER = "tables"
_SUFFIX = ".parquet"


def table_names(files: Any) -> tuple[str, ...]:
    """Return the sorted names of the tables in the run directory `files`, an obstore store."""
    paths = (entry["path"] for batch in obstore.list(files, prefix=TABLES_FOLDER) for entry in batch)
    return tuple(sorted(path.rpartition("/")[2].removesuffix(_SUFFIX) for path in paths if path.endswith(_SUFFIX)))


def read_table(files: Any, location: str, name: str) -> "pandas.DataFrame":
    """Read a table whole.

    Args:
        files: the run directory, an obstore store.
        location: its path or address, for messages.
        name: of the table.

    Raises:
        StoreError: there is no such table (the message lists all), or it cannot be read.
        Unavailable: pandas or pyarrow is not installed.
    """
    try:
        content = bytes(obstore.get(files, f"{TABLES_FOLDER}/{name}{_SUFFIX}").bytes())
        import pandas

        return pandas.read_parquet(io.BytesIO(content))
    except ImportError as error:
        raise Unavailable(
            "tables need pandas and pyarrow; pip install them, or this project's extras 'analysis' and 'pipeline'"
        ) from error
    except FileNotFoundError:
        held = table_names(files)
    except (BaseError, OSError, ValueError) as error:  # pyarrow's errors of damaged files are ValueErrors
        raise StoreError(
            f"the table '{name}' of the run at '{location}' cannot be read ({first_line(error)}); run 'nntk verify', "
            "which says what is damaged"
        ) from error
    raise StoreError(
        f"the run at '{location}' holds no table '{name}'{nearest_name(name, held)}; it holds: "
        f"{', '.join(held) or 'none'}; the stages that follow the kernel write them"
    )
