"""A clip and a question to model inputs."""
