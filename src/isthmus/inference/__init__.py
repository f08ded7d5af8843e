"""One request, several devices: ``isthmus.infer`` in Python."""

from isthmus.inference.engine import Engine
from isthmus.inference.run import open_engine
from isthmus.spec.inference import InferencePlan

__all__ = ["Engine", "InferencePlan", "open_engine"]
