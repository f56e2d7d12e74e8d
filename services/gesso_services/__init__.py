"""What runs: the runtime on NATS and Ray Serve, the services, the gateway, client and CLI."""
