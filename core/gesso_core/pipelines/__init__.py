"""From requests to pictures: everything that puts models, samplers and text encoders together."""
