"""Small random models that see: their config, their processor, and conversations about generated images."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

PIXELS, PATCH, TOKENS = 112, 14, 16
VOCABULARY = 4000
IMAGE, BEGIN, END = 300, 301, 302
"""Ids of the tokens that stand for an image, and around it."""
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "mm_tokens_per_image": TOKENS,
    "image_token_id": IMAGE,
    "boi_token_index": BEGIN,
    "eoi_token_index": END,
    "text_config": {
        "model_type": "gemma3_text",
        **TEXT,
        "head_dim": 64,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
}
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "image_token_id": IMAGE,
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 64, **VISION},
}
PLACE = {"gemma3": "<begin>", "llava": "<image>"}
"""What stands for an image in a text before its tokens are put there."""


def small_processor(model_type: str) -> ProcessorMixin:
    """The processor of a small model: words `w0`, `w1`, .. and three special tokens."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    for word, number in (("<pad>", 0), ("<eos>", 1), ("<image>", IMAGE), ("<begin>", BEGIN), ("<end>", END)):
        del words[f"w{number}"]
        words[word] = number
    written = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    written.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=written,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"},
    )
    template = (
        "{% for turn in messages %}{% if turn.content is string %}{{ turn.content }} {% else %}"
        "{% for part in turn.content %}{% if part.type == 'image' %}" + PLACE[model_type] + " "
        "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    size = {"height": PIXELS, "width": PIXELS}
    if model_type == "gemma3":
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=size), tokenizer, chat_template=template, image_seq_length=TOKENS
        )
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def rows_with_images(count: int, length: int, images: int) -> list[dict[str, Any]]:
    """Conversations: every other one longer than `length` tokens, which cuts it; the others shorter."""
    rng = random.Random(0)
    return [
        {
            "images": [_image(rng) for _ in range(images)],
            "messages": [
                {"role": "user", "content": "w7 w8"},
                {"role": "assistant", "content": " ".join(_words(rng, length if index % 2 == 0 else 5))},
            ],
        }
        for index in range(count)
    ]


def _words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(1000, VOCABULARY)}" for _ in range(count)]


def _image(rng: random.Random) -> Image.Image:
    color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    return Image.new("RGB", (rng.randrange(40, 200), rng.randrange(40, 200)), color)
