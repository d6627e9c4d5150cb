"""Training runs that answer one question each; they take minutes to hours, and no test repeats them in full."""
