"""Squeeze, recover, relabel and train as units of work, so that the same run fits a laptop and a cluster.

A :class:`~lib.scale.plan.Plan` says what is computed; :func:`~lib.scale.units.units` cuts it into units, each of which writes
one file and is skipped when that file is there and whole. Who runs the units is not decided here: ``python -m lib.scale run``
does it one after another, ``workflow/scale.smk`` side by side under Snakemake, on one machine or a cluster; both call the same
:func:`~lib.scale.stages.compute`.
"""
