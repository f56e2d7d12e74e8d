"""The HTTP edge: FastAPI in front of the bus. Stateless, so that any number of copies may run."""
