"""Segment, Lift and Fit: 3D boxes and shapes of cars from picture prompts, without training.

After "SLF" (arXiv 2407.11382): a mask per prompt, start poses from the LiDAR points in it, then
gradient descent on pose and shape until the silhouette fits the mask and the surface the points.
"""
