"""Extras: the optional packages, and how to install them."""


def missing_package(module: str, requirement: str, extra: str) -> ImportError:
    """Return what a module raises without the optional package that it needs: an error that says how to install it."""
    package = requirement.partition(">")[0]
    return ImportError(
        f'{module} needs {package}: pip install "{requirement}", which is what the extra "{extra}" brings:'
        f' pip install -e ".[{extra}]"'
    )
