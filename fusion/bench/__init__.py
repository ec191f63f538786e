"""What merging costs: against mergekit's own command, against copying the output's bytes, and how long a plan takes."""
