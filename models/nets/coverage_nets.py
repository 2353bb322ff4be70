"""The nets of other packages that coverage is measured on, each with inputs that are small and that it takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETS", "Example", "build"]

Example = tuple[Tensor, ...]
ROWS = 2
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384, 512)  # pixels; the first that a net takes is used

# What torchvision lists as classification: torchvision.models.list_models(module=torchvision.models).
TORCHVISION = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50
resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13
vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
""".split()

# One of each family that torchvision has for segmentation and for video.
SEGMENTATION = ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "s3d", "mvit_v1_b", "swin3d_t")

# The smallest net of each of timm's 98 modules of models, and of two more kinds in those that have most of them.
TIMM = """
PLACEHOLDER
""".split()


def _bert() -> tuple[nn.Module, Example]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    return BertModel(config), _tokens(with_mask=True)


def _distilbert() -> tuple[nn.Module, Example]:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=500, dim=64, n_layers=3, n_heads=4, hidden_dim=256)
    return DistilBertModel(config), _tokens(with_mask=True)


def _gpt2() -> tuple[nn.Module, Example]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4, use_cache=False)), _tokens()


def _llama() -> tuple[nn.Module, Example]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=176,
        use_cache=False,
    )
    return LlamaForCausalLM(config), _tokens()


def _vit() -> tuple[nn.Module, Example]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return ViTForImageClassification(config), (torch.randn(ROWS, 3, 32, 32),)


def _swin() -> tuple[nn.Module, Example]:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[4, 8], window_size=4, num_labels=10
    )
    return SwinForImageClassification(config), (torch.randn(ROWS, 3, 64, 64),)


def _convnext() -> tuple[nn.Module, Example]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], num_labels=10)
    return ConvNextForImageClassification(config), (torch.randn(ROWS, 3, 64, 64),)


def _t5_encoder() -> tuple[nn.Module, Example]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=500, d_model=64, d_kv=16, num_heads=4, num_layers=3, d_ff=256)
    return T5EncoderModel(config), _tokens(with_mask=True)


def _whisper_encoder() -> tuple[nn.Module, Example]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=64,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        num_mel_bins=40,
        max_source_positions=50,
    )
    return WhisperEncoder(config), (torch.randn(ROWS, 40, 100),)


def _tokens(with_mask: bool = False) -> Example:
    tokens = torch.randint(0, 500, (ROWS, 12))
    return (tokens, torch.ones_like(tokens)) if with_mask else (tokens,)


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "BERT": _bert,
    "DistilBERT": _distilbert,
    "GPT-2": _gpt2,
    "Llama": _llama,
    "ViT": _vit,
    "Swin": _swin,
    "ConvNeXt": _convnext,
    "T5 encoder": _t5_encoder,
    "Whisper encoder": _whisper_encoder,
}

NETS: list[tuple[str, str]] = [
    *(("torchvision", name) for name in TORCHVISION),
    *(("torchvision, segmentation and video", name) for name in (*SEGMENTATION, *VIDEO)),
    *(("timm", name) for name in TIMM),
    *(("transformers", name) for name in TRANSFORMERS),
]


def build(source: str, name: str) -> tuple[nn.Module, Example]:
    """Build a net with random weights, and an input that it takes in evaluation and in training mode.

    Args:
        source: "torchvision", "torchvision, segmentation and video", "timm" or "transformers".
        name: Name of the net there.

    Raises:
        ValueError: If it takes none of the sizes.
    """
    if source == "transformers":
        return TRANSFORMERS[name]()
    if source == "timm":
        import timm

        return _fitting(timm.create_model(name), SIZES)
    from torchvision import models

    if source == "torchvision":
        own = {"image_size": 112 if "32" not in name else 128} if name.startswith("vit_") else {}
        net = models.get_model(name, weights=None, **own)
        return _fitting(net, tuple(own.values()) or SIZES)
    if name in SEGMENTATION:
        return _fitting(models.get_model(name, weights=None, weights_backbone=None), SIZES)
    frames = 16 if name in ("s3d", "mvit_v1_b") else 8
    return _fitting(models.get_model(name, weights=None), SIZES, (frames,))


def _fitting(net: nn.Module, sizes: Sequence[int], frames: tuple[int, ...] = ()) -> tuple[nn.Module, Example]:
    """Return a net, and images of the first of the sizes that it takes."""
    state: Any = {key: value.clone() for key, value in net.state_dict().items()}
    errors = []
    for size in sizes:
        images = torch.randn(ROWS, 3, *frames, size, size)
        try:
            with torch.no_grad():
                net.train()(images)
                net.eval()(images)
        except Exception as error:
            errors.append(f"{size}: {error}")
            continue
        net.load_state_dict(state)  # statistics have changed
        return net, (images,)
    raise ValueError(f"{type(net).__name__} takes images of none of these sizes: {'; '.join(errors)[:300]}")
