"""Spark Runtime: run a script in a worker, reload it when it is saved, keep its state; run models on replicas.

Nothing is imported until it is used, so a script in a worker pays nothing for this package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_runtime.config import Model
    from spark_runtime.errors import SparkError
    from spark_runtime.runtime import Spark
    from spark_workers.scripts.api import spark
    from spark_workers.scripts.errors import (
        SparkCancelError,
        SparkControl,
        SparkReloadError,
        SparkStopError,
        SparkUsageError,
    )

__version__ = "0.1.0"
__all__ = [
    "Model",
    "Spark",
    "SparkCancelError",
    "SparkControl",
    "SparkError",
    "SparkReloadError",
    "SparkStopError",
    "SparkUsageError",
    "spark",
]

_HOMES = {
    "spark": "spark_workers.scripts.api",
    "SparkError": "spark_runtime.errors",
    "Model": "spark_runtime.config",
    "Spark": "spark_runtime.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spark_runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "spark_workers.scripts.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
