"""What a notebook needs around the mathematics: one call to start, then tables, figures, verdicts and
provenance.

Nothing here knows a method: the notebooks bring methods and this package together.
"""

from lib.companion.run import Run, start

__all__ = ["Run", "start"]
