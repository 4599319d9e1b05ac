"""Drop-down menus for a person in front of a notebook; a notebook that runs by itself keeps its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

from lib.system.errors import unknown


def choose(choice: MutableMapping[str, str], parts: Mapping[str, Iterable[str]], *, shown: bool) -> None:
    """One menu per part, each changing its entry of ``choice`` when somebody picks another name.

    Args:
        choice: part -> the name chosen at first.
        parts: part -> the names allowed.
        shown: whether to show the menus; without them the choice is printed.
    Raises:
        CompanionError: a name at first that is not allowed.
    """
    for part, names in parts.items():
        if choice[part] not in list(names):
            raise unknown(part, choice[part], names)
    if not shown:
        print(", ".join(f"{part}: {choice[part]}" for part in parts))
        return
    import ipywidgets
    from IPython.display import display

    menus = []
    for part, names in parts.items():
        menu = ipywidgets.Dropdown(options=list(names), value=choice[part], description=part)
        menu.observe(lambda change, part=part: choice.update({part: change["new"]}), names="value")
        menus.append(menu)
    display(ipywidgets.VBox(menus))
