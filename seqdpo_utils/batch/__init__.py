"""What runs the notebooks: one of them, the whole study, the plan ahead of it and the pages after it."""
