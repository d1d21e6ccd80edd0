"""Runs at the start of every Python process under `hf-lnscale run`: turns the flags on with transformers.

Python imports a module of this name at its start, and this folder is the first of PYTHONPATH. A process that does not
import transformers stays unchanged; one that does imports hf_lnscale right after it. Only the standard library is
imported here, since the interpreter may be one without hf_lnscale.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers as usual, with a loader that imports hf_lnscale after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers":
            return None
        # May be asked without an import, just to see whether it is there.
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
                f"hf-lnscale run: {sys.executable} imports transformers and has no hf_lnscale: no flags there",
                file=sys.stderr,
            )
            return
        import hf_lnscale  # noqa: F401


def _run_the_one_that_this_hides() -> None:
    """There may be another sitecustomize further down the path, as of a Linux distribution or of a profiler."""
    path = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.meta_path.insert(0, _Finder())
_run_the_one_that_this_hides()
