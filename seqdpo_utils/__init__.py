"""Helpers for the notebooks of a study of sequential Direct Preference Optimisation.

The notebooks argue, this package computes. Each module imports only from those above it:

    errors       the one kind of error that explains itself
    chains       how a run is written: stages, variants, what begins with what
    layouts      four public data sets and a user's own, one kind of pair
    paths        where every file lies; written whole or not at all
    params       parameter files, a chain and the command line as one checked record
    encoding     the token ids of a pair
    pairs        one table of preference pairs: ids, splits, turned labels
    lists        several rated answers to a prompt: the listwise loss
    schedule     weights of several aspects, and a schedule that learns
    models       base model, tokenizer, adapter
    scoring      exact sums of log-probabilities
    records      per-pair records, the primary result
    divergence   KL from the base
    conflict     gradients of two objectives: cosines and what they allow to say
    movement     how far the adapter moved, and which way
    ledger       what a stage's steps did to an earlier loss
    measuring    TRL's trainer, which also looks back at earlier objectives
    listwise     the trainer of several aspects at once
    stage_data   what a stage trains on and looks back at
    stages       one stage: its trainer, the proof of its reference, training, what it leaves
    metrics      margins, accuracies, transfer, outcomes
    redistribution  which pairs moved: quartiles, what was kept of what was learned
    rivals       other explanations of a loss
    verdicts     several verdicts at once: Holm's correction, how often the rule errs
    power        what a study of a given size can decide, and at what cost
    contrasts    tables across chains
    dial         what the instruments read where the opposition is known
    compatibility  what was known before a later stage, beside what then happened
    mixing       adapters mixed without training, and where every remedy ends
    steering     control at inference: lambda asked for without training again
    controls     what a later stage's labels do, beside what any later training does
    plasticity   forgetting at equal plasticity: projected steps, the reference axis
    charts       figures
    teaching     predictions, checks that teach, trials beside the study, copies for a class

What runs the notebooks has a room of its own:

    batch.access      whether models, data and packages can be had
    batch.notebooks   one notebook through papermill
    batch.plan        what a study would run and need
    batch.look        what is known of the pairs before anything is trained
    batch.study       all of it through Snakemake
    batch.pages       the rendered appendix
    batch.cli         python -m seqdpo_utils
"""

import sys

# jsonschema, behind nbformat and altair, would compile a grammar of web addresses: a second in every process
sys.modules.setdefault("rfc3987_syntax", None)
