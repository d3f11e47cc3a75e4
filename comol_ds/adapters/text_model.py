"""Which part of a model tokens pass through: a multimodal model has towers for images and sound beside it."""

from torch import nn
from transformers import PreTrainedModel


def text_model(model: nn.Module) -> nn.Module:
    """The part of a model that tokens pass through, without its head; the model itself where it has no other part."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return model
    settings = model.config.get_text_config()
    if settings is model.config:
        return model
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next((part for part in parts if type(part.config) is type(settings)), model)


def beside_text(model: nn.Module) -> set[str]:
    """Names of the modules that only images or sound pass through: all but text model, head, and what contains them."""
    text = text_model(model)
    if text is model:
        return set()
    within = {*text.modules(), *(model.get_output_embeddings() or nn.Identity()).modules()}
    path = next(name for name, module in model.named_modules() if module is text)
    return {
        name
        for name, module in model.named_modules()
        if module not in within and not f"{path}.".startswith(f"{name}." if name else "")
    }
