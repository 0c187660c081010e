"""Storage backends: from a URL's scheme to a function that opens it as an obstore store.

Readers and runs use this one table. Credentials come from the cloud's usual environment variables.
"""

from collections.abc import Callable
from typing import Any

from nntk_dist.registration.registry import Registry

# Other packages add theirs as entry points of this group.
BACKENDS: Registry[Callable[[str], Any]] = Registry(
    "scheme of run_dir",
    "nntk_dist.storage_backends",
    {"s3": "obstore.store:from_url", "gs": "obstore.store:from_url", "az": "obstore.store:from_url"},
)
