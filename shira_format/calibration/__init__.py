"""What a model's layers are fed: calibration texts, and second moments of the layers' inputs."""
