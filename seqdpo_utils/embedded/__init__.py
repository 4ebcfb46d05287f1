"""Preference data authored for this study, laid out like four public data sets; see DATACARD.md."""
