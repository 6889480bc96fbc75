"""The instrument: what decoupled layers cost beside backpropagation, and what that is worth."""
