"""The fabric: broker, calls, jobs, blobs, and the host that runs a service on them."""
