"""Optional packages of exported models."""

import importlib
from types import ModuleType


def need(package: str, for_what: object) -> ModuleType:
    """Import an optional package. Raises ValueError, naming the extra that installs it, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{for_what} needs the package {package}: pip install 'linvit[export]'") from error
