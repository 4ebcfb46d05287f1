"""Helpers for the notebooks of a study of sequential Direct Preference Optimisation.

The notebooks argue, this package computes. A module imports only from those above it:

    paths, params            names of files; checked parameters
    encoding                 the token ids of a pair
    sources, data            four public layouts; one table of preference pairs
    access                   whether models, sources and packages can be had
    models                   base model, tokenizer, adapter
    scoring                  exact sums of log-probabilities
    mechanics, training      gradients and movement; DPO stages with the base as reference
    metrics                  what the records say
    charts, summary          figures; tables across chains
    appendix                 rendered pages
    plan                     what a study would run and need
    run                      papermill, Snakemake and the command line
"""
