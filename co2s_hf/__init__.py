"""Co2S for the Hugging Face ecosystem: semi-supervised segmentation of remote-sensing images with two students."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .model.configuration_co2s import Co2SConfig
from .model.image_processing_co2s import Co2SImageProcessor, Co2SImageSegmentationPipeline
from .model.modeling_co2s import Co2SForSemanticSegmentation, Co2SPreTrainedModel, Co2SSemanticSegmenterOutput


__version__ = "0.1.0"

AutoConfig.register(Co2SConfig.model_type, Co2SConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(Co2SConfig, Co2SForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(Co2SConfig, image_processor_classes={"pil": Co2SImageProcessor}, exist_ok=True)
# Saved models contain the code, so they also load without this package (with `trust_remote_code=True`).
Co2SConfig.register_for_auto_class()
Co2SForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
Co2SImageProcessor.register_for_auto_class()
# `pipeline("image-segmentation")` looks up class names here, and logs an error if one is missing.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[Co2SConfig.model_type] = Co2SForSemanticSegmentation.__name__

__all__ = [
    "Co2SConfig",
    "Co2SForSemanticSegmentation",
    "Co2SImageProcessor",
    "Co2SImageSegmentationPipeline",
    "Co2SPreTrainedModel",
    "Co2SSemanticSegmenterOutput",
]
