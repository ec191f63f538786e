"""The ways to fit a gate, one module each: `fit` takes what tokens.py has and gives a gate `(experts, hidden)`."""
