"""Tiny random encoders of the types that lori knows, and rows for them to learn."""

import json
import random

FILLERS = ["box", "ball", "on", "off", "in"], ["up", "down", "near", "far", "by"]
WORDS = ["red", "blue", "green", "big", "tiny", "old", *FILLERS[0], *FILLERS[1]]
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
SHAPE = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
TEXT = {
    "albert": ("AlbertModel", {"embedding_size": 16}),
    "bert": ("BertModel", {}),
    "camembert": ("CamembertModel", {}),
    "deberta-v2": ("DebertaV2Model", {"relative_attention": True, "position_buckets": 8,
                                      "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}),
    "distilbert": ("DistilBertModel", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "electra": ("ElectraModel", {"embedding_size": 16}),
    "ernie": ("ErnieModel", {}),
    "modernbert": ("ModernBertModel", {"global_attn_every_n_layers": 2, "local_attention": 8,
                                       "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
                                       "sep_token_id": 2}),
    "mpnet": ("MPNetModel", {}),
    "roberta": ("RobertaModel", {}),
    "xlm-roberta": ("XLMRobertaModel", {}),
}  # fmt: skip
PIXELS = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
IMAGES = {
    "beit": ("BeitModel", {}),
    "deit": ("DeiTModel", {}),
    "dinov2": ("Dinov2Model", {"mlp_ratio": 2}),
    "swin": ("SwinModel", {"embed_dim": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
                           "window_size": 2}),
    "vit": ("ViTModel", {}),
}  # fmt: skip
# Those whose linear layers all stand in one list of blocks and read what the tokens became.
LAYERED = [
    kind for kind in (*TEXT, *IMAGES) if kind not in ("albert", "deberta-v2", "electra", "swin")
]


def encoder(folder, kind, **changes):
    """A folder with a random encoder of that `model_type` and what it reads with."""
    import torch
    import transformers

    name, own = (TEXT | IMAGES)[kind]
    shape = SHAPE if kind in TEXT else PIXELS
    config = transformers.AutoConfig.for_model(kind, **shape | own | changes)
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    if kind in TEXT:
        tokenizer(segments=kind in ("albert", "bert", "electra", "ernie", "deberta-v2")) \
            .save_pretrained(folder)  # fmt: skip
    else:
        told = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3}  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def tokenizer(segments):
    """A token a word, with the marks around that BERT puts there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]",
        unk_token="[UNK]", model_input_names=names,
    )  # fmt: skip


def sentences(labels, count, seed, fillers=FILLERS[0]):
    """Rows of text, no two alike, whose label is the one of `labels` that stands in them."""
    draw = random.Random(seed)
    seen = {}
    while len(seen) < count:
        label = draw.choice(labels)
        words = [*draw.choices(fillers, k=draw.randint(3, 7)), label]
        draw.shuffle(words)
        seen[" ".join(words)] = label
    return [{"text": text, "label": label} for text, label in seen.items()]


def write_jsonl(path, rows):
    """The rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def squares(folder, labels, count, seed):
    """A folder of 20 x 20 images a label: noise with a square of that colour in it."""
    import numpy as np
    from PIL import Image

    colours = {"red": (230, 40, 40), "blue": (40, 40, 230), "green": (40, 200, 40)}
    draw = np.random.default_rng(seed)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(60, 200, (20, 20, 3)).astype(np.uint8)
            x, y = draw.integers(2, 8, 2)
            pixels[y : y + 10, x : x + 10] = colours[label]
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder
