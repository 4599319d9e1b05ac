"""One file per paper. A method is a frozen dataclass: its fields are the paper's hyper-parameters, its functions
``begin``, ``step`` and ``finish`` are the algorithm; ``lib.distill.distill`` owns the loop.

Beside each method stand its ``PRESETS``: the published settings (``paper...``) and the small ones of the embedded data sets.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

from lib.system.errors import choose

T = TypeVar("T")

# name -> (module, class); a new paper adds a line
METHODS = {
    "random": ("lib.methods.selection", "RandomReal"),
    "herding": ("lib.methods.selection", "Herding"),
    "k_center": ("lib.methods.selection", "KCenter"),
    "dc": ("lib.methods.dc", "DC"),
    "dsa": ("lib.methods.dsa", "DSA"),
    "dcc": ("lib.methods.dcc", "DCC"),
    "idc": ("lib.methods.idc", "IDC"),
    "dream": ("lib.methods.dream", "DREAM"),
    "dcep": ("lib.methods.dcep", "DCEP"),
    "dm": ("lib.methods.dm", "DM"),
    "m3d": ("lib.methods.m3d", "M3D"),
    "cafe": ("lib.methods.cafe", "CAFE"),
    "idm": ("lib.methods.idm", "IDM"),
    "datadam": ("lib.methods.datadam", "DataDAM"),
    "ddm": ("lib.methods.ddm", "DDM"),
    "wasserstein": ("lib.methods.wasserstein", "WassersteinDM"),
    "sre2l": ("lib.methods.sre2l", "SRe2L"),
    "wmdd": ("lib.methods.wmdd", "WMDD"),
    "krr": ("lib.methods.krr", "KRR"),
    "kip": ("lib.methods.kip", "KIP"),
    "conv_kip": ("lib.methods.kip", "ConvKIP"),
    "rfad": ("lib.methods.rfad", "RFAD"),
    "frepo": ("lib.methods.frepo", "FRePo"),
    "coreset": ("lib.methods.coreset", "Coreset"),
    "lcmat_s": ("lib.methods.lcmat", "LCMatS"),
    "lcmat_c": ("lib.methods.lcmat", "LCMatC"),
}


def method(name: str) -> type:
    """The class of a method by its short name, or a one-line error that lists them."""
    module, attribute = choose("method", name, METHODS)
    return getattr(importlib.import_module(module), attribute)


def preset(table: Mapping[str, T], name: str) -> T:
    """Named settings of a method, or a one-line error that lists them."""
    return choose("preset", name, dict(table))


def settings(table: Mapping[str, T], dataset: str) -> T:
    """A method's settings for a data set: its own preset where it has one, else the published one."""
    return table.get(dataset, table["paper"])
