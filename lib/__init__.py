r"""The companion's library, laid out like the formula that the papers of the field share:

$$\min_{\mathcal S}\ \mathbb E_{\theta}\ d\big(\mathcal A_\omega(\mathcal S),\ \mathcal A_\omega(\mathcal T);\ \theta\big)
\qquad\text{then train a fresh } \theta' \text{ on } \mathcal S \text{ and test it.}$$

``lib.data`` is T, ``lib.nets`` is theta, ``lib.augment`` is A, ``lib.synset`` is S, ``lib.match`` is d, ``lib.methods`` says
which of these are put together how (one file per paper), ``lib.evaluate`` is the second half.
"""

__version__ = "0.1.0"  # as in pyproject.toml
