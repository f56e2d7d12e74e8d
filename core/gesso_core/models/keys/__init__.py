"""Tables of parameter names: foreign checkpoints to our modules and back."""
