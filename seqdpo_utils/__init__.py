"""Helpers for the notebooks of a study of sequential Direct Preference Optimisation.

The notebooks argue, this package computes. Modules import only downward:

    paths, params            names of files, checked parameters
    sources, data            four public layouts, one table of preference pairs
    models, encoding         base model, tokens of a pair
    scoring                  exact sums of log-probabilities
    training                 DPO stages with the base model as reference
    metrics, mechanics       what the records say; how gradients and adapters moved
    charts, summary          figures; tables across chains
    appendix                 rendered pages
    run                      papermill, Snakemake and the command line
"""
