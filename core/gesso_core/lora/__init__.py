"""LoRA of users at run time: low-rank products beside the weights, which are never changed."""
