"""VILA-U (arXiv 2409.04429): one autoregressive model that sees and draws."""
