"""An image-classification pipeline of Hugging Face whose answers come with reasons.

    pip install transformers
    python examples/huggingface_pipeline.py cat.jpg --model microsoft/resnet-18

Without --model the network is a small one with random weights: nothing is downloaded, and nothing is meant by it.
"""

import argparse
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ImageClassificationPipeline,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ModelOutput

from pyfast_xai import render
from pyfast_xai.serve import Explained


class ExplainedImageClassification(ImageClassificationPipeline):
    """`ImageClassificationPipeline` that also gives the heat map of the predicted class, and a picture of it."""

    def explain_by(self, method: str) -> "ExplainedImageClassification":
        self._explained = Explained(self.model, method)
        return self

    def _forward(self, model_inputs: Any) -> Any:
        # Pipelines run in inference mode, and explanations that are kept should be ordinary tensors.
        with torch.inference_mode(False):
            images = model_inputs["pixel_values"].clone()
            logits, explanation = self._explained(images)
        # A batch is taken apart by the framework, tensor by tensor.
        return ModelOutput(logits=logits, heatmap=explanation.heatmap, overlay=explanation.overlay())

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        return {
            "classes": super().postprocess(model_outputs, *args, **kwargs),
            "heatmap": model_outputs["heatmap"][0],
            "overlay": render.to_pil(model_outputs["overlay"][0]),
        }


def pipeline_for(model: Any, image_processor: Any, method: str = "grad-cam") -> ExplainedImageClassification:
    made = ExplainedImageClassification(model=model.eval(), image_processor=image_processor)
    return made.explain_by(method)


def random_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    labels = {n: f"class {n}" for n in range(4)}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels)
    return ResNetForImageClassification(config)


def processor(side: int = 64) -> ConvNextImageProcessor:
    return ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--model")
    parser.add_argument("--method", default="grad-cam")
    parser.add_argument("--out", default="overlay.png")
    given = parser.parse_args()
    if given.model:
        model = AutoModelForImageClassification.from_pretrained(given.model, use_safetensors=True)
        chosen = AutoImageProcessor.from_pretrained(given.model)
    else:
        model, chosen = random_resnet(), processor()
    with Image.open(given.image) as picture:
        (found,) = pipeline_for(model, chosen, given.method)([picture.convert("RGB")])
    for answer in found["classes"]:
        print(f"{answer['score']:.1%}  {answer['label']}")
    found["overlay"].save(given.out)
