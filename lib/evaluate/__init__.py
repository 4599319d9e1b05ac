"""The second half of the field's formula: train fresh networks on S under a named protocol and test them."""

from lib.evaluate.fresh import evaluate_fresh, fresh
from lib.evaluate.networks import Evaluation, cross_architecture, evaluate, full_data_accuracy
from lib.evaluate.protocol import PROTOCOLS, Protocol, protocol
from lib.evaluate.spread import Spread

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "Protocol",
    "Spread",
    "cross_architecture",
    "evaluate",
    "evaluate_fresh",
    "fresh",
    "full_data_accuracy",
    "protocol",
]
