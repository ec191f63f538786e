"""Before the merge: do the models fit together, and does the result fit the machine."""
