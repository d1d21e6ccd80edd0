"""Runs at startup of every Python process under `hf-lnscale run`: enables the flags when transformers is imported.

Python imports a module of this name at startup, and this folder is first on PYTHONPATH. Processes that do not import
transformers are unaffected; in others, hf_lnscale is imported right after it. Imports only the standard library, since
the interpreter may not have hf_lnscale installed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers as usual, but with a loader that then imports hf_lnscale."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers":
            return None
        # This may also be called without an import, to check whether transformers is installed.
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if importlib.util.find_spec("hf_lnscale") is None:
            print(
                f"hf-lnscale run: {sys.executable} has no hf_lnscale installed, so the flags are not enabled there",
                file=sys.stderr,
            )
            return
        import hf_lnscale  # noqa: F401


def _run_the_one_that_this_hides() -> None:
    """Runs another sitecustomize later on the path, for example of a Linux distribution or a profiler."""
    path = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.meta_path.insert(0, _Finder())
_run_the_one_that_this_hides()
