"""Co2S for the Hugging Face ecosystem: semi-supervised segmentation of remote-sensing images with two students."""

from .model.auto_classes import register
from .model.configuration_co2s import Co2SConfig
from .model.image_processing_co2s import Co2SImageProcessor, Co2SImageSegmentationPipeline
from .model.modeling_co2s import Co2SForSemanticSegmentation, Co2SPreTrainedModel, Co2SSemanticSegmenterOutput


__version__ = "0.1.0"

register()

__all__ = [
    "Co2SConfig",
    "Co2SForSemanticSegmentation",
    "Co2SImageProcessor",
    "Co2SImageSegmentationPipeline",
    "Co2SPreTrainedModel",
    "Co2SSemanticSegmenterOutput",
]
