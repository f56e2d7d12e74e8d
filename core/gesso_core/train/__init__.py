"""Data preparation and training of the small models that ship with gesso."""
