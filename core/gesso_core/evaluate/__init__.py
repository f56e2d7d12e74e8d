"""Measuring the shipped small models against their gates."""
