"""The command ``gesso``: one file per group of commands, put together in ``main``."""
