"""Calibration data: texts, the inputs of layers, and the moments of these inputs."""
