"""The second half of the field's formula: train fresh networks on S under a named protocol and test them."""

from lib.evaluate.protocol import PROTOCOLS, Protocol, protocol
from lib.evaluate.run import Evaluation, cross_architecture, evaluate, full_data_accuracy

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "Protocol",
    "cross_architecture",
    "evaluate",
    "full_data_accuracy",
    "protocol",
]
