"""Preference data authored for this study, and the seeded generator that lays it out like four public data sets."""
