"""What a model's layers are fed: calibration texts, and second moments of the layers' inputs."""

from shira_format.calibration.moments import Moment, Moments, collect_moments
from shira_format.calibration.texts import (
    ChosenLayers,
    LoadedModel,
    Texts,
    batches,
    choose_layers,
    load_model,
    read_texts,
)

__all__ = [
    "ChosenLayers",
    "LoadedModel",
    "Moment",
    "Moments",
    "Texts",
    "batches",
    "choose_layers",
    "collect_moments",
    "load_model",
    "read_texts",
]
