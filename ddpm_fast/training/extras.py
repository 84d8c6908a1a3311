"""The optional packages: imported when first needed, with an error that says what to install."""

import importlib
from typing import Any

# module: (package, the extra that brings it)
PACKAGES = {
    "PIL": ("Pillow", "demo"),
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "tensorboard": ("tensorboard", "tensorboard"),
}


def require(module: str) -> Any:
    """Imports `module` ("PIL.Image", "sklearn.datasets"...).

    Raises:
        ImportError: the package isn't installed; the text says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, extra = PACKAGES[module.split(".")[0]]
        raise ImportError(f'{package} is needed here: pip install "ddpm_fast[{extra}]" ({error})') from error
