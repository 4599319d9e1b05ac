"""One file per paper. A method is a frozen dataclass: its fields are the paper's hyper-parameters, its functions
``begin``, ``step`` and ``finish`` are the algorithm; ``lib.distill.distill`` owns the loop.

In JupyterLab a method shows itself as a card (``lib.methods.about``); its fields are told by ``DM?``.
Beside each method stand its ``RECIPES``: the published settings by data set and IPC, and the small ones (``lib.recipes``).
:data:`METHODS` is where the name of a method comes from: tables, figures, files and commands use it, and nothing else does.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.recipes import Recipes
from lib.system.errors import choose


@dataclass(frozen=True)
class Entry:
    """A method as a reader knows it.

    Attributes:
        title: as figures and tables write it; paper: authors and year; arxiv: identifier, "" if there is none.
        module, attribute: where its class is; fields: what an instance must have to be this method (several share a class).
        recipes: name of its table in the module; notebook: where it is shown.
        reconstruction: whether no code of the authors is known.
    """

    title: str
    paper: str
    arxiv: str
    notebook: str
    module: str
    attribute: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    recipes: str = "RECIPES"
    reconstruction: bool = False


def _entry(title: str, paper: str, arxiv: str, notebook: str, place: str, **options) -> Entry:
    module, attribute = place.split(":")
    return Entry(title, paper, arxiv, notebook, f"lib.methods.{module}", attribute, **options)


# name -> entry; a new paper adds a line
METHODS = {
    "random": _entry("random real images", "", "", "80_selection", "selection:RandomReal", recipes="RANDOM"),
    "herding": _entry("herding", "Welling 2009", "", "80_selection", "selection:Herding", recipes="HERDING"),
    "k_center": _entry("k-center", "Sener & Savarese 2018", "1708.00489", "80_selection", "selection:KCenter", recipes="K_CENTER"),
    "rcig": _entry("RCIG", "Loo et al. 2023", "2302.06755", "11_rcig", "rcig:RCIG"),
    "dc": _entry("DC", "Zhao et al. 2021", "2006.05929", "12_dc", "dc:DC"),
    "dsa": _entry("DSA", "Zhao & Bilen 2021", "2102.08259", "30_dsa", "dsa:DSA"),
    "dcc": _entry("DCC", "Lee et al. 2022", "2202.02916", "60_dcc", "dcc:DCC"),
    "idc": _entry("IDC", "Kim et al. 2022", "2205.14959", "31_idc", "idc:IDC"),
    "dream": _entry("DREAM", "Liu et al. 2023", "2302.14416", "70_dream", "dream:DREAM"),
    "dream_dc": _entry("DREAM on DC", "Liu et al. 2023", "2302.14416", "70_dream", "dream:DreamDC", recipes="DREAM_DC"),
    "dcep": _entry("DCEP", "Zhou et al. 2024", "", "32_dcep", "dcep:DCEP", reconstruction=True),
    "lcmat_c": _entry("LCMat-C", "Shin et al. 2023", "2303.04449", "13_lcmat", "lcmat:LCMatC", recipes="LCMAT_C", reconstruction=True),
    "lcmat_s": _entry("LCMat-S", "Shin et al. 2023", "2303.04449", "13_lcmat", "lcmat:LCMatS", recipes="LCMAT_S"),
    "dm": _entry("DM", "Zhao & Bilen 2023", "2110.04181", "20_dm", "dm:DM"),
    "cafe": _entry("CAFE", "Wang et al. 2022", "2203.01531", "17_cafe", "cafe:CAFE"),
    "m3d": _entry("M3D", "Zhang et al. 2024", "2312.15927", "21_m3d", "m3d:M3D"),
    "idm": _entry("IDM", "Zhao et al. 2023", "2307.09742", "61_idm", "idm:IDM"),
    "datadam": _entry("DataDAM", "Sajedi et al. 2023", "2310.00093", "62_datadam", "datadam:DataDAM"),
    "ddm": _entry("DDM", "Malakshan et al. 2025", "2412.04748", "63_ddm", "ddm:DDM"),
    "wasserstein": _entry("Wasserstein", "", "", "22_wasserstein", "wasserstein:WassersteinDM", reconstruction=True),
    "sre2l": _entry("SRe2L", "Yin et al. 2023", "2306.13092", "23_wmdd", "sre2l:SRe2L"),
    "wmdd": _entry("WMDD", "Liu et al. 2025", "2311.18531", "23_wmdd", "wmdd:WMDD"),
    "krr": _entry("KRR", "Chen et al. 2024", "", "18_krr", "krr:KRR"),
    "kip": _entry("KIP", "Nguyen et al. 2021", "2011.00050", "15_kip", "kip:KIP"),
    "conv_kip": _entry("KIP, convolutional", "Nguyen et al. 2021", "2107.13034", "16_kip_conv", "kip:ConvKIP", recipes="CONV_RECIPES"),
    "rfad": _entry("RFAD", "Loo et al. 2022", "2210.12067", "51_rfad", "rfad:RFAD"),
    "dd": _entry("DD", "Wang et al. 2018", "1811.10959", "10_dd", "dd:DD"),
    "mtt": _entry("MTT", "Cazenavette et al. 2022", "2203.11932", "14_mtt", "mtt:MTT"),
    "esp": _entry("ESP", "Ma et al. 2023", "", "50_esp", "esp:ESP", reconstruction=True),
    "itgan": _entry("IT-GAN", "Zhao & Bilen 2022", "2204.07513", "40_itgan", "itgan:ITGAN"),
    "dcgm": _entry("DCGM", "Zhang et al. 2023", "2309.07698", "41_dcgm", "dcgm:DCGM", reconstruction=True),
    "glad": _entry("GLaD", "Cazenavette et al. 2023", "2305.01649", "43_glad", "glad:GLaD"),
    "haba": _entry("HaBa", "Liu et al. 2022", "2210.16774", "45_haba", "haba:HaBa"),
    "dim": _entry("DiM", "Wang et al. 2023", "2303.04707", "42_dim", "dim:DiM"),
    "minimax": _entry("Minimax", "Gu et al. 2024", "2311.15529", "44_minimax", "minimax:Minimax"),
    "frepo": _entry("FRePo", "Zhou et al. 2022", "2206.00719", "52_frepo", "frepo:FRePo"),
} | {
    rule: _entry(title, paper, "", "80_selection", "selection:Coreset", fields={"rule": rule}, recipes="CORESETS")
    for rule, title, paper in (
        ("contextual_diversity", "contextual diversity", "Agarwal et al. 2020"),
        ("least_confidence", "least confidence", "Coleman et al. 2020"),
        ("entropy", "entropy", "Coleman et al. 2020"),
        ("margin", "margin", "Coleman et al. 2020"),
        ("forgetting", "forgetting", "Toneva et al. 2019"),
        ("grand", "GraNd", "Paul et al. 2021"),
        ("el2n", "EL2N", "Paul et al. 2021"),
        ("cal", "CAL", "Margatina et al. 2021"),
        ("deepfool", "DeepFool", "Ducoffe & Precioso 2018"),
        ("craig", "CRAIG", "Mirzasoleiman et al. 2020"),
        ("gradmatch", "GradMatch", "Killamsetty et al. 2021"),
        ("glister", "Glister", "Killamsetty et al. 2021"),
        ("facility_location", "facility location", "Iyer et al. 2021"),
        ("graph_cut", "graph cut", "Iyer et al. 2021"),
        ("log_det", "log-determinant", "Iyer et al. 2021"),
    )
}  # fmt: skip


def method(name: str) -> type:
    """The class of a method by its name, or a one-line error that lists them."""
    entry = choose("method", name, METHODS)
    return getattr(importlib.import_module(entry.module), entry.attribute)


def recipes(name: str) -> Recipes:
    """The table of a method's settings by its name, or a one-line error that lists the methods.

    Where several methods share a table (the rules of coresets), its rows have the fields of the one that is asked for.
    """
    entry = choose("method", name, METHODS)
    table = getattr(importlib.import_module(entry.module), entry.recipes)
    if not entry.fields:
        return table
    return Recipes(
        [dataclasses.replace(row, method=dataclasses.replace(row.method, **entry.fields)) for row in table]
    )


def name_of(method: Any) -> str:
    """The name of a method's instance: that of its class in :data:`METHODS`; for a class of somebody else its own name."""
    kind = type(method)
    for name, entry in METHODS.items():
        if (entry.module, entry.attribute) == (kind.__module__, kind.__name__) and all(
            getattr(method, key) == value for key, value in entry.fields.items()
        ):
            return name
    return kind.__name__


def title_of(name: str) -> str:
    """How figures and tables write the method of that name."""
    return METHODS[name].title if name in METHODS else name


def _show_cards() -> None:
    """Let the IPython that runs us, if any, show a method as its card; a class of somebody else that inherits from one, too."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        from lib.methods import about

        html = shell.display_formatter.formatters["text/html"]
        for entry in METHODS.values():
            html.for_type_by_name(entry.module, entry.attribute, about.card)


_show_cards()
