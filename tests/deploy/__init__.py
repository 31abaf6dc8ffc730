"""Work pools, deployments, the compose file and `loraline doctor`: held offline, by the workers themselves."""
