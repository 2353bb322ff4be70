"""The nets have their published sizes, and the properties that nesting them asks for."""

import pytest
import torch
from torch import fx, nn

from models.nets import NETS, lenet, mlp, mobilenet_v2, resnet18, resnext29, vgg11, vit


def make_small():
    """A small net of each family and structure, with the shape of an image that it takes."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 1)]
    return {
        "mlp": (lambda: mlp(64, hidden=(16, 8)), (64,)),
        "mlp-of-pictures": (lambda: mlp(64, hidden=()), (1, 8, 8)),
        "lenet-28": (lambda: lenet(channels=(4, 6), hidden=8), (1, 28, 28)),
        "lenet-16": (lambda: lenet(3, channels=(4, 6), hidden=8, image_size=16), (3, 16, 16)),
        "lenet-8": (lambda: lenet(channels=(4, 6), hidden=8, image_size=8), (1, 8, 8)),
        "lenet-7": (lambda: lenet(channels=(4, 6), hidden=8, image_size=7), (1, 7, 7)),
        "vgg11-32": (lambda: vgg11(width=1 / 16, image_size=32), (3, 32, 32)),
        "vgg11-28": (lambda: vgg11(1, width=1 / 16, hidden=(8,), image_size=28), (1, 28, 28)),
        "vgg11-40": (lambda: vgg11(1, width=1 / 32, image_size=40), (1, 40, 40)),
        "resnet18": (lambda: resnet18(base=8), (3, 32, 32)),
        "resnext29": (lambda: resnext29(cardinality=4, base_width=4, depth=11, base=8), (3, 32, 32)),
        "resnext20": (lambda: resnext29(1, cardinality=2, base_width=2, depth=20, base=4), (1, 28, 28)),
        "mobilenet-v2": (lambda: mobilenet_v2(width=0.25, stages=stages, last_channels=32), (3, 32, 32)),
        "vit-28": (lambda: vit(1, image_size=28, patch=4, dim=32, depth=2, heads=4), (1, 28, 28)),
        "vit-8": (lambda: vit(1, image_size=8, patch=4, dim=32, depth=2, heads=4), (1, 8, 8)),
    }


@pytest.fixture(params=make_small())
def small(request) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = make_small()[request.param]
    return build(), shape


def num_parameters(build, *args, **kwargs) -> int:
    with torch.device("meta"):  # sizes without memory
        return sum(parameter.numel() for parameter in build(*args, **kwargs).parameters())


@pytest.mark.parametrize(
    ("build", "arguments", "count"),
    [
        pytest.param(mlp, {}, 669_706, id="torch-tutorial"),
        pytest.param(lenet, {"channels": (20, 50), "hidden": 500}, 431_080, id="caffe-lenet"),
        # The well-known 9,231,114 has a bias for each of 2,752 channels, which BatchNorm takes away again.
        pytest.param(vgg11, {}, 9_231_114 - 2_752, id="vgg11-bn"),
        pytest.param(resnet18, {}, 11_173_962, id="resnet18"),
        pytest.param(resnext29, {}, 34_426_698, id="resnext29-8x64d"),
        pytest.param(resnext29, {"cardinality": 16}, 68_155_210, id="resnext29-16x64d"),
        pytest.param(mobilenet_v2, {"num_classes": 1000}, 3_504_872, id="mobilenet-v2-imagenet"),
        pytest.param(mobilenet_v2, {"num_classes": 1000, "width": 0.5}, 1_968_680, id="mobilenet-v2-half"),
        pytest.param(mobilenet_v2, {}, 3_504_872 - 990 * 1281, id="mobilenet-v2-cifar"),
        pytest.param(vit, {"num_classes": 1000, "image_size": 224, "patch": 16}, 5_717_416, id="deit-tiny"),
    ],
)
def test_full_nets_have_as_many_parameters_as_published(build, arguments, count):
    assert num_parameters(build, **arguments) == count


def test_the_wide_vgg_has_the_channels_of_the_paper_on_nested_dropout():
    with torch.device("meta"):
        net = NETS["vgg11-wide"]()
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [96, 192, 384, 384] + [768] * 4
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(768, 256), (256, 10)]


def test_every_net_of_the_table_is_built_by_its_name():
    for name, build in NETS.items():
        assert num_parameters(build, num_classes=7) > 100_000, name


def test_small_nets_give_logits_for_any_number_of_images(small):
    net, shape = small
    net.eval()
    images = torch.rand(3, *shape)
    logits = net(images)
    assert logits.shape == (3, 10)
    assert logits.std() > 0
    torch.testing.assert_close(net(images[1:2]), logits[1:2])


def test_small_nets_take_as_many_classes_as_asked():
    for build in (mlp, lenet, vgg11, resnet18, resnext29, mobilenet_v2, vit):
        with torch.device("meta"):
            last = list(build(num_classes=3).modules())[-1]
        assert last.out_features == 3


def test_traced_nets_compute_the_same_for_another_number_of_images(small):
    net, shape = small
    net.eval()
    traced = fx.symbolic_trace(net)
    for count in (2, 5):
        images = torch.rand(count, *shape)
        torch.testing.assert_close(traced(images), net(images))


def test_all_layers_of_a_trace_are_leaves_that_are_used_once(small):
    net, _ = small
    traced = fx.symbolic_trace(net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    owners = {name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))}
    # A patch embedding's own parameters are read directly, and those inside of an attention belong to the leaf.
    owners = {
        name for name in owners if not name.endswith("out_proj") and not hasattr(net.get_submodule(name), "embed")
    }
    assert owners <= set(called)
    assert len(called) == len(set(called))


def test_gradient_reaches_every_parameter(small):
    net, shape = small
    loss = nn.functional.cross_entropy(net(torch.rand(8, *shape)), torch.arange(8))
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    "build",
    [
        lambda: mlp(256, hidden=(32,)),
        lambda: lenet(channels=(8, 16), hidden=32, image_size=16),
        lambda: vgg11(1, width=1 / 16, image_size=16),
        lambda: resnet18(1, base=8),
        lambda: resnext29(1, cardinality=4, base_width=4, depth=11, base=8),
        lambda: mobilenet_v2(1, width=0.25, stages=[(1, 16, 1, 1), (6, 24, 2, 2)], last_channels=32),
        lambda: vit(1, image_size=16, dim=32, depth=2, heads=4),
    ],
    ids=["mlp", "lenet", "vgg11", "resnet18", "resnext29", "mobilenet-v2", "vit"],
)
def test_small_nets_fit_a_few_images_by_heart(build):
    net, images, labels = build(), torch.rand(10, 1, 16, 16), torch.arange(10)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    assert loss < 1.5  # 2.3 by chance


def test_lenet_pads_only_where_it_must():
    assert lenet(image_size=16)[0].padding == (0, 0)
    assert lenet(image_size=15)[0].padding == (2, 2)


def test_resnext_groups_its_middle_convolutions():
    net = resnext29(cardinality=4, base_width=4, depth=11, base=8)
    grouped = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.groups, m.out_channels) for m in grouped] == [(4, 16), (4, 32), (4, 64)]


def test_vit_tells_the_positions_of_patches_apart():
    net = vit(1, image_size=8, dim=32, depth=2, heads=4).eval()
    images = torch.rand(1, 1, 8, 8)
    swapped = torch.cat([images[..., 4:], images[..., :4]], -1)
    assert not torch.allclose(net(images), net(swapped), atol=1e-4)
    with torch.no_grad():
        net[0].position.zero_()
    torch.testing.assert_close(net(images), net(swapped))


@pytest.mark.parametrize(
    ("build", "arguments", "complaint"),
    [
        (mlp, {"num_inputs": 0}, "`num_inputs` must be positive; got 0"),
        (mlp, {"hidden": (8, -1)}, r"`hidden` must be positive; got \(8, -1\)"),
        (lenet, {"channels": (0, 4)}, r"`channels` must be positive; got \(0, 4\)"),
        (lenet, {"image_size": 3}, "`image_size` must be at least 4"),
        (vgg11, {"width": 0.0}, "`width` must be positive"),
        (vgg11, {"hidden": (0,)}, "`hidden` must be positive"),
        (resnet18, {"base": 0}, "`base` must be positive"),
        (resnext29, {"depth": 28}, r"`depth` must be 9 b \+ 2 .* got 28"),
        (resnext29, {"depth": 2}, r"`depth` must be 9 b \+ 2 .* got 2"),
        (resnext29, {"cardinality": 0}, "`cardinality` must be positive"),
        (mobilenet_v2, {"stages": [(1, 16, 0, 1)]}, "`num_blocks` must be positive"),
        (vit, {"patch": 5}, "`patch` must divide the image's size, 32; got 5"),
        (vit, {"dim": 32, "heads": 3}, "`heads` must divide `dim`, 32; got 3"),
        (vit, {"depth": 0}, "`depth` must be positive"),
    ],
)
def test_wrong_sizes_are_named(build, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(**arguments)
