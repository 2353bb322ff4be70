"""The nets of other packages that coverage is measured on, each with inputs that are small and that it takes."""

import copy
from collections.abc import Callable, Sequence

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
""".split()  # noqa: SIM905

# One of each family that torchvision has for segmentation and for video.
SEGMENTATION = ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "s3d", "mvit_v1_b", "swin3d_t")

# The smallest net, by parameters, of each of timm's 98 modules of models, and the next kind in the two that have most
# nets, `efficientnet` and `vision_transformer`. Chosen before any was tried, and none was left out. Offline timm knows
# no downloads, so this is no list by popularity: a net of every module is what takes no choice. Those without classes
# get a head of 1000, as the others have.
TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms cpubone_nano
crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception
levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256 mnasnet_small mobilenetv2_035 mobilenetv3_small_050
mobilenetv5_base mobileone_s1 mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny
samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window16_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224
vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vit_xsmall_patch16_clip_224 vitamin_small_224 volo_d1_224
xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905


def _bert() -> tuple[nn.Module, Example]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    return BertForSequenceClassification(config), _tokens(with_mask=True)


def _distilbert() -> tuple[nn.Module, Example]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=500, dim=64, n_layers=3, n_heads=4, hidden_dim=256)
    return DistilBertForSequenceClassification(config), _tokens(with_mask=True)


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
    from transformers import T5Config, T5ForTokenClassification

    config = T5Config(vocab_size=500, d_model=64, d_kv=16, num_heads=4, num_layers=3, d_ff=256)
    return T5ForTokenClassification(config), _tokens(with_mask=True)


def _whisper_encoder() -> tuple[nn.Module, Example]:
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        d_model=64,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        num_mel_bins=40,
        max_source_positions=50,
    )
    return WhisperForAudioClassification(config), (torch.randn(ROWS, 40, 100),)


def _tokens(with_mask: bool = False) -> Example:
    tokens = torch.randint(0, 500, (ROWS, 12))
    return (tokens, torch.ones_like(tokens)) if with_mask else (tokens,)


# Each has a head: what a net returns stays whole, and an encoder alone returns the sum of all that its blocks add.
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

        net = timm.create_model(name)
        return _fitting(net if net.num_classes else timm.create_model(name, num_classes=1000), SIZES)
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
    state = copy.deepcopy(net.state_dict())  # with the versions of modules that it has
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
