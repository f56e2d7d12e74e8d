"""Operations that the models share: formula, reference, and the fast form, one per file."""
