"""TwinPilots: large language models on one box, GPU and CPU computing the same layer at the same time.

Importing the package does nothing else: names are loaded when they are first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinpilots.api import LLM as LLM
    from twinpilots.errors import TwinPilotsError as TwinPilotsError
    from twinpilots.errors import UserError as UserError
    from twinpilots.plan.plan import Plan as Plan
    from twinpilots.request import CompletionOutput as CompletionOutput
    from twinpilots.request import RequestOutput as RequestOutput
    from twinpilots.request import SamplingParams as SamplingParams
    from twinpilots.request import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "twinpilots.api",
    "SamplingParams": "twinpilots.request",
    "StructuredOutputsParams": "twinpilots.request",
    "RequestOutput": "twinpilots.request",
    "CompletionOutput": "twinpilots.request",
    "Plan": "twinpilots.plan.plan",
    "TwinPilotsError": "twinpilots.errors",
    "UserError": "twinpilots.errors",
}
__all__ = ["LLM", "CompletionOutput", "Plan", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "TwinPilotsError", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
