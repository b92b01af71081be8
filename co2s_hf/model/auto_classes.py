"""Register Co2S with the auto classes and with `pipeline` of transformers. `import co2s_hf` does this."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    ImageSegmentationPipeline,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_co2s import Co2SConfig
from .image_processing_co2s import Co2SImageProcessor, Co2SImageSegmentationPipeline
from .modeling_co2s import Co2SForSemanticSegmentation


class RegisteredPipeline(ImageSegmentationPipeline):
    """The class that `pipeline("image-segmentation")` calls. It never makes an object of its own class.

    For a Co2S model, it makes a [`Co2SImageSegmentationPipeline`]. For any other model, it makes transformers' own
    pipeline, as if this package was not imported.
    """

    # `pipeline` reads this before it calls the class. Otherwise it looks for a video processor in the model, and asks
    # whether to run the code of the model.
    _load_video_processor = False

    def __new__(cls, model: PreTrainedModel, **kwargs) -> ImageSegmentationPipeline:
        is_co2s = model.config.model_type == Co2SConfig.model_type
        return (Co2SImageSegmentationPipeline if is_co2s else ImageSegmentationPipeline)(model=model, **kwargs)


def register():
    """Register the classes. Saved models then load without `trust_remote_code`, by the code of this package."""
    AutoConfig.register(Co2SConfig.model_type, Co2SConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(Co2SConfig, Co2SForSemanticSegmentation, exist_ok=True)
    AutoImageProcessor.register(Co2SConfig, image_processor_classes={"pil": Co2SImageProcessor}, exist_ok=True)
    # Saved models contain the code, so they also load without this package (with `trust_remote_code=True`).
    Co2SConfig.register_for_auto_class()
    Co2SForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
    Co2SImageProcessor.register_for_auto_class()
    # `pipeline("image-segmentation")` looks up class names here, and logs an error if one is missing.
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[Co2SConfig.model_type] = Co2SForSemanticSegmentation.__name__
    # `register_pipeline` would log a warning, because the task exists.
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = RegisteredPipeline
